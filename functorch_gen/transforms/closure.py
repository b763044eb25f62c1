"""Closure conversion: the tensors a function closes over become arguments, so that a rule can differentiate them."""

import copy
import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.autocast import carry_autocast
from functorch_gen.transforms.named_axes import carry_axes

__all__ = ["convert_closure"]

_Rebuild = Callable[[Sequence[Tensor], dict[int, Any]], Any]


def convert_closure(fun: Callable[..., Any]) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Callable[..., Any]]]:
    """The tensors in ``fun``'s cells, defaults, partial arguments and in the objects it holds, and ``rebuild``.

    ``rebuild(tensors)`` is ``fun`` reading those instead. Globals stay as they are. The indices of the named axes that
    are bound here are among the tensors: the names mean the same axes in what is rebuilt. Autocast is as it is here.

    >>> import torch
    >>> times = lambda w: lambda x: w * x
    >>> tensors, rebuild = convert_closure(times(torch.ones(2)))
    >>> rebuild([2 * tensors[0]])(1.0)
    tensor([2., 2.])
    """
    search = _Search()
    build = search.leaf(fun)
    rebuild = (lambda tensors: build(tensors, {})) if build and search.found else lambda tensors: fun
    tensors, rebuild = carry_axes(search.found, rebuild)
    return tensors, carry_autocast(rebuild)


class _Search:
    """Walks a function; each method returns how to rebuild what it saw, or None if it holds no tensor."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []
        self._index: dict[int, int] = {}
        self._seen: dict[int, _Rebuild | None] = {}

    def leaf(self, x: Any) -> _Rebuild | None:
        if isinstance(x, Tensor):
            return self._tensor(x)
        if isinstance(x, types.FunctionType):
            return self._shared(x, lambda: self._function(x))
        if isinstance(x, types.MethodType):
            return self._method(x)
        if isinstance(x, functools.partial):
            build = self._tree((x.func, x.args, x.keywords))
            return build and (lambda tensors, memo: _partial(*build(tensors, memo)))
        if hasattr(x, "__wrapped__"):  # a jitted function, a cached one: what it wraps holds the tensors
            return self.leaf(x.__wrapped__)
        if hasattr(x, "__dict__") and not isinstance(x, type | types.ModuleType):
            return self._shared(x, lambda: self._object(x))
        return None

    def _tensor(self, x: Tensor) -> _Rebuild:
        if id(x) not in self._index:
            self._index[id(x)] = len(self.found)
            self.found.append(x)
        i = self._index[id(x)]
        return lambda tensors, memo: tensors[i]

    def _method(self, x: types.MethodType) -> _Rebuild | None:
        function, owner = self.leaf(x.__func__), self._tree(x.__self__)
        if not function and not owner:
            return None
        return lambda tensors, memo: types.MethodType(
            function(tensors, memo) if function else x.__func__, owner(tensors, memo) if owner else x.__self__
        )

    def _tree(self, x: Any) -> _Rebuild | None:
        leaves, treedef = tree.flatten(x)
        builds = [self.leaf(leaf) for leaf in leaves]
        if not any(builds):
            return None
        pairs = list(zip(builds, leaves, strict=True))
        return lambda tensors, memo: tree.unflatten(treedef, [b(tensors, memo) if b else leaf for b, leaf in pairs])

    def _shared(self, x: Any, search: Callable[[], _Rebuild | None]) -> _Rebuild | None:
        """Searches ``x`` once, though it may be met often, or hold itself."""
        if id(x) not in self._seen:
            self._seen[id(x)] = lambda tensors, memo: memo.get(id(x), x)  # recursion: known when it is rebuilt
            self._seen[id(x)] = search()
        return self._seen[id(x)]

    def _object(self, x: Any) -> _Rebuild | None:
        fields = self._tree(vars(x))
        if not fields:
            return None

        def build(tensors: Sequence[Tensor], memo: dict[int, Any]) -> Any:
            if id(x) not in memo:
                memo[id(x)] = new = copy.copy(x)
                new.__dict__.update(fields(tensors, memo))
            return memo[id(x)]

        return build

    def _function(self, x: types.FunctionType) -> _Rebuild | None:
        cells = [self._cell(cell) for cell in x.__closure__ or ()]
        defaults, keywords = self._tree(x.__defaults__), self._tree(x.__kwdefaults__)
        if not (any(cells) or defaults or keywords):
            return None

        def build(tensors: Sequence[Tensor], memo: dict[int, Any]) -> Any:
            if id(x) not in memo:
                memo[id(x)] = new = _clone(x, cells)
                for make, cell in zip(cells, new.__closure__ or (), strict=True):
                    if make:
                        cell.cell_contents = make(tensors, memo)
                new.__defaults__ = defaults(tensors, memo) if defaults else x.__defaults__
                new.__kwdefaults__ = keywords(tensors, memo) if keywords else x.__kwdefaults__
            return memo[id(x)]

        return build

    def _cell(self, cell: Any) -> _Rebuild | None:
        try:
            return self._tree(cell.cell_contents)
        except ValueError:  # an empty cell
            return None


def _partial(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return functools.partial(function, *args, **keywords)


def _clone(x: types.FunctionType, rebuilt: list[_Rebuild | None]) -> types.FunctionType:
    """``x`` with fresh cells in place of those that are rebuilt."""
    cells = [types.CellType() if make else cell for make, cell in zip(rebuilt, x.__closure__ or (), strict=True)]
    new = types.FunctionType(x.__code__, x.__globals__, x.__name__, None, tuple(cells) or None)
    new.__dict__.update(x.__dict__)
    return new
