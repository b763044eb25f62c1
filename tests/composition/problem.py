"""A row of the zoo as a small problem: a function of few numbers, all of whose derivatives are cheap.

The floating arguments are moved along ``INPUTS`` random directions from a random point, and the floating results are
added up with ``OUTPUTS`` sets of random weights. A wrong entry of a derivative of the row shows in the problem's, with
probability one.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from zoo import Case, floating

from functorch_gen import tree

__all__ = ["INPUTS", "OUTPUTS", "Data", "Point", "Problem"]

INPUTS, OUTPUTS = 4, 3


class Data(NamedTuple):
    """What a problem is not differentiated in: n floating numbers in, m out."""

    origin: Tensor  # (n,)
    basis: Tensor  # (INPUTS, n), rows of length about one
    others: list[Tensor]  # keys, labels
    weights: Tensor  # (m, OUTPUTS)


class Point(NamedTuple):
    """Where a derivative is taken, and along which directions."""

    z: Tensor  # (INPUTS,)
    v: Tensor  # (INPUTS,)
    w: Tensor  # (OUTPUTS,)
    data: Data


class Problem:
    """``case`` as a function of z: to OUTPUTS numbers (``vector``) or to one (``scalar``). It holds no tensor."""

    def __init__(self, case: Case):
        self.case = case
        leaves, self.treedef = tree.flatten(case.args(0))
        self.shapes = [x.shape if x.is_floating_point() else None for x in leaves]

    def __str__(self) -> str:
        return self.case.name

    def outputs(self, x: Tensor, others: list[Tensor]) -> list[Tensor]:
        """The floating results; ``x`` holds all floating arguments in one vector."""
        values = iter(x.split([shape.numel() for shape in self.shapes if shape is not None]))
        rest = iter(others)
        leaves = [next(rest) if shape is None else next(values).reshape(shape) for shape in self.shapes]
        return floating(self.case.fun(*tree.unflatten(self.treedef, leaves)))

    def vector(self, z: Tensor, data: Data) -> Tensor:
        """(INPUTS,) -> (OUTPUTS,)"""
        found = self.outputs(data.origin + z @ data.basis, data.others)
        return torch.cat([y.reshape(-1) for y in found]) @ data.weights

    def scalar(self, z: Tensor, data: Data) -> Tensor:
        """(INPUTS,) -> (), with a Hessian even where the row is linear"""
        return torch.sin(self.vector(z, data)).sum()

    def point(self, seed: int) -> Point:
        """All that the columns need, drawn anew for each seed."""
        generator = torch.Generator().manual_seed(1000 + seed)  # not the numbers of the arguments

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        leaves = tree.leaves(self.case.args(seed))
        origin = torch.cat([x.reshape(-1) for x in leaves if x.is_floating_point()])
        others = [x for x in leaves if not x.is_floating_point()]
        basis = draw(INPUTS, origin.numel()) / origin.numel() ** 0.5
        # Each result counts as numbers near one, however large they are; small ones are not blown up.
        found = self.outputs(origin, others)
        sizes = [float(y.square().sum().sqrt().clamp(min=0.1 * y.numel() ** 0.5)) for y in found]
        weights = torch.cat([draw(y.numel(), OUTPUTS) / size for y, size in zip(found, sizes, strict=True)])
        return Point(0.1 * draw(INPUTS), draw(INPUTS), draw(OUTPUTS), Data(origin, basis, others, weights))

    def points(self, seed: int, count: int = 3) -> Point:
        """A batch of them."""
        return tree.stack([self.point(count * seed + i) for i in range(count)])
