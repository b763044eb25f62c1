"""Losses that torch has, against torch: values and gradients in every floating argument, float64."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_case import Draw

from functorch_gen import losses
from functorch_gen.transforms import grad

Args = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """A loss of ours, torch's with ``reduction="none"``, and arguments for a batch size."""

    name: str
    ours: Callable[..., Tensor]
    torchs: Callable[..., Tensor]
    args: Callable[[Draw, int], Args]
    rest: str  # what becomes of torch's other axes
    plain: bool  # no tensors among the settings

    def __str__(self) -> str:
        return self.name

    def expected(self, *args: Tensor) -> Tensor:
        found = self.torchs(*args, reduction="none")
        rest = tuple(range(1, found.ndim))
        return found if not rest else found.mean(rest) if self.rest == "mean" else found.sum(rest)


def case(name: str, args: Callable[[Draw, int], Args], rest: str = "mean", torchs=None, **settings) -> Case:
    """``name`` is that of the loss, perhaps with a remark in brackets."""
    word = name.split(" (", maxsplit=1)[0]
    reference = torchs or getattr(F, word)
    ours = getattr(losses, word)
    plain = not any(isinstance(value, Tensor) for value in settings.values())
    theirs = lambda *x, **kw: reference(*x, **settings, **kw)
    return Case(name, lambda *x: ours(*x, **settings), theirs, args, rest, plain)


def pair(d: Draw, b: int) -> Args:
    return d(b, 3, 2), d(b, 3, 2)


def scores(d: Draw, b: int) -> Args:
    return 3 * d(b, 5), d.labels(5, b)


def pixels(d: Draw, b: int) -> Args:
    labels = d.labels(5, b, 2, 3)
    return 3 * d(b, 5, 2, 3), torch.where(d(b, 2, 3) > 0.5, -7, labels)


def signs(d: Draw, *shape: int) -> Tensor:
    return 2 * d.labels(2, *shape) - 1


def probs(d: Draw, *shape: int) -> Tensor:
    return torch.softmax(d(*shape), 1)


DRAW = Draw(9)
FIVE = DRAW.times(5)
SIX = DRAW.times(3, 2)
CASES = [
    case("cross_entropy", scores),
    case("cross_entropy (smoothed)", scores, label_smoothing=0.2),
    case("cross_entropy (weighted)", scores, weight=FIVE),
    case("cross_entropy (pixels, ignored)", pixels, ignore_index=-7),
    case("cross_entropy (all)", pixels, ignore_index=-7, weight=FIVE, label_smoothing=0.3),
    case("cross_entropy (soft)", lambda d, b: (3 * d(b, 5), probs(d, b, 5))),
    case(
        "cross_entropy (soft, all)",
        lambda d, b: (3 * d(b, 5, 2), probs(d, b, 5, 2)),
        weight=FIVE,
        label_smoothing=0.3,
    ),
    case("nll_loss", scores),
    case("nll_loss (pixels)", pixels, weight=FIVE, ignore_index=-7),
    case("binary_cross_entropy", lambda d, b: (d.times(b, 3), d.times(b, 3))),
    case("binary_cross_entropy (weighted)", lambda d, b: (d.times(b, 3, 2), d.times(b, 3, 2)), weight=SIX),
    case("binary_cross_entropy_with_logits", lambda d, b: (5 * d(b, 3), d.times(b, 3))),
    case(
        "binary_cross_entropy_with_logits (weighted)",
        lambda d, b: (5 * d(b, 3, 2), d.labels(2, b, 3, 2).double()),
        weight=SIX,
        pos_weight=3 * SIX,
    ),
    case("multilabel_soft_margin_loss", lambda d, b: (3 * d(b, 5), d.labels(2, b, 5).double()), weight=FIVE),
    case(
        "soft_margin_loss",
        lambda d, b: (3 * d(b, 3, 2), signs(d, b, 3, 2)),
        torchs=lambda x, y, reduction: F.soft_margin_loss(x, y.double(), reduction=reduction),
    ),
    case("multi_margin_loss", scores),
    case("multi_margin_loss (squared)", scores, p=2, margin=0.7, weight=FIVE),
    case(
        "multilabel_margin_loss",
        lambda d, b: (d(b, 5), torch.tensor([[3, 0, 0, -1, 1], [2, 4, 1, 0, 3], [-1, 0, 1, 2, 3]])[:b]),
    ),
    case("hinge_embedding_loss", lambda d, b: (d(b, 3), signs(d, b, 3)), margin=0.4),
    case("margin_ranking_loss", lambda d, b: (d(b, 3), d(b, 3), signs(d, b, 3)), margin=0.4),
    case("mse_loss", pair),
    case("l1_loss", pair),
    case("huber_loss", pair, delta=0.7),
    case("smooth_l1_loss", pair, beta=0.7),
    case("smooth_l1_loss (beta 0)", pair, beta=0.0),
    case("gaussian_nll_loss", lambda d, b: (d(b, 3), d(b, 3), d.times(b, 3))),
    case(
        "gaussian_nll_loss (one variance, some below eps)",
        lambda d, b: (d(b, 3), d(b, 3), d.times(b)),
        full=True,
        eps=0.5,
    ),
    case("gaussian_nll_loss (last axis of size 1)", lambda d, b: (d(b, 3), d(b, 3), d.times(b, 1))),
    case("poisson_nll_loss", pair),
    case("poisson_nll_loss (full)", lambda d, b: (d(b, 3), d(b, 3).exp()), full=True),
    case("poisson_nll_loss (rates)", lambda d, b: (d.times(b, 3), d(b, 3).exp()), log_input=False, eps=1e-3),
    case("kl_div", lambda d, b: (d(b, 5), probs(d, b, 5)), rest="sum"),
    case("kl_div (log targets)", lambda d, b: (d(b, 5, 2), d(b, 5, 2)), rest="sum", log_target=True),
    case("cosine_embedding_loss", lambda d, b: (d(b, 3), d(b, 3), signs(d, b)), margin=0.1),
    case("triplet_margin_loss", lambda d, b: (d(b, 3), d(b, 3), d(b, 3))),
    case("triplet_margin_loss (swap)", lambda d, b: (d(b, 3), d(b, 3), d(b, 3)), p=3.5, eps=1e-2, swap=True),
    case("triplet_margin_loss (p = 1)", lambda d, b: (d(b, 4, 3), d(b, 4, 3), d(b, 4, 3)), p=1, margin=2.0),
    case("triplet_margin_with_distance_loss", lambda d, b: (d(b, 3), d(b, 3), d(b, 3))),
    case(
        "triplet_margin_with_distance_loss (squared)",
        lambda d, b: (d(b, 3), d(b, 3), d(b, 3)),
        distance_function=lambda x, y: (x - y).square().sum(-1),
        swap=True,
    ),
]


