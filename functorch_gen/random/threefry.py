"""The counter-based generator Threefry-2x32 on int32 tensors, and the words it makes for a shape.

int32 stands for uint32: sums wrap, and a mask makes the right shift logical. The hash is one operation of a traced
graph, for which ``jit`` generates element-wise code: its 120 steps are fused with what is done with the bits, and cost
a compiler no more than one.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 2.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen.random.arguments import Shape
from functorch_gen.typing import Key

__all__ = ["bits32", "bits64", "counter", "rounds", "threefry2x32", "threefry_op", "words"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # C240 of Skein's key schedule, lower half


_LIBRARY = torch.library.Library("functorch_gen", "FRAGMENT")
_LIBRARY.define(
    "threefry2x32(Tensor k0, Tensor k1, Tensor x0, Tensor x1) -> (Tensor, Tensor)", tags=(torch.Tag.pt2_compliant_tag,)
)
threefry_op: Any = torch.ops.functorch_gen.threefry2x32.default
"""The hash as one operation of a traced graph; the arguments broadcast."""


def threefry2x32(key: Key, x0: Tensor | int, x1: Tensor | int) -> tuple[Tensor, Tensor]:
    """Both words of the 20-round hash of the counter words x0, x1, which broadcast.

    >>> [hex(word.item() % 2**32) for word in threefry2x32(torch.zeros(2, dtype=torch.int32), 0, 0)]
    ['0x6b200159', '0x99ba4efe']
    """
    k0, k1 = key[0], key[1]
    if torch.compiler.is_dynamo_compiling():  # plain torch.compile does not know how to generate code for the operation
        return rounds(k0, k1, x0, x1)
    x0, x1 = (x if isinstance(x, Tensor) else torch.full((), x, dtype=torch.int32, device=key.device) for x in (x0, x1))
    return threefry_op(k0, k1, x0, x1)


def _rotate_left(x: Tensor, r: int) -> Tensor:
    return (x << r) | ((x >> (32 - r)) & ((1 << r) - 1))


def rounds(
    k0: Any, k1: Any, x0: Any, x1: Any, rotate: Callable[[Any, int], Any] = _rotate_left, constant: Any = int
) -> tuple[Any, Any]:
    """The hash in terms of +, ^ and a rotation: of tensors, or of a compiler's values with its own constants."""
    schedule = (k0, k1, k0 ^ k1 ^ constant(_PARITY))
    x0, x1 = k0 + x0, k1 + x1
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ rotate(x1, r)
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + (schedule[(i + 2) % 3] + constant(i + 1))
    return x0, x1


def _fake(k0: Tensor, k1: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    out = k0.new_empty(torch.broadcast_shapes(k0.shape, k1.shape, x0.shape, x1.shape))
    return out, torch.empty_like(out)


def _batched(info: Any, in_dims: Any, *tensors: Tensor) -> Any:
    rank = max(x.ndim - (dim is not None) for x, dim in zip(tensors, in_dims, strict=True))
    aligned = []
    for x, dim in zip(tensors, in_dims, strict=True):
        if dim is not None:
            x = x.movedim(dim, 0)
            x = x.reshape(x.shape[0], *[1] * (rank - x.ndim + 1), *x.shape[1:])
        aligned.append(x)
    return threefry_op(*aligned), (0, 0)


_LIBRARY.impl("threefry2x32", lambda k0, k1, x0, x1: rounds(k0, k1, x0, x1), "CompositeExplicitAutograd")
torch.library.register_fake("functorch_gen::threefry2x32", _fake, lib=_LIBRARY)
torch.library.register_vmap("functorch_gen::threefry2x32", _batched, lib=_LIBRARY)


def counter(start: int, n: int, device: torch.device) -> tuple[Tensor | int, Tensor]:
    """High and low words of start, ..., start + n - 1: the high one is the number 0 while all fit in 31 bits.

    >>> counter(2**32, 2, torch.device("cpu"))
    (tensor([1, 1], dtype=torch.int32), tensor([0, 1], dtype=torch.int32))
    """
    if start + n <= 2**31:
        return 0, torch.arange(start, start + n, dtype=torch.int32, device=device)
    index = torch.arange(start, start + n, dtype=torch.int64, device=device)
    return (index >> 32).to(torch.int32), index.to(torch.int32)


def words(key: Key, shape: Shape) -> tuple[Tensor, Tensor]:
    """Both words of the hash of 0, 1, ... laid out in ``shape``: element i depends on the key and i alone.

    >>> [word.shape for word in words(torch.zeros(2, dtype=torch.int32), (2, 3))]
    [torch.Size([2, 3]), torch.Size([2, 3])]
    """
    y0, y1 = threefry2x32(key, *counter(0, math.prod(shape), key.device))
    return y0.reshape(tuple(shape)), y1.reshape(tuple(shape))


def bits32(key: Key, shape: Shape) -> Tensor:
    """32 random bits an element, as int32.

    >>> bits32(torch.zeros(2, dtype=torch.int32), (3,)).numpy().view("uint32")
    array([4070199207, 4202968722, 1427181096], dtype=uint32)
    """
    y0, y1 = words(key, shape)
    return y0 ^ y1


def bits64(key: Key, shape: Shape) -> Tensor:
    """64 random bits an element, as int64.

    >>> bits64(torch.zeros(2, dtype=torch.int32), (1,)).numpy().view("uint64")
    array([7719171245655871230], dtype=uint64)
    """
    y0, y1 = words(key, shape)
    return (y0.to(torch.int64) << 32) | (y1.to(torch.int64) & (2**32 - 1))
