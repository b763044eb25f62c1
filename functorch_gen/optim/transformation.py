"""The contract of all optimizers: a pair of pure functions from gradients to updates (optax's)."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from collections.abc import Callable
from typing import Any, NamedTuple

from functorch_gen.leaves import check_params, map_same
from functorch_gen.typing import Params, State, Tree

__all__ = ["EmptyState", "GradientTransformation", "apply_updates", "chain", "identity", "stateless"]


class GradientTransformation(NamedTuple):
    """Turns gradients into updates.

    ``init(params) -> state``; ``update(grads, state, params=None, **extra) -> (updates, state)``. Both are pure, and
    ``update`` passes keywords on that it does not know. Updates have the structure and the shapes of the gradients;
    their precision may be higher (moments are at least float32), and :func:`apply_updates` rounds once.

    >>> import torch
    >>> from functorch_gen import optim
    >>> tx, params = optim.sgd(0.5), {"weight": torch.ones(2)}
    >>> updates, state = tx.update({"weight": torch.ones(2)}, tx.init(params), params)
    >>> optim.apply_updates(params, updates)
    {'weight': tensor([0.5000, 0.5000])}
    """

    init: Callable[[Params], State]
    update: Callable[..., tuple[Tree, State]]


class EmptyState(NamedTuple):
    """The state of a transformation that has none."""


def stateless(name: str, transform: Callable[..., Tree]) -> GradientTransformation:
    """The transformation without memory that applies ``transform(grads, params, **extra) -> updates``.

    >>> import torch
    >>> from functorch_gen import tree
    >>> tx = stateless("sign", lambda grads, params, **extra: tree.map(torch.sign, grads))
    >>> tx.update([torch.tensor(-3.0)], tx.init([torch.tensor(0.0)]))
    ([tensor(-1.)], EmptyState())
    """

    def init(params: Params) -> EmptyState:
        check_params(name, params)
        return EmptyState()

    def update(grads: Tree, state: EmptyState, params: Params | None = None, **extra: Any) -> tuple[Tree, EmptyState]:
        return transform(grads, params, **extra), state

    return GradientTransformation(init, update)


def identity() -> GradientTransformation:
    """Leaves gradients as they are.

    >>> identity().update([1.0], EmptyState())
    ([1.0], EmptyState())
    """
    return stateless("identity", lambda grads, params, **extra: grads)


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after the other; the state is the tuple of their states (as ``optax.chain``).

    >>> import torch
    >>> from functorch_gen import optim
    >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))
    >>> tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))
    ([tensor([-0.0600, -0.0800])], (EmptyState(), (EmptyState(), EmptyState())))
    """

    def init(params: Params) -> tuple[State, ...]:
        return tuple(tx.init(params) for tx in transformations)

    def update(
        grads: Tree, state: tuple[State, ...], params: Params | None = None, **extra: Any
    ) -> tuple[Tree, tuple[State, ...]]:
        if len(state) != len(transformations):
            raise ValueError(f"chain: expected the states of {len(transformations)} transformations, got {len(state)}")
        new_state = []
        for tx, part in zip(transformations, state, strict=True):
            grads, part = tx.update(grads, part, params, **extra)
            new_state.append(part)
        return grads, tuple(new_state)

    return GradientTransformation(init, update)


def apply_updates(params: Params, updates: Tree) -> Params:
    """params + updates; each leaf keeps the parameter's dtype, and is rounded to it once.

    Raises:
        ValueError: if structures or shapes differ; names the first path that does.

    >>> import torch
    >>> apply_updates({"bias": torch.ones(2)}, {"bias": torch.tensor([-1.0, 1.0])})
    {'bias': tensor([0., 2.])}
    """
    return map_same("apply_updates", lambda p, u: (p + u).to(p.dtype), params, updates)
