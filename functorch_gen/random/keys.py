"""Keys: making, splitting and folding them, and the raw bits of one."""

import torch
from torch import Tensor

from functorch_gen.check import check_choice
from functorch_gen.random.arguments import Shape, check_key, check_sizes, word
from functorch_gen.random.threefry import bits32, bits64, threefry2x32, words
from functorch_gen.typing import Key

__all__ = ["bits", "fold_in", "key", "split"]

_INTEGERS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def key(seed: int | Tensor, *, device: torch.device | str | None = None) -> Key:
    """The key of a seed: -> (2,) int32.

    The low 32 bits of the seed count, as in jax by default: seeds in [0, 2^32) give keys of their own, and -1 gives
    that of 2^32 - 1.

    Args:
        seed: an integer in [-2^63, 2^63), or a 0-d integer tensor.
        device: where the key, and all that is drawn from it, lives; the seed's or torch's default device if None.
    Raises:
        TypeError: if the seed is no integer.
        ValueError: if it is out of range, or a tensor with axes.

    >>> key(7)
    tensor([0, 7], dtype=torch.int32)
    """
    low = word(seed, "key: seed", -(2**63), 2**63)
    if isinstance(low, Tensor):
        return torch.stack([torch.zeros_like(low), low]).to(device)
    return torch.tensor([0, low], dtype=torch.int32, device=device)


def split(key: Key, num: int | Shape = 2) -> Tensor:
    r"""Independent keys from one: -> (num, 2) int32, or (\*num, 2) for a shape.

    Raises:
        TypeError: if ``key`` is no int32 tensor or ``num`` no integer or shape.
        ValueError: if ``key`` is not (2,) or ``num`` is negative.

    >>> from functorch_gen import random
    >>> left, right = split(random.key(0))
    >>> split(left, 3).shape
    torch.Size([3, 2])
    """
    check_key(key, "split")
    shape = check_sizes((num,) if isinstance(num, int | torch.SymInt) else num, "split", "num")
    return torch.stack(words(key, shape), dim=-1)


def fold_in(key: Key, data: int | Tensor) -> Key:
    """The key of a key and an integer (a step, an index, a checksum of a name): -> (2,) int32.

    As in jax, ``fold_in(key, i)`` is ``split(key, n)[i]``: split a key or fold into it, not both.

    Args:
        data: an integer in [-2^31, 2^32), or a 0-d integer tensor; its low 32 bits count.
    Raises:
        TypeError: if ``key`` is no int32 tensor or ``data`` no integer.
        ValueError: if ``key`` is not (2,), or ``data`` is out of range or a tensor with axes.

    >>> from functorch_gen import random
    >>> step = torch.tensor(3)
    >>> torch.equal(fold_in(random.key(0), step), fold_in(random.key(0), 3))
    True
    """
    check_key(key, "fold_in")
    return torch.stack(threefry2x32(key, 0, word(data, "fold_in: data", -(2**31), 2**32)))


def bits(key: Key, shape: Shape = (), dtype: torch.dtype = torch.int32) -> Tensor:
    """Uniform random bits: integers whose bit patterns are those of jax's unsigned ones of the same width.

    Raises:
        TypeError: if ``key`` is no int32 tensor or ``shape`` no sequence of integers.
        ValueError: if ``key`` is not (2,), a size is negative, or ``dtype`` is none of torch's integers.

    >>> from functorch_gen import random
    >>> bits(random.key(0), (3,)).numpy().view("uint32")
    array([4070199207, 4202968722, 1427181096], dtype=uint32)
    """
    check_key(key, "bits")
    check_choice("bits", "dtype", dtype, _INTEGERS)
    shape = check_sizes(shape, "bits")
    return bits64(key, shape) if dtype == torch.int64 else bits32(key, shape).to(dtype)
