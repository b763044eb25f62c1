"""What custom_vjp and custom_jvp share: the call, the arguments by position, static ones apart, the rest as leaves."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.context import is_differentiable
from functorch_gen.transforms.custom_call import Like
from functorch_gen.tree import TreeDef
from functorch_gen.typing import Tree

__all__ = ["Arguments", "CustomFunction", "Signature", "WithStatic", "match_vectors"]


class CustomFunction:
    """A function with a rule of its own, which a subclass knows."""

    def __init__(self, fun: Callable[..., Any], nondiff_argnums: int | Sequence[int]):
        functools.update_wrapper(self, fun)
        del self.__dict__["__wrapped__"]  # closure conversion shall find this object, not the function alone
        self.__name__: str = getattr(fun, "__name__", type(fun).__name__)
        self.fun = fun
        self._closes_over_tensors = False
        self.signature = Signature(type(self).__name__, fun, nondiff_argnums)
        # torch.compile writes this call into its graph as it is: of custom rules it knows the first order only
        self._in_graph: Any = torch.compiler.allow_in_graph(lambda *args: tuple(_tensors(self._run(args))))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function; its derivatives follow the rule."""
        args = self.signature.resolve(args, kwargs)
        if not torch.compiler.is_dynamo_compiling():
            return self._run(args)
        if self._closes_over_tensors:
            raise TypeError(
                f"{self.signature.name}: expected {self.__name__} and its rule to close over no tensor under "
                "torch.compile, got one; pass it as an argument, or use jit"
            )
        leaves, treedef = tree.flatten(self.fun(*args))  # for the structure; unused, it is not computed
        found = iter(self._in_graph(*args))
        return tree.unflatten(treedef, [next(found) if isinstance(x, Tensor) else x for x in leaves])

    def _run(self, args: tuple[Any, ...]) -> Any:
        return self.fun(*args)

    def _look_into(self, *rules: Callable[..., Any]) -> None:
        """Notes whether there are tensors that torch.compile would not see."""
        self._closes_over_tensors = any(convert_closure(f)[0] for f in (self.fun, *rules))


def _tensors(x: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(x) if isinstance(leaf, Tensor)]


