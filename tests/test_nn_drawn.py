"""Layers with sizes drawn by hypothesis against ``torch.nn``: outputs, gradients and buffers, empty batches too."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from nn_cases import Case, reference
from torch import Tensor

from functorch_gen import nn, tree
from functorch_gen.transforms import grad

Draw = Callable[..., Any]
Shapes = tuple[tuple[int, ...], ...]

small, dims = st.integers(1, 3), st.integers(1, 3)
batches = st.integers(0, 2)
flags = st.booleans()
rates = st.floats(0.05, 2.0)


def per_axis(draw: Draw, size: st.SearchStrategy[int], n: int) -> Any:
    """One size, or one for each axis."""
    return draw(size | st.tuples(*[size] * n))


def axes(value: Any, n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else value


def layer(name: str, n: int | None = None, *args: Any, **fields: Any) -> Any:
    return getattr(nn, name if n is None else f"{name}{n}d")(*args, **fields)


def space(draw: Draw, kernel: Any, dilation: Any, n: int) -> tuple[int, ...]:
    """Sizes at which a window fits."""
    reach = [d * (k - 1) + 1 for k, d in zip(axes(kernel, n), axes(dilation, n))]
    return tuple(r + draw(st.integers(0, 4 if n < 3 else 2)) for r in reach)


@st.composite
def conv(draw: Draw) -> Case:
    n, groups = draw(dims), draw(st.integers(1, 2))
    kernel, dilation = per_axis(draw, small, n), per_axis(draw, st.integers(1, 2), n)
    padding = draw(st.sampled_from(["same", "valid"])) if draw(flags) else per_axis(draw, st.integers(0, 2), n)
    stride = 1 if padding == "same" else per_axis(draw, small, n)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    size = tuple(s + 2 for s in space(draw, kernel, dilation, n))  # mirrored padding is smaller than x
    sizes = (kernel, stride, padding, dilation, groups, draw(flags), mode)
    return Case(layer("Conv", n, *channels, *sizes), ((draw(batches), channels[0], *size),))


@st.composite
def conv_transpose(draw: Draw) -> Case:
    n, groups = draw(dims), draw(st.integers(1, 2))
    kernel, stride = per_axis(draw, small, n), per_axis(draw, small, n)
    dilation = per_axis(draw, st.integers(1, 2), n)
    extra = min(max(s, d) for s, d in zip(axes(stride, n), axes(dilation, n))) - 1
    channels = [groups * draw(st.integers(1, 2)) for _ in range(2)]
    sizes = (kernel, stride, per_axis(draw, st.integers(0, 1), n), draw(st.integers(0, extra)), groups, draw(flags))
    shape = (draw(batches), channels[0], *(draw(st.integers(2, 4)) for _ in range(n)))
    return Case(layer("ConvTranspose", n, *channels, *sizes, dilation), (shape,))


@st.composite
def pool(draw: Draw) -> Case:
    n, kind = draw(dims), draw(st.sampled_from(["MaxPool", "AvgPool", "LPPool"]))
    kernel, stride = per_axis(draw, small, n), draw(st.none() | st.just(2)) or per_axis(draw, small, n)
    stride, ceil, dilation = draw(st.none() | st.just(stride)), draw(flags), 1
    half = min(axes(kernel, n)) // 2
    if kind == "MaxPool":
        dilation = per_axis(draw, st.integers(1, 2), n)
        fields = {"padding": draw(st.integers(0, half)), "dilation": dilation}
    elif kind == "AvgPool":
        fields = {"padding": draw(st.integers(0, half)), "count_include_pad": draw(flags)}
        fields |= {"divisor_override": draw(st.none() | st.just(5))} if n > 1 else {}
    else:
        kernel = draw(small) if n == 1 else kernel  # torch takes no tuple there
        fields = {"norm_type": draw(st.sampled_from([1, 2, 4, math.inf]))}
    shape = (draw(batches), draw(small), *space(draw, kernel, dilation, n))
    return Case(layer(kind, n, kernel_size=kernel, stride=stride, ceil_mode=ceil, **fields), (shape,))


@st.composite
def adaptive_pool(draw: Draw) -> Case:
    n, kind = draw(dims), draw(st.sampled_from(["AdaptiveAvgPool", "AdaptiveMaxPool"]))
    sizes = draw(small) if n == 1 or draw(flags) else tuple(draw(st.none() | small) for _ in range(n))
    return Case(layer(kind, n, sizes), ((draw(batches), draw(small), *(draw(st.integers(1, 5)) for _ in range(n))),))


@st.composite
def upsample(draw: Draw) -> Case:
    mode = draw(st.sampled_from(["nearest", "linear", "bilinear", "bicubic", "trilinear"]))
    n = {"nearest": draw(dims), "linear": 1, "trilinear": 3}.get(mode, 2)
    corners = None if mode == "nearest" else draw(st.none() | flags)
    shape = (draw(batches), draw(small), *(draw(st.integers(2, 4)) for _ in range(n)))
    if draw(flags):
        return Case(nn.Upsample(per_axis(draw, st.integers(1, 7), n), None, mode, corners), (shape,))
    factor = st.sampled_from([0.5, 1.3, 2.0, 2.7])
    factors = draw(factor | st.tuples(*[factor] * n))
    return Case(nn.Upsample(None, factors, mode, corners, draw(st.none() | flags)), (shape,))


@st.composite
def pad(draw: Draw) -> Case:
    n = draw(dims)
    kind = draw(st.sampled_from(["ConstantPad", "ZeroPad", "ReflectionPad", "ReplicationPad", "CircularPad"]))
    amount = st.integers(-1 if kind in ("ConstantPad", "ZeroPad") else 0, 2)
    padding = draw(amount | st.tuples(*[amount] * (2 * n)))
    fields = {"value": draw(rates)} if kind == "ConstantPad" else {}
    shape = (draw(batches), draw(small), *(draw(st.integers(3, 5)) for _ in range(n)))
    return Case(layer(kind, n, padding, **fields), (shape,))


@st.composite
def rearrangement(draw: Draw) -> Case:
    r, b, c, h, w = (draw(small) for _ in range(5))
    k, d, p, s = (per_axis(draw, size, 2) for size in (small, st.integers(1, 2), st.integers(0, 1), small))
    h, w = space(draw, k, d, 2)
    ends = zip(axes(k, 2), axes(d, 2), axes(p, 2), axes(s, 2), (h, w))
    windows = math.prod((n + 2 * p - d * (k - 1) - 1) // s + 1 for k, d, p, s, n in ends)
    return draw(
        st.sampled_from(
            [
                Case(nn.PixelShuffle(r), ((b, c * r * r, h, w),)),
                Case(nn.PixelUnshuffle(r), ((b, c, h * r, w * r),)),
                Case(nn.Unfold(k, d, p, s), ((b, c, h, w),)),
                Case(nn.Fold((h, w), k, d, p, s), ((b, c * math.prod(axes(k, 2)), windows),)),
                Case(nn.Flatten(1, draw(st.sampled_from([2, -1]))), ((0, c, h, w),)),
                Case(nn.Unflatten(-1, (h, w)), ((b, c, h * w),)),
            ]
        )
    )


@st.composite
def norm(draw: Draw) -> Case:
    n, groups, eps = draw(dims), draw(small), draw(st.sampled_from([1e-5, 1e-2]))
    b, c, size = draw(batches), groups * draw(small), tuple(draw(st.integers(2, 4)) for _ in range(n))
    return draw(
        st.sampled_from(
            [
                Case(nn.GroupNorm(groups, c, eps, draw(flags)), ((b, c, *size),)),
                Case(nn.LayerNorm(size, eps, draw(flags), draw(flags)), ((b, c, *size),)),
                Case(nn.RMSNorm(size, draw(st.none() | st.just(eps)), draw(flags)), ((b, c, *size),)),
                Case(layer("InstanceNorm", n, c, eps, 0.1, draw(flags)), ((max(b, 1), c, *size),)),
                Case(nn.LocalResponseNorm(draw(st.integers(1, 5)), draw(rates), draw(rates), 1.5), ((b, c, *size),)),
            ]
        )
    )


@st.composite
def linear(draw: Draw) -> Case:
    lead, (n, m, out) = tuple(draw(st.lists(batches, min_size=1, max_size=3))), (draw(small) for _ in range(3))
    return draw(
        st.sampled_from(
            [
                Case(nn.Linear(n, out, draw(flags)), ((*lead, n),)),
                Case(nn.Bilinear(n, m, out, draw(flags)), ((*lead, n), (*lead, m))),
                Case(nn.CosineSimilarity(-1), ((*lead, n), (*lead, n))),
                Case(nn.PairwiseDistance(draw(rates) + 1, 1e-2, draw(flags)), ((*lead, n), (*lead, n))),
                Case(nn.Embedding(n + 1, m, draw(st.none() | st.integers(-n, n))), (lead,), high=n + 1),
            ]
        )
    )


PLAIN = [nn.ReLU, nn.ReLU6, nn.Hardsigmoid, nn.Hardswish, nn.SELU, nn.SiLU, nn.Mish, nn.LogSigmoid]
PLAIN += [nn.Sigmoid, nn.Tanh, nn.Tanhshrink, nn.Softsign, nn.GELU, nn.Softmax2d]


@st.composite
def activation(draw: Draw) -> Case:
    b, c, h = draw(batches), draw(small), draw(small)
    a, one = draw(rates), draw(st.sampled_from([-3, -2, -1, 0, 1, 2]))
    made = [cls() for cls in PLAIN]
    made += [nn.LeakyReLU(a), nn.ELU(a), nn.CELU(a), nn.Hardshrink(a), nn.Softshrink(a), nn.Threshold(a - 1, one)]
    made += [nn.Softplus(a, 20 * a), nn.Hardtanh(-a, 0.5 + a), nn.GELU("tanh"), nn.RReLU(a / 2, a)]
    made += [nn.Softmax(one), nn.LogSoftmax(one), nn.Softmin(one), nn.PReLU(), nn.PReLU(c, a)]
    return draw(st.sampled_from([*(Case(f, ((b, c, h),)) for f in made), Case(nn.GLU(1), ((b, 2 * c, h),))]))


FAMILIES = [conv, conv_transpose, pool, adaptive_pool, upsample, pad, rearrangement, norm, linear, activation]


def assert_equals_torch(case: Case) -> None:
    """To 1e-10 in float64, the rounding of sums of up to a hundred products."""
    params, inputs = case.params(), case.inputs()
    if isinstance(case.layer, nn.LPPool1d | nn.LPPool2d | nn.LPPool3d):
        inputs = tuple(1.5 + torch.tanh(x) for x in inputs)  # of positive numbers; torch has NaN for others
    module = reference(case.layer)
    module.load_state_dict(tree.names(params), strict=True)
    module.eval()
    leaves = tuple(x.requires_grad_() if case.high is None else x for x in inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of padding="same" with even kernels
        try:
            y = module(*leaves)
        except (RuntimeError, ValueError):
            assume(False)
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
    wanted = dict(module.named_parameters()) | {f"x{i}": x for i, x in enumerate(leaves) if x.requires_grad}
    found = torch.autograd.grad((weights * torch.sin(y)).sum(), list(wanted.values())) if wanted else ()

    def loss(params: Any, *inputs: Tensor) -> Tensor:
        return (weights * torch.sin(case.layer(params, *inputs))).sum()

    plain = tuple(x.detach() for x in leaves)
    count = 1 + len(plain) if case.high is None else 1
    ours = grad(loss, tuple(range(count)))(params, *plain)
    ours = tree.names(ours[0]) | {f"x{i}": x for i, x in enumerate(ours[1:])}
    torch.testing.assert_close(case.layer(params, *plain), y.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(ours, dict(zip(wanted, found)), rtol=1e-10, atol=1e-10)


@settings(max_examples=50)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@given(data=st.data())
def test_drawn_layer_equals_torch(family: Callable[[], st.SearchStrategy[Case]], data: st.DataObject) -> None:
    assert_equals_torch(data.draw(family()))


@pytest.mark.slow
@settings(max_examples=1000)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
@given(data=st.data())
def test_many_drawn_layers_equal_torch(family: Callable[[], st.SearchStrategy[Case]], data: st.DataObject) -> None:
    assert_equals_torch(data.draw(family()))


# With state.


@st.composite
def stateful(draw: Draw) -> Case:
    n, kind = draw(dims), draw(st.sampled_from(["BatchNorm", "InstanceNorm"]))
    momentum, affine = draw(st.sampled_from([None, 0.0, 0.3, 1.0])), draw(flags)
    tracks = kind == "InstanceNorm" or draw(flags)
    norm = layer(kind, n, draw(small), draw(st.sampled_from([1e-5, 1e-2])), momentum, affine, tracks, draw(flags))
    shape = (norm.num_features, *(draw(st.integers(2, 3)) for _ in range(n)))
    least = 0 if kind == "BatchNorm" else 1  # torch's running instance norm fails without examples
    return Case(norm, tuple((draw(st.integers(least, 3)), *shape) for _ in range(3)))


@settings(max_examples=60)
@given(stateful(), st.lists(flags, min_size=3, max_size=3))
def test_drawn_layer_with_state_equals_torch(case: Case, trains: list[bool]) -> None:
    """Three batches, in training or evaluation: outputs, gradients and buffers."""
    layer, params, module = case.layer, case.params(), reference(case.layer)
    state = tree.cast(layer.init_state(), torch.float64)
    module.load_state_dict({**params, **state}, strict=True)
    for x, train in zip(case.inputs(), trains, strict=True):
        leaf = x.clone().requires_grad_()
        y = module.train(train)(leaf)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape)
        wanted = {"x": leaf, **dict(module.named_parameters())}
        found = torch.autograd.grad((weights * torch.sin(y)).sum(), list(wanted.values()))

        def loss(params: Any, x: Tensor, state: Any = state, train: bool = train, weights: Tensor = weights) -> Any:
            y, new = layer(params, state, x, train=train)
            return (weights * torch.sin(y)).sum(), (y, new)

        (of_params, of_x), (ours, state) = grad(loss, (0, 1), has_aux=True)(params, x)
        torch.testing.assert_close(ours, y.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close({"x": of_x, **of_params}, dict(zip(wanted, found)), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(state, dict(module.named_buffers()), rtol=1e-10, atol=1e-10)
