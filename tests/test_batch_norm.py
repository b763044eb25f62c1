"""Batch normalisation against ``torch.nn``: in training, in evaluation, along named axes, under the transforms."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from functorch_gen import nn, random, tree
from functorch_gen.transforms import grad, hessian, jit, jvp, process_axis, remat, scan, vmap
from functorch_gen.typing import Params, State, Tree

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (nn.BatchNorm1d(3), (5, 3)),
    (nn.BatchNorm1d(3, 1e-2, 0.3), (2, 3, 4)),
    (nn.BatchNorm1d(3, momentum=None), (4, 3)),
    (nn.BatchNorm2d(2), (3, 2, 2, 3)),
    (nn.BatchNorm2d(2, affine=False), (3, 2, 2, 3)),
    (nn.BatchNorm2d(2, track_running_stats=False), (3, 2, 2, 3)),
    (nn.BatchNorm3d(2, momentum=1.0), (2, 2, 2, 1, 3)),
]
over_layers = pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[str(layer) for layer, _ in LAYERS])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def params_of(layer: Any, seed: int = 0) -> Params:
    """In general position."""
    generator = torch.Generator().manual_seed(seed)
    shapes = layer.init(random.key(0))
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64), shapes)


def state_of(layer: Any, seed: int = 0) -> State:
    """float64, with a variance that is not one."""
    state = tree.cast(layer.init_state(), torch.float64)
    if state:
        state["running_mean"] = normal(seed + 10, layer.num_features)
        state["running_var"] = 0.5 + normal(seed + 11, layer.num_features).square()
    return state


def reference(layer: Any) -> torch.nn.Module:
    fields = {name: value for name, value in asdict(layer).items() if name not in ("bias", "axis_name")}
    module = getattr(torch.nn, type(layer).__name__)(**fields).double()
    module.load_state_dict({**params_of(layer), **state_of(layer)})
    return module


def weighted(y: Tensor) -> Tensor:
    """A function of the outputs without symmetries."""
    return (torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) * torch.sin(y)).sum()


def loss(layer: Any, params: Params, state: State, x: Tensor, *, train: bool = True) -> tuple[Tensor, State]:
    y, state = layer(params, state, x, train=train)
    return weighted(y), state


def assert_close(actual: Tree, expected: Tree, tolerance: float = 1e-12) -> None:
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance), actual, expected)


# Against torch.


@over_layers
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_batch_norm_equals_torch(layer, shape, train):
    """Outputs, gradients and running statistics of three calls in a row: to 1e-12, the rounding of other formulas."""
    module, params, state = reference(layer).train(train), params_of(layer), state_of(layer)
    for seed in range(3):
        x = normal(seed, *shape).requires_grad_()
        value = weighted(module(x))
        wanted = torch.autograd.grad(value, [x, *module.parameters()])
        found, new = grad(lambda x, p, s=state: loss(layer, p, s, x, train=train), (0, 1), has_aux=True)(
            x.detach(), params
        )
        assert_close(loss(layer, params, state, x.detach(), train=train)[0], value.detach())
        assert_close(found[0], wanted[0])
        assert_close(found[1], {name: g for (name, _), g in zip(module.named_parameters(), wanted[1:], strict=True)})
        assert_close(new, dict(module.named_buffers()))
        state = new


def test_batch_norm_starts_as_torch_does():
    for layer, _ in LAYERS:
        fields = {name: value for name, value in asdict(layer).items() if name not in ("bias", "axis_name")}
        module = getattr(torch.nn, type(layer).__name__)(**fields)
        ours = {**layer.init(random.key(0)), **layer.init_state()}
        assert_close(ours, dict(module.state_dict()), 0)


def test_batch_norm_without_bias_is_one_with_bias_zero():
    x, state = normal(0, 4, 3), state_of(nn.BatchNorm1d(3))
    weight = normal(1, 3)
    y, _ = nn.BatchNorm1d(3, bias=False)({"weight": weight}, state, x, train=True)
    wanted, _ = nn.BatchNorm1d(3)({"weight": weight, "bias": torch.zeros(3)}, state, x, train=True)
    assert torch.equal(y, wanted)
    assert list(nn.BatchNorm1d(3, bias=False).init(random.key(0))) == ["weight"]


def test_batch_norm_second_derivatives_equal_torch():
    """A Hessian-vector product with respect to input and weights: torch's double backward of its fused kernel."""
    layer = nn.BatchNorm2d(2)
    module, params, x = reference(layer).train(), params_of(layer), normal(0, 3, 2, 2, 2)
    directions = (normal(1, 3, 2, 2, 2), params_of(layer, 5))
    leaf = x.clone().requires_grad_()
    leaves = [leaf, module.bias, module.weight]
    first = torch.autograd.grad(weighted(module(leaf)), leaves, create_graph=True)
    along = [directions[0], directions[1]["bias"], directions[1]["weight"]]
    wanted = torch.autograd.grad(tree.vdot(list(first), along), leaves)

    def gradient(x: Tensor, p: Params) -> Tree:
        return grad(lambda x, p: loss(layer, p, state_of(layer), x)[0], (0, 1))(x, p)

    forward = jvp(gradient, (x, params), directions)[1]
    reverse = grad(lambda x, p: tree.vdot(gradient(x, p), directions), (0, 1))(x, params)
    for found in (forward, reverse):
        assert_close([found[0], found[1]["bias"], found[1]["weight"]], list(wanted), 1e-10)


