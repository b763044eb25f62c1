"""Backward passes that differ by one number for each example, as one pass.

The penalty on a discriminator's slope goes back through it with a cotangent of 1 for each logit, its loss once more
with cotangents c_i. Between the kinks of a piecewise linear network (leaky ReLU) every tensor of the second pass is c_i
times that of the first: a product with c_i instead of a convolution. The gradients of a convolution's weights, bilinear
in cotangents g and inputs x, then join: sum_i w(g_i, y_i) + w(c_i g_i, x_i) = sum_i w(g_i, y_i + c_i x_i).
Of six convolutions a layer four are left.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

from functorch_gen.transforms.tracing.graph import is_view, layout, value

__all__ = ["share_multiples"]

_aten: Any = torch.ops.aten
_BACKWARD = _aten.convolution_backward.default
_COSTLY = {_aten.mm.default, _aten.convolution.default, _BACKWARD}
_RESHAPES = {_aten.view.default, _aten._unsafe_view.default, _aten.unsqueeze.default, _aten.squeeze.dims}
_MOVES = {_aten.clone.default, _aten.permute.default}
_ELEMENTWISE = {_aten.neg.default, _aten.mul.Scalar, _aten.div.Scalar, _aten.mul.Tensor, _aten.div.Tensor}
_FILLED = {_aten.full.default: 1, _aten.scalar_tensor.default: 0}
_LINEAR = {  # in these arguments together
    **dict.fromkeys(_RESHAPES | _ELEMENTWISE | {_aten.expand.default, _aten.permute.default, _aten.mm.default}, (0,)),
    **dict.fromkeys((_aten.add.Tensor, _aten.sub.Tensor), (0, 1)),
    _aten.where.self: (1, 2),
    _aten.convolution.default: (0,),
    _aten.select_scatter.default: (0, 1),
    _BACKWARD: (0,),
}


class _Multiple(NamedTuple):
    """factor_i base_i of each example: (b,), (b, ...)."""

    base: fx.Node
    factor: fx.Node
    is_costly: bool = False


def share_multiples(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """Computes multiples of what is known from that, where this saves matrix products or convolutions."""
    values = _Values(graph)
    if not any(found.is_costly for found in values.multiples.values()):
        return
    for node in graph.find_nodes(op="call_function", target=_aten.add.Tensor):
        _join_weight_gradients(node, values, mode)
    graph.eliminate_dead_code()
    alive = set(graph.nodes)
    for node, found in values.multiples.items():
        if node in alive and found.base in alive and found.is_costly:
            _replace(node, found, values, mode)
    graph.eliminate_dead_code()
    for node in graph.find_nodes(op="call_function", target=_BACKWARD):
        _mask_unread(node)


class _Values:
    """The nodes of a graph by value, and those that are multiples of an earlier one."""

    def __init__(self, graph: fx.Graph):
        self.first: dict[fx.Node, fx.Node] = {}
        self.multiples: dict[fx.Node, _Multiple] = {}
        self._known: dict[Any, fx.Node] = {}
        self._ones: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload | type(operator.getitem)):
                self._read(node)

    def _read(self, node: fx.Node) -> None:
        first = self.first[node] = self._known.setdefault(self._key(node), self._equal(node))
        if first is not node:
            if first in self.multiples:
                self.multiples[node] = self.multiples[first]
        elif _is_filled_with(node, 1) and value(node).ndim == 1:
            self._ones.setdefault(_kind(node), node)
        elif found := self._as_multiple(node):
            self.multiples[node] = found

    def of(self, x: Any) -> Any:
        """The first node with the value of ``x``."""
        return self.first.get(x, x)

    def _key(self, node: fx.Node, replaced: Mapping[int, fx.Node] | None = None) -> Any:
        """What the value depends on, with other arguments at some places."""
        call, replaced = _call(node), replaced or {}
        args = [replaced.get(i, x) for i, x in enumerate(call.args)]
        if call is not node and call.target is _BACKWARD and node.args[1] == 0:
            args = [args[0], *args[2:3], *args[4:10]]  # whatever the input was, and what else is wanted
        frozen = map_aggregate((args, call.kwargs), lambda x: self.of(x) if isinstance(x, fx.Node) else repr(x))
        return call.target, node.args[1] if call is not node else None, _hashable(frozen)

    def _equal(self, node: fx.Node) -> fx.Node:
        """An earlier node with the same elements, in whatever layout; else itself."""
        args: Any = node.args
        if node.target is _aten.clone.default:
            return self.of(args[0])
        if node.target is _aten.permute.default:
            x, dims = self.of(args[0]), args[1]
            if list(dims) == sorted(dims):
                return x
            if x.target is _aten.permute.default and [x.args[1][d] for d in dims] == sorted(dims):
                return self.of(x.args[0])
        if node.target in _RESHAPES:
            x = node
            while x.target in _RESHAPES:
                x = self.of(x.args[0])
                if _kind(x) == _kind(node):
                    return x
        if node.target is _aten.add.Tensor and not node.kwargs:
            for zeros, x in (args, args[::-1]):
                if _is_filled_with(zeros, 0) and isinstance(x, fx.Node) and _kind(x) == _kind(node):
                    return self.of(x)
        return node

    def _as_multiple(self, node: fx.Node) -> _Multiple | None:
        """Of what node a linear operation makes a multiple, if that node is there. Zeros are one of any factor."""
        call = _call(node)
        for places in _linear(node):
            given = {i: self.of(call.args[i]) for i in places if not _is_filled_with(self.of(call.args[i]), 0)}
            found = {i: self._part(x, node) for i, x in given.items()}
            parts = [part for part in found.values() if part is not None]
            if not parts or len(parts) < len(given) or len({part.factor for part in parts}) > 1:
                continue
            base = self._known.get(self._key(node, {i: part.base for i, part in found.items() if part}), node)
            if base is not node:
                is_costly = call.target in _COSTLY or any(part.is_costly for part in parts)
                return _Multiple(base, parts[0].factor, is_costly)
        return None

    def _part(self, x: Any, node: fx.Node) -> _Multiple | None:
        """An argument as a multiple, if its examples are those of the result. Any vector is one of ones."""
        if not isinstance(x, fx.Node) or not _keeps_examples(x, node):
            return None
        ones = self._ones.get(_kind(x))
        return _Multiple(ones, x) if ones is not None and ones is not x else self.multiples.get(x)


def _linear(node: fx.Node) -> Iterator[tuple[int, ...]]:
    """Places of arguments in which the operation is linear together."""
    call = _call(node)
    if call.target not in _LINEAR or not isinstance(value(node), Tensor) or value(node).dtype.itemsize < 4:
        return
    if call is not node and node.args[1] != 0:
        return
    if call.target is _aten.convolution.default and call.args[2] is not None:
        return
    if call.target in (_aten.add.Tensor, _aten.sub.Tensor) and call.kwargs:
        return
    yield _LINEAR[call.target]
    if call.target is _aten.mul.Tensor:
        yield (1,)


def _keeps_examples(x: fx.Node, node: fx.Node) -> bool:
    """Whether the first axis of the result is that of an argument in which the operation is linear."""
    target, args, given, made = node.target, _args(node), value(x), value(node)
    if not given.ndim or not made.ndim or given.shape[0] != made.shape[0]:
        return False
    if target is _aten.permute.default:
        return args[1][0] == 0
    if target is _aten.select_scatter.default:
        return args[2] != 0
    return target in _RESHAPES or target is operator.getitem or given.ndim == made.ndim


def _args(node: fx.Node) -> Any:
    return node.args


def _call(node: fx.Node) -> Any:
    """The operation of which this is a result."""
    return node.args[0] if node.target is operator.getitem else node


def _kind(x: fx.Node) -> Any:
    v = value(x)
    return (v.shape, v.dtype, v.device) if isinstance(v, Tensor) else None


def _is_filled_with(x: Any, number: int) -> bool:
    """Whether ``x`` is a constant of this number, however shaped and laid out."""
    while isinstance(x, fx.Node) and x.target in _RESHAPES | {_aten.expand.default, *_MOVES}:
        x = x.args[0]
    return isinstance(x, fx.Node) and x.target in _FILLED and bool(x.args[_FILLED[x.target]] == number)


def _hashable(x: Any) -> Any:
    if isinstance(x, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(x.items()))
    return tuple(_hashable(y) for y in x) if isinstance(x, list | tuple) else x


class _Builder:
    """Puts operations before a node."""

    def __init__(self, node: fx.Node, mode: FakeTensorMode):
        self.node, self.mode = node, mode

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(target, args)
        with self.mode:
            made.meta = {**self.node.meta, "val": target(*fx.map_arg(args, value))}
        return made

    def multiple(self, factor: fx.Node, x: fx.Node) -> fx.Node:
        """(b,), (b, ...) -> (b, ...)."""
        column = self(_aten.view.default, factor, [-1] + [1] * (value(x).ndim - 1))
        return self(_aten.mul.Tensor, x, column)


def _replace(node: fx.Node, found: _Multiple, values: _Values, mode: FakeTensorMode) -> None:
    """Gives users that are no multiples themselves the product with the factor."""

    def is_outside(user: fx.Node) -> bool:
        if user.target is _BACKWARD:
            return any(result.args[1] != 0 for result in user.users)
        return user not in values.multiples

    if any(is_outside(user) for user in node.users):
        made = _Builder(node, mode).multiple(found.factor, found.base)
        if _can_stand_for(made, node):
            node.replace_all_uses_with(made, delete_user_cb=is_outside)


def _can_stand_for(made: fx.Node, node: fx.Node) -> bool:
    """Views of a node were traced for its layout."""
    return layout(value(made)) == layout(value(node)) or not any(is_view(user) for user in node.users)


class _WeightGradient(NamedTuple):
    """sum_i w(factor_i cotangent_i, x_i), in which ``call`` computes it."""

    call: fx.Node
    cotangent: fx.Node
    factor: fx.Node | None

    @property
    def kind(self) -> Any:
        """What those that can be joined have in common."""
        _, x, weight, _, *options, _ = _args(self.call)
        return self.cotangent, _kind(x), _kind(weight), repr(options)


def _join_weight_gradients(node: fx.Node, values: _Values, mode: FakeTensorMode) -> None:
    """Rewrites a sum of gradients of one weight whose cotangents are the same but for factors."""
    is_part = len(node.users) == 1 and _is_sum(next(iter(node.users)))
    if is_part or not _is_sum(node):
        return
    groups: dict[Any, list[_WeightGradient]] = defaultdict(list)
    total: list[fx.Node] = []
    for term in _terms(node):
        found = _weight_gradient(values.of(term), values)
        if found is None:
            total.append(term)
        else:
            groups[found.kind].append(found)
    if all(len(group) == 1 for group in groups.values()):
        return
    build = _Builder(node, mode)
    total += [_joined(group, build) for group in groups.values()]
    made = total[0]
    for term in total[1:]:
        made = build(_aten.add.Tensor, made, term)
    if _can_stand_for(made, node):
        node.replace_all_uses_with(made)
        for part in (part for group in groups.values() if len(group) > 1 for part in group):
            _sum_bias_gradient(part.call, mode)


def _terms(node: fx.Node) -> Iterator[fx.Node]:
    """What a sum of tensors of one shape adds up."""
    left = [node]
    while left:
        for x in left.pop().all_input_nodes:
            if _is_sum(x) and len(x.users) == 1:
                left.append(x)
            else:
                yield x


def _is_sum(node: fx.Node) -> bool:
    """Of two tensors of its own shape."""
    terms = node.all_input_nodes
    is_sum = node.target is _aten.add.Tensor and not node.kwargs and len(terms) == 2
    return is_sum and all(_kind(x) == _kind(node) for x in terms)


def _weight_gradient(node: fx.Node, values: _Values) -> _WeightGradient | None:
    call = _call(node)
    if call is node or call.target is not _BACKWARD or node.args[1] != 1:
        return None
    cotangent = values.of(call.args[0])
    found = values.multiples.get(cotangent)
    return _WeightGradient(call, found.base, found.factor) if found else _WeightGradient(call, cotangent, None)


def _joined(group: Sequence[_WeightGradient], build: "_Builder") -> fx.Node:
    """The sum of gradients of one kind."""
    _, _, weight, _, *options, _ = _args(group[0].call)
    inputs = [build.multiple(g.factor, _args(g.call)[1]) if g.factor else _args(g.call)[1] for g in group]
    x = inputs[0]
    for other in inputs[1:]:
        x = build(_aten.add.Tensor, x, other)
    gradients = build(_BACKWARD, group[0].cotangent, x, weight, None, *options, [False, True, False])
    return build(operator.getitem, gradients, 1)


def _sum_bias_gradient(call: fx.Node, mode: FakeTensorMode) -> None:
    """The gradient of a bias without that of its weight."""
    cotangent: Any = call.args[0]
    axes = [i for i in range(value(cotangent).ndim) if i != 1]
    for result in [user for user in call.users if user.args[1] == 2]:
        result.replace_all_uses_with(_Builder(call, mode)(_aten.sum.dim_IntList, cotangent, axes))


def _mask_unread(call: fx.Node) -> None:
    """Does not compute results that nobody reads."""
    read = {_args(user)[1] for user in call.users}
    *args, wanted = _args(call)
    call.args = (*args, [w and i in read for i, w in enumerate(wanted)])
    call.meta["val"] = tuple(x if i in read else None for i, x in enumerate(value(call)))
