"""Bounds on log p(x), against models whose log p(x) and gradients are known in closed form."""

import itertools
import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import vae
from functorch_gen.models import EncoderDecoder
from functorch_gen.nn import Linear

F64 = torch.float64


@dataclass(frozen=True)
class Scalar:
    """x given z ~ N(z, 1): the decoder is theta z, the encoder N(a x + c, exp(s)) with params {theta, a, c, s}."""

    def encode(self, params, x):
        mean = params["a"] * x + params["c"]
        return torch.cat([mean, params["s"] + torch.zeros_like(x)], 1)

    def decode(self, params, code):
        return params["theta"] * code


NET, UNIT = Scalar(), vae.Gaussian(1.0)
KEY = fg.random.key(0)


def scalar_params(a=0.3, c=0.1, s=-0.2, theta=1.0):
    return {name: torch.tensor(value, dtype=F64) for name, value in {"a": a, "c": c, "s": s, "theta": theta}.items()}


OPTIMAL = scalar_params(0.5, 0.0, math.log(0.5))
"""z given x ~ N(x / 2, 1/2)."""


def log_normal(x, mean, var):
    return -0.5 * ((x - mean) ** 2 / var + torch.log(2 * math.pi * torch.as_tensor(var, dtype=F64)))


def exact_elbo(params, x):
    """E_q[log N(x; theta z, 1)] - KL(q || N(0, 1)), both in closed form."""
    m, v = params["a"] * x + params["c"], params["s"].exp()
    rec = log_normal(x, params["theta"] * m, 1.0) - 0.5 * params["theta"] ** 2 * v
    return (rec - 0.5 * (v + m**2 - 1 - params["s"])).sum(1)


def exact_bound_of_two(params, x, n=400):
    """E log (w_1 + w_2) / 2 by a product of trapezoid rules over both draws."""
    m, sd = params["a"] * x + params["c"], (0.5 * params["s"]).exp()
    u = torch.linspace(-8, 8, n, dtype=F64)
    z = m + sd * u
    log_w = log_normal(x, params["theta"] * z, 1.0) + log_normal(z, 0.0, 1.0) - log_normal(z, m, sd**2)
    log_mean = torch.logaddexp(log_w[:, None], log_w[None, :]) - math.log(2)
    mass = log_normal(u, 0.0, 1.0).exp() * (u[1] - u[0])
    return (mass[:, None] * mass[None, :] * log_mean).sum()


def repeated(x, n):
    return torch.full((n, 1), x, dtype=F64)


def within_four_errors(values, expected):
    """Whether the mean over axis 0 is the expected number up to four standard errors."""
    error = values.std(0) / math.sqrt(len(values))
    return bool(((values.mean(0) - expected).abs() <= 4 * error).all())


# Values.


@pytest.mark.parametrize("kl", ["analytic", "monte_carlo"])
def test_elbo_is_the_closed_form(kl):
    x, params = repeated(1.3, 20_000), scalar_params()
    values = vae.elbo(NET, params, KEY, x, likelihood=UNIT, kl=kl)
    assert within_four_errors(values, exact_elbo(params, x[:1]))


def test_elbo_at_the_posterior_is_log_prob_without_variance():
    x = fg.random.normal(KEY, (50, 1), F64)
    values = vae.elbo(NET, OPTIMAL, KEY, x, likelihood=UNIT, kl="monte_carlo")
    torch.testing.assert_close(values, log_normal(x, 0.0, 2.0).sum(1), rtol=0, atol=1e-12)


def test_posterior_kl_is_torchs():
    q = vae.Posterior(torch.tensor([[0.5, -1.0]], dtype=F64), torch.tensor([[0.3, -2.0]], dtype=F64))
    normal = torch.distributions.Normal
    torch_kl = torch.distributions.kl_divergence(normal(q.mean, (0.5 * q.log_var).exp()), normal(0.0, 1.0))
    torch.testing.assert_close(q.kl(), torch_kl)
    z = torch.tensor([[0.2, 0.1]], dtype=F64)
    torch.testing.assert_close(q.log_prob(z), normal(q.mean, (0.5 * q.log_var).exp()).log_prob(z).sum(1))


