"""What a traced graph costs: floating-point operations, bytes moved, bytes alive at the peak.

Memory is simulated buffer by buffer in the order of the graph. Views are free. With fusion, a result takes memory only
if it must: see :class:`_Plan`.
"""

import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg
from torch.utils.flop_counter import flop_registry

from functorch_gen.transforms.tracing.nested import inner_graphs
from functorch_gen.transforms.tracing.sites import site_of
from functorch_gen.transforms.tracing.text import columns

__all__ = ["Cost", "FunctionCost", "estimate"]

_aten = torch.ops.aten
_COPY = _aten.copy_.default
_REALIZED_READS = 4
"""Inductor's ``realize_reads_threshold``: what reads more buffers than this is not computed twice."""


def _packets(names: str) -> set[Any]:
    return {getattr(_aten, name) for name in names.split()}


_REDUCTIONS = _packets(
    "_log_softmax _log_softmax_backward_data _softmax _softmax_backward_data all amax amin any argmax argmin logsumexp "
    "mean native_group_norm native_group_norm_backward native_layer_norm native_layer_norm_backward nll_loss_backward "
    "nll_loss_forward prod std sum var var_mean"
)
_LOOPS = _REDUCTIONS | _packets(
    "_to_copy arange cat constant_pad_nd copy_ cumsum embedding expand fill flip full full_like gather index "
    "index_select new_full new_ones new_zeros ones ones_like repeat roll scalar_tensor select_backward slice_backward "
    "slice_scatter stack tril triu upsample_nearest2d upsample_nearest2d_backward zeros zeros_like"
)
"""What Inductor writes as loops, besides what torch tags as pointwise: these fuse with their neighbours."""
_JOINS = _packets("cat stack")
"""Loops whose result lies in memory: each input is written to its part of it."""


def _of_argument(i: int) -> Any:
    """A multiply-add for each element of the argument ``i``."""
    return lambda *args, **_: 2 * args[i].numel()


_COUNTS: dict[Any, Any] = {
    **flop_registry,
    _aten.dot: _of_argument(0),
    _aten.mv: _of_argument(0),
    _aten.addmv: _of_argument(1),
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _aten._scaled_dot_product_flash_attention_backward
    ],
}
"""torch's counts, and those of what it leaves out."""


class FunctionCost(NamedTuple):
    """What the operations of one function cost."""

    ops: int
    flops: int
    bytes: int


@dataclass(frozen=True)
class Cost:
    """What one call costs, predicted from the shapes; ``str(cost)`` is a table by function.

    Of a ``cond`` the dearer branch counts, of a ``while_loop`` one step: how many there are no shape tells.

    Attributes:
        flops: floating-point operations: 2 for each multiply-add of products, convolutions and attention, 1 for each
            element that another operation returns.
        bytes: read and written in memory.
        peak: bytes alive at the fullest moment, inputs and outputs included.
        functions: the parts of ``flops`` and ``bytes`` by function of the source.
    """

    flops: int
    bytes: int
    peak: int
    functions: dict[str, FunctionCost]

    def __str__(self) -> str:
        rows = sorted(self.functions.items(), key=lambda item: (-item[1].bytes, item[0]))
        body = [(name, *[f"{x:,}" for x in row]) for name, row in rows]
        total = ("total", f"{sum(row.ops for _, row in rows):,}", f"{self.flops:,}", f"{self.bytes:,}")
        table = columns([("function", "ops", "flops", "bytes"), *body, total])
        return f"{table}\npeak memory: {self.peak:,} bytes"


def estimate(graph: fx.GraphModule, donated: Collection[int] = (), *, fused: bool) -> Cost:
    """The cost of ``graph`` run in its order, each buffer freed after its last use.

    Args:
        donated: indices of the inputs whose memory is free after their last use. Those that the graph writes to
            (``copy_``) hold the new value instead, and are counted once.
        fused: whether loops are fused (``"inductor"``) or every operation writes its result (``"aten"``).
    """
    plan = _Plan(graph, fused)
    functions: dict[str, FunctionCost] = {}
    inside: dict[fx.Node, int] = {}  # what loops and branches need beside their inputs
    for node, moved in plan.moved():
        inner = list(inner_graphs(graph, node).values())
        if not inner:
            _add(functions, str(site_of(node) or "jit"), FunctionCost(1, _flops(node), moved))
            continue
        costs, times = [estimate(body, fused=fused) for body in inner], _repetitions(node)
        inside[node] = max(cost.peak - _size_of_inputs(body) for cost, body in zip(costs, inner, strict=True))
        for cost in [max(costs, key=lambda cost: cost.bytes)] if _is_choice(node) else costs:
            for name, (ops, flops, size) in cost.functions.items():
                _add(functions, name, FunctionCost(ops, times * flops, times * size))
    rows = functions.values()
    return Cost(sum(r.flops for r in rows), sum(r.bytes for r in rows), plan.peak(donated, inside), functions)


def _add(functions: dict[str, FunctionCost], name: str, more: FunctionCost) -> None:
    old = functions.get(name, FunctionCost(0, 0, 0))
    functions[name] = FunctionCost(old.ops + more.ops, old.flops + more.flops, old.bytes + more.bytes)


