"""What is chosen by name: leaves by globs on their path, entries of nested states."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_choice
from functorch_gen.leaves import map_same
from functorch_gen.typing import Params, State, Tree

__all__ = ["Labels", "Mask", "as_tensor", "get", "labels_by_path", "resolve_mask", "set"]

Mask: TypeAlias = str | Sequence[str] | Tree | Callable[[Params], Tree]
"""Which leaves: a glob on the path, several globs, a tree of bools, or a function from parameters to one."""

Labels: TypeAlias = Mapping[str, str] | Tree | Callable[[Params], Tree]
"""A label for each leaf: a dict from globs to labels (the first that matches), a tree, or a function to one."""


# Leaves.


def resolve_mask(name: str, mask: Mask, params: Params) -> Tree:
    """The mask as a tree of bools, on behalf of ``name``.

    Raises:
        ValueError: if a glob matches no path.

    >>> resolve_mask("adamw", "*weight", {"bias": 0, "weight": 0})
    {'bias': False, 'weight': True}
    """
    if callable(mask):
        return mask(params)
    globs = (mask,) if isinstance(mask, str) else mask
    if not (isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs)):
        return mask
    found = _by_glob(f"{name}: expected mask", dict.fromkeys(globs, True), tree.paths(params))
    return tree.unflatten(tree.structure(params), [value or False for value in found])


def labels_by_path(name: str, labels: Labels, params: Params, known: Mapping[str, Any]) -> dict[str, str]:
    """The label of each path, one of ``known``, on behalf of ``name``.

    Raises:
        ValueError: if a glob matches no path, or a path has no label or an unknown one.

    >>> labels_by_path("muon", {"*bias": "adam", "*": "muon"}, {"bias": 0, "weight": 0}, {"adam": 0, "muon": 0})
    {'bias': 'adam', 'weight': 'muon'}
    """
    labels = labels(params) if callable(labels) else labels
    paths = tree.paths(params)
    if isinstance(labels, Mapping) and all(isinstance(label, str) for label in labels.values()):
        found = _by_glob(f"{name}: expected a glob of the labels", labels, paths)
    else:
        found = tree.leaves(tree.map(lambda _, label: label, params, labels))
    for path, label in zip(paths, found, strict=True):
        check_choice(name, f"the label of {path!r}", label, known)
    return dict(zip(paths, found, strict=True))


def _by_glob(what: str, values: Mapping[str, Any], paths: list[str]) -> list[Any]:
    """The value of the first glob that matches each path; None where none does."""
    for glob in values:
        if not any(_matches(path, glob) for path in paths):
            raise ValueError(f"{what} to match a path, got {glob!r} among {', '.join(paths)}")
    return [next((value for glob, value in values.items() if _matches(path, glob)), None) for path in paths]


@torch.compiler.assume_constant_result
def _matches(path: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(path, glob)


# Entries.


def get(state: State, name: str) -> Any:
    """The entry of that name anywhere in a state: a field, else a key of a dict; or a state by its type.

    Args:
        name: ``"mu"``, ``"ScaleByAdamState"``, or as much of the end of a path as tells it apart, ``"slow.0.mu"``.
    Raises:
        KeyError: if there is none, or more than one; lists their paths.

    >>> from functorch_gen import optim
    >>> get(optim.chain(optim.clip(1.0), optim.adam(0.1)).init({"weight": torch.zeros(2)}), "mu")
    {'weight': tensor([0., 0.])}
    """
    return _find(state, name)[1]


def set(state: State, **values: Any) -> State:
    """The state with other values of the entries that :func:`get` finds by these names.

    Args:
        values: numbers, or trees like the old ones; they take the old dtypes, so that nothing is traced again.
    Raises:
        KeyError: as :func:`get`.
        ValueError: if structure or shapes are others than before.

    >>> from functorch_gen import optim
    >>> tx = optim.inject_hyperparams(optim.sgd)(learning_rate=0.1)
    >>> set(tx.init([torch.zeros(2)]), learning_rate=0.5).hyperparams
    {'learning_rate': tensor(0.5000)}
    """
    for name, value in values.items():
        path, old = _find(state, name)
        named = tree.names(map_same("set", lambda _, new: new, old, tree.map(as_tensor, old, value)))
        new = {f"{path}.{below}" if below else path: x for below, x in named.items()}
        state = tree.map_with_path(lambda at, x, new=new: new.get(at, x), state)
    return state


def as_tensor(like: Tensor, value: Any) -> Tensor:
    """A number or a tensor in the dtype of ``like``, a number in its shape too.

    >>> as_tensor(torch.zeros((), dtype=torch.float64), 0.5)
    tensor(0.5000, dtype=torch.float64)
    """
    return (value if isinstance(value, Tensor) else torch.zeros_like(like) + value).to(like.dtype)


def _find(state: State, name: str) -> tuple[str, Any]:
    found = _entries(state, name)
    found = [entry for entry in found if entry[2]] or found
    if len(found) != 1:
        at = f"those at {', '.join(path for path, *_ in found)}" if found else "none"
        raise KeyError(f"get: expected one entry {name!r} in the state, got {at}")
    return found[0][:2]


def _entries(node: Tree, name: str, path: str = "", is_field: bool = False) -> list[tuple[str, Any, bool]]:
    """Path, value and whether it is a field, of the entries of that name; nothing is looked for inside them."""
    fields = getattr(node, "_fields", None)
    if path and f".{path}".endswith(f".{name}"):
        return [(path, node, is_field)]
    if fields is not None and type(node).__name__ == name:
        return [(path, node, True)]
    if not isinstance(node, (dict, list, tuple)):
        return []
    children = node if isinstance(node, dict) else dict(zip(fields or range(len(node)), node, strict=True))
    prefix = f"{path}." if path else ""
    return [e for key, x in children.items() for e in _entries(x, name, f"{prefix}{key}", fields is not None)]