def test_batch_norm_hessian_equals_torch():
    layer, x = nn.BatchNorm1d(2), normal(0, 4, 2)
    module, params, state = reference(layer).train(), params_of(layer), state_of(layer)
    wanted = torch.autograd.functional.hessian(lambda x: weighted(module(x)), x)
    assert_close(hessian(lambda x: loss(layer, params, state, x)[0])(x), wanted, 1e-10)


# What the batch is.


def test_batch_norm_under_vmap_over_models_is_a_loop():
    layer = nn.BatchNorm2d(2)
    models = [(params_of(layer, seed), state_of(layer, seed), normal(seed, 3, 2, 2, 2)) for seed in range(3)]
    for train in (True, False):

        def gradient(p: Params, s: State, x: Tensor, train: bool = train) -> Tree:
            return grad(lambda p: loss(layer, p, s, x, train=train), has_aux=True)(p)

        assert_close(vmap(gradient)(*tree.stack(models)), tree.stack([gradient(*model) for model in models]))


def test_batch_norm_under_vmap_over_examples_takes_each_as_its_own_batch():
    layer, x = nn.BatchNorm2d(2), normal(0, 3, 2, 4, 4)
    params, state = params_of(layer), state_of(layer)
    found = vmap(lambda x: layer(params, state, x, train=True))(x)
    assert_close(found, tree.stack([layer(params, state, one, train=True) for one in x]))
    module = torch.nn.InstanceNorm2d(2, affine=True).double()  # by definition
    module.load_state_dict(params)
    assert_close(found[0], module(x).detach())


def test_batch_norm_with_an_axis_name_takes_all_examples_as_the_batch():
    """Outputs, the one new state, and the gradient, which is the sum of what the examples receive."""
    for layer, shape in [
        (nn.BatchNorm1d(3), (5, 3)),
        (nn.BatchNorm1d(2), (3, 2, 4)),
        (nn.BatchNorm2d(2), (3, 2, 2, 3)),
    ]:
        together = type(layer)(layer.num_features, axis_name="batch")
        params, state, x = params_of(layer), state_of(layer), normal(0, *shape)
        weights = normal(1, *shape)

        def one(
            params: Params, x: Tensor, w: Tensor, layer: Any = together, state: State = state
        ) -> tuple[Tensor, State]:
            y, new = layer(params, state, x if x.ndim != 2 else x[None], train=True)
            return (w * torch.sin(y)).sum(), new

        def whole(params: Params, layer: Any = layer, state: State = state, x=x, w=weights) -> tuple[Tensor, State]:
            y, new = layer(params, state, x, train=True)
            return (w * torch.sin(y)).sum(), new

        gradients, new = vmap(grad(one, has_aux=True), (None, 0, 0), (0, None), axis_name="batch")(params, x, weights)
        wanted, wanted_state = grad(whole, has_aux=True)(params)
        assert_close(new, wanted_state)
        assert_close(tree.map(lambda g: g.sum(0), gradients), wanted)


