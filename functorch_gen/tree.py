"""Functions on trees of tensors: nests of dict, list, tuple, NamedTuple; ``None`` is an empty tree.

Dict keys are visited in sorted order. The path of a leaf joins keys, indices and field names with dots:
``"blocks.0.conv1.weight"``. Two trees are compared before they are combined, and the error names the first
path that differs. Everything here also traces inside ``torch.compile``, where :mod:`functorch_gen.structure` stands in
for optree.
"""

import builtins
import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import optree
import torch
from torch import Tensor
from torch.utils import _pytree  # torch.vmap, make_fx and torch.compile flatten by it

from functorch_gen.check import check_floating
from functorch_gen.structure import STATIC, Structure, flatten_plain, paths_plain, unflatten_plain
from functorch_gen.typing import Number, Tree

__all__ = [
    "TreeDef",
    "add",
    "add_scaled",
    "all_finite",
    "allclose",
    "average",
    "cast",
    "clip",
    "equal",
    "flatten",
    "from_names",
    "leaves",
    "lerp",
    "map",
    "map_with_path",
    "merge",
    "mul",
    "names",
    "nbytes",
    "none_paths",
    "norm",
    "ones_like",
    "partition",
    "paths",
    "ravel",
    "register_static",
    "scale",
    "size",
    "stack",
    "structure",
    "sub",
    "sum",
    "to",
    "unflatten",
    "unstack",
    "vdot",
    "where",
    "zeros_like",
]

_T = TypeVar("_T")

TreeDef: TypeAlias = optree.PyTreeSpec | Structure
"""The structure of a tree without its leaves; hashable, comparable."""

Select: TypeAlias = str | Sequence[str] | Callable[[str], bool]
"""Which paths: a glob (``"*.bias"``), several globs, or a predicate on the path."""

_NAMESPACE = "functorch_gen"  # of the nodes registered here, in optree's registry


# Structure.


def flatten(tree: Tree) -> tuple[list[Any], TreeDef]:
    """Takes a tree apart: its leaves in the order of its paths, and its structure.

    >>> flatten({"b": 2, "a": [1, None]})
    ([1, 2], PyTreeSpec({'a': [*, None], 'b': *}))
    """
    if torch.compiler.is_dynamo_compiling():
        return flatten_plain(tree)
    found, treedef, *_ = optree.tree_flatten(tree, namespace=_NAMESPACE)
    return found, treedef


def unflatten(treedef: TreeDef, leaves: Iterable[Any]) -> Tree:
    """Inverse of :func:`flatten`.

    Raises:
        ValueError: if there are fewer or more leaves than places.
        TypeError: inside ``torch.compile``, for a structure that was made outside.

    >>> unflatten(structure({"a": 0, "b": 0}), [1, 2])
    {'a': 1, 'b': 2}
    """
    if isinstance(treedef, Structure):
        return unflatten_plain(treedef, leaves)
    if torch.compiler.is_dynamo_compiling():
        raise TypeError("tree.unflatten: expected a structure made inside torch.compile, got one made outside")
    leaves = list(leaves)
    if len(leaves) != treedef.num_leaves:
        raise ValueError(f"tree.unflatten: expected {treedef.num_leaves} leaves, got {len(leaves)}")
    return optree.tree_unflatten(treedef, leaves)


def leaves(tree: Tree) -> list[Any]:
    """The leaves, in the order of :func:`paths`.

    >>> leaves({"b": 2, "a": (1,)})
    [1, 2]
    """
    return flatten(tree)[0]


def structure(tree: Tree) -> TreeDef:
    """The structure alone.

    >>> structure((1, 2)) == structure((3, 4))
    True
    """
    return flatten(tree)[1]


def paths(tree: Tree) -> list[str]:
    """The dotted path of every leaf; the path of a bare leaf is empty.

    >>> paths({"b": 2, "a": [1, 1]})
    ['a.0', 'a.1', 'b']
    """
    if torch.compiler.is_dynamo_compiling():
        return paths_plain(flatten_plain(tree)[1])
    return list(_paths(tree, ""))


