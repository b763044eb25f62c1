"""Convolutional classifiers with state against modules of ``torch.nn``, and under the transforms."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import models, nn, random, tree
from functorch_gen.transforms import grad, hvp, jit, jvp, vmap
from functorch_gen.typing import Params, State, Tree


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(layer: Any, seed: int = 0) -> tuple[Params, State]:
    """float64, parameters in general position."""
    generator = torch.Generator().manual_seed(seed)
    params = tree.map(
        lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64), layer.init(random.key(0))
    )
    return params, tree.cast(layer.init_state(), torch.float64)


def loss(layer: Any, params: Params, state: State, x: Tensor, *, train: bool = True) -> tuple[Tensor, State]:
    y, state = layer(params, state, x, train=train)
    return (torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) * torch.sin(y)).sum(), state


def assert_close(actual: Tree, expected: Tree, tolerance: float = 1e-12) -> None:
    tree.map(lambda a, b: torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance), actual, expected)


class TorchBlock(torch.nn.Module):
    """The basic block as torchvision writes it."""

    def __init__(self, c_in: int, c_out: int, stride: int):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(c_out)
        self.conv2 = torch.nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(c_out)
        self.downsample = None
        if stride != 1 or c_in != c_out:
            conv = torch.nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.downsample = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        return torch.relu(h + (x if self.downsample is None else self.downsample(x)))


def torch_cnn(net: models.CNN) -> torch.nn.Module:
    """Modules of torch.nn under the names of the layers."""
    stages = []
    for c_in, c_out in zip((net.in_channels, *net.channels), net.channels, strict=False):
        stages.append(
            torch.nn.Sequential(
                torch.nn.Conv2d(c_in, c_out, net.kernel_size, padding="same", bias=False),
                torch.nn.BatchNorm2d(c_out),
                torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
            )
        )
    head = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(net.channels[-1], net.num_classes)]
    return torch.nn.Sequential(*stages, *head)


def in_order(params: Params, state: State, count: int) -> dict[str, Tensor]:
    """The state dict of ``torch_cnn``."""
    found = {}
    for i in range(count):
        found[f"{i}.0.weight"] = params[f"block{i}"]["conv"]["weight"]
        norm = {**params[f"block{i}"]["norm"], **state[f"block{i}"]["norm"]}
        found |= {f"{i}.1.{name}": x for name, x in norm.items()}
    return found | {f"{count + 2}.{name}": x for name, x in params["head"].items()}


@pytest.mark.parametrize("channels", [(3,), (4, 3)], ids=str)
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_cnn_equals_torch(channels, train):
    net = models.CNN(2, 3, channels)
    params, state = arguments(net)
    module = torch_cnn(net).double().train(train)
    module.load_state_dict(in_order(params, state, len(channels)))
    x = normal(1, 3, 2, 6, 5)
    y, new = net(params, state, x, train=train)
    assert_close(y, module(x).detach())
    assert_close(in_order(params, new, len(channels)), dict(module.state_dict()))


@pytest.mark.parametrize(("c_in", "c_out", "stride"), [(2, 2, 1), (2, 3, 1), (2, 2, 2)])
def test_basic_block_equals_torch_by_state_dict(c_in, c_out, stride):
    block = models.BasicBlock(c_in, c_out, stride)
    params, state = arguments(block)
    module = TorchBlock(c_in, c_out, stride).double()
    module.load_state_dict({**tree.names(params), **tree.names(state)})
    x = normal(1, 3, c_in, 4, 5)
    for train in (True, False):
        y, state = block(params, state, x, train=train)
        assert_close(y, module.train(train)(x).detach())
        assert_close(tree.names(state), dict(module.named_buffers()))


def test_conv_block_is_conv_norm_relu():
    block, x = models.ConvBlock(2, 3, 1), normal(1, 3, 2, 4, 4)
    params, state = arguments(block)
    y, new = block(params, state, x, train=True)
    h, norm = nn.BatchNorm2d(3)(params["norm"], state["norm"], F.conv2d(x, params["conv"]["weight"]), train=True)
    assert_close((y, new), (h.relu(), {"norm": norm}))


def test_cnn_takes_any_leading_axes():
    """In evaluation; in training all of them are the batch."""
    net = models.CNN(1, 3, (4,))
    params, state = arguments(net)
    x = normal(1, 2, 3, 1, 4, 4)
    for train in (True, False):
        y, new = net(params, state, x, train=train)
        flat, flat_new = net(params, state, x.flatten(0, 1), train=train)
        assert_close((y.flatten(0, 1), new), (flat, flat_new))
    assert_close(net(params, state, x[0, 0], train=False)[0], net(params, state, x, train=False)[0][0, 0])


def test_cnn_draws_dropout_from_its_key():
    net = models.CNN(1, 3, (8,), dropout=0.5)
    params, state = arguments(net)
    x = normal(1, 4, 1, 4, 4)
    quiet = net(params, state, x, train=True)[0]
    noisy, again, other = (net(params, state, x, train=True, key=random.key(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)
    assert not torch.equal(noisy, quiet)


@pytest.mark.parametrize(
    "layer",
    [models.CNN(1, 2, (2, 2), axis_name="batch"), models.BasicBlock(1, 2, axis_name="batch")],
    ids=["CNN", "BasicBlock"],
)
def test_network_with_an_axis_name_sees_all_examples_as_the_batch(layer):
    """A block of each kind: vmap over examples along a named axis equals the batch, gradients and state included."""
    plain = type(layer)(*(1, 2, (2, 2)) if isinstance(layer, models.CNN) else (1, 2))
    params, state = arguments(plain)
    x = normal(1, 3, 1, 4, 4)

    def one(params: Params, x: Tensor) -> tuple[Tensor, State]:
        y, new = layer(params, state, x, train=True)
        return torch.sin(y).sum(), new

    def whole(params: Params) -> tuple[Tensor, State]:
        y, new = plain(params, state, x, train=True)
        return torch.sin(y).sum(), new

    found, new = vmap(grad(one, has_aux=True), (None, 0), (0, None), axis_name="batch")(params, x)
    wanted, wanted_state = grad(whole, has_aux=True)(params)
    assert_close(tree.map(lambda g: g.sum(0), found), wanted, 1e-11)
    assert_close(new, wanted_state)


@pytest.mark.parametrize("layer", [models.CNN(1, 2, (2,)), models.BasicBlock(1, 2, 2)], ids=["CNN", "BasicBlock"])
def test_network_with_state_under_transforms_of_transforms(layer):
    """jit(vmap(hvp)) over models, with maxima, relus and statistics in it, against forward over reverse by hand."""
    members = [(*arguments(layer, seed), normal(seed, 3, 1, 4, 4), arguments(layer, seed + 9)[0]) for seed in range(2)]

    def curvature(params: Params, state: State, x: Tensor, v: Params) -> Tree:
        return hvp(lambda p: loss(layer, p, state, x)[0], (params,), (v,))

    def by_hand(params: Params, state: State, x: Tensor, v: Params) -> Tree:
        return jvp(lambda p: grad(lambda p: loss(layer, p, state, x)[0])(p), (params,), (v,))[1]

    found = jit(vmap(curvature), backend="aten")(*tree.stack(members))
    assert_close(found, tree.stack([by_hand(*member) for member in members]), 1e-9)


@pytest.mark.slow
def test_cnn_in_generated_code_is_the_same():
    net = models.CNN(1, 2, (3, 4))

    def gradients(params: Params, state: State, x: Tensor) -> Tree:
        return grad(lambda p: loss(net, p, state, x), has_aux=True)(params)

    compiled = jit(gradients)
    for seed in range(2):
        given = (*arguments(net, seed), normal(seed, 3, 1, 8, 8))
        assert_close(compiled(*given), gradients(*given), 1e-10)


def test_cnn_refuses_sizes_that_do_not_fit():
    net = models.CNN(1, 2, (2, 2))
    params, state = arguments(net)
    with pytest.raises(ValueError, match=re.escape("CNN: x: expected height and width >= 4, got (2, 1, 4, 3)")):
        net(params, state, torch.ones(2, 1, 4, 3, dtype=torch.float64), train=True)
    with pytest.raises(ValueError, match=re.escape("CNN: x: expected shape (..., c=1, h, w), got (2, 3, 4, 4)")):
        net(params, state, torch.ones(2, 3, 4, 4, dtype=torch.float64), train=True)
    with pytest.raises(ValueError, match="CNN: expected channels >= 1"):
        models.CNN(1, 2, (2, 0))
    with pytest.raises(ValueError, match="CNN: expected 0 <= dropout <= 1, got 2"):
        models.CNN(1, 2, dropout=2.0)