def test_batch_norm_over_two_named_axes_and_a_batch():
    layer, x = nn.BatchNorm1d(2, axis_name=("rows", "columns")), normal(0, 2, 3, 4, 2)
    plain = nn.BatchNorm1d(2)
    params, state = params_of(plain), state_of(plain)

    def one(x: Tensor) -> tuple[Tensor, State]:
        return layer(params, state, x, train=True)

    inner = vmap(one, out_dims=(0, None), axis_name="columns")
    y, new = vmap(inner, out_dims=(0, None), axis_name="rows")(x)
    wanted, wanted_state = plain(params, state, x.flatten(0, 2), train=True)
    assert_close(y.flatten(0, 2), wanted)
    assert_close(new, wanted_state)


def test_batch_norm_with_an_axis_name_evaluates_without_the_axis():
    layer, x = nn.BatchNorm1d(3, axis_name="batch"), normal(0, 4, 3)
    params, state = params_of(layer), state_of(layer)
    assert_close(layer(params, state, x, train=False), nn.BatchNorm1d(3)(params, state, x, train=False))
    with pytest.raises(NameError, match="'batch'"):
        layer(params, state, x, train=True)


def test_batch_norm_over_models_over_examples():
    """Eight models, each with its own batch of examples along a named axis: gradients and state equal a loop."""
    layer = nn.BatchNorm1d(2, axis_name="batch")
    models = [(params_of(layer, seed), state_of(layer, seed), normal(seed, 4, 2)) for seed in range(8)]

    def gradients(params: Params, state: State, xs: Tensor) -> Tree:
        one = grad(lambda p, x: loss(layer, p, state, x), has_aux=True)
        return vmap(one, (None, 0), (0, None), axis_name="batch")(params, xs)

    assert_close(vmap(gradients)(*tree.stack(models)), tree.stack([gradients(*model) for model in models]))


