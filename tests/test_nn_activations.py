"""What activations do where ``torch.nn``'s fail or have no counterpart: extremes, swish, random and trained slopes."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_cases import ACTIVATIONS, reference
from torch import Tensor
from zoo_case import Draw

from functorch_gen import nn, random, tree
from functorch_gen.transforms import grad, jvp, vmap

ELEMENTWISE = [case.layer for case in ACTIVATIONS if case.shapes == ((3, 4),) and not hasattr(case.layer, "dim")]
EXTREMES = [0.0, 1e-30, 1.0, 20.0, 50.0, 100.0, 1e3, 1e5, 1e13, 1e20, 1e37]


@pytest.mark.parametrize("layer", ELEMENTWISE, ids=repr)
def test_activation_and_its_derivatives_are_finite_at_extremes(layer: Any) -> None:
    params = layer.init(random.key(0))
    x = torch.tensor([sign * size for size in EXTREMES for sign in (1, -1)])

    def fun(x: Tensor) -> Tensor:
        return layer(params, x)

    first = vmap(grad(fun))
    forward = jvp(fun, (x,), (torch.ones_like(x),))[1]
    second = vmap(grad(grad(fun)))(x)
    forward_second = jvp(first, (x,), (torch.ones_like(x),))[1]
    for found in (fun(x), first(x), forward, second, forward_second):
        assert found.isfinite().all(), found
    torch.testing.assert_close(forward, first(x))
    torch.testing.assert_close(forward_second, second)


@pytest.mark.parametrize(
    "layer", [nn.GELU(), nn.GELU("tanh"), nn.Mish(), nn.SiLU(), nn.Softplus(), nn.Swish(2.0)], ids=repr
)
def test_smooth_activation_nears_relu(layer: Any) -> None:
    """In value, slope and curvature: far out they are max(x, 0) to rounding."""
    x = torch.tensor([-1e6, -1e3, 1e3, 1e6], dtype=torch.float64)
    slopes = vmap(grad(lambda x: layer({}, x)))(x)
    curvature = vmap(grad(grad(lambda x: layer({}, x))))(x)
    assert torch.equal(layer({}, x), F.relu(x))
    assert slopes.tolist() == [0, 0, 1, 1]
    assert curvature.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("case", ACTIVATIONS, ids=str)
def test_tangent_of_a_single_float32_number_is_float32(case: Any) -> None:
    if hasattr(case.layer, "dim") or case.shapes != ((3, 4),):
        return
    params, x = case.layer.init(random.key(0)), torch.tensor(0.3)
    y, tangent = jvp(lambda x: case.layer(params, x), (x,), (torch.tensor(1.0),))
    assert (y.shape, y.dtype, tangent.dtype) == ((), torch.float32, torch.float32)


@pytest.mark.parametrize("layer", ELEMENTWISE, ids=repr)
def test_activation_has_torchs_slope_at_its_kinks(layer: Any) -> None:
    """And value: where the slope jumps, at 0 and at the fields' values."""
    fields = [value for value in vars(layer).values() if isinstance(value, float)]
    points = [sign * point for point in (0.0, 1.0, 3.0, 6.0, 0.3, 0.5, *fields) for sign in (1, -1)]
    x = torch.tensor(points, dtype=torch.float64)
    params = tree.cast(layer.init(random.key(0)), torch.float64)
    module, leaf = reference(layer).eval(), x.clone().requires_grad_()
    y = module(leaf)
    y.sum().backward()
    torch.testing.assert_close(layer(params, x), y.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad(lambda x: layer(params, x).sum())(x), leaf.grad, rtol=1e-12, atol=1e-12)


def test_softplus_with_a_large_threshold_does_not_overflow() -> None:
    x = torch.tensor([90.0, 1e4])
    assert torch.equal(nn.Softplus(threshold=1e9)({}, x), x)  # torch: inf
    assert vmap(grad(lambda x: nn.Softplus(threshold=1e9)({}, x)))(x).tolist() == [1, 1]


# Swish.


def test_swish_of_slope_one_is_silu_and_its_derivatives() -> None:
    x = Draw(0)(50) * 5
    for order, fun in ((0, lambda f: f), (1, grad), (2, lambda f: grad(grad(f)))):
        ours, torchs = vmap(fun(nn.swish))(x), vmap(fun(F.silu))(x)
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12, msg=f"order {order}")


def test_swish_derivatives_equal_those_of_the_formula() -> None:
    """In x and beta, which broadcasts, in both modes and mixed."""
    draw = Draw(1)
    x, beta, moved = draw(3, 4), draw(4), (draw(3, 4), draw(4))

    def written_out(x: Tensor, beta: Tensor) -> Tensor:
        return x * torch.sigmoid(beta * x)

    def slopes(fun: Any) -> Any:
        first = grad(lambda x, beta: fun(x, beta).sin().sum(), (0, 1))
        return first(x, beta), jvp(fun, (x, beta), moved)[1], jvp(first, (x, beta), moved)[1]

    torch.testing.assert_close(slopes(nn.swish), slopes(written_out), rtol=1e-12, atol=1e-12)


