"""The structure of a tree in plain Python: stands in for optree inside ``torch.compile``, which cannot trace it.

The order of the leaves is optree's.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from functorch_gen.typing import Tree

__all__ = ["STATIC", "Structure", "flatten_plain", "paths_plain", "unflatten_plain"]

STATIC: set[type] = set()
"""The types whose objects belong to the structure of a tree; :func:`functorch_gen.tree.register_static` adds to it."""


class Structure(NamedTuple):
    """One node and what is below it.

    >>> flatten_plain((1, None))[1]
    Structure(tuple, (0, 1), (*, None))
    """

    kind: type | None  # of the node; None for a leaf
    entries: tuple[Any, ...]  # keys, indices or field names; of a static node, itself
    children: tuple["Structure", ...]

    def __repr__(self) -> str:
        if self.kind is None or self.kind is type(None):
            return "*" if self.kind is None else "None"
        return f"Structure({self.kind.__name__}, {self.entries}, {self.children})"


def _open(node: Tree) -> tuple[tuple[Any, ...], tuple[Tree, ...]] | None:
    """The entries and the children of a node, None for a leaf."""
    kind = type(node)
    if node is None:
        return (), ()
    if kind in STATIC:
        return (node,), ()
    if kind is dict or kind is OrderedDict:
        keys = sorted(node) if kind is dict else list(node)
        return tuple(keys), tuple([node[key] for key in keys])
    if kind is list or kind is tuple:
        return tuple(range(len(node))), tuple(node)
    fields = getattr(node, "_fields", None)  # of the node: Dynamo of torch 2.11 cannot ask its class
    if isinstance(node, tuple) and fields is not None:
        return tuple(fields), tuple(node)
    return None


def flatten_plain(tree: Tree) -> tuple[list[Any], Structure]:
    """The leaves and the structure of a nest of dict, list, tuple, NamedTuple and None.

    >>> flatten_plain({"b": 2, "a": [1, None]})
    ([1, 2], Structure(dict, ('a', 'b'), (Structure(list, (0, 1), (*, None)), *)))
    """
    node = _open(tree)
    if node is None:
        return [tree], Structure(None, (), ())
    entries, children = node
    leaves: list[Any] = []
    below: list[Structure] = []
    for child in children:
        found, structure = flatten_plain(child)
        leaves.extend(found)
        below.append(structure)
    return leaves, Structure(type(tree), entries, tuple(below))


def unflatten_plain(structure: Structure, leaves: Iterable[Any]) -> Tree:
    """Inverse of :func:`flatten_plain`.

    Raises:
        ValueError: if there are fewer or more leaves than places.

    >>> unflatten_plain(flatten_plain({"b": 0, "a": [0, None]})[1], [1, 2])
    {'a': [1, None], 'b': 2}
    """
    leaves = list(leaves)
    places = len(paths_plain(structure))
    if len(leaves) != places:
        raise ValueError(f"tree.unflatten: expected {places} leaves, got {len(leaves)}")
    return _build(structure, iter(leaves))


def _build(structure: Structure, leaves: Iterator[Any]) -> Tree:
    kind, entries = structure.kind, structure.entries
    if kind is None:
        return next(leaves)
    if kind is type(None):
        return None
    if kind in STATIC:
        return entries[0]
    children = [_build(child, leaves) for child in structure.children]
    if kind is dict or kind is OrderedDict:
        return kind(zip(entries, children, strict=True))
    if kind is list or kind is tuple:
        return kind(children)
    return kind(*children)


def paths_plain(structure: Structure, path: str = "") -> list[str]:
    """The dotted path of every leaf.

    >>> paths_plain(flatten_plain({"b": 0, "a": [0, None]})[1])
    ['a.0', 'b']
    """
    if structure.kind is None:
        return [path]
    if structure.kind in STATIC:
        return []
    prefix = f"{path}." if path else ""
    found: list[str] = []
    for entry, child in zip(structure.entries, structure.children, strict=True):
        found.extend(paths_plain(child, f"{prefix}{entry}"))
    return found
