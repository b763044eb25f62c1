"""Donation: outputs are written over inputs that the caller gives up."""

import bisect
import functools
import math
import operator
import sys
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.barrier import barrier_op
from functorch_gen.transforms.tracing.graph import layout, output_node

__all__ = [
    "Distinct",
    "Donation",
    "are_forgotten",
    "donate",
    "extent_of",
    "is_released",
    "nothing_like",
    "poison",
    "release",
    "separate_outputs",
]

_COPIES = {
    torch.ops.aten.clone.default,
    torch.ops.aten._to_copy.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.lift_fresh_copy.default,
}


@dataclass
class Donation:
    """For each output the input whose buffer holds it, or None; and the donated inputs that hold none."""

    sources: list[int | None]
    unused: list[int]


def _returned(output: fx.Node) -> list[fx.Node]:
    nodes: Any = output.args[0]
    return list(nodes)


def _meta(node: fx.Node) -> tuple[Any, ...]:
    x = node.meta["val"]
    return tuple(x.shape), x.dtype, x.device, layout(x)


def _storage(node: fx.Node) -> int:
    x = node.meta["val"]
    return (x[0] if isinstance(x, list | tuple) else x).untyped_storage()._cdata  # a list: parts of one tensor


def _opaque_copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    copy = graph.call_function(barrier_op, ([node], []))
    item = graph.call_function(operator.getitem, (copy, 0))
    item.meta["val"] = node.meta["val"]
    return item


def separate_outputs(module: fx.GraphModule) -> None:
    """Copies outputs that would share memory with an input or with another output."""
    graph = module.graph
    output = output_node(graph)
    taken = {_storage(n) for n in graph.nodes if n.op == "placeholder"}
    results: list[Any] = []
    with graph.inserting_before(output):
        for node in _returned(output):
            if _storage(node) in taken:
                node = _opaque_copy(graph, node)
            else:
                taken.add(_storage(node))
            results.append(node)
    output.args = (tuple(results),)
    module.recompile()


def donate(module: fx.GraphModule, donated: Sequence[int]) -> Donation:
    """Appends ``input.copy_(output)`` for the donated inputs; those outputs are no longer returned.

    An output takes the buffer of the input it is, else of the donated input at its own position, else of the first
    that is alike in shape, dtype, device and strides. An output that is a view or a copy of an input is copied first,
    so that no write comes before a read.
    """
    graph = module.graph
    output = output_node(graph)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    outputs = _returned(output)
    sources = _match(outputs, inputs, donated)
    held = {_storage(n) for n in inputs}
    kept: list[fx.Node] = []
    writes: list[tuple[fx.Node, fx.Node]] = []
    with graph.inserting_before(output):
        seen: set[int] = set()
        for node, source in zip(outputs, sources, strict=True):
            if source is not None and node is inputs[source]:
                continue
            if _reads_input(node, held) or _storage(node) in seen:
                node = _opaque_copy(graph, node)
            else:
                seen.add(_storage(node))
            if source is None:
                kept.append(node)
            else:
                writes.append((inputs[source], node))
        for target, node in writes:
            graph.call_function(torch.ops.aten.copy_.default, (target, node))
    output.args = (tuple(kept),)
    module.recompile()
    return Donation(sources, [i for i in donated if i not in sources])


def _match(outputs: list[fx.Node], inputs: list[fx.Node], donated: Sequence[int]) -> list[int | None]:
    sources: list[int | None] = [None] * len(outputs)
    free = list(donated)

    def take(i: int, j: int) -> None:
        sources[i] = j
        free.remove(j)

    for i, node in enumerate(outputs):  # unchanged: the buffer is handed on
        j = inputs.index(node) if node in inputs else -1
        if j in free:
            take(i, j)
    for i, node in enumerate(outputs):  # the leaf at the same place
        if sources[i] is None and i < len(donated) and donated[i] in free and _meta(inputs[donated[i]]) == _meta(node):
            take(i, donated[i])
    for i, node in enumerate(outputs):
        if sources[i] is None:
            alike = [j for j in free if _meta(inputs[j]) == _meta(node)]
            if alike:
                take(i, alike[0])
    return sources


