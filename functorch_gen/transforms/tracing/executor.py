"""A compiled program: Python text, generated kernels, and how they come from a graph."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.barrier import barrier_op
from functorch_gen.transforms.tracing.elementwise import Batch, batches
from functorch_gen.transforms.tracing.graph import value
from functorch_gen.transforms.tracing.kernels import Library, Region, compile_region, load, load_region
from functorch_gen.transforms.tracing.matmul import has_small_products, on_one_thread
from functorch_gen.transforms.tracing.nested import RUNNERS, inner_graphs
from functorch_gen.transforms.tracing.partition import Partition, Unit
from functorch_gen.transforms.tracing.region import RegionGraph, region_graph
from functorch_gen.transforms.tracing.writer import FAST, Nested, Operation, Writer

__all__ = ["Code", "Executable", "assemble", "planned_peak"]

_C: Any = torch._C  # torch's stubs leave out some of its modules

_Run = Callable[..., Sequence[Tensor]]


@dataclass
class Code:
    """A program as text, and what its names mean. It can be pickled."""

    python: str  # the function ``run``
    constants: dict[str, Any]  # operations and their arguments
    regions: dict[str, Region]
    nested: dict[str, Nested]  # loops and branches
    peak: int  # bytes at the fullest moment, beside the inputs; scratch inside of operations is not in it

    def load(self, functions: dict[str, Callable[..., Any]], regions: dict[int, Any]) -> _Run:
        """The function of the program's inputs."""
        namespace: dict[str, Any] = dict(functions)
        for name, region in self.regions.items():
            if id(region) not in regions:
                regions[id(region)] = load_region(region, functions)
            namespace[name] = regions[id(region)]
        for name, nested in self.nested.items():
            inner = [code.load(functions, regions) for code in nested.inner]
            namespace[name] = RUNNERS[nested.operator](inner, nested.count)
        namespace |= {name: _resolve(x) for name, x in self.constants.items()}
        guards = _C._dynamo.guards
        namespace["empty"] = guards._empty_strided_cpu
        namespace["view"] = guards._reinterpret_tensor
        namespace |= {"laid_out": _laid_out, "copied": _copied}
        exec(compile(self.python, "<functorch_gen program>", "exec"), namespace)
        return namespace["run"]


@dataclass
class Executable:
    """A compiled program without its graph: it can be pickled and run by another process."""

    code: Code
    objects: list[bytes] = field(repr=False)
    one_thread: bool = False  # for its matrix products

    def load(self) -> _Run:
        """The function of the program's inputs."""
        run = self.code.load(load(self.objects), {})
        return on_one_thread(run) if self.one_thread else run


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` in the layout that the trace foresaw."""
    return x if x.stride() == strides else _copied(x, strides)


def _copied(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def _resolve(x: Any) -> Any:
    """An operation by its name."""
    if isinstance(x, Operation):
        op = getattr(getattr(getattr(torch.ops, x.namespace), x.packet), x.overload)
        return FAST.get(op, op)
    return x


def assemble(graph: fx.GraphModule) -> Executable:
    """Compiles a graph of ATen operations on CPU tensors."""
    library = Library()
    code = _Assembler(library).code(graph)
    return Executable(code, library.build(), has_small_products(graph))


def planned_peak(graph: fx.GraphModule) -> int:
    """How many bytes the compiled graph will need beside its inputs, without compiling it."""

    class Dry(_Assembler):
        def _region(self, made: RegionGraph) -> Region:
            return self.regions.setdefault(made.key, Region(""))

    return Dry(Library()).code(graph).peak


class _Assembler:
    """Turns graphs into code; equal regions of all of them are compiled once."""

    def __init__(self, library: Library):
        self.library = library
        self.regions: dict[Any, Region] = {}

    def code(self, graph: fx.GraphModule) -> Code:
        cut, writer = Partition(graph.graph), Writer(graph)
        batched, rest = batches([u for u in cut.units if u.fused])
        batch_of = {_merged(batch): batch for batch in batched}
        for unit in cut.ordered([*batch_of, *rest, *[u for u in cut.units if not u.fused]]):
            if unit in batch_of:
                writer.batch(batch_of[unit], self.library.add_batch(batch_of[unit].source))
            elif unit.fused:
                made = region_graph(unit)
                writer.region(unit, made.inputs, self._region(made))
            elif unit.nodes[0].target is barrier_op:
                writer.barrier(unit.nodes, cut)
            elif inner := inner_graphs(graph, unit.nodes[0]):
                operator: Any = unit.nodes[0].target
                writer.nest(unit.nodes, operator.name(), {n: self.code(body) for n, body in inner.items()})
            else:
                writer.operation(unit.nodes)
        python, peak = writer.finish()
        return Code(python, writer.constants, writer.regions, writer.nested, peak)

    def _region(self, made: RegionGraph) -> Region:
        if made.key not in self.regions:
            inputs = [value(n) for n in made.inputs]
            self.regions[made.key] = compile_region(made.module, inputs, self.library)
        return self.regions[made.key]


def _merged(batch: Batch) -> Unit:
    """The units of a batch as one, which has its place in the order."""
    units = batch.units
    merged = Unit(max(u.level for u in units), [n for u in units for n in u.nodes], fused=True)
    merged.inputs = list(dict.fromkeys(n for u in units for n in u.inputs))
    merged.outputs = [n for u in units for n in u.outputs]
    merged.writes = {n: target for u in units for n, target in u.writes.items()}
    return merged
