"""What the samplers accept: keys, shapes, axes, parameters; each check names the sampler and the argument."""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen.typing import Key, Number

__all__ = ["Shape", "as_tensor", "check_axis", "check_broadcast", "check_integer", "check_key", "check_sizes", "word"]

Shape: TypeAlias = Sequence[int]
"""Sizes of the axes, each >= 0."""


def check_key(key: Key, name: str) -> None:
    """Raises unless ``key`` is (2,) int32.

    >>> check_key(torch.zeros(2), "normal")
    Traceback (most recent call last):
        ...
    TypeError: normal: expected key to be a (2,) int32 tensor made by random.key, got torch.float32
    """
    if not isinstance(key, Tensor) or key.dtype != torch.int32:
        got = key.dtype if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"{name}: expected key to be a (2,) int32 tensor made by random.key, got {got}")
    if tuple(key.shape) != (2,):
        raise ValueError(f"{name}: expected key of shape (2,), got {tuple(key.shape)}; draw from many keys by vmap")


def check_sizes(shape: Shape, name: str, argument: str = "shape") -> tuple[int, ...]:
    """The shape as a tuple; raises unless it is a sequence of integers >= 0.

    >>> check_sizes([2, -1], "normal")
    Traceback (most recent call last):
        ...
    ValueError: normal: expected shape to have sizes >= 0, got (2, -1)
    """
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"{name}: expected {argument} to be a tuple of sizes, got {type(shape).__name__}")
    for size in shape:
        if not isinstance(size, int | torch.SymInt):
            raise TypeError(f"{name}: expected {argument} to hold integers, got {type(size).__name__}")
        if size < 0:
            raise ValueError(f"{name}: expected {argument} to have sizes >= 0, got {tuple(shape)}")
    return tuple(shape)


def check_axis(axis: int, ndim: int, name: str) -> int:
    """The axis counted from the front; raises when the tensor has none such.

    >>> check_axis(-1, 3, "choice")
    2
    """
    if not -ndim <= axis < ndim:
        raise ValueError(f"{name}: expected axis in [{-ndim}, {ndim}), got {axis}")
    return axis % ndim


def check_broadcast(shape: Shape, name: str, *parameters: Shape) -> None:
    """Raises unless shapes of parameters broadcast to ``shape`` without widening it.

    >>> check_broadcast((3,), "bernoulli", (2, 3))
    Traceback (most recent call last):
        ...
    ValueError: bernoulli: expected parameters that broadcast to shape (3,), got (2, 3)
    """
    shape = tuple(shape)
    for parameter in parameters:
        padded = (1,) * (len(shape) - len(parameter)) + tuple(parameter)
        if len(padded) != len(shape) or any(p not in (1, size) for p, size in zip(padded, shape, strict=True)):
            raise ValueError(f"{name}: expected parameters that broadcast to shape {shape}, got {tuple(parameter)}")


def check_integer(value: int | Tensor, name: str) -> None:
    """Raises unless ``value`` is an integer or an integer tensor.

    >>> check_integer(0.5, "fold_in: data")
    Traceback (most recent call last):
        ...
    TypeError: fold_in: data: expected an integer, got float
    """
    if not isinstance(value, int | torch.SymInt | Tensor):
        raise TypeError(f"{name}: expected an integer, got {type(value).__name__}")
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"{name}: expected an integer, got a tensor of {value.dtype}")


def word(value: int | Tensor, name: str, low: int, high: int) -> int | Tensor:
    """The low 32 bits of an integer in [low, high), or of a 0-d integer tensor, in the range of int32.

    >>> word(2**32 - 1, "fold_in: data", 0, 2**32)
    -1
    """
    value = getattr(value, "to_tensor", lambda: value)()  # jit's stand-in for a Python number
    check_integer(value, name)
    if isinstance(value, Tensor):
        if value.ndim:
            raise ValueError(f"{name}: expected a 0-d tensor, got shape {tuple(value.shape)}; fold many in by vmap")
        return value.to(torch.int32)
    if not low <= value < high:
        raise ValueError(f"{name}: expected an integer in [{low}, {high}), got {value}")
    return (value + 2**31) % 2**32 - 2**31


def as_tensor(value: Number, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a 0-d tensor, a tensor cast; gradients flow.

    >>> as_tensor(0.5, torch.float32, torch.device("cpu"))
    tensor(0.5000)
    """
    return value.to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)