def _is_choice(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "cond"


def _repetitions(node: fx.Node) -> int:
    """The length of a ``scan``; 1 for other operations."""
    if getattr(node.target, "__name__", "") != "scan":
        return 1
    sliced: Any = node.args[2]
    return sliced[0].meta["val"].shape[0]


def _size_of_inputs(graph: fx.GraphModule) -> int:
    return sum(_size(n) for n in graph.graph.nodes if n.op == "placeholder")


def _flops(node: fx.Node) -> int:
    count = _COUNTS.get(_packet(node))
    if count is None:
        return sum(x.numel() for x in _tensors(node))
    args, kwargs = map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    return int(count(*args, **kwargs, out_val=node.meta["val"]))


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    return [x for x in (value if isinstance(value, list | tuple) else [value]) if isinstance(x, Tensor)]


def _size(node: fx.Node) -> int:
    return sum(x.untyped_storage().nbytes() for x in _tensors(node))


def _buffers(node: fx.Node) -> set[int]:
    return {x.untyped_storage()._cdata for x in _tensors(node)}


def _is_loop(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or _packet(node) in _LOOPS


class _Plan:
    """Which buffers lie in memory while a graph runs, and which operations touch them.

    Without fusion, every result does. With fusion, these do: inputs, outputs, what an operation that is no loop (a
    product, a convolution, a sort) makes or reads, what a reduction makes smaller, what is joined from parts, and what
    several loops read if it depends on more than four buffers. Any other result of a loop is computed where it is read,
    from the buffers it depends on, which stay alive until then. A loop's result that is copied to an input is written
    there at once.
    """

    def __init__(self, graph: fx.GraphModule, fused: bool):
        self._nodes = list(graph.graph.nodes)
        self._sizes: dict[int, int] = {}
        self._maker: dict[int, fx.Node] = {}
        for node in self._nodes:
            for x in _tensors(node):
                key = x.untyped_storage()._cdata
                self._sizes.setdefault(key, x.untyped_storage().nbytes())
                self._maker.setdefault(key, node)
        self._inputs = [_buffers(n) for n in self._nodes if n.op == "placeholder"]
        self._operations = [n for n in self._nodes if n.op == "call_function" and self._computes(n)]
        self._sources: dict[int, frozenset[int]] = {}  # of a buffer that takes no memory: where it is computed from
        self._fused = fused
        if fused:
            self._fuse()

    def _computes(self, node: fx.Node) -> bool:
        """Whether it is an operation rather than a view or an item of one."""
        made = {key for key in _buffers(node) if self._maker[key] is node}
        return bool(made) or node.target is _COPY or (not _tensors(node) and node.target is not operator.getitem)

    def _fuse(self) -> None:
        readers: dict[int, list[fx.Node]] = {}
        for node in (*self._operations, self._nodes[-1]):
            for source in node.all_input_nodes:
                for key in _buffers(source):
                    readers.setdefault(key, []).append(node)
        for node in self._operations:
            if not _is_loop(node) or _packet(node) in _JOINS:
                continue
            read = self.reads(node)
            if _packet(node) in _REDUCTIONS:  # the smaller results (a mean, a norm) lie in memory
                largest = max((self._sizes[key] for key in read), default=0)
                read |= {key for key in _buffers(node) if self._sizes[key] < largest}
            for key in _buffers(node) - read:
                after = readers.get(key, [])
                target = next((n for n in after if n.target is _COPY), None)
                if target is not None:
                    self._sources[key] = frozenset(_buffers(target.all_input_nodes[0]))
                elif all(_is_loop(n) for n in after) and (len(after) < 2 or len(read) <= _REALIZED_READS):
                    self._sources[key] = read

    def reads(self, node: fx.Node) -> frozenset[int]:
        """The buffers in memory that are read where ``node`` is computed."""
        found: set[int] = set()
        for source in node.all_input_nodes:
            for key in _buffers(source):
                found |= self._sources.get(key, {key})
        return frozenset(found)

    def writes(self, node: fx.Node) -> set[int]:
        """The buffers in memory that ``node`` fills."""
        if node.target is _COPY:
            return _buffers(node.all_input_nodes[0])
        return {key for key in _buffers(node) if self._maker[key] is node and key not in self._sources}

    def moved(self) -> Iterator[tuple[fx.Node, int]]:
        """The operations, each with the bytes it reads and writes.

        Between two operations that are no loops, loops of one size share what they read.
        """
        shared: set[tuple[int, int]] = set()
        for node in self._operations:
            if not _is_loop(node) or not self._fused:
                shared.clear()
            written = self.writes(node)
            elements = max((x.numel() for x in _tensors(node)), default=0)
            touched = {(key, elements) for key in (self.reads(node) | written if written else ())}
            yield node, sum(self._sizes[key] for key, _ in touched - shared)
            shared |= touched

    def peak(self, donated: Collection[int], inside: Mapping[fx.Node, int]) -> int:
        """The bytes alive at the fullest moment; ``inside``: what an operation needs while it runs."""
        inputs = set().union(*self._inputs)
        written = {key for node in self._operations if node.target is _COPY for key in self.writes(node)}
        freed = set().union(*[self._inputs[i] for i in donated]) - written
        held = (inputs - freed) | self.reads(self._nodes[-1])
        last = {key: node for node in self._operations for key in self.reads(node) | self.writes(node)}
        dying: dict[fx.Node, list[int]] = {}
        for key in last.keys() - held:
            dying.setdefault(last[key], []).append(key)
        live = peak = sum(self._sizes[key] for key in inputs)
        for node in self._operations:
            live += sum(self._sizes[key] for key in self.writes(node) - inputs)
            peak = max(peak, live + inside.get(node, 0))
            live -= sum(self._sizes[key] for key in dying.get(node, ()))
        return peak