def test_posterior_of_bfloat16_is_computed_in_float32_and_rounded_once():
    mean, log_var, z = ((5 * fg.random.normal(fg.random.key(i), (20, 7))).bfloat16() for i in range(3))
    short, wide = vae.Posterior(mean, log_var), vae.Posterior(mean.float(), log_var.float())
    assert torch.equal(short.kl(z), wide.kl(z.float()).bfloat16())
    assert torch.equal(short.kl(), wide.kl().bfloat16())
    assert torch.equal(short.log_prob(z), wide.log_prob(z.float()).bfloat16())


def test_posterior_keeps_the_axes_of_an_image():
    net = EncoderDecoder(fg.nn.Conv2d(1, 6, 1), fg.nn.Conv2d(3, 1, 1))
    params, x = net.init(KEY), fg.random.normal(KEY, (2, 1, 4, 4))
    q = vae.posterior(net, params, x)
    assert q.mean.shape == (2, 3, 4, 4)
    for gradient in ("total", "stl", "dreg"):
        assert vae.iwae(net, params, KEY, x, likelihood=UNIT, k=2, gradient=gradient).shape == (2,)
    assert vae.elbo(net, params, KEY, x, likelihood=UNIT, free_bits=0.1).shape == (2,)


def test_beta_weighs_the_divergence():
    x, params = repeated(1.3, 4), scalar_params()
    values = [vae.elbo(NET, params, KEY, x, likelihood=UNIT, beta=beta) for beta in (0.0, 1.0, 3.0)]
    torch.testing.assert_close(values[0] - values[1], vae.posterior(NET, params, x).kl().sum(1))
    torch.testing.assert_close(values[0] - values[2], 3 * (values[0] - values[1]))


def test_free_bits_are_the_floor_of_the_mean_divergence():
    """A number whose mean divergence is above is left alone; one below counts as the floor and has no gradient."""
    mean, log_var = torch.tensor([[2.0, 0.1], [1.0, 0.3]], dtype=F64), torch.zeros(2, 2, dtype=F64)

    @dataclass(frozen=True)
    class Free:
        def encode(self, params, x):
            return torch.cat([params, log_var], 1)

        def decode(self, params, code):
            return torch.zeros(2, 1, dtype=F64)

    loss = lambda mean, floor: -vae.elbo(Free(), mean, KEY, torch.zeros(2, 1), likelihood=UNIT, free_bits=floor)
    kl = 0.5 * mean**2
    floor = 0.5
    torch.testing.assert_close(loss(mean, floor) - loss(mean, None), floor - kl[:, 1])
    assert loss(mean, floor).mean().item() == pytest.approx(
        float(torch.maximum(kl.mean(0), torch.tensor(floor)).sum()) + 0.5 * math.log(2 * math.pi)
    )
    torch.testing.assert_close(fg.grad(lambda m: loss(m, floor).sum())(mean), mean * torch.tensor([1.0, 0.0]))


def test_iwae_of_one_draw_is_the_elbo():
    x, params = repeated(1.3, 20_000), scalar_params()
    assert within_four_errors(vae.iwae(NET, params, KEY, x, likelihood=UNIT, k=1), exact_elbo(params, x[:1]))


def test_iwae_of_two_draws_is_the_integral():
    x, params = repeated(1.3, 20_000), scalar_params()
    values = vae.iwae(NET, params, KEY, x, likelihood=UNIT, k=2)
    assert within_four_errors(values, exact_bound_of_two(params, x[0]))


def test_iwae_rises_with_k_to_log_prob():
    n, params = 10_000, scalar_params()
    truth = log_normal(torch.tensor(1.3, dtype=F64), 0.0, 2.0)
    bounds = []
    for k in (1, 4, 32, 128):
        values = vae.iwae(NET, params, fg.random.fold_in(KEY, k), repeated(1.3, n), likelihood=UNIT, k=k)
        bounds.append((values.mean(), values.std() / math.sqrt(n)))
    for (low, error), (high, other) in itertools.pairwise(bounds):
        assert high > low - 4 * (error**2 + other**2).sqrt()
    assert bounds[2][0] > bounds[1][0] > bounds[0][0] + 0.01
    assert all(mean < truth + 4 * error for mean, error in bounds)
    k = 128
    _, variance = weights_moments(params, 1.3)
    assert abs(bounds[-1][0] - (truth - variance / (2 * k))) < 4 * bounds[-1][1] + 10 / k**2  # Burda et al.: O(1/k)


