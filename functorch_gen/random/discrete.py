"""Integer and Boolean samplers, and draws from what is given: choice, permutation."""

import math

import torch
from torch import Tensor

from functorch_gen.check import check_choice, check_floating, check_shape
from functorch_gen.random.arguments import (
    Shape,
    as_tensor,
    check_axis,
    check_broadcast,
    check_integer,
    check_key,
    check_sizes,
)
from functorch_gen.random.continuous import gumbel, unit
from functorch_gen.random.keys import split
from functorch_gen.random.threefry import bits32, bits64
from functorch_gen.typing import Key, Number

__all__ = ["bernoulli", "categorical", "choice", "permutation", "rademacher", "randint"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def bernoulli(key: Key, p: Number = 0.5, shape: Shape | None = None) -> Tensor:
    """True with probability p: -> bool; ``shape`` is that of p unless given.

    Probabilities are resolved to p's dtype's 2^-mantissa (1e-7 in ``float32``, as which numbers count).

    Raises:
        TypeError: if ``key`` is no int32 tensor, or ``p`` an integer tensor.
        ValueError: if the number ``p`` is not in [0, 1], or the tensor ``p`` does not broadcast to ``shape``.

    >>> from functorch_gen import random
    >>> bernoulli(random.key(0), 0.9, (4,))
    tensor([False, False,  True,  True])
    """
    check_key(key, "bernoulli")
    if isinstance(p, Tensor):
        check_floating(p, "bernoulli: p")
    elif not 0 <= p <= 1:
        raise ValueError(f"bernoulli: expected p in [0, 1], got {p}")
    p = as_tensor(p, p.dtype if isinstance(p, Tensor) else torch.float32, key.device)
    shape = p.shape if shape is None else check_sizes(shape, "bernoulli")
    check_broadcast(shape, "bernoulli", p.shape)
    return unit(key, shape, p.dtype, "bernoulli") < p


def rademacher(key: Key, shape: Shape = (), dtype: torch.dtype = torch.int64) -> Tensor:
    """-1 or 1, each with probability 1/2.

    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``key`` is not (2,) or a size is negative.

    >>> from functorch_gen import random
    >>> rademacher(random.key(0), (4,))
    tensor([-1, -1,  1,  1])
    """
    return (unit(key, shape, torch.float32, "rademacher") < 0.5).to(dtype) * 2 - 1


def randint(
    key: Key,
    shape: Shape,
    minval: int | Tensor,
    maxval: int | Tensor,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Uniform integers in [minval, maxval), from twice the bits of ``dtype`` (64 at least).

    Args:
        minval: a number, or an integer tensor that broadcasts to ``shape``. Tensors are clipped to the range of
            ``dtype``; where ``minval >= maxval`` in them the draw is ``minval``.
        dtype: ``torch.int32`` gives what jax gives by default, ``torch.int64`` what it gives with x64.
    Raises:
        TypeError: if ``key`` is no int32 tensor or a bound no integer.
        ValueError: if numbers have minval >= maxval or lie outside of ``dtype``, or bounds do not broadcast.

    >>> from functorch_gen import random
    >>> randint(random.key(0), (4,), 0, 10)
    tensor([5, 1, 5, 7])
    """
    check_key(key, "randint")
    check_choice("randint", "dtype", dtype, _INTEGERS)
    shape = check_sizes(shape, "randint")
    low = _bound(minval, "minval", dtype, key.device)
    high = _bound(maxval, "maxval", dtype, key.device)
    if not isinstance(minval, Tensor) and not isinstance(maxval, Tensor) and not minval < maxval:
        raise ValueError(f"randint: expected minval < maxval, got {minval} and {maxval}")
    check_broadcast(shape, "randint", low.shape, high.shape)
    span = torch.where(high > low, high - low, 1)
    return (low + _offset(key, shape, span, 64 if dtype == torch.int64 else 32)).to(dtype)


def _bound(value: int | Tensor, argument: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A bound as int64: a number must lie in the range of ``dtype``, a tensor is clipped to it."""
    info = torch.iinfo(dtype)
    low, high = info.min, min(info.max + (argument == "maxval"), 2**63 - 1)
    check_integer(value, f"randint: {argument}")
    if isinstance(value, Tensor):
        return value.to(torch.int64).clamp(low, high)
    if not low <= value <= high:
        raise ValueError(f"randint: expected {argument} in [{low}, {high}] for {dtype}, got {value}")
    return torch.full((), value, dtype=torch.int64, device=device)


def _offset(key: Key, shape: Shape, span: Tensor, width: int) -> Tensor:
    """Uniform on [0, span): (higher 2^width + lower) mod span, in unsigned arithmetic of ``width`` bits, as int64."""
    draw, remainder, mask = bits64, _unsigned_remainder, -1
    if width == 32:
        draw, remainder, mask = bits32, torch.remainder, 2**32 - 1
    higher, lower = (draw(subkey, shape).to(torch.int64) & mask for subkey in split(key))
    root = remainder(torch.full_like(span, 2 ** (width // 2)), span)
    multiplier = remainder(root * root & mask, span)
    return remainder((remainder(higher, span) * multiplier + remainder(lower, span)) & mask, span)


def _unsigned_remainder(x: Tensor, d: Tensor) -> Tensor:
    """x mod d of int64 tensors that stand for uint64 (Warren 2012, Hacker's Delight, section 9-3)."""
    quotient = torch.where(d < 0, 0, ((x >> 1) & (2**63 - 1)) // d * 2)
    rest = x - quotient * d
    return torch.where(_flip(rest) >= _flip(d), rest - d, rest)


def _flip(x: Tensor) -> Tensor:
    """Integers whose signed order is the unsigned order of x."""
    return x ^ torch.iinfo(x.dtype).min


def categorical(
    key: Key,
    logits: Tensor,
    axis: int = -1,
    shape: Shape | None = None,
    replace: bool = True,
    mode: str = "low",
) -> Tensor:
    """Indices along ``axis`` drawn with probability softmax(logits): -> int64. The argmax of logits + Gumbel noise.

    Args:
        shape: leading axes of independent draws, then the axes of ``logits`` without ``axis`` (the default).
        replace: False draws the leading axes without replacement (the top k: Kool et al. 2019, arXiv:1903.06059).
        mode: of the noise; ``"low"`` is wrong about probabilities below 1e-7 in ``float32``, ``"high"`` below 1e-14.
            In ``bfloat16``, as in JAX, below 1e-2: give it ``logits.float()``.
    Raises:
        TypeError: if ``key`` is no int32 tensor or ``logits`` is not floating.
        ValueError: if ``axis`` is out of range, ``shape`` does not end as ``logits`` asks, or too many are to be drawn
            without replacement.

    >>> from functorch_gen import random
    >>> categorical(random.key(0), torch.tensor([0.1, 0.2, 0.7]).log(), shape=(5,))
    tensor([1, 2, 2, 1, 2])
    """
    check_key(key, "categorical")
    check_floating(logits, "categorical: logits")
    axis = check_axis(axis, logits.ndim, "categorical")
    batch = (*logits.shape[:axis], *logits.shape[axis + 1 :])
    shape = batch if shape is None else check_sizes(shape, "categorical")
    check_broadcast(shape, "categorical", batch)
    lead, rest = shape[: len(shape) - len(batch)], shape[len(shape) - len(batch) :]
    n = logits.shape[axis]
    if replace:
        noise = gumbel(key, (*lead, *rest[:axis], n, *rest[axis:]), logits.dtype, mode)
        return torch.argmax(noise + logits, dim=axis - logits.ndim)
    k = math.prod(lead)
    if rest != batch or k > n:
        raise ValueError(f"categorical: expected shape (..., *{batch}) with at most {n} draws, got {shape}")
    scores = logits + gumbel(key, logits.shape, logits.dtype, mode)
    return scores.movedim(axis, -1).topk(k).indices.movedim(-1, 0).reshape(shape)


def choice(
    key: Key,
    a: int | Tensor,
    shape: Shape = (),
    replace: bool = True,
    p: Tensor | None = None,
    axis: int = 0,
) -> Tensor:
    """Draws from 0, ..., a - 1 (int64), or slices of the tensor ``a`` along ``axis``, which ``shape`` replaces.

    Args:
        p: probability of each, (n,); uniform if None.
    Raises:
        TypeError: if ``key`` is no int32 tensor or ``p`` is not floating.
        ValueError: if ``axis`` is out of range, ``p`` is not (n,), or there are too few to draw from.

    >>> from functorch_gen import random
    >>> choice(random.key(0), torch.tensor([10, 20, 30]), (4,))
    tensor([20, 10, 30, 20])
    """
    check_key(key, "choice")
    shape = check_sizes(shape, "choice")
    draws = math.prod(shape)
    if not isinstance(a, Tensor):
        (n,) = check_sizes((a,), "choice", "a")
        return _choose(key, n, draws, replace, p).reshape(shape)
    axis = check_axis(axis, a.ndim, "choice")
    index = _choose(key, a.shape[axis], draws, replace, p)
    return a.index_select(axis, index).reshape(*a.shape[:axis], *shape, *a.shape[axis + 1 :])


def _choose(key: Key, n: int, draws: int, replace: bool, p: Tensor | None) -> Tensor:
    """``draws`` indices below n; with p by inversion or, without replacement, by Gumbel top-k."""
    if draws and (n == 0 or (not replace and draws > n)):
        raise ValueError(f"choice: expected a to hold enough to draw {draws} with replace={replace}, got {n}")
    if p is None:
        if replace:
            return randint(key, (draws,), 0, max(n, 1), torch.int32).to(torch.int64)
        return permutation(key, n)[:draws]
    check_floating(p, "choice: p")
    check_shape(p, "n", "choice: p", n=n)
    if not replace:
        return torch.topk(gumbel(key, (n,), p.dtype) + torch.log(p), draws).indices
    cumulative = torch.cumsum(p, 0)
    return torch.searchsorted(cumulative, cumulative[-1] * (1 - unit(key, (draws,), p.dtype, "choice")))


def permutation(key: Key, x: int | Tensor, axis: int = 0, independent: bool = False) -> Tensor:
    """A random order of 0, ..., x - 1 (int64), or of the slices of the tensor ``x`` along ``axis``.

    Args:
        independent: every vector along ``axis`` has an order of its own.
    Raises:
        TypeError: if ``key`` is no int32 tensor or ``x`` neither integer nor tensor.
        ValueError: if ``axis`` is out of range or the number ``x`` negative.

    >>> from functorch_gen import random
    >>> permutation(random.key(0), 5)
    tensor([0, 1, 4, 3, 2])
    """
    check_key(key, "permutation")
    if not isinstance(x, Tensor):
        (n,) = check_sizes((x,), "permutation", "x")
        return _shuffle(key, torch.arange(n, device=key.device), 0)
    axis = check_axis(axis, x.ndim, "permutation")
    if independent or x.ndim == 1:
        return _shuffle(key, x, axis)
    return x.index_select(axis, _shuffle(key, torch.arange(x.shape[axis], device=key.device), 0))


def _shuffle(key: Key, x: Tensor, axis: int) -> Tensor:
    """Sorts by random words, so often that elements tied in every round are unlikely: n^3 <= 2^(32 rounds)."""
    for _ in range(math.ceil(3 * math.log(max(1, x.numel())) / math.log(2**32 - 1))):
        key, subkey = split(key)
        x = x.gather(axis, torch.argsort(_flip(bits32(subkey, x.shape)), dim=axis, stable=True))
    return x
