"""A region as a graph of its own, and what makes two of them the same program."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.transforms.tracing.graph import base, is_view, size, value
from functorch_gen.transforms.tracing.partition import Unit

__all__ = ["RegionGraph", "region_graph"]


@dataclass
class RegionGraph:
    """A region as a graph, what its placeholders stand for, and a key that is equal for regions with equal code."""

    module: fx.GraphModule
    inputs: list[fx.Node]
    key: Any


def region_graph(unit: Unit) -> RegionGraph:
    """The graph of a unit. Donated inputs that it writes over are among its inputs."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []
    written = set(unit.writes.values())
    outside = {*unit.inputs, *written}

    def take_in(n: fx.Node) -> None:
        with graph.inserting_after(copies[inputs[-1]]) if inputs else graph.inserting_before():
            copies[n] = graph.placeholder(f"x{len(inputs)}")
        copies[n].meta["val"] = value(n)
        inputs.append(n)

    def copy(n: fx.Node) -> None:
        if n in copies:
            return
        part = is_view(n) and base(n) in outside - written and 0 < size(n) < size(base(n))
        if n in outside or part:  # a part of a larger tensor comes as it is: its place there is no part of the code
            take_in(n)
            return
        for source in n.all_input_nodes:
            copy(source)
        copies[n] = graph.node_copy(n, copies.__getitem__)
        copies[n].meta = {"val": value(n)}

    for n in (*unit.nodes, *unit.writes.values()):
        copy(n)
    results = [copies[n] for n in unit.outputs if n not in unit.writes]
    for n, target in unit.writes.items():
        graph.call_function(torch.ops.aten.copy_.default, (copies[target], copies[n]))
    output = graph.output(tuple(results))
    output.meta["user_visible_output_idxs"] = list(range(len(results)))  # their strides are kept
    graph.eliminate_dead_code()
    return RegionGraph(fx.GraphModule(torch.nn.Module(), graph), inputs, _key(graph))


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
