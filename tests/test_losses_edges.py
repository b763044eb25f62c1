"""Losses where formulas fail: large logits, probabilities 0 and 1, ties, zero vectors, impossible classes."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import losses
from functorch_gen.transforms import grad, hessian, jacfwd, jacrev, jit, vmap

# Finite, in float32 and bfloat16.

HUGE = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, 1e4], [0.0, 0.0, 0.0]])
ZEROS = torch.zeros(3, 3)
LABELS = torch.tensor([0, 1, 2])
TARGETS = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 1.0, 0.5]])
SIGNS = torch.tensor([[1, 1, -1], [-1, 1, 1], [1, -1, 1]])
EDGES = {
    "cross_entropy": (lambda x: losses.cross_entropy(x, LABELS, label_smoothing=0.1), HUGE),
    "cross_entropy soft": (lambda x: losses.cross_entropy(x, TARGETS), HUGE),
    "focal_loss": (lambda x: losses.focal_loss(x, LABELS, gamma=0.5), HUGE),
    "binary_cross_entropy": (lambda x: losses.binary_cross_entropy(x, TARGETS), TARGETS.flip(0)),
    "binary_cross_entropy_with_logits": (lambda x: losses.binary_cross_entropy_with_logits(x, TARGETS), HUGE),
    "sigmoid_focal_loss": (lambda x: losses.sigmoid_focal_loss(x, TARGETS, alpha=0.25, gamma=0.5), HUGE),
    "soft_margin_loss": (lambda x: losses.soft_margin_loss(x, SIGNS), HUGE),
    "multilabel_soft_margin_loss": (lambda x: losses.multilabel_soft_margin_loss(x, TARGETS), HUGE),
    "dice_loss": (lambda x: losses.dice_loss(x, torch.zeros_like(x)), ZEROS),
    "hinge_loss": (lambda x: losses.hinge_loss(x, SIGNS), torch.ones(3, 3)),
    "multiclass_hinge_loss": (lambda x: losses.multiclass_hinge_loss(x, LABELS), ZEROS),
    "multi_margin_loss": (lambda x: losses.multi_margin_loss(x, LABELS, p=2), ZEROS),
    "multilabel_margin_loss": (lambda x: losses.multilabel_margin_loss(x, LABELS.expand(3, 3)), ZEROS),
    "margin_ranking_loss": (lambda x: losses.margin_ranking_loss(x, x.detach(), SIGNS), ZEROS),
    "mse_loss": (lambda x: losses.mse_loss(x, ZEROS.to(x.dtype)), HUGE),
    "l1_loss": (lambda x: losses.l1_loss(x, ZEROS.to(x.dtype)), ZEROS),
    "huber_loss": (lambda x: losses.huber_loss(x, ZEROS.to(x.dtype)), HUGE),
    "smooth_l1_loss": (lambda x: losses.smooth_l1_loss(x, ZEROS.to(x.dtype), beta=0.0), ZEROS),
    "log_cosh": (lambda x: losses.log_cosh(x, ZEROS.to(x.dtype)), HUGE),
    "gaussian_nll_loss": (lambda x: losses.gaussian_nll_loss(x, x.detach(), x), ZEROS),
    "poisson_nll_loss": (lambda x: losses.poisson_nll_loss(x, ZEROS.to(x.dtype), log_input=False, full=True), ZEROS),
    "kl_div": (lambda x: losses.kl_div(x, TARGETS.to(x.dtype)), HUGE),
    "kl_div targets": (lambda x: losses.kl_div(HUGE.to(x.dtype), x.detach() * x), TARGETS),
    "categorical_kl": (lambda x: losses.categorical_kl(x, x.flip(0)), HUGE),
    "jensen_shannon": (lambda x: losses.jensen_shannon(x, x.flip(0)), HUGE),
    "gaussian_kl": (lambda x: losses.gaussian_kl(x, x.clamp(max=0)), HUGE),
    "cosine_distance": (lambda x: losses.cosine_distance(x, ZEROS.to(x.dtype) + 1), ZEROS),
    "cosine_embedding_loss": (lambda x: losses.cosine_embedding_loss(x, ZEROS.to(x.dtype), LABELS * 0 + 1), ZEROS),
    "triplet_margin_loss": (lambda x: losses.triplet_margin_loss(x, x, x, eps=0.0), ZEROS),
    "triplet_margin_loss p": (lambda x: losses.triplet_margin_loss(x, x, x, eps=0.0, p=1.5), ZEROS),
    "ntxent": (lambda x: losses.ntxent(x, x), ZEROS),
    "ntxent of one": (lambda x: losses.ntxent(x[:1], x[1:2]), HUGE),
    "info_nce": (lambda x: losses.info_nce(x, x, normalize=False), HUGE / 100),
    "bernoulli_nll": (lambda x: losses.bernoulli_nll(x, TARGETS.to(x.dtype)), HUGE),
    "categorical_nll": (lambda x: losses.categorical_nll(x, LABELS), HUGE),
    "discretized_logistic_mixture_nll": (
        lambda x: losses.discretized_logistic_mixture_nll(x, torch.tensor([[0], [128], [255]])),
        HUGE,
    ),
    "ctc_loss": (lambda x: losses.ctc_loss(x[None].expand(3, 3, 3), torch.tensor([[1, 2], [2, 2], [1, 1]])), HUGE),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", EDGES)
def test_loss_is_finite_with_two_derivatives_at_the_edge(name, dtype):
    fun, x = EDGES[name]
    x = x.to(dtype)
    mean = lambda x: fun(x).double().mean()
    assert fun(x).isfinite().all()
    for derivative in (grad(mean), jacfwd(mean), jacfwd(grad(mean)), jacrev(grad(mean)), jacrev(jacfwd(mean))):
        assert derivative(x).isfinite().all()


# Values and two derivatives, from the formulas.


@dataclass(frozen=True)
class Point:
    """A loss of one example at a point where a formula may fail, with its gradient and its Hessian."""

    name: str
    fun: Callable[[Tensor], Tensor]
    x: tuple[float, ...]
    value: float
    gradient: tuple[float, ...]
    curvature: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        return f"{self.name} at {self.x}"


def at(name: str, fun: Callable[[Tensor], Tensor], x: tuple[float, ...], *expected) -> Point:
    return Point(name, lambda x: fun(x.unsqueeze(0)).squeeze(0), x, *expected)


FIRST = torch.tensor([0])
NO = ((0.0, 0.0), (0.0, 0.0))
QUARTERS = ((0.25, -0.25), (-0.25, 0.25))
LOG2 = math.log(2)
POINTS = [
    at("cross_entropy", lambda x: losses.cross_entropy(x, FIRST), (0.0, 0.0), LOG2, (-0.5, 0.5), QUARTERS),
    at("cross_entropy", lambda x: losses.cross_entropy(x, FIRST), (0.0, 1e4), 1e4, (-1.0, 1.0), NO),
    at("cross_entropy", lambda x: losses.cross_entropy(x, FIRST), (0.0, -math.inf), 0.0, (0.0, 0.0), NO),
    at(
        "cross_entropy soft",
        lambda x: losses.cross_entropy(x, torch.tensor([[1.0, 0.0]])),
        (0.0, -math.inf),
        0.0,
        (0.0, 0.0),
        NO,
    ),
    # of (1 - p)^2 (-log p) in z = x_0 - x_1 at z = 0: -(1 - p)^2 (2 p (-log p) + 1 - p), and its derivative
    at(
        "focal_loss",
        lambda x: losses.focal_loss(x, FIRST),
        (0.0, 0.0),
        LOG2 / 4,
        (-LOG2 / 4 - 1 / 8, LOG2 / 4 + 1 / 8),
        tuple(tuple(sign * (LOG2 / 8 + 5 / 16) for sign in row) for row in ((1, -1), (-1, 1))),
    ),
    at("focal_loss", lambda x: losses.focal_loss(x, FIRST, gamma=0.5), (1e4, 0.0), 0.0, (0.0, 0.0), NO),
    at(
        "binary_cross_entropy_with_logits",
        lambda x: losses.binary_cross_entropy_with_logits(x, 0 * x),
        (30.0,),
        30 + math.exp(-30),
        (1 / (1 + math.exp(-30)),),
        ((math.exp(-30),),),
    ),
    at("soft_margin_loss", lambda x: losses.soft_margin_loss(x, 0 * x - 1), (0.0,), LOG2, (0.5,), ((0.25,),)),
    at("dice_loss", lambda x: losses.dice_loss(x, 0 * x), (0.0, 0.0), 1.0, (0.0, 0.0), NO),
    at("l1_loss", lambda x: losses.l1_loss(x, torch.zeros_like(x)), (0.0,), 0.0, (0.0,), ((0.0,),)),
    at("mse_loss", lambda x: losses.mse_loss(x, torch.zeros_like(x)), (0.0,), 0.0, (0.0,), ((2.0,),)),
    at("huber_loss", lambda x: losses.huber_loss(x, torch.zeros_like(x)), (0.0,), 0.0, (0.0,), ((1.0,),)),
    at("smooth_l1_loss", lambda x: losses.smooth_l1_loss(x, 0 * x.detach(), beta=0.5), (0.0,), 0.0, (0.0,), ((2.0,),)),
    at("log_cosh", lambda x: losses.log_cosh(x, torch.zeros_like(x)), (0.0,), 0.0, (0.0,), ((1.0,),)),
    at("log_cosh", lambda x: losses.log_cosh(x, torch.zeros_like(x)), (-1e4,), 1e4 - LOG2, (-1.0,), ((0.0,),)),
    at("gaussian_kl", lambda x: losses.gaussian_kl(0 * x, x), (0.0,), 0.0, (0.0,), ((0.5,),)),
    at("gaussian_kl", lambda x: losses.gaussian_kl(x, 0 * x), (0.0,), 0.0, (0.0,), ((1.0,),)),
    at("categorical_kl", lambda x: losses.categorical_kl(x, 0 * x), (0.0, 0.0), 0.0, (0.0, 0.0), QUARTERS),
    at(
        "categorical_kl",
        lambda x: losses.categorical_kl(x, torch.zeros_like(x)),
        (0.0, -math.inf),
        LOG2,
        (0.0, 0.0),
        NO,
    ),
    # half of the Fisher information of either half: 1/4 of that of KL
    at(
        "jensen_shannon",
        lambda x: losses.jensen_shannon(x, 0 * x.detach()),
        (0.0, 0.0),
        0.0,
        (0.0, 0.0),
        ((1 / 16, -1 / 16), (-1 / 16, 1 / 16)),
    ),
    at("cosine_distance", lambda x: losses.cosine_distance(x, 0 * x.detach() + 1), (0.0, 0.0), 1.0, (0.0, 0.0), NO),
    at(
        "triplet_margin_loss",
        lambda x: losses.triplet_margin_loss(x, 0 * x.detach(), 0 * x.detach() + 9, eps=0.0, margin=20.0),
        (0.0, 0.0),
        20 - 9 * math.sqrt(2),
        (math.sqrt(0.5), math.sqrt(0.5)),
        ((-math.sqrt(2) / 36, math.sqrt(2) / 36), (math.sqrt(2) / 36, -math.sqrt(2) / 36)),
    ),
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_value_and_derivatives_at_ties_zeros_and_extremes(point):
    x = torch.tensor(point.x, dtype=torch.float64)
    torch.testing.assert_close(point.fun(x).item(), point.value, rtol=1e-14, atol=1e-15)
    for gradient in (grad(point.fun), jacfwd(point.fun), jit(grad(point.fun), backend="aten")):
        torch.testing.assert_close(gradient(x).tolist(), list(point.gradient), rtol=1e-13, atol=1e-15)
    expected = torch.tensor(point.curvature, dtype=torch.float64)
    for curvature in (hessian(point.fun), jacrev(jacrev(point.fun)), jacrev(jacfwd(point.fun))):
        torch.testing.assert_close(curvature(x), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(vmap(grad(point.fun))(torch.stack([x, x]))[1], grad(point.fun)(x))


def test_binary_cross_entropy_on_the_edge_is_torchs():
    p = torch.tensor([[0.0], [0.0], [1.0], [1.0], [1e-13]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0]], dtype=torch.float64)
    expected = F.binary_cross_entropy(p, t, reduction="none")
    (slope,) = torch.autograd.grad(expected.sum(), p)
    assert torch.equal(losses.binary_cross_entropy(p.detach(), t), expected.detach().squeeze(1))
    found = grad(lambda p: losses.binary_cross_entropy(p, t).sum())(p.detach())
    torch.testing.assert_close(found, slope, rtol=1e-15, atol=0)


TIED = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "others", "settings"),
    [
        ("multi_margin_loss", (torch.tensor([1, 0]),), {}),
        ("multilabel_margin_loss", (torch.tensor([[1, -1, 0], [0, 1, -1]]),), {}),
        ("hinge_embedding_loss", (torch.tensor([[-1, -1, 1], [1, -1, -1]]),), {}),
        ("margin_ranking_loss", (TIED.flip(1), torch.tensor([[1, 1, -1], [1, -1, -1]])), {"margin": 2.0}),
    ],
)
def test_gradient_at_a_kink_is_torchs(name, others, settings):
    x = TIED.clone().requires_grad_()
    expected = getattr(F, name)(x, *others, reduction="none", **settings)
    (slope,) = torch.autograd.grad(expected.sum(), x)
    scale = 1 if expected.ndim == 1 else expected.shape[1]  # ours are means over the other axes
    found = grad(lambda x: getattr(losses, name)(x, *others, **settings).sum())(TIED)
    torch.testing.assert_close(scale * found, slope, rtol=1e-15, atol=0)


def test_cosine_embedding_loss_of_zero_vectors_has_torchs_slope():
    """There it is y / (1e-6 |y|), so that torch's 1e-12, a float32 number, shows at 2e-9."""
    y, targets = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64), torch.tensor([1, -1])
    x = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F.cosine_embedding_loss(x, y, targets, margin=-0.5, reduction="sum"), x)
    found = grad(lambda x: losses.cosine_embedding_loss(x, y, targets, margin=-0.5).sum())(x.detach())
    torch.testing.assert_close(found, slope, rtol=1e-12, atol=0)


def test_class_with_target_zero_may_be_impossible():
    logits = torch.tensor([[0.0, -math.inf, 0.0]])
    assert losses.cross_entropy(logits, torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(LOG2)
    assert losses.kl_div(torch.log_softmax(logits, 1), torch.tensor([[0.5, 0.0, 0.5]])).item() == pytest.approx(0.0)


def test_soft_margin_loss_does_not_overflow_where_torchs_does():
    x, y = torch.tensor([1e4]), torch.tensor([-1.0])
    assert F.soft_margin_loss(x, y).isinf()
    assert losses.soft_margin_loss(x, y).item() == 1e4


@pytest.mark.parametrize("name", ["binary_cross_entropy", "sigmoid_focal_loss", "poisson_nll_loss", "mse_loss"])
def test_targets_may_be_integers_or_of_another_precision(name):
    x, y = torch.tensor([[0.25, 0.75]]), torch.tensor([[0, 1]])
    loss = getattr(losses, name)
    assert torch.equal(loss(x, y), loss(x, y.float()))
    torch.testing.assert_close(loss(x, y.double()), loss(x.double(), y.double()), rtol=1e-6, atol=0)
    assert loss(x, y.double()).dtype == torch.float64