def weights_moments(params, x):
    """Mean and variance of w / p(x), by the trapezoid rule."""
    m, sd = params["a"] * x + params["c"], (0.5 * params["s"]).exp()
    u = torch.linspace(-10, 10, 4001, dtype=F64)
    z = m + sd * u
    log_w = log_normal(torch.tensor(x, dtype=F64), z, 1.0) + log_normal(z, 0.0, 1.0) - log_normal(z, m, sd**2)
    ratio = (log_w - log_normal(torch.tensor(x, dtype=F64), 0.0, 2.0)).exp()
    mass = log_normal(u, 0.0, 1.0).exp() * (u[1] - u[0])
    mean = (mass * ratio).sum()
    return mean, (mass * (ratio - mean) ** 2).sum()


def test_log_prob_is_the_truth_of_many_draws():
    x = torch.tensor([[-2.0], [0.0], [1.3]], dtype=F64)
    params = scalar_params()
    values = vae.log_prob(NET, params, KEY, x, likelihood=UNIT, k=20_050, batch_size=2000)
    for i, value in enumerate(values):
        variance = weights_moments(params, float(x[i]))[1]
        assert abs(value - log_normal(x[i], 0.0, 2.0)) < 4 * math.sqrt(variance / 20_050)


def test_log_prob_is_iwae_of_the_same_draws():
    x, params = repeated(1.3, 3), scalar_params()
    for batch_size in (1, 3, 7, 100):
        value = vae.log_prob(NET, params, KEY, x, likelihood=UNIT, k=7, batch_size=batch_size)
        torch.testing.assert_close(value, vae.iwae(NET, params, KEY, x, likelihood=UNIT, k=7))


# Gradients.


def gradients(params, x, n, key=KEY, **options):
    """The gradient of iwae by (a, c, s, theta) of n independent estimates: (n, 4)."""

    def of_one(key):
        value = lambda params: vae.iwae(NET, params, key, x, likelihood=UNIT, **options).sum()
        return torch.stack(fg.tree.leaves(fg.grad(value)(params)))

    return fg.vmap(of_one)(fg.random.split(key, n))


@pytest.mark.parametrize("gradient", ["total", "stl", "dreg"])
def test_gradient_of_one_draw_is_unbiased(gradient):
    x, params = repeated(1.3, 1), scalar_params()
    expected = torch.stack(fg.tree.leaves(fg.grad(lambda params: exact_elbo(params, x).sum())(params)))
    assert within_four_errors(gradients(params, x, 20_000, k=1, gradient=gradient), expected)


@pytest.mark.parametrize("gradient", ["total", "dreg"])
def test_gradient_of_two_draws_is_unbiased(gradient):
    """Against the derivative of the bound by quadrature."""
    x, params = repeated(1.3, 1), scalar_params(a=-0.4, s=0.4)
    expected = torch.stack(fg.tree.leaves(fg.grad(lambda params: exact_bound_of_two(params, x[0]))(params)))
    assert within_four_errors(gradients(params, x, 40_000, k=2, gradient=gradient), expected)


def test_stl_of_several_draws_is_biased_as_the_paper_says():
    """Tucker et al. 2019: or DReG would be for nothing."""
    x, params = repeated(1.3, 1), scalar_params(a=-0.4, s=0.4)
    expected = torch.stack(fg.tree.leaves(fg.grad(lambda params: exact_bound_of_two(params, x[0]))(params)))
    assert not within_four_errors(gradients(params, x, 40_000, k=2, gradient="stl"), expected)


