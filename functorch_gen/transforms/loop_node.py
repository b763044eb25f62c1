"""Loops and branches as single nodes of the graph that is being traced.

Each is one of torch's operators, whose functions are graphs traced once: ``scan(body, carry, xs, closed)``,
``while_loop(go_on, body, carry, closed)``, ``cond(pred, true, false, operands)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._higher_order_ops.cond import cond_op
from torch._higher_order_ops.scan import scan_op
from torch._higher_order_ops.while_loop import while_loop_op
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from functorch_gen.transforms.derivatives import Flat
from functorch_gen.transforms.subgraph import Subgraph, add_node, share_inputs, trace_subgraph, values_of

__all__ = ["choice_node", "loop_node", "repeat_node"]


def loop_node(
    step: Flat, carry: Sequence[Tensor], xs: Sequence[Tensor], closed: Sequence[Tensor], *, reverse: bool = False
) -> tuple[Tensor, ...]:
    """``(*carry, *ys)`` of a loop over axis 0 of ``xs``; ``step``: ``(*carry, *x, *closed) -> (*carry, *y)``.

    Raises:
        ValueError: if ``step`` writes to its inputs in place.
    """
    if reverse:
        return _reverse_node(step, carry, xs, closed)
    carry = _unshared(carry)
    xs, closed = [x.contiguous() for x in xs], [x.contiguous() for x in closed]
    with disable_proxy_modes_tracing():
        body = trace_subgraph("scan", step, _unknown([*carry, *[x[0] for x in xs], *closed]))
        values, length = values_of(body), xs[0].shape[0]
        out = _unknown(values[: len(carry)]) + [x.new_empty((length, *x.shape)) for x in values[len(carry) :]]
    return add_node(scan_op, [body.module, list(carry), xs, [*closed, *body.constants]], out)


def _reverse_node(
    step: Flat, carry: Sequence[Tensor], xs: Sequence[Tensor], closed: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Reads the xs by a counter that runs down: flipped copies of them would take their memory once more."""
    first, last, length = len(carry), len(carry) + 1 + len(xs), xs[0].shape[0]
    counter = torch.arange(length - 1, -1, -1, device=xs[0].device)

    def counted(*flat: Tensor) -> tuple[Tensor, ...]:
        i = flat[first].reshape(1)
        return step(*flat[:first], *[x.index_select(0, i).squeeze(0) for x in flat[first + 1 : last]], *flat[last:])

    out = loop_node(counted, carry, [counter], [*xs, *closed])
    return (*out[:first], *[y.flip(0) for y in out[first:]])


def repeat_node(go_on: Flat, body: Flat, carry: Sequence[Tensor], closed: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The last carry of ``while go_on(*carry, *closed): carry = body(*carry, *closed)``.

    Raises:
        ValueError: if a function writes to its inputs in place.
    """
    carry, closed = _unshared(carry), [x.contiguous() for x in closed]
    with disable_proxy_modes_tracing():
        samples = _unknown([*carry, *closed])
        graphs = [trace_subgraph("while_loop", fun, samples) for fun in (go_on, body)]
        out = _unknown(values_of(graphs[1]))
    _return_one(graphs[0])
    inputs = share_inputs(graphs, [*carry, *closed], kept=len(carry))
    return add_node(while_loop_op, [*[g.module for g in graphs], inputs[: len(carry)], inputs[len(carry) :]], out)


def _return_one(subgraph: Subgraph) -> None:
    """The only output as it is, not in a tuple: torch's operator wants it so."""
    (output,) = subgraph.module.graph.find_nodes(op="output")
    output.args = output.args[0]


def choice_node(true: Flat, false: Flat, pred: Tensor, operands: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``true(*operands)`` or ``false(*operands)``, which return alike, as ``pred`` turns out; the other does not run.

    Raises:
        ValueError: if a function writes to its inputs in place.
    """
    operands = [x.contiguous() for x in operands]
    with disable_proxy_modes_tracing():
        samples = _unknown(operands)
        graphs = [trace_subgraph("cond", fun, samples) for fun in (true, false)]
        out = _unknown(values_of(graphs[0]))
    inputs = share_inputs(graphs, operands)
    return add_node(cond_op, [pred, *[g.module for g in graphs], inputs], out)


def _unknown(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors like these. A fake tensor may know its value (a literal's), which is another at the next step."""
    return [torch.empty_like(x) for x in tensors]


def _unshared(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Contiguous, each with memory of its own."""
    taken: set[int] = set()
    out: list[Tensor] = []
    for x in tensors:
        shared = not isinstance(x, FakeTensor) or x.untyped_storage()._cdata in taken
        x = x.clone(memory_format=torch.contiguous_format) if shared or not x.is_contiguous() else x
        taken.add(x.untyped_storage()._cdata)
        out.append(x)
    return out
