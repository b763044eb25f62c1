"""A row of the table in ``tests/zoo.py``: a pure function and a factory of its arguments."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.typing import Tree

ALIKE = "another row of the table stands for it; its derivatives are checked all the same"
"""A reason not to be a row of the table."""


class Refusal(NamedTuple):
    """A cell of the table of compositions that raises an error: what it says (a pattern), and why it must."""

    message: str
    reason: str  # with the upstream thread


@dataclass(frozen=True)
class Case:
    """``fun(*args(seed))`` is a tree of tensors."""

    name: str
    fun: Callable[..., Tree]
    args: Callable[[int], tuple[Tree, ...]]
    skip: Mapping[str, str] = field(default_factory=dict)  # law, "derivatives" or "table" -> why it does not hold
    errors: Mapping[str, Refusal] = field(default_factory=dict)  # column of the table -> its error

    def __str__(self) -> str:
        return self.name


class Draw:
    """Draws float64 tensors in general position, one after another."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def like(self, shapes: Tree) -> Tree:
        """The tree with its floating leaves drawn anew."""
        return tree.map(lambda x: self(*x.shape) if x.is_floating_point() else x, shapes)

    def times(self, *shape: int) -> Tensor:
        """In [0.1, 0.9]."""
        return 0.1 + 0.8 * torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def labels(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def key(self) -> Tensor:
        return random.key(int(self.labels(2**31, 1)))

    def params(self) -> Tree:
        """A small nest of every node type."""
        return {"w": self(3, 2), "inner": {"b": self(2), "none": None}, "list": [self(), (self(1, 2),)]}


def from_draw(
    name: str,
    fun: Callable[..., Tree],
    args: Callable[[Draw], tuple[Tree, ...]],
    errors: Mapping[str, Refusal] | None = None,
    **skip: str,
) -> Case:
    return Case(name, fun, lambda seed: args(Draw(seed)), skip, errors or {})
