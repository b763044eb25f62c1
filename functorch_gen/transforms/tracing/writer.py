"""The units of a program as straight Python: one call a line, every tensor dropped after its last use."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.tracing.elementwise import Batch
from functorch_gen.transforms.tracing.graph import base, layout, output_node, value
from functorch_gen.transforms.tracing.kernels import Region
from functorch_gen.transforms.tracing.matmul import LINEAR, as_linear
from functorch_gen.transforms.tracing.partition import Partition, Unit

__all__ = ["FAST", "Nested", "Operation", "Writer"]

_aten: Any = torch.ops.aten

FAST = {  # the same operations by their quickest Python names; their results lie as the trace foresaw
    _aten.mm.default: torch.mm,
    _aten.addmm.default: torch.addmm,
    _aten.bmm.default: torch.bmm,
    _aten.baddbmm.default: torch.baddbmm,
}


@dataclass(frozen=True)
class Operation:
    """An operation by its name."""

    namespace: str
    packet: str
    overload: str


@dataclass
class Nested:
    """An operation that runs other programs."""

    operator: str
    inner: list[Any]  # their code
    count: int  # the length of its first list of arguments


@dataclass
class _Line:
    text: str
    reads: list[str]
    made: list[str]
    inside: int  # bytes that it needs while it runs


class Writer:
    """Writes the function ``run(*inputs)``, a unit at a time."""

    def __init__(self, module: fx.GraphModule):
        self.graph = module.graph
        self.nested: dict[str, Nested] = {}
        self.constants: dict[str, Any] = {}
        self.regions: dict[str, Region] = {}
        self._lines: list[_Line] = []
        self._bytes: dict[str, int] = {}  # of what a name stands for; 0 for a view
        self._owner: dict[str, str] = {}  # the name whose memory a view shows
        self._name_of: dict[fx.Node, str] = {}
        self._constant_of: dict[Any, str] = {}
        self._region_of: dict[int, str] = {}
        self.inputs = [self._new(n) for n in self.graph.nodes if n.op == "placeholder"]
        self._bytes |= dict.fromkeys(self.inputs, 0)  # the caller's
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
            if isinstance(value(x), Tensor) and node.target not in FAST:
                read, made = f"{name}[{x.args[1]}]" if items else name, self._new(x) if items else name
                self._emit(f"{made} = laid_out({read}, {self._strides(x)})", [name], [made])

    def _product(self, node: fx.Node, x: fx.Node, m: fx.Node, bias: fx.Node | None) -> None:
        (k, n), (s, t) = value(m).shape, value(m).stride()
        reads = [self._read(x), self._read(m)] + ([self._read(bias)] if bias else [])
        transposed, name = self._fresh(), self._new(node)
        self._emit(f"{transposed} = view({reads[1]}, {(n, k)}, {(t, s)}, 0)", [reads[1]], [transposed], of=reads[1])
        arguments = f"{reads[0]}, {transposed}, {reads[2] if bias else None}, 'none', [], ''"
        self._emit(
            f"{name} = {self._constant(Operation(*LINEAR))}({arguments})", [reads[0], transposed, *reads[2:]], [name]
        )

    def barrier(self, nodes: list[fx.Node], cut: Partition) -> None:
        """Tensors go through as they are where that is safe: nothing here is moved or shared across units."""
        node, *items = nodes
        xs: Any = node.args[0]
        for item in items:
            read, made = self._read(xs[item.args[1]]), self._new(item)
            copy = cut.handed_on(item) is None
            if copy:
                self._emit(f"{made} = copied({read}, {self._strides(item)})", [read], [made])
            else:
                self._emit(f"{made} = {read}", [read], [made], of=read)

    def nest(self, nodes: list[fx.Node], operator: str, inner: dict[fx.Node, Any]) -> None:
        """A loop or a branch, with the code of its inner programs."""
        node, *items = nodes
        given = [self._tensors([x] if isinstance(x, fx.Node) else x) for x in node.args if x not in inner]
        name, result = f"{operator}{len(self.nested)}", self._new(node)
        self.nested[name] = Nested(operator, list(inner.values()), len(given[0]))
        reads = [x for part in given for x in part]
        lists = ", ".join(f"[{', '.join(part)}]" for part in given)
        self._emit(f"{result} = {name}({lists})", reads, [result], inside=max(code.peak for code in inner.values()))
        for item in items:
            made = self._new(item)
            self._emit(f"{made} = {result}[{item.args[1]}]", [result], [made])

    def _tensors(self, nodes: Any) -> list[str]:
        """Names of contiguous tensors."""
        names = []
        for n in nodes:
            own, x = self._read(n), value(n)
            if not x.is_contiguous():
                copy = self._fresh(x.nbytes)
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
        pointers: list[str] = []
        for unit, read, written, wanted in zip(batch.units, batch.reads, batch.writes, batch.layouts, strict=True):
            self._take_over(unit)
            for n in read:
                own = self._read(n)
                if value(n).ndim and layout(value(n)) != wanted:
                    like = next(m for m in [*written, *unit.nodes] if layout(value(m)) == wanted)
                    copy = self._fresh(value(n).nbytes)
                    self._emit(f"{copy} = laid_out({own}, {self._strides(like)})", [own], [copy])
                    own = copy
                pointers.append(own)
            for n in written:
                if n not in unit.writes:
                    x, new = value(n), self._new(n)
                    self._emit(f"{new} = empty({tuple(x.shape)}, {x.stride()}, {self._constant(x.dtype)})", [], [new])
                pointers.append(self._name_of[n])
        self._emit(f"{name}({', '.join(pointers)})", pointers, [])

    def _take_over(self, unit: Unit) -> None:
        """Values that are written over donated inputs go by the inputs' names."""
        for n, target in unit.writes.items():
            self._name_of[n] = self._name_of[target]

    def finish(self) -> tuple[str, int]:
        """The text of the function, and how many bytes it has at the fullest moment beside its inputs."""
        reads: list[str] = []
        returned: Any = output_node(self.graph).args[0]
        returned = [returned] if isinstance(returned, fx.Node) else returned  # what tells a loop to go on
        results = [self._argument(n, reads) for n in returned]
        last: dict[str, int] = {}
        for i, line in enumerate(self._lines):
            last.update(dict.fromkeys([*line.reads, *line.made], i))
        kept = {*reads, *self.inputs, *self.constants}
        dropped: dict[int, list[str]] = defaultdict(list)
        for name, i in last.items():
            if name not in kept:
                dropped[i].append(name)
        body = []
        for i, line in enumerate(self._lines):
            body.append(line.text)
            if dropped[i]:
                body.append(f"del {', '.join(dropped[i])}")
        lines = [f"def run({', '.join(self.inputs)}):", *body, f"return [{', '.join(results)}]"]
        return "\n    ".join(lines), self._peak(dropped)

    def _peak(self, dropped: dict[int, list[str]]) -> int:
        names: dict[str, set[str]] = defaultdict(set)  # by the owner of the memory: who still shows it
        live = peak = 0
        for i, line in enumerate(self._lines):
            for name in line.made:
                owner = self._owner.get(name, name)
                live += self._bytes.get(owner, 0) if not names[owner] else 0
                names[owner].add(name)
            peak = max(peak, live + line.inside)
            for name in dropped[i]:
                owner = self._owner.get(name, name)
                names[owner].discard(name)
                live -= self._bytes.get(owner, 0) if not names[owner] else 0
        return peak

    def _emit(self, text: str, reads: list[str], made: list[str], of: str | None = None, inside: int = 0) -> None:
        self._lines.append(_Line(text, reads, made, inside))
        if of is not None:
            self._owner |= dict.fromkeys(made, self._owner.get(of, of))

    def _fresh(self, size: int = 0) -> str:
        name = f"t{len(self._bytes)}"
        self._bytes[name] = size
        return name

    def _new(self, node: fx.Node) -> str:
        x = value(node)
        self._name_of[node] = self._fresh(x.nbytes if isinstance(x, Tensor) else 0)
        return self._name_of[node]

    def _read(self, node: fx.Node) -> str:
        """The name of a tensor; a view is made when it is first read."""
        if node not in self._name_of:
            whole, x = base(node), value(node)
            offset = x.storage_offset() - value(whole).storage_offset()
            source, made = self._read(whole), self._new(node)
            text = f"{made} = view({source}, {tuple(x.shape)}, {x.stride()}, {offset})"
            self._emit(text, [source], [made], of=source)
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
