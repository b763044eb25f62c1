"""A graph cut into units: operations that run as they are, and regions of fusible ones between them.

Regions stay small and many of them are alike (the layers of a network, the updates of its parameters), so each kind is
compiled once. The level of a value is the number of cuts on the longest path to it; a region joins connected nodes of
one level, so that no path leaves a region and comes back.
"""

import heapq
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.barrier import barrier_op
from functorch_gen.transforms.effects import callback_op
from functorch_gen.transforms.tracing.graph import (
    base,
    is_fusible,
    is_pointwise,
    is_view,
    layout,
    memory,
    output_node,
    size,
    value,
)

__all__ = ["Partition", "Unit"]

_REPEATED = 16
"""At most so many cheap operations are done again in another region instead of storing their result."""

_SMALL = 8
"""A value that is so many times smaller than what is computed from it is stored."""

_LARGE = 1024
"""Regions that read the same tensor of at least so many elements at one level are one."""


@dataclass(eq=False)
class Unit:
    """One operation, or a region of fusible ones."""

    level: int
    nodes: list[fx.Node]  # in the order of the program
    fused: bool
    inputs: list[fx.Node] = field(default_factory=list)  # values that others computed
    outputs: list[fx.Node] = field(default_factory=list)  # values that others read
    writes: dict[fx.Node, fx.Node] = field(default_factory=dict)  # value -> the donated input that takes it
    deadline: int = 1 << 60  # lowest level of what reads its values, or writes over what it reads


