"""Updates times a number: a constant, a schedule, the negative learning rate, or one that norms and losses tell."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_choice, check_number
from functorch_gen.gradient_transformation import GradientTransformation, stateless
from functorch_gen.leaves import at_least_float32, check_params, scalar_zero
from functorch_gen.optim.memory import by_leaf, check_hyperparameters
from functorch_gen.schedules import LearningRate, StepSchedule
from functorch_gen.typing import Number, Params, Tree

__all__ = [
    "ScaleByScheduleState", "scale", "scale_by_learning_rate", "scale_by_param_block_rms", "scale_by_polyak",
    "scale_by_schedule", "scale_by_sign", "scale_by_trust_ratio",
]  # fmt: skip


def scale(step_size: Number) -> GradientTransformation:
    """step_size * g.

    >>> scale(2.0).update([torch.ones(2)], ())[0]
    [tensor([2., 2.])]
    """
    check_number("scale", "step_size", step_size)
    return stateless("scale", lambda grads, params, **extra: tree.scale(grads, step_size))


class ScaleByScheduleState(NamedTuple):
    """State of :func:`scale_by_schedule`."""

    count: Tensor  # optax's name; () int64: updates so far


def scale_by_schedule(step_size_fn: StepSchedule) -> GradientTransformation:
    """step_size_fn(count) * g, where count is 0 at the first update.

    >>> tx = scale_by_schedule(lambda step: 1.0 + step)
    >>> state = tx.init([torch.ones(1)])
    >>> first, state = tx.update([torch.ones(1)], state)
    >>> tx.update([torch.ones(1)], state)
    ([tensor([2.])], ScaleByScheduleState(count=tensor(2)))
    """

    def init(params: Params) -> ScaleByScheduleState:
        check_params("scale_by_schedule", params)
        return ScaleByScheduleState(scalar_zero(params, torch.int64))

    def update(
        grads: Tree, state: ScaleByScheduleState, params: Params | None = None, **extra: Any
    ) -> tuple[Tree, ScaleByScheduleState]:
        return tree.scale(grads, step_size_fn(state.count)), ScaleByScheduleState(state.count + 1)

    return GradientTransformation(init, update)


def scale_by_learning_rate(learning_rate: LearningRate, *, flip_sign: bool = True) -> GradientTransformation:
    """-learning_rate * g: the last link of a chain that descends.

    Args:
        learning_rate: a number >= 0, a 0-d tensor, or a function of the step.
        flip_sign: False for learning_rate * g.

    >>> scale_by_learning_rate(0.5).update([torch.ones(2)], ())[0]
    [tensor([-0.5000, -0.5000])]
    """
    sign = -1 if flip_sign else 1
    if callable(learning_rate):
        return scale_by_schedule(lambda step: sign * learning_rate(step))
    check_number("scale_by_learning_rate", "learning_rate", learning_rate, low=0)
    return scale(sign * learning_rate)


def scale_by_sign() -> GradientTransformation:
    """sign(g). Equals ``optax.scale_by_sign``.

    >>> scale_by_sign().update([torch.tensor([-3.0, 0.0])], ())[0]
    [tensor([-1.,  0.])]
    """
    return stateless("scale_by_sign", lambda grads, params, **extra: tree.map(torch.sign, grads))


def scale_by_trust_ratio(
    min_norm: Number = 0.0, trust_coefficient: Number = 1.0, eps: Number = 0.0
) -> GradientTransformation:
    """trust_coefficient |p| / (|u| + eps) u for each parameter by itself; u where either norm is 0.

    Norms are at least ``min_norm``. Equals ``optax.scale_by_trust_ratio``. Works on flat vectors too, tree by tree.

    Raises:
        ValueError: in ``update``, if it is not given the parameters.

    >>> scale_by_trust_ratio().update([torch.tensor([3.0, 4.0])], (), [torch.tensor([0.0, 10.0])])[0]
    [tensor([6., 8.])]
    """
    name = "scale_by_trust_ratio"
    check_hyperparameters(name, min_norm=min_norm, trust_coefficient=trust_coefficient, eps=eps)

    def scaled(u: Tensor, p: Tensor) -> Tensor:
        u_norm, p_norm = tree.norm(u).clamp(min=min_norm), tree.norm(p).clamp(min=min_norm)
        is_zero = (u_norm == 0) | (p_norm == 0)
        return u * torch.where(is_zero, 1.0, trust_coefficient * p_norm / torch.where(is_zero, 1.0, u_norm + eps))

    return by_leaf(name, scaled)


def scale_by_param_block_rms(min_scale: Number = 1e-3) -> GradientTransformation:
    """max(rms(p), min_scale) u for each parameter by itself. Equals ``optax.scale_by_param_block_rms``.

    >>> scale_by_param_block_rms().update([torch.ones(2)], (), [torch.tensor([6.0, 8.0])])[0]
    [tensor([7.0711, 7.0711])]
    """
    check_hyperparameters("scale_by_param_block_rms", min_scale=min_scale)

    def scaled(u: Tensor, p: Tensor) -> Tensor:
        return u * (tree.norm(p) / max(p.numel(), 1) ** 0.5).clamp(min=min_scale)

    return by_leaf("scale_by_param_block_rms", scaled)


def scale_by_polyak(
    f_min: Number = 0.0, max_learning_rate: Number = 1.0, eps: Number = 0.0, variant: str = "sps"
) -> GradientTransformation:
    """min((value - f_min) / (|g|^2 + eps), max_learning_rate) g, and 0 where |g|^2 vanishes.

    ``update`` needs the loss: ``update(grads, state, params, value=loss)``. Equals ``optax.scale_by_polyak``.

    Args:
        f_min: the least value of the loss.
        variant: ``"sps"``, or ``"sps+"``, which takes no step where the loss is below ``f_min``.
    Raises:
        ValueError: if the variant is another, or in ``update``, if it is not given the loss.

    >>> scale_by_polyak(max_learning_rate=10.0).update([torch.tensor([0.5])], (), value=torch.tensor(1.0))[0]
    [tensor([2.])]
    """
    check_number("scale_by_polyak", "f_min", f_min)
    check_hyperparameters("scale_by_polyak", max_learning_rate=max_learning_rate, eps=eps)
    check_choice("scale_by_polyak", "variant", variant, ("sps", "sps+"))

    def transform(grads: Tree, params: Params | None, *, value: Number | None = None, **extra: Any) -> Tree:
        if value is None:
            raise ValueError("scale_by_polyak: expected update(grads, state, params, value=loss), got value=None")
        if not tree.leaves(grads):
            return grads
        wide = tree.map(at_least_float32, grads)
        square = tree.vdot(wide, wide) + eps
        vanishes = square <= torch.finfo(torch.float64).eps
        step = ((value - f_min) / torch.where(vanishes, 1.0, square)).clamp(max=max_learning_rate)
        step = step.clamp(min=0) if variant == "sps+" else step
        return tree.scale(grads, torch.where(vanishes, 0.0, step))

    return stateless("scale_by_polyak", transform)
