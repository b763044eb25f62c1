"""Mixed precision: which operations are narrow, that derivatives and programs keep to it, that nothing else changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from functorch_gen import models, nn, random, tree
from functorch_gen.transforms import autocast, grad, hvp, jit, jvp, remat, scan, vmap
from functorch_gen.typing import Params, Tree

KINDS = [torch.bfloat16, torch.float16]


def perturbed(layer: Any) -> Params:
    """Initial parameters moved, so that those which start at zero count too."""

    def move(x: Tensor) -> Tensor:
        return x + 0.1 * torch.sin(torch.arange(x.numel(), dtype=x.dtype)).reshape(x.shape)

    return tree.map(move, layer.init(random.key(0)))


def wave(*shape: int) -> Tensor:
    return torch.sin(17.0 * torch.arange(torch.Size(shape).numel())).reshape(shape)


def classifier() -> tuple[Any, Any]:
    net = models.CNN(1, 10, (4,))
    state, x = net.init_state(), wave(2, 1, 8, 8)
    return net, lambda params: net(params, state, x, train=True)[0]


def plain(layer: Any, *inputs: Tensor) -> tuple[Any, Any]:
    return layer, lambda params: layer(params, *inputs)


def recurrent() -> tuple[Any, Any]:
    net, x = nn.LSTM(3, 4), wave(2, 4, 3)
    return net, lambda params: net(params, x)[0]


NETS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "mlp": lambda: plain(nn.MLP(4, (8,), 3), wave(5, 4)),
    "cnn": classifier,
    "attention": lambda: plain(nn.MultiHeadAttention(8, 2), wave(2, 4, 8)),
    "lstm": recurrent,
    "norms": lambda: plain(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3), nn.LayerNorm(4), nn.RMSNorm(4)),
        wave(2, 1, 8, 8),
    ),
    "unet": lambda: plain(
        models.UNet(1, 8, (1, 2), 1, num_heads=2, num_groups=4), wave(1, 1, 4, 4), torch.tensor([0.3])
    ),
}


def uneven(y: Tensor) -> Tensor:
    """A number that depends on every element differently, so that no normalisation cancels its gradient."""
    return (wave(*y.shape) * torch.sin(y.float() + 0.5)).sum()


def objective(call: Any) -> Callable[[Params], Tensor]:
    return lambda params: uneven(call(params))


def distance(a: Tree, b: Tree) -> float:
    return (tree.norm(tree.sub(a, b)) / tree.norm(b)).item()


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_gradient_through_autocast_is_float32_and_near_the_full_one(name, dtype):
    layer, call = NETS[name]()
    params = perturbed(layer)
    loss = objective(call)
    full = grad(loss)(params)
    found = grad(autocast(loss, dtype))(params)
    assert {x.dtype for x in tree.leaves(found)} == {torch.float32}
    assert 0 < distance(found, full) < 20 * torch.finfo(dtype).eps  # of some ten roundings one after another


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("cnn", "lstm") else [pytest.mark.slow]) for name in NETS]
)
@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_jitted_gradient_equals_the_eager_one(name, backend):
    layer, call = NETS[name]()
    params, loss = perturbed(layer), autocast(objective(call))
    found = jit(grad(loss), backend=backend)(params)
    assert {x.dtype for x in tree.leaves(found)} == {torch.float32}
    assert distance(found, grad(loss)(params)) < 20 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", NETS)
def test_curvature_through_autocast_is_near_the_full_one(name):
    layer, call = NETS[name]()
    params = perturbed(layer)
    loss = objective(call)
    full = hvp(loss, (params,), (params,))
    assert distance(hvp(autocast(loss), (params,), (params,)), full) < 40 * torch.finfo(torch.bfloat16).eps


def test_vmapped_gradient_equals_a_loop():
    net, x = nn.MLP(4, (8,), 3), wave(5, 4)
    params = perturbed(net)
    slope = grad(autocast(lambda params, x: uneven(net(params, x))))
    batched = vmap(slope, (None, 0))(params, x)
    for i in range(5):
        one = tree.map(lambda g, i=i: g[i], batched)
        assert distance(one, slope(params, x[i])) < 4 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("conv", [nn.Conv2d, nn.ConvTranspose2d])
def test_convolutions_of_many_models_take_what_a_product_gives(conv):
    """torch's cast does not reach a convolution under vmap, which refuses operands of two types."""
    net, x = nn.Sequential(nn.Linear(4, 4), conv(1, 2, 3)), wave(2, 1, 4, 4)
    many = vmap(net.init)(random.split(random.key(0), 3))
    run = autocast(net)
    found = vmap(run, (0, None))(many, x)
    for i in range(3):
        one = tree.map(lambda p, i=i: p[i], many)
        assert found.dtype == run(one, x).dtype == torch.bfloat16
        assert distance(found[i].float(), run(one, x).float()) < 4 * torch.finfo(torch.bfloat16).eps


def test_recomputation_has_the_dtypes_of_the_first_time():
    """A backward pass runs after the region: what it computes again must be as narrow as before."""
    seen: list[torch.dtype] = []

    def layer(x: Tensor) -> Tensor:
        y = x @ x
        seen.append(y.dtype)
        return y.float().sin()

    x = wave(3, 3)
    expected = grad(autocast(lambda x: layer(x).sum()))(x)
    found = grad(autocast(lambda x: remat(layer)(x).sum()))(x)
    assert set(seen) == {torch.bfloat16}
    assert torch.equal(found, expected)


def test_scan_keeps_to_the_region_around_it():
    def last(w: Tensor) -> Tensor:
        end, _ = scan(lambda h, _: ((h @ w).tanh(), None), torch.ones(2, 2, dtype=torch.bfloat16), None, length=3)
        return end.float().sum()

    w = wave(2, 2)
    eager = grad(autocast(last))(w)
    assert eager.dtype == torch.float32
    assert torch.equal(jit(grad(autocast(last)), backend="aten")(w), eager)


def test_function_rebuilt_outside_a_region_leaves_one_around_it():
    """The other way round: made outside, run again inside."""
    x = wave(3, 3)
    _, pull = torch.func.vjp(remat(lambda x: x @ x), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = pull(torch.ones(3, 3))[0]
    assert inside.dtype == torch.float32


def test_tangent_has_the_dtype_of_its_value():
    y, dy = jvp(autocast(torch.matmul), (wave(2, 2), wave(2, 2)), (wave(2, 2), wave(2, 2)))
    assert y.dtype == dy.dtype == torch.bfloat16


def test_output_dtype_is_that_of_the_floating_leaves():
    found = autocast(lambda x: {"y": x @ x, "label": torch.ones(2, dtype=torch.int64)}, output_dtype=torch.float64)(
        wave(2, 2)
    )
    assert (found["y"].dtype, found["label"].dtype) == (torch.float64, torch.int64)


def test_region_ends_with_the_call():
    with pytest.raises(ZeroDivisionError):
        autocast(lambda x: 1 / 0)(torch.ones(1))
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_autocast_compiles_whole():
    f = autocast(lambda w, x: (x @ w).float().square().mean())
    w, x = wave(2, 2), wave(3, 2)
    compiled = torch.compile(grad(f), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(w, x), grad(f)(w, x))


def test_autocast_refuses_another_dtype():
    with pytest.raises(ValueError, match=r"autocast: expected dtype to be one of torch\.bfloat16, torch\.float16"):
        autocast(torch.matmul, torch.float32)


def test_autocast_needs_a_tensor():
    with pytest.raises(ValueError, match="autocast: expected a tensor among the arguments"):
        autocast(lambda x: x)(1.0)