class Partition:
    """The units of a graph, and the order in which they run."""

    def __init__(self, graph: fx.Graph):
        self.graph = graph
        self.position = {n: i for i, n in enumerate(graph.nodes)}
        self.results = {base(n) for n in output_node(graph).all_input_nodes}
        self.level: dict[fx.Node, int] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.copies = [n for n in graph.nodes if n.target is torch.ops.aten.copy_.default]
        self.copied = self.results | {base(n.all_input_nodes[1]) for n in self.copies}
        self.stored: set[fx.Node] = set()
        self.unit_of: dict[fx.Node, Unit] = {}
        self._find_levels()
        self._make_units()
        self._store()
        self._connect()
        self._write_in_place()
        self._find_deadlines()

    # levels and regions

    def _find_levels(self) -> None:
        shared: dict[tuple[int, fx.Node], fx.Node] = {}
        for node in self.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.level[node] = 0
            if node.op != "call_function" or is_view(node):
                continue
            if node.target is operator.getitem:
                self.level[node] = self.level[node.all_input_nodes[0]]
                self._join(node, node.all_input_nodes[0])
                continue
            sources = _sources(node)
            self.level[node] = max((self.level[u] + self._is_cut(u, node) for u in sources), default=0)
            if not is_fusible(node):
                continue
            for u in sources:
                if u.op == "call_function" and not u.all_input_nodes:
                    continue  # a constant
                if self.level[u] == self.level[node] and is_fusible(u) and not self._is_cut(u, node):
                    self._join(node, u)
                elif size(u) >= _LARGE and u.op != "placeholder":
                    self._join(node, shared.setdefault((self.level[node], u), node))

    def _is_cut(self, u: fx.Node, node: fx.Node) -> bool:
        """Whether ``u`` is computed to memory before ``node`` runs."""
        if u.op in ("placeholder", "get_attr"):
            return not is_fusible(node)
        if not (is_fusible(u) and is_fusible(node)):
            return True
        if not _is_scalar(u) or not u.all_input_nodes:
            return False
        return not _is_scalar(node) or not all(_is_scalar(v) for v in _sources(u))

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        a, b = self._root(a), self._root(b)
        if a is not b:
            later, earlier = (a, b) if self.position[a] > self.position[b] else (b, a)
            self.parent[later] = earlier

    def _root(self, node: fx.Node) -> fx.Node:
        while node in self.parent:
            node = self.parent[node]
        return node

    def _make_units(self) -> None:
        for node in self.graph.nodes:
            if node.op != "call_function" or is_view(node) or (is_fusible(node) and not node.all_input_nodes):
                continue  # constants are made anew wherever they are read
            root = self._root(node)
            if root not in self.unit_of:
                self.unit_of[root] = Unit(self.level[node], [], is_fusible(node))
            self.unit_of[node] = self.unit_of[root]
            self.unit_of[node].nodes.append(node)

    # which values are stored

    def _store(self) -> None:
        """Finds the values that go through memory: what unfused operations read, and what is dear to repeat."""
        self.stored |= self.results
        for node in self.graph.nodes:
            if node.op == "placeholder" or (node.op == "call_function" and not is_fusible(node) and not is_view(node)):
                self.stored.add(node)
                self.stored.update(base(u) for u in node.all_input_nodes)
            elif node.target is operator.getitem and not is_view(node) and not is_fusible(node):
                self.stored.add(node)
        for node in [n for n in self.stored if n.op == "call_function" and n not in self.unit_of]:
            self.unit_of[node] = Unit(0, [node], fused=False)  # a constant that an unfused operation reads
        crossing = {
            u
            for unit in self.units
            for node in (unit.nodes if unit.fused else ())
            for u in _sources(node)
            if self.unit_of.get(u) is not unit
        }
        for u in sorted(crossing - self.stored, key=self.position.__getitem__):
            if not self._is_cheap(u):
                self.stored.add(u)

    def _is_cheap(self, u: fx.Node) -> bool:
        """Whether reading ``u`` may be replaced by computing it from values that are stored, or small."""
        if not is_pointwise(u):
            return False
        repeated, bases, stack = {u}, set(), _sources(u)
        while stack:
            n = stack.pop()
            if n in self.stored or not is_pointwise(n) or (n.all_input_nodes and _SMALL * size(n) <= size(u)):
                bases.add(n)
            elif n not in repeated:
                repeated.add(n)
                stack.extend(_sources(n))
        wide = [n for n in bases if 2 * size(n) >= size(u)]  # two of them are more to read than the result
        if (_is_scalar(u) and bases) or len(repeated) > _REPEATED or len(wide) > 1:
            return False
        self.stored |= bases
        return True

    @property
    def units(self) -> list[Unit]:
        """All units that have something to do."""
        return [u for u in dict.fromkeys(self.unit_of.values()) if u.nodes]

    def _connect(self) -> None:
        """Finds, from the end to the start, what each unit computes and reads, and which of its values others read."""
        needed = dict.fromkeys(self.results)
        for unit in sorted(self.units, key=lambda u: -u.level):
            if unit.fused:
                unit.outputs = sorted((n for n in unit.nodes if n in needed), key=self.position.__getitem__)
            else:
                unit.outputs = unit.nodes
            nodes, reads = dict.fromkeys(unit.outputs), {}
            stack = [u for n in reversed(unit.outputs) for u in reversed(_sources(n))]
            while stack:
                u = stack.pop()
                if u in nodes or u in reads:
                    continue
                if self.unit_of.get(u) is unit or (unit.fused and u not in self.stored):
                    nodes[u] = None
                    stack.extend(reversed(_sources(u)))
                else:
                    reads[u] = None
            unit.nodes, unit.inputs = sorted(nodes, key=self.position.__getitem__), list(reads)
            needed |= reads

    # donation

    def _write_in_place(self) -> None:
        """Lets a region write over a donated input where all other readers of the old value can run before it."""
        readers: dict[fx.Node, list[Unit]] = defaultdict(list)
        for unit in self.units:
            for n in unit.inputs:
                readers[self._origin(n)].append(unit)
        callbacks = [u for u in self.units if _calls_back(u)]  # if one raises, the old values are still whole
        for copy in self.copies:
            target, source = copy.args
            if not (isinstance(target, fx.Node) and isinstance(source, fx.Node)):
                continue
            writer, own = self.unit_of.get(source), self.unit_of[copy]
            others = [u for u in (*readers[target], *callbacks) if u is not writer and u is not own]
            if writer is None or not writer.fused or source in writer.writes or is_view(source):
                continue
            if not _same_layout(source, target) or any(u.level >= writer.level for u in others):
                continue
            if any(n is not target and self._origin(n) is target for n in writer.inputs):
                continue
            writer.writes[source] = target
            own.nodes = []

    def _find_deadlines(self) -> None:
        writer = {target: u for u in self.units for target in u.writes.values()}
        for unit in self.units:
            for n in unit.inputs:
                if n in self.unit_of:
                    self.unit_of[n].deadline = min(self.unit_of[n].deadline, unit.level)
                later = writer.get(self._origin(n), unit)
                if later is not unit:
                    unit.deadline = min(unit.deadline, later.level)

    def _origin(self, node: fx.Node) -> fx.Node:
        """The value whose memory this is."""
        node = memory(node)
        while (source := self.handed_on(node)) is not None:
            node = memory(source)
        return node

    def handed_on(self, node: fx.Node) -> fx.Node | None:
        """What a barrier passes on as ``node`` without a copy, since no unit is moved across it; None if it copies."""
        if node.target is not operator.getitem or node.all_input_nodes[0].target is not barrier_op:
            return None
        xs: Any = node.all_input_nodes[0].args[0]
        source = xs[node.args[1]]
        return source if node not in self.copied and _same_layout(source, node) else None

    # order

    def ordered(self, units: Sequence[Unit]) -> list[Unit]:
        """Units by the place of their last node in the program, as far as reads and writes allow; donations last."""
        owner = {n: u for u in units for n in u.outputs}
        writer = {target: u for u in units for target in u.writes.values()}
        writer |= {c.all_input_nodes[0]: owner[c] for c in self.copies if c in owner}
        before: dict[Unit, set[Unit]] = {u: set() for u in units}
        for unit in units:
            for n in unit.inputs:
                if n in owner:
                    before[unit].add(owner[n])
                if self._origin(n) in writer:
                    before[writer[self._origin(n)]].add(unit)
            for later in writer.values() if _calls_back(unit) else ():
                before[later].add(unit)
        order = _topological({u: earlier - {u} for u, earlier in before.items()}, self._rank)
        self._write_over_dead(order)
        return order

    def _write_over_dead(self, order: Sequence[Unit]) -> None:
        """Lets regions write their results over what they are the last to read: less memory, and it is in the cache."""
        last_reader = {self._origin(n): unit for unit in order for n in unit.inputs}
        lent = {n for unit in order for n in unit.writes}  # their memory is that of a donated input
        for unit in order:
            for n in unit.outputs if unit.fused else ():
                dead = (
                    u
                    for u in unit.inputs
                    if self._is_own(u) and last_reader[u] is unit and u not in lent and u not in unit.writes.values()
                )
                target = next((u for u in dead if _same_layout(u, n) and _is_read_whole(u, unit)), None)
                if n not in unit.writes and size(n) >= _LARGE and target is not None:
                    unit.writes[n] = target

    def _is_own(self, u: fx.Node) -> bool:
        """Whether the program made this memory, and does not return it."""
        return u.op == "call_function" and self._origin(u) is u and u not in self.copied

    def _rank(self, unit: Unit) -> tuple[bool, int]:
        """Donated memory is written last: an error before that leaves it as it was."""
        writes = bool(unit.writes) or unit.nodes[0] in self.copies
        return writes, max(self.position[n] for n in unit.nodes)


