"""Trees as one vector per dtype and device."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from functorch_gen import tree
from functorch_gen.check import check_floating
from functorch_gen.leaves import map_same
from functorch_gen.structure import Structure, flatten_plain, paths_plain
from functorch_gen.typing import Tree

__all__ = ["Flat", "Layout"]

_ALIGNMENT = 16  # elements: a cache line of float32, and enough for every vector unit and matrix kernel


class _Place(NamedTuple):
    """Where a leaf lies: its elements are the next ``length`` of their vector, the last of them padding."""

    vector: str
    length: int
    shape: tuple[int, ...]
    order: tuple[int, ...]  # the dimensions of the leaf from the outermost in memory to the innermost
    dtype: torch.dtype

    def piece(self, x: Tensor) -> Tensor:
        """The leaf as a stretch of its vector: -> (length,)."""
        flat = (x if self._is_row_major() else x.permute(self.order)).reshape(-1)
        padding = self.length - flat.numel()
        return F.pad(flat, (0, padding)) if padding else flat

    def leaf(self, piece: Tensor) -> Tensor:
        """Inverse of :meth:`piece`, a view: (..., length) -> (..., *shape)."""
        lead, shape = piece.shape[:-1], [self.shape[i] for i in self.order]
        size = torch.Size(shape).numel()
        x = (piece if size == self.length else piece[..., :size]).reshape([*lead, *shape])
        if self._is_row_major():
            return x
        return x.permute(*range(len(lead)), *[len(lead) + self.order.index(i) for i in range(len(shape))])

    def _is_row_major(self) -> bool:
        return self.order == tuple(range(len(self.order)))


class _Vector(NamedTuple):
    """What one vector is."""

    name: str
    device: torch.device
    length: int


@tree.register_static
@dataclass(frozen=True)
class Layout:
    """How the leaves of a tree lie in vectors, one for each dtype and device. No tensors: hashable, comparable.

    A transformation inside :func:`flatten`, or in a flat training step, is given it as the keyword ``layout``, and may
    look up by path there what the vectors do not tell.

    >>> params = {"bias": torch.ones(1), "weight": torch.zeros(1, 2)}
    >>> layout = Layout.of(params)
    >>> layout.ravel(params).vectors
    {'float32': tensor([1., 0., 0.])}
    >>> layout.spread({"bias": True, "weight": False}).vectors
    {'float32': tensor([ True, False, False])}
    """

    structure: Structure = field(hash=False, repr=False)  # hashed in every call of a jitted function: vectors will do
    places: tuple[_Place, ...] = field(hash=False, repr=False)  # of the leaves, in their order
    vectors: tuple[_Vector, ...]

    @classmethod
    def of(cls, whole: Tree, aligned: bool = False) -> Layout:
        """The layout for trees like ``whole``. A vector is named by its dtype, and by its device if there are several.

        Args:
            aligned: the leaves begin at multiples of 16 elements, with zeros between, and keep their memory format;
                otherwise they lie row-major and close together.
        Raises:
            TypeError: if a leaf is no floating-point tensor; names its path.
        """
        leaves, structure = flatten_plain(whole)
        for path, x in zip(paths_plain(structure), leaves, strict=True):
            check_floating(x, f"flatten: params at {path!r}")
        several = len({x.device for x in leaves}) > 1
        places: list[_Place] = []
        vectors: dict[str, _Vector] = {}
        for x in leaves:
            name = str(x.dtype).removeprefix("torch.") + (f"_{x.device}" if several else "")
            length = -(-x.numel() // _ALIGNMENT) * _ALIGNMENT if aligned else x.numel()
            order = _memory_order(x) if aligned else tuple(range(x.ndim))
            places.append(_Place(name, length, tuple(x.shape), order, x.dtype))
            before = vectors[name].length if name in vectors else 0
            vectors[name] = _Vector(name, x.device, before + length)
        return cls(structure, tuple(places), tuple(vectors.values()))

    @property
    def whole(self) -> Tree:
        """The tree that is laid out, without values: tensors of the device "meta"."""
        metas = [torch.empty(place.shape, dtype=place.dtype, device="meta") for place in self.places]
        return tree.unflatten(self.structure, metas)

    def ravel(self, whole: Tree) -> Flat:
        """Copies a tree of this structure and these shapes into vectors.

        Raises:
            ValueError: if structure or shapes are others; names the first path that differs.
        """
        leaves, structure = flatten_plain(whole)
        if structure != self.structure or [tuple(x.shape) for x in leaves] != [place.shape for place in self.places]:
            map_same("flatten", lambda x, _: x, self.whole, whole)  # raises
        pieces = [(place.vector, place.piece(x)) for place, x in zip(self.places, leaves, strict=True)]
        return self._join(pieces)

    def unravel(self, vectors: dict[str, Tensor]) -> Tree:
        """Inverse of :meth:`ravel`: views; the leaves have the vectors' dtype, and their leading dimensions first.

        Raises:
            ValueError: if a vector has another length than this layout's; names it.
        """
        pieces: dict[str, Iterator[Tensor]] = {}
        for name, _, length in self.vectors:
            if vectors[name].shape[-1:] != (length,):
                raise ValueError(
                    f"Flat: expected {length} elements in {name!r}, got shape {tuple(vectors[name].shape)}"
                )
            lengths = [place.length for place in self.places if place.vector == name]
            pieces[name] = iter(vectors[name].split(lengths, -1))
        leaves = [place.leaf(next(pieces[place.vector])) for place in self.places]
        return tree.unflatten(self.structure, leaves)

    def spread(self, flags: Tree) -> Flat:
        """A tree of bools, one for each leaf, as vectors of bools, one for each element."""
        marks = tree.leaves(tree.map(lambda _, flag: bool(flag), self.whole, flags))
        runs: list[tuple[str, bool, int]] = []  # neighbours with one mark are one run
        for place, mark in zip(self.places, marks, strict=True):
            joins = bool(runs) and runs[-1][:2] == (place.vector, mark)
            before = runs.pop()[2] if joins else 0
            runs.append((place.vector, mark, before + place.length))
        devices = {vector.name: vector.device for vector in self.vectors}
        return self._join([(name, torch.full((n,), mark, device=devices[name])) for name, mark, n in runs])

    def _join(self, pieces: list[tuple[str, Tensor]]) -> Flat:
        names = [vector.name for vector in self.vectors]
        return Flat({name: torch.cat([x for at, x in pieces if at == name]) for name in names}, self)


def _memory_order(x: Tensor) -> tuple[int, ...]:
    """The dimensions from the outermost in memory to the innermost; of a tensor with gaps, the usual order."""
    usual = tuple(range(x.ndim))
    order = tuple(sorted(usual, key=lambda i: -x.stride(i)))
    return usual if x.is_contiguous() or not x.permute(order).is_contiguous() else order


class Flat(NamedTuple):
    """A tree as contiguous vectors, one for each dtype and device; :meth:`tree` gives the tree as views of them.

    To functions on trees (``tree.map``, optimizers, averages, ``grad``) it is a tree of a few long leaves: what they
    make of it has the same layout, and so its :meth:`tree`. The gradient of ``lambda flat: loss(flat.tree())`` is flat.

    >>> params = {"bias": torch.ones(1), "weight": torch.zeros(1, 2)}
    >>> flat = Layout.of(params).ravel(params)
    >>> flat = tree.map(lambda x: x + 1, flat)
    >>> flat.vectors, flat.tree()
    ({'float32': tensor([2., 1., 1.])}, {'bias': tensor([2.]), 'weight': tensor([[1., 1.]])})
    """

    vectors: dict[str, Tensor]  # by name, (n,); in a batch of states (..., n)
    layout: Layout  # static

    def tree(self) -> Tree:
        """The tree; its leaves share the memory of the vectors."""
        return self.layout.unravel(self.vectors)
