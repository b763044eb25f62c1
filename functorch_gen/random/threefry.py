"""The counter-based generator Threefry-2x32 on int32 tensors, and the words it makes for a shape.

int32 stands for uint32: sums wrap, and a mask makes the right shift logical. Everything is element-wise, so that
Inductor fuses a draw with what is done with it.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3 and table 2.
"""

import math

import torch
from torch import Tensor

from functorch_gen.random.arguments import Shape
from functorch_gen.typing import Key

__all__ = ["bits32", "bits64", "counter", "threefry2x32", "words"]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA  # C240 of Skein's key schedule, lower half


def threefry2x32(key: Key, x0: Tensor | int, x1: Tensor | int) -> tuple[Tensor, Tensor]:
    """Both words of the 20-round hash of the counter words x0, x1, which broadcast.

    >>> [hex(word.item() % 2**32) for word in threefry2x32(torch.zeros(2, dtype=torch.int32), 0, 0)]
    ['0x6b200159', '0x99ba4efe']
    """
    k0, k1 = key[0], key[1]
    schedule = (k0, k1, k0 ^ k1 ^ _PARITY)
    x0, x1 = k0 + x0, k1 + x1
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ _rotate_left(x1, rotation)
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + (schedule[(i + 2) % 3] + (i + 1))
    return x0, x1


def _rotate_left(x: Tensor, r: int) -> Tensor:
    return (x << r) | ((x >> (32 - r)) & ((1 << r) - 1))


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
