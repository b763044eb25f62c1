"""Pooling, resampling and padding beyond what ``torch.nn`` takes: leading axes, 16 bits, zero sums, bad sizes."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_cases import MORE_TORCH_CASES, POOLS, SAMPLES, Case
from torch import Tensor
from zoo_case import Draw

from functorch_gen import nn, tree
from functorch_gen.transforms import grad, hessian, jit, vmap

SPATIAL = [case for case in [*POOLS, *SAMPLES] if not isinstance(case.layer, nn.Flatten | nn.Unflatten)]


@pytest.mark.parametrize("case", SPATIAL, ids=str)
@pytest.mark.parametrize("lead", [(), (2, 3), (2, 0)], ids=str)
def test_layer_takes_any_leading_axes(case: Case, lead: tuple[int, ...]) -> None:
    (shape,) = case.shapes
    if isinstance(case.layer, nn.Upsample) and not (len(lead) == 1 or case.layer.mode != "nearest"):
        lead = (6,) if isinstance(case.layer.scale_factor, int) else lead  # one number: torch's rule for the axes
    x = torch.tanh(Draw(0)(*lead, *shape[1:])) + 1.5
    flat = case.layer({}, x.reshape(math.prod(lead), *shape[1:]))
    y = case.layer({}, x)
    assert y.shape[: len(lead)] == lead
    assert torch.equal(y.reshape(flat.shape), flat)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("lead", [(2,), (), (2, 2)], ids=str)
def test_max_pool_gives_the_places_of_the_maxima(dims: int, lead: tuple[int, ...]) -> None:
    x = Draw(0)(*lead, 3, *(5, 4, 3)[:dims])
    for kind, size in (("MaxPool", 2), ("AdaptiveMaxPool", 2)):
        plain, both = (getattr(nn, f"{kind}{dims}d")(size, return_indices=flag) for flag in (False, True))
        y, indices = both({}, x)
        assert torch.equal(y, plain({}, x))
        assert torch.equal(y.flatten(-dims), x.flatten(-dims).gather(-1, indices.flatten(-dims)))


def test_max_pool_is_a_loop_over_windows() -> None:
    """Padding is minus infinity; windows are dilated."""
    x = Draw(0)(1, 7)
    y = nn.MaxPool1d(3, 2, 1, 2)({}, x)
    padded = [-math.inf, *x[0].tolist(), -math.inf]
    assert y[0].tolist() == [max(padded[i : i + 5 : 2]) for i in range(0, 5, 2)]


def test_gradient_of_max_pool_at_ties_goes_to_the_first() -> None:
    assert grad(lambda x: nn.MaxPool1d(2)({}, x).sum())(torch.ones(1, 4)).tolist() == [[1, 0, 1, 0]]


def test_lp_pool_of_zeros_has_zero_derivatives() -> None:
    def fun(x: Tensor) -> Tensor:
        return nn.LPPool1d(2, 2)({}, x).sum()

    x = torch.tensor([[0.0, 0.0, 3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(grad(fun)(x), torch.tensor([[0.0, 0.0, 0.6, 0.8]], dtype=torch.float64))
    assert hessian(fun)(x).isfinite().all()
    assert hessian(fun)(x)[0, 0, 0, 0] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", MORE_TORCH_CASES, ids=str)
def test_layer_keeps_16_bits(case: Case, dtype: torch.dtype) -> None:
    """Their rounding is at most 2^-8, of values below about 20."""
    params, inputs = tree.cast((case.params(), case.inputs()), dtype)
    if isinstance(case.layer, nn.LPPool1d | nn.LPPool2d | nn.LPPool3d):
        inputs = tuple(x.abs() for x in inputs)
    y = case.layer(params, *inputs)
    wide = case.layer(*tree.cast((params, *inputs), torch.float64))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), wide, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("case", [*POOLS, *SAMPLES], ids=str)
def test_layer_under_vmap_takes_no_examples(case: Case) -> None:
    x = torch.zeros(3, 0, *case.shapes[0][1:], dtype=torch.float64)
    assert vmap(lambda x: case.layer({}, x))(x).shape == (3, *case.layer({}, x[0]).shape)
    gradient = vmap(grad(lambda x: case.layer({}, x).sum()))(x)
    assert gradient.shape == x.shape


@pytest.mark.parametrize("case", SAMPLES[:6], ids=str)
def test_upsample_of_no_examples_traces(case: Case) -> None:
    x = torch.zeros(0, *case.shapes[0][1:])
    assert jit(lambda x: case.layer({}, x), backend="aten")(x).shape == case.layer({}, x).shape


def test_pixel_unshuffle_undoes_pixel_shuffle() -> None:
    x = Draw(0)(2, 18, 2, 3)
    assert torch.equal(nn.PixelUnshuffle(3)({}, nn.PixelShuffle(3)({}, x)), x)


def test_fold_is_the_transpose_of_unfold() -> None:
    sizes = {"kernel_size": (2, 3), "dilation": (1, 2), "padding": (0, 1), "stride": (2, 1)}
    x = Draw(0)(2, 5, 6)
    columns = nn.Unfold(**sizes)({}, x)
    weights = Draw(1)(*columns.shape)
    transposed = grad(lambda x: (weights * nn.Unfold(**sizes)({}, x)).sum())(x)
    torch.testing.assert_close(nn.Fold((5, 6), **sizes)({}, weights), transposed, rtol=1e-12, atol=1e-12)


BAD_SIZES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.MaxPool2d(0), ValueError, "MaxPool2d: expected kernel_size >= 1, got 0"),
    (lambda: nn.MaxPool2d((2, 2, 2)), ValueError, "MaxPool2d: expected kernel_size with 2 sizes, got (2, 2, 2)"),
    (lambda: nn.MaxPool1d(3, padding=2), ValueError, "MaxPool1d: expected padding <= 1, half a window, got 2"),
    (lambda: nn.AvgPool2d(2, padding=(0, 2)), ValueError, "AvgPool2d: expected padding <= 1, half a window, got 2"),
    (lambda: nn.AvgPool2d(2, divisor_override=0), ValueError, "AvgPool2d: expected divisor_override >= 1, got 0"),
    (lambda: nn.AvgPool3d(2, 0), ValueError, "AvgPool3d: expected stride >= 1, got 0"),
    (lambda: nn.LPPool2d(-1.0, 2), ValueError, "LPPool2d: expected norm_type > 0, got -1.0"),
    (lambda: nn.AdaptiveAvgPool2d((2, None, 1)), ValueError, "AdaptiveAvgPool2d: expected output_size with 2 sizes"),
    (lambda: nn.AdaptiveMaxPool1d(None), TypeError, "AdaptiveMaxPool1d: expected output_size to be an int"),
    (lambda: nn.Upsample(), ValueError, "Upsample: expected one of size and scale_factor, got None and None"),
    (lambda: nn.Upsample(2, 2.0), ValueError, "Upsample: expected one of size and scale_factor, got 2 and 2.0"),
    (
        lambda: nn.Upsample(2, mode="area"),
        ValueError,
        "Upsample: expected mode to be one of 'nearest', 'linear'",
    ),
    (lambda: nn.Upsample((2, 2), mode="linear"), ValueError, "Upsample: expected size with 1 sizes, got (2, 2)"),
    (
        lambda: nn.Upsample(scale_factor=(2.0, 2.0), mode="linear"),
        ValueError,
        "Upsample: expected scale_factor with 1 numbers, got (2.0, 2.0)",
    ),
    (lambda: nn.ChannelShuffle(0), ValueError, "ChannelShuffle: expected groups >= 1, got 0"),
    (lambda: nn.Upsample(scale_factor=0.0), ValueError, "Upsample: expected scale_factor > 0, got 0.0"),
    (
        lambda: nn.Upsample(2, align_corners=True),
        ValueError,
        "Upsample: expected align_corners=None with mode='nearest', got True",
    ),
    (lambda: nn.PixelShuffle(0), ValueError, "PixelShuffle: expected upscale_factor >= 1, got 0"),
    (lambda: nn.ZeroPad2d((1, 1)), ValueError, "ZeroPad2d: expected padding with 4 sizes, got (1, 1)"),
    (lambda: nn.ZeroPad1d(1.5), TypeError, "ZeroPad1d: expected padding to be an int or a tuple of ints, got 1.5"),
    (lambda: nn.ReflectionPad1d(-1), ValueError, "ReflectionPad1d: expected padding >= 0, got -1"),
    (lambda: nn.Unfold((2, 2, 2)), ValueError, "Unfold: expected kernel_size with 2 sizes, got (2, 2, 2)"),
    (lambda: nn.Fold(4, 2, padding=-1), ValueError, "Fold: expected padding >= 0, got -1"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_SIZES, ids=[message for *_, message in BAD_SIZES])
def test_layer_refuses_bad_sizes(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


BAD_INPUTS: list[tuple[Any, tuple[int, ...], str]] = [
    (nn.MaxPool2d(2), (4, 4), "MaxPool2d: x: expected shape (..., c, h, w), got (4, 4)"),
    (nn.Upsample(2), (4,), "Upsample: x: expected shape (..., c, l), got (4,)"),
    (nn.PixelShuffle(2), (6, 2, 2), "PixelShuffle: x: expected channels divisible by 4, got 6"),
    (nn.PixelUnshuffle(2), (1, 3, 2), "PixelUnshuffle: x: expected h and w divisible by 2, got 3 and 2"),
    (nn.CircularPad3d(1), (2, 2), "CircularPad3d: x: expected shape (..., c, d, h, w), got (2, 2)"),
    (nn.Fold(3, 2), (5, 4), "Fold: x: expected rows divisible by prod(kernel_size)=4, got 5"),
]


@pytest.mark.parametrize(("layer", "shape", "message"), BAD_INPUTS, ids=[message for *_, message in BAD_INPUTS])
def test_layer_refuses_bad_input(layer: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        layer({}, torch.ones(shape))
