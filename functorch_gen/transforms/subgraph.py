"""Functions that become graphs inside the graph that is being traced: the place that knows make_fx's tracers."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._guards import active_fake_mode
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)

from functorch_gen.transforms.derivatives import Flat
from functorch_gen.transforms.graph_passes import prune, repair
from functorch_gen.transforms.indexing import TensorIndices
from functorch_gen.transforms.known_zeros import Fakes

__all__ = [
    "Subgraph",
    "abstract",
    "add_node",
    "decide",
    "is_abstract",
    "is_graph_traced",
    "share_inputs",
    "trace_subgraph",
    "values_of",
]


def is_graph_traced() -> bool:
    """Whether make_fx writes down what is computed here, on tensors without data."""
    return get_proxy_mode() is not None and active_fake_mode() is not None


def is_abstract() -> bool:
    """Whether tensors have no data here and nobody writes down what is computed: only shapes are asked for."""
    return get_proxy_mode() is None and active_fake_mode() is not None


@contextlib.contextmanager
def abstract() -> Iterator[None]:
    """Makes tensors without data, and hides what is computed from all transforms and traces around."""
    mode = active_fake_mode() or Fakes(allow_non_fake_inputs=True)
    with disable_proxy_modes_tracing(), temporarily_clear_interpreter_stack(), mode:
        yield


def decide(pred: Tensor) -> bool:
    """The value of ``pred``, also where ``linearize`` traces: at fixed primals the way through a program is fixed."""
    with disable_proxy_modes_tracing():
        return bool(pred)


class Subgraph(NamedTuple):
    """An ATen graph of tensors alone, and the tensors from outside that it reads: its last inputs."""

    module: fx.GraphModule
    constants: list[Tensor]


def trace_subgraph(name: str, fun: Flat, samples: Sequence[Tensor]) -> Subgraph:
    """The graph of ``fun(*samples)``; its outputs are contiguous and share memory with no input and no other output.

    Args:
        name: whose function it is, for the message.
    Raises:
        ValueError: if ``fun`` writes to its inputs in place.
    """

    def body(*inputs: Tensor) -> tuple[Tensor, ...]:
        versions = [x._version for x in inputs]
        with TensorIndices():
            outputs = fun(*inputs)
        if [x._version for x in inputs] != versions:
            raise ValueError(f"{name}: expected functions that return new values, got writes in place to arguments")
        taken = {x.untyped_storage()._cdata for x in inputs}
        fresh: list[Tensor] = []
        for x in outputs:
            if x.untyped_storage()._cdata in taken or not x.is_contiguous() or not isinstance(x, FakeTensor):
                x = x.clone(memory_format=torch.contiguous_format)
            taken.add(x.untyped_storage()._cdata)
            fresh.append(x)
        return tuple(fresh)

    module = make_fx(body, tracing_mode="real", _allow_non_fake_inputs=True)(*samples)
    constants = _lift_constants(module)
    repair(module)
    prune(module)
    return Subgraph(module, constants)


def _lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Makes inputs of the tensors that the graph holds, those of outer traces among them; returns them."""
    lifted: dict[str, fx.Node] = {}
    constants: list[Tensor] = []
    for node in module.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        constant = None if name in lifted else getattr(module, name)
        if isinstance(constant, Tensor):
            lifted[name] = _add_input(module.graph, len(_inputs(module)), _fake(constant))
            constants.append(constant)
        if name in lifted:
            node.replace_all_uses_with(lifted[name])
            module.graph.erase_node(node)
    for name in lifted:
        delattr(module, name)  # the outer graph would find the tensor there
    return constants


def _inputs(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def _add_input(graph: fx.Graph, position: int, value: Tensor) -> fx.Node:
    """A new input between those that there are."""
    nodes = list(graph.find_nodes(op="placeholder"))
    place = graph.inserting_after(nodes[position - 1]) if position else graph.inserting_before(next(iter(graph.nodes)))
    with place:
        node = graph.placeholder(f"closed_over_{len(nodes)}")
    node.meta["val"] = value
    return node


def _fake(x: Tensor) -> Tensor:
    mode = active_fake_mode()
    return x if isinstance(x, FakeTensor) or mode is None else mode.from_tensor(x.detach(), static_shapes=True)


def share_inputs(subgraphs: Sequence[Subgraph], given: Sequence[Tensor], kept: int = 0) -> list[Tensor]:
    """Makes the graphs take the same inputs, ``given`` and the constants of all of them; returns these.

    What none of them reads is left out, except for the first ``kept``.
    """
    inputs = list(given)
    for reader in subgraphs:
        for other in subgraphs:
            if other is not reader:
                for i, x in enumerate(reader.constants):
                    _add_input(other.module.graph, len(inputs) + i, _fake(x))
        inputs += reader.constants
    places = [_inputs(subgraph.module) for subgraph in subgraphs]
    unread = [i for i in range(kept, len(inputs)) if not any(nodes[i].users for nodes in places)]
    for subgraph, nodes in zip(subgraphs, places, strict=True):
        for i in unread:
            subgraph.module.graph.erase_node(nodes[i])
        subgraph.module.recompile()
    return [x for i, x in enumerate(inputs) if i not in unread]


def values_of(subgraph: Subgraph) -> list[Tensor]:
    """What the graph returned when it was traced."""
    (output,) = subgraph.module.graph.find_nodes(op="output")
    return [node.meta["val"] for node in output.args[0]]


def add_node(operator: Any, args: Sequence[Any], out: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``out`` as a node ``operator(*args)`` of the graph that is being traced; args are graphs, tensors and lists."""
    mode: Any = get_proxy_mode()
    root = mode.tracer.root

    def traced(x: Any) -> Any:
        if isinstance(x, fx.GraphModule):
            root.add_module(_free_name(root, f"{operator.name()}_body"), x)
            return x
        return mode.tracer.unwrap_proxy(x) if isinstance(x, Tensor) else tuple(traced(item) for item in x)

    node = mode.tracer.create_proxy("call_function", operator, traced(args), {}, name=operator.name())
    return track_tensor_tree(tuple(out), node, constant=None, tracer=mode.tracer)


def _free_name(root: torch.nn.Module, name: str) -> str:
    number = 0
    while hasattr(root, f"{name}_{number}"):
        number += 1
    return f"{name}_{number}"
