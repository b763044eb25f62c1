"""What a program was traced for: recognised quickly, and compared when it is not."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from functorch_gen import tree
from functorch_gen.transforms.context import ambient
from functorch_gen.transforms.tracing.program import Program
from functorch_gen.tree import TreeDef

__all__ = ["Recognised", "explain_retrace"]

_log = logging.getLogger("functorch_gen")

_dynamo: Any = getattr(torch._C, "_dynamo", None)
_Guards: Any = getattr(getattr(_dynamo, "guards", None), "TensorGuards", None)
"""Dynamo's check of the types, shapes, strides, dtypes and devices of many tensors at once, in C++."""


@dataclass
class Recognised:
    """The program of the last call, and the quick test whether another call is like it."""

    count: int  # positional arguments
    treedef: Any
    dicts: "_Dicts"
    guards: Any
    ambient: Any
    program: Program

    @classmethod
    def of(cls, leaves: Sequence[Any], treedef: TreeDef, count: int, program: Program) -> "Recognised | None":
        """None if the leaves are not all plain tensors, in the layout of the trace."""
        if _Guards is None or not leaves or any(type(x) is not Tensor or x.requires_grad for x in leaves):
            return None
        if [x.stride() for x in leaves] != program.plan.strides:
            return None
        sizes, strides = [list(x.shape) for x in leaves], [list(x.stride()) for x in leaves]
        guards = _Guards(*leaves, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        return cls(count, treedef, _dicts(treedef), guards, ambient(), program)

    def leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The leaves of a call, if it can go to the program as it is."""
        if kwargs or len(args) != self.count:
            return None
        arguments = [*args], {}
        try:
            found = self.treedef.flatten_up_to(arguments)  # a tenth of the time that it takes without a structure
        except ValueError:
            return None
        served = (
            self.guards.check(*found)
            and _has_dicts(arguments, self.dicts)
            and self.ambient == ambient()
            and forward_ad._current_level < 0
            and not self.program.requires_gradient()
        )
        return found if served else None


_Dicts = tuple[type, list[tuple[Any, "_Dicts"]]]


def _dicts(treedef: Any) -> _Dicts:
    """The types of the containers on the way to every dict: ``flatten_up_to`` takes one kind of dict for another."""
    children = zip(treedef.entries(), treedef.children(), strict=True) if _is_indexed(treedef.type) else ()
    inner = [(entry, _dicts(child)) for entry, child in children if child.type is not None]
    return treedef.type, [(entry, dicts) for entry, dicts in inner if dicts[1] or issubclass(dicts[0], dict)]


def _is_indexed(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple | list | dict)


def _has_dicts(x: Any, dicts: _Dicts) -> bool:
    kind, inner = dicts
    return type(x) is kind and all(_has_dicts(x[entry], below) for entry, below in inner)


def explain_retrace(name: str, key: Any, known: Sequence[Any], leaf_names: Sequence[str]) -> None:
    """Logs how this signature differs from the known one that is most like it."""
    differences = min((_differences(key, other, leaf_names) for other in known), key=len)
    _log.warning("jit: %s is traced again: %s", name, "; ".join(differences))


def _differences(key: Any, other: Any, leaf_names: Sequence[str]) -> list[str]:
    treedef, static, static_names, _, around, leaves = key
    old_treedef, old_static, old_static_names, _, old_around, old_leaves = other
    if treedef != old_treedef:
        return [_structural(treedef, old_treedef)]
    changes = [
        f"{name} is {_told(new)}, was {_told(old)}"
        for name, new, old in zip(leaf_names, leaves, old_leaves, strict=True)
        if new != old
    ]
    pairs = [*zip(static, old_static, strict=False), *zip(static_names, old_static_names, strict=False)]
    changes += [f"static argument {k!r} is {new!r}, was {old!r}" for (k, new), (_, old) in pairs if new != old]
    if around != old_around:
        changes.append(f"default dtype, device or autocast is {around}, was {old_around}")
    return changes or ["the types of static arguments differ"]


def _structural(treedef: Any, old: Any) -> str:
    """What the first difference between two structures is, by path."""
    new_paths, old_paths = (tree.paths(tree.unflatten(t, range(t.num_leaves))) for t in (treedef, old))
    added = [f"has a leaf at {_plain(path)!r}" for path in new_paths if path not in old_paths]
    missing = [f"has no leaf at {_plain(path)!r}" for path in old_paths if path not in new_paths]
    changed = [*added[:1], *missing[:1]] or ["has other containers, or other layers or settings in them"]
    return f"the structure of the arguments {' and '.join(changed)}"


def _plain(path: str) -> str:
    """Without the place among positional or keyword arguments."""
    return path.split(".", 1)[1]


def _told(leaf: Any) -> str:
    if isinstance(leaf, type):
        return leaf.__name__
    if len(leaf) == 1:
        return repr(leaf[0])
    shape, dtype, device = leaf
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"
