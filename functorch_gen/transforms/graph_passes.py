"""What is done to a traced graph before anyone runs it, or traces it as the body of a loop."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.scan import scan_op

from functorch_gen.transforms.known_zeros import fold_zeros

__all__ = ["prune", "repair"]

_ATEN = torch.ops.aten


def prune(module: fx.GraphModule) -> None:
    """Takes out what no output needs: nodes, and the ys, xs and closed-over tensors of loops that nobody reads."""
    graph = module.graph
    graph.eliminate_dead_code()
    for node in reversed([n for n in graph.nodes if n.target is scan_op]):
        if node.users:
            _prune_loop(module, node)
        graph.eliminate_dead_code()
    read = {node.target for node in graph.find_nodes(op="get_attr")}
    for name in [name for name, _ in module.named_children() if name not in read]:
        delattr(module, name)
    module.recompile()


def _prune_loop(module: fx.GraphModule, node: Any) -> None:
    source, carry, xs, closed = node.args
    body: Any = getattr(module, source.target)
    items = [user for user in node.users if user.target is operator.getitem]
    read = {item.args[1] for item in items}
    (output,) = body.graph.find_nodes(op="output")
    kept = [i for i in range(len(output.args[0])) if i < len(carry) or i in read]
    output.args = (tuple(output.args[0][i] for i in kept),)
    for item in items:
        item.args = (node, kept.index(item.args[1]))
    node.meta["val"] = tuple(node.meta["val"][i] for i in kept)
    prune(body)
    inputs = body.graph.find_nodes(op="placeholder")[len(carry) :]
    of_xs, of_closed = inputs[: len(xs)], inputs[len(xs) :]
    node.args = (source, carry, list(_read(xs, of_xs, at_least=1)), tuple(_read(closed, of_closed)))
    body.recompile()


def _read(given: Sequence[fx.Node], inputs: Sequence[fx.Node], at_least: int = 0) -> list[fx.Node]:
    """Those of ``given`` whose input is read; the inputs of the others are erased."""
    keep = [bool(x.users) for x in inputs]
    for i in range(len(keep)):
        keep[i] = keep[i] or sum(keep) < at_least  # the length of a loop is that of its xs
    for x, stays in zip(inputs, keep, strict=True):
        if not stays:
            x.graph.erase_node(x)
    return [x for x, stays in zip(given, keep, strict=True) if stays]


def repair(module: fx.GraphModule) -> None:
    """Makes a graph right where torch's forward mode leaves one that is right only as it was traced."""
    fold_zeros(module.graph)
    _read_inputs_anywhere(module.graph)
    _write_to_own_memory(module.graph)
    module.recompile()


def _read_inputs_anywhere(graph: fx.Graph) -> None:
    """``as_strided`` counts from the start of the memory; an input may start anywhere in its own, a slice say.

    Where it changes nothing it is left out; where it looks at an input's memory it gets a copy of it.
    """
    placeholders = list(graph.find_nodes(op="placeholder"))
    inputs = {_storage(node): node for node in placeholders}
    for node in graph.find_nodes(op="call_function", target=_ATEN.as_strided.default):
        seen: Any = node.args[0]
        if _view(seen) == _view(node):
            node.replace_all_uses_with(seen)
            graph.erase_node(node)
        elif source := inputs.pop(_storage(node), None):
            with graph.inserting_after(placeholders[-1]):
                copy = graph.call_function(_ATEN.clone.default, (source,))
            copy.meta["val"] = source.meta["val"]
            source.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def _write_to_own_memory(graph: fx.Graph) -> None:
    """The zeros that a tangent is written to must not be one number, expanded."""
    for node in graph.find_nodes(op="call_function", target=_ATEN._new_zeros_with_same_feature_meta.default):
        x = node.meta["val"]
        if any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True)):
            node.target, node.args = _ATEN.zeros.default, (list(x.shape),)
            node.kwargs = {"dtype": x.dtype, "device": x.device}
            node.meta["val"] = x.new_empty(x.shape)


def _storage(node: fx.Node) -> int:
    return node.meta["val"].untyped_storage()._cdata


def _view(node: fx.Node) -> tuple[Any, ...]:
    x = node.meta["val"]
    return x.shape, x.stride(), x.storage_offset()
