"""The keys and values of the positions that attention has seen: state of constant shape."""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["KVCache", "extend_cache"]


class KVCache(NamedTuple):
    """What attention keeps of the positions so far; each sequence has its own number of them.

    Made by :meth:`MultiHeadAttention.init_cache`. Slots from ``lengths`` on are not read.
    """

    keys: Tensor  # (..., num_kv_heads, max_length, head_dim)
    values: Tensor  # (..., num_kv_heads, max_length, head_dim)
    lengths: Tensor  # (...), int64: how many positions are filled


def extend_cache(cache: KVCache, keys: Tensor, values: Tensor, lengths: Tensor | None = None) -> KVCache:
    """The cache with the new keys and values (..., h, l, d) in the slots after those that are filled.

    Args:
        lengths: (...) integers: how many of the l count in each sequence, the rest is padding; all when None.
    Raises:
        TypeError: if ``lengths`` are no integers.
        ValueError: if ``lengths`` have another shape than those of the cache.

    >>> cache = KVCache(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1), torch.tensor(1))
    >>> cache = extend_cache(cache, torch.ones(1, 1, 1), torch.ones(1, 1, 1))
    >>> cache.keys.flatten().tolist(), int(cache.lengths)
    ([0.0, 1.0, 0.0], 2)
    """
    count = torch.full_like(cache.lengths, keys.shape[-2]) if lengths is None else _counts(cache, lengths)
    slots = torch.arange(cache.keys.shape[-2], device=keys.device)
    index = slots - rearrange(cache.lengths, "... -> ... 1")  # which of the new positions goes into the slot
    written = (index >= 0) & (index < rearrange(count, "... -> ... 1"))
    where = [rearrange(x, "... m -> ... 1 m 1") for x in (written, index)]
    return KVCache(_put(cache.keys, keys, *where), _put(cache.values, values, *where), cache.lengths + count)


def _counts(cache: KVCache, lengths: Tensor) -> Tensor:
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"extend_cache: lengths: expected an int64 or int32 tensor, got {got}")
    if lengths.shape != cache.lengths.shape:
        expected = tuple(cache.lengths.shape)
        raise ValueError(f"extend_cache: lengths: expected the cache's shape {expected}, got {tuple(lengths.shape)}")
    return lengths.to(cache.lengths.dtype)


def _put(old: Tensor, new: Tensor, written: Tensor, index: Tensor) -> Tensor:
    """old where nothing is written, else new[index]: (..., h, m, d), (..., h, l, d), twice (..., 1, m, 1)."""
    length = new.shape[-2]
    if length == 0:
        return old
    if length > 1:  # one position goes to every slot that is written
        new = torch.take_along_dim(new, index.clamp(0, length - 1).expand(old.shape), -2)
    return torch.where(written, new.to(old.dtype), old)
