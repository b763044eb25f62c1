"""Regions without any change of shape, all alike, as one loop over the elements of all of them: C code.

The update of a parameter is such a region: moments, clipping, decay and average, element by element. A network has
hundreds of them that differ in size alone, so they become one kernel whose threads share all elements evenly.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.tracing.graph import base, is_view, layout, value
from functorch_gen.transforms.tracing.partition import Unit

__all__ = ["Batch", "batches"]

_aten: Any = torch.ops.aten

_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.bool: "bool",
}

_ARITHMETIC = {  # in the dtype of the result
    _aten.add: "{0} + {1}",
    _aten.sub: "{0} - {1}",
    _aten.mul: "{0} * {1}",
    _aten.neg: "-{0}",
    _aten.clone: "{0}",
    _aten._to_copy: "{0}",
    torch.ops.prims.convert_element_type: "{0}",
    _aten.bitwise_and: "{0} & {1}",
    _aten.bitwise_or: "{0} | {1}",
    _aten.logical_not: "!{0}",
}

_FLOATING = {  # results are floating
    _aten.div: "{0} / {1}",
    _aten.reciprocal: "1 / {0}",
    _aten.sqrt: "std::sqrt({0})",
    _aten.rsqrt: "1 / std::sqrt({0})",
    _aten.abs: "std::abs({0})",
    _aten.minimum: "({0} < {1} || {0} != {0} ? {0} : {1})",
    _aten.maximum: "({0} > {1} || {0} != {0} ? {0} : {1})",
}

_ON_SCALARS = {  # they keep a compiler from using vectors
    _aten.exp: "std::exp({0})",
    _aten.log: "std::log({0})",
    _aten.cos: "std::cos({0})",
    _aten.sin: "std::sin({0})",
    _aten.tanh: "std::tanh({0})",
    _aten.pow: "std::pow({0}, {1})",
}

_COMPARISONS = {_aten.eq: "==", _aten.ne: "!=", _aten.lt: "<", _aten.le: "<=", _aten.gt: ">", _aten.ge: ">="}

_CHUNK = 4096
"""Elements that a thread takes at a time."""


_CONSTANTS = {_aten.full, _aten.scalar_tensor}


class _UnsuitedError(Exception):
    """A region that is not element-wise, or holds what has no C form here."""


class Batch:
    """Regions that are one program on different memory.

    ``tensors`` are the arguments of the kernel, one row a region: what it reads, then what it writes.
    """

    def __init__(self, units: Sequence[Unit]):
        self.units = list(units)
        self.programs = [_Program(u) for u in units]
        first = self.programs[0]
        self.layouts = [p.layout for p in self.programs]  # in which the tensors that are read must lie
        self.reads = [p.reads for p in self.programs]
        self.writes = [p.results for p in self.programs]
        self.sizes = [p.size for p in self.programs]
        self.width = len(first.reads) + len(first.results)

    def source(self, name: str) -> str:
        """The C++ function ``void name(char** p)``: the pointers of ``tensors``, row by row."""
        first = self.programs[0]
        counts = ", ".join(map(str, self.sizes))
        ends = ", ".join(map(str, _running(-(-n // _CHUNK) for n in self.sizes)))
        chunks = sum(-(-n // _CHUNK) for n in self.sizes)
        sums = len(first.sums)
        body = _LOOP.format(
            name=name, counts=counts, ends=ends, chunks=chunks, chunk=_CHUNK, width=self.width, sums=max(1, sums),
            threads=torch.get_num_threads(), parallel=int(sum(self.sizes) >= 4 * _CHUNK and chunks > 1),
            pointers="\n".join(first.pointers()), scalars="\n".join(first.scalars()), statements="\n".join(first.body),
            begin=" ".join(f"double total{i} = 0;" for i in range(sums)),
            reduction=f"reduction(+ : {', '.join(f'total{i}' for i in range(sums))})" if sums else "",
            keep=" ".join(f"partial[c * {sums} + {i}] = total{i};" for i in range(sums)),
            regions=len(self.sizes),
            finish="\n".join(first.finish(i, sums) for i in range(sums)),
        )  # fmt: skip
        return body


_LOOP = """
static void {name}(char** p) {{
    static const int64_t counts[] = {{{counts}}};
    static const int64_t ends[] = {{{ends}}};
    std::vector<double> partial({chunks} * {sums});
    #pragma omp parallel num_threads({threads}) if({parallel})
    #pragma omp for schedule(static)
    for (int64_t c = 0; c < {chunks}; ++c) {{
        const int64_t r = std::upper_bound(ends, ends + {regions}, c) - ends;
        const int64_t begin = (c - (r ? ends[r - 1] : 0)) * {chunk};
        const int64_t end = std::min(begin + {chunk}, counts[r]);
        char** q = p + r * {width};
        {pointers}
        {scalars}
        {begin}
        #pragma omp simd {reduction}
        for (int64_t j = begin; j < end; ++j) {{
{statements}
        }}
        {keep}
    }}
    for (int64_t r = 0, c = 0; r < {regions}; ++r) {{
        char** q = p + r * {width};
        const int64_t begin = c, end = ends[r];
        {finish}
        c = end;
    }}
}}
"""


class _Program:
    """One region as C statements; equal for regions that are alike."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.shape: Any = next((value(n).shape for n in unit.nodes if _has_axes(n)), torch.Size([]))
        self.layout = next((layout(value(n)) for n in [*unit.outputs, *unit.nodes] if _has_axes(n)), ())
        self.size = math.prod(self.shape)
        self.reads: list[fx.Node] = []  # nodes (views too) whose memory is read
        self.results: list[fx.Node] = []
        self.sums: list[fx.Node] = []
        self.body: list[str] = []
        self.names: dict[fx.Node, str] = {}
        self.slots: list[tuple[str, bool]] = []  # C type, one element
        for node in unit.nodes:
            if _packet_of(node) not in _CONSTANTS:
                self._add(node, _packet_of(node))
        self.scalar_region = not self.shape
        for node in unit.outputs:
            self._store(node)

    def key(self) -> tuple[Any, ...]:
        """Equal for regions that one kernel can serve."""
        shared = tuple(n for n in self.reads if value(n).ndim == 0)
        return tuple(self.body), tuple(self.slots), shared, tuple(value(n).dtype for n in self.results), len(self.sums)

    def pointers(self) -> list[str]:
        lines = [f"const {kind}* r{i} = (const {kind}*)q[{i}];" for i, (kind, _) in enumerate(self.slots)]
        for i, n in enumerate(self.results):
            if n not in self.sums:
                kind = _TYPES[value(n).dtype]
                lines.append(f"{kind}* w{i} = ({kind}*)q[{len(self.reads) + i}];")
        return lines

    def scalars(self) -> list[str]:
        return [f"const {kind} s{i} = *r{i};" for i, (kind, single) in enumerate(self.slots) if single]

    def finish(self, i: int, sums: int) -> str:
        kind = _TYPES[value(self.sums[i]).dtype]
        slot = len(self.reads) + self.results.index(self.sums[i])
        return (
            f"{{ double total = 0; for (int64_t k = begin; k < end; ++k) total += partial[k * {sums} + {i}]; "
            f"*({kind}*)q[{slot}] = total; }}"
        )

    def _add(self, node: fx.Node, packet: Any) -> None:
        x = value(node)
        if not isinstance(x, Tensor):
            raise _UnsuitedError
        if packet is _aten.sum:
            if x.ndim or node.kwargs or len(node.args) != 1 or not x.is_floating_point() or not self.shape:
                raise _UnsuitedError
            source = self._operand(node.args[0], x.dtype)
            self.body.append(f"total{len(self.sums)} += {source};")
            self.sums.append(node)
            return
        if x.shape != self.shape:
            raise _UnsuitedError
        name = f"t{len(self.names)}"
        self.body.append(f"const {_type(x.dtype)} {name} = {self._expression(node, packet, x.dtype)};")
        self.names[node] = name

    def _store(self, node: fx.Node) -> None:
        if node not in self.sums:
            if layout(value(node)) != self.layout:
                raise _UnsuitedError
            self.body.append(f"w{len(self.results)}[j] = {self.names[node]};")
        self.results.append(node)

    def _expression(self, node: fx.Node, packet: Any, dtype: torch.dtype) -> str:
        args, kwargs = list(node.args), dict(node.kwargs)
        if packet is _aten.where:
            condition = self._operand(args[0], torch.bool)
            return f"{condition} ? {self._operand(args[1], dtype)} : {self._operand(args[2], dtype)}"
        if packet in _COMPARISONS:
            common = torch.result_type(_known(args[0]), _known(args[1]))
            a, b = (self._operand(x, common) for x in args)
            return f"{a} {_COMPARISONS[packet]} {b}"
        if packet in (torch.ops.prims.convert_element_type, _aten._to_copy):
            args, kwargs = args[:1], {}
        if packet is _aten.clone:
            kwargs = {}
        if kwargs or (len(args) > 2 and isinstance(args[2], int | float)):  # alpha, rounding_mode
            raise _UnsuitedError
        form = _ARITHMETIC.get(packet)
        if form is None and dtype.is_floating_point:
            form = _FLOATING.get(packet) or (_ON_SCALARS.get(packet) if not self.shape else None)
        if form is None:
            raise _UnsuitedError
        return form.format(*[self._operand(x, dtype) for x in args])

    def _operand(self, x: Any, dtype: torch.dtype) -> str:
        """``x`` as a C expression of this dtype."""
        kind = _type(dtype)
        if not isinstance(x, fx.Node):
            return _literal(x, dtype)
        known = value(x)
        if x in self.names:
            return self.names[x] if known.dtype == dtype else f"({kind}){self.names[x]}"
        if _packet_of(x) in _CONSTANTS:
            return self._constant(x, dtype)
        if is_view(x) and base(x) in self.names:
            raise _UnsuitedError
        if x not in self.unit.inputs and base(x) not in self.unit.inputs:
            raise _UnsuitedError  # a value that is computed again here
        if known.ndim and known.shape != self.shape:
            raise _UnsuitedError
        if x not in self.reads:
            self.reads.append(x)
            self.slots.append((_type(known.dtype), known.ndim == 0))
        i = self.reads.index(x)
        name = f"s{i}" if known.ndim == 0 else f"r{i}[j]"
        return name if known.dtype == dtype else f"({kind}){name}"

    def _constant(self, x: fx.Node, dtype: torch.dtype) -> str:
        number: Any = x.args[1] if _packet_of(x) is _aten.full else x.args[0]
        if not isinstance(number, bool | int | float):
            raise _UnsuitedError
        return _literal(torch.tensor(number, dtype=value(x).dtype, device="cpu").item(), dtype)


