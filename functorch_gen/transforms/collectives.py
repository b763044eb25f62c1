"""Collectives: values from all along a named axis, the examples of a ``vmap`` or the processes of a group.

A name is bound by ``vmap(fun, axis_name="batch")`` or by ``with process_axis("data")``, and means the innermost axis of
that name. A tuple of names is their axes taken together, the first one slowest.

Derivatives are JAX's. A gradient taken inside the axis is that of the sum over the axis of what each example returns,
with respect to the example's own x. So ``vmap(grad(f), axis_name="batch")``, where f returns ``psum(x**2, "batch")``,
is n times 2 x: each of the n examples returns the sum, and each sum holds this x. It is what
``grad(lambda xs: vmap(f, axis_name="batch")(xs).sum())`` gives.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.collective_op import gather_op, sum_op
from functorch_gen.transforms.context import is_transformed
from functorch_gen.transforms.named_axes import Axis, AxisName, find_axes
from functorch_gen.typing import Tree

__all__ = ["all_gather", "axis_index", "axis_size", "pmax", "pmean", "pmin", "ppermute", "psum"]


def psum(x: Tree, axis_name: AxisName) -> Tree:
    """The sum over a named axis, leaf by leaf; the same for all along it.

    What does not differ between the examples of a ``vmap``, a number too, counts once for each: ``psum(1, "batch")`` is
    the size of the axis. Over processes numbers become tensors and are added up.

    Its transpose is ``psum`` of the cotangents: in ``vmap(grad(f), axis_name="batch")`` an example receives the
    derivative of what all examples return with respect to its own x, not only of what it returns itself.

    Args:
        x: a tree of tensors and numbers. Bools are counted.
        axis_name: a name or a tuple of names.
    Raises:
        NameError: if a name is not bound; lists those that are.
        TypeError: if a leaf is neither a tensor nor a number; names its path.

    Source: ``jax.lax.psum``.

    >>> from functorch_gen.transforms import vmap
    >>> vmap(lambda x: x / psum(x, "batch"), axis_name="batch")(torch.tensor([1.0, 3.0]))
    tensor([0.2500, 0.7500])
    """
    return _each("psum", x, axis_name, _sum)


def pmean(x: Tree, axis_name: AxisName) -> Tree:
    """The mean over a named axis: :func:`psum` divided by the size.

    >>> from functorch_gen.transforms import vmap
    >>> vmap(lambda x: x - pmean(x, "batch"), axis_name="batch")(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """
    size = axis_size(axis_name)
    return tree.map(lambda total: total / size, _each("pmean", x, axis_name, _sum))


def pmax(x: Tree, axis_name: AxisName) -> Tree:
    """The maximum over a named axis; its gradient is shared equally among ties.

    >>> from functorch_gen.transforms import vmap
    >>> vmap(lambda x: pmax(x, "batch"), axis_name="batch", out_dims=None)(torch.tensor([1.0, 3.0]))
    tensor(3.)
    """
    return _each("pmax", x, axis_name, lambda _, leaf, axes: _stacked(leaf, axes).amax(0))


def pmin(x: Tree, axis_name: AxisName) -> Tree:
    """The minimum over a named axis; its gradient is shared equally among ties.

    >>> from functorch_gen.transforms import vmap
    >>> vmap(lambda x: pmin(x, "batch"), axis_name="batch", out_dims=None)(torch.tensor([1.0, 3.0]))
    tensor(1.)
    """
    return _each("pmin", x, axis_name, lambda _, leaf, axes: _stacked(leaf, axes).amin(0))


def all_gather(x: Tree, axis_name: AxisName, *, axis: int = 0, tiled: bool = False) -> Tree:
    """The values along a named axis, stacked: (...) -> (n, ...); the same for all along it.

    The cotangent of an example's x is the sum of those that all examples give to their copy of it.

    Args:
        axis: where the new axis stands.
        tiled: concatenates along ``axis`` instead.
    Raises:
        ValueError: if a leaf has no such axis; names its path.

    Source: ``jax.lax.all_gather``.

    >>> from functorch_gen.transforms import vmap
    >>> pairwise = vmap(lambda x: x - all_gather(x, "batch"), axis_name="batch")
    >>> pairwise(torch.tensor([1.0, 3.0]))
    tensor([[ 0., -2.],
            [ 2.,  0.]])
    """

    def gather(path: str, leaf: Any, axes: list[Axis]) -> Tensor:
        stacked = _stacked(leaf, axes)
        places = stacked.ndim - tiled
        if not -places <= axis < places:
            raise ValueError(f"all_gather: expected axis in [{-places}, {places}) for the leaf at {path!r}, got {axis}")
        place = axis % places
        stacked = stacked.movedim(0, place)
        return stacked.flatten(place, place + 1) if tiled else stacked

    return _each("all_gather", x, axis_name, gather)


def ppermute(x: Tree, axis_name: AxisName, perm: Sequence[tuple[int, int]]) -> Tree:
    """Values sent along a named axis: ``perm`` has pairs (source, destination); zeros where nothing arrives.

    Raises:
        ValueError: if a source or destination is out of range or named twice.

    Source: ``jax.lax.ppermute``.

    >>> from functorch_gen.transforms import vmap
    >>> vmap(lambda x: ppermute(x, "batch", [(0, 1), (1, 2)]), axis_name="batch")(torch.tensor([1.0, 2.0, 3.0]))
    tensor([0., 1., 2.])
    """
    size = axis_size(axis_name)
    source = _sources(perm, size)

    def send(_: str, leaf: Any, axes: list[Axis]) -> Tensor:
        stacked = _stacked(leaf, axes)
        arrived = torch.cat([stacked, torch.zeros_like(stacked[:1])])
        table = torch.tensor(source, device=stacked.device)
        here = table.index_select(0, _position(axes).to(stacked.device).reshape(1))
        return arrived.index_select(0, here).squeeze(0)

    return _each("ppermute", x, axis_name, send)


def axis_index(axis_name: AxisName) -> Tensor:
    """The position along a named axis, from 0: () int64.

    >>> from functorch_gen.transforms import vmap
    >>> vmap(lambda x: x * axis_index("batch"), axis_name="batch")(torch.ones(3))
    tensor([0., 1., 2.])
    """
    return _position(find_axes("axis_index", axis_name))


def axis_size(axis_name: AxisName) -> int:
    """The size of a named axis.

    >>> from functorch_gen.transforms import vmap
    >>> vmap(lambda x: x / axis_size("batch"), axis_name="batch")(torch.ones(4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    return prod([axis.size for axis in find_axes("axis_size", axis_name)])


def _each(name: str, x: Tree, axis_name: AxisName, collect: Callable[[str, Any, list[Axis]], Any]) -> Tree:
    """``collect(path, leaf, axes)`` for each leaf of ``x``."""
    axes = find_axes(name, axis_name)
    if not is_transformed() and not all(axis.group for axis in axes):
        raise RuntimeError(
            f"{name}: expected the vmap that names {axis_name!r} to be active, got a call from a rule of an "
            "autograd.Function; write it with custom_vjp"
        )

    def at(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor | bool | int | float | complex) and not hasattr(leaf, "to_tensor"):
            raise TypeError(f"{name}: expected tensors and numbers, got {type(leaf).__name__} at {path!r}")
        return collect(path, leaf, axes)

    return tree.map_with_path(at, x)


def _sum(_: str, leaf: Any, axes: list[Axis]) -> Any:
    for axis in axes:
        if isinstance(leaf, Tensor) or axis.group:
            x = _as_tensor(leaf)
            leaf = sum_op(x.long() if x.dtype == torch.bool else x, axis.index, axis.size, axis.group)
        else:
            leaf = leaf * axis.size
    return leaf


def _stacked(leaf: Any, axes: list[Axis]) -> Tensor:
    """(n, ...): the values along the axes taken together."""
    x = _as_tensor(leaf)
    shape = x.shape
    for axis in reversed(axes):
        x = gather_op(x, axis.index, axis.size, axis.group)
    return x.reshape(-1, *shape) if len(axes) > 1 else x


def _position(axes: list[Axis]) -> Tensor:
    first, *rest = axes
    position = first.index
    for axis in rest:
        position = position * axis.size + axis.index
    return position


def _as_tensor(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x
    return x.to_tensor() if hasattr(x, "to_tensor") else torch.as_tensor(x)


def _sources(perm: Sequence[tuple[int, int]], size: int) -> list[int]:
    """For each destination its source; ``size`` where there is none."""
    for side, numbers in zip(("sources", "destinations"), zip(*perm, strict=True), strict=False):
        if len(set(numbers)) < len(numbers) or not all(0 <= i < size for i in numbers):
            raise ValueError(f"ppermute: expected distinct {side} in [0, {size}), got {list(numbers)}")
    table = {destination: source for source, destination in perm}
    return [table.get(i, size) for i in range(size)]
