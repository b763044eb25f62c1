"""Arguments as flat lists of tensors: the transforms of torch.func flatten trees in another order than ours."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.context import is_differentiable
from functorch_gen.tree import TreeDef
from functorch_gen.typing import Tree

__all__ = ["Outputs", "Primals", "check_outputs", "dense", "primals_of", "tangents_of"]


class Primals(NamedTuple):
    """The differentiated leaves of a call, and how to call again with others in their place."""

    leaves: list[Tensor]
    treedef: TreeDef  # of the differentiated argument, or of the tuple of them
    call: Callable[..., Any]  # (*leaves) -> fun's result


def primals_of(
    name: str, fun: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], argnums: Any
) -> Primals:
    """Picks the arguments ``argnums`` (an int, or a tuple of ints) apart into leaves.

    Raises:
        ValueError: if an argument number is out of range or named twice.
        TypeError: if a leaf cannot be differentiated (integer, bool, None, other objects); names its path.
    """
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    positions = [_position(name, number, len(args)) for number in numbers]
    if len(set(positions)) < len(positions):
        raise ValueError(f"{name}: expected distinct argnums, got {argnums}")
    picked = tuple(args[i] for i in positions)
    for i, argument in zip(positions, picked, strict=True):
        _check_leaves(name, i, argument)
    found, treedef = tree.flatten(picked if isinstance(argnums, tuple) else picked[0])

    def call(*leaves: Tensor) -> Any:
        rebuilt = tree.unflatten(treedef, leaves)
        rebuilt = rebuilt if isinstance(argnums, tuple) else (rebuilt,)
        full = list(args)
        for i, argument in zip(positions, rebuilt, strict=True):
            full[i] = argument
        return fun(*full, **kwargs)

    return Primals([_as_tensor(x) for x in found], treedef, call)


def _position(name: str, number: Any, count: int) -> int:
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"{name}: expected argnums to be an int or a tuple of ints, got {number!r}")
    if not -count <= number < count:
        raise ValueError(f"{name}: expected argnums in range for {count} positional arguments, got {number}")
    return number % count


def _as_tensor(x: Any) -> Tensor:
    """A Python float, or jit's stand-in for one, as a 0-d tensor of the default dtype."""
    if isinstance(x, float):
        return torch.full((), x)
    return x if isinstance(x, Tensor) else x.to_tensor()


def _check_leaves(name: str, number: int, argument: Tree) -> None:
    for path in tree.none_paths(argument):
        raise TypeError(f"{name}: expected floating tensors in argument {number}, got None at {path!r}")
    for path, leaf in zip(tree.paths(argument), tree.leaves(argument), strict=True):
        if is_differentiable(leaf) or isinstance(leaf, float) or getattr(leaf, "is_traced_float", False):
            continue
        kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
        raise TypeError(f"{name}: expected floating tensors in argument {number}, got {kind} at {path!r}")


def check_outputs(name: str, result: Tree) -> None:
    """Raises ``TypeError`` if a tensor in ``result`` has no derivative; names its path."""
    found = tree.leaves(result)
    if any(isinstance(x, Tensor) and not is_differentiable(x) for x in found):
        pairs = zip(tree.paths(result), found, strict=True)
        path, x = next((p, x) for p, x in pairs if isinstance(x, Tensor) and not is_differentiable(x))
        raise TypeError(
            f"{name}: expected fun to return floating tensors, got {x.dtype} at {path!r}; return others as aux"
        )


def dense(x: Tensor) -> Tensor:
    """Forward mode writes tangents in the layout of the primal, which an expanded tensor does not have."""
    return x.contiguous() if any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)) else x


def tangents_of(name: str, primals: Tree, tangents: Tree) -> list[Tensor]:
    """The leaves of ``tangents``, which must match ``primals`` in structure, shapes and dtypes."""
    if tree.structure(primals) != tree.structure(tangents):
        tree.map(lambda *_: None, primals, tangents)  # raises, and names the path
    for path, x, v in zip(tree.paths(primals), tree.leaves(primals), tree.leaves(tangents), strict=True):
        x, v = _as_tensor(x), _as_tensor(v)
        if x.shape != v.shape or x.dtype != v.dtype:
            want, got = f"{tuple(x.shape)} {x.dtype}", f"{tuple(v.shape)} {v.dtype}"
            raise ValueError(f"{name}: expected a tangent of shape {want} at {path!r}, got {got}")
    return [_as_tensor(v) for v in tree.leaves(tangents)]


class Outputs:
    """Carries a result through torch.func, which takes tensors only: the rest is kept aside.

    ``outputs.put(result)`` inside gives the tensors, ``outputs.get(tensors)`` outside the result again.
    """

    def __init__(self) -> None:
        self.treedef: TreeDef | None = None
        self.others: list[Any] = []

    def put(self, result: Tree) -> tuple[Tensor, ...]:
        """Takes ``result`` apart; returns its tensors."""
        found, self.treedef = tree.flatten(result)
        self.others = [None if isinstance(x, Tensor) else (x,) for x in found]
        return tuple(x for x in found if isinstance(x, Tensor))

    def get(self, tensors: Sequence[Any]) -> Tree:
        """The result, with ``tensors`` in place of its own."""
        rest = iter(tensors)
        assert self.treedef is not None
        return tree.unflatten(self.treedef, [next(rest) if other is None else other[0] for other in self.others])