def _paths(node: Tree, path: str) -> Iterator[str]:
    if optree.tree_is_leaf(node, namespace=_NAMESPACE):
        yield path
    else:
        children, _, entries, *_ = optree.tree_flatten_one_level(node, namespace=_NAMESPACE)
        for entry, child in zip(getattr(node, "_fields", entries), children, strict=True):
            yield from _paths(child, f"{path}.{entry}" if path else str(entry))


def register_static(kind: type[_T]) -> type[_T]:
    """Makes objects of a class part of the structure of trees: they are no leaves, and two trees must agree in them.

    Args:
        kind: a class with equality and hash, a frozen dataclass say. For torch's own transforms it is a constant too.
    Returns:
        ``kind``, for use as a decorator. As ``jax.tree_util.register_static``.

    >>> from dataclasses import dataclass
    >>> @register_static
    ... @dataclass(frozen=True)
    ... class Unit:
    ...     name: str
    >>> map(lambda x: 2 * x, {"length": 3, "unit": Unit("cm")})
    {'length': 6, 'unit': Unit(name='cm')}
    """
    node: Any = kind

    def rebuild(itself: Any, children: Any) -> Any:
        return itself

    optree.register_pytree_node(node, lambda x: ((), x), rebuild, namespace=_NAMESPACE)
    _pytree.register_constant(kind)
    STATIC.add(kind)
    return kind


def none_paths(tree: Tree) -> list[str]:
    """The dotted paths of every None, which is no leaf.

    >>> none_paths({"a": None, "b": 1})
    ['a']
    """
    with_none = paths(optree.tree_map(lambda _: 0, tree, none_is_leaf=True, namespace=_NAMESPACE))
    return [path for path in with_none if path not in set(paths(tree))] if len(with_none) > len(leaves(tree)) else []


def _rows(name: str, tree: Tree, others: Sequence[Tree]) -> tuple[list[tuple[Any, ...]], TreeDef]:
    """The leaves of trees of one structure side by side, one row a path, and the structure."""
    found, treedef = flatten(tree)
    columns = [found]
    for other in others:
        column, structure_of_other = flatten(other)
        if structure_of_other != treedef:
            raise ValueError(f"{name}: {_first_difference(tree, other)}")
        columns.append(column)
    return list(zip(*columns, strict=True)), treedef


def _first_difference(tree: Tree, other: Tree) -> str:
    ours, theirs = paths(tree), paths(other)
    for path in ours:
        if path not in theirs:
            return f"expected a leaf at {path!r} in every tree, got none there in one"
    for path in theirs:
        if path not in ours:
            return f"expected no leaf at {path!r} (the first tree has none there), got one"
    ours, theirs = dict(_kinds(tree, "")), dict(_kinds(other, ""))
    for path in {**ours, **theirs}:
        if ours.get(path) != theirs.get(path):
            return f"expected {ours.get(path, 'nothing')} at {path!r}, got {theirs.get(path, 'nothing')}"
    return f"expected trees of one structure, got {structure(tree)} and {structure(other)}"


def _kinds(node: Tree, path: str) -> Iterator[tuple[str, str]]:
    """The path and the type of every node that is no leaf."""
    if not optree.tree_is_leaf(node, namespace=_NAMESPACE):
        yield path, type(node).__name__
        children, _, entries, *_ = optree.tree_flatten_one_level(node, namespace=_NAMESPACE)
        for entry, child in zip(getattr(node, "_fields", entries), children, strict=True):
            yield from _kinds(child, f"{path}.{entry}" if path else str(entry))