def test_swish_keeps_its_input_only() -> None:
    kept: list[Tensor] = []
    x = Draw(0)(100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = nn.swish(x)
    assert [t.data_ptr() for t in kept if t.numel() == 100] == [x.data_ptr()]
    y.sum().backward()
    torch.testing.assert_close(x.grad, grad(lambda x: F.silu(x).sum())(x.detach()), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [2, 2.0, True], ids=repr)
def test_swish_takes_beta_as_any_python_number(beta: Any) -> None:
    x = Draw(0)(5)
    gradient = grad(lambda x: (x * torch.sigmoid(float(beta) * x)).sum())(x)
    torch.testing.assert_close(grad(lambda x: nn.swish(x, beta).sum())(x), gradient, rtol=1e-12, atol=1e-12)


def test_swish_refuses_integers() -> None:
    with pytest.raises(TypeError, match=r"swish: x: expected a floating-point tensor, got torch\.int64"):
        nn.swish(torch.arange(3))


def test_trained_swish_starts_at_beta() -> None:
    layer, x = nn.Swish(1.7, trainable=True), Draw(0)(5)
    params = layer.init(random.key(0))
    assert {name: p.shape for name, p in params.items()} == {"beta": ()}
    torch.testing.assert_close(layer(params, x), nn.Swish(1.7)({}, x), rtol=1e-7, atol=1e-7)  # beta is float32


# Random slopes.


def test_rrelu_draws_slopes_uniformly() -> None:
    """The mean of 20,000 of U(0.1, 0.5) has the standard error 0.4 / sqrt(12 * 20,000) = 0.0008."""
    layer, x = nn.RReLU(0.1, 0.5), torch.cat([torch.full((20_000,), -1.0), torch.ones(3)]).double()
    y = layer({}, x, key=random.key(0))
    slopes = -y[:-3]
    assert y[-3:].tolist() == [1, 1, 1]
    assert 0.1 <= slopes.min() < 0.101 < 0.499 < slopes.max() <= 0.5
    assert abs(slopes.mean().item() - 0.3) < 5 * 0.4 / math.sqrt(12 * 20_000)
    assert torch.equal(grad(lambda x: layer({}, x, key=random.key(0)).sum())(x)[:-3], slopes)


def test_prelu_takes_any_shape_with_one_parameter() -> None:
    layer = nn.PReLU()
    params = layer.init(random.key(0))
    for shape in [(), (3,), (2, 3), (2, 3, 4)]:
        x = torch.full(shape, -2.0)
        assert torch.equal(layer(params, x), torch.full(shape, -0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_mish_has_two_finite_derivatives_at_the_largest_numbers(dtype: torch.dtype) -> None:
    """It is x there, so they are 1 and 0; those of the formula are NaN, as products with x overflow."""
    x = torch.tensor(torch.finfo(dtype).max, dtype=dtype)

    def mish(x: Tensor) -> Tensor:
        return nn.Mish()({}, x)

    assert (mish(x), grad(mish)(x), grad(grad(mish))(x)) == (x, 1, 0)


BAD: list[tuple[Any, type[Exception], str]] = [
    (
        lambda: nn.LeakyReLU("a"),
        TypeError,
        "LeakyReLU: expected negative_slope to be a number or a 0-d tensor, got str",
    ),
    (lambda: nn.Hardtanh(1.0, 1.0), ValueError, "Hardtanh: expected min_val < max_val, got 1.0 and 1.0"),
    (lambda: nn.Softshrink(-1.0), ValueError, "Softshrink: expected lambd >= 0, got -1.0"),
    (lambda: nn.Hardshrink(-1.0), ValueError, "Hardshrink: expected lambd >= 0, got -1.0"),
    (lambda: nn.CELU(0.0), ValueError, "CELU: expected alpha > 0, got 0.0"),
    (lambda: nn.GELU("erf"), ValueError, "GELU: expected approximate to be one of 'none', 'tanh', got 'erf'"),
    (lambda: nn.Softplus(0.0), ValueError, "Softplus: expected beta to be finite and not 0, got 0.0"),
    (lambda: nn.RReLU(0.5, 0.1), ValueError, "RReLU: expected lower <= upper, got 0.5 and 0.1"),
    (lambda: nn.PReLU(0), ValueError, "PReLU: expected num_parameters >= 1, got 0"),
    (lambda: nn.ReLU()({}, torch.arange(2)), TypeError, "ReLU: x: expected a floating-point tensor, got torch.int64"),
    (lambda: nn.Softmax(1.0), TypeError, "Softmax: expected dim to be an int, got 1.0"),
    (lambda: nn.Softmin(0)({}, torch.arange(2)), TypeError, "Softmin: x: expected a floating-point tensor, got"),
    (lambda: nn.Softmax2d()({}, torch.ones(3)), ValueError, "Softmax2d: x: expected shape (..., c, h, w), got (3,)"),
    (lambda: nn.PReLU()({}, torch.ones(3)), KeyError, "PReLU: expected a parameter 'weight', got only []"),
    (lambda: nn.GLU()({}, torch.ones(3)), ValueError, "GLU: x: expected an even size of axis -1, got (3,)"),
    (
        lambda: nn.PReLU(3)({"weight": torch.ones(3)}, torch.ones(2, 4)),
        ValueError,
        "PReLU: x: expected shape (b, c=3, ...), got (2, 4)",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_activation_refuses(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
