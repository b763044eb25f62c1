"""Hyper-parameters as functions of the step: (int or () int64) -> (), optax's names and formulas.

A schedule is tensor arithmetic alone (``torch.where``, no branch on the step), so it traces, batches over its own
parameters under ``vmap`` and has derivatives. It is computed in float64: one scalar costs nothing, and float32
cannot count beyond 2^24. Each equals optax's of the same name, or says what it equals. Numbers of steps may be 0-d
tensors; a Python number that is not positive is a ``ValueError``.
"""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_above_zero, check_choice, check_number
from functorch_gen.typing import Number

__all__ = [
    "LearningRate", "constant_schedule", "cosine_decay_schedule", "cosine_onecycle_schedule",
    "exponential_decay", "inverse_sqrt_schedule", "join_schedules", "linear_onecycle_schedule", "linear_schedule",
    "piecewise_constant_schedule", "piecewise_interpolate_schedule", "polynomial_schedule", "sgdr_schedule",
    "step_schedule", "warmup_constant_schedule", "warmup_cosine_decay_schedule", "warmup_exponential_decay_schedule",
    "warmup_stable_decay_schedule",
]  # fmt: skip

StepSchedule: TypeAlias = Callable[[int | Tensor], Tensor]
"""() int64 or int -> ()."""

LearningRate: TypeAlias = Number | StepSchedule
"""A number, a 0-d tensor, or a schedule."""

_SHAPES: dict[str, Callable[[Tensor], Tensor]] = {  # from 1 at 0 to 0 at 1
    "linear": lambda x: 1 - x,
    "cosine": lambda x: 0.5 * (1 + torch.cos(math.pi * x)),
    "1-sqrt": lambda x: 1 - numerics.sqrt(x),
}


def _real(step: Number) -> Tensor:
    return step.double() if isinstance(step, Tensor) else torch.ones((), dtype=torch.float64) * step


def _transition(
    start: Number, end: Number, steps: Number, shape: str = "linear", power: Number = 1, begin: Number = 0
) -> StepSchedule:
    """From ``start`` to ``end`` in ``steps`` steps, flat before and after."""

    def schedule(step: int | Tensor) -> Tensor:
        rest = _SHAPES[shape](((_real(step) - begin) / steps).clamp(0, 1))
        return end + (start - end) * numerics.safe_where(rest > 0, lambda rest: rest**power, rest)

    return schedule


def constant_schedule(value: Number) -> StepSchedule:
    """``value`` at every step.

    >>> constant_schedule(0.1)(7)
    tensor(0.1000, dtype=torch.float64)
    """
    check_number("constant_schedule", "value", value)
    return lambda step: _real(step) * 0 + value


def polynomial_schedule(
    init_value: Number, end_value: Number, power: Number, transition_steps: Number, transition_begin: Number = 0
) -> StepSchedule:
    """end + (init - end) (1 - clip(t - transition_begin, 0, T) / T)^power, where T is ``transition_steps``.

    >>> polynomial_schedule(1.0, 0.0, power=2, transition_steps=4)(2)
    tensor(0.2500, dtype=torch.float64)
    """
    check_above_zero("polynomial_schedule", transition_steps=transition_steps)
    check_number("polynomial_schedule", "transition_begin", transition_begin, low=0)
    return _transition(init_value, end_value, transition_steps, "linear", power, transition_begin)


def linear_schedule(
    init_value: Number, end_value: Number, transition_steps: Number, transition_begin: Number = 0
) -> StepSchedule:
    """A straight line from ``init_value`` to ``end_value`` over ``transition_steps`` steps, flat before and after.

    >>> linear_schedule(0.0, 1.0, transition_steps=4)(1)
    tensor(0.2500, dtype=torch.float64)
    """
    check_above_zero("linear_schedule", transition_steps=transition_steps)
    check_number("linear_schedule", "transition_begin", transition_begin, low=0)
    return _transition(init_value, end_value, transition_steps, begin=transition_begin)


