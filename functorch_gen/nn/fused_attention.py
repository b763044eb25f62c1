"""Attention by torch's fused kernels, with derivatives of every order.

The forward and the backward pass are one kernel each. Forward mode, and derivatives of the backward pass, are computed
from the inputs by the formulas of softmax_attention.py, so no order and no stack of transforms is left out.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from functorch_gen.nn.attention_kernels import backward_kernel, forward_kernel
from functorch_gen.nn.softmax_attention import Setting, pull_attention, push_attention, push_pull_attention
from functorch_gen.transforms.context import is_differentiable, requires_gradient
from functorch_gen.transforms.derivatives import pull_back

__all__ = ["fused_attention"]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
    """softmax(scale q k^T + mask) v: (..., l, d), (..., s, d), (..., s, d) -> (..., l, d), leading axes all equal.

    ``mask`` has as many axes as the others and broadcasts to (..., l, s).
    """
    if torch._C._are_functorch_transforms_active():
        return _Attention.apply(q, k, v, mask, setting)[0]
    # Function.apply would first look up the signature, which takes as long as a small kernel
    function: Any = super(torch.autograd.Function, _Attention)
    return function.apply(*unwrap_dead_wrappers((q, k, v, mask)), setting)[0]


class _Attention(torch.autograd.Function):
    """Returns (O, logsumexp of the rows of S); the second is the kernels' own, and nobody else reads it."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> tuple[Tensor, Tensor]:
        return forward_kernel(q, k, v, mask, setting)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, ctx.setting = inputs
        ctx.save_for_backward(q, k, v, mask, *output)
        ctx.save_for_forward(q, k, v, mask)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> Any:
        q, k, v = _stacked(info, in_dims, q, k, v)
        return _Attention.apply(q, k, v, _stacked_mask(mask, in_dims[3]), setting), (0, 0)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor | None, _logsumexp: None) -> Any:
        q, k, v, mask, out, logsumexp = ctx.saved_tensors
        if cotangent is None:
            return (None,) * 5
        if ctx.needs_input_grad[3]:  # the kernel has no cotangent of the mask
            return *pull_attention(cotangent, q, k, v, mask, ctx.setting), None
        inputs: Any = (cotangent, q, k, v, out, logsumexp, mask)
        nested = torch._C._are_functorch_transforms_active() or requires_gradient(inputs)
        run: Any = _AttentionBackward.apply if nested else backward_kernel
        return *run(*inputs, ctx.setting), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        q, k, v, mask = _primals(ctx.saved_tensors[:4])
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            return push_attention(q, k, v, mask, tangents[:4], ctx.setting), None


class _AttentionBackward(torch.autograd.Function):
    """The cotangents of q, k and v. What it is given as O and logsumexp are functions of the others."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return backward_kernel(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        cotangent, q, k, v, _, _, mask, ctx.setting = inputs
        ctx.save_for_backward(cotangent, q, k, v, mask)
        ctx.save_for_forward(cotangent, q, k, v, mask)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        mask = _stacked_mask(inputs[6], in_dims[6])
        return _AttentionBackward.apply(*_stacked(info, in_dims, *inputs[:6]), mask, inputs[7]), (0, 0, 0)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        def flat(cotangent: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, ...]:
            return pull_attention(cotangent, q, k, v, mask, ctx.setting)[:3]

        xs = [x for x in ctx.saved_tensors if x is not None]
        pulled = pull_back(flat, range(len(xs)), len(xs))(*xs, *cotangents)
        return *pulled[:4], None, None, pulled[4] if len(xs) == 5 else None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        cotangent, q, k, v, mask = _primals(ctx.saved_tensors)
        moving = (*tangents[:4], tangents[6])
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            return push_pull_attention(cotangent, q, k, v, mask, moving, ctx.setting)


def _primals(saved: Sequence[Tensor | None]) -> list[Any]:
    """The saved tensors with this level's tangent off."""
    unpack = torch._VF._unpack_dual
    return [unpack(x, level=0)[0] if x is not None and is_differentiable(x) else x for x in saved]


def _stacked(info: Any, in_dims: Sequence[int | None], *xs: Tensor) -> list[Tensor]:
    """All with the batch as their first axis."""
    return [
        x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(xs, in_dims, strict=False)
    ]


def _stacked_mask(mask: Tensor | None, dim: int | None) -> Tensor | None:
    """The mask with one axis more: the batch, or an axis that broadcasts."""
    if mask is None:
        return None
    return mask[None] if dim is None else mask.movedim(dim, 0)
