"""A region as a graph of its own, and what makes two of them the same program."""

from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.tracing.graph import value
from functorch_gen.transforms.tracing.partition import Unit

__all__ = ["region_graph", "region_inputs"]


def region_inputs(unit: Unit) -> list[fx.Node]:
    """What the region's function takes: what it reads, and the donated inputs it only writes."""
    return list(dict.fromkeys([*unit.inputs, *unit.writes.values()]))


def region_graph(unit: Unit) -> tuple[Any, fx.GraphModule]:
    """The graph, and a key that is equal for regions with equal code."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for n in region_inputs(unit):
        copies[n] = graph.placeholder(f"x{len(copies)}")
        copies[n].meta["val"] = value(n)

    def copy(n: fx.Node) -> fx.Node:
        if n not in copies:
            for source in n.all_input_nodes:
                copy(source)
            copies[n] = graph.node_copy(n, copies.__getitem__)
            copies[n].meta = {"val": value(n)}
        return copies[n]

    for n in unit.nodes:
        copy(n)
    results = [copies[n] for n in unit.outputs if n not in unit.writes]
    for n, target in unit.writes.items():
        graph.call_function(torch.ops.aten.copy_.default, (copies[target], copies[n]))
    output = graph.output(tuple(results))
    output.meta["user_visible_output_idxs"] = list(range(len(results)))  # their strides are kept
    graph.eliminate_dead_code()
    return _key(graph), fx.GraphModule(torch.nn.Module(), graph)


def _key(graph: fx.Graph) -> Any:
    number = {n: i for i, n in enumerate(graph.nodes)}

    def plain(x: Any) -> Any:
        if isinstance(x, fx.Node):
            return "node", number[x]
        if isinstance(x, list | tuple):
            return tuple(plain(y) for y in x)
        if isinstance(x, dict):
            return tuple((k, plain(v)) for k, v in sorted(x.items()))
        return type(x), str(x)

    def kind(n: fx.Node) -> Any:
        x = value(n)
        return (tuple(x.shape), x.stride(), x.dtype) if isinstance(x, Tensor) else None

    return tuple(
        (n.op, n.target if n.op == "call_function" else "", plain(n.args), plain(n.kwargs), kind(n))
        for n in graph.nodes
    )
