"""Safe numerics: finite derivatives where textbook forms have none, exact values everywhere else."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from functorch_gen import numerics, optim, tree
from functorch_gen.transforms import grad, hessian, jacfwd, jacrev, jit, jvp, remat, vmap

inf, nan = math.inf, math.nan


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# At points where the textbook forms yield NaN: value, gradient and Hessian as mathematics or the docstring has them.


@dataclass(frozen=True)
class Point:
    """``fun`` at ``x`` has this value, this gradient and this Hessian; one number stands for all entries."""

    name: str
    fun: Callable[[Tensor], Tensor]
    x: tuple[float, ...]
    value: float
    gradient: tuple[float, ...]
    hessian: float | tuple[tuple[float, ...], ...] = 0.0

    def __str__(self) -> str:
        return f"{self.name} at {self.x}"


def of_scalar(name: str, fun: Callable[[Tensor], Tensor], x: float, value: float, slope: float, curve: float) -> Point:
    return Point(name, lambda x: fun(x[0]), (x,), value, (slope,), curve)


def of_softplus(x: float, value: float) -> Point:
    slope = 1 / (1 + math.exp(-x))  # the sigmoid, and its derivative
    return of_scalar("softplus", numerics.softplus, x, value, slope, slope / (1 + math.exp(x)))


def of_pair(name: str, fun: Callable[[Tensor, Tensor], Tensor], x: tuple[float, float], *expected) -> Point:
    return Point(name, lambda x: fun(x[0], x[1]), x, *expected)


quarter = ((0.25, -0.25), (-0.25, 0.25))
unit = numerics.normalize
POINTS = [
    Point("norm", numerics.norm, (0.0, 0.0), 0.0, (0.0, 0.0)),
    Point("norm", numerics.norm, (inf, 1.0), inf, (0.0, 0.0)),
    Point("norm", numerics.norm, (3e200, 4e200), 5e200, (0.6, 0.8), ((1.28e-201, -0.96e-201), (-0.96e-201, 0.72e-201))),
    Point("norm", numerics.norm, (3e-200, 4e-200), 5e-200, (0.6, 0.8), ((1.28e199, -0.96e199), (-0.96e199, 0.72e199))),
    Point("norm 1", lambda x: numerics.norm(x, ord=1), (0.0, -2.0), 2.0, (0.0, -1.0)),
    Point("norm inf", lambda x: numerics.norm(x, ord=inf), (2.0, -2.0), 2.0, (0.5, -0.5)),
    Point("normalize", lambda x: unit(x)[0], (0.0, 0.0), 0.0, (0.0, 0.0)),
    Point("normalize", lambda x: unit(x)[0], (inf, 1.0), 1.0, (0.0, 0.0)),
    Point("normalize", lambda x: unit(x)[0], (1e200, 0.0), 1.0, (0.0, 0.0)),
    Point("clip_by_norm", lambda x: numerics.clip_by_norm(x, 5.0)[0], (0.0, 0.0), 0.0, (1.0, 0.0)),
    Point("clip_by_norm", lambda x: numerics.clip_by_norm(x, 5.0)[0], (3.0, 4.0), 3.0, (1.0, 0.0)),
    Point("clip_by_norm", lambda x: numerics.clip_by_norm(x, 5.0)[0], (inf, 4.0), 5.0, (0.0, 0.0)),
    of_pair("distance", lambda x, y: numerics.distance(x, y, dim=()), (2.0, 2.0), 0.0, (0.0, 0.0)),
    Point(
        "pairwise_distances",
        lambda x: numerics.pairwise_distances(x[:, None], x[:, None]).sum(),
        (1.0, 1.0, 4.0),
        12.0,
        (-2.0, -2.0, 4.0),
    ),
    Point("cosine_similarity", lambda x: numerics.cosine_similarity(x, vector(1, 2)), (0.0, 0.0), 0.0, (0.0, 0.0)),
    of_scalar("sqrt", numerics.sqrt, 0.0, 0.0, 0.0, 0.0),
    of_scalar("sqrt", numerics.sqrt, inf, inf, 0.0, 0.0),
    of_pair("divide_no_nan", numerics.divide_no_nan, (3.0, 0.0), 0.0, (0.0, 0.0)),
    Point("logsumexp", numerics.logsumexp, (-inf, -inf), -inf, (0.0, 0.0)),
    Point("logsumexp", numerics.logsumexp, (inf, 1.0), inf, (0.0, 0.0)),
    Point("logsumexp", numerics.logsumexp, (-inf, 1.0), 1.0, (0.0, 1.0)),
    Point("logsumexp", numerics.logsumexp, (2.0, 2.0), 2.0 + math.log(2), (0.5, 0.5), quarter),
    Point("logsumexp", numerics.logsumexp, (1000.0, -1000.0), 1000.0, (1.0, 0.0)),
    of_pair("logaddexp", numerics.logaddexp, (2.0, 2.0), 2.0 + math.log(2), (0.5, 0.5), quarter),
    of_pair("logaddexp", numerics.logaddexp, (-inf, -inf), -inf, (0.5, 0.5)),
    of_pair("logaddexp", numerics.logaddexp, (inf, inf), inf, (0.5, 0.5)),
    of_pair("logaddexp", numerics.logaddexp, (-inf, 3.0), 3.0, (0.0, 1.0)),
    of_pair("logaddexp", numerics.logaddexp, (1000.0, -1000.0), 1000.0, (1.0, 0.0)),
    of_softplus(0.0, math.log(2)),
    of_softplus(25.0, 25 + math.exp(-25)),
    of_softplus(-25.0, math.log1p(math.exp(-25))),
    of_softplus(700.0, 700.0),
    of_softplus(-700.0, math.exp(-700)),
    of_scalar("softplus", numerics.softplus, inf, inf, 1.0, 0.0),
    of_scalar("softplus", numerics.softplus, -inf, 0.0, 0.0, 0.0),
    of_scalar("log_sigmoid", numerics.log_sigmoid, 0.0, -math.log(2), 0.5, -0.25),
    of_scalar("log_sigmoid", numerics.log_sigmoid, 1000.0, 0.0, 0.0, 0.0),
    of_scalar("log_sigmoid", numerics.log_sigmoid, -inf, -inf, 1.0, 0.0),
    of_scalar("log1mexp", numerics.log1mexp, math.log(2), -math.log(2), 1.0, -2.0),
    of_scalar("log1mexp", numerics.log1mexp, inf, 0.0, 0.0, 0.0),
    of_pair("xlogy", numerics.xlogy, (0.0, 0.0), 0.0, (0.0, 0.0)),
    of_pair("xlogy", numerics.xlogy, (0.0, 2.0), 0.0, (math.log(2), 0.0), ((0.0, 0.5), (0.5, 0.0))),
    of_pair("xlogy", numerics.xlogy, (0.0, inf), 0.0, (0.0, 0.0)),
    of_pair("xlog1py", numerics.xlog1py, (0.0, -1.0), 0.0, (0.0, 0.0)),
    of_pair("xlog1py", numerics.xlog1py, (0.0, 1.0), 0.0, (math.log(2), 0.0), ((0.0, 0.5), (0.5, 0.0))),
]


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To a few roundings of float64."""
    torch.testing.assert_close(found, expected.broadcast_to(found.shape), rtol=1e-13, atol=1e-300)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_value_and_gradient_at_the_edge(point):
    x = vector(*point.x)
    assert_close(point.fun(x), torch.tensor(point.value, dtype=torch.float64))
    for gradient in (grad(point.fun), jacfwd(point.fun), grad(remat(point.fun)), jit(grad(point.fun), backend="aten")):
        assert_close(gradient(x), vector(*point.gradient))
    assert_close(vmap(grad(point.fun))(torch.stack([x, x]))[1], vector(*point.gradient))


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_hessian_at_the_edge(point):
    x, expected = vector(*point.x), torch.tensor(point.hessian, dtype=torch.float64)
    for modes in (jacfwd(jacrev(point.fun)), jacrev(jacrev(point.fun)), jacrev(jacfwd(point.fun))):
        assert_close(modes(x), expected)
    assert_close(jit(hessian(point.fun), backend="aten")(x), expected)


