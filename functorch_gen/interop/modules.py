"""Pure functions as modules of torch.nn."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from functorch_gen import tree
from functorch_gen.check import check_floating
from functorch_gen.interop.pure import ModuleFunction
from functorch_gen.structure import flatten_plain, paths_plain, unflatten_plain
from functorch_gen.typing import Params, State

__all__ = ["to_module"]


def to_module(fun: Callable[..., Any], params: Params, state: State | None = None) -> nn.Module:
    """A layer, or another pure function, as a torch module with the parameters and buffers of the trees.

    ``module(*args, **kwargs)`` is ``fun(params, *args, **kwargs)``. With a state it is the first result of
    ``fun(params, state, *args, train=module.training, **kwargs)``, whose second is written into the buffers. Names are
    the trees', so ``state_dict`` and ``torch.optim`` work as usual. The module owns copies; one tensor at two places of
    ``params`` stays one parameter. It copies and pickles if ``fun`` does.

    Args:
        fun: a layer, what :func:`from_module` returns, or any function of that form.
    Raises:
        TypeError: if a leaf of ``params`` is not floating, or one of ``state`` no tensor; names its path.
        ValueError: if a path stands in both trees; by the module, if ``fun`` returns a state of another structure.

    >>> from functorch_gen import nn, random
    >>> layer = nn.Linear(2, 3)
    >>> module = to_module(layer, layer.init(random.key(0)))
    >>> module(torch.ones(1, 2)).shape, sorted(module.state_dict())
    (torch.Size([1, 3]), ['bias', 'weight'])
    """
    if state is None and isinstance(fun, ModuleFunction):
        state = {}
    return _FunctionModule(fun, params, state)


class _Place(nn.Module):
    """A node of the trees."""


class _FunctionModule(_Place):
    def __init__(self, fun: Callable[..., Any], params: Params, state: State | None):
        super().__init__()
        self._fun = fun
        self._is_stateful = state is not None
        leaves, self._params_structure = flatten_plain(params)
        buffers, self._state_structure = flatten_plain({} if state is None else state)
        self._param_paths, self._buffer_paths = paths_plain(self._params_structure), paths_plain(self._state_structure)
        own: dict[int, nn.Parameter] = {}
        for path, x in zip(self._param_paths, leaves, strict=True):
            check_floating(x, f"to_module: params at {path!r}")
            own.setdefault(id(x), nn.Parameter(x.detach().clone()))
            node, name = self._node(path)
            node.register_parameter(name, own[id(x)])
        for path, x in zip(self._buffer_paths, buffers, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"to_module: expected a tensor in state at {path!r}, got {type(x).__name__}")
            if path in self._param_paths:
                raise ValueError(f"to_module: expected {path!r} in params or in state, got it in both")
            node, name = self._node(path)
            node.register_buffer(name, x.detach().clone())

    def _node(self, path: str) -> tuple[nn.Module, str]:
        """The module that holds the leaf, made where it is not there yet, and the leaf's name in it."""
        *parents, name = path.split(".")
        node: nn.Module = self
        for parent in parents:
            if parent not in node._modules:
                node.add_module(parent, _Place())
            node = node.get_submodule(parent)
        return node, name

    def _leaves(self, paths: list[str]) -> list[Tensor]:
        return [functools.reduce(getattr, path.split("."), self) for path in paths]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the function with the module's tensors."""
        params = unflatten_plain(self._params_structure, self._leaves(self._param_paths))
        if not self._is_stateful:
            return self._fun(params, *args, **kwargs)
        buffers = self._leaves(self._buffer_paths)
        state = unflatten_plain(self._state_structure, buffers)
        output, new = self._fun(params, state, *args, train=self.training, **kwargs)
        with torch.no_grad():
            tree.map(lambda buffer, x: buffer.copy_(x), state, new)
        return output
