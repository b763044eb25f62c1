"""Modules of torch.nn as pure functions."""

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from functorch_gen import tree
from functorch_gen.interop.randomness import Pure
from functorch_gen.interop.record import Record
from functorch_gen.typing import Key, Params, State

__all__ = ["ModuleFunction", "from_module"]


def from_module(module: nn.Module) -> "tuple[ModuleFunction, Params, State]":
    """A torch module as a pure function, with its parameters and buffers: ``(apply, params, state)``.

    ``apply(params, state, *args, train=False, key=None, **kwargs) -> (output, state)`` goes to ``forward`` with the
    arguments and changes nothing: each call works on objects of its own, so that threads may share it. The trees are
    copies, nested as the names are: ``{"0": {"weight": ...}}``. A parameter that occurs at several places has its first
    name only. Parameters that do not require grad are parameters too; :func:`functorch_gen.tree.partition` picks.

    ``train`` is that of ``module.train(train)``. Dropout, ``rand``, ``randn``, their ``_like``, ``uniform_`` and
    ``normal_`` draw from ``key``, the n-th in a call from ``fold_in(key, n)``; without a key dropout is the identity.
    Other draws are errors: no generator is read. BatchNorm's statistics are new values in the returned state, for each
    example under ``vmap``. A ``forward`` whose own arguments are named ``train`` or ``key`` takes those by position.

    Raises:
        TypeError: if ``module`` is no module; by ``apply``, if forward draws what no key can give.
        ValueError: if the module has uninitialised parameters, or embeddings that renormalise theirs; by ``apply``, if
            the trees have not the names and shapes of the module's. Names the path.

    >>> apply, params, state = from_module(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    >>> y, state = apply(params, state, torch.ones(4, 2), train=True)
    >>> y.shape, state["1"]["num_batches_tracked"]
    (torch.Size([4, 3]), tensor(1))
    """
    _check_module(module)
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    function = ModuleFunction(_Skeleton.of(module, False), _Skeleton.of(module, True))
    return function, _copies(params), _copies(buffers)


def _check_module(module: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"from_module: expected a torch.nn.Module, got {type(module).__name__}")
    for path, x in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(x):
            raise ValueError(
                f"from_module: expected initialised parameters, got none at {path!r}; call the module once"
            )
    for path, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) or hasattr(part, "_orig_mod"):
            raise TypeError(
                f"from_module: expected a module that is not compiled yet at {path!r}, got {type(part).__name__}"
            )
        if isinstance(part, nn.Embedding | nn.EmbeddingBag) and part.max_norm is not None:
            raise ValueError(
                f"from_module: expected max_norm=None at {path!r}, got {part.max_norm}: forward would write to params"
            )


def _copies(named: Mapping[str, Tensor]) -> dict[str, Any]:
    return tree.from_names({path: x.detach().clone() for path, x in named.items()})


class _Slot(NamedTuple):
    """One place for a tensor in a module."""

    owner: nn.Module
    attribute: str
    path: str
    name: str  # of the tensor in the trees: the path of its first place
    empty: Tensor  # what stands there