# Everywhere else: the plain formulas.


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (lambda x, y: numerics.norm(x, 1), lambda x, y: torch.linalg.vector_norm(x, dim=1)),
        (lambda x, y: numerics.norm(x, keepdim=True), lambda x, y: torch.linalg.vector_norm(x, keepdim=True)),
        (lambda x, y: numerics.norm(x, (0, 1), ord=1), lambda x, y: x.abs().sum()),
        (lambda x, y: numerics.norm(x, 0, ord=inf), lambda x, y: x.abs().amax(0)),
        (lambda x, y: numerics.normalize(x, 0), lambda x, y: x / x.square().sum(0).sqrt()),
        (numerics.distance, lambda x, y: (x - y).square().sum(-1).sqrt()),
        (numerics.cosine_similarity, lambda x, y: torch.cosine_similarity(x, y, dim=-1)),
        (lambda x, y: numerics.clip_by_norm(x, 1.0), lambda x, y: x / x.square().sum().sqrt()),
        (lambda x, y: numerics.clip_by_norm(x, 100.0), lambda x, y: x),
        (lambda x, y: numerics.sqrt(x.exp()), lambda x, y: (x / 2).exp()),
        (numerics.divide_no_nan, torch.divide),
        (lambda x, y: numerics.softplus(x), lambda x, y: (1 + x.exp()).log()),
        (lambda x, y: numerics.log_sigmoid(x), lambda x, y: x.sigmoid().log()),
        (lambda x, y: numerics.log1mexp(x.abs()), lambda x, y: (1 - (-x.abs()).exp()).log()),
        (numerics.logaddexp, lambda x, y: (x.exp() + y.exp()).log()),
        (lambda x, y: numerics.logsumexp(x, (0, 1), True), lambda x, y: x.exp().sum((0, 1), keepdim=True).log()),
        (lambda x, y: numerics.logsumexp(x, -1), lambda x, y: x.exp().sum(-1).log()),
        (lambda x, y: numerics.xlogy(x, y.exp()), lambda x, y: x * y),
        (lambda x, y: numerics.xlog1py(x, y.exp()), lambda x, y: x * (1 + y.exp()).log()),
    ],
)
def test_formula_holds_in_general_position(found, expected):
    generator = torch.Generator().manual_seed(0)
    x, y, u, v = torch.randn(4, 3, 4, generator=generator, dtype=torch.float64)
    values, slopes = jvp(found, (x, y), (u, v))
    plain, plain_slopes = jvp(expected, (x, y), (u, v))
    torch.testing.assert_close(values, plain, rtol=1e-13, atol=1e-14)  # roundings of values near one
    torch.testing.assert_close(slopes, plain_slopes, rtol=1e-12, atol=1e-13)


