"""Loops and branches in a compiled program: operations that run programs of their own."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx
from torch._ops import HigherOrderOperator

__all__ = ["RUNNERS", "inner_graphs"]

_Run = Callable[..., Sequence[Tensor]]


def inner_graphs(module: fx.GraphModule, node: fx.Node) -> dict[fx.Node, fx.GraphModule]:
    """The graphs that a loop or branch runs, by the arguments that name them; none for other operations."""
    if not isinstance(node.target, HigherOrderOperator):
        return {}
    named = [(x, getattr(module, str(x.target))) for x in node.args if isinstance(x, fx.Node) and x.op == "get_attr"]
    return {x: graph for x, graph in named if isinstance(graph, fx.GraphModule)}


def _scan(bodies: Sequence[_Run], carries: int) -> Callable[..., list[Tensor]]:
    """Runs ``body(*carry, *x, *closed) -> (*carry, *y)`` for each x of xs; the ys are stacked."""
    (body,) = bodies

    def run(carry: Sequence[Tensor], xs: Sequence[Tensor], closed: Sequence[Tensor]) -> list[Tensor]:
        stacked: list[Tensor] = []
        for i in range(len(xs[0])):
            results = body(*carry, *[x[i] for x in xs], *closed)
            carry, ys = results[:carries], results[carries:]
            stacked = stacked or [y.new_empty((len(xs[0]), *y.shape)) for y in ys]
            for whole, y in zip(stacked, ys, strict=True):
                whole[i] = y
        return [*carry, *stacked]

    return run


def _while_loop(bodies: Sequence[_Run], _carries: int) -> Callable[..., list[Tensor]]:
    """Runs ``body(*carry, *closed) -> carry`` while ``go_on(*carry, *closed)``; the result has memory of its own."""
    go_on, body = bodies

    def run(carry: Sequence[Tensor], closed: Sequence[Tensor]) -> list[Tensor]:
        if not go_on(*carry, *closed)[0]:
            return [x.clone() for x in carry]
        carry = body(*carry, *closed)
        while go_on(*carry, *closed)[0]:
            carry = body(*carry, *closed)
        return [*carry]

    return run


def _cond(bodies: Sequence[_Run], _carries: int) -> Callable[..., Sequence[Tensor]]:
    """Runs one of two programs."""
    true, false = bodies
    return lambda pred, operands: (true if pred[0] else false)(*operands)


RUNNERS: dict[str, Callable[[Sequence[_Run], int], Callable[..., Any]]] = {
    "scan": _scan,
    "while_loop": _while_loop,
    "cond": _cond,
}
"""By torch's name of the operator: (inner programs, length of its first list of arguments) -> (*lists) -> results."""
