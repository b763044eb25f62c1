"""Runge-Kutta methods for dy/dt = f(y, t) in given steps.

The state y is a tree of floating tensors, f(y, t) a tree like it, t a 0-d tensor of y's dtype. Time runs either way.

An explicit method is the rows of its tableau. The first slope is k_1 = f(y, t); row i leads to the point
y + h sum_j a_ij k_j at the time t + h sum_j a_ij, where the next slope is taken; the last row leads to the new y.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_choice, check_floating
from functorch_gen.transforms import scan
from functorch_gen.transforms.carry import check_alike
from functorch_gen.typing import Tree

__all__ = ["METHODS", "Field", "Rows", "checked_field", "matrix", "move", "one_step", "solve", "state_dtype"]

Field: TypeAlias = Callable[[Any, Tensor], Any]
"""(y, t) -> dy/dt, a tree like y."""

Rows: TypeAlias = Sequence[Sequence[float]]
"""a_ij, the zeros above the diagonal left out."""

METHODS: dict[str, Rows] = {
    "euler": ((1,),),
    "midpoint": ((1 / 2,), (0, 1)),
    "heun": ((1,), (1 / 2, 1 / 2)),
    "rk4": ((1 / 2,), (0, 1 / 2), (0, 0, 1), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "dopri5": (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}


def solve(f: Field, y: Tree, times: Tensor, *, method: str = "rk4", return_path: bool = False) -> Any:
    """y at the last of ``times`` from y at the first, by one Runge-Kutta step from each time to the next.

    It is a :func:`scan`: under ``jit`` one program of the size of a step, with the derivatives of the discrete steps,
    in both modes, with respect to y, the times and all that f closes over. Reverse mode keeps what every step computed;
    with ``remat(f)`` less.

    Args:
        times: (n,) from the start to the end, rising or falling.
        method: ``"euler"`` (order 1), ``"midpoint"``, ``"heun"`` (2), ``"rk4"`` (4) or ``"dopri5"`` (5), with 1, 2, 2,
            4 and 6 evaluations of f a step.
        return_path: return y at all times, stacked along a new first axis.
    Raises:
        TypeError: if a leaf of y (names the path) or the times are not floating.
        ValueError: if there is no time, the method is unknown, or f(y, t) is not like y (names the path).
    Source: Hairer, Norsett and Wanner 1993, Solving ordinary differential equations I, eq. II.1.8 and table II.5.2.

    >>> solve(lambda y, t: -y, torch.ones(2), torch.linspace(0, 1, 11))  # exp(-1)
    tensor([0.3679, 0.3679])
    """
    check_choice("solve", "method", method, METHODS)
    dtype = state_dtype("solve", y)
    check_floating(times, "solve: times")
    if times.ndim != 1 or not len(times):
        raise ValueError(f"solve: times: expected shape (n,) with n >= 1, got {tuple(times.shape)}")
    rows, starts = METHODS[method], times[:-1]
    weights = (times[1:] - starts)[:, None, None] * matrix(rows, times)  # h a_ij
    moments = starts[:, None] + weights.sum(-1)
    field = checked_field("solve", f)

    def step(y: Tree, at: tuple[Tensor, Tensor, Tensor]) -> tuple[Tree, Tree]:
        start, moments, weights = at
        y, _ = one_step(rows, field, y, field(y, start), moments, weights)
        return y, y if return_path else None

    last, path = scan(step, y, tree.cast((starts, moments, weights), dtype))
    return tree.map(lambda first, rest: torch.cat([first[None], rest]), y, path) if return_path else last


def state_dtype(name: str, y: Tree) -> torch.dtype:
    """The widest dtype among the leaves, which must be floating."""
    leaves = tree.names(y)
    if not leaves:
        raise ValueError(f"{name}: expected y to have leaves, got none")
    for path, x in leaves.items():
        check_floating(x, f"{name}: y at {path!r}" if path else f"{name}: y")
    return functools.reduce(torch.promote_types, [x.dtype for x in leaves.values()])


def checked_field(name: str, f: Field) -> Field:
    """f, checked to return trees like y."""

    def field(y: Tree, t: Tensor) -> Tree:
        slope = f(y, t)
        check_alike(f"{name}: expected f(y, t) to keep y", y, slope)
        return slope

    return field


def matrix(rows: Rows, like: Tensor) -> Tensor:
    """The rows filled up with zeros: (s, s)."""
    width = len(rows[-1])
    filled = [[*row, *[0.0] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=like.dtype, device=like.device)


def one_step(rows: Rows, f: Field, y: Tree, slope: Tree, moments: Tensor, weights: Tensor) -> tuple[Tree, list[Tree]]:
    """One step from y, where f is ``slope``: the new y, and the slopes on the way.

    Args:
        moments: t + h sum_j a_ij: (s,).
        weights: h a_ij: (s, s).
    """
    slopes = [slope]
    for i, row in enumerate(rows[:-1]):
        slopes.append(f(move(y, slopes, row, weights[i]), moments[i]))
    return move(y, slopes, rows[-1], weights[-1]), slopes


def move(y: Tree, slopes: Sequence[Tree], row: Sequence[float], weights: Tensor) -> Tree:
    """y + sum_j w_j k_j, over the entries of the row that are not zero."""
    for j, entry in enumerate(row):
        y = tree.add_scaled(y, slopes[j], weights[j]) if entry else y
    return y
