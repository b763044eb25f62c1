"""Floating samplers: transforms of uniform draws."""

import math

import torch
from torch import Tensor

from functorch_gen.check import check_choice
from functorch_gen.random.arguments import Shape, as_tensor, check_broadcast, check_key, check_sizes
from functorch_gen.random.erfinv import erfinv
from functorch_gen.random.threefry import bits32, bits64
from functorch_gen.typing import Key, Number

__all__ = ["exponential", "gumbel", "laplace", "normal", "orthogonal", "truncated_normal", "uniform", "unit"]

_MANTISSA = {torch.float32: 23, torch.float64: 52, torch.float16: 10, torch.bfloat16: 7}
_DRAWN = {torch.float32: 32, torch.float64: 64, torch.float16: 16, torch.bfloat16: 8}  # random bits of jax's draw
_SQRT2 = math.sqrt(2)


def unit(key: Key, shape: Shape, dtype: torch.dtype, name: str) -> Tensor:
    """Uniform on [0, 1): the top mantissa bits of a draw times their unit, exact in ``dtype``.

    >>> from functorch_gen import random
    >>> unit(random.key(0), (3,), torch.float32, "uniform")
    tensor([0.9477, 0.9786, 0.3323])
    """
    check_key(key, name)
    check_choice(name, "dtype", dtype, _MANTISSA)
    shape = check_sizes(shape, name)
    drawn = bits64(key, shape) if dtype == torch.float64 else bits32(key, shape)
    digits = _MANTISSA[dtype]
    return ((drawn >> (_DRAWN[dtype] - digits)) & ((1 << digits) - 1)).to(dtype) * 2.0**-digits


def _symmetric(key: Key, shape: Shape, dtype: torch.dtype, name: str) -> Tensor:
    """Uniform on (-1, 1), from the number next to -1 on."""
    return unit(key, shape, dtype, name) * 2 + (torch.finfo(dtype).eps / 2 - 1)


def uniform(
    key: Key,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    minval: Number = 0.0,
    maxval: Number = 1.0,
) -> Tensor:
    """Uniform on [minval, maxval).

    With other bounds than 0 and 1, ``float32`` is rounded once, as by a fused multiply-add, and so the same on every
    device; the other dtypes are rounded at each step, and ``float64`` may differ from jax by an ulp of the bounds.

    Args:
        minval: a number or a tensor that broadcasts to ``shape``; gradients flow to it and to ``maxval``.
    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``dtype`` is not floating, bounds do not broadcast to ``shape``, or numbers have minval > maxval.

    >>> from functorch_gen import random
    >>> uniform(random.key(0), (3,))
    tensor([0.9477, 0.9786, 0.3323])
    """
    u = unit(key, shape, dtype, "uniform")
    if not isinstance(minval, Tensor) and not isinstance(maxval, Tensor):
        if not minval <= maxval:
            raise ValueError(f"uniform: expected minval <= maxval, got {minval} and {maxval}")
        if minval == 0 and maxval == 1:
            return u
    low, high = (as_tensor(bound, dtype, key.device) for bound in (minval, maxval))
    check_broadcast(u.shape, "uniform", low.shape, high.shape)
    wide = torch.float64 if dtype == torch.float32 else dtype  # where the product of 23 times 24 bits is exact
    x = u.to(wide) * (high - low).to(wide) + low.to(wide)
    return torch.maximum(low, x.to(dtype))