@dataclass(frozen=True, eq=False, slots=True)
class _Skeleton:
    """A copy of a module in which empty tensors stand for its parameters and buffers, one for each name.

    Without ``__dict__``: :func:`remat` and :func:`scan`, which look for tensors that a function holds, pass it by.
    """

    module: nn.Module
    params: tuple[_Slot, ...]
    buffers: tuple[_Slot, ...]

    @classmethod
    def of(cls, module: nn.Module, train: bool) -> "_Skeleton":
        tensors = [*module.parameters(), *module.buffers()]
        empty: dict[int, Any] = {id(x): _empty(x) for x in tensors}
        private = copy.deepcopy(module, empty).train(train)  # what the memo holds counts as copied
        params = _slots(private, lambda part: part._parameters)
        return cls(private, params, _slots(private, lambda part: part._buffers))

    def run(self, values: Mapping[str, Tensor], args: Any, kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """The output and the new buffers for the given tensors, by name."""
        if torch.compiler.is_dynamo_compiling():  # which follows torch's own way, and not the making of modules
            placed = {slot.path: values[slot.name] for slot in (*self.params, *self.buffers)}
            output = torch.func.functional_call(self.module, placed, args, kwargs, tie_weights=False)
            return output, {slot.name: placed[slot.path] for slot in self.buffers}
        made: dict[int, Any] = {id(slot.empty): values[slot.name] for slot in (*self.params, *self.buffers)}
        output = _rebuilt(self.module, made)(*args, **kwargs)
        return output, {slot.name: made[id(slot.owner)]._buffers[slot.attribute] for slot in self.buffers}


def _empty(x: Tensor) -> Tensor:
    empty = torch.empty_like(x, device="meta", requires_grad=False)
    return nn.Parameter(empty, x.requires_grad) if isinstance(x, nn.Parameter) else empty


def _slots(module: nn.Module, tensors: Callable[[nn.Module], Mapping[str, Tensor | None]]) -> tuple[_Slot, ...]:
    names: dict[int, str] = {}
    found = []
    for prefix, part in module.named_modules():
        for attribute, x in tensors(part).items():
            if x is not None:
                path = f"{prefix}.{attribute}" if prefix else attribute
                found.append(_Slot(part, attribute, path, names.setdefault(id(x), path), x))
    return tuple(found)


def _rebuilt(x: Any, made: dict[int, Any]) -> Any:
    """``x`` with new modules in place of its modules; ``made`` holds what stands for what, by id."""
    if isinstance(x, Tensor):
        return made.get(id(x), x)
    if isinstance(x, nn.Module):
        if id(x) not in made:
            made[id(x)] = new = object.__new__(type(x))
            for name, value in vars(x).items():
                new.__dict__[name] = _rebuilt(value, made)
        return made[id(x)]
    kind: Any = type(x)
    if kind is types.MethodType and isinstance(x.__self__, nn.Module):
        return kind(x.__func__, _rebuilt(x.__self__, made))
    if kind in (dict, OrderedDict):
        return kind((key, _rebuilt(value, made)) for key, value in x.items())
    return kind([_rebuilt(value, made) for value in x]) if kind in (list, tuple) else x


@dataclass(frozen=True, eq=False, slots=True)
class ModuleFunction:
    """A module as a function of its parameters and buffers. See :func:`from_module`."""

    evaluation: _Skeleton
    training: _Skeleton

    def __call__(
        self, params: Params, state: State, /, *args: Any, train: bool = False, key: Key | None = None, **kwargs: Any
    ) -> tuple[Any, State]:
        """The output of the module, and its buffers after the call."""
        skeleton = self.training if train else self.evaluation
        values = _checked(params, skeleton.params, "params")
        buffers = _checked(state, skeleton.buffers, "state")
        values |= {path: x.clone() for path, x in buffers.items()}  # modules write into them
        record = Record(key)
        with Pure(record):
            output, new = skeleton.run(values, args, kwargs)
        return output, tree.from_names({name: record.value(x) for name, x in new.items()})


def _checked(given: Any, slots: Iterable[_Slot], argument: str) -> dict[str, Tensor]:
    """The tensors by name; raises unless names and shapes are the module's."""
    named = tree.names(given)
    wanted = {slot.name: slot.empty.shape for slot in slots}
    for path in [*wanted, *named]:
        if path not in named:
            raise ValueError(f"from_module: expected a leaf at {path!r} in {argument}, got none")
        if path not in wanted:
            raise ValueError(f"from_module: expected no leaf at {path!r} in {argument}, got one")
        if named[path].shape != wanted[path]:
            raise ValueError(
                f"from_module: expected shape {tuple(wanted[path])} at {path!r} in {argument}, "
                f"got {tuple(named[path].shape)}"
            )
    return named