def cosine_decay_schedule(
    init_value: Number, decay_steps: Number, alpha: Number = 0.0, exponent: Number = 1.0
) -> StepSchedule:
    """init ((1 - alpha) ((1 + cos(pi min(t, T) / T)) / 2)^exponent + alpha), where T is ``decay_steps``.

    Source: Loshchilov and Hutter 2017, eq. 5, arXiv:1608.03983.

    >>> cosine_decay_schedule(1.0, decay_steps=10, alpha=0.5)(5)
    tensor(0.7500, dtype=torch.float64)
    """
    check_above_zero("cosine_decay_schedule", decay_steps=decay_steps)
    return _transition(init_value, alpha * init_value, decay_steps, "cosine", exponent)


def exponential_decay(
    init_value: Number, transition_steps: Number, decay_rate: Number, transition_begin: Number = 0,
    staircase: bool = False, end_value: Number | None = None,
) -> StepSchedule:  # fmt: skip
    """init decay_rate^(max(t - transition_begin, 0) / transition_steps), which does not pass ``end_value``.

    Args:
        staircase: whether the exponent is rounded down to a whole number.

    >>> exponential_decay(1.0, transition_steps=5, decay_rate=0.25)(5)
    tensor(0.2500, dtype=torch.float64)
    """
    check_above_zero("exponential_decay", transition_steps=transition_steps, decay_rate=decay_rate)
    check_number("exponential_decay", "transition_begin", transition_begin, low=0)

    def schedule(step: int | Tensor) -> Tensor:
        exponent = ((_real(step) - transition_begin) / transition_steps).clamp(min=0)
        rate = exponent * 0 + decay_rate
        value = init_value * rate ** (exponent.floor() if staircase else exponent)
        if end_value is None:
            return value
        return torch.where(rate < 1, value.clamp(min=end_value), value.clamp(max=end_value))

    return schedule


def step_schedule(init_value: Number, step_size: Number | Sequence[int], gamma: Number = 0.1) -> StepSchedule:
    """init gamma^n after n drops, one every ``step_size`` steps or one at each of several steps.

    Equals ``torch.optim.lr_scheduler.StepLR`` and ``MultiStepLR``.

    >>> [round(step_schedule(1.0, [3, 5])(t).item(), 3) for t in (2, 3, 5)]
    [1.0, 0.1, 0.01]
    """
    if isinstance(step_size, Sequence):
        return piecewise_constant_schedule(init_value, {at: gamma ** step_size.count(at) for at in step_size})
    check_above_zero("step_schedule", step_size=step_size, gamma=gamma)
    return exponential_decay(init_value, step_size, gamma, staircase=True)


def piecewise_constant_schedule(
    init_value: Number, boundaries_and_scales: Mapping[int, Number] | None = None
) -> StepSchedule:
    """``init_value`` times the scales of all boundaries reached.

    >>> piecewise_constant_schedule(1.0, {10: 0.5, 20: 0.1})(15)
    tensor(0.5000, dtype=torch.float64)
    """
    bounds, values = _levels("piecewise_constant_schedule", init_value, boundaries_and_scales)
    return join_schedules([constant_schedule(value) for value in values], bounds)


def piecewise_interpolate_schedule(
    interpolate_type: str, init_value: Number, boundaries_and_scales: Mapping[int, Number] | None = None
) -> StepSchedule:
    """The values of :func:`piecewise_constant_schedule` at the boundaries, and "linear" or "cosine" ways between.

    >>> [piecewise_interpolate_schedule("linear", 1.0, {4: 0.5, 8: 2.0})(t).item() for t in (0, 2, 4, 6, 9)]
    [1.0, 0.75, 0.5, 0.75, 1.0]
    """
    check_choice("piecewise_interpolate_schedule", "interpolate_type", interpolate_type, ("linear", "cosine"))
    bounds, values = _levels("piecewise_interpolate_schedule", init_value, boundaries_and_scales)
    lengths = [max(end - begin, 1) for begin, end in zip([0, *bounds], bounds)]
    pieces = [_transition(*piece, interpolate_type) for piece in zip(values, values[1:], lengths)]
    return join_schedules([*pieces, constant_schedule(values[-1])], bounds)


