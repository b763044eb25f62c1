"""What the losses share: 16-bit numbers are computed in float32, shapes are compared, each example has one value."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from einops import reduce
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_floating

__all__ = [
    "along_classes",
    "check_alike",
    "check_broadcasts",
    "check_classes",
    "check_integers",
    "check_weight",
    "in_float32",
    "mean_per_example",
    "sum_per_example",
]

_P = ParamSpec("_P")


def in_float32(fun: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """``fun`` with its 16-bit arguments in float32; the result is rounded once, to the dtype they promote to."""
    compute: Callable[..., Tensor] = fun

    @functools.wraps(fun)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        leaves: list[Any] = tree.leaves((args, kwargs))
        dtypes = [x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        if all(dtype.itemsize > 2 for dtype in dtypes):
            return fun(*args, **kwargs)
        wide: Any = tree.map(_widened, (args, kwargs))
        return compute(*wide[0], **wide[1]).to(functools.reduce(torch.promote_types, dtypes))

    return wrapped


def _widened(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.is_floating_point() and x.dtype.itemsize <= 2 else x


def check_alike(name: str, **tensors: Tensor) -> None:
    """Checks that the first is floating, (b, ...), and that the others are numbers of its shape.

    Raises:
        TypeError: if one is no tensor, the first is not floating, or another is bool.
        ValueError: if a shape differs, or there is no batch axis.
    """
    (first, x), *others = tensors.items()
    check_floating(x, f"{name}: {first}")
    if x.ndim == 0:
        raise ValueError(f"{name}: {first}: expected shape (b, ...), got ()")
    for argument, y in others:
        if not isinstance(y, Tensor) or y.dtype == torch.bool:
            found = y.dtype if isinstance(y, Tensor) else type(y).__name__
            raise TypeError(f"{name}: {argument}: expected a tensor of numbers, got {found}")
        if y.shape != x.shape:
            raise ValueError(
                f"{name}: {argument}: expected shape {tuple(x.shape)}, as {first} has, got {tuple(y.shape)}"
            )


def check_classes(name: str, labels: Tensor, weight: Tensor | None = None, **scores: Tensor) -> int:
    """Checks floating scores (b, c, ...), integer labels (b, ...) and a weight (c,); returns c.

    Raises:
        TypeError: if the scores are not floating or the labels are no integers.
        ValueError: if a shape differs.
    """
    ((argument, x),) = scores.items()
    check_floating(x, f"{name}: {argument}")
    if x.ndim < 2:
        raise ValueError(f"{name}: {argument}: expected shape (b, c, ...), got {tuple(x.shape)}")
    check_integers(f"{name}: labels", labels, (x.shape[0], *x.shape[2:]))
    check_weight(name, weight, x.shape[1])
    return x.shape[1]


def check_integers(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Checks that x is a tensor of integers of this shape."""
    if not isinstance(x, Tensor) or x.is_floating_point() or x.dtype == torch.bool:
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: expected a tensor of integers, got {found}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")


def check_weight(name: str, weight: Tensor | None, classes: int) -> None:
    """Checks that a weight is a floating tensor (c,)."""
    if weight is None:
        return
    check_floating(weight, f"{name}: weight")
    if tuple(weight.shape) != (classes,):
        raise ValueError(f"{name}: weight: expected shape ({classes},), got {tuple(weight.shape)}")


def check_broadcasts(name: str, x: Tensor, **others: Any) -> None:
    """Checks that the others, where they are not None or numbers, are tensors that broadcast to the shape of x.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if one would change the shape of the result.
    """
    for argument, y in others.items():
        if y is None or isinstance(y, int | float):
            continue
        if not isinstance(y, Tensor):
            raise TypeError(f"{name}: {argument}: expected a tensor, got {type(y).__name__}")
        if y.ndim > x.ndim or any(m not in (1, n) for m, n in zip(reversed(y.shape), reversed(x.shape))):
            raise ValueError(
                f"{name}: {argument}: expected a shape that broadcasts to {tuple(x.shape)}, got {tuple(y.shape)}"
            )


def along_classes(weight: Tensor, x: Tensor) -> Tensor:
    """(c,) as it broadcasts with x, (b, c, ...)."""
    return weight.reshape(-1, *[1] * (x.ndim - 2))


def mean_per_example(x: Tensor) -> Tensor:
    """(b, ...) -> (b,)."""
    return reduce(x, "b ... -> b", "mean")


def sum_per_example(x: Tensor) -> Tensor:
    """(b, ...) -> (b,)."""
    return reduce(x, "b ... -> b", "sum")
