"""Sizes of layers: one number or one per axis, hashable, checked."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

__all__ = ["check_nonnegative", "check_sizes", "freeze", "per_axis"]


def freeze(layer: Any) -> None:
    """Turns the list fields of a frozen dataclass into tuples, so that the layer is hashable.

    Called in ``__post_init__``, before anyone has seen the layer.

    >>> from functorch_gen.nn import Conv2d
    >>> Conv2d(1, 1, [3, 5]).kernel_size
    (3, 5)
    """
    for field in fields(layer):
        value = getattr(layer, field.name)
        if isinstance(value, list):
            object.__setattr__(layer, field.name, tuple(value))


def per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One size for each of ``dims`` axes.

    >>> per_axis(3, 2), per_axis((3, 5), 2)
    ((3, 3), (3, 5))
    """
    return (value,) * dims if isinstance(value, int) else tuple(value)


def check_sizes(name: str, *, dims: int | None = None, minimum: int = 1, **sizes: Any) -> None:
    """Checks that every argument is an int >= ``minimum``, or a tuple of them (of length ``dims`` when given).

    Raises:
        TypeError: if one is neither an int nor a tuple of ints.
        ValueError: if one is too small or has another length.

    >>> check_sizes("Conv2d", dims=2, kernel_size=(3, 0))
    Traceback (most recent call last):
        ...
    ValueError: Conv2d: expected kernel_size >= 1, got (3, 0)
    """
    for argument, value in sizes.items():
        values = value if isinstance(value, tuple) else (value,)
        if any(isinstance(size, bool) or not isinstance(size, int) for size in values):
            raise TypeError(f"{name}: expected {argument} to be an int or a tuple of ints, got {value!r}")
        if isinstance(value, tuple) and (not value or (dims is not None and len(value) != dims)):
            raise ValueError(f"{name}: expected {argument} with {dims or 'at least 1'} sizes, got {value!r}")
        if any(size < minimum for size in values):
            raise ValueError(f"{name}: expected {argument} >= {minimum}, got {value!r}")


def check_nonnegative(name: str, **values: float) -> None:
    """Raises ``ValueError("<name>: expected <argument> >= 0, got <value>")`` for the first negative value (or NaN).

    >>> check_nonnegative("Linear", gain=-1.0)
    Traceback (most recent call last):
        ...
    ValueError: Linear: expected gain >= 0, got -1.0
    """
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected {argument} to be a number >= 0, got {type(value).__name__}")
        if not value >= 0:
            raise ValueError(f"{name}: expected {argument} >= 0, got {value}")
