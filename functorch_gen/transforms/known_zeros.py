"""Tangents that are known to be zero, in a traced graph: products with them are left out, and sums are the rest.

Forward mode gives a zero tangent to what does not depend on the differentiated arguments (the weights of a network
whose input moves). torch marks such tensors, ``_efficientzerotensor``, and multiplies them anew by every rule that has
no case for the mark. A graph shows them all.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, disable_fake_tensor_cache

__all__ = ["Fakes", "fold_zeros"]

_ATEN: Any = torch.ops.aten
_ZERO = _ATEN._efficientzerotensor.default
_TANGENT = _ATEN._new_zeros_with_same_feature_meta.default


class Fakes(FakeTensorMode):
    """Fake tensors with which forward mode can be traced.

    They carry no mark of zero: under ``vmap`` torch gives the marked ones a wrong device. The memory of a new tangent
    is laid out like its primal's each time: torch's cache of results forgets where in it a view begins.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Every operation on them passes here."""
        if func is _TANGENT:
            with disable_fake_tensor_cache(self):
                return super().__torch_dispatch__(func, types, args, kwargs)
        return super().__torch_dispatch__(_ATEN.zeros.default if func is _ZERO else func, types, args, kwargs)


_LINEAR = {  # zero where their first argument is
    _ATEN.alias.default,
    _ATEN.clone.default,
    _ATEN.detach.default,
    _ATEN.diagonal.default,
    _ATEN.expand.default,
    _ATEN.mean.dim,
    _ATEN.neg.default,
    _ATEN.permute.default,
    _ATEN.select.int,
    _ATEN.slice.Tensor,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
    _ATEN.sum.default,
    _ATEN.sum.dim_IntList,
    _ATEN.t.default,
    _ATEN.transpose.int,
    _ATEN.unsqueeze.default,
    _ATEN.view.default,
    _ATEN._unsafe_view.default,
    _ATEN.div.Tensor,
    _ATEN.mul.Scalar,
    _ATEN.div.Scalar,
}
_BILINEAR = {_ATEN.mul.Tensor, _ATEN.mm.default, _ATEN.bmm.default, _ATEN.dot.default, _ATEN.mv.default}
_SUMS = {_ATEN.add.Tensor, _ATEN.sub.Tensor}


def fold_zeros(graph: fx.Graph) -> None:
    """Leaves out what the zeros make zero; those that are read all the same become plain ones."""
    zeros = set(graph.find_nodes(op="call_function", target=_ZERO))
    roots = list(zeros)
    if not roots:
        return
    for node in [n for n in graph.nodes if n.op == "call_function"]:
        if _writes_to(node, zeros):
            break  # from here on they may be something else
        if _is_zero(node, zeros):
            zeros.add(node)
        elif (rest := _sum_without_zeros(graph, node, zeros)) is not None:
            node.replace_all_uses_with(rest)
    for node in roots:
        node.target = _ATEN.zeros.default
    graph.eliminate_dead_code()


def _writes_to(node: fx.Node, zeros: set[fx.Node]) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return False
    held = {_storage(zero) for zero in zeros}
    return any(_storage(x) in held for x in node.all_input_nodes)


def _storage(node: fx.Node) -> int | None:
    x = node.meta["val"]
    return x.untyped_storage()._cdata if isinstance(x, Tensor) else None


def _is_zero(node: fx.Node, zeros: set[fx.Node]) -> bool:
    args: Any = node.args
    if node.target in _LINEAR:
        return args[0] in zeros
    if node.target in _BILINEAR:
        return args[0] in zeros or args[1] in zeros
    if node.target is _ATEN.convolution.default:
        return (args[2] is None or args[2] in zeros) and (args[0] in zeros or args[1] in zeros)
    if node.target in _SUMS:
        return args[0] in zeros and args[1] in zeros
    return False


def _sum_without_zeros(graph: fx.Graph, node: fx.Node, zeros: set[fx.Node]) -> fx.Node | None:
    """What a sum comes to, if that is a tensor in the same layout."""
    args: Any = node.args
    if node.target is _ATEN.addmm.default and args[0] in zeros and not node.kwargs:
        with graph.inserting_before(node):
            product = graph.call_function(_ATEN.mm.default, args[1:3])
        product.meta = dict(node.meta)
        return product
    if node.target is _ATEN.add.Tensor and not node.kwargs and args[0] in zeros:
        rest = args[1]
    elif node.target in _SUMS and args[1] in zeros:
        rest = args[0]
    else:
        return None
    return rest if isinstance(rest, fx.Node) and _layout(rest) == _layout(node) else None


def _layout(node: fx.Node) -> Any:
    x = node.meta["val"]
    return (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else None
