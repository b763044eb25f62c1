"""The multi-head layer around :func:`attention`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.nn.attention import attention
from functorch_gen.nn.cache import KVCache, extend_cache
from functorch_gen.nn.init import fan_in_uniform, xavier_uniform
from functorch_gen.nn.norm import RMSNorm
from functorch_gen.nn.parts import entry, name_key, weight_and_bias
from functorch_gen.nn.positions import alibi_bias, apply_rotary
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["MultiHeadAttention"]


@dataclass(frozen=True)
class MultiHeadAttention:
    """Attention in ``num_heads`` subspaces: (..., l, embed_dim) -> (..., l, embed_dim).

    Equals ``torch.nn.MultiheadAttention`` with ``batch_first=True``, parameter names and initial distribution
    included; takes any leading axes. With ``context`` (..., s, kdim) it is cross-attention. With ``cache`` it goes on
    where earlier calls ended.

    Args:
        kdim: last size of ``context``; embed_dim when None.
        vdim: last size of ``value``; embed_dim when None.
        gain: scales the initial output projection; with 0 the layer starts as the zero map.
        num_kv_heads: heads of keys and values, a divisor of num_heads: each serves several queries (grouped queries,
            arXiv:2305.13245; torch's layer has none); num_heads when None.
        qk_norm: :class:`RMSNorm` of the queries and keys of each head (arXiv:2010.04245, arXiv:2302.05442).
        rotary_base: queries and keys are turned by :func:`apply_rotary` with this base, 10000 in the paper; None: not.
        alibi: adds :func:`alibi_bias` to the scores.
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
    qk_norm: bool = field(default=False, kw_only=True)
    rotary_base: float | None = field(default=None, kw_only=True)
    alibi: bool = field(default=False, kw_only=True)

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
        if self.rotary_base is not None:
            check_positive("MultiHeadAttention", rotary_base=self.rotary_base)
            if self._head_dim % 2:
                raise ValueError(f"MultiHeadAttention: expected an even size of heads to rotate, got {self._head_dim}")

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
    def _head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def _widths(self) -> tuple[int, int, int]:
        """Sizes of the projected queries, keys and values: all heads side by side."""
        q, k, v = (heads * self._head_dim for heads in self._heads)
        return q, k, v

    @property
    def _packed(self) -> bool:
        """Whether the three projections are one matrix, as torch has them when the sizes are equal."""
        return set(self._dims) == {self.embed_dim}

    def init(self, key: Key) -> Params:
        """Projections by Glorot's uniform law, the output's by that of :class:`Linear`; biases zero.

        ``in_proj_weight`` (3 e, e), or ``q_proj_weight`` (e, e), ``k_proj_weight`` (e, kdim), ``v_proj_weight``
        (e, vdim) when the sizes differ; ``in_proj_bias`` (3 e,); ``out_proj.weight`` (e, e), ``out_proj.bias`` (e,).
        With fewer heads of keys and values their rows are fewer. With ``qk_norm`` also ``q_norm.weight`` and
        ``k_norm.weight`` (e / num_heads,), ones.
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
        if self.qk_norm:
            params |= {f"{name}_norm": self._norm.init(key) for name in "qk"}
        return {**params, "out_proj": out}

    @property
    def _norm(self) -> RMSNorm:
        return RMSNorm(self._head_dim)

    def init_cache(
        self,
        batch: int | tuple[int, ...],
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """An empty cache for sequences of up to ``max_length`` positions.

        Args:
            batch: the leading axes of the inputs, () for a single sequence.
        """
        leading = (batch,) if isinstance(batch, int) else tuple(batch)
        check_sizes("MultiHeadAttention", max_length=max_length)
        shape = (*leading, self._heads[1], max_length, self._head_dim)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return KVCache(keys, values, torch.zeros(leading, dtype=torch.int64, device=device))

    @overload
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
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        params: Params,
        x: Tensor,
        *,
        cache: KVCache,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        key: Key | None = None,
    ) -> tuple[Tensor, KVCache]: ...

    def __call__(
        self,
        params: Params,
        x: Tensor,
        context: Tensor | None = None,
        value: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        is_causal: bool = False,
        key: Key | None = None,
    ) -> Tensor | tuple[Tensor, KVCache]:
        """(..., l, embed_dim), context (..., s, kdim), value (..., s, vdim) -> (..., l, embed_dim).

        Args:
            context: what is attended to; ``x`` when None.
            value: what is averaged; ``context`` when None.
            cache: of :meth:`init_cache` or an earlier call. Then x continues the sequences, attention is causal, and
                the result is ``(y, cache)``; y is NaN where a sequence has grown longer than the cache.
            lengths: with a cache, (...) integers: how many positions of x count in each sequence. The rest is padding,
                which the cache does not keep.
            mask: broadcastable to (..., num_heads, l, s), see :func:`attention`; a padding mask (b, s) of the keys
                goes in as ``rearrange(mask, "b s -> b 1 1 s")``. True means "attend" (torch's layer has it reversed).
                With a cache s is its max_length.
        """
        if cache is not None and context is not None:
            raise ValueError("MultiHeadAttention: expected no context beside a cache, got one")
        if cache is None and lengths is not None:
            raise ValueError("MultiHeadAttention: expected lengths only with a cache, got them without")
        q, k, v = self._project_heads(params, x, context, value)
        if cache is not None:
            y, cache = self._attend_to_cache(q, k, v, cache, lengths, mask, key)
            return self._join_heads(params, y), cache
        positions = [torch.arange(z.shape[-2], device=z.device) for z in (q, k)]
        q, k = self._rotated(q, positions[0]), self._rotated(k, positions[1])
        if self.alibi:
            mask = _both(mask, alibi_bias(self.num_heads, *positions, dtype=_bias_dtype(q)))
        y = attention(q, k, v, mask, is_causal=is_causal, dropout=self.dropout, key=key)
        return self._join_heads(params, y)

    def _attend_to_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cache: KVCache,
        lengths: Tensor | None,
        mask: Tensor | None,
        key: Key | None,
    ) -> tuple[Tensor, KVCache]:
        """Each query attends to the slots up to its own position."""
        max_length = self._check_cache(cache, q)
        new = torch.arange(q.shape[-2], device=q.device)
        positions = rearrange(cache.lengths, "... -> ... 1") + new
        q, k = (self._rotated(x, rearrange(positions, "... l -> ... 1 l")) for x in (q, k))
        extended = extend_cache(cache, k, v, lengths)
        slots = torch.arange(max_length, device=q.device)
        mask = _both(mask, rearrange(positions, "... l -> ... 1 l 1") >= slots)
        if self.alibi:
            mask = _both(mask, alibi_bias(self.num_heads, positions, slots, _bias_dtype(q)))
        keys, values = extended.keys.to(q.dtype), extended.values.to(q.dtype)
        y = attention(q, keys, values, mask, dropout=self.dropout, key=key)
        lost = positions >= max_length
        if lengths is not None:
            lost = lost & (new < rearrange(lengths, "... -> ... 1"))
        return torch.where(rearrange(lost, "... l -> ... 1 l 1"), math.nan, y), extended

    def _check_cache(self, cache: KVCache, q: Tensor) -> int:
        """Its max_length."""
        if not isinstance(cache, KVCache):
            raise TypeError(f"MultiHeadAttention: expected cache to be a KVCache, got {type(cache).__name__}")
        sizes = {"h": self._heads[1], "d": self._head_dim}
        found = check_shape(cache.keys, "... h m d", "MultiHeadAttention: cache.keys", **sizes)
        if cache.keys.shape[:-3] != q.shape[:-3]:
            leading = tuple(cache.keys.shape[:-3])
            raise ValueError(
                f"MultiHeadAttention: expected x with the cache's leading axes {leading}, got {tuple(q.shape[:-3])}"
            )
        return found["m"]

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary_base is None else apply_rotary(x, positions, self.rotary_base)

    def _project_heads(
        self, params: Params, x: Tensor, context: Tensor | None, value: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (..., heads, n, d), normalised where ``qk_norm`` says so."""
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
        if self.qk_norm:
            q, k = (self._norm(self._entry(params, f"{name}_norm"), z) for name, z in zip("qk", (q, k), strict=True))
        return q, k, v

    def _join_heads(self, params: Params, y: Tensor) -> Tensor:
        """The output projection: (..., h, l, d) -> (..., l, embed_dim)."""
        out = weight_and_bias("MultiHeadAttention: out_proj", self._entry(params, "out_proj"), bias=self.bias)
        return F.linear(rearrange(y, "... h n d -> ... n (h d)"), *out)

    def _project_packed(self, params: Params, x: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values of one tensor: one product."""
        bias = self._entry(params, "in_proj_bias") if self.bias else None
        return F.linear(x, self._entry(params, "in_proj_weight"), bias).split(self._widths, -1)

    def _project(self, params: Params, *tensors: Tensor) -> Sequence[Tensor]:
        """Queries, keys and values, each of its own tensor."""
        if self._packed:
            weights = self._entry(params, "in_proj_weight").split(self._widths)
        else:
            weights = [self._entry(params, f"{name}_proj_weight") for name in "qkv"]
        biases = self._entry(params, "in_proj_bias").split(self._widths) if self.bias else (None, None, None)
        return [F.linear(x, weight, bias) for x, weight, bias in zip(tensors, weights, biases, strict=True)]

    def _entry(self, params: Params, path: str) -> Any:
        return entry("MultiHeadAttention", params, path)


def _both(mask: Tensor | None, other: Tensor) -> Tensor:
    """Two masks as one: bools are True where a query may attend, numbers are added."""
    if mask is None:
        return other
    if mask.dtype != torch.bool:
        check_floating(mask, "MultiHeadAttention: mask")
    if mask.dtype == other.dtype == torch.bool:
        return mask & other
    if mask.dtype == torch.bool:
        return torch.where(mask, other, -math.inf)
    return torch.where(other, mask, -math.inf) if other.dtype == torch.bool else mask + other


def _bias_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
