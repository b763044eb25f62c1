"""The units of a program as straight Python: one call a line, every tensor dropped after its last use."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.barrier import barrier_op
from functorch_gen.transforms.tracing.elementwise import Batch, batches
from functorch_gen.transforms.tracing.graph import base, layout, output_node, value
from functorch_gen.transforms.tracing.kernels import Library, Region, compile_region, load, load_region
from functorch_gen.transforms.tracing.matmul import LINEAR, as_linear
from functorch_gen.transforms.tracing.partition import Partition, Unit
from functorch_gen.transforms.tracing.region import RegionGraph, region_graph

__all__ = ["Executable", "assemble"]

_Run = Callable[..., Sequence[Tensor]]

_aten: Any = torch.ops.aten

_FAST = {  # the same operations by their quickest Python names
    _aten.mm.default: torch.mm,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.baddbmm.default: torch.baddbmm,
}


@dataclass
class Code:
    """A program as text, and what its names mean. It can be pickled."""

    python: str  # the function ``run``
    constants: dict[str, Any]  # operations and their arguments
    regions: dict[str, Region]
    loops: dict[str, tuple["Code", int]]  # the body of each loop, and how many tensors it carries

    def load(self, functions: dict[str, Callable[..., None]], regions: dict[int, Any]) -> _Run:
        """The function of the program's inputs."""
        namespace: dict[str, Any] = dict(functions)
        for name, region in self.regions.items():
            if id(region) not in regions:
                regions[id(region)] = load_region(region, functions)
            namespace[name] = regions[id(region)]
        for name, (body, carries) in self.loops.items():
            namespace[name] = _loop(body.load(functions, regions), carries)
        namespace |= {name: _resolve(x) for name, x in self.constants.items()}
        namespace["empty"] = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]
        namespace["view"] = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]
        namespace |= {"laid_out": _laid_out, "copied": _copied}
        exec(compile(self.python, "<functorch_gen program>", "exec"), namespace)
        return namespace["run"]


@dataclass
class Executable:
    """A compiled program without its graph: it can be pickled and run by another process."""

    code: Code
    objects: list[bytes] = field(repr=False)

    def load(self) -> _Run:
        """The function of the program's inputs."""
        return self.code.load(load(self.objects), {})


def _loop(body: _Run, carries: int) -> Callable[..., list[Tensor]]:
    """Runs ``body(*carry, *x, *closed) -> (*carry, *y)`` for each x of xs; the ys are stacked."""

    def run(carry: Sequence[Tensor], xs: Sequence[Tensor], closed: Sequence[Tensor]) -> list[Tensor]:
        stacked: list[Tensor] = []
        for i in range(len(xs[0])):
            results = body(*carry, *[x[i] for x in xs], *closed)
            carry, ys = results[:carries], results[carries:]
            stacked = stacked or [y.new_empty((len(xs[0]), *y.shape)) for y in ys]
            for whole, y in zip(stacked, ys, strict=True):
                whole[i] = y
        return [*carry, *stacked]

    return run


