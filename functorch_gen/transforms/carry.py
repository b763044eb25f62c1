"""What the loops and branches ask of the trees that pass through them: tensors, of the same shapes each time."""

from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.typing import Tree

__all__ = ["as_predicate", "as_tensors", "check_alike", "steps_of"]


def as_tensors(name: str, what: str, x: Tree) -> Tree:
    """``x`` with its numbers as tensors.

    Raises:
        TypeError: if a leaf is neither; names the path.
    """
    return tree.map_with_path(lambda path, leaf: _as_tensor(name, what, path, leaf), x)


def _as_tensor(name: str, what: str, path: str, x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    if isinstance(x, bool | int | float | complex):
        return torch.as_tensor(x)
    if hasattr(x, "to_tensor"):  # jit's stand-in for a number
        return x.to_tensor()
    raise TypeError(f"{name}: expected tensors in the {what}, got {type(x).__name__} at {path!r}")


def check_alike(expected: str, given: Tree, new: Tree) -> None:
    """Raises ``ValueError`` unless ``new`` has the structure, shapes and dtypes of ``given``; names the path.

    Args:
        expected: how the message begins, as "scan: expected f to keep the carry".
    """
    if tree.structure(given) != tree.structure(new):
        try:
            tree.map(lambda *_: None, given, new)
        except ValueError as error:
            raise ValueError(f"{expected}'s structure, but {error}") from error
        raise ValueError(f"{expected}'s structure, got other types of nodes")
    for path, old, x in zip(tree.paths(given), tree.leaves(given), tree.leaves(new), strict=True):
        if old.shape != x.shape or old.dtype != x.dtype:
            want, got = f"{tuple(old.shape)} {old.dtype}", f"{tuple(x.shape)} {x.dtype}"
            raise ValueError(f"{expected} at {path!r} {want}, got {got}")


def as_predicate(name: str, what: str, x: Any) -> Tensor | bool:
    """``x`` as a bool, or as a 0-d bool tensor: numbers are True if they are not 0.

    Raises:
        TypeError: if it is no tensor or number.
        ValueError: if it is no scalar.
    """
    if isinstance(x, bool | int | float):
        return bool(x)
    if not isinstance(x, Tensor) and not hasattr(x, "to_tensor"):
        raise TypeError(f"{name}: expected {what} to be a tensor or a number, got {type(x).__name__}")
    x = x if isinstance(x, Tensor) else x.to_tensor()
    if x.ndim:
        raise ValueError(f"{name}: expected {what} to be a scalar, got shape {tuple(x.shape)}")
    return x if x.dtype == torch.bool else x != 0


def steps_of(name: str, xs: Tree, length: int | None = None) -> int:
    """The size of axis 0, which the leaves of ``xs`` share, and share with ``length`` if it is given.

    Raises:
        ValueError: if they do not, or there is neither a leaf nor a length; names the path.
        TypeError: if a leaf is no tensor; names the path.
    """
    if length is not None and (isinstance(length, bool) or not isinstance(length, int) or length < 0):
        raise ValueError(f"{name}: expected length to be an int >= 0, got {length!r}")
    steps, first = length, "length"
    for path, x in zip(tree.paths(xs), tree.leaves(xs), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected tensors in xs, got {type(x).__name__} at {path!r}")
        if not x.ndim:
            raise ValueError(f"{name}: expected an axis to loop over in xs at {path!r}, got a 0-d tensor")
        if steps is not None and x.shape[0] != steps:
            where = first if first == "length" else f"xs at {first!r}"
            raise ValueError(f"{name}: expected axes of one size, got {steps} in {where} and {x.shape[0]} at {path!r}")
        steps, first = x.shape[0], path if steps is None else first
    if steps is None:
        raise ValueError(f"{name}: expected length where xs has no leaves, got None")
    return steps
