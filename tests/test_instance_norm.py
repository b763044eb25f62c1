"""Instance normalisation with running statistics against ``torch.nn``, and batch normalisation of no examples."""

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from nn_cases import reference
from torch import Tensor
from zoo_case import Draw

from functorch_gen import nn, random, tree
from functorch_gen.transforms import grad


def loss(layer: Any, params: Any, state: Any, x: Tensor, *, train: bool = True) -> tuple[Tensor, Any]:
    y, state = layer(params, state, x, train=train)
    return (torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) * y.sin()).sum(), state


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


TRACKING = [
    (nn.InstanceNorm1d(3, track_running_stats=True), (2, 3, 5)),
    (nn.InstanceNorm1d(3, 1e-3, 0.4, True, True), (3, 5)),
    (nn.InstanceNorm2d(2, 1e-2, None, True, True), (3, 2, 2, 3)),
    (nn.InstanceNorm3d(2, momentum=0.7, affine=True, track_running_stats=True, bias=False), (2, 2, 2, 1, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), TRACKING, ids=lambda value: str(value))
def test_instance_norm_equals_torch_over_three_steps_and_in_evaluation(layer: Any, shape: tuple[int, ...]) -> None:
    """Outputs, gradients and buffers."""
    draw, module, state = Draw(0), reference(layer), tree.cast(layer.init_state(), torch.float64)
    params = draw.like(layer.init(random.key(0)))
    module.load_state_dict({**params, **state}, strict=True)
    for train in (True, True, True, False):
        module.train(train)
        x = draw(*shape)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        wanted = torch.autograd.grad(
            (torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) * y.sin()).sum(),
            [leaf, *module.parameters()],
        )
        assert_close(layer(params, state, x, train=train)[0], y.detach())
        found, state = grad(lambda x, p, s=state, t=train: loss(layer, p, s, x, train=t), (0, 1), has_aux=True)(
            x, params
        )
        names = [name for name, _ in module.named_parameters()]
        assert_close({"x": found[0], **found[1]}, dict(zip(["x", *names], wanted)))
        assert_close(state, dict(module.named_buffers()))


def test_instance_norm_has_state_only_where_it_tracks() -> None:
    assert not nn.is_stateful(nn.InstanceNorm2d(3))
    assert not nn.is_stateful(nn.InstanceNorm2d(3, 1e-5, 0.1, True, False))
    assert nn.is_stateful(nn.InstanceNorm2d(3, 1e-5, 0.1, True, True))
    assert isinstance(nn.InstanceNorm2d(3, track_running_stats=True), nn.InstanceNorm2d)


@pytest.mark.parametrize("tracks", [False, True])
def test_instance_norm_is_a_value(tracks: bool) -> None:
    layer = nn.InstanceNorm1d(3, affine=True, track_running_stats=tracks)
    assert layer == copy.deepcopy(layer) == pickle.loads(pickle.dumps(layer))
    assert len({layer, nn.InstanceNorm1d(3, affine=True, track_running_stats=tracks)}) == 1


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
def test_instance_norm_takes_any_leading_axes(lead: tuple[int, ...]) -> None:
    layer, x = nn.InstanceNorm2d(2, track_running_stats=True), Draw(0)(*lead, 2, 3, 4)
    y, state = layer({}, layer.init_state(), x, train=True)
    examples = x.reshape(-1, 2, 3, 4)
    wanted, expected = layer({}, layer.init_state(), examples, train=True)
    assert_close((y.reshape(wanted.shape), state), (wanted, expected))
    assert_close(nn.InstanceNorm2d(2)({}, x), y)


def test_instance_norm_refuses_one_value_of_a_channel() -> None:
    with pytest.raises(
        ValueError, match=r"InstanceNorm1d: expected more than one value of each channel, got \(2, 3, 1"
    ):
        nn.InstanceNorm1d(3)({}, torch.ones(2, 3, 1))
    with pytest.raises(ValueError, match=r"InstanceNorm1d: x: expected shape \(\.\.\., c=3, l\), got \(2, 2, 4\)"):
        nn.InstanceNorm1d(3)({}, torch.ones(2, 2, 4))
    with pytest.raises(ValueError, match="InstanceNorm3d: expected 0 <= momentum <= 1"):
        nn.InstanceNorm3d(3, momentum=2.0)
    with pytest.raises(ValueError, match="InstanceNorm1d: expected track_running_stats=True of a layer with state"):
        replace(nn.InstanceNorm1d(3, track_running_stats=True), track_running_stats=False)
    with pytest.raises(KeyError, match="InstanceNorm1d: expected state 'running_mean'"):
        nn.InstanceNorm1d(3, track_running_stats=True)({}, {}, torch.ones(2, 3, 4), train=True)


EMPTY = [(nn.BatchNorm1d(3), (0, 3)), (nn.BatchNorm1d(3, momentum=None), (0, 3, 2)), (nn.BatchNorm2d(2), (0, 2, 2, 2))]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize(("layer", "shape"), EMPTY, ids=lambda value: str(value))
def test_batch_norm_of_no_examples_equals_torch(layer: Any, shape: tuple[int, ...], train: bool) -> None:
    """The statistics stay, the count goes up in training, gradients of the parameters are zero."""
    draw, module, x = Draw(0), reference(layer).train(train), torch.zeros(shape, dtype=torch.float64)
    params, state = draw.like(layer.init(random.key(0))), tree.cast(layer.init_state(), torch.float64)
    state = {**state, "running_mean": draw(*state["running_mean"].shape)}
    module.load_state_dict({**params, **state})
    y = module(x.requires_grad_())
    wanted = torch.autograd.grad(y.sum(), [module.weight, module.bias])
    found, new = grad(lambda p, x: loss(layer, p, state, x, train=train), has_aux=True)(params, x.detach())
    assert layer(params, state, x.detach(), train=train)[0].shape == y.shape
    assert_close(found, dict(zip(["weight", "bias"], wanted)))
    assert_close(new, dict(module.named_buffers()))
