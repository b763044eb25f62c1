"""Hyper-parameters as functions of the step: (int or () int64) -> (), optax's names and formulas.

A schedule is tensor arithmetic alone (``torch.where``, no branch on the step), so it traces, batches over its own
parameters under ``vmap`` and has derivatives. It is computed in float64: one scalar costs nothing, and float32
cannot count beyond 2^24.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen.check import check_number, check_positive
from functorch_gen.typing import Number

__all__ = [
    "LearningRate",
    "constant_schedule",
    "cosine_decay_schedule",
    "join_schedules",
    "linear_schedule",
    "warmup_cosine_decay_schedule",
]

StepSchedule: TypeAlias = Callable[[int | Tensor], Tensor]
"""() int64 or int -> ()."""

LearningRate: TypeAlias = Number | StepSchedule
"""A number, a 0-d tensor, or a schedule."""


def _as_real(step: int | Tensor) -> Tensor:
    return step.double() if isinstance(step, Tensor) else torch.ones((), dtype=torch.float64) * step


def constant_schedule(value: Number) -> StepSchedule:
    """``value`` at every step. Equals ``optax.constant_schedule``.

    >>> constant_schedule(0.1)(7)
    tensor(0.1000, dtype=torch.float64)
    """
    check_number("constant_schedule", "value", value)
    return lambda step: _as_real(step) * 0 + value


def linear_schedule(
    init_value: Number, end_value: Number, transition_steps: int, transition_begin: int = 0
) -> StepSchedule:
    """A straight line from ``init_value`` to ``end_value`` over ``transition_steps`` steps, flat before and after.

    value(t) = end + (init - end) (1 - clip(t - begin, 0, T) / T)

    Equals ``optax.linear_schedule``.

    Raises:
        ValueError: if ``transition_steps`` <= 0 or ``transition_begin`` < 0.

    >>> linear_schedule(0.0, 1.0, transition_steps=4)(1)
    tensor(0.2500, dtype=torch.float64)
    """
    check_positive("linear_schedule", transition_steps=transition_steps)
    check_number("linear_schedule", "transition_begin", transition_begin, low=0)

    def schedule(step: int | Tensor) -> Tensor:
        t = (_as_real(step) - transition_begin).clamp(0, transition_steps)
        return (init_value - end_value) * (1 - t / transition_steps) + end_value

    return schedule


def cosine_decay_schedule(init_value: Number, decay_steps: int, alpha: Number = 0.0) -> StepSchedule:
    """Half a cosine from ``init_value`` to ``alpha * init_value`` in ``decay_steps`` steps, flat afterwards.

    value(t) = init ((1 - alpha) (1 + cos(pi min(t, T) / T)) / 2 + alpha)

    Equals ``optax.cosine_decay_schedule``.

    Raises:
        ValueError: if ``decay_steps`` <= 0.

    Source: Loshchilov and Hutter 2017, eq. 5, arXiv:1608.03983.

    >>> cosine_decay_schedule(1.0, decay_steps=10, alpha=0.5)(5)
    tensor(0.7500, dtype=torch.float64)
    """
    check_positive("cosine_decay_schedule", decay_steps=decay_steps)

    def schedule(step: int | Tensor) -> Tensor:
        t = _as_real(step).clamp(max=decay_steps)
        cosine = 0.5 * (1 + torch.cos(math.pi * t / decay_steps))
        return init_value * ((1 - alpha) * cosine + alpha)

    return schedule


def join_schedules(schedules: Sequence[StepSchedule], boundaries: Sequence[int]) -> StepSchedule:
    """One schedule after the other; each counts its steps from the boundary where it begins.

    Equals ``optax.join_schedules``.

    Raises:
        ValueError: unless there is one boundary between each schedule and the next.

    >>> joined = join_schedules([constant_schedule(1.0), linear_schedule(1.0, 0.0, 2)], boundaries=[10])
    >>> [joined(step).item() for step in (9, 10, 11, 12)]
    [1.0, 1.0, 0.5, 0.0]
    """
    if len(schedules) != len(boundaries) + 1:
        raise ValueError(f"join_schedules: expected {len(boundaries) + 1} schedules, got {len(schedules)}")

    def schedule(step: int | Tensor) -> Tensor:
        value = schedules[0](step)
        for boundary, later in zip(boundaries, schedules[1:], strict=True):
            value = torch.where(_as_real(step) < boundary, value, later(step - boundary))
        return value

    return schedule


def warmup_cosine_decay_schedule(
    init_value: Number, peak_value: Number, warmup_steps: int, decay_steps: int, end_value: Number = 0.0
) -> StepSchedule:
    """A line from ``init_value`` to ``peak_value``, then half a cosine down to ``end_value``.

    Equals ``optax.warmup_cosine_decay_schedule``.

    Args:
        decay_steps: length of the whole schedule, warm-up included.
    Raises:
        ValueError: unless 0 <= ``warmup_steps`` < ``decay_steps``.

    >>> schedule = warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=30, end_value=0.1)
    >>> [round(schedule(step).item(), 4) for step in (0, 5, 10, 20, 30, 40)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    name = "warmup_cosine_decay_schedule"
    check_number(name, "warmup_steps", warmup_steps, low=0)
    if not decay_steps > warmup_steps:
        raise ValueError(f"{name}: expected decay_steps > warmup_steps={warmup_steps}, got {decay_steps}")

    def schedule(step: int | Tensor) -> Tensor:
        t = _as_real(step)
        rise = init_value + (peak_value - init_value) * (t / max(warmup_steps, 1))
        progress = ((t - warmup_steps) / (decay_steps - warmup_steps)).clamp(max=1)
        fall = end_value + (peak_value - end_value) * 0.5 * (1 + torch.cos(math.pi * progress))
        return torch.where(t < warmup_steps, rise, fall)

    return schedule