def test_pairwise_distances_are_those_of_a_loop():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, n, 3, generator=generator, dtype=torch.float64) for n in (4, 5))
    found, squares = numerics.pairwise_distances(x, y), numerics.pairwise_distances(x, y, squared=True)
    for b, i, j in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(5)).tolist():
        expected = sum((p - q) ** 2 for p, q in zip(x[b, i].tolist(), y[b, j].tolist(), strict=True))
        assert squares[b, i, j].item() == pytest.approx(expected, rel=1e-14)
        assert found[b, i, j].item() == pytest.approx(math.sqrt(expected), rel=1e-14)


def test_pairwise_distances_of_close_points_do_not_cancel():
    x = torch.tensor([[1000.0, 1000.0]])
    y = x + torch.tensor([2.0**-13, 0.0])  # the last bit of float32
    assert numerics.pairwise_distances(x, y).item() == 2.0**-13


def test_log_ndtr_and_its_slope_are_torchs():
    x = torch.linspace(-40, 40, 401, dtype=torch.float64)
    theirs = x.clone().requires_grad_()
    expected = torch.special.log_ndtr(theirs)
    torch.testing.assert_close(numerics.log_ndtr(x), expected.detach(), rtol=1e-14, atol=0)
    slope = vmap(grad(numerics.log_ndtr))(x)
    torch.testing.assert_close(slope, torch.autograd.grad(expected.sum(), theirs)[0], rtol=1e-11, atol=1e-300)
    curvature = vmap(grad(grad(numerics.log_ndtr)))(x)
    torch.testing.assert_close(curvature, -slope * (x + slope), rtol=1e-9, atol=1e-9)  # phi' = -x phi