class Signature:
    """How ``fun`` is called, and which of its arguments are static."""

    def __init__(self, name: str, fun: Callable[..., Any], nondiff_argnums: Any):
        self.name = name
        try:
            parameters = list(inspect.signature(fun).parameters.values())
        except ValueError:  # a builtin without a signature
            parameters = []
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.names = tuple(p.name for p in positional)
        self.defaults = {p.name: p.default for p in positional if p.default is not p.empty}
        numbers = (nondiff_argnums,) if isinstance(nondiff_argnums, int) else tuple(nondiff_argnums)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise ValueError(f"{name}: expected nondiff_argnums to be ints >= 0, got {nondiff_argnums!r}")
        self.nondiff = tuple(sorted(set(numbers)))

    def resolve(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position.

        Raises:
            TypeError: if one is missing, or a keyword has no position.
        """
        full, rest = list(args), dict(kwargs)
        for key in self.names[len(args) :]:
            if key in rest:
                full.append(rest.pop(key))
            elif key in self.defaults:
                full.append(self.defaults[key])
            else:
                raise TypeError(f"{self.name}: expected argument {key!r}, got none")
        if rest:
            raise TypeError(f"{self.name}: expected arguments that have a position, got keyword {next(iter(rest))!r}")
        if self.nondiff and self.nondiff[-1] >= len(full):
            raise ValueError(
                f"{self.name}: expected nondiff_argnums in range for {len(full)} arguments, got {self.nondiff[-1]}"
            )
        for number in self.nondiff:
            for path, x in zip(tree.paths(full[number]), tree.leaves(full[number]), strict=True):
                if isinstance(x, Tensor):
                    where = f" at {path!r}" if path else ""
                    raise TypeError(
                        f"{self.name}: expected no tensors in argument {number} (nondiff_argnums), got one{where}; "
                        "let it be an ordinary argument without a derivative"
                    )
        return tuple(full)

    def split(self, args: tuple[Any, ...]) -> "tuple[tuple[Any, ...], list[Tensor], Arguments]":
        """The static arguments; the tensors among the others; and these without their tensors."""
        others = [i for i in range(len(args)) if i not in self.nondiff]
        leaves, treedef = tree.flatten(tuple(args[i] for i in others))
        at = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        rest = [None if isinstance(x, Tensor) else x for x in leaves]
        return tuple(args[i] for i in self.nondiff), [leaves[i] for i in at], Arguments(others, rest, treedef, at)


@dataclass(frozen=True)
class WithStatic:
    """``fun`` of the other arguments: what is searched for tensors, and rebuilt."""

    fun: Any
    static: tuple[Any, ...]
    numbers: tuple[int, ...]  # where they stand, in ascending order

    def __call__(self, *args: Any) -> Any:
        """Puts the static arguments between the others."""
        full = list(args)
        for number, x in zip(self.numbers, self.static, strict=True):
            full.insert(number, x)
        return self.fun(*full)


@dataclass(frozen=True)
class Arguments:
    """The arguments that are not static, taken apart; it holds no tensor, as the backward pass keeps it."""

    numbers: list[int]  # their positions in the call
    leaves: list[Any]  # None in place of tensors
    treedef: TreeDef
    at: list[int]  # the places of tensors

    def fill(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """The arguments with these tensors."""
        full = list(self.leaves)
        for i, x in zip(self.at, tensors, strict=True):
            full[i] = x
        return tree.unflatten(self.treedef, full)

    def tangents(self, tangents: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The tree of tangents: 0.0 beside Python floats, None beside whatever else has none."""
        full: list[Any] = [0.0 if isinstance(x, float) else None for x in self.leaves]
        for i, t in zip(self.at, tangents, strict=True):
            full[i] = t
        return tree.unflatten(self.treedef, full)


def match_vectors(who: str, like: Tree, given: Tree) -> list[Tensor | None]:
    """The leaves of ``given`` beside those of ``like``, a tree of :class:`Like` and of others that have no derivative.

    None, and the number 0, stand for zero, for a leaf or for all that is below.

    Raises:
        ValueError: if structures, shapes or dtypes differ; names the path.
        TypeError: if a leaf is no tensor.
    """
    paths, wanted = tree.paths(like), tree.leaves(like)
    found = dict(zip(tree.paths(given), tree.leaves(given), strict=True))
    absent = tree.none_paths(given)
    unknown = [path for path in found if path not in paths]
    if unknown:
        raise ValueError(f"{who}: expected the structure of what it belongs to, got a leaf at {unknown[0]!r}")
    vectors: list[Tensor | None] = []
    for path, leaf in zip(paths, wanted, strict=True):
        above = any(path == p or path.startswith(f"{p}.") or not p for p in absent)
        if path not in found and not above and isinstance(leaf, Like):
            raise ValueError(f"{who}: expected a leaf, or None, at {path!r}, got nothing")
        vectors.append(_vector(who, path, leaf, found[path]) if path in found else None)
    return vectors


def _vector(who: str, path: str, like: Any, x: Any) -> Tensor | None:
    if not isinstance(like, Like) or (isinstance(x, int | float) and x == 0):
        return None
    where = f" at {path!r}" if path else ""
    if isinstance(x, float) and not like.shape:
        return torch.full((), x, dtype=like.dtype, device=like.device)
    if not isinstance(x, Tensor):
        raise TypeError(f"{who}: expected a tensor{where}, got {type(x).__name__}")
    if x.shape != like.shape or x.dtype != like.dtype:
        want, got = f"{tuple(like.shape)} {like.dtype}", f"{tuple(x.shape)} {x.dtype}"
        raise ValueError(f"{who}: expected {want}{where}, got {got}")
    return x if is_differentiable(x) else None
