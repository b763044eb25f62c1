"""vmap over trees."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.context import is_mapped
from functorch_gen.transforms.named_axes import Axis, call_with_axes, check_axis_name
from functorch_gen.typing import Tree

__all__ = ["vmap"]


def vmap(
    fun: Callable[..., Any],
    in_dims: Any = 0,
    out_dims: Any = 0,
    chunk_size: int | None = None,
    *,
    axis_name: str | None = None,
) -> Callable[..., Any]:
    """``fun`` over a batch axis of its arguments, all examples at once.

    Args:
        in_dims: the axis to map in each positional argument: an int, None (the same for all examples), or a tuple with
            one entry for each argument, whose entries may again be trees of ints and None. Keyword arguments are mapped
            over their first axis. Leaves that are no tensors are passed through.
        out_dims: where the batch axis stands in the result; a tree prefix of it. None: the output is the same for all
            examples, and is returned once.
        chunk_size: how many examples are computed at once; None: all.
        axis_name: a name for the batch axis, over which :func:`psum`, :func:`pmean`, :func:`all_gather` and the other
            collectives inside ``fun`` run.
    Raises:
        ValueError: if the mapped axes differ in size or do not exist; names the path. If nothing is mapped, or an
            output with out_dims=None is. If both chunk_size and axis_name are given: a collective needs all examples.
        RuntimeError: if ``fun`` draws from torch's global generator: pass a key for each example instead.

    >>> vmap(torch.dot, in_dims=(0, None))(torch.ones(3, 2), torch.ones(2))
    tensor([2., 2., 2.])
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"vmap: expected chunk_size >= 1, got {chunk_size}")
    if axis_name is not None:
        _check_name(axis_name, chunk_size)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = tree.flatten((args, kwargs))
        dims = _input_dims(args, kwargs, in_dims)
        at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        size = _batch_size(tree.paths((args, kwargs)), leaves, dims)
        outputs = Outputs()
        found_dims: list[int | None] = []

        def flat(*tensors: Tensor) -> tuple[Tensor, ...]:
            full = list(leaves)
            for i, x in zip(at, tensors, strict=True):
                full[i] = x
            inner_args, inner_kwargs = tree.unflatten(treedef, full)
            result = fun(*inner_args, **inner_kwargs)
            spread = _broadcast(out_dims, result, "out_dims")
            _check_outputs(tree.paths(result), tree.leaves(result), spread)
            found_dims[:] = [d for d, x in zip(spread, tree.leaves(result), strict=True) if isinstance(x, Tensor)]
            return outputs.put(result)

        chunks = chunk_size if size else None  # torch cuts no chunks from an empty batch
        mapped, tensors, tensor_dims = flat, [leaves[i] for i in at], [dims[i] for i in at]
        if axis_name is not None:
            mapped = _named(flat, axis_name, size)
            tensors, tensor_dims = [torch.arange(size, device=tensors[0].device), *tensors], [0, *tensor_dims]
        stacked = torch.func.vmap(mapped, in_dims=tuple(tensor_dims), chunk_size=chunks)(*tensors)
        return outputs.get([_place(x, d) for x, d in zip(stacked, found_dims, strict=True)])

    return wrapped


def _check_name(axis_name: object, chunk_size: int | None) -> None:
    check_axis_name("vmap", axis_name)
    if chunk_size is not None:
        raise ValueError(
            f"vmap: expected no chunk_size where the axis has a name, got {chunk_size}; collectives over "
            f"{axis_name!r} need all examples at once"
        )


def _named(flat: Callable[..., Any], axis_name: str, size: int) -> Callable[..., Any]:
    """``flat`` in which the axis has a name; its first argument is the index of the example."""

    def named(index: Tensor, *tensors: Tensor) -> Any:
        return call_with_axes({axis_name: Axis(index, size)}, flat, *tensors)

    return named


def _place(x: Tensor, dim: int | None) -> Tensor:
    """Moves the batch axis from the front to ``dim``; None: all examples are equal, one is kept."""
    return x[0] if dim is None else x.movedim(0, dim)


def _check_outputs(paths: list[str], leaves: list[Any], dims: list[int | None]) -> None:
    for path, x, dim in zip(paths, leaves, dims, strict=True):
        if not isinstance(x, Tensor):
            continue
        if dim is None and is_mapped(x):
            raise ValueError(f"vmap: expected the output at {path!r} to be the same for all examples (out_dims=None)")
        if dim is not None and not -x.ndim - 1 <= dim <= x.ndim:
            raise ValueError(f"vmap: expected out_dims in range for the output at {path!r}, got {dim}")


def _input_dims(args: tuple[Any, ...], kwargs: dict[str, Any], in_dims: Any) -> list[int | None]:
    if isinstance(in_dims, list):
        in_dims = tuple(in_dims)
    if isinstance(in_dims, tuple) and len(in_dims) != len(args):
        raise ValueError(f"vmap: expected one entry of in_dims for each of {len(args)} arguments, got {len(in_dims)}")
    return _broadcast(in_dims, args, "in_dims") + [0 for _ in tree.leaves(kwargs)]


def _broadcast(prefix: Any, full: Tree, name: str) -> list[int | None]:
    """One entry for each leaf of ``full``; an int or None in ``prefix`` stands for all leaves below it."""
    if prefix is None or isinstance(prefix, int):
        return [prefix for _ in tree.leaves(full)]
    if isinstance(prefix, dict) and isinstance(full, dict) and prefix.keys() == full.keys():
        pairs = [(prefix[key], full[key]) for key in _sorted_keys(full)]
    elif isinstance(prefix, tuple | list) and isinstance(full, tuple | list) and len(prefix) == len(full):
        pairs = list(zip(prefix, full, strict=True))
    else:
        raise ValueError(f"vmap: expected {name} to be a prefix of the tree it describes, got {prefix!r}")
    return [dim for inner, part in pairs for dim in _broadcast(inner, part, name)]


def _sorted_keys(full: dict[Any, Any]) -> list[Any]:
    """The keys in the order in which the leaves are visited."""
    keys = list(full)
    if isinstance(full, OrderedDict):
        return keys
    return [keys[i] for i in tree.leaves({key: i for i, key in enumerate(keys)})]


def _batch_size(paths: list[str], leaves: list[Any], dims: list[int | None]) -> int:
    sizes: dict[str, int] = {}
    for path, x, dim in zip(paths, leaves, dims, strict=True):
        if dim is None or not isinstance(x, Tensor):
            continue
        where = path.partition(".")[2]  # without the 0 of positional arguments, the 1 of keywords
        if not -x.ndim <= dim < x.ndim:
            raise ValueError(f"vmap: expected axis {dim} in argument {where!r}, got shape {tuple(x.shape)}")
        sizes[where] = x.shape[dim]
    if not sizes:
        raise ValueError("vmap: expected at least one tensor to map over, got none")
    (first, size), *_ = sizes.items()
    for path, other in sizes.items():
        if other != size:
            raise ValueError(
                f"vmap: expected axes of one size, got {size} in argument {first!r} and {other} in {path!r}"
            )
    return size
