"""Rematerialisation: forget what a function computed, and compute it again in the backward pass."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.barrier import barrier_op
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.context import is_differentiable
from functorch_gen.transforms.derivatives import Flat, dense_output, pull_back, push_forward
from functorch_gen.transforms.saving import Policy, Recorder, Replayer, Tape
from functorch_gen.typing import Tree

__all__ = ["remat"]


def remat(fun: Callable[..., Tree], policy: Policy | None = None) -> Callable[..., Tree]:
    """``fun``, whose intermediate values are not kept for the backward pass but computed again.

    Memory falls to the inputs and outputs of ``fun``, and the backward pass costs one more forward. It holds for
    tensors that ``fun`` closes over (also inside objects and modules; not for globals, which are constants: pass them
    in), in every transform and order, eager and compiled; the recomputation waits for the
    cotangent behind an :func:`optimization_barrier`, so a compiler cannot merge it with the first run. Under
    ``torch.compile`` the function runs as it is: what is kept is then the partitioner's choice.

    Args:
        policy: what is saved all the same: ``save_only_these_names("a", "b")``, the values that
            :func:`checkpoint_name` named, or ``dots_saveable``, the results of matrix products and convolutions. The
            backward pass reads them; the derivatives of the backward pass, and forward mode, compute all again.
    Raises:
        TypeError: if ``policy`` is no policy.

    Source: Chen et al. 2016, Training deep nets with sublinear memory cost, arXiv:1604.06174; ``jax.checkpoint``.

    >>> from functorch_gen.transforms import grad
    >>> grad(remat(torch.sin))(torch.tensor(0.0))
    tensor(1.)
    """
    if not isinstance(policy, Policy | None):
        raise TypeError(f"remat: expected policy to be a Policy or None, got {type(policy).__name__}")

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

        results = _Remat.apply(_Plan(flat, Tape(), policy), *[leaves[i] for i in at], *closed_over)
        return outputs.get(results)

    return wrapped


@dataclass(frozen=True)
class _Plan:
    """How ``flat`` runs: what is saved on the way, or which values, its last inputs, were saved before."""

    flat: Flat
    tape: Tape
    policy: Policy | None = None
    replayed: int = 0

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """``(*outputs, *saved)``."""
        count = len(inputs) - self.replayed
        xs, saved = inputs[:count], inputs[count:]
        own = {id(x) for x in xs}  # torch wants a view where an input is returned as it is
        if saved and not torch._C._are_functorch_transforms_active():  # they stand below the transforms
            with Replayer(self.tape, saved):
                out, kept = self.flat(*xs), []
        elif self.policy:
            with Recorder(self.policy, self.tape) as recorder:
                out, kept = self.flat(*xs), recorder.values
        else:
            out, kept = self.flat(*xs), []
        return (*[x.view_as(x) if id(x) in own else dense_output(x) for x in out], *[x.view_as(x) for x in kept])

    def batched(self, in_dims: Sequence[int | None], randomness: str) -> "_Plan":
        """The plan under ``vmap``: what is saved stands below it, and has no axis that it knows."""
        mapped = torch.func.vmap(self.flat, tuple(in_dims[: len(in_dims) - self.replayed]), randomness=randomness)
        return _Plan(mapped, self.tape, self.policy, self.replayed)

    @property
    def kept(self) -> int:
        """How many saved tensors a run has added to its outputs."""
        return self.tape.size if self.policy else 0


class _Remat(torch.autograd.Function):
    """Flat tensors in and out. Its derivatives are rematerialised functions again, so every order holds."""

    @staticmethod
    def forward(plan: _Plan, *xs: Tensor) -> tuple[Tensor, ...]:
        return plan.run(xs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.plan, *xs = inputs
        ctx.count = len(xs) - ctx.plan.replayed
        end = len(output) - ctx.plan.kept
        ctx.save_for_backward(*xs[: ctx.count], *output[end:])
        ctx.save_for_forward(*xs[: ctx.count])
        ctx.floating = [is_differentiable(x) and i < end for i, x in enumerate(output)]
        ctx.mark_non_differentiable(*[x for x, floating in zip(output, ctx.floating, strict=True) if not floating])

    @staticmethod
    def vmap(info: Any, in_dims: Any, plan: _Plan, *xs: Tensor) -> Any:
        out = _Remat.apply(plan.batched(in_dims[1:], info.randomness), *xs)
        end = len(out) - plan.kept
        return out, tuple(0 if i < end else None for i in range(len(out)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        wanted = [c for c, floating in zip(cotangents, ctx.floating, strict=True) if floating]
        xs, saved = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        xs = barrier_op(list(xs), wanted)
        at = [i for i, x in enumerate(xs) if is_differentiable(x) and ctx.needs_input_grad[1 + i]]
        plan = _Plan(pull_back(ctx.plan.flat, at, len(xs)), ctx.plan.tape, replayed=len(saved))
        inputs = (*xs, *wanted, *saved)
        grads = _Remat.apply(plan, *inputs) if torch.is_grad_enabled() else plan.run(inputs)
        full: list[Tensor | None] = [None] * len(ctx.needs_input_grad[1:])
        for i, g in zip(at, grads, strict=True):
            full[i] = g
        return (None, *full)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        unpack = torch._VF._unpack_dual  # this level's tangent off
        xs = [unpack(x, level=0)[0] if is_differentiable(x) else x for x in ctx.saved_tensors[: ctx.count]]
        moving = tangents[1 : 1 + ctx.count]  # the plan has none
        at = [i for i, t in enumerate(moving) if t is not None and is_differentiable(xs[i])]
        push = push_forward(ctx.plan.flat, at, len(xs))
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            plan = _Plan(lambda *both: push(*both)[1], Tape())
            moved = iter(_Remat.apply(plan, *xs, *[moving[i] for i in at]))
        return tuple(next(moved) if floating else None for floating in ctx.floating)
