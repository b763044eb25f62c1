"""Scaled dot-product attention."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_floating, check_shape
from functorch_gen.nn.attention_kernels import fits_kernel
from functorch_gen.nn.dropout import Dropout
from functorch_gen.nn.fused_attention import fused_attention
from functorch_gen.nn.softmax_attention import Setting, attend, attention_weights
from functorch_gen.typing import Key

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v: (..., h, l, d), (..., h, s, d), (..., h, s, e) -> (..., h, l, e).

    Equals ``F.scaled_dot_product_attention``, by the same fused kernels forward and backward, and has what they have
    not: forward mode, derivatives of every order, and a batch rule for ``vmap``. A query that may attend to nothing
    gets zeros. Leading axes broadcast; q, k and v may be plain matrices.

    Args:
        k: may have fewer heads than q, a divisor of its number: each serves as many queries (grouped queries).
        mask: broadcastable to (..., h, l, s): bool, True where the query may attend; or floating, added to the scores,
            and differentiable.
        is_causal: query i attends to the keys 0 .. i only, counted from the first of both, whatever l and s are (as
            in torch); may be combined with ``mask``.
        scale: 1 / sqrt(d) when None.
        dropout: probability of dropping an attention weight, when ``key`` is given. The weights are then written out.
    Raises:
        ValueError: if shapes do not fit together; names the argument.
        TypeError: if q, k and v are not floating tensors of one dtype.

    Source: Vaswani et al. 2017, eq. 1, arXiv:1706.03762; the kernels: Dao et al. 2022, arXiv:2205.14135; grouped
    queries: Ainslie et al. 2023, arXiv:2305.13245.

    >>> attention(torch.zeros(1, 2), torch.ones(2, 2), torch.tensor([[1.0], [3.0]]))
    tensor([[2.]])
    """
    _check(q, k, v)
    q, k, v = _with_equal_heads(q, k, v)
    mask = None if mask is None else _additive(mask, q, k)
    setting = Setting(is_causal, 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale))
    if key is not None and dropout:
        return Dropout(dropout)({}, attention_weights(q, k, mask, setting).to(v.dtype), key=key) @ v
    if not fits_kernel(q, k, v):
        return attend(q, k, v, mask, setting)
    if torch.compiler.is_dynamo_compiling():  # it cannot trace a rule for forward mode
        return _for_dynamo(q, k, v, mask, setting)
    return fused_attention(q, k, v, mask, setting)


def _for_dynamo(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
    """torch's own where only a first derivative can follow, formulas inside a transform."""
    both = mask is not None and setting.is_causal  # which torch refuses
    if both or torch._C._are_functorch_transforms_active():
        return attend(q, k, v, mask, setting)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=setting.is_causal, scale=setting.scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    d = check_shape(q, "... l d", "attention: q")["d"]
    s = check_shape(k, "... s d", "attention: k", d=d)["s"]
    check_shape(v, "... s e", "attention: v", s=s)
    check_floating(q, "attention: q")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"attention: expected k and v of q's dtype {q.dtype}, got {k.dtype} and {v.dtype}")


def _with_equal_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All with the same leading axes: k and v repeated for their group of queries, then broadcast."""
    if q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return q, k, v
    k, v = _repeat_heads(k, q, "k"), _repeat_heads(v, q, "v")
    try:
        leading = torch.broadcast_shapes(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    except RuntimeError as error:
        shapes = f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        raise ValueError(f"attention: expected leading axes of q, k and v that broadcast, got {shapes}") from error
    q, k, v = (x.expand(*leading, *x.shape[-2:]) for x in (q, k, v))
    return q, k, v


def _repeat_heads(x: Tensor, q: Tensor, name: str) -> Tensor:
    heads, queries = (y.shape[-3] if y.ndim > 2 else 1 for y in (x, q))
    if heads in (1, queries) or queries == 1:
        return x
    if queries % heads:
        raise ValueError(f"attention: expected the {queries} heads of q divisible by those of {name}, got {heads}")
    return x.repeat_interleave(queries // heads, -3)


def _additive(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The mask as numbers to be added to the scores, with as many axes as they have."""
    scores = (*q.shape[:-1], k.shape[-2])
    missing = q.ndim - mask.ndim
    fits = missing >= 0 and all(n in (1, m) for n, m in zip(mask.shape, scores[missing:], strict=True))
    if not fits:
        raise ValueError(f"attention: mask: expected a shape that broadcasts to {scores}, got {tuple(mask.shape)}")
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
    elif not mask.is_floating_point():
        raise TypeError(f"attention: mask: expected bool or floating numbers, got {mask.dtype}")
    elif q.dtype in (torch.float64, torch.float32) or mask.dtype != torch.float32:
        mask = mask.to(q.dtype)
    return mask[(None,) * missing]
