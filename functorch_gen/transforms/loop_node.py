"""A loop as one node of the graph that is being traced: the place that knows make_fx's tracers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import active_fake_mode
from torch._higher_order_ops.scan import scan_op
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)

from functorch_gen.transforms.derivatives import Flat
from functorch_gen.transforms.graph_passes import prune, repair

__all__ = ["is_graph_traced", "loop_node"]


def is_graph_traced() -> bool:
    """Whether make_fx writes down what is computed here, on tensors without data."""
    return get_proxy_mode() is not None and active_fake_mode() is not None


def loop_node(
    step: Flat, carry: Sequence[Tensor], xs: Sequence[Tensor], closed: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """``(*carry, *ys)`` of a loop over axis 0 of ``xs``: a node ``scan(body, carry, xs, closed)`` and its items.

    The body is an ATen graph of tensors alone, ``(*carry, *x, *closed) -> (*carry, *y)``; its outputs are contiguous
    and share memory neither with its inputs nor with one another. The node's carries have memory of their own.

    Raises:
        ValueError: if ``step`` writes to its inputs in place.
    """
    mode: Any = get_proxy_mode()
    carry = _unshared(carry)
    xs, closed = [x.contiguous() for x in xs], [x.contiguous() for x in closed]
    with disable_proxy_modes_tracing():
        samples = [x.clone() for x in (*carry, *[x[0] for x in xs], *closed)]
        body, constants = _trace_body(step, samples)
        values = [node.meta["val"] for node in _output(body).args[0]]
        length = xs[0].shape[0]
        out = [x.clone() for x in values[: len(carry)]]
        out += [x.new_empty((length, *x.shape)) for x in values[len(carry) :]]
    mode.tracer.root.add_module(_free_name(mode.tracer.root), body)
    closed = (*closed, *constants)
    given = [[mode.tracer.unwrap_proxy(x) for x in part] for part in (carry, xs, closed)]
    node = mode.tracer.create_proxy("call_function", scan_op, (body, *given[:2], tuple(given[2])), {}, name="scan")
    return track_tensor_tree(tuple(out), node, constant=None, tracer=mode.tracer)


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


def _trace_body(step: Flat, samples: Sequence[Tensor]) -> tuple[fx.GraphModule, list[Tensor]]:
    """The graph of a step, and the tensors from outside that it reads: its last inputs."""

    def body(*inputs: Tensor) -> tuple[Tensor, ...]:
        versions = [x._version for x in inputs]
        outputs = step(*inputs)
        if [x._version for x in inputs] != versions:
            raise ValueError("scan: expected f to return new values, got writes in place to its arguments")
        taken = {x.untyped_storage()._cdata for x in inputs}
        fresh: list[Tensor] = []
        for x in outputs:
            if x.untyped_storage()._cdata in taken or not x.is_contiguous() or not isinstance(x, FakeTensor):
                x = x.clone(memory_format=torch.contiguous_format)
            taken.add(x.untyped_storage()._cdata)
            fresh.append(x)
        return tuple(fresh)

    graph = make_fx(body, tracing_mode="real", _allow_non_fake_inputs=True)(*samples)
    constants = _lift_constants(graph)
    repair(graph)
    prune(graph)
    return graph, constants


def _lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that the graph holds, those of outer traces among them; returns them."""
    graph = module.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    lifted: dict[str, fx.Node] = {}
    constants: list[Tensor] = []
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        constant = None if name in lifted else getattr(module, name)
        if isinstance(constant, Tensor):
            with graph.inserting_after(last):
                last = lifted[name] = graph.placeholder(f"closed_over_{len(constants)}")
            last.meta["val"] = _fake(constant)
            constants.append(constant)
        if name in lifted:
            node.replace_all_uses_with(lifted[name])
            graph.erase_node(node)
    for name in lifted:
        delattr(module, name)  # the outer graph would find the tensor there
    return constants


def _fake(x: Tensor) -> Tensor:
    mode = active_fake_mode()
    return x if isinstance(x, FakeTensor) or mode is None else mode.from_tensor(x.detach(), static_shapes=True)


def _output(module: fx.GraphModule) -> Any:
    return next(node for node in reversed(module.graph.nodes) if node.op == "output")


def _free_name(root: torch.nn.Module) -> str:
    number = 0
    while hasattr(root, f"scan_body_{number}"):
        number += 1
    return f"scan_body_{number}"
