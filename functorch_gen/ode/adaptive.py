"""Dormand and Prince's method in steps of its own choice, differentiated as a flow in both modes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_positive, check_shape
from functorch_gen.ode.runge_kutta import METHODS, Field, checked_field, matrix, move, one_step, state_dtype
from functorch_gen.transforms import jvp, vjp, while_loop
from functorch_gen.transforms.carry import as_tensors
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.custom_call import Kept, Vectors, call, is_followed, likes, materialize
from functorch_gen.tree import TreeDef
from functorch_gen.typing import Number, Tree

__all__ = ["Stats", "solve_adaptive"]

# Of the slopes of "dopri5" and the one at the new y: its result minus that of the fourth-order method beside it.
_ERROR = (71 / 57600, 0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


class Stats(NamedTuple):
    """What :func:`solve_adaptive` did."""

    accepted: Tensor  # () int64, steps
    rejected: Tensor  # () int64, steps tried again with a smaller one
    finished: Tensor  # () bool, whether it came to the end


def solve_adaptive(
    f: Field,
    y: Tree,
    t_start: Number,
    t_end: Number,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-8,
    max_steps: int = 10_000,
    return_stats: bool = False,
) -> Any:
    """y at ``t_end`` from y at ``t_start``, by Dormand and Prince's method of order 5(4), which estimates its error.

    A step is taken if the root mean square of error / (atol + rtol max(abs(y), abs(y'))), over all elements of all
    leaves, is at most 1. One step size serves a batch; under ``vmap`` every example has its own.

    It is differentiated as a flow, not as the steps taken: with theta all that f closes over, reverse mode is the
    adjoint method, which solves backwards beside y, without memory of the way, for a = dL/dy,

        da/dt = -a df/dy,    dL/dtheta = integral of a df/dtheta dt,    dL/dt_end = a f,    dL/dt_start = -a f

    and forward mode solves d(dy)/dt = df/dy dy + df/dtheta dtheta beside y. Both use the same tolerances, are
    differentiated alike, and err by the order of the tolerances; derivatives of :func:`solve` are exact for its steps.

    Args:
        max_steps: of those tried; if they do not reach the end, the result is NaN.
        return_stats: return (y, :class:`Stats`).
    Raises:
        TypeError: if a leaf of y is not floating (names the path).
        ValueError: if f(y, t) is not like y (names the path), a tolerance is not positive, or a time not 0-d.
    Source: Hairer, Norsett and Wanner 1993, Solving ordinary differential equations I, eq. II.4.11 and II.4.13, table
    II.5.2; Chen et al. 2018, algorithm 1 and appendix B, arXiv:1806.07366.

    >>> y, stats = solve_adaptive(lambda y, t: -y, torch.ones(2), 0.0, 1.0, return_stats=True)
    >>> y, stats.finished
    (tensor([0.3679, 0.3679]), tensor(True))
    """
    check_positive("solve_adaptive", rtol=rtol, atol=atol, max_steps=max_steps)
    dtype, device = state_dtype("solve_adaptive", y), tree.leaves(y)[0].device
    ends = [t.to(device, dtype) for t in as_tensors("solve_adaptive", "times", [t_start, t_end])]
    for name, t in zip(("t_start", "t_end"), ends, strict=True):
        check_shape(t, "", f"solve_adaptive: {name}")
    field, tolerance = checked_field("solve_adaptive", f), _Tolerance(rtol, atol, max_steps)
    if torch.compiler.is_dynamo_compiling():  # it cannot trace how functions are rebuilt
        y, stats = _follow(field, y, ends[0], ends[1], tolerance)
    else:
        closed, rebuild = convert_closure(field)
        leaves, treedef = tree.flatten(y)
        flow, inputs = _Flow(rebuild, len(closed), len(leaves), treedef, tolerance), [*closed, *ends, *leaves]
        outputs = call(flow, inputs) if any(map(is_followed, inputs)) else flow.run(inputs)
        y, stats = tree.unflatten(treedef, outputs[: len(leaves)]), Stats(*outputs[len(leaves) :])
    return (y, stats) if return_stats else y


class _Tolerance(NamedTuple):
    rtol: float
    atol: float
    max_steps: int


class _Problem(NamedTuple):
    """The inputs of a :class:`_Flow`, or their tangents."""

    closed: Sequence[Any]  # the tensors that f closes over
    t_start: Any
    t_end: Any
    y: Tree


@dataclass(frozen=True, slots=True)  # with slots, closure conversion does not find what ``rebuild`` replaces
class _Flow:
    """Inputs: the leaves of a :class:`_Problem`. Outputs: the leaves of y at the end, then the stats."""

    rebuild: Callable[[Sequence[Tensor]], Field]
    closed: int  # how many tensors f closes over
    count: int  # how many leaves y has
    treedef: TreeDef
    tolerance: _Tolerance
    name: str = "solve_adaptive"

    def problem(self, xs: Sequence[Any]) -> _Problem:
        closed, (t_start, t_end, *leaves) = xs[: self.closed], xs[self.closed :]
        return _Problem(closed, t_start, t_end, tree.unflatten(self.treedef, leaves))

    def run(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        at = self.problem(xs)
        y, stats = _follow(self.rebuild(at.closed), at.y, at.t_start, at.t_end, self.tolerance)
        return *tree.leaves(y), *stats

    def kept(self) -> Kept:
        return Kept(range(self.closed + 2 + self.count), range(self.count))

    def constants(self) -> range:
        return range(0)

    def check_push(self, level: int) -> None:
        """There is forward mode at every level."""

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        """d(dy)/dt = df/dy dy + df/dtheta dtheta, from dy - f dt_start to dy + f dt_end."""
        at, y_end, f = self._saved(saved)
        d = self.problem(materialize(tangents, likes(saved)[: len(tangents)]))
        moving = [i for i in range(self.closed) if tangents[i] is not None]
        theta, d_theta = ({i: xs[i] for i in moving} for xs in (at.closed, d.closed))

        def variation(state: tuple[Tree, Tree], t: Tensor) -> tuple[Tree, Tree]:
            y, dy = state
            return jvp(lambda y, theta: f(y, theta, t), (y, theta), (dy, d_theta))

        dy = tree.add_scaled(d.y, f(at.y, theta, at.t_start), -d.t_start)
        _, dy = solve_adaptive(variation, (at.y, dy), at.t_start, at.t_end, **self.tolerance._asdict())
        dy = tree.add_scaled(dy, f(y_end, theta, at.t_end), d.t_end)
        return [*tree.leaves(dy), *[None] * len(Stats._fields)]

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[int]) -> Vectors:
        """The adjoint equations of Chen et al., solved from the end to the start."""
        at, y_end, f = self._saved(saved)
        a = tree.unflatten(self.treedef, materialize(cotangents[: self.count], likes(saved)[-self.count :]))
        theta: Any = {i: at.closed[i] for i in wanted if i < self.closed}

        def adjoint(state: tuple[Tree, Tree, Tree], t: Tensor) -> tuple[Tree, Tree, Tree]:
            y, a, _ = state
            slope, pull = vjp(lambda y, theta: f(y, theta, t), y, theta)
            of_y, of_theta = pull(a)
            return slope, tree.scale(of_y, -1.0), tree.scale(of_theta, -1.0)

        state, tolerance = (y_end, a, tree.zeros_like(theta)), self.tolerance._asdict()
        _, a_start, of_theta = solve_adaptive(adjoint, state, at.t_end, at.t_start, **tolerance)
        of_start = -tree.vdot(a_start, f(at.y, theta, at.t_start)).to(at.t_start.dtype)
        of_end = tree.vdot(a, f(y_end, theta, at.t_end)).to(at.t_end.dtype)
        return [*[of_theta.get(i) for i in range(self.closed)], of_start, of_end, *tree.leaves(a_start)]

    def _saved(self, saved: Sequence[Tensor]) -> tuple[_Problem, Tree, Callable[[Tree, Tree, Tensor], Tree]]:
        """The problem, y at its end, and f(y, theta, t), where theta are some of the tensors it closes over."""
        at = self.problem(saved[: -self.count])

        def f(y: Tree, theta: Any, t: Tensor) -> Tree:
            return self.rebuild([theta.get(i, x) for i, x in enumerate(at.closed)])(y, t)

        return at, tree.unflatten(self.treedef, saved[-self.count :]), f


class _Progress(NamedTuple):
    y: Tree
    slope: Tree  # f(y, t)
    t: Tensor  # ()
    h: Tensor  # (), the step to try
    accepted: Tensor  # () int64
    rejected: Tensor  # () int64


def _follow(f: Field, y: Tree, t_start: Tensor, t_end: Tensor, tolerance: _Tolerance) -> tuple[Tree, Stats]:
    rtol, atol, max_steps = tolerance
    rows = METHODS["dopri5"]
    weights = matrix(rows, t_start)
    error_weights = torch.tensor(_ERROR, dtype=t_start.dtype, device=t_start.device)

    def go_on(now: _Progress) -> Tensor:
        moves = (now.t + now.h - now.t).abs() > 0  # False for a step that is too small to count, or NaN
        return (now.t != t_end) & moves & (now.accepted + now.rejected < max_steps)

    def attempt(now: _Progress) -> _Progress:
        left = t_end - now.t
        last = now.h.abs() >= left.abs()
        h = torch.where(last, left, now.h)
        t = torch.where(last, t_end, now.t + h)
        y, slopes = one_step(rows, f, now.y, now.slope, now.t + h * weights.sum(-1), h * weights)
        slopes.append(f(y, t))
        error = move(tree.zeros_like(y), slopes, _ERROR, h * error_weights)
        size = _relative_size(error, _scale(rtol, atol, now.y, y))
        factor = torch.where(size.isfinite(), (0.9 * size ** (-1 / 5)).clamp(0.2, 10), 0.2)
        accept = size <= 1
        y, slope, t = tree.where(accept, (y, slopes[-1], t), (now.y, now.slope, now.t))
        return _Progress(y, slope, t, h * factor, now.accepted + accept, now.rejected + ~accept)

    accepted, rejected = (torch.zeros((), dtype=torch.int64, device=t_start.device) for _ in range(2))
    slope = f(y, t_start)
    h = _first_step(y, slope, _scale(rtol, atol, y, y)) * (t_end - t_start).sign()
    end = while_loop(go_on, attempt, _Progress(y, slope, t_start, h, accepted, rejected))
    finished = end.t == t_end
    y = tree.map(lambda x: torch.where(finished, x, math.nan), end.y)
    return y, Stats(end.accepted, end.rejected, finished)


def _scale(rtol: float, atol: float, y: Tree, other: Tree) -> Tree:
    return tree.map(lambda a, b: atol + rtol * torch.maximum(a.abs(), b.abs()), y, other)


def _relative_size(x: Tree, scale: Tree) -> Tensor:
    """Root of the mean square of x / scale over all elements: -> ()."""
    return tree.norm(tree.map(torch.div, x, scale)) / max(tree.size(x), 1) ** 0.5


def _first_step(y: Tree, slope: Tree, scale: Tree) -> Tensor:
    """One in which y moves by a hundredth: -> (). Hairer, Norsett and Wanner 1993, section II.4, step a."""
    size, speed = _relative_size(y, scale), _relative_size(slope, scale)
    small = (size < 1e-5) | (speed < 1e-5)
    return torch.where(small, 1e-6, 0.01 * size / torch.where(small, 1, speed))
