"""What a node of a traced ATen graph is: a value, a view of one, a fusible operation; and the graph made smaller."""

import operator
from typing import Any

import torch
from torch import Tensor, fx

from functorch_gen.random.threefry import threefry_op

__all__ = [
    "base",
    "is_fusible",
    "is_pointwise",
    "is_view",
    "layout",
    "memory",
    "output_node",
    "simplify",
    "size",
    "value",
]

_aten: Any = torch.ops.aten

_ALIASES = {_aten.alias.default, _aten.detach.default, _aten.lift_fresh.default, _aten._unsafe_view.default}

_FUSIBLE = {
    *(_aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.var_mean, _aten.var, _aten.prod, _aten.any, _aten.all),
    *(_aten.argmax, _aten.argmin, _aten.cat, _aten.gather, _aten.embedding, _aten.index, _aten._unsafe_index),
    *(_aten.select_scatter, _aten.slice_scatter, _aten.index_select, _aten.constant_pad_nd, _aten.flip),
    *(_aten.full, _aten.full_like, _aten.scalar_tensor, _aten.arange, _aten.clone, _aten._to_copy),
    *(torch.ops.prims.iota, torch.ops.prims.convert_element_type, _aten.lift_fresh_copy, _aten.where),
}
"""Packets that Inductor fuses on a CPU, beside those tagged pointwise; all others run as they are."""

_NARROW = (torch.bfloat16, torch.float16)
_COMPARES_UNROUNDED = torch.__version__ < "2.13"  # fused, in 16 bits; later versions are told not to, in kernels.py

_MANY = 8
"""More tensors than this are joined by torch itself, not by as many generated loops."""

_CREATORS = {_aten.full, _aten.scalar_tensor, _aten.arange, torch.ops.prims.iota}


def value(node: fx.Node) -> Any:
    """The fake tensor (or tuple of them) that the node stands for."""
    return node.meta.get("val")


def size(node: fx.Node) -> int:
    """Number of elements; 0 for what is no tensor."""
    x = value(node)
    return x.numel() if isinstance(x, Tensor) else 0


def layout(x: Tensor) -> tuple[int, ...]:
    """The strides, as far as they matter."""
    return tuple(stride for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1)


def output_node(graph: fx.Graph) -> fx.Node:
    """The node that returns."""
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def is_view(node: fx.Node) -> bool:
    """Whether the node is a window on the memory of its first input, in the same dtype."""
    if node.target is operator.getitem:
        return is_view(node.all_input_nodes[0])
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if not (node.target in _ALIASES or node.target.is_view) or not node.all_input_nodes:
        return False
    x, source = value(node), value(node.all_input_nodes[0])
    first = x[0] if isinstance(x, list | tuple) else x
    return first.dtype == source.dtype and not first.is_complex()


def base(node: fx.Node) -> fx.Node:
    """The value whose memory a view shows; the node itself if it is no view."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def memory(node: fx.Node) -> fx.Node:
    """The value in whose memory this lies: :func:`base`, and beyond windows that show it in another dtype."""
    while True:
        node = base(node)
        maker = node.all_input_nodes[0] if node.target is operator.getitem else node
        if not isinstance(maker.target, torch._ops.OpOverload) or not maker.target.is_view or not maker.all_input_nodes:
            return node
        node = maker.all_input_nodes[0]


def is_pointwise(node: fx.Node) -> bool:
    """Whether each element of the result takes a few operations on elements of the inputs: cheap to repeat."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is threefry_op or not is_fusible(node):
        return False
    return torch.Tag.pointwise in node.target.tags or node.target.overloadpacket in (
        _CREATORS | {_aten.where, _aten.clone, _aten._to_copy, torch.ops.prims.convert_element_type}
    )


def is_fusible(node: fx.Node) -> bool:
    """Whether Inductor generates a loop for the node, which it can fuse with others."""
    if node.target is operator.getitem:
        return not is_view(node) and is_fusible(node.all_input_nodes[0])
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if node.target is threefry_op:
        return True
    known = torch.Tag.pointwise in node.target.tags or node.target.overloadpacket in _FUSIBLE
    if node.target is _aten.cat.default and len(node.all_input_nodes) > _MANY:
        return False
    if _COMPARES_UNROUNDED and node.target.overloadpacket in (_aten.eq, _aten.ne):
        known = not any(isinstance(value(n), Tensor) and value(n).dtype in _NARROW for n in node.all_input_nodes)
    return known and not node.target._schema.is_mutable and all(_is_plain(n) for n in (node, *node.all_input_nodes))


def _is_plain(node: fx.Node) -> bool:
    x = value(node)
    parts = x if isinstance(x, list | tuple) else [x]
    return all(
        isinstance(p, Tensor) and p.device.type == "cpu" and not p.is_complex() and p.layout == torch.strided
        for p in parts
    )


def simplify(module: fx.GraphModule) -> None:
    """Drops views that show their whole base, and operations done before."""
    graph = module.graph
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if is_view(node) and isinstance(value(node), Tensor) and _same_window(node, base(node)):
            node.replace_all_uses_with(base(node))
            graph.erase_node(node)
            continue
        if not is_view(node) and not is_fusible(node):
            continue
        key = node.target, _frozen(node.args), _frozen(node.kwargs)
        earlier = seen.setdefault(key, node)
        if earlier is not node:
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _same_window(node: fx.Node, whole: fx.Node) -> bool:
    x, y = value(node), value(whole)
    return x.shape == y.shape and layout(x) == layout(y) and x.storage_offset() == y.storage_offset()


def _frozen(x: Any) -> Any:
    """Arguments as a key: 1, 1.0 and True differ."""
    if isinstance(x, list | tuple):
        return tuple(_frozen(y) for y in x)
    if isinstance(x, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(x.items()))
    return x if isinstance(x, fx.Node) else (type(x), str(x))
