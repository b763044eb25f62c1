"""Transformations of parts of the parameters, chosen by path: optimizers of their own, masks, weight decay."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number
from functorch_gen.flat import Layout
from functorch_gen.gradient_transformation import (
    GradientTransformation,
    identity,
    require_params,
    set_to_zero,
    stateless,
)
from functorch_gen.leaves import map_same
from functorch_gen.optim.memory import per_parameter
from functorch_gen.paths import Labels, Mask, labels_by_path, resolve_mask
from functorch_gen.typing import Number, Params, State, Tree

__all__ = ["PartitionState", "add_decayed_weights", "freeze", "masked", "partition"]


class PartitionState(NamedTuple):
    """State of :func:`partition`."""

    inner_states: dict[str, State]  # by label, each for the leaves of that label alone


def partition(transforms: Mapping[str, GradientTransformation], param_labels: Labels) -> GradientTransformation:
    """Applies to each leaf the transformation of its label. As ``optax.partition``.

    A transformation is given its leaves alone, as nested dicts with the paths of the whole tree; its state is of their
    size. Flat vectors are taken apart into leaves.

    Raises:
        ValueError: if a leaf has no label or an unknown one (names its path), or a glob matches no path.

    >>> import torch
    >>> from functorch_gen import optim
    >>> params = {"bias": torch.ones(1), "weight": torch.ones(1)}
    >>> tx = partition({"slow": optim.sgd(0.1), "fast": optim.sgd(1.0)}, {"*bias": "slow", "*": "fast"})
    >>> tx.update(params, tx.init(params))[0]
    {'bias': tensor([-0.1000]), 'weight': tensor([-1.])}
    """

    def init(params: Params) -> PartitionState:
        labels = labels_by_path("partition", param_labels, params, transforms)
        return PartitionState({name: tx.init(_part(params, labels, name)) for name, tx in transforms.items()})

    def update(grads: Tree, state: PartitionState, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        if params is not None:
            map_same("partition", lambda g, _: g, grads, params)
        labels = labels_by_path("partition", param_labels, grads, transforms)
        named, states = {}, {}
        for name, tx in transforms.items():
            part, own = _part(grads, labels, name), None if params is None else _part(params, labels, name)
            updates, states[name] = tx.update(part, state.inner_states[name], own, **extra)
            named.update(tree.names(updates))
        return tree.from_names(named, like=grads), PartitionState(states)

    return per_parameter(GradientTransformation(init, update))


def _part(whole: Tree, labels: dict[str, str], name: str) -> Params:
    return tree.from_names({path: x for path, x in tree.names(whole).items() if labels[path] == name})


def masked(tx: GradientTransformation, mask: Mask) -> GradientTransformation:
    """Applies ``tx`` to the leaves that ``mask`` selects; the others pass unchanged. As ``optax.masked``.

    >>> import torch
    >>> from functorch_gen import optim
    >>> masked(optim.scale(3.0), "weight").init({"bias": torch.ones(1), "weight": torch.ones(1)})
    PartitionState(inner_states={'selected': EmptyState(), 'rest': EmptyState()})
    """

    def labels(params: Params) -> Tree:
        return tree.map(lambda keep: "selected" if keep else "rest", resolve_mask("masked", mask, params))

    return partition({"selected": tx, "rest": identity()}, labels)


def freeze(mask: Mask) -> GradientTransformation:
    """Zero updates for the leaves that ``mask`` selects: the last link of a chain. As ``optax.freeze``.

    >>> import torch
    >>> tx, grads = freeze("encoder.*"), {"encoder": {"weight": torch.ones(1)}, "head": torch.ones(1)}
    >>> tx.update(grads, tx.init(grads))[0]
    {'encoder': {'weight': tensor([0.])}, 'head': tensor([1.])}
    """
    return masked(set_to_zero(), mask)


def add_decayed_weights(weight_decay: Number, mask: Mask | None = None) -> GradientTransformation:
    """g + weight_decay * p. Equals ``optax.add_decayed_weights``.

    Before a moment this is L2 regularisation (``torch.optim.Adam(weight_decay=)``), after it decoupled decay (AdamW).

    Args:
        mask: which leaves decay: a glob on the path (``"*.weight"``), several globs, a tree of bools, or a function
            from the parameters to such a tree. By default all.

    Source: Loshchilov and Hutter 2019, algorithm 2, arXiv:1711.05101.

    >>> params = {"bias": torch.ones(1), "weight": torch.ones(1)}
    >>> tx = add_decayed_weights(0.1, mask="*weight")
    >>> tx.update({"bias": torch.zeros(1), "weight": torch.zeros(1)}, tx.init(params), params)[0]
    {'bias': tensor([0.]), 'weight': tensor([0.1000])}
    """
    check_number("add_decayed_weights", "weight_decay", weight_decay, low=0)

    def decay(g: Tensor, p: Tensor) -> Tensor:
        return tree.add_scaled(g, p.to(g.dtype), weight_decay)

    def transform(grads: Tree, params: Params | None, *, layout: Layout | None = None, **extra: object) -> Tree:
        params = require_params("add_decayed_weights", params)
        decayed = map_same("add_decayed_weights", decay, grads, params)
        if mask is None:
            return decayed
        chosen = resolve_mask("add_decayed_weights", mask, params if layout is None else layout.whole)
        chosen = chosen if layout is None else layout.spread(chosen)
        return tree.map(_choose, chosen, decayed, grads)

    return stateless("add_decayed_weights", transform)


def _choose(keep: bool | Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(keep, x, y) if isinstance(keep, Tensor) else x if keep else y
