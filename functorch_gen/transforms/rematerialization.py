"""Rematerialisation: forget what a function computed, and compute it again in the backward pass."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.barrier import barrier_op
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.context import is_differentiable
from functorch_gen.typing import Tree

__all__ = ["remat"]

_Flat = Callable[..., tuple[Tensor, ...]]


def remat(fun: Callable[..., Tree]) -> Callable[..., Tree]:
    """``fun``, whose intermediate values are not kept for the backward pass but computed again.

    Memory falls to the inputs and outputs of ``fun``, and the backward pass costs one more forward. It holds for
    tensors that ``fun`` closes over (also inside objects and modules; not for globals, which are constants: pass them
    in), in every transform and order, eager and compiled; the recomputation waits for the
    cotangent behind an :func:`optimization_barrier`, so a compiler cannot merge it with the first run. Under
    ``torch.compile`` the function runs as it is: what is kept is then the partitioner's choice.

    Source: Chen et al. 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174.

    >>> from functorch_gen.transforms import grad
    >>> grad(remat(torch.sin))(torch.tensor(0.0))
    tensor(1.)
    """

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Tree:
        if torch.compiler.is_dynamo_compiling():
            return fun(*args, **kwargs)
        closed_over, rebuild = convert_closure(fun)
        leaves, treedef = tree.flatten((args, kwargs))
        at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        outputs = Outputs()

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            full = list(leaves)
            for i, x in zip(at, tensors, strict=False):
                full[i] = x
            inner_args, inner_kwargs = tree.unflatten(treedef, full)
            return outputs.put(rebuild(tensors[len(at) :])(*inner_args, **inner_kwargs))

        return outputs.get(_Remat.apply(flat, *[leaves[i] for i in at], *closed_over))

    return wrapped


def _dense(x: Tensor) -> Tensor:
    """Forward mode gives tangents the layout of the output, which an expanded tensor does not have."""
    expanded = any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True))
    return x.clone(memory_format=torch.contiguous_format) if expanded else x


class _Remat(torch.autograd.Function):
    """Flat tensors in and out. Its derivatives are rematerialised functions again, so every order holds."""

    @staticmethod
    def forward(flat: _Flat, *xs: Tensor) -> tuple[Tensor, ...]:
        own = {id(x) for x in xs}  # torch wants a view where an input is returned as it is
        return tuple(x.view_as(x) if id(x) in own else _dense(x) for x in flat(*xs))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.flat, *xs = inputs
        ctx.save_for_backward(*xs)
        ctx.save_for_forward(*xs)
        ctx.floating = [is_differentiable(x) for x in output]
        ctx.mark_non_differentiable(*[x for x in output if not is_differentiable(x)])

    @staticmethod
    def vmap(info: Any, in_dims: Any, flat: _Flat, *xs: Tensor) -> Any:
        batched = torch.func.vmap(flat, tuple(in_dims[1:]), randomness=info.randomness)
        out = _Remat.apply(batched, *xs)
        return out, tuple(0 for _ in out)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        wanted = [c for c, floating in zip(cotangents, ctx.floating, strict=True) if floating]
        xs = barrier_op(list(ctx.saved_tensors), wanted)
        at = [i for i, x in enumerate(xs) if is_differentiable(x)]
        pull = _pull_back(ctx.flat, at, len(xs))
        grads = _Remat.apply(pull, *xs, *wanted) if torch.is_grad_enabled() else pull(*xs, *wanted)
        full: list[Tensor | None] = [None] * len(xs)
        for i, g in zip(at, grads, strict=True):
            full[i] = g
        return (None, *full)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        unpack = torch._VF._unpack_dual  # this level's tangent off
        xs = [unpack(x, level=0)[0] if is_differentiable(x) else x for x in ctx.saved_tensors]
        moving = tangents[1:]  # flat has none
        at = [i for i, t in enumerate(moving) if t is not None and is_differentiable(xs[i])]
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            moved = iter(_Remat.apply(_push_forward(ctx.flat, at, len(xs)), *xs, *[moving[i] for i in at]))
        return tuple(next(moved) if floating else None for floating in ctx.floating)


def _at(flat: _Flat, at: Sequence[int], xs: Sequence[Tensor]) -> _Flat:
    """``flat`` as a function of the inputs ``at`` alone."""

    def partial(*varied: Tensor) -> tuple[Tensor, ...]:
        full = list(xs)
        for i, x in zip(at, varied, strict=True):
            full[i] = x
        return tuple(flat(*full))

    return partial


def _pull_back(flat: _Flat, at: Sequence[int], count: int) -> _Flat:
    """(*xs, *cotangents) -> the cotangents of the inputs ``at``."""

    def pull(*both: Tensor) -> tuple[Tensor, ...]:
        xs, cotangents = both[:count], both[count:]
        varied = _at(flat, at, xs)

        def floating(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(x for x in varied(*inputs) if is_differentiable(x))

        inputs = [xs[i] for i in at]
        nested = torch._C._are_functorch_transforms_active()
        if nested or (torch.is_grad_enabled() and any(x.requires_grad for x in both)):
            with torch.enable_grad():  # a custom rule below may run with it off
                return torch.func.vjp(floating, *inputs)[1](tuple(cotangents))
        return _pull_back_once(floating, inputs, cotangents)

    return pull


def _pull_back_once(floating: _Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """At top level: without a graph of the backward pass."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        pairs = [(y, c) for y, c in zip(floating(*leaves), cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in leaves)
    return torch.autograd.grad(
        [y for y, _ in pairs], leaves, [c for _, c in pairs], materialize_grads=True, allow_unused=True
    )


def _push_forward(flat: _Flat, at: Sequence[int], count: int) -> _Flat:
    """(*xs, *tangents of the inputs ``at``) -> the tangents of the floating outputs."""

    def push(*both: Tensor) -> tuple[Tensor, ...]:
        xs, tangents = both[:count], both[count:]
        primals = tuple(_dense(xs[i]) for i in at)
        pushed: Any = torch.func.jvp(_at(flat, at, xs), primals, tuple(_dense(t) for t in tangents))
        return tuple(t for y, t in zip(*pushed, strict=True) if is_differentiable(y))

    return push