def map(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies ``f`` to the leaves of trees of one structure.

    Raises:
        ValueError: if the structures differ; names the first path that does.

    >>> map(lambda x, y: x + y, {"a": 1, "b": 2}, {"a": 10, "b": 20})
    {'a': 11, 'b': 22}
    """
    rows, treedef = _rows("tree.map", tree, rest)
    return unflatten(treedef, [f(*row) for row in rows])


def map_with_path(f: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """Applies ``f(path, leaf, ...)`` to the leaves of trees of one structure.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": [1, 2]})
    {'a': ['a.0=1', 'a.1=2']}
    """
    rows, treedef = _rows("tree.map_with_path", tree, rest)
    return unflatten(treedef, [f(path, *row) for path, row in zip(paths(tree), rows, strict=True)])


def names(tree: Tree) -> dict[str, Any]:
    """The leaves by path: ``{"blocks.0.conv1.weight": tensor}``.

    Raises:
        ValueError: if two leaves share a path (a key that contains a dot, say).

    >>> names({"layer": {"weight": 1, "bias": 0}})
    {'layer.bias': 0, 'layer.weight': 1}
    """
    found: dict[str, Any] = {}
    for path, leaf in zip(paths(tree), leaves(tree), strict=True):
        if path in found:
            raise ValueError(f"tree.names: expected one leaf at {path!r}, got two")
        found[path] = leaf
    return found


def from_names(named: Mapping[str, Any], like: Tree | None = None) -> Tree:
    """Inverse of :func:`names`: nested dicts, or the structure of ``like`` when it is given.

    Raises:
        ValueError: if a path is both a leaf and a prefix of another, or ``like`` has other paths; names the path.

    >>> from_names({"layer.weight": 1, "layer.bias": 0})
    {'layer': {'weight': 1, 'bias': 0}}
    >>> from_names({"0": 1, "1": 2}, like=[0, 0])
    [1, 2]
    """
    if like is not None:
        wanted = names(like)
        for path in [*wanted, *named]:
            if path not in named:
                raise ValueError(f"tree.from_names: expected a leaf at {path!r}, got none")
            if path not in wanted:
                raise ValueError(f"tree.from_names: expected no leaf at {path!r}, got one")
        return unflatten(structure(like), [named[path] for path in wanted])
    if list(named) == [""]:
        return named[""]
    tree: dict[str, Any] = {}
    for path, leaf in named.items():
        *parents, last = path.split(".")
        node = tree
        for depth, parent in enumerate(parents, 1):
            above = ".".join(parents[:depth])
            if above in named:
                raise ValueError(f"tree.from_names: expected no leaf above {path!r}, got one at {above!r}")
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


# Arithmetic.


def zeros_like(tree: Tree) -> Tree:
    """Zeros in the shapes of ``tree``.

    >>> zeros_like({"a": torch.ones(2)})
    {'a': tensor([0., 0.])}
    """
    return map(torch.zeros_like, tree)


def ones_like(tree: Tree) -> Tree:
    """Ones in the shapes of ``tree``.

    >>> ones_like([torch.zeros(2)])
    [tensor([1., 1.])]
    """
    return map(torch.ones_like, tree)


def add(a: Tree, b: Tree) -> Tree:
    """a + b, leaf by leaf.

    >>> add({"x": torch.ones(2)}, {"x": torch.ones(2)})
    {'x': tensor([2., 2.])}
    """
    return map(torch.add, a, b)


def sub(a: Tree, b: Tree) -> Tree:
    """a - b, leaf by leaf.

    >>> sub([torch.ones(2)], [torch.ones(2)])
    [tensor([0., 0.])]
    """
    return map(torch.sub, a, b)


def mul(a: Tree, b: Tree) -> Tree:
    """a * b, leaf by leaf.

    >>> mul([torch.full((2,), 3.0)], [torch.full((2,), 2.0)])
    [tensor([6., 6.])]
    """
    return map(torch.mul, a, b)


def scale(tree: Tree, factor: Number) -> Tree:
    """factor * tree; the leaves keep their dtype.

    >>> scale([torch.ones(2)], 3.0)
    [tensor([3., 3.])]
    """
    return map(lambda x: _as_dtype(factor, x) * x, tree)


def add_scaled(a: Tree, b: Tree, factor: Number) -> Tree:
    """a + factor * b; the leaves keep the dtype of ``a``.

    >>> add_scaled([torch.ones(2)], [torch.ones(2)], -0.5)
    [tensor([0.5000, 0.5000])]
    """
    return map(lambda x, y: x + (_as_dtype(factor, y) * y).to(x.dtype), a, b)


def lerp(a: Tree, b: Tree, weight: Number) -> Tree:
    """a + weight * (b - a); the leaves keep the dtype of ``a``.

    >>> lerp([torch.zeros(2)], [torch.ones(2)], 0.25)
    [tensor([0.2500, 0.2500])]
    """
    return map(lambda x, y: x + _as_dtype(weight, x) * (y.to(x.dtype) - x), a, b)


def average(trees: Sequence[Tree], weights: Sequence[Number] | Tensor | None = None) -> Tree:
    """sum_i w_i x_i / sum_i w_i, leaf by leaf; summed in at least float32, the leaves keep the first tree's dtypes.

    The mean of checkpoints of one run is stochastic weight averaging (Izmailov et al. 2018, arXiv:1803.05407), that of
    runs fine-tuned from one start a model soup (Wortsman et al. 2022, arXiv:2203.05482).

    Args:
        weights: one number for each tree, or a tensor (n,); by default all 1.
    Raises:
        ValueError: if there are no trees, or not as many weights.
        TypeError: if a leaf is no floating-point tensor; names its path.

    >>> average([{"w": torch.zeros(2)}, {"w": torch.ones(2)}], weights=[1, 3])
    {'w': tensor([0.7500, 0.7500])}
    """
    if not trees:
        raise ValueError("tree.average: expected at least one tree, got none")
    shares: list[Number] = [1.0] * len(trees) if weights is None else list(weights)
    if len(shares) != len(trees):
        raise ValueError(f"tree.average: expected {len(trees)} weights, got {len(shares)}")
    total = builtins.sum(shares)
    rows, treedef = _rows("tree.average", trees[0], trees[1:])

    def mean(path: str, row: Sequence[Tensor]) -> Tensor:
        check_floating(row[0], f"tree.average: {path!r}")
        wide = torch.promote_types(row[0].dtype, torch.float32)
        weighted: Any = builtins.sum(w * x.to(wide) for w, x in zip(shares, row, strict=True))
        return (weighted / total).to(row[0].dtype)

    return unflatten(treedef, [mean(path, row) for path, row in zip(paths(trees[0]), rows, strict=True)])


def _as_dtype(factor: Number, x: Tensor) -> Number:
    """A 0-d factor must not promote an x of lower precision that is 0-d too."""
    if isinstance(factor, Tensor) and factor.dtype != x.dtype and torch.is_floating_point(x):
        return factor.to(x.dtype) if x.ndim == 0 else factor
    return factor


def vdot(a: Tree, b: Tree) -> Tensor:
    """Sum over all leaves of conj(a) * b: -> ().

    >>> vdot([torch.ones(2)], [torch.full((2,), 3.0)])
    tensor(6.)
    """
    return _total(map(lambda x, y: (x.conj() * y).sum(), a, b), "tree.vdot")


def sum(tree: Tree) -> Tensor:
    """Sum of all elements of all leaves: -> ().

    >>> sum([torch.ones(2), torch.ones(3)])
    tensor(5.)
    """
    return _total(map(torch.sum, tree), "tree.sum")


def norm(tree: Tree) -> Tensor:
    """Euclidean norm over all leaves: -> (). Its derivatives of every order at zero are zero, not NaN.

    >>> norm([torch.tensor([3.0]), torch.tensor([4.0])])
    tensor(5.)
    """
    squared = _total(map(lambda x: ((x.conj() * x).real if x.is_complex() else x * x).sum(), tree), "tree.norm")
    positive = squared > 0
    return torch.where(positive, torch.where(positive, squared, 1).sqrt(), 0 * squared)  # 0 * squared: NaN stays NaN


def _total(tree: Tree, name: str) -> Tensor:
    parts = leaves(tree)
    if not parts:
        raise ValueError(f"{name}: expected at least one leaf, got an empty tree")
    total: Tensor = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def size(tree: Tree) -> int:
    """Number of elements of all leaves.

    >>> size({"weight": torch.zeros(3, 2), "bias": torch.zeros(3)})
    9
    """
    return builtins.sum(x.numel() for x in leaves(tree))


def nbytes(tree: Tree) -> int:
    """Memory of all leaves in bytes.

    >>> nbytes([torch.zeros(3, dtype=torch.float64)])
    24
    """
    return builtins.sum(x.numel() * x.element_size() for x in leaves(tree))


def where(condition: Tree | Tensor, a: Tree, b: Tree) -> Tree:
    """``a`` where ``condition``, else ``b``; the condition is one tensor for all leaves, or a tree.

    >>> where(torch.tensor(True), [torch.ones(2)], [torch.zeros(2)])
    [tensor([1., 1.])]
    """
    if isinstance(condition, bool | Tensor):
        flag = condition
        return map(lambda x, y: torch.where(torch.as_tensor(flag, device=x.device), x, y), a, b)
    return map(torch.where, condition, a, b)


def cast(tree: Tree, dtype: torch.dtype) -> Tree:
    """Casts the floating leaves; integers, booleans and keys stay.

    >>> cast([torch.ones(1), torch.ones(1, dtype=torch.int32)], torch.float64)
    [tensor([1.], dtype=torch.float64), tensor([1], dtype=torch.int32)]
    """
    return map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)


def to(tree: Tree, device: torch.device | str) -> Tree:
    """Moves every tensor to ``device``.

    >>> to([torch.ones(1)], "cpu")
    [tensor([1.])]
    """
    return map(lambda x: x.to(device) if isinstance(x, Tensor) else x, tree)


def clip(tree: Tree, min: float | None = None, max: float | None = None) -> Tree:
    """Clips every element to [min, max].

    >>> clip([torch.tensor([-2.0, 0.5, 2.0])], -1, 1)
    [tensor([-1.0000,  0.5000,  1.0000])]
    """
    if min is None and max is None:
        raise ValueError("tree.clip: expected min or max, got neither")
    return map(lambda x: x.clamp(min, max), tree)


def all_finite(tree: Tree) -> Tensor:
    """Whether every element of every leaf is finite: -> () bool.

    >>> all_finite([torch.tensor([1.0, float("nan")])])
    tensor(False)
    """
    return _all([torch.isfinite(x).all() for x in leaves(tree)])


def equal(a: Tree, b: Tree) -> Tensor:
    """Whether every element is equal, shapes and dtypes included: -> () bool.

    >>> equal([torch.ones(2)], [torch.ones(2)])
    tensor(True)
    """
    return _compare("tree.equal", a, b, lambda x, y: (x == y).all())


def allclose(a: Tree, b: Tree, rtol: float = 1e-5, atol: float = 1e-8) -> Tensor:
    """Whether \\|a - b\\| <= atol + rtol \\|b\\| at every element: -> () bool.

    >>> allclose([torch.ones(2)], [torch.ones(2) + 1e-7])
    tensor(True)
    """
    return _compare("tree.allclose", a, b, lambda x, y: torch.isclose(x, y, rtol=rtol, atol=atol).all())


def _compare(name: str, a: Tree, b: Tree, close: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    def compare(x: Any, y: Any) -> Tensor:
        if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
            return torch.tensor(bool(x == y))
        return close(x, y) if x.shape == y.shape and x.dtype == y.dtype else torch.tensor(False, device=x.device)

    return _all([compare(x, y) for x, y in _rows(name, a, [b])[0]])


def _all(flags: list[Tensor]) -> Tensor:
    return torch.stack(flags).all() if flags else torch.tensor(True)


def stack(trees: Sequence[Tree]) -> Tree:
    """Stacks trees of one structure along a new leading axis.

    >>> stack([{"a": torch.zeros(2)}, {"a": torch.ones(2)}])["a"].shape
    torch.Size([2, 2])
    """
    if not trees:
        raise ValueError("tree.stack: expected at least one tree, got none")
    rows, treedef = _rows("tree.stack", trees[0], trees[1:])
    return unflatten(treedef, [torch.stack(row) for row in rows])


def unstack(tree: Tree) -> list[Tree]:
    """Inverse of :func:`stack`: one tree for each index of the leading axis.

    Raises:
        ValueError: if the leading axes differ in size; names the path.

    >>> [part["a"].item() for part in unstack({"a": torch.arange(3)})]
    [0, 1, 2]
    """
    shapes = {path: tuple(x.shape) for path, x in names(tree).items()}
    if not shapes:
        raise ValueError("tree.unstack: expected at least one leaf, got an empty tree")
    first = next(iter(shapes.values()))
    for path, shape in shapes.items():
        if not shape or shape[0] != first[0]:
            size = f" of size {first[0]}" if first else ""
            raise ValueError(f"tree.unstack: expected {path!r} to have a leading axis{size}, got shape {shape}")
    return [map(lambda x, i=i: x[i], tree) for i in range(first[0])]


def ravel(tree: Tree) -> tuple[Tensor, Callable[[Tensor], Tree]]:
    """All leaves as one vector (n,), and the function that brings such a vector back to the tree.

    Leaves of several dtypes are promoted to a common one and cast back. The vector is empty for an empty tree.

    >>> vector, unravel = ravel({"a": torch.zeros(2), "b": torch.ones(2, 1)})
    >>> vector
    tensor([0., 0., 1., 1.])
    >>> unravel(vector)["b"].shape
    torch.Size([2, 1])
    """
    found, treedef = flatten(tree)
    dtypes = [x.dtype for x in found]
    shapes = [x.shape for x in found]
    sizes = [math.prod(shape) for shape in shapes]
    places = unflatten(treedef, range(len(found)))
    common = dtypes[0] if dtypes else torch.get_default_dtype()
    for dtype in dtypes:
        common = torch.promote_types(common, dtype)

    def unravel(vector: Tensor) -> Tree:
        if tuple(vector.shape) != (builtins.sum(sizes),):
            raise ValueError(f"unravel: expected shape ({builtins.sum(sizes)},), got {tuple(vector.shape)}")
        parts = vector.split(sizes) if sizes else ()
        rebuilt = [part.reshape(shape).to(dtype) for part, shape, dtype in zip(parts, shapes, dtypes, strict=True)]
        return map(lambda place: rebuilt[place], places)

    vector = torch.cat([x.reshape(-1).to(common) for x in found]) if found else torch.zeros(0, dtype=common)
    return vector, unravel


# Selection.


def partition(tree: Tree, select: Select) -> tuple[Tree, Tree]:
    """Splits a nest of dicts by path: (what ``select`` takes, the rest). What is not taken is absent.

    Args:
        select: a glob on the path (``"*.bias"``), several globs, or a predicate on the path.
    Raises:
        ValueError: if a glob matches no path, or a leaf lies below a list or tuple of which only part is taken.

    >>> partition({"a": {"weight": 1, "bias": 2}, "b": {"bias": 3}}, "*.bias")
    ({'a': {'bias': 2}, 'b': {'bias': 3}}, {'a': {'weight': 1}})
    """
    every = paths(tree)
    for glob in [select] if isinstance(select, str) else [] if callable(select) else select:
        if not any(_matches(path, glob) for path in every):
            raise ValueError(f"tree.partition: expected a path that matches {glob!r}, got {', '.join(every) or 'none'}")
    marked = unflatten(structure(tree), [_selects(select, path) for path in every])
    return _keep(tree, marked, True, ""), _keep(tree, marked, False, "")


def _selects(select: Select, path: str) -> bool:
    if callable(select):
        return bool(select(path))
    return any(_matches(path, glob) for glob in ([select] if isinstance(select, str) else select))


@torch.compiler.assume_constant_result
def _matches(path: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(path, glob)


def _keep(tree: Tree, marked: Tree, want: bool, path: str) -> Tree:
    """The part of ``tree`` whose leaves are marked ``want``; a subtree without leaves stays with the rest."""
    marks = leaves(marked) or [False]
    if want not in marks:
        return {}
    if (not want) not in marks:
        return tree
    if not isinstance(tree, dict):
        raise ValueError(f"tree.partition: expected all of the {type(tree).__name__} at {path!r} or none, got a part")
    prefix = f"{path}." if path else ""
    return {
        key: _keep(child, marked[key], want, f"{prefix}{key}")
        for key, child in tree.items()
        if want in (leaves(marked[key]) or [False])
    }


def merge(a: Tree, b: Tree) -> Tree:
    """Inverse of :func:`partition`: the union of two nests of dicts.

    Raises:
        ValueError: if both have a leaf at one path; names it.

    >>> merge({"a": {"bias": 2}}, {"a": {"weight": 1}})
    {'a': {'bias': 2, 'weight': 1}}
    """
    return _merge(a, b, "")


def _merge(a: Tree, b: Tree, path: str) -> Tree:
    if isinstance(a, dict) and isinstance(b, dict):
        both = {**a, **b}
        for key in a.keys() & b.keys():
            both[key] = _merge(a[key], b[key], f"{path}.{key}" if path else str(key))
        return both
    if isinstance(a, dict) and not a:
        return b
    if isinstance(b, dict) and not b:
        return a
    raise ValueError(f"tree.merge: expected one tree to have {path!r}, got it in both")
