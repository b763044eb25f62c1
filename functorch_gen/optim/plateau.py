"""Smaller updates when the loss no longer falls."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number
from functorch_gen.gradient_transformation import GradientTransformation
from functorch_gen.leaves import check_params, scalar_zero
from functorch_gen.typing import Number, Params, Tree

__all__ = ["ReduceOnPlateauState", "reduce_on_plateau"]


class ReduceOnPlateauState(NamedTuple):
    """State of :func:`reduce_on_plateau`, with optax's names."""

    scale: Tensor  # () what updates are multiplied by
    best_value: Tensor  # ()
    plateau_count: Tensor  # () int64: values in a row without improvement
    cooldown_count: Tensor  # () int64: values to come that do not count
    count: Tensor  # () int64: losses in avg_value
    avg_value: Tensor  # () mean of the losses of the value to come


def reduce_on_plateau(
    factor: Number = 0.1, patience: Number = 10, rtol: Number = 1e-4, atol: Number = 0.0, cooldown: Number = 0,
    accumulation_size: Number = 1, min_scale: Number = 0.0,
) -> GradientTransformation:  # fmt: skip
    """Multiplies updates by a scale, and the scale by ``factor`` after ``patience`` values without improvement.

    A value is the mean of ``accumulation_size`` losses, which ``update(grads, state, params, value=loss)`` is given. It
    improves on the best if below (1 - rtol) best - atol. The ``cooldown`` values after a reduction do not count.

    Equals ``optax.contrib.reduce_on_plateau``, and ``torch.optim.lr_scheduler.ReduceLROnPlateau`` with a patience one
    less and ``rtol`` or ``atol`` as threshold.

    >>> tx, grads = reduce_on_plateau(factor=0.5, patience=2), [torch.ones(1)]
    >>> state = tx.init(grads)
    >>> for loss in (3.0, 3.0, 3.0):
    ...     updates, state = tx.update(grads, state, value=loss)
    >>> updates
    [tensor([0.5000])]
    """
    name, at_least_0 = "reduce_on_plateau", {"rtol": rtol, "atol": atol, "cooldown": cooldown, "min_scale": min_scale}
    check_number(name, "factor", factor, low=0, below=1)
    for argument, number in {**at_least_0, "patience": patience, "accumulation_size": accumulation_size}.items():
        check_number(name, argument, number, low=0 if argument in at_least_0 else 1)

    def init(params: Params) -> ReduceOnPlateauState:
        check_params(name, params)
        zero, none = scalar_zero(params), scalar_zero(params, torch.int64)
        return ReduceOnPlateauState(zero + 1, zero + math.inf, none, none.clone(), none.clone(), zero)

    def update(
        grads: Tree, state: ReduceOnPlateauState, params: Params | None = None, *, value: Any = None, **extra: Any
    ) -> tuple[Tree, ReduceOnPlateauState]:
        if value is None or (isinstance(value, Tensor) and value.ndim):
            got = "none" if value is None else f"one of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: expected update(..., value=loss) with a 0-d loss, got {got}")
        scale, best, since, cooling, count, mean = state
        mean = (count * mean + value) / (count + 1)
        better = mean < (1 - rtol) * best - atol
        since = torch.where(better | (cooling > 0), 0, since + 1)
        reduced, whole = since >= patience, count + 1 >= accumulation_size
        judged = ReduceOnPlateauState(
            scale=torch.where(reduced, (factor * scale).clamp(min=min_scale), scale),
            best_value=torch.where(better, mean, best),
            plateau_count=torch.where(reduced, 0, since),
            cooldown_count=torch.where(reduced, cooldown, (cooling - 1).clamp(min=0)),
            count=torch.zeros_like(count),
            avg_value=torch.zeros_like(best),
        )
        new = tree.where(whole, judged, state._replace(count=count + 1, avg_value=mean))
        new = tree.map(lambda x, old: x.to(old.dtype), new, state)
        return tree.map(lambda g: (new.scale * g).to(g.dtype), grads), new

    return GradientTransformation(init, update)
