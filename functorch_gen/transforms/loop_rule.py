"""A loop over flat tensors as one operation, whose derivatives are loops again.

``step(*carry, *x, *closed) -> (*carry, *y)`` runs over axis 0 of the xs. Because each rule below ends in such a loop,
every order and every stack of transforms does. The backward loop runs the steps again from the carries they started
from, which are what the forward loop keeps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from functorch_gen.transforms.context import is_differentiable
from functorch_gen.transforms.derivatives import Flat, pull_back, push_forward
from functorch_gen.transforms.loop_node import loop_node

__all__ = ["Loop", "run_loop"]


@dataclass(frozen=True)
class Loop:
    """What is run: ``step`` on ``carries`` tensors of state, ``inputs`` slices and the rest, the same at each step."""

    step: Flat
    carries: int
    inputs: int
    reverse: bool = False  # from the last slice to the first; the ys stand in the order of the slices all the same

    def split(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Carries, xs and closed-over tensors."""
        end = self.carries + self.inputs
        return list(flat[: self.carries]), list(flat[self.carries : end]), list(flat[end:])

    def with_history(self) -> "Loop":
        """The loop that also returns, as its last ys, the carries its steps started from."""
        return replace(self, step=lambda *flat: (*self.step(*flat), *flat[: self.carries]))


