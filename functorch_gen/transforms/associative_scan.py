"""associative_scan: all running products of an associative operation, in logarithmic depth."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.carry import check_alike
from functorch_gen.typing import Tree

__all__ = ["associative_scan"]


def associative_scan(fn: Callable[[Any, Any], Any], elems: Tree, reverse: bool = False, axis: int = 0) -> Any:
    """The running results ``e0, e0 * e1, (e0 * e1) * e2, ...`` along ``axis``, where ``a * b`` is ``fn(a, b)``.

    For n elements ``fn`` is called about 2 log2(n) times, on many at once, and does about 2 n products in all; a
    :func:`scan` would do n, one after another. Every transform holds, since it is made of calls of ``fn``.

    Args:
        fn: an associative operation on trees like ``elems``, element by element along ``axis``: it is given parts of
            them of any length.
        elems: a tree of tensors that share the size of ``axis``.
        reverse: runs from the last element to the first: ``fn(e3, e2)`` and so on; results stand in the order of
            ``elems`` all the same.
        axis: negative values count from the end of each tensor.
    Raises:
        ValueError: if sizes differ or there are no tensors, ``axis`` is out of range, or ``fn`` changes the structure,
            shapes or dtypes; names the path.
        TypeError: if a leaf is no tensor; names the path.

    Source: Blelloch 1990, Prefix sums and their applications, CMU-CS-90-190, section 1.2; ``jax.lax.associative_scan``.

    >>> associative_scan(torch.mul, torch.tensor([1, 2, 3, 4]))
    tensor([ 1,  2,  6, 24])
    """
    _check(elems, axis)
    if reverse:
        elems = tree.map(lambda x: x.flip(axis), elems)
    out = _running(fn, elems, axis)
    return tree.map(lambda x: x.flip(axis), out) if reverse else out


def _running(fn: Callable[[Any, Any], Any], elems: Tree, axis: int) -> Tree:
    """From the products of neighbours their running results, which are those at odd places; from these the even."""
    n = tree.leaves(elems)[0].shape[axis]
    if n < 2:
        return elems
    odd = _running(fn, _product(fn, _part(elems, axis, 0, n - 1, 2), _part(elems, axis, 1, n, 2)), axis)
    even = _part(elems, axis, 0, 1, 1)
    if n > 2:
        rest = _product(fn, _part(odd, axis, 0, (n - 1) // 2, 1), _part(elems, axis, 2, n, 2))
        even = tree.map(lambda a, b: torch.cat([a, b], axis), even, rest)
    return tree.map(lambda a, b: _interleaved(a, b, axis), even, odd)


def _product(fn: Callable[[Any, Any], Any], a: Tree, b: Tree) -> Tree:
    product = fn(a, b)
    check_alike("associative_scan: expected fn to keep the elements", a, product)
    return product


def _part(x: Tree, axis: int, start: int, stop: int, step: int) -> Tree:
    """``x[start:stop:step]`` along ``axis``."""
    return tree.map(lambda leaf: leaf[(slice(None),) * (axis % leaf.ndim) + (slice(start, stop, step),)], x)


def _interleaved(even: Tensor, odd: Tensor, axis: int) -> Tensor:
    """even[0], odd[0], even[1], ...; there may be one more of the even."""
    axis, n = axis % even.ndim, odd.shape[axis]
    pairs = torch.stack([even.narrow(axis, 0, n), odd], axis + 1).flatten(axis, axis + 1)
    return pairs if even.shape[axis] == n else torch.cat([pairs, even.narrow(axis, n, 1)], axis)


def _check(elems: Tree, axis: int) -> None:
    first = None
    for path, x in zip(tree.paths(elems), tree.leaves(elems), strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"associative_scan: expected tensors in elems, got {type(x).__name__} at {path!r}")
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"associative_scan: expected axis in range for {x.ndim} axes at {path!r}, got {axis}")
        first = first or (path, x.shape[axis])
        if x.shape[axis] != first[1]:
            sizes = f"{first[1]} at {first[0]!r} and {x.shape[axis]} at {path!r}"
            raise ValueError(f"associative_scan: expected axes of one size, got {sizes}")
    if first is None:
        raise ValueError("associative_scan: expected tensors in elems, got none")
