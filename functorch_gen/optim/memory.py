"""What transformations with a memory share: how scalars, and tensors of each leaf, move on at every update."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number
from functorch_gen.flat import Flat
from functorch_gen.gradient_transformation import GradientTransformation, require_params, stateless
from functorch_gen.leaves import at_least_float32, check_params, map_same, scalar_zero
from functorch_gen.typing import Number, Params, State, Tree

__all__ = [
    "Leaf", "Rule", "Scalars", "average", "by_leaf", "check_hyperparameters", "per_parameter", "remember", "unbiased",
    "weights",
]  # fmt: skip

Leaf: TypeAlias = Callable[..., tuple[Tensor, ...]]
"""(gradient, memory, ...) -> (update, new memory, ...), of one leaf."""

Rule: TypeAlias = Callable[[Any], Leaf]
"""The function of a leaf, given a state with its new scalars."""

Scalars: TypeAlias = Mapping[str, Callable[[Any], Any]]
"""The next value of a state's scalars, each a function of the old state."""

_BELOW_ONE = ("b1", "b2", "b3", "beta", "decay", "rho")


def check_hyperparameters(name: str, **numbers: Any) -> None:
    """Checks numbers by optax's names: decays are in [0, 1), momentum in [0, 1], others >= 0. Functions pass."""
    for argument, value in numbers.items():
        if not callable(value):
            high, below = 1 if argument == "momentum" else math.inf, 1 if argument in _BELOW_ONE else math.inf
            check_number(name, argument, value, low=0, high=high, below=below)


def average(x: Any, mean: Any, decay: Any) -> Any:
    """Moving average: decay mean + (1 - decay) x."""
    return decay * mean + (1 - decay) * x


def weights(**decays: Any) -> Scalars:
    """The bias corrections 1 - decay^t, carried as averages of the constant 1: ``weights(mu=b1)`` is field mu_weight.

    In float32 1 - b2^t computed from the power is wrong in the fifth digit, and a compiler repeats the power for every
    element.
    """
    fields = {f"{memory}_weight": decay for memory, decay in decays.items()}
    return {key: lambda state, key=key, b=b: average(1, getattr(state, key), b) for key, b in fields.items()}


def unbiased(b1: Number, weight: Tensor, nesterov: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """(g, mu) -> mu_hat, where ``weight`` is 1 - b1^t; see :func:`scale_by_adam`."""
    unbias = 1 / weight
    if not nesterov:
        return lambda g, mu: unbias * mu
    ahead, here = b1 / average(1, weight, b1), (1 - b1) * unbias
    return lambda g, mu: ahead * mu + here * g


def remember(
    name: str,
    state_type: Any,
    rule: Rule,
    scalars: Scalars | None = None,
    starts: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> GradientTransformation:
    """The transformation with this state, whose leaves move on by themselves.

    ``rule(state)``, of a state with new scalars, is the function of a leaf. Gradients come to it in the precision of
    the memories, at least float32, and what it returns is rounded to that.

    Args:
        state_type: a NamedTuple. ``count`` or ``t`` counts updates; ``scalars`` are 0 at first; other fields are
            memories, trees like the parameters.
        starts: memories that are not 0 at first, from zeros; where their shapes differ, they broadcast to the leaf's.
    """
    moves, starts = dict(scalars or {}), starts or {}
    counts = [field for field in ("count", "t") if field in state_type._fields]  # optax's names
    memories = [field for field in state_type._fields if field not in (*moves, *counts)]

    def init(params: Params) -> State:
        check_params(name, params)

        def begin(field: str, p: Tensor) -> Tensor:
            zero = torch.zeros_like(at_least_float32(p))
            return starts[field](zero).to(zero.dtype) if field in starts else zero

        state = {field: scalar_zero(params, torch.int64) for field in counts}
        state |= {field: scalar_zero(params) for field in moves}
        state |= {field: tree.map(partial(begin, field), params) for field in memories}
        return state_type(**state)

    def update(grads: Tree, state: Any, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        now = {field: getattr(state, field) + 1 for field in counts}
        now |= {field: move(state).to(getattr(state, field).dtype) for field, move in moves.items()}
        leaf, rows = rule(state._replace(**now)), []

        def step(path: str, g: Tensor, *old: Tensor) -> Tensor:
            shape = g.shape if all(x.shape == g.shape for x in old) else torch.broadcast_shapes(*(x.shape for x in old))
            if g.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)} at {path!r}, got {tuple(g.shape)}")
            # as vectors of one element: 0-d operands would be promoted by wider 0-d hyper-parameters
            update, *new = leaf(*[x.to(old[0].dtype).reshape(x.shape or (1,)) for x in (g, *old)])
            rows.append([y.to(x.dtype).reshape(x.shape) for y, x in zip(new, old, strict=True)])
            return update.to(old[0].dtype).reshape(g.shape)

        updates = tree.map_with_path(step, grads, *(getattr(state, field) for field in memories))
        for i, field in enumerate(memories):
            now[field] = tree.unflatten(tree.structure(grads), [row[i] for row in rows])
        return updates, state_type(**now)

    return GradientTransformation(init, update)


def per_parameter(tx: GradientTransformation) -> GradientTransformation:
    """``tx``, which needs whole parameters: of flat vectors it is given the tree."""

    def whole(x: Any) -> Tree:
        return x.tree() if isinstance(x, Flat) else x

    def update(
        grads: Tree, state: State, params: Params | None = None, *, layout: object = None, **extra: Any
    ) -> tuple[Tree, State]:
        updates, state = tx.update(whole(grads), state, whole(params), **extra)
        return grads.layout.ravel(updates) if isinstance(grads, Flat) else updates, state

    return GradientTransformation(lambda params: tx.init(whole(params)), update)


def by_leaf(name: str, f: Callable[..., Tensor], *, of_params: bool = True) -> GradientTransformation:
    """``f(update)``, or ``f(update, parameter)``, of each leaf by itself, in at least float32."""

    def leaf(u: Tensor, *p: Tensor) -> Tensor:
        return f(at_least_float32(u), *map(at_least_float32, p)).to(u.dtype)

    def transform(grads: Tree, params: Params | None, **extra: Any) -> Tree:
        return map_same(name, leaf, grads, *([require_params(name, params)] if of_params else []))

    return per_parameter(stateless(name, transform))