def run_loop(loop: Loop, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``(*carry, *ys)`` of a loop that is being traced, with one node for all its steps."""
    requires_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in flat)
    if torch._C._are_functorch_transforms_active() or requires_gradient:
        out = _Loop.apply(loop, *flat)
        return out[: len(out) - loop.carries]
    return loop_node(loop.step, *loop.split(flat), reverse=loop.reverse)


class _Loop(torch.autograd.Function):
    """Returns ``(*carry, *ys, *history)``."""

    @staticmethod
    def forward(loop: Loop, *flat: Tensor) -> tuple[Tensor, ...]:
        return loop_node(loop.with_history().step, *loop.split(flat), reverse=loop.reverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.loop, *flat = inputs
        ctx.save_for_backward(*flat, *output[len(output) - ctx.loop.carries :])
        ctx.save_for_forward(*flat)
        ctx.floating = [is_differentiable(x) for x in output]
        ctx.likes = [(x.shape, x.dtype, x.device) for x in output]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output if not is_differentiable(x)])

    @staticmethod
    def vmap(info: Any, in_dims: Any, loop: Loop, *flat: Tensor) -> Any:
        carries, xs, closed = loop.split(list(zip(flat, in_dims[1:], strict=True)))
        mapped = [x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0) for x, dim in carries]
        mapped += [x if dim is None else x.movedim(dim, 1) for x, dim in xs]
        mapped += [x if dim is None else x.movedim(dim, 0) for x, dim in closed]
        dims = [0] * len(carries) + [None if dim is None else 0 for _, dim in (*xs, *closed)]
        step = torch.func.vmap(loop.step, tuple(dims), randomness=info.randomness)
        out = _Loop.apply(replace(loop, step=step), *mapped)
        return out, tuple(0 if i < loop.carries else 1 for i in range(len(out)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        loop: Loop = ctx.loop
        count = len(ctx.saved_tensors) - loop.carries
        flat, history = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        wanted = [i for i, x in enumerate(flat) if is_differentiable(x)]
        wanted = [i for i in wanted if i < loop.carries or ctx.needs_input_grad[1 + i]]
        grads = _backward_loop(loop, wanted, flat, history, _given(ctx, cotangents))
        full: list[Tensor | None] = [None] * len(flat)
        for i, g in zip(wanted, grads, strict=True):
            full[i] = g
        return (None, *full)

    @staticmethod
    def jvp(ctx: Any, _loop: None, *tangents: Tensor | None) -> Any:
        unpack = torch._VF._unpack_dual  # this level's tangent off
        saved = ctx.saved_tensors[: len(tangents)]
        flat = [unpack(x, level=0)[0] if is_differentiable(x) else x for x in saved]
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            moved = iter(_forward_loop(ctx.loop, flat, tangents))
        return tuple(next(moved) if floating else None for floating in ctx.floating)


class _Cotangents(NamedTuple):
    """Of the floating outputs; ``history`` is empty unless a derivative of a backward loop is taken."""

    carry: list[Tensor]
    ys: list[Tensor]
    history: list[Tensor]


def _given(ctx: Any, cotangents: Sequence[Tensor | None]) -> _Cotangents:
    """Zeros for those that are missing, except of the history, which only higher derivatives have."""
    carries, end = ctx.loop.carries, len(cotangents) - ctx.loop.carries
    if all(c is None for c in cotangents[end:]):
        cotangents = cotangents[:end]
    parts = _Cotangents([], [], [])
    for i, (c, like, floating) in enumerate(zip(cotangents, ctx.likes, ctx.floating, strict=False)):
        if floating:
            part = parts.carry if i < carries else parts.ys if i < end else parts.history
            part.append(torch.zeros(like[0], dtype=like[1], device=like[2]) if c is None else c)
    return parts


def _backward_loop(
    loop: Loop, wanted: Sequence[int], flat: Sequence[Tensor], history: Sequence[Tensor], cotangents: _Cotangents
) -> list[Tensor]:
    """The cotangents of the inputs ``wanted``: a loop the other way.

    Its state is the cotangent of the carry and the sum so far of those of the closed-over tensors; it reads the carry
    from which the step started, the step's x, and the cotangents of its y and of that carry.
    """
    end = loop.carries + loop.inputs
    of_carry, of_xs, of_closed = _parts(wanted, loop.carries, end)
    moving, summed = len(of_carry), len(of_closed)
    pull = pull_back(loop.step, wanted, len(flat))

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        state, rest = given[: moving + summed], given[moving + summed :]
        start, rest = rest[: loop.carries + loop.inputs], rest[loop.carries + loop.inputs :]
        of_y, of_start, closed = rest[:ys], rest[ys : ys + kept], rest[ys + kept :]
        grads = pull(*start, *closed, *state[:moving], *of_y)
        carried = [g + c for g, c in zip(grads[:moving], of_start, strict=True)] if kept else grads[:moving]
        sums = [total + g for total, g in zip(state[moving:], grads[moving + len(of_xs) :], strict=True)]
        return (*carried, *sums, *grads[moving : moving + len(of_xs)])

    ys, kept = len(cotangents.ys), len(cotangents.history)
    zeros = [torch.zeros_like(flat[i]) for i in of_closed]
    xs = [*history, *flat[loop.carries : end], *cotangents.ys, *cotangents.history]
    given = [*cotangents.carry, *zeros, *xs, *flat[end:]]
    out = run_loop(Loop(step, moving + summed, len(xs), not loop.reverse), given)
    carried, sums, by_step = out[:moving], out[moving : moving + summed], out[moving + summed :]
    return [*carried, *by_step, *sums]


def _forward_loop(loop: Loop, flat: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of the floating outputs of :class:`_Loop`; the state is the carry and its tangent."""
    end = loop.carries + loop.inputs
    wanted = [i for i, x in enumerate(flat) if is_differentiable(x) and (i < loop.carries or tangents[i] is not None)]
    of_carry, of_xs, of_closed = _parts(wanted, loop.carries, end)
    push = push_forward(loop.step, wanted, len(flat))
    carries, inputs = loop.carries + len(of_carry), loop.inputs + len(of_xs)

    def step(*given: Tensor) -> tuple[Tensor, ...]:
        state, xs, closed = given[:carries], given[carries : carries + inputs], given[carries + inputs :]
        closed, moving_closed = closed[: len(flat) - end], closed[len(flat) - end :]
        primals = (*state[: loop.carries], *xs[: loop.inputs], *closed)
        moving = state[loop.carries :]
        outputs, moved = push(*primals, *moving, *xs[loop.inputs :], *moving_closed)
        return (*outputs[: loop.carries], *moved, *moving)  # last: the tangents of the history

    moving = [torch.zeros_like(flat[i]) if tangents[i] is None else tangents[i] for i in of_carry]
    xs = [*flat[loop.carries : end], *[tangents[i] for i in of_xs]]
    closed = [*flat[end:], *[tangents[i] for i in of_closed]]
    given: Any = [*flat[: loop.carries], *moving, *xs, *closed]
    return run_loop(Loop(step, carries, inputs, loop.reverse), given)[loop.carries :]


def _parts(wanted: Sequence[int], carries: int, end: int) -> tuple[list[int], list[int], list[int]]:
    """The indices among carries, xs and closed-over tensors."""
    of_carry = [i for i in wanted if i < carries]
    return of_carry, [i for i in wanted if carries <= i < end], [i for i in wanted if i >= end]
