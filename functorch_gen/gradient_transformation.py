"""The contract of all optimizers: a pair of pure functions from gradients to updates (optax's), and chains of them."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from functorch_gen import tree
from functorch_gen.flat import Flat, Layout
from functorch_gen.leaves import check_params, map_same
from functorch_gen.typing import Params, State, Tree

__all__ = [
    "EmptyState", "GradientTransformation", "apply_updates", "chain", "flatten", "identity", "named_chain",
    "require_params", "set_to_zero", "stateless", "update_if",
]  # fmt: skip


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


def set_to_zero() -> GradientTransformation:
    """Zero updates: the parameters stay. As ``optax.set_to_zero``.

    >>> import torch
    >>> set_to_zero().update([torch.ones(2)], EmptyState())
    ([tensor([0., 0.])], EmptyState())
    """
    return stateless("set_to_zero", lambda grads, params, **extra: tree.zeros_like(grads))


def chain(*transformations: GradientTransformation) -> GradientTransformation:
    """Applies transformations one after the other; the state is the tuple of their states (as ``optax.chain``).

    >>> import torch
    >>> from functorch_gen import optim
    >>> tx = optim.chain(optim.clip_by_global_norm(1.0), optim.sgd(0.1))
    >>> tx.update([torch.tensor([3.0, 4.0])], tx.init([torch.zeros(2)]))
    ([tensor([-0.0600, -0.0800])], (EmptyState(), (EmptyState(), EmptyState())))
    """

    def init(params: Params) -> State:
        return tuple(tx.init(params) for tx in transformations)

    def update(grads: Tree, state: State, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        if len(state) != len(transformations):
            raise ValueError(f"chain: expected the states of {len(transformations)} transformations, got {len(state)}")
        new_state = []
        for tx, part in zip(transformations, state, strict=True):
            grads, part = tx.update(grads, part, params, **extra)
            new_state.append(part)
        return grads, tuple(new_state)

    return GradientTransformation(init, update)


def named_chain(*pairs: tuple[str, GradientTransformation], **named: GradientTransformation) -> GradientTransformation:
    """:func:`chain` of transformations with names; the state is a dict by name (as ``optax.named_chain``).

    >>> import torch
    >>> from functorch_gen import optim
    >>> named_chain(("clip", optim.clip(1.0)), ("descend", optim.scale(-0.1))).init([torch.zeros(2)])
    {'clip': EmptyState(), 'descend': EmptyState()}
    """
    names, links = [*[name for name, _ in pairs], *named], [*[tx for _, tx in pairs], *named.values()]
    if len({*names}) < len(names):
        raise ValueError(f"named_chain: expected names that differ, got {', '.join(names)}")
    tx = chain(*links)

    def update(grads: Tree, state: State, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        updates, parts = tx.update(grads, tuple([state[name] for name in names]), params, **extra)
        return updates, dict(zip(names, parts, strict=True))

    return GradientTransformation(lambda params: dict(zip(names, tx.init(params), strict=True)), update)


def flatten(tx: GradientTransformation) -> GradientTransformation:
    """Runs ``tx`` on one vector per dtype and device; equals ``tx`` when it is element-wise. As ``optax.flatten``.

    Global-norm clipping and masks by path inside ``tx`` work too. The state has a few long leaves instead of many short
    ones, but gradients and parameters are copied into vectors at every update, which takes time to compile and to run.
    What is flat already (``init_state(..., flat=True)``) goes to ``tx`` as it is.

    >>> import torch
    >>> from functorch_gen import optim
    >>> params = {"bias": torch.zeros(2), "weight": torch.zeros(3, 2)}
    >>> tx = flatten(optim.adam(0.1))
    >>> tx.init(params)[0].mu.vectors
    {'float32': tensor([0., 0., 0., 0., 0., 0., 0., 0.])}
    """

    def init(params: Tree) -> State:
        flat: Tree = params if isinstance(params, Flat) else Layout.of(params).ravel(params)
        return tx.init(flat)

    def update(grads: Tree, state: State, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        if isinstance(grads, Flat):
            return tx.update(grads, state, params, **extra)
        layout = Layout.of(grads if params is None else params)
        vectors = None if params is None else layout.ravel(params)
        updates, state = tx.update(layout.ravel(grads), state, vectors, **{**extra, "layout": layout})
        return updates.tree(), state

    return GradientTransformation(init, update)


def update_if(
    flag: Tensor, tx: GradientTransformation, grads: Tree, state: State, params: Params | None, **extra: Any
) -> tuple[Tree, State]:
    """``tx.update`` where ``flag``; else zero updates and the old state, from zero gradients: no derivative is NaN.

    >>> import torch
    >>> from functorch_gen import optim
    >>> update_if(torch.tensor(False), optim.scale(2.0), [torch.tensor(float("nan"))], EmptyState(), None)
    ([tensor(0.)], EmptyState())
    """
    updates, new = tx.update(tree.where(flag, grads, tree.zeros_like(grads)), state, params, **extra)
    return tree.where(flag, updates, tree.zeros_like(updates)), tree.where(flag, new, state)


def require_params(name: str, params: Params | None) -> Params:
    """The parameters, which ``name`` cannot do without; a ValueError if ``update`` was not given them.

    >>> require_params("adamw", None)
    Traceback (most recent call last):
        ...
    ValueError: adamw: expected update(grads, state, params), got params=None
    """
    if params is None:
        raise ValueError(f"{name}: expected update(grads, state, params), got params=None")
    return params


def apply_updates(params: Params, updates: Tree) -> Params:
    """params + updates; each leaf keeps the parameter's dtype, and is rounded to it once.

    Raises:
        ValueError: if structures or shapes differ; names the first path that does.

    >>> import torch
    >>> apply_updates({"bias": torch.ones(2)}, {"bias": torch.tensor([-1.0, 1.0])})
    {'bias': tensor([0., 2.])}
    """
    return map_same("apply_updates", lambda p, u: (p + u).to(p.dtype), params, updates)