@pytest.mark.parametrize(("x", "expected"), [(1e-300, math.log(1e-300)), (1e-10, math.log(1e-10) - 5e-11)])
def test_log1mexp_is_accurate_near_zero(x, expected):
    assert numerics.log1mexp(vector(x)).item() == pytest.approx(expected, rel=1e-15)  # log(x - x^2 / 2 + ...)


@pytest.mark.parametrize("x", [30.0, 700.0])
def test_exponentially_small_results_are_accurate(x):
    small = math.exp(-x)  # the next term of each series is its square
    assert numerics.log1mexp(vector(x)).item() == pytest.approx(-small, rel=1e-12)
    assert numerics.softplus(vector(-x)).item() == pytest.approx(small, rel=1e-12)
    assert numerics.log_sigmoid(vector(x)).item() == pytest.approx(-small, rel=1e-12)
    assert numerics.logaddexp(vector(0.0), vector(-x)).item() == pytest.approx(small, rel=1e-12)


# Any row among others.


def test_masked_rows_do_not_disturb_the_others():
    x = torch.tensor([[0.0, 1.0], [-inf, -inf], [inf, 0.0]], dtype=torch.float64)
    total = lambda x: numerics.logsumexp(x, 1).exp().nan_to_num(posinf=0.0).sum()
    expected = torch.zeros(3, 2, dtype=torch.float64)
    expected[0] = x[0].exp()  # of exp(logsumexp)
    torch.testing.assert_close(grad(total)(x), expected, rtol=1e-14, atol=0)


def test_norm_of_nothing_is_zero():
    assert numerics.norm(torch.zeros(2, 0), 1).tolist() == [0.0, 0.0]
    assert numerics.logsumexp(torch.zeros(2, 0), 1).tolist() == [-inf, -inf]


@pytest.mark.parametrize(
    "fun",
    [
        numerics.norm,
        numerics.normalize,
        lambda x: numerics.clip_by_norm(x, 1.0),
        lambda x: numerics.pairwise_distances(x[:, None], x[:, None]),
        numerics.sqrt,
        numerics.softplus,
        numerics.log_sigmoid,
        numerics.log1mexp,
        numerics.log_ndtr,
        numerics.logsumexp,
        lambda x: numerics.logaddexp(x, x),
        lambda x: numerics.xlogy(x, x),
        lambda x: numerics.xlog1py(x, x),
        lambda x: numerics.divide_no_nan(x, x),
    ],
)
def test_nan_comes_out(fun):
    assert fun(vector(1.0, nan)).isnan().any()


# Dtypes.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    "fun",
    [
        numerics.norm,
        numerics.normalize,
        lambda x: numerics.clip_by_norm(x, 1.0),
        lambda x: numerics.pairwise_distances(x[:, None], x[:, None]),
        numerics.softplus,
        numerics.log1mexp,
        lambda x: numerics.log_ndtr(-x),
        numerics.logsumexp,
        lambda x: numerics.logaddexp(x, x.flip(0)),
        lambda x: numerics.xlogy(x, x.flip(0)),
        lambda x: numerics.divide_no_nan(x, x.flip(0)),
    ],
)
def test_result_is_the_rounded_one_of_float64(fun, dtype):
    x = torch.tensor([0.25, 3.0, 7.5], dtype=dtype)
    found, exact = fun(x), fun(x.double())
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    # One rounding of a 16-bit result; a few of the wider ones.
    torch.testing.assert_close(found.double(), exact, rtol=eps if dtype.itemsize == 2 else 4 * eps, atol=0)


