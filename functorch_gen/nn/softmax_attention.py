"""Attention by its formulas, which have every derivative in every mode.

P = softmax(S), S = scale q k^T + mask, O = P v; shapes (..., l, d), (..., s, d), (..., s, e), mask (..., l, s) added.
Half precision is computed in float32. Source: Vaswani et al. 2017, eq. 1, arXiv:1706.03762; the derivatives: Dao et al.
2022, appendix B.2, arXiv:2205.14135.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Setting", "attend", "attention_weights", "pull_attention", "push_attention", "push_pull_attention"]


class Setting(NamedTuple):
    """What is no tensor: a query attends to the keys up to its own index, and the factor of the products."""

    is_causal: bool
    scale: float


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
    """P: (..., l, s). A row without any key is zero, and so are its derivatives."""
    scores = (setting.scale * q) @ k.mT
    if mask is not None:
        scores = scores + mask
    allowed = None if mask is None else mask > -math.inf
    if setting.is_causal:
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        allowed = causal if allowed is None else allowed & causal
    if allowed is None:
        return scores.softmax(-1)
    # a finite stand-in for -inf: a row without any key must not give 0 / 0
    weights = torch.where(allowed, scores, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.where(allowed, weights, 0.0)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting) -> Tensor:
    """O: (..., l, e)."""
    dtype = q.dtype
    q, k, v = _precise(q, k, v)
    return (attention_weights(q, k, mask, setting) @ v).to(dtype)


def pull_attention(
    cotangent: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, setting: Setting
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The cotangents of q, k, v and mask, for that of O.

    dV = P^T dO, dP = dO V^T, dS = P (dP - rowsum(P dP)), dQ = scale dS K, dK = scale dS^T Q.
    """
    dtype, mask_like = q.dtype, mask
    cotangent, q, k, v = _precise(cotangent, q, k, v)
    p = attention_weights(q, k, mask, setting)
    ds = _softmax_rule(p, cotangent @ v.mT)
    dq, dk, dv = setting.scale * (ds @ k), setting.scale * (ds.mT @ q), p.mT @ cotangent
    dmask = None if mask_like is None else _sum_to(ds, mask_like)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype), dmask


def push_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tangents: Sequence[Tensor | None], setting: Setting
) -> Tensor:
    """The tangent of O, for those of q, k, v and mask; None is zero: O' = P' V + P V'."""
    dtype = q.dtype
    tq, tk, tv, tmask = _directions((q, k, v), tangents)
    q, k, v = _precise(q, k, v)
    p, tp = _moving_weights(q, k, mask, (tq, tk, tmask), setting)
    return (tp @ v + p @ tv).to(dtype)


def push_pull_attention(
    cotangent: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    tangents: Sequence[Tensor | None],
    setting: Setting,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tangents of dQ, dK and dV of :func:`pull_attention`, for those of its tensors; None is zero.

    Its equations, each differentiated.
    """
    dtype = q.dtype
    tcotangent, tq, tk, tv, tmask = _directions((cotangent, q, k, v), tangents)
    cotangent, q, k, v = _precise(cotangent, q, k, v)
    p, tp = _moving_weights(q, k, mask, (tq, tk, tmask), setting)
    dp, tdp = cotangent @ v.mT, tcotangent @ v.mT + cotangent @ tv.mT
    centred = dp - (p * dp).sum(-1, keepdim=True)
    ds = p * centred
    tds = tp * centred + p * (tdp - (tp * dp + p * tdp).sum(-1, keepdim=True))
    tdq = setting.scale * (tds @ k + ds @ tk)
    tdk = setting.scale * (tds.mT @ q + ds.mT @ tq)
    tdv = tp.mT @ cotangent + p.mT @ tcotangent
    return tdq.to(dtype), tdk.to(dtype), tdv.to(dtype)


def _moving_weights(
    q: Tensor, k: Tensor, mask: Tensor | None, tangents: Sequence[Any], setting: Setting
) -> tuple[Tensor, Tensor]:
    """P and P' = P (S' - rowsum(P S')), S' = scale (Q' K^T + Q K'^T) + mask'."""
    tq, tk, tmask = tangents
    p = attention_weights(q, k, mask, setting)
    ts = setting.scale * (tq @ k.mT + q @ tk.mT)
    return p, _softmax_rule(p, ts if tmask is None else ts + tmask)


def _directions(tensors: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> list[Any]:
    """Tangents of the tensors, zeros where there is none, and the last, the mask's, as it is."""
    *moving, tmask = tangents
    given = [torch.zeros_like(x) if t is None else t for x, t in zip(tensors, moving, strict=True)]
    return [*_precise(*given), tmask]


def _softmax_rule(p: Tensor, moved: Tensor) -> Tensor:
    """The Jacobian of softmax, diag(P) - P P^T for each row; it is symmetric, so both modes use it."""
    return p * (moved - (p * moved).sum(-1, keepdim=True))


def _sum_to(x: Tensor, like: Tensor) -> Tensor:
    """``x`` summed over the axes along which ``like``, of as many axes, was broadcast."""
    axes = [i for i, (n, m) in enumerate(zip(x.shape, like.shape, strict=True)) if n != m]
    return (x.sum(axes, keepdim=True) if axes else x).to(like.dtype)


def _precise(*tensors: Tensor) -> list[Tensor]:
    return [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in tensors]