def _reads_input(node: fx.Node, held: set[int]) -> bool:
    """Whether Inductor may read an input for ``node`` after that input was written (pytorch#198131)."""
    while node.op != "placeholder" and (node.target in _COPIES or _storage(node) in held) and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"


class Distinct:
    """Checks that donated buffers overlap neither each other nor another input.

    The buffers of a training state stay where they are from step to step, so their order is remembered.
    """

    def __init__(self, extents: Sequence[int], donated: Collection[int]):
        self._extents = extents
        self._donated = [i for i in sorted(donated) if extents[i]]
        self._others = [i for i in range(len(extents)) if extents[i] and i not in donated]
        self._seen: tuple[list[int], list[int], list[int]] = [], [], []  # addresses, the same sorted, and owners

    def shared(self, inputs: Sequence[Tensor]) -> tuple[int, int] | None:
        """Two inputs, at least one of them donated, whose memory overlaps; None if there are none."""
        addresses = [inputs[i].data_ptr() for i in self._donated]
        known, starts, owners = self._seen
        if addresses != known:
            starts, owners = self._sort(addresses)
            for before, after, i, j in zip(starts, starts[1:], owners, owners[1:], strict=False):
                if before + self._extents[i] > after:
                    return min(i, j), max(i, j)
            self._seen = addresses, starts, owners
        for j in self._others:
            begin = inputs[j].data_ptr()
            at = (
                bisect.bisect_left(starts, begin + self._extents[j]) - 1
            )  # the last donated one that starts before its end
            if at >= 0 and starts[at] + self._extents[owners[at]] > begin:
                return min(owners[at], j), max(owners[at], j)
        return None

    def _sort(self, addresses: Sequence[int]) -> tuple[list[int], list[int]]:
        pairs = sorted(zip(addresses, self._donated, strict=True))
        return [start for start, _ in pairs], [i for _, i in pairs]


def extent_of(x: Tensor) -> int:
    """How many bytes lie between the first and the end of the last element."""
    if not x.numel():
        return 0
    return x.element_size() * (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)))


def release(given: Sequence[Tensor], nothing: Sequence[Tensor], shells: Sequence[Tensor] = ()) -> list[Tensor]:
    """Moves the memory of tensors to new ones; these are left empty, so that using them fails. Call it under no_grad.

    Args:
        nothing: :func:`nothing_like` each of them.
        shells: tensors released earlier that nobody else holds: they become the new ones, which saves making them.
    """
    if not shells:
        moved = [x.detach() for x in given]
        for x, empty in zip(given, nothing, strict=True):
            x.data = empty
        return moved
    return [_exchange(x, shell, empty) for x, shell, empty in zip(given, shells, nothing, strict=True)]


def _exchange(x: Tensor, shell: Tensor, empty: Tensor) -> Tensor:
    try:
        _swap(x, shell)
    except RuntimeError:  # torch holds ``x`` somewhere
        shell = x.detach()
        x.data = empty
    return shell


_swap: Any = torch._C._swap_tensor_impl
_ALONE = max(map(sys.getrefcount, [object()]))


def are_forgotten(tensors: Sequence[Tensor]) -> bool:
    """Whether nobody but the sequence, a list, holds the tensors."""
    return max(map(sys.getrefcount, tensors), default=0) <= _ALONE and not any(map(weakref.getweakrefcount, tensors))


def nothing_like(x: Tensor) -> Tensor:
    """What ``x`` shows when it is released."""
    return _nothing(x.dtype, x.device)


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


def poison(x: Tensor) -> None:
    """Fills given-up memory, so that a view of it that is still in use shows."""
    if x.dtype == torch.bool:
        x.fill_(True)
    else:
        x.fill_(math.nan if x.is_floating_point() or x.is_complex() else torch.iinfo(x.dtype).max)


def is_released(x: Tensor) -> bool:
    """Whether :func:`release` has emptied ``x``."""
    if x.shape != (0,) or (x.requires_grad and not x.is_leaf):
        return False
    return x.untyped_storage()._cdata == _nothing(x.dtype, x.device).untyped_storage()._cdata
