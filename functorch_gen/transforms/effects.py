"""Side effects in pure functions: an operator that calls Python, which no compiler drops or moves before another.

Compilers drop what nothing reads and order by what is read. So each call takes the token that the call before it
returned, and the last token is a result of the program: JAX's ordered effects.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import has_side_effect

from functorch_gen.transforms.context import is_traced

__all__ = ["call", "callback_op", "has_effects", "thread_effects"]

_LIBRARY = torch.library.Library("functorch_gen", "FRAGMENT")
_LIBRARY.define("callback(Tensor[] values, Tensor? after, int function) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
callback_op: Any = torch.ops.functorch_gen.callback.default
"""callback(values, after, function): calls the registered function when ``after`` exists; returns a token."""

_FUNCTIONS: dict[int, Callable[..., Any]] = {}
_numbers = itertools.count()


def _token(*_: Any) -> Tensor:
    return torch.zeros((), dtype=torch.int8, device="cpu")


def _run(values: Sequence[Tensor], after: Tensor | None, function: int) -> Tensor:
    if function not in _FUNCTIONS:
        raise RuntimeError("callback: expected a function of this process, got a program that was traced in another")
    _FUNCTIONS[function](*values)
    return _token()


def _one_by_one(info: Any, dims: Any, values: Sequence[Tensor], after: Tensor | None, function: int) -> Any:
    """Under vmap: a call for each example, in order."""
    for i in range(info.batch_size):
        rows = [x if dim is None else x.select(dim, i) for x, dim in zip(values, dims[0], strict=True)]
        after = callback_op(rows, after, function)
    return (_token() if after is None else after), None


_LIBRARY.impl("callback", _run, "CompositeExplicitAutograd")
torch.library.register_fake("functorch_gen::callback", _token, lib=_LIBRARY)
torch.library.register_vmap("functorch_gen::callback", _one_by_one, lib=_LIBRARY)
has_side_effect(callback_op)


def call(function: Callable[..., object], leaves: Sequence[Any]) -> None:
    """Calls ``function(leaves)`` now, or when the values that are traced or transformed here exist.

    The tensors and traced numbers among the leaves come as tensors without history. A function that is traced is kept
    for as long as the process lives.
    """
    given = [x.to_tensor() if hasattr(x, "to_tensor") else x for x in leaves]
    given = [x.detach() if isinstance(x, Tensor) else x for x in given]
    if not is_traced():
        function(given)
        return
    at = [i for i, x in enumerate(given) if isinstance(x, Tensor)]
    rest = [None if isinstance(x, Tensor) else x for x in given]

    def filled(*values: Tensor) -> None:
        full = list(rest)
        for i, value in zip(at, values, strict=True):
            full[i] = value
        function(full)

    number = next(_numbers)
    _FUNCTIONS[number] = filled
    callback_op([given[i] for i in at], None, number)


def _nodes(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is callback_op]


def has_effects(graph: fx.Graph) -> bool:
    """Whether a graph calls Python, so that it is of no use to another process."""
    return bool(_nodes(graph))


def thread_effects(graph: fx.Graph) -> None:
    """Orders the side effects of a traced graph, and returns the last token after its results."""
    after: fx.Node | None = None
    for node in _nodes(graph):
        node.update_arg(1, after)
        after = node
    if after is not None:
        output = next(node for node in reversed(graph.nodes) if node.op == "output")
        results: Any = output.args[0]
        output.args = ((*results, after),)
