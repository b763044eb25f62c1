"""Rows of layers with state: outputs and new state as functions of parameters, state and input."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from zoo_case import Case, Draw, from_draw

from functorch_gen import models, nn, random, tree
from functorch_gen.transforms import vmap
from functorch_gen.typing import Params, State, Tree


def from_stateful(name: str, layer: Any, *shape: int, train: bool = True) -> Case:
    shapes, state = layer.init(random.key(0)), layer.init_state()

    def args(draw: Draw) -> tuple[Tree, ...]:
        return draw.like(shapes), tree.map_with_path(lambda path, x: running(draw, path, x), state), draw(*shape)

    return from_draw(name, lambda params, state, x: layer(params, state, x, train=train), args)


def running(draw: Draw, path: str, x: Tensor) -> Tensor:
    """A leaf of a state: variances are positive, counts as they are."""
    if not x.is_floating_point():
        return x
    return 0.5 + draw.times(*x.shape) if path.endswith("running_var") else draw(*x.shape)


SYNCHRONISED = nn.BatchNorm1d(2, axis_name="batch")


def synchronised(params: Params, state: State, x: Tensor) -> tuple[Tensor, State]:
    one: Callable[[Tensor], tuple[Tensor, State]] = lambda x: SYNCHRONISED(params, state, x, train=True)
    return vmap(one, out_dims=(0, None), axis_name="batch")(x)


SPECTRAL = nn.SpectralNorm(nn.Linear(3, 2))
START = tree.cast(SPECTRAL.init_state(), torch.float64)


def spectral(key: Tensor, scale: Tensor, bias: Tensor, x: Tensor) -> tuple[Tensor, State]:
    """In training, where u and v are constants of the gradient: the weight changes in length, which moves neither."""
    weight = scale * random.normal(key, (2, 3), torch.float64).to(x.dtype)
    return SPECTRAL({"weight": weight, "bias": bias}, tree.cast(START, x.dtype), x, train=True)


CASES = [
    from_stateful("nn.BatchNorm1d train", nn.BatchNorm1d(3), 4, 3),
    from_stateful("nn.BatchNorm2d train", nn.BatchNorm2d(2, momentum=None), 3, 2, 2, 2),
    from_stateful("nn.BatchNorm2d eval", nn.BatchNorm2d(2), 3, 2, 2, 2, train=False),
    from_draw(
        "nn.BatchNorm1d over a named axis",
        synchronised,
        lambda d: (
            {"weight": d(2), "bias": d(2)},
            {"running_mean": d(2), "running_var": 0.5 + d.times(2), "num_batches_tracked": d.labels(9)},
            d(3, 2, 2),
        ),
    ),
    from_draw("nn.SpectralNorm train", spectral, lambda d: (d.key(), 0.5 + d.times(), d(2), d(4, 3))),
    from_stateful("nn.SpectralNorm eval", SPECTRAL, 4, 3, train=False),
    from_stateful("models.BasicBlock", models.BasicBlock(1, 2), 2, 1, 3, 3),
    from_stateful("models.CNN", models.CNN(1, 2, (2,)), 3, 1, 3, 3),
]
