"""The forward and the backward pass of attention as one kernel each, without derivatives."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.nn.softmax_attention import Setting

__all__ = ["backward_kernel", "fits_kernel", "forward_kernel"]

_FORWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_BACKWARD: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def fits_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these: no axis is empty, and heads have one width, where the CPU's are called."""
    if q.dtype not in _DTYPES or 0 in (*q.shape, *v.shape[-2:]):
        return False
    return not _is_cpu(q) or v.shape[-1] == q.shape[-1]


def forward_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v (..., l, e) and what the backward kernel wants of it, (..., l).

    Leading axes are equal, and so is the number of the mask's axes.
    """
    if not _is_cpu(q):
        return _torchs(q, k, v, mask, setting), q.new_empty(q.shape[:-1])
    out, logsumexp = _FORWARD(
        *_in_four_axes(q, k, v), 0.0, setting.is_causal, attn_mask=_mask_in_four_axes(mask, q), scale=setting.scale
    )
    return _in_shape(out, q.shape), _in_shape(logsumexp, q.shape[:-1])


def backward_kernel(
    cotangent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    mask: Tensor | None,
    setting: Setting,
) -> tuple[Tensor, Tensor, Tensor]:
    """The cotangents of q, k and v."""
    if not _is_cpu(q):  # which kernel it was, and what it keeps, only autograd knows: the forward pass runs again
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            out = _torchs(inputs[0], inputs[1], inputs[2], mask, setting)
        dq, dk, dv = torch.autograd.grad(out, inputs, cotangent)
        return dq, dk, dv
    dq, dk, dv = _BACKWARD(
        *_in_four_axes(cotangent, q, k, v, out),
        logsumexp if q.ndim == 4 else logsumexp.reshape(*_leading(q), -1),
        0.0,
        setting.is_causal,
        attn_mask=_mask_in_four_axes(mask, q),
        scale=setting.scale,
    )
    return _in_shape(dq, q.shape), _in_shape(dk, k.shape), _in_shape(dv, v.shape)


def _is_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _torchs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
    """By the kernel that torch chooses for the device, on four axes, as the fast ones want."""
    shape = (*q.shape[:-1], v.shape[-1])
    if mask is None:
        q, k, v = _in_four_axes(q, k, v)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=setting.is_causal, scale=setting.scale)
        return _in_shape(out, shape)
    if setting.is_causal:  # torch takes a mask or this
        later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        mask = mask.masked_fill(later, -math.inf)
    some = (mask > -math.inf).any(-1, keepdim=True)  # what a row without any key becomes is each kernel's own matter
    mask = _mask_in_four_axes(torch.where(some, mask, 0.0).to(q.dtype), q)
    q, k, v = _in_four_axes(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=setting.scale)
    return torch.where(some, _in_shape(out, shape), 0.0)


def _leading(x: Tensor) -> tuple[int, int]:
    """(..., l, d): the leading axes as two, (b, h)."""
    return math.prod(x.shape[:-3]), x.shape[-3] if x.ndim > 2 else 1


def _in_four_axes(*xs: Tensor) -> list[Tensor]:
    """(..., l, d) -> (b, h, l, d), whose last axis is dense."""
    four = [x if x.ndim == 4 else x.reshape(*_leading(x), *x.shape[-2:]) for x in xs]
    return [x if x.stride(-1) == 1 else x.contiguous() for x in four]


def _in_shape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x if x.ndim == len(shape) else x.reshape(shape)


def _mask_in_four_axes(mask: Tensor | None, q: Tensor) -> Tensor | None:
    """(..., l, s) -> (b or 1, h or 1, l or 1, s), expanded only where merging axes makes it necessary."""
    if mask is None or mask.ndim == 4:
        return mask
    if math.prod(mask.shape[:-3]) != 1:
        mask = mask.expand(*q.shape[:-3], *mask.shape[-3:])
    return mask.reshape(*_leading(mask), *mask.shape[-2:])