def normal(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal, by inversion: sqrt(2) erfinv(u) of u uniform on (-1, 1).

    ``float32`` is within 3 ulp of jax for each of the 2^23 numbers that u can be; ``float64`` is exact to 1e-15, where
    jax loses up to six digits in the tails.

    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``key`` is not (2,), a size is negative, or ``dtype`` is not floating.

    >>> from functorch_gen import random
    >>> normal(random.key(0), (3,))
    tensor([ 1.6226,  2.0253, -0.4336])
    """
    return _SQRT2 * erfinv(_symmetric(key, shape, dtype, "normal"))


def truncated_normal(
    key: Key,
    lower: Number,
    upper: Number,
    shape: Shape | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal given that it lies in (lower, upper); ``shape`` is that of the bounds unless given.

    By inversion of erf, whose resolution is that of ``dtype`` near 1: where both bounds lie on one side, beyond 4 in
    ``float32`` or 7 in ``float64``, draws are coarse.

    Args:
        lower: a number or a tensor that broadcasts to ``shape``; gradients flow to it and to ``upper``.
    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``dtype`` is not floating, bounds do not broadcast to ``shape``, or numbers have lower >= upper.

    >>> from functorch_gen import random
    >>> truncated_normal(random.key(0), -1.0, 1.0, (3,))
    tensor([ 0.8619,  0.9413, -0.2910])
    """
    check_key(key, "truncated_normal")
    check_choice("truncated_normal", "dtype", dtype, _MANTISSA)
    if not isinstance(lower, Tensor) and not isinstance(upper, Tensor) and not lower < upper:
        raise ValueError(f"truncated_normal: expected lower < upper, got {lower} and {upper}")
    low, high = (as_tensor(bound, dtype, key.device) for bound in (lower, upper))
    shape = torch.broadcast_shapes(low.shape, high.shape) if shape is None else check_sizes(shape, "truncated_normal")
    check_broadcast(shape, "truncated_normal", low.shape, high.shape)
    u = uniform(key, shape, dtype, torch.erf(low / _SQRT2), torch.erf(high / _SQRT2))
    edge = 1 - torch.finfo(dtype).eps / 2
    x = _SQRT2 * erfinv(u.clamp(-edge, edge))
    return torch.minimum(torch.maximum(x, _next(low, math.inf)), _next(high, -math.inf))


def _next(x: Tensor, towards: float) -> Tensor:
    """The neighbour of x, without gradient."""
    return torch.nextafter(x.detach(), torch.full_like(x, towards))


def exponential(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Exponential with rate 1: -log(1 - u).

    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``key`` is not (2,), a size is negative, or ``dtype`` is not floating.

    >>> from functorch_gen import random
    >>> exponential(random.key(0), (3,))
    tensor([2.9501, 3.8434, 0.4039])
    """
    return -torch.log1p(-unit(key, shape, dtype, "exponential"))


def laplace(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Laplace with location 0 and scale 1: sign(u) log(1 - abs(u)) of u uniform on (-1, 1).

    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``key`` is not (2,), a size is negative, or ``dtype`` is not floating.

    >>> from functorch_gen import random
    >>> laplace(random.key(0), (3,))
    tensor([-2.2570, -3.1503,  0.4086])
    """
    u = _symmetric(key, shape, dtype, "laplace")
    return torch.sign(u) * torch.log1p(-torch.abs(u))


def gumbel(key: Key, shape: Shape = (), dtype: torch.dtype = torch.float32, mode: str = "low") -> Tensor:
    """Standard Gumbel: -log(-log u).

    Args:
        mode: ``"low"`` reaches up to 16 in ``float32``; ``"high"`` draws twice the bits and reaches 32.
    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``mode`` is neither, ``key`` is not (2,), a size is negative, or ``dtype`` is not floating.

    >>> from functorch_gen import random
    >>> gumbel(random.key(0), (3,))
    tensor([ 2.9234,  3.8326, -0.0969])
    """
    check_choice("gumbel", "mode", mode, ("low", "high"))
    shape = check_sizes(shape, "gumbel")
    if mode == "low":
        return -torch.log(-torch.log(unit(key, shape, dtype, "gumbel") + torch.finfo(dtype).tiny))
    high, low = unit(key, (2, *shape), dtype, "gumbel")
    u = torch.where(high >= 0.5, high, high + 2.0 ** -_MANTISSA[dtype] * low + torch.finfo(dtype).tiny)
    return -torch.log(-torch.log1p(-u))


def orthogonal(
    key: Key,
    n: int,
    shape: Shape = (),
    dtype: torch.dtype = torch.float32,
    m: int | None = None,
) -> Tensor:
    r"""Uniform (Haar) matrices with orthonormal rows if n <= m, columns if m <= n: -> (\*shape, n, m).

    Args:
        dtype: ``float32`` or ``float64``.
        m: ``n`` if None.
    Raises:
        TypeError: if ``key`` is no int32 tensor or a size no integer.
        ValueError: if ``key`` is not (2,), a size is negative, or ``dtype`` is neither.
    Source: Mezzadri 2007, arXiv:math-ph/0609050: the QR decomposition of a normal matrix, made unique by R's signs.

    >>> from functorch_gen import random
    >>> q = orthogonal(random.key(0), 3)
    >>> torch.allclose(q @ q.mT, torch.eye(3), atol=1e-6)
    True
    """
    check_choice("orthogonal", "dtype", dtype, (torch.float32, torch.float64))
    shape = check_sizes(shape, "orthogonal")
    n, m = check_sizes((n, n if m is None else m), "orthogonal", "n, m")
    check_key(key, "orthogonal")
    q, r = torch.linalg.qr(normal(key, (*shape, max(n, m), min(n, m)), dtype))
    q = q * torch.sign(torch.diagonal(r, dim1=-2, dim2=-1)).unsqueeze(-2)
    return q.mT if n < m else q
