"""Compound operations written out: against ATen's own, in float64; and what a graph is afterwards."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import functorch_gen as fg
from functorch_gen.transforms.tracing.backends import decomposed
from functorch_gen.transforms.tracing.decompositions import DECOMPOSITIONS
from functorch_gen.transforms.tracing.graph import base, output_node
from functorch_gen.transforms.tracing.trace import trace

aten = torch.ops.aten
CONVOLUTION = aten.convolution.default
SHAPES = [(2, 6, 5), (3, 6, 4, 5), (2, 6, 2, 3, 4), (1, 6, 1), (2, 6, 1, 1)]


def numbers(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def laid_out(x, channels_last):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.ndim]) if channels_last and x.ndim in formats else x


def error(got, expected):
    """The largest difference, relative to the largest element."""
    pairs = [(g, e) for g, e in zip(got, expected, strict=True) if g is not None or e is not None]
    for g, e in pairs:
        assert (g.shape, g.dtype) == (e.shape, e.dtype)
    return max(((g.double() - e.double()).abs().max() / (1 + e.double().abs().max())).item() for g, e in pairs)


# Group norm.


def norm_arguments(shape, groups, affine, dtype=torch.float64, channels_last=False):
    n, c, *pixels = shape
    x = laid_out(3 + 2 * numbers(0, *shape), channels_last).to(dtype)
    weight, bias = (numbers(i, c).to(dtype) if affine[i - 1] else None for i in (1, 2))
    return x, weight, bias, n, c, torch.Size(pixels).numel(), groups, 1e-5


AFFINE = list(itertools.product([True, False], repeat=2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_equals_aten(shape, groups, channels_last):
    for affine in AFFINE:
        arguments = norm_arguments(shape, groups, affine, channels_last=channels_last)
        got = DECOMPOSITIONS[aten.native_group_norm.default](*arguments)
        # the sums run in other orders: 1e3 roundings of 2e-16, times 1 / sqrt(eps) where a group is one element
        assert error(got, aten.native_group_norm(*arguments)) < 1e-11


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_backward_equals_aten(shape, groups, channels_last):
    for has_weight in (True, False):
        x, weight, _, *sizes, _ = norm_arguments(shape, groups, (has_weight, False), channels_last=channels_last)
        mean, rstd = aten.native_group_norm(x, weight, None, *sizes, 1e-5)[1:]
        grad = laid_out(numbers(7, *shape), channels_last)
        arguments = (grad, x, mean, rstd, weight, *sizes, [True, has_weight, has_weight])
        got = DECOMPOSITIONS[aten.native_group_norm_backward.default](*arguments)
        # dx is a difference of terms of the size of rstd^3: up to 3e7 where a group is one element
        assert error(got, aten.native_group_norm_backward(*arguments)) < 1e-7 if shape[2:].count(1) else 1e-12


def test_group_norm_of_a_large_mean_keeps_its_digits():
    x = 1e4 + numbers(0, 4, 6, 50, dtype=torch.float32)
    got = DECOMPOSITIONS[aten.native_group_norm.default](x, None, None, 4, 6, 50, 2, 1e-5)
    # float32 holds x itself to 1e-3; E[x^2] - E[x]^2 would lose all digits
    assert error(got[:1], [F.group_norm(x.double(), 2).float()]) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_in_low_precision_rounds_once(dtype):
    arguments = norm_arguments((3, 6, 4, 5), 2, (True, True), dtype)
    got = DECOMPOSITIONS[aten.native_group_norm.default](*arguments)
    x, weight, bias = (a.double() for a in arguments[:3])
    assert got[0].dtype == dtype
    assert error([got[0].double()], [F.group_norm(x, 2, weight, bias)]) < torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", [(2, 6), (0, 6, 4), (2, 6, 0), (0, 6, 3, 3)])
def test_group_norm_leaves_other_shapes_to_aten(shape):
    arguments = norm_arguments(shape, 2, (True, True))
    assert DECOMPOSITIONS[aten.native_group_norm.default](*arguments) is NotImplemented


# Negative log likelihood.


def nll_arguments(reduction, ignored, x, target):
    grad = numbers(9, *([len(x)] if reduction == 0 else []))
    total = aten.nll_loss_forward(x, target, None, reduction, ignored)[1]
    return grad, x, target, None, reduction, ignored, total


@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_nll_loss_backward_equals_aten(reduction, ignored):
    target = torch.tensor([0, 2, 1, 2, 4])
    arguments = nll_arguments(reduction, ignored, numbers(0, 5, 5), target)
    got = DECOMPOSITIONS[aten.nll_loss_backward.default](*arguments)
    assert error([got], [aten.nll_loss_backward(*arguments)]) < 1e-15  # one division


@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_nll_loss_backward_of_an_empty_batch_is_empty(reduction):
    arguments = nll_arguments(
        reduction, -100, torch.zeros(0, 5, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
    )
    assert DECOMPOSITIONS[aten.nll_loss_backward.default](*arguments).shape == (0, 5)


def test_nll_loss_backward_leaves_weights_and_images_to_aten():
    for x, target, weight in [
        (numbers(0, 2, 3), torch.tensor([0, 1]), numbers(1, 3)),
        (numbers(0, 2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64), None),
        (numbers(0, 3), torch.tensor(1), None),
    ]:
        arguments = (torch.ones(()), x, target, weight, 1, -100, torch.ones(()))
        assert DECOMPOSITIONS[aten.nll_loss_backward.default](*arguments) is NotImplemented


# The weight's gradient of a convolution, as the second derivative writes it.


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "dilation"),
    [((8, 8), 3, 1, 1, 1), ((8, 8), 4, 2, 1, 1), ((8, 8), 3, 2, 1, 1), ((9, 7), 3, 1, 2, 2), ((6, 5), 1, 1, 0, 1)],
)
def test_weight_gradient_equals_atens_convolution(size, kernel, stride, padding, dilation, channels_last):
    x, w = laid_out(numbers(0, 5, 3, *size), channels_last), numbers(1, 4, 3, kernel, kernel)
    grad = laid_out(numbers(2, *F.conv2d(x, w, None, stride, padding, dilation).shape), channels_last)
    turned = x.transpose(0, 1), grad.transpose(0, 1), None, [dilation] * 2, [padding] * 2, [stride] * 2
    arguments = (*turned, False, [0, 0], 1)
    got = DECOMPOSITIONS[CONVOLUTION](*arguments)
    assert error([got], [aten.convolution(*arguments)]) < 1e-13  # sums of 300 products


def test_other_convolutions_are_left_to_aten():
    x, w = numbers(0, 4, 3, 8, 8), numbers(1, 2, 3, 3, 3)
    rest = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    narrow = numbers(0, 3, 4, 8, 8).transpose(0, 1), numbers(1, 3, 2, 3, 3).transpose(0, 1)  # turned, but a convolution
    for arguments in [(x, w, None, *rest), (x, w, numbers(2, 2), *rest), (*narrow, None, *rest)]:
        assert DECOMPOSITIONS[CONVOLUTION](*arguments) is NotImplemented


# Graphs.


def graph_of(fun, *inputs):
    return decomposed(trace(fun, inputs).graph)


def targets(module):
    return [n.target for n in module.graph.nodes if n.op == "call_function"]


def test_decompose_leaves_nothing_in_place():
    def f(x):
        y = x + 1
        y[0] = 2.0
        y.t().mul_(x)
        return y

    x = numbers(0, 3, 3)
    module = graph_of(f, x)
    assert not [t for t in targets(module) if t._schema.is_mutable]
    assert torch.equal(module(x.clone())[0], f(x))


def test_decompose_computes_equal_expressions_once():
    module = graph_of(lambda x: (x.sin() * 2).sum() + (x.sin() * 2).mean(), numbers(0, 4))
    assert targets(module).count(aten.sin.default) == targets(module).count(aten.mul.Tensor) == 1


def test_decompose_keeps_results_apart_that_are_computed_once():
    f = lambda x: (x.sin(), x.sin(), x.sin()[:2])
    module, x = graph_of(f, numbers(0, 4)), numbers(0, 4)
    results = output_node(module.graph).all_input_nodes
    assert len({base(n) for n in results}) == 3
    assert all(torch.equal(a, b) for a, b in zip(module(x), f(x), strict=True))


def test_decompose_makes_lazy_signs_real():
    z = torch.complex(numbers(0, 4), numbers(1, 4))
    module = graph_of(lambda z: z.conj().imag * 2, z)
    assert aten._neg_view.default not in targets(module)
    assert torch.equal(module(z)[0], -2 * z.imag)


def test_decompose_rewrites_the_body_of_a_loop():
    f = lambda x: fg.scan(lambda c, y: (c + y, F.silu(y)), torch.zeros(3, dtype=x.dtype), x)
    module = graph_of(f, numbers(0, 4, 3))
    bodies = [m for name, m in module.named_children() if name]
    assert len(bodies) == 1
    assert aten.silu.default not in targets(bodies[0])


def test_a_second_derivative_computes_no_convolution_with_an_image_for_its_kernel():
    def penalty(w, x):
        slope = torch.func.grad(lambda x: F.conv2d(x, w, stride=2, padding=1).tanh().sum())(x)
        return slope.square().sum()

    w, x = numbers(0, 3, 2, 4, 4), numbers(1, 5, 2, 8, 8)
    module = graph_of(torch.func.grad(penalty), w, x)
    kernels = [n.args[1].meta["val"].shape for n in module.graph.find_nodes(op="call_function", target=CONVOLUTION)]
    assert set(kernels) == {w.shape}
    assert error(module(w, x), [torch.func.grad(penalty)(w, x)]) < 1e-12
