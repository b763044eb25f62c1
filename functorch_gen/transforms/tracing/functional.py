"""A graph without writes in place; its loops and branches stay as they are, since their graphs write to nothing."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from functorch_gen.transforms.tracing.graph import value

__all__ = ["functional"]

_LIBRARY = torch.library.Library("functorch_gen", "FRAGMENT")
_LIBRARY.define("nested(Tensor[] xs, int number) -> Tensor[]", tags=torch.Tag.pt2_compliant_tag)
_NESTED: Any = torch.ops.functorch_gen.nested.default
_RESULTS: dict[int, Sequence[Tensor]] = {}
_numbers = itertools.count()

torch.library.register_fake(
    "functorch_gen::nested", lambda xs, number: [torch.empty_like(x) for x in _RESULTS[number]], lib=_LIBRARY
)


def functional(module: fx.GraphModule, mode: FakeTensorMode) -> fx.GraphModule:
    """The graph traced anew: writes to intermediate tensors become new tensors; writes to inputs stay at the end."""
    inputs = [value(n) for n in module.graph.find_nodes(op="placeholder")]
    hiding = _Hiding(module)
    make = make_fx(torch.func.functionalize(hiding.run), tracing_mode="real", _allow_non_fake_inputs=True)
    try:
        with mode, torch.no_grad():
            made = make(*inputs)
    finally:
        for number in hiding.hidden:
            del _RESULTS[number]
    for node in made.graph.find_nodes(op="call_function", target=_NESTED):
        _show(made, node, *hiding.hidden[node.args[1]])
    made.recompile()
    return made


class _Hiding(fx.Interpreter):
    """Runs each loop or branch as an opaque operation: torch would trace it anew, and not all that we make."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.extra_traceback = False
        self.hidden: dict[int, tuple[Any, list[Any], pytree.TreeSpec]] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Each node passes here."""
        if not isinstance(n.target, HigherOrderOperator):
            return super().run_node(n)
        number = next(_numbers)
        flat, spec = pytree.tree_flatten(self.fetch_args_kwargs_from_env(n)[0])
        tensors = [x for x in flat if isinstance(x, Tensor)]
        self.hidden[number] = n.target, [None if isinstance(x, Tensor) else x for x in flat], spec
        _RESULTS[number] = n.meta["val"]
        return _NESTED(tensors, number)


def _show(module: fx.GraphModule, node: fx.Node, operator: Any, flat: list[Any], spec: pytree.TreeSpec) -> None:
    """Puts the loop or branch back in the place of the opaque operation."""
    args: Any = node.args
    tensors, number = args
    given = iter(tensors)
    with module.graph.inserting_before(node):
        full = []
        for i, x in enumerate(flat):
            if isinstance(x, fx.GraphModule):
                name = f"nested_{number}_{i}"
                module.add_module(name, x)
                full.append(module.graph.get_attr(name))
            else:
                full.append(next(given) if x is None else x)
        shown = module.graph.call_function(operator, tuple(pytree.tree_unflatten(full, spec)))
    shown.meta = dict(node.meta)
    node.replace_all_uses_with(shown)
    module.graph.erase_node(node)
