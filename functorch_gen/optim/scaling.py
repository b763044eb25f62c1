"""Updates times a number, a schedule or the negative learning rate."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number
from functorch_gen.leaves import check_params, scalar_zero
from functorch_gen.optim.schedules import LearningRate, StepSchedule
from functorch_gen.optim.transformation import GradientTransformation, stateless
from functorch_gen.typing import Number, Params, Tree

__all__ = ["ScaleByScheduleState", "scale", "scale_by_learning_rate", "scale_by_schedule"]


def _times(updates: Tree, factor: Number) -> Tree:
    return tree.map(lambda u: (factor * u).to(u.dtype), updates)


def scale(step_size: Number) -> GradientTransformation:
    """step_size * g.

    >>> scale(2.0).update([torch.ones(2)], ())[0]
    [tensor([2., 2.])]
    """
    check_number("scale", "step_size", step_size)
    return stateless("scale", lambda grads, params, **extra: _times(grads, step_size))


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
        return _times(grads, step_size_fn(state.count)), ScaleByScheduleState(state.count + 1)

    return GradientTransformation(init, update)


def scale_by_learning_rate(learning_rate: LearningRate) -> GradientTransformation:
    """-learning_rate * g: the last link of a chain that descends.

    Args:
        learning_rate: a number >= 0, a 0-d tensor, or a function of the step.

    >>> scale_by_learning_rate(0.5).update([torch.ones(2)], ())[0]
    [tensor([-0.5000, -0.5000])]
    """
    if callable(learning_rate):
        return scale_by_schedule(lambda step: -learning_rate(step))
    check_number("scale_by_learning_rate", "learning_rate", learning_rate, low=0)
    return scale(-learning_rate)