def train_as_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layer = nn.BatchNorm1d(2, axis_name="data")
    params, state, xs = ARGUMENTS

    def gradient(params: Params, x: Tensor) -> tuple[Tree, State]:
        return grad(lambda p: loss(layer, p, state, x), has_aux=True)(params)

    with process_axis("data"):
        torch.save((gradient(params, xs[rank]), jit(gradient, backend="aten")(params, xs[rank])), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_batch_norm_over_two_processes_equals_one_named_axis(tmp_path):
    """Gradients of each process's copy of the parameters, and the state that both have in the end."""
    spawn(train_as_process, (str(tmp_path),), nprocs=2)
    layer, (params, state, xs) = nn.BatchNorm1d(2, axis_name="data"), ARGUMENTS
    one = grad(lambda p, x: loss(layer, p, state, x), has_aux=True)
    wanted = tree.unstack(vmap(one, (None, 0), axis_name="data")(params, xs))
    for rank in range(2):
        eager, jitted = torch.load(tmp_path / str(rank))
        assert_close(eager, wanted[rank])
        assert_close(jitted, wanted[rank])


def test_batch_norm_takes_leading_axes():
    layer, x = nn.BatchNorm2d(2), normal(0, 3, 4, 2, 2, 3)
    params, state = params_of(layer), state_of(layer)
    y, new = layer(params, state, x, train=True)
    wanted, wanted_state = layer(params, state, x.flatten(0, 1), train=True)
    assert_close(y.flatten(0, 1), wanted)
    assert_close(new, wanted_state)
    assert_close(layer(params, state, x[0, 0], train=True)[0], layer(params, state, x[0, :1], train=True)[0][0])


def test_batch_norm1d_takes_one_example_in_evaluation():
    layer, x = nn.BatchNorm1d(3), normal(0, 4, 3)
    params, state = params_of(layer), state_of(layer)
    ys, _ = vmap(lambda x: layer(params, state, x, train=False), out_dims=(0, None))(x)
    assert_close(ys, layer(params, state, x, train=False)[0])


# Under the other transforms.


def two_batches(params: Params, state: State, xs: Tensor) -> Tree:
    """Gradient and state of a net that normalises twice with one layer."""
    layer = nn.BatchNorm1d(2)

    def total(params: Params) -> tuple[Tensor, State]:
        y, new = layer(params, state, xs[0], train=True)
        y, new = layer(params, new, torch.tanh(y) + xs[1], train=True)
        return weighted(y), new

    return grad(total, has_aux=True)(params)


ARGUMENTS = (params_of(nn.BatchNorm1d(2)), state_of(nn.BatchNorm1d(2)), normal(0, 2, 4, 2))


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_batch_norm_jitted_is_the_same(backend):
    traced = jit(two_batches, backend=backend)
    assert_close(traced(*ARGUMENTS), two_batches(*ARGUMENTS))
    other = tree.map(lambda x: x * 1.5 if x.is_floating_point() else x + 3, ARGUMENTS)
    assert_close(traced(*other), two_batches(*other))


def test_batch_norm_compiles_to_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(two_batches, fullgraph=True, backend="aot_eager")
    assert_close(compiled(*ARGUMENTS), two_batches(*ARGUMENTS))


@pytest.mark.parametrize("trace", ["jit", "compile"])
def test_batch_norm_with_an_axis_name_is_one_graph(trace):
    layer = nn.BatchNorm1d(2, axis_name="batch")

    def fun(params: Params, state: State, x: Tensor) -> Tree:
        one = grad(lambda p, x: loss(layer, p, state, x), has_aux=True)
        return vmap(one, (None, 0), (0, None), axis_name="batch")(params, x)

    torch.compiler.reset()
    arguments = (ARGUMENTS[0], ARGUMENTS[1], normal(3, 4, 2))
    traced = jit(fun, backend="aten") if trace == "jit" else torch.compile(fun, fullgraph=True, backend="aot_eager")
    assert_close(traced(*arguments), fun(*arguments))


def test_batch_norm_recomputed_is_the_same():
    layer, (params, state, xs) = nn.BatchNorm1d(2), ARGUMENTS

    def gradients(apply: Any) -> Tree:
        def total(params: Params, x: Tensor) -> tuple[Tensor, State]:
            y, new = apply(params, state, x)
            return weighted(y), new

        return grad(total, (0, 1), has_aux=True)(params, xs[0])

    def apply(params: Params, state: State, x: Tensor) -> tuple[Tensor, State]:
        return layer(params, state, x, train=True)

    assert_close(gradients(remat(apply)), gradients(apply))


def test_batch_norm_inside_scan_carries_its_state():
    layer, (params, state, _) = nn.BatchNorm1d(2), ARGUMENTS
    xs = normal(5, 3, 4, 2)

    def swap(state: State, x: Tensor) -> tuple[State, Tensor]:
        y, state = layer(params, state, x, train=True)
        return state, y

    new, ys = scan(swap, state, xs)
    for x, y in zip(xs, ys, strict=True):
        wanted, state = layer(params, state, x, train=True)
        assert_close(y, wanted)
    assert_close(new, state)


# Precision.


def test_batch_norm_of_bfloat16_takes_statistics_in_float32():
    """Mean 64 and deviation 1: in bfloat16, whose step there is 0.5, the variance would be rounding alone."""
    layer = nn.BatchNorm1d(3)
    x = (64 + normal(0, 512, 3)).to(torch.bfloat16)
    params, state = layer.init(random.key(0)), layer.init_state()
    y, new = layer(tree.cast(params, torch.bfloat16), state, x, train=True)
    wanted, wanted_state = layer(params, state, x.double(), train=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), wanted.double(), rtol=2**-8, atol=1e-4)  # the result is rounded once
    assert_close(new, wanted_state, 1e-5)


def test_batch_norm_is_accurate_far_from_zero():
    """Mean 1e4, deviation 1, float32: E[x^2] - E[x]^2 would lose all digits; here it is the rounding of x alone."""
    layer, x = nn.BatchNorm1d(2), (1e4 + normal(0, 1000, 2)).float()
    y, _ = layer(layer.init(random.key(0)), layer.init_state(), x, train=True)
    wanted = (x.double() - x.double().mean(0)) / x.double().std(0, correction=0)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-3)  # the mean is rounded to 5e-4, its ulp there


def test_batch_norm_keeps_the_dtype_of_the_state():
    layer, state = nn.BatchNorm1d(2), nn.BatchNorm1d(2).init_state()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _, new = layer(layer.init(random.key(0)), tree.cast(state, dtype), normal(0, 4, 2), train=True)
        assert {name: x.dtype for name, x in new.items()} == {
            "running_mean": dtype,
            "running_var": dtype,
            "num_batches_tracked": torch.int64,
        }