@pytest.mark.parametrize(("gradient", "k"), [("stl", 1), ("stl", 5), ("dreg", 5)])
def test_gradient_of_the_encoder_has_no_variance_at_the_optimum(gradient, k):
    found = gradients(OPTIMAL, repeated(1.3, 1), 50, k=k, gradient=gradient)[:, :3]
    assert found.abs().max() < 1e-13  # rounding
    assert gradients(OPTIMAL, repeated(1.3, 1), 50, k=k)[:, :3].std(0).min() > 0.05


def test_gradients_of_the_decoder_are_alike():
    x, params = repeated(1.3, 1), scalar_params()
    total, stl, dreg = (gradients(params, x, 3, k=4, gradient=name)[:, 3] for name in ("total", "stl", "dreg"))
    torch.testing.assert_close(total, stl)
    torch.testing.assert_close(total, dreg)


def test_values_are_alike():
    x, params = repeated(1.3, 3), scalar_params()
    values = [vae.iwae(NET, params, KEY, x, likelihood=UNIT, k=4, gradient=name) for name in ("total", "stl", "dreg")]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(values[0], values[2], rtol=0, atol=1e-14)


# Linear VAE = probabilistic PCA.


def ppca(x: Tensor, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tipping and Bishop 1999, eq. 7 and 8: the weights (n, d), sigma, and the mean log-likelihood."""
    mean, values_and_vectors = x.mean(0), torch.linalg.eigh(torch.cov(x.T, correction=0))
    values, vectors = values_and_vectors.eigenvalues.flip(0), values_and_vectors.eigenvectors.flip(1)
    variance = values[d:].mean()
    weight = vectors[:, :d] * (values[:d] - variance).sqrt()
    cov = weight @ weight.T + variance * torch.eye(x.shape[1], dtype=x.dtype)
    return weight, variance.sqrt(), fg.exact.MultivariateGaussian(mean, cov).log_prob(x).mean()


def linear_data():
    key_z, key_w, key_noise = fg.random.split(KEY, 3)
    z = fg.random.normal(key_z, (400, 2), F64) * torch.tensor([2.0, 1.0], dtype=F64)
    return z @ fg.random.orthogonal(key_w, 5, dtype=F64)[:2] + 0.5 * fg.random.normal(key_noise, (400, 5), F64) + 0.5


LINEAR = EncoderDecoder(Linear(5, 4), Linear(2, 5))


def test_linear_vae_with_the_closed_form_parameters_has_the_maximum_likelihood():
    x = linear_data()
    weight, std, best = ppca(x, 2)
    precision = weight.T @ weight + std**2 * torch.eye(2, dtype=F64)  # Tipping and Bishop, eq. 6
    to_mean = torch.linalg.solve(precision, weight.T)
    cov = std**2 * torch.linalg.inv(precision)
    assert (cov - cov.diag().diag()).abs().max() < 1e-12  # W is made of eigenvectors, so q may be diagonal
    params = {
        "encoder": {
            "weight": torch.cat([to_mean, torch.zeros(2, 5, dtype=F64)]),
            "bias": torch.cat([-to_mean @ x.mean(0), cov.diag().log()]),
        },
        "decoder": {"weight": weight, "bias": x.mean(0)},
    }
    bound = vae.elbo(LINEAR, params, KEY, x, likelihood=vae.Gaussian(std), kl="monte_carlo")
    assert float(bound.mean()) == pytest.approx(float(best), abs=1e-10)
    assert float(vae.log_prob(LINEAR, params, KEY, x, likelihood=vae.Gaussian(std), k=3).mean()) == pytest.approx(
        float(best), abs=1e-10
    )


def test_trained_linear_vae_reaches_the_maximum_likelihood():
    """Its bound in closed form: E_q |x - W z - b|^2 = |x - W mean - b|^2 + sum_j var_j |W_j|^2."""
    x, steps = linear_data(), 500

    def loss_fn(params, key, batch):
        likelihood = vae.Gaussian(params["log_std"].exp())
        return -vae.iwae(LINEAR, params["net"], key, batch, likelihood=likelihood, k=1, gradient="stl").mean()

    tx = fg.optim.adam(fg.optim.cosine_decay_schedule(0.03, steps))
    step = fg.jit(fg.step.make_step(loss_fn, tx), donate_argnums=0, backend="aten")
    params = fg.tree.cast({"net": LINEAR.init(fg.random.key(1)), "log_std": torch.zeros(())}, F64)
    state = fg.step.init_state(params, tx, KEY)
    for _ in range(steps):
        state, _ = step(state, x)
    assert step.traces == 1

    net, std = state.params["net"], state.params["log_std"].exp()
    q = vae.posterior(LINEAR, net, x)
    spread = q.log_var.exp() @ net["decoder"]["weight"].square().sum(0) / (2 * std**2)
    bound = vae.Gaussian(std).log_prob(LINEAR.decode(net, q.mean), x) - spread - q.kl().sum(1)
    gap = float(ppca(x, 2)[2] - bound.mean())
    assert 0 < gap < 4e-3  # of about 5 nats; noise of the decoder's gradient at a finite learning rate


def test_annealing_is_a_schedule_of_the_step():
    schedule = fg.optim.linear_schedule(0.0, 1.0, 4)

    def loss_fn(params, state, key, batch):
        bound = vae.elbo(LINEAR, params, key, batch, likelihood=UNIT, beta=schedule(state))
        return -bound.mean(), (state + 1, schedule(state))

    tx, x = fg.optim.sgd(0.01), linear_data().float()
    step = fg.jit(fg.step.make_step(loss_fn, tx, stateful=True, has_aux=True), donate_argnums=0, backend="aten")
    state = fg.step.init_state(LINEAR.init(KEY), tx, KEY, torch.zeros((), dtype=torch.int64))
    betas = []
    for _ in range(6):
        state, metrics = step(state, x)
        betas.append(float(metrics["aux"]))
    assert betas == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert step.traces == 1


# Errors.


def test_errors_name_what_was_expected():
    x, params, elbo = repeated(1.0, 2), scalar_params(), partial(vae.elbo, NET)
    with pytest.raises(ValueError, match="elbo: expected kl to be one of 'analytic', 'monte_carlo', got 'exact'"):
        elbo(params, KEY, x, likelihood=UNIT, kl="exact")
    with pytest.raises(ValueError, match="iwae: expected gradient to be one of 'total', 'stl', 'dreg', got 'DReG'"):
        vae.iwae(NET, params, KEY, x, likelihood=UNIT, k=2, gradient="DReG")
    with pytest.raises(ValueError, match="elbo: expected 0 <= beta, got -1"):
        elbo(params, KEY, x, likelihood=UNIT, beta=-1.0)
    with pytest.raises(ValueError, match=r"elbo: expected free_bits to be a number or a 0-d tensor, got shape \(1,\)"):
        elbo(params, KEY, x, likelihood=UNIT, free_bits=torch.ones(1))
    for gradient in ("total", "dreg"):
        with pytest.raises(ValueError, match="iwae: expected k >= 1, got 0"):
            vae.iwae(NET, params, KEY, x, likelihood=UNIT, k=0, gradient=gradient)
    with pytest.raises(TypeError, match="iwae: expected k to be an int"):
        vae.iwae(NET, params, KEY, x, likelihood=UNIT, k=1.5)
    with pytest.raises(ValueError, match="log_weights: expected k >= 1, got 0"):
        vae.log_weights(NET, params, KEY, x, likelihood=UNIT, k=0)
    with pytest.raises(ValueError, match="log_prob: expected k >= 1, got -1"):
        vae.log_prob(NET, params, KEY, x, likelihood=UNIT, k=-1)
    with pytest.raises(ValueError, match="log_prob: expected batch_size >= 1, got 0"):
        vae.log_prob(NET, params, KEY, x, likelihood=UNIT, k=1, batch_size=0)
    odd = EncoderDecoder(Linear(1, 3), Linear(1, 1))
    with pytest.raises(ValueError, match=r"posterior: expected encode's output to be \(b, 2 d, ...\), got \(2, 3\)"):
        vae.posterior(odd, odd.init(KEY), x.float())