def test_16_bits_neither_overflow_nor_lose_the_sum():
    assert numerics.norm(torch.full((10_000,), 300.0, dtype=torch.float16)).item() == 30_000.0
    assert numerics.logsumexp(torch.zeros(4096, dtype=torch.bfloat16)).item() == pytest.approx(math.log(4096), rel=4e-3)


# Errors.


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: numerics.norm(torch.ones(2), ord=3), ValueError, "norm: expected ord to be one of 1, 2, inf, got 3"),
        (lambda: numerics.norm(torch.arange(3)), TypeError, "norm: x: expected a floating.* tensor, got torch.int64"),
        (lambda: numerics.softplus(1.0), TypeError, "softplus: x: expected a floating.* tensor, got float"),
        (
            lambda: numerics.xlogy(torch.ones(2), y=2.0),
            TypeError,
            "xlogy: y: expected a floating.* tensor, got float",
        ),
        (
            lambda: numerics.pairwise_distances(torch.ones(2, 3), torch.ones(2, 4)),
            ValueError,
            r"pairwise_distances: y: expected shape \(..., m, d=3\), got \(2, 4\)",
        ),
    ],
)
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


# The where trap.


def test_where_alone_leaks_nan_and_safe_where_does_not():
    x = vector(0.0, 4.0)
    plain = grad(lambda x: torch.where(x > 0, x.log(), 0.0).sum())(x)
    safe = grad(lambda x: numerics.safe_where(x > 0, torch.log, x).sum())(x)
    assert plain.isnan().tolist() == [True, False]
    assert safe.tolist() == [0.0, 0.25]


def test_safe_where_takes_another_tensor_and_another_fill():
    x, mask = vector(0.0, 4.0), torch.tensor([False, True])
    assert numerics.safe_where(mask, torch.rsqrt, x, otherwise=-x, fill=4.0).tolist() == [0.0, 0.5]


# What the optimizers and trees do with zeros.


def meta(tx: optim.GradientTransformation, params: Tensor, steps: int) -> Tensor:
    """The update after some steps with the gradient ``params``."""
    state = tx.init(torch.ones_like(params))
    updates = params
    for _ in range(steps):
        updates, state = tx.update(params, state, torch.ones_like(params))
    return updates


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    "tx",
    [
        optim.adam(0.1),
        optim.adamw(0.1),
        optim.adam(0.1, eps_root=1e-8),
        optim.sgd(0.1, momentum=0.9, nesterov=True),
        optim.clip_by_global_norm(1.0),
        optim.clip(1.0),
        optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1)),
    ],
    ids=["adam", "adamw", "adam eps_root", "sgd", "clip_by_global_norm", "clip", "clip and adam"],
)
def test_meta_gradients_at_zero_gradients_are_finite(tx, steps):
    total = lambda g: meta(tx, g, steps).sum()
    for g in (vector(0.0, 0.0), vector(0.0, 3.0), vector(1.0, -1.0), vector(1e-200, 1e-300)):
        assert grad(total)(g).isfinite().all()
        assert hessian(total)(g).isfinite().all()
        assert jacrev(jacrev(total))(g).isfinite().all()


def test_adam_at_zero_has_the_slope_of_its_linear_part():
    slope = grad(lambda g: meta(optim.adam(0.1, eps=1e-3), g, 1).sum())(vector(0.0))
    assert slope.item() == pytest.approx(-0.1 / 1e-3, rel=1e-12)  # mu_hat = g, nu_hat = 0 to first order


def test_tree_norm_has_zero_derivatives_at_zero():
    zeros = {"a": vector(0.0, 0.0), "b": vector(0.0)}
    assert tree.equal(grad(tree.norm)(zeros), zeros)
    assert tree.all_finite(hessian(tree.norm)(zeros))
    assert tree.norm(jacfwd(tree.norm)(zeros)).item() == 0.0
