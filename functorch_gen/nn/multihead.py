"""The multi-head layer around :func:`attention`."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.nn.attention import attention
from functorch_gen.nn.init import fan_in_uniform, xavier_uniform
from functorch_gen.nn.parts import name_key
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["MultiHeadAttention"]


@dataclass(frozen=True)
class MultiHeadAttention:
    """Attention in ``num_heads`` subspaces: (..., l, embed_dim) -> (..., l, embed_dim).

    Equals ``torch.nn.MultiheadAttention`` with ``batch_first=True``, parameter names and initial distribution
    included; takes any leading axes. With ``context`` (..., s, kdim) it is cross-attention.

    Args:
        kdim: last size of ``context``; embed_dim when None.
        vdim: last size of ``value``; embed_dim when None.
        gain: scales the initial output projection; with 0 the layer starts as the zero map.
        num_kv_heads: heads of keys and values, a divisor of num_heads: each serves several queries (grouped queries,
            arXiv:2305.13245; torch's layer has none); num_heads when None.
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
    num_kv_heads: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        e, kdim, vdim = self._dims
        check_sizes("MultiHeadAttention", embed_dim=e, num_heads=self.num_heads, kdim=kdim, vdim=vdim)
        check_nonnegative("MultiHeadAttention", gain=self.gain)
        if e % self.num_heads:
            raise ValueError(f"MultiHeadAttention: expected embed_dim divisible by num_heads={self.num_heads}, got {e}")
        if self.num_kv_heads is not None:
            check_sizes("MultiHeadAttention", num_kv_heads=self.num_kv_heads)
            if self.num_heads % self.num_kv_heads:
                raise ValueError(
                    f"MultiHeadAttention: expected num_heads={self.num_heads} divisible by num_kv_heads,"
                    f" got {self.num_kv_heads}"
                )
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
    def _heads(self) -> tuple[int, int, int]:
        """How many heads queries, keys and values have."""
        kv = self.num_heads if self.num_kv_heads is None else self.num_kv_heads
        return self.num_heads, kv, kv

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Sizes of the projected queries, keys and values: all heads side by side."""
        head_dim = self.embed_dim // self.num_heads
        q, k, v = (heads * head_dim for heads in self._heads)
        return q, k, v

    @property
    def _packed(self) -> bool:
        """Whether the three projections are one matrix, as torch has them when the sizes are equal."""
        return set(self._dims) == {self.embed_dim}

    def init(self, key: Key) -> Params:
        """Projections by Glorot's uniform law, the output's by that of :class:`Linear`; biases zero.

        ``in_proj_weight`` (3 e, e), or ``q_proj_weight`` (e, e), ``k_proj_weight`` (e, kdim), ``v_proj_weight``
        (e, vdim) when the sizes differ; ``in_proj_bias`` (3 e,); ``out_proj.weight`` (e, e), ``out_proj.bias`` (e,).
        With fewer heads of keys and values their rows are fewer.
        """
        e, rows = self.embed_dim, self._widths
        if self._packed:
            shapes = {"in_proj_weight": (sum(rows), e)}
        else:
            shapes = {f"{name}_proj_weight": (n, size) for name, n, size in zip("qkv", rows, self._dims, strict=True)}
        params: Params = {name: xavier_uniform(name_key(key, name), shape) for name, shape in shapes.items()}
        out = {"weight": fan_in_uniform(name_key(key, "out_proj"), (e, e), e, self.gain)}
        if self.bias:
            params["in_proj_bias"] = torch.zeros(sum(rows), device=key.device)
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
        for argument, tensor, size in zip(("x", "context", "value"), (x, context, value), self._dims, strict=True):
            check_shape(tensor, "... n e", f"MultiHeadAttention: {argument}", e=size)
        if self._packed and context is x and value is x:
            projected = self._project_packed(params, x)
        else:
            projected = self._project(params, x, context, value)
        q, k, v = [
            rearrange(y, "... n (h d) -> ... h n d", h=heads) for y, heads in zip(projected, self._heads, strict=True)
        ]
        y = attention(q, k, v, mask, is_causal=is_causal, dropout=self.dropout, key=key)
        out = params["out_proj"]
        return F.linear(rearrange(y, "... h n d -> ... n (h d)"), out["weight"], out["bias"] if self.bias else None)

    def _project_packed(self, params: Params, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of one tensor: one product."""
        bias = params["in_proj_bias"] if self.bias else None
        return F.linear(x, params["in_proj_weight"], bias).split(self._widths, -1)

    def _project(self, params: Params, *tensors: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, each of its own tensor."""
        if self._packed:
            weights = params["in_proj_weight"].split(self._widths)
        else:
            weights = [params[f"{name}_proj_weight"] for name in "qkv"]
        biases = params["in_proj_bias"].split(self._widths) if self.bias else (None, None, None)
        return [F.linear(x, weight, bias) for x, weight, bias in zip(tensors, weights, biases, strict=True)]
