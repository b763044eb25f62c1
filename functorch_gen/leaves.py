"""What optimizers and averages ask of trees: floating leaves, equal shapes, at least float32."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_floating
from functorch_gen.typing import Tree

__all__ = ["at_least_float32", "check_params", "copies", "map_same", "scalar_zero"]


def check_params(name: str, params: Tree) -> None:
    """Checks that every leaf is a floating-point tensor.

    Raises:
        TypeError: naming the path of the first leaf that is not.

    >>> check_params("adam", {"embed": {"index": torch.arange(3)}})
    Traceback (most recent call last):
        ...
    TypeError: adam: params at 'embed.index': expected a floating-point tensor, got torch.int64
    """
    leaves = tree.leaves(params)
    if not all(isinstance(x, Tensor) and x.is_floating_point() for x in leaves):
        for path, x in zip(tree.paths(params), leaves, strict=True):
            check_floating(x, f"{name}: params at {path!r}")


def map_same(name: str, f: Callable[..., Tensor], first: Tree, *rest: Tree) -> Tree:
    """Applies ``f`` to the leaves of trees of one structure and one set of shapes; nothing is broadcast.

    Raises:
        ValueError: if structures or shapes differ; names the first path that does.

    >>> map_same("sgd", torch.add, {"bias": torch.zeros(2)}, {"bias": torch.zeros(1)})
    Traceback (most recent call last):
        ...
    ValueError: sgd: expected shape (2,) at 'bias', got (1,)
    """

    def apply(x: Tensor, *others: Tensor) -> Tensor:
        if any(y.shape != x.shape for y in others):
            raise ValueError(f"{name}: {_first_difference(first, *rest)}")
        return f(x, *others)

    return tree.map(apply, first, *rest)


def _first_difference(first: Tree, *rest: Tree) -> str:
    columns = [tree.leaves(other) for other in (first, *rest)]
    rows = zip(tree.paths(first), *columns, strict=True)
    return next(
        f"expected shape {tuple(x.shape)} at {path!r}, got {tuple(y.shape)}"
        for path, x, *others in rows
        for y in others
        if x.shape != y.shape
    )


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is when its precision is higher: 0.999 is 1 in bfloat16.

    >>> at_least_float32(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scalar_zero(params: Tree, dtype: torch.dtype | None = None) -> Tensor:
    """A 0-d zero where the parameters live, batched as they are under ``vmap``: -> ().

    Args:
        dtype: by default the widest among the parameters, at least float32.

    >>> scalar_zero({"bias": torch.ones(2, dtype=torch.float64)})
    tensor(0., dtype=torch.float64)
    """
    leaves: list[Any] = tree.leaves(params)
    if dtype is None:
        dtype = torch.float32
        for x in leaves:
            dtype = torch.promote_types(dtype, x.dtype)
    return leaves[0].new_zeros((), dtype=dtype) if leaves else torch.zeros((), dtype=dtype)


def copies(params: Tree) -> Tree:
    """In at least float32 and in memory of its own, since a state may be donated.

    >>> copies([torch.ones(1, dtype=torch.bfloat16)])
    [tensor([1.])]
    """
    return tree.map(lambda p: at_least_float32(p).clone(), params)