def _levels(name: str, value: Number, scales: Mapping[int, Number] | None) -> tuple[list[int], list[Number]]:
    scales, values = scales or {}, [value]
    bounds = sorted(scales)
    for bound in bounds:
        check_number(name, f"boundaries_and_scales[{bound}]", scales[bound], low=0)
        values.append(values[-1] * scales[bound])
    return bounds, values


def linear_onecycle_schedule(
    transition_steps: int, peak_value: Number, pct_start: float = 0.3, pct_final: float = 0.85,
    div_factor: Number = 25.0, final_div_factor: Number = 1e4,
) -> StepSchedule:  # fmt: skip
    """Lines from peak / div_factor to the peak, back, and to peak / (div_factor final_div_factor).

    Source: Smith and Topin 2017, arXiv:1708.07120.

    >>> [round(linear_onecycle_schedule(100, 1.0)(t).item(), 3) for t in (0, 30, 85, 100)]
    [0.04, 1.0, 0.04, 0.0]
    """
    check_above_zero("linear_onecycle_schedule", transition_steps=transition_steps)
    top, back = int(pct_start * transition_steps), int(pct_final * transition_steps)
    scales = {top: div_factor, back: 1 / div_factor, transition_steps: 1 / final_div_factor}
    return piecewise_interpolate_schedule("linear", peak_value / div_factor, scales)


def cosine_onecycle_schedule(
    transition_steps: int, peak_value: Number, pct_start: float = 0.3, div_factor: Number = 25.0,
    final_div_factor: Number = 1e4,
) -> StepSchedule:  # fmt: skip
    """Half a cosine from peak / div_factor to the peak, another to peak / (div_factor final_div_factor).

    >>> [round(cosine_onecycle_schedule(100, 1.0)(t).item(), 3) for t in (0, 30, 65, 100)]
    [0.04, 1.0, 0.5, 0.0]
    """
    check_above_zero("cosine_onecycle_schedule", transition_steps=transition_steps)
    scales = {int(pct_start * transition_steps): div_factor, transition_steps: 1 / (div_factor * final_div_factor)}
    return piecewise_interpolate_schedule("cosine", peak_value / div_factor, scales)


