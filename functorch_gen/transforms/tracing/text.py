"""A traced graph to be read: one operation a line, with the function and the line it comes from."""

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator

from functorch_gen import tree
from functorch_gen.transforms.tracing.sites import site_of
from functorch_gen.transforms.tracing.trace import Trace

__all__ = ["columns", "operation", "readable"]

_COMMENT_AT = 72
"""The column in which the source of a line is named, where the line is not longer."""

_UNSAID = ("False", "None", "torch.preserve_format", "torch.strided")
"""Options that are as always."""


def readable(trace: Trace, names: Sequence[str]) -> str:
    """The graph of ``trace``, one operation a line, each with the function it comes from and its file and line.

    Args:
        names: of the inputs, by argument and path: ``"params.blocks.0.weight"``. Tensors that the function closes over
            are called ``closed_over_0``, ...
    """
    graph = trace.graph.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    called = dict(zip(inputs, names, strict=False))
    lines = [f"input {called.get(node, node.name)}: {_type(node.meta.get('val'))}" for node in inputs]
    lines += _body(trace.graph, called)
    output: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
    return "\n".join([*lines, *_results(trace, [_argument(x, called) for x in output])])


def _body(module: fx.GraphModule, called: dict[fx.Node, str], indent: str = "") -> list[str]:
    lines: list[str] = []
    for node in module.graph.nodes:
        if node.op != "call_function" or (node.target is operator.getitem and node.args[0].op == "call_function"):
            continue
        arguments = [_argument(x, called) for x in node.args]
        options = {name: _argument(x, called) for name, x in node.kwargs.items()}
        arguments += [f"{name}={x}" for name, x in options.items() if x not in _UNSAID]
        line = f"{indent}{_defined(node)} = {operation(node)}({', '.join(arguments)})"
        site = site_of(node)
        lines.append(f"{line:{_COMMENT_AT}}  # {site}, {site.place}" if site else line)
        for argument in node.all_input_nodes:
            if argument.op == "get_attr":
                lines += _inner(getattr(module, str(argument.target)), f"{indent}  ")
    return lines


def _inner(body: Any, indent: str) -> list[str]:
    """The body of a loop or branch, below the line that runs it."""
    if not isinstance(body, fx.GraphModule):
        return []
    inputs = [f"{n.name}: {_type(n.meta.get('val'))}" for n in body.graph.nodes if n.op == "placeholder"]
    output: Any = next(node for node in reversed(body.graph.nodes) if node.op == "output").args[0]
    output = [output] if isinstance(output, fx.Node) else output
    result = ", ".join(_argument(x, {}) for x in output)
    return [f"{indent}input {', '.join(inputs)}", *_body(body, {}, indent), f"{indent}return {result}"]


def _defined(node: fx.Node) -> str:
    """``mul: f32[3]``, or for several results ``(mean: f32[], _)``; what is not read is ``_``."""
    value = node.meta.get("val")
    items = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if not isinstance(value, list | tuple) and not items:
        return f"{node.name}: {_type(value)}"
    count = len(value) if isinstance(value, list | tuple) else 1 + max(int(str(i)) for i in items)
    named = [f"{items[i].name}: {_type(items[i].meta.get('val'))}" if i in items else "_" for i in range(count)]
    return f"({', '.join(named)})"


def operation(node: fx.Node) -> str:
    """The name of a node's operation, as ``aten.mul`` or ``higher_order.scan``."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", None)
    if packet is not None:
        return str(packet)
    return f"higher_order.{target.name()}" if isinstance(target, HigherOrderOperator) else target.__name__


def _argument(x: Any, called: dict[fx.Node, str]) -> str:
    if isinstance(x, fx.Node):
        return called.get(x, x.name)
    if isinstance(x, list | tuple):
        return f"[{', '.join(_argument(item, called) for item in x)}]"
    return _dtype(x) if isinstance(x, torch.dtype) else str(x)


def _type(value: Any) -> str:
    return f"{_dtype(value.dtype)}[{', '.join(map(str, value.shape))}]" if isinstance(value, Tensor) else "?"


def _dtype(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    return re.sub(r"^(bf|f|u|i|c)(?:loat|int|nt|omplex)(?=\d)", r"\1", name)


def _results(trace: Trace, returned: list[str]) -> list[str]:
    """The results by their paths; those that were written over inputs are not returned."""
    if trace.outputs.others.count(None) > len(returned):
        return [f"return {', '.join(returned)}"]
    named = tree.names(trace.outputs.get(returned))
    return [f"return {path} = {x}" if path else f"return {x}" for path, x in named.items()]


def columns(rows: Sequence[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [[row[0].ljust(widths[0]), *[c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]] for row in rows]
    return "\n".join("  ".join(cells) for cells in lines)