def batches(units: Sequence[Unit]) -> tuple[list[Batch], list[Unit]]:
    """Groups of alike element-wise regions, and the other fused units."""
    groups: dict[Any, list[Unit]] = {}
    rest = []
    for unit in units:
        try:
            groups.setdefault(_Program(unit).key(), []).append(unit)
        except _UnsuitedError:
            rest.append(unit)
    return [Batch(part) for group in groups.values() for part in _concurrent(group)], rest


def _concurrent(units: list[Unit]) -> Iterator[list[Unit]]:
    """Splits units where one could need the result of another."""
    part: list[Unit] = []
    for unit in sorted(units, key=lambda u: u.level):
        if part and unit.level >= min(u.deadline for u in part):
            yield part
            part = []
        part.append(unit)
    yield part


def _packet_of(node: fx.Node) -> Any:
    """The operation, whatever its overload."""
    return node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target


def _known(x: Any) -> Any:
    return value(x) if isinstance(x, fx.Node) else x


def _has_axes(node: fx.Node) -> bool:
    return isinstance(value(node), Tensor) and value(node).ndim > 0 and _packet_of(node) not in _CONSTANTS


def _type(dtype: torch.dtype) -> str:
    if dtype not in _TYPES:
        raise _UnsuitedError
    return _TYPES[dtype]


def _literal(x: Any, dtype: torch.dtype) -> str:
    if not isinstance(x, bool | int | float):
        raise _UnsuitedError
    if dtype.is_floating_point:
        number = float(x)
        if math.isnan(number):
            return "NAN"
        if math.isinf(number):
            return "INFINITY" if number > 0 else "-INFINITY"
        return f"({_type(dtype)}){number.hex()}"
    return f"({_type(dtype)}){int(x)}"


def _running(counts: Any) -> list[int]:
    ends, total = [], 0
    for n in counts:
        total += n
        ends.append(total)
    return ends
