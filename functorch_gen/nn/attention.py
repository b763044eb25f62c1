"""Scaled dot-product attention and the multi-head layer around it."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.nn.dropout import Dropout
from functorch_gen.nn.init import fan_in_uniform, xavier_uniform
from functorch_gen.nn.parts import name_key
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["MultiHeadAttention", "attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    key: Key | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v: (..., l, d), (..., s, d), (..., s, e) -> (..., l, e).

    Equals ``F.scaled_dot_product_attention``, by formulas that have every derivative in every mode (torch's fused
    CPU kernel has no forward mode and no second derivative). A query that may attend to nothing gets zeros.

    Args:
        mask: broadcastable to (..., l, s): bool, True where the query may attend; or floating, added to the scores.
        is_causal: query i attends to the keys 0 .. i only; may be combined with ``mask``.
        scale: 1 / sqrt(d) when None.
        dropout: probability of dropping an attention weight, when ``key`` is given.
    Source: Vaswani et al. 2017, eq. 1, arXiv:1706.03762.

    >>> attention(torch.zeros(1, 2), torch.ones(2, 2), torch.tensor([[1.0], [3.0]]))
    tensor([[2.]])
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = (scale * q) @ k.mT
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    allowed = _allowed(mask, is_causal, scores)
    if allowed is None:
        weights = scores.softmax(-1)
    else:  # a finite stand-in for -inf: a row without any key must not give 0 / 0
        weights = torch.where(allowed, scores, torch.finfo(scores.dtype).min).softmax(-1)
        weights = torch.where(allowed, weights, 0.0)
    return Dropout(dropout)({}, weights, key=key) @ v


def _allowed(mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """Where a query may attend: broadcastable to (..., l, s) bool; None is everywhere."""
    allowed = mask if mask is None or mask.dtype == torch.bool else mask > -math.inf
    if not is_causal:
        return allowed
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return causal if allowed is None else allowed & causal


@dataclass(frozen=True)
class MultiHeadAttention:
    """Attention in ``num_heads`` subspaces: (..., l, embed_dim) -> (..., l, embed_dim).

    Equals ``torch.nn.MultiheadAttention`` with ``batch_first=True``, parameter names and initial distribution
    included; takes any leading axes. With ``context`` (..., s, kdim) it is cross-attention.

    Args:
        kdim: last size of ``context``; embed_dim when None.
        vdim: last size of ``value``; embed_dim when None.
        gain: scales the initial output projection; with 0 the layer starts as the zero map.
    Source: Vaswani et al. 2017, section 3.2.2, arXiv:1706.03762.

    >>> from functorch_gen import random
    >>> layer = MultiHeadAttention(8, num_heads=2, kdim=3, vdim=3)
    >>> params = layer.init(random.key(0))
    >>> layer(params, torch.ones(5, 4, 8), torch.ones(5, 7, 3)).shape
    torch.Size([5, 4, 8])
    """

    embed_dim: int
    num_heads: int
    dropout: float = 0.0
    bias: bool = True
    kdim: int | None = field(default=None, kw_only=True)
    vdim: int | None = field(default=None, kw_only=True)
    gain: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        e, kdim, vdim = self._dims
        check_sizes("MultiHeadAttention", embed_dim=e, num_heads=self.num_heads, kdim=kdim, vdim=vdim)
        check_nonnegative("MultiHeadAttention", gain=self.gain)
        if e % self.num_heads:
            raise ValueError(f"MultiHeadAttention: expected embed_dim divisible by num_heads={self.num_heads}, got {e}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"MultiHeadAttention: expected 0 <= dropout <= 1, got {self.dropout}")

    @property
    def draws(self) -> bool:
        """Whether a call with a key draws from it."""
        return self.dropout > 0

    @property
    def _dims(self) -> tuple[int, int, int]:
        """Last sizes of query, context and value."""
        e = self.embed_dim
        return e, e if self.kdim is None else self.kdim, e if self.vdim is None else self.vdim

    @property
    def _packed(self) -> bool:
        """Whether the three projections are one matrix, as torch has them when the sizes are equal."""
        return set(self._dims) == {self.embed_dim}

    def init(self, key: Key) -> Params:
        """Projections by Glorot's uniform law, the output's by that of :class:`Linear`; biases zero.

        ``in_proj_weight`` (3 e, e), or ``q_proj_weight`` (e, e), ``k_proj_weight`` (e, kdim), ``v_proj_weight``
        (e, vdim) when the sizes differ; ``in_proj_bias`` (3 e,); ``out_proj.weight`` (e, e), ``out_proj.bias`` (e,).
        """
        e = self.embed_dim
        if self._packed:
            shapes = {"in_proj_weight": (3 * e, e)}
        else:
            shapes = {f"{name}_proj_weight": (e, size) for name, size in zip("qkv", self._dims)}
        params: Params = {name: xavier_uniform(name_key(key, name), shape) for name, shape in shapes.items()}
        out = {"weight": fan_in_uniform(name_key(key, "out_proj"), (e, e), e, self.gain)}
        if self.bias:
            params["in_proj_bias"] = torch.zeros(3 * e, device=key.device)
            out["bias"] = torch.zeros(e, device=key.device)
        return {**params, "out_proj": out}

    def __call__(
        self,
        params: Params,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        is_causal: bool = False,
        key: Key | None = None,
    ) -> Tensor:
        """(..., l, embed_dim), context (..., s, kdim), value (..., s, vdim) -> (..., l, embed_dim).

        Args:
            context: what is attended to; ``x`` when None.
            value: what is averaged; ``context`` when None.
            mask: broadcastable to (..., num_heads, l, s), see :func:`attention`; a padding mask (b, s) of the keys
                goes in as ``rearrange(mask, "b s -> b 1 1 s")``. True means "attend" (torch's layer has it reversed).
        """
        context = x if context is None else context
        value = context if value is None else value
        for argument, tensor, size in zip(("x", "context", "value"), (x, context, value), self._dims):
            check_shape(tensor, "... n e", f"MultiHeadAttention: {argument}", e=size)
        q, k, v = [
            rearrange(F.linear(tensor, weight, bias), "... n (h d) -> ... h n d", h=self.num_heads)
            for tensor, (weight, bias) in zip((x, context, value), self._projections(params))
        ]
        y = attention(q, k, v, mask=mask, is_causal=is_causal, dropout=self.dropout, key=key)
        out = params["out_proj"]
        return F.linear(rearrange(y, "... h n d -> ... n (h d)"), out["weight"], out["bias"] if self.bias else None)

    def _projections(self, params: Params) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of query, key and value."""
        if self._packed:
            weights = params["in_proj_weight"].chunk(3)
        else:
            weights = [params[f"{name}_proj_weight"] for name in "qkv"]
        biases = params["in_proj_bias"].chunk(3) if self.bias else (None, None, None)
        return list(zip(weights, biases))
