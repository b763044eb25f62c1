"""Checks at public calls: each names the argument, what was expected and what came."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from functorch_gen.typing import Number

__all__ = ["check_above_zero", "check_choice", "check_floating", "check_number", "check_positive", "check_shape"]


def check_shape(x: Tensor, pattern: str, name: str, **sizes: int) -> dict[str, int]:
    """Checks ``x.shape`` against ``"b c h w"`` and returns the size of each axis.

    Args:
        pattern: axis names separated by spaces; a leading ``...`` matches any axes, a number only itself.
        name: who asks, as the message shall name it: ``"Linear: x"``.
        sizes: the axes whose size is known.
    Raises:
        TypeError: if ``x`` is no tensor.
        ValueError: if the number of axes or a named size differs, or one name stands for two sizes.

    >>> check_shape(torch.zeros(2, 3), "b c", "Linear", c=3)
    {'b': 2, 'c': 3}
    >>> check_shape(torch.zeros(2, 4), "... c", "Linear", c=3)
    Traceback (most recent call last):
        ...
    ValueError: Linear: expected shape (..., c=3), got (2, 4)
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor of shape {_expected(pattern, sizes)}, got {type(x).__name__}")
    axes = pattern.split()
    shape = tuple(x.shape)
    if axes and axes[0] == "...":
        axes = axes[1:]
        matched = len(shape) >= len(axes)
        shape = shape[len(shape) - len(axes) :] if matched else shape
    else:
        matched = len(shape) == len(axes)
    found: dict[str, int] = {}
    if matched:
        for axis, size in zip(axes, shape, strict=True):
            want = int(axis) if axis.isdigit() else sizes.get(axis, found.get(axis, size))
            found[axis] = size
            matched = matched and want == size
    if not matched:
        raise ValueError(f"{name}: expected shape {_expected(pattern, sizes)}, got {tuple(x.shape)}")
    return found


def _expected(pattern: str, sizes: dict[str, int]) -> str:
    axes = [f"{axis}={sizes[axis]}" if axis in sizes else axis for axis in pattern.split()]
    return f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"


def check_positive(name: str, **values: Any) -> None:
    """Raises ``ValueError("<name>: expected <argument> > 0, got <value>")`` for the first value that is not.

    >>> check_positive("Linear", in_features=3, out_features=0)
    Traceback (most recent call last):
        ...
    ValueError: Linear: expected out_features > 0, got 0
    """
    for argument, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}: expected {argument} to be a number > 0, got {type(value).__name__}")
        if not value > 0:
            raise ValueError(f"{name}: expected {argument} > 0, got {value}")


def check_choice(name: str, argument: str, value: object, choices: Iterable[object]) -> None:
    """Raises ``ValueError`` that lists the choices when ``value`` is none of them.

    >>> check_choice("Dropout", "mode", "row", ("element", "channel"))
    Traceback (most recent call last):
        ...
    ValueError: Dropout: expected mode to be one of 'element', 'channel', got 'row'
    """
    choices = tuple(choices)
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected {argument} to be one of {listed}, got {value!r}")


def check_floating(x: Tensor, name: str) -> None:
    """Raises ``TypeError`` when ``x`` is no floating-point tensor.

    >>> check_floating(torch.arange(3), "softmax: x")
    Traceback (most recent call last):
        ...
    TypeError: softmax: x: expected a floating-point tensor, got torch.int64
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a floating-point tensor, got {type(x).__name__}")
    if not torch.is_floating_point(x):
        raise TypeError(f"{name}: expected a floating-point tensor, got {x.dtype}")


def check_number(
    name: str, argument: str, value: Number, *, low: float = -math.inf, high: float = math.inf, below: float = math.inf
) -> None:
    """Checks a hyper-parameter; that low <= value <= high and value < below is checked of Python numbers only.

    A 0-d tensor, or a number that a trace stands for, has no value to compare.

    Raises:
        TypeError: if ``value`` is no number (has no arithmetic).
        ValueError: if it is a Python number out of range or NaN, or a tensor that is not 0-d.

    >>> check_number("adam", "b1", 1.0, low=0, below=1)
    Traceback (most recent call last):
        ...
    ValueError: adam: expected 0 <= b1 < 1, got 1.0
    """
    if isinstance(value, bool) or not (isinstance(value, int | float) or hasattr(value, "__rsub__")):
        raise TypeError(f"{name}: expected {argument} to be a number or a 0-d tensor, got {type(value).__name__}")
    if isinstance(value, Tensor) and value.ndim:
        raise ValueError(f"{name}: expected {argument} to be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if isinstance(value, int | float) and not (low <= value <= high and (value < below or below == math.inf)):
        left = "" if low == -math.inf else f"{low} <= "
        right = f" < {below}" if below < math.inf else f" <= {high}" if high < math.inf else ""
        raise ValueError(f"{name}: expected {left}{argument}{right}, got {value}")


def check_above_zero(name: str, **values: Number) -> None:
    """:func:`check_positive` of Python numbers; of tensors only that they are 0-d: they have no value to compare.

    >>> check_above_zero("clip", max_delta=torch.tensor(-1.0))
    >>> check_above_zero("clip", max_delta=-1.0)
    Traceback (most recent call last):
        ...
    ValueError: clip: expected max_delta > 0, got -1.0
    """
    for argument, value in values.items():
        check_number(name, argument, value)
        if isinstance(value, int | float):
            check_positive(name, **{argument: value})