def _laid_out(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``x`` in the layout that the trace foresaw."""
    return x if x.stride() == strides else _copied(x, strides)


def _copied(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def _resolve(x: Any) -> Any:
    """An operation by its name."""
    if isinstance(x, Operation):
        op = getattr(getattr(getattr(torch.ops, x.namespace), x.packet), x.overload)
        return _FAST.get(op, op)
    return x


@dataclass(frozen=True)
class Operation:
    """An operation by its name."""

    namespace: str
    packet: str
    overload: str


def assemble(graph: fx.GraphModule) -> Executable:
    """Compiles a graph of ATen operations on CPU tensors."""
    library = Library()
    code = _Assembler(library).code(graph)
    return Executable(code, library.build())


class _Assembler:
    """Turns graphs into code; equal regions of all of them are compiled once."""

    def __init__(self, library: Library):
        self.library = library
        self.regions: dict[Any, Region] = {}

    def code(self, graph: fx.GraphModule) -> Code:
        cut, writer = Partition(graph.graph), _Writer(graph)
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
            elif unit.nodes[0].target is torch.ops.higher_order.scan:
                body: Any = unit.nodes[0].args[0]
                writer.loop(unit.nodes, self.code(getattr(graph, str(body.target))))
            else:
                writer.operation(unit.nodes)
        return Code(writer.finish(), writer.constants, writer.regions, writer.loops)

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


class _Writer:
    """Writes the function ``run(*inputs)``, a unit at a time."""

    def __init__(self, module: fx.GraphModule):
        self.graph = module.graph
        self.loops: dict[str, tuple[Code, int]] = {}
        self.constants: dict[str, Any] = {}
        self.regions: dict[str, Region] = {}
        self._lines: list[tuple[str, list[str], list[str]]] = []  # text, names read, names made
        self._name_of: dict[fx.Node, str] = {}
        self._constant_of: dict[Any, str] = {}
        self._region_of: dict[int, str] = {}
        self._count = 0
        self.inputs = [self._new(n) for n in self.graph.nodes if n.op == "placeholder"]
        for n in self.graph.nodes:
            if n.op == "get_attr" and isinstance(getattr(module, str(n.target)), Tensor):
                self._name_of[n] = self._constant(getattr(module, str(n.target)))

    def operation(self, nodes: list[fx.Node]) -> None:
        """An operation that runs as it is, with the items of its result."""
        node, *items = nodes
        if product := as_linear(node):
            self._product(node, *product)
            return
        reads: list[str] = []
        arguments = [self._argument(x, reads) for x in node.args]
        arguments += [f"{k}={self._argument(x, reads)}" for k, x in node.kwargs.items()]
        name = self._new(node)
        self._emit(f"{name} = {self._operation(node.target)}({', '.join(arguments)})", reads, [name])
        for x in items or [node]:
            if isinstance(value(x), Tensor) and node.target not in _FAST:
                read, made = f"{name}[{x.args[1]}]" if items else name, self._new(x) if items else name
                self._emit(f"{made} = laid_out({read}, {self._strides(x)})", [name], [made])

    def _product(self, node: fx.Node, x: fx.Node, m: fx.Node, bias: fx.Node | None) -> None:
        (k, n), (s, t) = value(m).shape, value(m).stride()
        reads = [self._read(x), self._read(m)] + ([self._read(bias)] if bias else [])
        transposed, name = self._fresh(), self._new(node)
        self._emit(f"{transposed} = view({reads[1]}, {(n, k)}, {(t, s)}, 0)", [reads[1]], [transposed])
        arguments = f"{reads[0]}, {transposed}, {reads[2] if bias else None}, 'none', [], ''"
        self._emit(
            f"{name} = {self._constant(Operation(*LINEAR))}({arguments})", [reads[0], transposed, *reads[2:]], [name]
        )

    def barrier(self, nodes: list[fx.Node], cut: Partition) -> None:
        """Tensors go through as they are, where that is safe: nothing in this program moves or is shared across units."""
        node, *items = nodes
        xs: Any = node.args[0]
        for item in items:
            read, made = self._read(xs[item.args[1]]), self._new(item)
            copy = cut.handed_on(item) is None
            self._emit(
                f"{made} = copied({read}, {self._strides(item)})" if copy else f"{made} = {read}", [read], [made]
            )

    def loop(self, nodes: list[fx.Node], body: Code) -> None:
        """A loop over the first axis of tensors."""
        node, *items = nodes
        carry, xs, closed = [self._tensors(x) for x in node.args[1:4]]
        name, result = f"loop{len(self.loops)}", self._new(node)
        self.loops[name] = body, len(carry)
        lists = ", ".join(f"[{', '.join(x)}]" for x in (carry, xs, closed))
        self._emit(f"{result} = {name}({lists})", [*carry, *xs, *closed], [result])
        for item in items:
            made = self._new(item)
            self._emit(f"{made} = {result}[{item.args[1]}]", [result], [made])

    def _tensors(self, nodes: Any) -> list[str]:
        """Names of contiguous tensors."""
        names = []
        for n in nodes:
            own, x = self._read(n), value(n)
            if not x.is_contiguous():
                copy = self._fresh()
                strides = torch.empty(x.shape, device="meta").stride()
                self._emit(f"{copy} = copied({own}, {strides})", [own], [copy])
                own = copy
            names.append(own)
        return names

    def region(self, unit: Unit, inputs: list[fx.Node], region: Region) -> None:
        """A call of Inductor's code."""
        if id(region) not in self._region_of:
            self._region_of[id(region)] = f"region{len(self.regions)}"
            self.regions[self._region_of[id(region)]] = region
        reads = [self._read(n) for n in inputs]
        self._take_over(unit)
        made = [self._new(n) for n in unit.outputs if n not in unit.writes]
        results = f"{', '.join(made)}, = " if made else ""
        self._emit(f"{results}{self._region_of[id(region)]}([{', '.join(reads)}])", reads, made)

    def batch(self, batch: Batch, name: str) -> None:
        """A call of one loop over the elements of many tensors."""
        pointers, reads, made = [], [], []
        for unit, read, written, wanted in zip(batch.units, batch.reads, batch.writes, batch.layouts, strict=True):
            self._take_over(unit)
            for n in read:
                own = self._read(n)
                if value(n).ndim and layout(value(n)) != wanted:
                    like = next(m for m in [*written, *unit.nodes] if layout(value(m)) == wanted)
                    copy = self._fresh()
                    self._emit(f"{copy} = laid_out({own}, {self._strides(like)})", [own], [copy])
                    own = copy
                pointers.append(own)
            for n in written:
                if n not in unit.writes:
                    x, new = value(n), self._new(n)
                    self._emit(f"{new} = empty({tuple(x.shape)}, {x.stride()}, {self._constant(x.dtype)})", [], [new])
                pointers.append(self._name_of[n])
        self._emit(f"{name}({', '.join(pointers)})", pointers, made)

    def _take_over(self, unit: Unit) -> None:
        """Values that are written over donated inputs go by the inputs' names."""
        for n, target in unit.writes.items():
            self._name_of[n] = self._name_of[target]

    def finish(self) -> str:
        """The text of the function."""
        reads: list[str] = []
        results = [self._argument(n, reads) for n in output_node(self.graph).args[0]]  # type: ignore[union-attr]
        last: dict[str, int] = {}
        for i, (_, read, made) in enumerate(self._lines):
            last.update(dict.fromkeys([*read, *made], i))
        kept = {*reads, *self.inputs, *self.constants}
        dropped: dict[int, list[str]] = defaultdict(list)
        for name, i in last.items():
            if name not in kept:
                dropped[i].append(name)
        body = []
        for i, (text, _, _) in enumerate(self._lines):
            body.append(text)
            if dropped[i]:
                body.append(f"del {', '.join(dropped[i])}")
        lines = [f"def run({', '.join(self.inputs)}):", *body, f"return [{', '.join(results)}]"]
        return "\n    ".join(lines)

    def _emit(self, text: str, reads: list[str], made: list[str]) -> None:
        self._lines.append((text, reads, made))

    def _fresh(self) -> str:
        self._count += 1
        return f"t{self._count}"

    def _new(self, node: fx.Node) -> str:
        self._name_of[node] = self._fresh()
        return self._name_of[node]

    def _read(self, node: fx.Node) -> str:
        """The name of a tensor; a view is made when it is first read."""
        if node not in self._name_of:
            whole, x = base(node), value(node)
            offset = x.storage_offset() - value(whole).storage_offset()
            source, made = self._read(whole), self._new(node)
            self._emit(f"{made} = view({source}, {tuple(x.shape)}, {x.stride()}, {offset})", [source], [made])
        return self._name_of[node]

    def _argument(self, x: Any, reads: list[str]) -> str:
        if isinstance(x, fx.Node):
            reads.append(self._read(x))
            return reads[-1]
        if isinstance(x, list | tuple):
            return f"[{', '.join(self._argument(y, reads) for y in x)}]"
        if x is None or isinstance(x, bool | int | str) or (isinstance(x, float) and x - x == 0):
            return repr(x)
        return self._constant(x)

    def _constant(self, x: Any) -> str:
        key = id(x) if isinstance(x, Tensor) else (type(x), str(x))
        if key not in self._constant_of:
            self._constant_of[key] = f"c{len(self.constants)}"
            self.constants[self._constant_of[key]] = x
        return self._constant_of[key]

    def _operation(self, target: Any) -> str:
        packet, overload = target._schema.name.replace("::", "."), target._overloadname
        namespace, name = packet.split(".", 1)
        return self._constant(Operation(namespace, name, overload))

    @staticmethod
    def _strides(node: fx.Node) -> str:
        return str(value(node).stride())