def floating(args: Args) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(args) if x.is_floating_point())


def total(fun: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A sum with weights, so that every example counts otherwise."""
    return lambda *args: (fun(*args) * torch.arange(1.0, args[0].shape[0] + 1)).sum()


@pytest.mark.parametrize("batch", [3, 1, 0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_equals_torch(case, batch):
    args = case.args(Draw(batch), batch)
    found = case.ours(*args)
    assert found.shape == (batch,)
    torch.testing.assert_close(found, case.expected(*args), rtol=1e-12, atol=1e-13)  # roundings of float64


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_torch(case):
    args = case.args(Draw(1), 3)
    argnums = floating(args)
    leaves = [x.clone().requires_grad_() if i in argnums else x for i, x in enumerate(args)]
    expected = torch.autograd.grad(total(case.expected)(*leaves), [leaves[i] for i in argnums])
    for found, slope in zip(grad(total(case.ours), argnums)(*args), expected, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-11, atol=1e-12)  # roundings of float64


@pytest.mark.parametrize("case", [case for case in CASES if case.plain], ids=str)
def test_loss_of_bfloat16_is_that_of_float32_rounded_once(case):
    narrow = [x.to(torch.bfloat16) if x.is_floating_point() else x for x in case.args(Draw(2), 3)]
    wide = [x.float() if x.is_floating_point() else x for x in narrow]
    assert torch.equal(case.ours(*narrow), case.ours(*wide).to(torch.bfloat16))


# Errors.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.mse_loss(torch.ones(2, 3), torch.ones(2, 1)),
            ValueError,
            r"mse_loss: targets: expected shape \(2, 3\), as predictions has, got \(2, 1\)",
        ),
        (
            lambda: losses.mse_loss(torch.ones(2, dtype=torch.int64), torch.ones(2)),
            TypeError,
            "mse_loss: predictions: expected a floating-point tensor, got torch.int64",
        ),
        (
            lambda: losses.l1_loss(torch.ones(()), torch.ones(())),
            ValueError,
            r"l1_loss: predictions: expected shape \(b, ...\), got \(\)",
        ),
        (
            lambda: losses.binary_cross_entropy(torch.ones(2), torch.ones(2) > 0),
            TypeError,
            "binary_cross_entropy: targets: expected a tensor of numbers, got torch.bool",
        ),
        (
            lambda: losses.hinge_loss(torch.ones(2), 1.0),
            TypeError,
            "hinge_loss: targets: expected a tensor of numbers, got float",
        ),
        (
            lambda: losses.cross_entropy(torch.ones(2, 3), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            r"cross_entropy: labels: expected shape \(2,\), got \(3,\)",
        ),
        (
            lambda: losses.cross_entropy(torch.ones(3), torch.zeros(3, dtype=torch.int64)),
            ValueError,
            r"cross_entropy: logits: expected shape \(b, c, ...\), got \(3,\)",
        ),
        (
            lambda: losses.cross_entropy(torch.ones(2, 3), torch.zeros(2) > 0),
            TypeError,
            "cross_entropy: labels: expected a tensor of integers, got torch.bool",
        ),
        (
            lambda: losses.cross_entropy(torch.ones(2, 3), torch.ones(2, 3), weight=torch.ones(2)),
            ValueError,
            r"cross_entropy: weight: expected shape \(3,\), got \(2,\)",
        ),
        (
            lambda: losses.cross_entropy(torch.ones(2, 3), torch.ones(2, 3), label_smoothing=1.5),
            ValueError,
            "cross_entropy: expected 0 <= label_smoothing <= 1, got 1.5",
        ),
        (
            lambda: losses.multilabel_soft_margin_loss(torch.ones(2, 3), torch.ones(2, 3), weight=torch.ones(2)),
            ValueError,
            r"multilabel_soft_margin_loss: weight: expected shape \(3,\), got \(2,\)",
        ),
        (
            lambda: losses.cross_entropy(torch.ones(3), torch.ones(3)),
            ValueError,
            r"cross_entropy: logits: expected shape \(b, c, ...\), got \(3,\)",
        ),
        (
            lambda: losses.cross_entropy(torch.ones(2, 3), torch.zeros(2).long(), weight=[1.0, 1.0, 1.0]),
            TypeError,
            "cross_entropy: weight: expected a floating-point tensor, got list",
        ),
        (
            lambda: losses.binary_cross_entropy(torch.ones(1, 3), torch.ones(1, 3), weight=torch.ones(5, 3)),
            ValueError,  # it would be a loss of five examples
            r"binary_cross_entropy: weight: expected a shape that broadcasts to \(1, 3\), got \(5, 3\)",
        ),
        (
            lambda: losses.binary_cross_entropy_with_logits(torch.ones(3), torch.ones(3), pos_weight=[1.0]),
            TypeError,
            "binary_cross_entropy_with_logits: pos_weight: expected a tensor, got list",
        ),
        (
            lambda: losses.gaussian_kl(torch.ones(2, 3), torch.ones(2, 3), torch.ones(4, 2, 3)),
            ValueError,
            r"gaussian_kl: other_mean: expected a shape that broadcasts to \(2, 3\), got \(4, 2, 3\)",
        ),
        (
            lambda: losses.triplet_margin_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3), margin="1"),
            TypeError,
            "triplet_margin_loss: expected margin to be a number or a 0-d tensor, got str",
        ),
        (
            lambda: losses.dice_loss(torch.ones(2), torch.ones(2)),
            ValueError,
            r"dice_loss: probs: expected axes to sum over, got shape \(2,\)",
        ),
        (
            lambda: losses.multi_margin_loss(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64), p=3),
            ValueError,
            "multi_margin_loss: expected p to be one of 1, 2, got 3",
        ),
        (
            lambda: losses.multilabel_margin_loss(torch.ones(2, 3), torch.ones(2, 3)),
            TypeError,
            "multilabel_margin_loss: labels: expected a tensor of integers, got torch.float32",
        ),
        (
            lambda: losses.gaussian_nll_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 2)),
            ValueError,
            r"gaussian_nll_loss: var: expected shape \(2, 3\), got \(2, 2\)",
        ),
        (
            lambda: losses.cosine_distance(torch.ones(2), torch.ones(2)),
            ValueError,
            r"cosine_distance: predictions: expected shape \(b, ..., d\), got \(2,\)",
        ),
        (
            lambda: losses.categorical_nll(torch.ones(2, 3), torch.ones(2)),
            TypeError,
            "categorical_nll: labels: expected a tensor of integers, got torch.float32",
        ),
        (
            lambda: losses.discretized_logistic_mixture_nll(torch.ones(2, 9), torch.ones(2, 3).long()),
            ValueError,
            "discretized_logistic_mixture_nll: params: expected a multiple of 10 channels, for c = 3, got 9",
        ),
        (
            lambda: losses.discretized_logistic_mixture_nll(torch.ones(2, 3, 4), torch.ones(2, 1).long()),
            ValueError,
            r"discretized_logistic_mixture_nll: targets: expected shape \(2, 1, 4\), got \(2, 1\)",
        ),
    ],
)
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
