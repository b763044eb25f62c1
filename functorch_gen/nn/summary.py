"""summary: what a network is made of, as a table."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from functorch_gen import random, tree
from functorch_gen.nn.capture import watch
from functorch_gen.nn.parts import is_stateful
from functorch_gen.transforms.shapes import ShapeDtypeStruct, eval_shape
from functorch_gen.transforms.tracing.text import columns
from functorch_gen.typing import Key, Tree

__all__ = ["Summary", "SummaryRow", "summary"]

_ATEN = torch.ops.aten


def _attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q, k, v)


_COUNTS: dict[Any, Any] = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _ATEN.dot: lambda x, _, **__: 2 * x.numel(),
    _ATEN.mv: lambda matrix, _, **__: 2 * matrix.numel(),
    _ATEN.addmv: lambda _, matrix, *__, **___: 2 * matrix.numel(),
}
"""By shapes: what torch does not count."""


class SummaryRow(NamedTuple):
    """One sublayer, what is inside it included; or one parameter."""

    name: str
    layer: str
    output: Tree  # of the last call, a ShapeDtypeStruct for each tensor; a parameter's own
    params: int
    flops: int  # of all calls


@dataclass(frozen=True)
class Summary:
    """What :func:`summary` returns; ``str()`` is a table.

    Attributes:
        rows: the sublayers in the order of their first calls.
        total: the whole network, parameters included that no sublayer owns.

    >>> Summary((), SummaryRow("total", "Linear", (2, 3), 12, 48)).total.params
    12
    """

    rows: tuple[SummaryRow, ...]
    total: SummaryRow

    def __str__(self) -> str:
        shown = [(row.name, row.layer, _shown(row.output), f"{row.params:,}", f"{row.flops:,}") for row in self._all]
        return columns([("name", "layer", "output", "params", "flops"), *shown])

    @property
    def _all(self) -> tuple[SummaryRow, ...]:
        return (*self.rows, self.total)


def summary(model: Any, *inputs: Tree, key: Key | None = None, train: bool = False, **options: Any) -> Summary:
    """The sublayers of ``model`` called on ``inputs``: names, output shapes, parameters, floating-point operations.

    Everything runs on tensors without data: nothing is computed and no memory is taken. A sublayer is what a composite
    layer calls by :class:`Bound`. Operations count 2 for each multiply-add of matrix products, convolutions and
    attention (a causal one as if it were not), and nothing else.

    Args:
        inputs: tensors or :class:`ShapeDtypeStruct`, and what else the model takes. Without any the rows are the
            parameters and their shapes, and no operation is counted.
        key: switches dropout on; None: off.
        train: for a stateful model.
        options: further keywords of the model.

    >>> from functorch_gen import nn
    >>> table = summary(nn.MLP(3, (4,), 2), ShapeDtypeStruct((5, 3)))
    >>> print(table)
    name     layer    output  params  flops
    0        Linear   (5, 4)      16    120
    dropout  Dropout  (5, 4)       0      0
    2        Linear   (5, 2)      10     80
    total    MLP      (5, 2)      26    200
    >>> table.rows[0].flops
    120
    >>> print(summary(nn.Linear(3, 4)))
    name    layer      output  params  flops
    bias    parameter  (4,)         4      0
    weight  parameter  (4, 3)      12      0
    total   Linear     None        16      0
    """
    if not inputs and not options:
        return _parameters(model)
    counter = FlopCounterMode(display=False, custom_mapping=_COUNTS)
    rows = _Rows(counter)
    found: dict[str, Any] = {}

    def run(*inputs: Tree) -> Tree:
        device = next((x.device for x in tree.leaves(inputs) if isinstance(x, Tensor)), "cpu")
        params = found["params"] = model.init(random.key(0).to(device))
        call: dict[str, Any] = {**options, "key": key}
        if is_stateful(model):
            call["train"] = train
            inputs = (tree.to(model.init_state(), device), *inputs)
        with counter:
            y = watch(rows, model, params, *inputs, **call)
        return y[0] if is_stateful(model) else y

    shapes = eval_shape(run, *inputs)
    params = found["params"]
    total = SummaryRow("total", _kind(model), shapes, tree.size(params), counter.get_total_flops())
    return Summary(tuple(row._replace(params=_size_below(params, row.name)) for row in rows.rows.values()), total)


def _parameters(model: Any) -> Summary:
    shapes = tree.names(eval_shape(model.init, random.key(0)))
    sizes = {name: torch.Size(x.shape).numel() for name, x in shapes.items()}
    rows = [SummaryRow(name, "parameter", x, sizes[name], 0) for name, x in shapes.items()]
    return Summary(tuple(rows), SummaryRow("total", _kind(model), None, sum(sizes.values()), 0))


@dataclass
class _Rows:
    """The sublayers' rows by path, parameters not yet counted."""

    counter: FlopCounterMode
    rows: dict[str, SummaryRow] = field(default_factory=dict)
    _begun: list[int] = field(default_factory=list)

    def enter(self, path: str, layer: Any) -> None:
        """A row for the sublayer, before those inside it."""
        self.rows.setdefault(path, SummaryRow(path, _kind(layer), None, 0, 0))
        self._begun.append(self.counter.get_total_flops())

    def leave(self, path: str, y: Any) -> None:
        """Adds what the call has taken."""
        flops = self.counter.get_total_flops() - self._begun.pop()
        row = self.rows[path]
        self.rows[path] = row._replace(output=tree.map(_shape_of, y), flops=row.flops + flops)


def _kind(layer: Any) -> str:
    return next(kind.__name__ for kind in type(layer).__mro__ if not kind.__name__.startswith("_"))


def _shape_of(x: Any) -> Any:
    return ShapeDtypeStruct(tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x


def _shown(output: Tree) -> str:
    return str(tree.map(lambda x: x.shape if isinstance(x, ShapeDtypeStruct) else x, output))


def _size_below(params: Tree, path: str) -> int:
    return sum(x.numel() for name, x in tree.names(params).items() if f"{name}.".startswith(f"{path}."))