def _topological(before: dict[Unit, set[Unit]], rank: Callable[[Unit], Any]) -> list[Unit]:
    """Each unit after all of ``before[unit]``, otherwise by rank."""
    after: dict[Unit, list[Unit]] = defaultdict(list)
    for unit, earlier in before.items():
        for u in earlier:
            after[u].append(unit)
    order: list[Unit] = []
    ready = [(rank(u), id(u), u) for u, earlier in before.items() if not earlier]
    heapq.heapify(ready)
    while ready:
        *_, unit = heapq.heappop(ready)
        order.append(unit)
        for later in after[unit]:
            before[later].discard(unit)
            if not before[later]:
                heapq.heappush(ready, (rank(later), id(later), later))
    if len(order) < len(before):
        raise AssertionError("jit: the units of a program depend on one another")
    return order


def _sources(node: fx.Node) -> list[fx.Node]:
    """The values that a node reads, itself or through views."""
    return list(dict.fromkeys(base(u) for u in node.all_input_nodes))


def _is_scalar(node: fx.Node) -> bool:
    x = value(node)
    return isinstance(x, Tensor) and x.ndim == 0


def _is_read_whole(u: fx.Node, unit: Unit) -> bool:
    """Whether no node of the unit reads a part of ``u``, which would come as a tensor of its own."""
    return not any(is_view(v) and base(v) is u and size(v) < size(u) for n in unit.nodes for v in n.all_input_nodes)


def _calls_back(unit: Unit) -> bool:
    return unit.nodes[0].target is callback_op


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    x, y = value(a), value(b)
    return x.shape == y.shape and layout(x) == layout(y) and x.dtype == y.dtype