def join_schedules(schedules: Sequence[StepSchedule], boundaries: Sequence[Number]) -> StepSchedule:
    """One schedule after the other; each counts its steps from the boundary where it begins.

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
            value = torch.where(_real(step) < boundary, value, later(_real(step) - boundary))
        return value

    return schedule


def _warmed(name: str, start: Number, peak: Number, steps: Number, after: StepSchedule) -> StepSchedule:
    check_number(name, "warmup_steps", steps, low=0)
    return join_schedules([_transition(start, peak, steps + (steps == 0)), after], [steps])


def warmup_constant_schedule(init_value: Number, peak_value: Number, warmup_steps: Number) -> StepSchedule:
    """A line from ``init_value`` to ``peak_value``, which stays.

    >>> warmup_constant_schedule(0.0, 1.0, warmup_steps=4)(3)
    tensor(0.7500, dtype=torch.float64)
    """
    check_above_zero("warmup_constant_schedule", warmup_steps=warmup_steps)
    return _transition(init_value, peak_value, warmup_steps)


def warmup_cosine_decay_schedule(
    init_value: Number, peak_value: Number, warmup_steps: Number, decay_steps: Number, end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> StepSchedule:  # fmt: skip
    """A line from ``init_value`` to ``peak_value``, then half a cosine (to a power) down to ``end_value``.

    Args:
        decay_steps: length of the whole schedule, warm-up included.

    >>> schedule = warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=30, end_value=0.1)
    >>> [round(schedule(step).item(), 4) for step in (0, 5, 10, 20, 30, 40)]
    [0.0, 0.5, 1.0, 0.55, 0.1, 0.1]
    """
    name, length = "warmup_cosine_decay_schedule", decay_steps - warmup_steps
    if isinstance(length, int | float) and not length > 0:
        raise ValueError(f"{name}: expected decay_steps > warmup_steps={warmup_steps}, got {decay_steps}")
    fall = _transition(peak_value, end_value, length, "cosine", exponent)
    return _warmed(name, init_value, peak_value, warmup_steps, fall)


def warmup_exponential_decay_schedule(
    init_value: Number, peak_value: Number, warmup_steps: Number, transition_steps: Number, decay_rate: Number,
    transition_begin: Number = 0, staircase: bool = False, end_value: Number | None = None,
) -> StepSchedule:  # fmt: skip
    """A line from ``init_value`` to ``peak_value``, then :func:`exponential_decay`.

    >>> warmup_exponential_decay_schedule(0.0, 1.0, warmup_steps=4, transition_steps=2, decay_rate=0.5)(6)
    tensor(0.5000, dtype=torch.float64)
    """
    fall = exponential_decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
    return _warmed("warmup_exponential_decay_schedule", init_value, peak_value, warmup_steps, fall)


def warmup_stable_decay_schedule(
    init_value: Number, peak_value: Number, warmup_steps: Number, stable_steps: Number, decay_steps: Number,
    end_value: Number = 0.0, decay_type: str = "linear",
) -> StepSchedule:  # fmt: skip
    """A line from ``init_value`` to ``peak_value``, which stays, then a decay: "linear", "cosine" or "1-sqrt".

    Source: Hu et al. 2024, arXiv:2404.06395; 1-sqrt is that of Hägele et al. 2024, arXiv:2405.18392.

    >>> schedule = warmup_stable_decay_schedule(0.0, 1.0, warmup_steps=2, stable_steps=6, decay_steps=4)
    >>> [schedule(step).item() for step in (0, 1, 2, 8, 10, 12)]
    [0.0, 0.5, 1.0, 1.0, 0.5, 0.0]
    """
    name = "warmup_stable_decay_schedule"
    check_choice(name, "decay_type", decay_type, _SHAPES)
    check_number(name, "stable_steps", stable_steps, low=0)
    check_above_zero(name, decay_steps=decay_steps)
    fall = _transition(peak_value, end_value, decay_steps, decay_type, begin=stable_steps)
    return _warmed(name, init_value, peak_value, warmup_steps, fall)


def inverse_sqrt_schedule(
    init_value: Number, peak_value: Number, warmup_steps: Number, timescale: Number | None = None
) -> StepSchedule:
    """A line from ``init_value`` to ``peak_value``, then peak sqrt(T / (T + t - warmup_steps)), T the ``timescale``.

    By default T is ``warmup_steps``: Vaswani et al. 2017, eq. 3, arXiv:1706.03762, with peak (d_model T)^-0.5. With its
    own T: Zhai et al. 2022, arXiv:2106.04560.

    >>> inverse_sqrt_schedule(0.0, 1.0, warmup_steps=10)(40)
    tensor(0.5000, dtype=torch.float64)
    """
    scale = warmup_steps if timescale is None else timescale
    check_above_zero("inverse_sqrt_schedule", timescale=scale)

    def fall(step: int | Tensor) -> Tensor:
        return peak_value * (1 + _real(step).clamp(min=0) / scale) ** -0.5

    return _warmed("inverse_sqrt_schedule", init_value, peak_value, warmup_steps, fall)


def sgdr_schedule(cosine_kwargs: Iterable[Mapping[str, Number]]) -> StepSchedule:
    """Cycles of :func:`warmup_cosine_decay_schedule`, each with its arguments: cosine restarts.

    With cycles of T_0 T_mult^i steps without warm-up, ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``.

    >>> sgdr_schedule([dict(init_value=1.0, peak_value=1.0, warmup_steps=0, decay_steps=n) for n in (4, 8)])(8)
    tensor(0.5000, dtype=torch.float64)
    """
    cycles = [dict(kwargs) for kwargs in cosine_kwargs]
    ends = list(itertools.accumulate(cycle["decay_steps"] for cycle in cycles))
    return join_schedules([warmup_cosine_decay_schedule(**cycle) for cycle in cycles], ends[:-1])
