"""What a rematerialised function keeps: policies, and the two modes that keep values and put them back."""

import contextvars
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.context import functorch
from functorch_gen.typing import Tree

__all__ = ["Policy", "Recorder", "Replayer", "Tape", "checkpoint_name", "dots_saveable", "save_only_these_names"]

_ATEN = torch.ops.aten
_DOTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution")
_NO_WORK = {_ATEN.detach.default, _ATEN.alias.default, torch.ops.prim.device.default}
"""Autograd's own operations, which come and go with its modes."""


@dataclass(frozen=True)
class Policy:
    """What :func:`remat` saves: the values named, and the results of the operations listed.

    >>> both = Policy(names=frozenset({"hidden"}), operations=dots_saveable.operations)
    >>> torch.ops.aten.mm.default in both.operations
    True
    """

    names: frozenset[str] = frozenset()
    operations: frozenset[Any] = frozenset()


dots_saveable = Policy(operations=frozenset(getattr(_ATEN, name).default for name in _DOTS))
"""Saves the results of matrix products and convolutions: the rest is cheap to compute again."""


def save_only_these_names(*names: str) -> Policy:
    """Saves the values that :func:`checkpoint_name` gave one of these names.

    >>> sorted(save_only_these_names("attention", "mlp").names)
    ['attention', 'mlp']
    """
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"save_only_these_names: expected strings, got {type(name).__name__}")
    return Policy(names=frozenset(names))


_recorders: contextvars.ContextVar[tuple["Recorder", ...]] = contextvars.ContextVar("recorders", default=())


def checkpoint_name(x: Tree, name: str) -> Tree:
    """``x``, known as ``name`` to the policies of the :func:`remat` that it is computed in.

    What is saved is the result of the operation that made the value; where that is a view, of the one whose memory it
    looks at. A value made by writing in place is computed again.

    >>> checkpoint_name(torch.ones(2), "mlp")
    tensor([1., 1.])
    """
    if not torch.compiler.is_dynamo_compiling():
        for recorder in _recorders.get():
            if name in recorder.policy.names:
                for leaf in tree.leaves(x):
                    if isinstance(leaf, Tensor):
                        recorder.keep(_physical(leaf))
    return x


@dataclass
class Tape:
    """The operations whose results are saved, by :class:`_History`, and how their tensors make up the results."""

    operations: dict[int, Outputs] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """How many tensors are saved."""
        return sum(outputs.others.count(None) for outputs in self.operations.values())


class _History(TorchDispatchMode):
    """Names each operation by all that ran before it, which two runs of one function have in common.

    It stands below the transforms, where one operation is one kernel. Where a second run takes another way (autograd
    may decompose differently) the names differ from there on, and nothing is mistaken for what it is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.so_far = 0

    def name(self, func: Any, args: Any, kwargs: Any) -> int:
        if func not in _NO_WORK:
            self.so_far = hash((self.so_far, func, _signature(args), _signature(kwargs)))
        return self.so_far


def _signature(x: Any) -> Any:
    """What is comparable of an operation's arguments."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.dtype
    if isinstance(x, list | tuple):
        return tuple(_signature(y) for y in x)
    if isinstance(x, dict):
        return tuple((key, _signature(x[key])) for key in sorted(x))
    return x if isinstance(x, int | float | complex | str | torch.dtype | None) else type(x)


class Recorder(_History):
    """Runs operations and keeps what ``policy`` says: ``values``, in the order of ``tape.operations``."""

    def __init__(self, policy: Policy, tape: Tape):
        super().__init__()
        self.policy, self.tape = policy, tape
        self._saved: dict[int, tuple[Outputs, tuple[Tensor, ...]]] = {}
        self._made: dict[int, tuple[int, Any] | None] = {}  # storage -> the operation that made it, weakly its result

    def __enter__(self) -> "Recorder":
        self._token = _recorders.set((*_recorders.get(), self))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _recorders.reset(self._token)
        self.tape.operations = {name: outputs for name, (outputs, _) in self._saved.items()}

    @property
    def values(self) -> list[Tensor]:
        """What was saved."""
        return [x for _, tensors in self._saved.values() for x in tensors]

    def keep(self, x: Tensor) -> None:
        """Saves the result of the operation that made the memory of ``x``."""
        made = self._made.get(_storage(x))
        if made is None:
            return
        name, refs = made
        result = tree.map(lambda ref: ref() if isinstance(ref, weakref.ref) else ref, refs)
        self._save(name, result)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes here."""
        kwargs = kwargs or {}
        name = self.name(func, args, kwargs)
        result = func(*args, **kwargs)
        if func._schema.is_mutable:
            self._forget(args, kwargs)
            return result
        given = {_storage(x) for x in _tensors((args, kwargs))}
        new = [x for x in _tensors(result) if _storage(x) not in given]
        if new:
            refs = tree.map(lambda x: weakref.ref(x) if isinstance(x, Tensor) else x, result)
            self._made.update({_storage(x): (name, refs) for x in new})
            if func in self.policy.operations:
                self._save(name, result)
        return result

    def _save(self, name: int, result: Any) -> None:
        outputs = Outputs()
        self._saved[name] = (outputs, outputs.put(result))

    def _forget(self, args: Any, kwargs: Any) -> None:
        """What was written to is no longer what its operation made."""
        touched = {_storage(x) for x in _tensors((args, kwargs))}
        for storage in touched:
            self._made[storage] = None
        for name, (_, tensors) in list(self._saved.items()):
            if any(_storage(x) in touched for x in tensors):
                del self._saved[name]


class Replayer(_History):
    """Puts saved values in the place of the operations that made them."""

    def __init__(self, tape: Tape, values: Sequence[Tensor]):
        super().__init__()
        self._results: dict[int, Any] = {}
        rest = iter(values)
        for name, outputs in tape.operations.items():
            count = outputs.others.count(None)
            self._results[name] = outputs.get([_physical(next(rest)) for _ in range(count)])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every operation passes here."""
        kwargs = kwargs or {}
        name = self.name(func, args, kwargs)
        if func not in _NO_WORK and name in self._results:
            return self._results[name]
        return func(*args, **kwargs)


def _physical(x: Tensor) -> Tensor:
    """What is under the wrappers of the active transforms."""
    while functorch.is_functorch_wrapped_tensor(x):
        x = functorch.get_unwrapped(x)
    return x


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(x) if isinstance(leaf, Tensor)]
