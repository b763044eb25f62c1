"""A graph in fewer kinds of operation: those that Inductor has loops for, and those that run as they are."""

import importlib
import operator
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from functorch_gen.transforms.tracing.decompositions import DECOMPOSITIONS
from functorch_gen.transforms.tracing.functional import functional
from functorch_gen.transforms.tracing.graph import is_view, layout, memory, output_node, simplify, value
from functorch_gen.transforms.tracing.multiples import share_multiples

__all__ = ["TRACING", "decompose"]

TRACING = threading.RLock()
"""Held while something is traced: tracing patches state that all threads share."""


def decompose(module: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    """The graph with compound operations (norms, losses, activations) written out, and none in place but donations.

    An operation that occurs often with the same shapes is traced once.
    """
    from torch._inductor.decomposition import select_decomp_table

    importlib.import_module("torch._inductor.lowering")  # the decomposition of max_pool2d takes for granted that it is
    if any(_is_in_place(n) for n in module.graph.nodes):
        with TRACING:
            module = functional(module, mode)
    module = _Decomposition(module, mode, {**select_decomp_table(), **DECOMPOSITIONS}).run()
    simplify(module)
    share_multiples(module.graph, mode)
    _separate_results(module.graph)
    return module


def _is_in_place(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable and not _is_donation(node)


def _is_donation(node: fx.Node) -> bool:
    first: Any = node.args[0] if node.args else None
    return node.target is torch.ops.aten.copy_.default and first.op == "placeholder"


def _separate_results(graph: fx.Graph) -> None:
    """Copies results that are computed once where the program computes two, and inputs that an operation hands on."""
    output = output_node(graph)
    donations = [n for n in graph.nodes if n.op == "call_function" and _is_donation(n)]
    first = next(iter(donations), output)
    taken: set[fx.Node] = set()

    def separate(node: Any) -> fx.Node:
        owner = memory(node)
        if owner.op == "call_function" and owner not in taken:
            taken.add(owner)
            return node
        with graph.inserting_before(first):
            copy = graph.call_function(torch.ops.aten.clone.default, (node,))
        copy.meta["val"] = value(node).clone()
        return copy

    for node in donations:
        node.update_arg(1, separate(node.args[1]))
    output.args = (fx.map_arg(output.args[0], separate),)


class _DeclinedError(Exception):
    """A decomposition that does not want these arguments."""


class _Decomposition:
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, table: Mapping[Any, Callable[..., Any]]):
        self.module, self.mode, self.table = module, mode, table
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.known: dict[Any, fx.GraphModule | None] = {}

    def run(self) -> fx.GraphModule:
        """The new graph; the bodies of its loops are rewritten too."""
        for node in self.module.graph.nodes:
            body = getattr(self.module, str(node.target)) if node.op == "get_attr" else None
            if isinstance(body, fx.GraphModule):
                setattr(self.module, str(node.target), decompose(body, self.mode))
            parts = self._parts(node) if node.op == "call_function" and node.target in self.table else None
            if node.target is operator.getitem and isinstance(self._new(node.args[0]), list | tuple):
                self.made[node] = self._new(node.args[0])[node.args[1]]
            elif parts is None:
                self.made[node] = self.graph.node_copy(node, self._new)
            else:
                made = self._inline(parts, [self._new(n) for n in _inputs(node)])
                is_viewed = any(is_view(user) for x in (node, *node.users) for user in x.users)
                self.made[node] = self._restored(made, value(node)) if is_viewed else made
        return fx.GraphModule(self.module, self.graph)

    def _new(self, node: Any) -> Any:
        return self.made[node]

    def _parts(self, node: fx.Node) -> fx.GraphModule | None:
        """What the node is made of, or None if it stays as it is."""
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        key = node.target, str(spec), tuple(_kind(x) for x in flat)
        if key not in self.known:
            self.known[key] = self._trace(node, flat, spec)
        return self.known[key]

    def _trace(self, node: fx.Node, flat: list[Any], spec: pytree.TreeSpec) -> fx.GraphModule | None:
        at = [i for i, x in enumerate(flat) if isinstance(x, fx.Node)]

        def parts(*tensors: Tensor) -> Any:
            full = list(flat)
            for i, x in zip(at, tensors, strict=True):
                full[i] = x
            args, kwargs = pytree.tree_unflatten(full, spec)
            result = self.table[node.target](*args, **kwargs)
            if result is NotImplemented:
                raise _DeclinedError
            return tuple(result) if isinstance(result, tuple) else result  # no torch.return_types

        inputs = [value(flat[i]) for i in at]
        make = make_fx(parts, decomposition_table=dict(self.table), tracing_mode="real", _allow_non_fake_inputs=True)
        try:
            with TRACING, self.mode, torch.no_grad():
                traced = make(*inputs)
        except _DeclinedError:
            return None
        traced.graph.eliminate_dead_code()
        return None if any(_is_in_place(n) for n in traced.graph.nodes) else traced

    def _inline(self, parts: fx.GraphModule, inputs: list[Any]) -> Any:
        made: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in parts.graph.nodes:
            if node.op == "placeholder":
                made[node] = next(given)
            elif node.op == "output":
                return fx.map_arg(node.args[0], made.__getitem__)
            elif node.op == "get_attr":
                name = f"constant{len(self.known)}_{node.target}"
                setattr(self.module, name, getattr(parts, str(node.target)))
                made[node] = self.graph.get_attr(name)
                made[node].meta = dict(node.meta)
            else:
                made[node] = self.graph.node_copy(node, made.__getitem__)
        return None

    def _restored(self, made: Any, expected: Any) -> Any:
        """Values in the layout that the whole operation gave them: views of them were traced for that."""
        if isinstance(made, list | tuple):
            return [self._restored(x, y) for x, y in zip(made, expected, strict=True)]
        if not isinstance(made, fx.Node) or layout(value(made)) == layout(expected):
            return made
        order = sorted(range(expected.ndim), key=lambda i: (-expected.stride(i), i))
        back = [order.index(i) for i in range(expected.ndim)]
        turned = self._call(torch.ops.aten.permute.default, made, order)
        dense = self._call(torch.ops.aten.clone.default, turned, memory_format=torch.contiguous_format)
        return self._call(torch.ops.aten.permute.default, dense, back)

    def _call(self, operation: Any, x: fx.Node, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(operation, (x, *args), kwargs)
        with self.mode:
            node.meta = {**x.meta, "val": operation(value(x), *args, **kwargs)}
        return node


def _inputs(node: fx.Node) -> list[fx.Node]:
    """The nodes among the arguments, one for each place."""
    return [x for x in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(x, fx.Node)]


def _kind(x: Any) -> Any:
    if not isinstance(x, fx.Node):
        return type(x), str(x)
    known = value(x)
    return known.shape, known.stride(), known.dtype, known.device, known.storage_offset()
