"""Losses that torch has not: against optax's goldens, torch.distributions, sums over all outcomes, and loops."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Normal, kl_divergence
from zoo_case import Draw

from functorch_gen import losses, numerics
from functorch_gen.transforms import grad, hessian, vmap

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "losses.json").read_text())
SIGNS = torch.tensor(GOLDENS["signs"], dtype=torch.float64)
CTC_LABELS = torch.tensor([[1, 1, 3], [2, 1, 0], [0, 0, 0]])


def close(found, expected, rtol: float = 1e-12) -> None:
    """To roundings of float64."""
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-13)


OURS = {
    "log_cosh": losses.log_cosh,
    "hinge_loss": lambda x: losses.hinge_loss(x, SIGNS),
    "multiclass_hinge_loss": lambda x: losses.multiclass_hinge_loss(x, torch.tensor([2, 0, 4])),
    "sigmoid_focal_loss": lambda x: losses.sigmoid_focal_loss(x, (SIGNS + 1) / 2, alpha=0.25, gamma=1.5),
    "sigmoid_focal_loss soft": losses.sigmoid_focal_loss,
    "cosine_distance": losses.cosine_distance,
    "cross_entropy": lambda x, t: losses.cross_entropy(x, t, label_smoothing=0.1),
    "kl_div": losses.kl_div,
    "ctc_loss": lambda x: losses.ctc_loss(x, CTC_LABELS, torch.tensor([7, 5, 7]), torch.tensor([3, 2, 0])),
    "ntxent": lambda x, y: losses.ntxent(x, y, temperature=0.3).mean(),
}


@pytest.mark.parametrize("name", OURS)
def test_loss_and_gradients_equal_optax(name):
    golden, fun = GOLDENS[name], OURS[name]
    args = [torch.tensor(x, dtype=torch.float64) for x in golden["args"]]
    close(fun(*args), torch.tensor(golden["value"], dtype=torch.float64))
    gradients = grad(lambda *args: fun(*args).sum(), tuple(range(len(args))))(*args)
    for found, expected in zip(gradients, golden["gradients"], strict=True):
        close(found, torch.tensor(expected, dtype=torch.float64))


# Focal, Dice.


def test_focal_loss_is_the_formula_and_at_gamma_0_cross_entropy():
    d = Draw(0)
    x, labels, weight = 2 * d(4, 3, 2), d.labels(3, 4, 2), d.times(3)
    labels[1, 0] = -100
    p = torch.softmax(x, 1)
    for b, i in itertools.product(range(4), range(2)):
        one = losses.focal_loss(x[b : b + 1, :, i], labels[b : b + 1, i], gamma=1.3, weight=weight).item()
        y = labels[b, i].item()
        p_y = p[b, y, i].item() if y >= 0 else 1.0
        expected = -weight[y].item() * (1 - p_y) ** 1.3 * math.log(p_y) if y >= 0 else 0.0
        assert one == pytest.approx(expected, rel=1e-12)
    close(
        losses.focal_loss(x, labels, gamma=0.0, weight=weight),
        losses.cross_entropy(x, labels, weight=weight),
    )


def test_focal_loss_of_two_classes_is_the_sigmoid_one():
    d = Draw(1)
    x, labels = 3 * d(5, 2), d.labels(2, 5)
    found = losses.focal_loss(x, labels, weight=torch.tensor([0.75, 0.25], dtype=torch.float64))
    close(found, losses.sigmoid_focal_loss(x[:, 1] - x[:, 0], labels, alpha=0.25))


def test_focal_gradient_is_exact_where_the_probability_rounds_to_one():
    """(1 - p)^g (-log p) is e^(-(g + 1) z) to first order in e^-z."""
    x = torch.tensor([[60.0, 0.0]], dtype=torch.float64)
    gradient = grad(lambda x: losses.focal_loss(x, torch.tensor([0]), gamma=0.5).sum())(x)
    assert gradient[0, 0].item() == pytest.approx(-1.5 * math.exp(-90), rel=1e-12)


def test_dice_loss_is_the_formula():
    d = Draw(2)
    p, t = d.times(3, 2, 4, 5), d.labels(2, 3, 2, 4, 5).double()
    dice = lambda p, t, s: 1 - (2 * (p * t).sum() + s) / ((p**2).sum() + (t**2).sum() + s)
    close(losses.dice_loss(p, t), torch.stack([dice(p[b], t[b], 0.0) for b in range(3)]))
    per_class = torch.stack([(dice(p[b, 0], t[b, 0], 0.5) + dice(p[b, 1], t[b, 1], 0.5)) / 2 for b in range(3)])
    close(losses.dice_loss(p, t, smooth=0.5, per_class=True), per_class)


def test_dice_loss_of_masks():
    mask, empty = torch.tensor([[1.0, 0.0, 1.0]]), torch.zeros(1, 3)
    found = [losses.dice_loss(*pair).item() for pair in ((mask, mask), (mask, 1 - mask), (empty, empty))]
    assert found == [0.0, 1.0, 1.0]
    assert losses.dice_loss(empty, empty, smooth=1.0).item() == 0.0


# Divergences.


def test_gaussian_kl_is_that_of_the_distributions():
    d = Draw(3)
    mean, log_var, other, other_log_var = (d(4, 3) for _ in range(4))
    p, q = Normal(mean, (log_var / 2).exp()), Normal(other, (other_log_var / 2).exp())
    close(losses.gaussian_kl(mean, log_var, other, other_log_var), kl_divergence(p, q).sum(1))
    standard = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    close(losses.gaussian_kl(mean, log_var), kl_divergence(p, standard).sum(1))


def test_categorical_divergences_are_those_of_the_distributions():
    d = Draw(4)
    x, y = 3 * d(4, 2, 5), 3 * d(4, 2, 5)
    p, q = Categorical(logits=x), Categorical(logits=y)
    m = Categorical(probs=(p.probs + q.probs) / 2)
    close(losses.categorical_kl(x, y), kl_divergence(p, q).sum(1))
    close(losses.jensen_shannon(x, y), (kl_divergence(p, m) + kl_divergence(q, m)).sum(1) / 2)
    close(losses.jensen_shannon(x, y), losses.jensen_shannon(y, x))


def test_divergence_is_infinite_where_only_the_second_excludes_a_class():
    possible, excluded = torch.zeros(1, 2), torch.tensor([[0.0, -math.inf]])
    assert losses.categorical_kl(possible, excluded).item() == math.inf
    assert losses.categorical_kl(excluded, possible).item() == pytest.approx(math.log(2))
    m = [0.75, 0.25]
    expected = 0.5 * (0.5 * math.log(0.5 / m[0]) + 0.5 * math.log(0.5 / m[1])) + 0.5 * math.log(1 / m[0])
    assert losses.jensen_shannon(possible, excluded).item() == pytest.approx(expected, rel=1e-6)


# Likelihoods.


def test_likelihoods_are_those_of_the_distributions():
    d = Draw(5)
    x, bits, classes = 3 * d(4, 2, 3), d.labels(2, 4, 2, 3), d.labels(3, 4, 2)
    close(losses.bernoulli_nll(x, bits), -Bernoulli(logits=x).log_prob(bits.double()).sum((1, 2)))
    close(losses.categorical_nll(x, classes), -Categorical(logits=x).log_prob(classes).sum(1))
    assert losses.categorical_nll(x[:0], classes[:0]).shape == (0,)
    assert losses.bernoulli_nll(x[:0], bits[:0]).shape == (0,)


def mixture(params: Tensor, *levels: int, count: int = 256) -> Tensor:
    """-log P of one pixel (k,) whose channels have these levels."""
    targets = torch.tensor(levels)[None, :, None]
    return losses.discretized_logistic_mixture_nll(params[None, :, None], targets, levels=count)[0]


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_mixture_sums_to_one_over_all_levels(scale):
    params = scale * Draw(6)(3 * 4)
    probs = torch.stack([torch.exp(-mixture(params, level)) for level in range(256)])
    assert probs.sum().item() == pytest.approx(1.0, rel=1e-12)


def test_mixture_of_three_channels_sums_to_one():
    params = Draw(7)(10 * 2)
    pixels = itertools.product(range(5), repeat=3)
    probs = torch.stack([torch.exp(-mixture(params, *pixel, count=5)) for pixel in pixels])
    assert probs.sum().item() == pytest.approx(1.0, rel=1e-12)


def test_mixture_is_the_formula_with_coupled_means():
    m, levels = 2, (0, 128, 255)
    params = Draw(8)(10 * m)
    logits, means, log_scales, couplings = params.split([m, 3 * m, 3 * m, 3 * m])
    a = torch.tanh(couplings).reshape(3, m)
    x = [2 * level / 255 - 1 for level in levels]
    shifted = means.reshape(3, m).clone()
    shifted[1] += a[0] * x[0]
    shifted[2] += a[1] * x[0] + a[2] * x[1]
    total = torch.zeros((), dtype=torch.float64)
    for k in range(m):
        term = torch.softmax(logits, 0)[k]
        for i in range(3):
            s = log_scales.reshape(3, m)[i, k].exp()
            upper = torch.sigmoid((x[i] + 1 / 255 - shifted[i, k]) / s) if levels[i] < 255 else 1.0
            lower = torch.sigmoid((x[i] - 1 / 255 - shifted[i, k]) / s) if levels[i] > 0 else 0.0
            term = term * (upper - lower)
        total = total + term
    assert mixture(params, *levels).item() == pytest.approx(-total.log().item(), rel=1e-11)  # the difference cancels


def test_mixture_is_exact_where_the_difference_underflows():
    """Far from a narrow component: log of its density times the width of the bin, -z - log s + log(2 / 255)."""
    params = torch.tensor([0.0, -1.0, -5.0], dtype=torch.float64)
    z = (2 * 254 / 255 - 1 + 1) * math.exp(5)
    expected = z - math.log(2 * math.sinh(math.exp(5) / 255))  # of exp(-z) (e^(h / s) - e^(-h / s))
    assert mixture(params, 254).item() == pytest.approx(expected, rel=1e-13)


def test_mixture_sums_over_pixels():
    d = Draw(9)
    params, targets = d(2, 20, 2, 3), d.labels(256, 2, 3, 2, 3)
    one = [
        mixture(params[b, :, i, j], *targets[b, :, i, j].tolist()) for b in range(2) for i in range(2) for j in range(3)
    ]
    close(losses.discretized_logistic_mixture_nll(params, targets), torch.stack(one).reshape(2, 6).sum(1))
    assert losses.discretized_logistic_mixture_nll(params[:0], targets[:0]).shape == (0,)


@pytest.mark.parametrize("value", [-1e4, -20.0, 20.0, 1e4])
@pytest.mark.parametrize("index", [0, 2, 4])
def test_mixture_is_finite_for_extreme_parameters(index, value):
    params = torch.zeros(6)
    params[index] = value  # a logit, a mean, a scale
    for level in (0, 100, 255):
        loss = lambda params, level=level: mixture(params, level)
        assert all(x.isfinite().all() for x in (loss(params), grad(loss)(params), hessian(loss)(params)))


# Contrasts.


def test_ntxent_is_a_loop_over_the_views():
    d = Draw(10)
    x, y = d(3, 4), d(3, 4)
    views = F.normalize(torch.cat([x, y]), dim=1)
    terms = []
    for i in range(6):
        scores = {k: (views[i] @ views[k] / 0.3).exp() for k in range(6) if k != i}
        terms.append(-(scores[(i + 3) % 6] / sum(scores.values())).log())
    expected = torch.stack([(terms[i] + terms[i + 3]) / 2 for i in range(3)])
    close(losses.ntxent(x, y, temperature=0.3), expected)
    assert losses.ntxent(x[:0], y[:0]).shape == (0,)
    assert losses.ntxent(x[:1], y[:1]).item() == 0.0  # nothing to confuse it with


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("given", [True, False])
def test_info_nce_is_a_loop_over_the_queries(normalize, given):
    d = Draw(11)
    q, k, n = d(3, 4), d(3, 4), d(5, 4)
    unit = (lambda x: F.normalize(x, dim=1)) if normalize else (lambda x: x)
    expected = []
    for i in range(3):
        others = unit(n) if given else torch.cat([unit(k)[:i], unit(k)[i + 1 :]])
        scores = torch.stack([unit(q)[i] @ key / 0.7 for key in [unit(k)[i], *others]])
        expected.append(torch.logsumexp(scores, 0) - scores[0])
    found = losses.info_nce(q, k, n if given else None, temperature=0.7, normalize=normalize)
    close(found, torch.stack(expected))
    assert losses.info_nce(q[:0], k[:0], n if given else None).shape == (0,)


def test_triplet_margin_with_distance_has_no_kink_at_equal_points():
    x = torch.zeros(1, 2, dtype=torch.float64)
    loss = lambda x: losses.triplet_margin_with_distance_loss(
        x, 0 * x, 0 * x + 1, distance_function=numerics.distance
    ).sum()
    assert hessian(loss)(x).isfinite().all()


# Perceptual.


def network(params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    first = torch.tanh(F.conv2d(x, params["first"]))
    return {"first": first, "second": torch.tanh(F.conv2d(first, params["second"]))}


def images() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    d = Draw(12)
    return {"first": d(3, 1, 2, 2), "second": d(2, 3, 2, 2)}, d(2, 1, 4, 4), d(2, 1, 4, 4)


def test_perceptual_loss_is_the_weighted_sum_over_layers():
    params, x, y = images()
    weights = {"first": 0.3, "second": torch.tensor([1.0, 2.0], dtype=torch.float64)}
    loss = losses.perceptual_loss(lambda x: network(params, x), weights)
    of_x, of_y = network(params, x), network(params, y)
    squares = {name: (of_x[name] - of_y[name]) ** 2 for name in of_x}
    second = (squares["second"] * torch.tensor([1.0, 2.0]).reshape(2, 1, 1)).mean((1, 2, 3))
    close(loss(x, y), 0.3 * squares["first"].mean((1, 2, 3)) + second)
    unweighted = losses.perceptual_loss(lambda x: network(params, x))(x, y)
    close(unweighted, sum(square.mean((1, 2, 3)) for square in squares.values()))


def test_normalised_perceptual_loss_compares_directions():
    params, x, y = images()
    of_x, of_y = network(params, x), network(params, y)
    cosine = {name: F.cosine_similarity(of_x[name], of_y[name], dim=1) for name in of_x}
    expected = sum((2 - 2 * value).mean((1, 2)) for value in cosine.values())  # |u - v|^2 of unit vectors
    loss = losses.perceptual_loss(lambda x: network(params, x), normalize=True)
    close(loss(x, y), expected)
    dark = torch.zeros_like(x)
    assert vmap(grad(lambda x: loss(x[None], x.detach()[None])[0]))(dark).isfinite().all()
    total = lambda x: loss(x, dark).sum()
    assert grad(lambda x: grad(total)(x).square().sum())(dark).isfinite().all()


def test_perceptual_loss_accepts_bfloat16_activations():
    params, x, y = images()
    loss = losses.perceptual_loss(lambda x: network(params, x)["first"].to(torch.bfloat16))
    assert loss(x, y).dtype == torch.bfloat16


def test_perceptual_loss_needs_activations_and_weights_alike():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="perceptual_loss: expected features to return activations, got an empty tree"):
        losses.perceptual_loss(lambda x: {})(x, x)
    with pytest.raises(ValueError, match="'b'"):
        losses.perceptual_loss(lambda x: {"a": x, "b": x}, {"a": 1.0})(x, x)
    with pytest.raises(ValueError, match=r"perceptual_loss: expected activations of shape \(b, c, ...\), got \(2,\)"):
        losses.perceptual_loss(lambda x: x[:, 0], normalize=True)(x, x)
