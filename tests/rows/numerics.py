"""Rows of safe numerics, and of torch modules as pure functions."""

from collections.abc import Callable
from typing import Any

import torch
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import interop, numerics, tree
from functorch_gen.typing import Tree


def of_module(name: str, module: torch.nn.Module, *shape: int, **settings: Any) -> Case:
    """The module's output; its buffers after the call are constants to derivatives."""
    apply, params, state = interop.from_module(module)

    def args(draw: Draw) -> tuple[Tree, ...]:
        positive = tree.map(lambda x: 0.5 + draw(*x.shape).square() if x.is_floating_point() else x, state)
        return draw.like(params), positive, draw(*shape)

    return from_draw(f"from_module {name}", lambda params, state, x: apply(params, state, x, **settings)[0], args)


def of_x(name: str, fun: Callable[..., Tree], *shapes: tuple[int, ...]) -> Case:
    return from_draw(f"numerics.{name}", fun, lambda d: tuple(d(*shape) for shape in shapes))


MLP = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
CNN = torch.nn.Sequential(
    torch.nn.Conv2d(1, 2, 2), torch.nn.BatchNorm2d(2), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(8, 2)
)

CASES = [
    of_x("norm", lambda x: numerics.norm(x, dim=-1), (3, 4)),
    of_x("normalize", numerics.normalize, (3, 4)),
    of_x("clip_by_norm", lambda x: numerics.clip_by_norm(x, 1.0, dim=-1), (3, 4)),
    of_x("pairwise_distances", numerics.pairwise_distances, (3, 2), (4, 2)),
    of_x("cosine_similarity", numerics.cosine_similarity, (3, 4), (3, 4)),
    of_x("logsumexp", lambda x: numerics.logsumexp(x, 1), (3, 4)),
    of_x("logaddexp", numerics.logaddexp, (5,), (5,)),
    of_x("softplus", lambda x: numerics.softplus(10 * x), (7,)),
    from_draw("numerics.log_ndtr", numerics.log_ndtr, lambda d: (3 * d(7),), table=ALIKE),
    of_module("MLP", MLP, 2, 3),
    of_module("CNN with BatchNorm", CNN, 3, 1, 3, 3),
    of_module("CNN with BatchNorm in training", CNN, 3, 1, 3, 3, train=True),
]
