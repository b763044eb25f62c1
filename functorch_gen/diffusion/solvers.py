"""Samplers along the probability flow, one step at a time; arguments: :mod:`functorch_gen.diffusion.sampling`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functorch_gen.diffusion.sampling import (
    Denoise,
    Point,
    Run,
    Samples,
    Step,
    Times,
    begin,
    euler,
    march,
    point_at,
    without_memory,
)
from functorch_gen.noise import NoiseSchedule, rho_times
from functorch_gen.typing import Key

__all__ = ["heun", "sample_dpmpp_2s", "sample_euler", "sample_heun"]


def _euler_step(run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
    return euler(step.at, step.to, x_t, x_hat)


def heun(run: Run, at: Point, to: Point, x_t: Tensor, x_hat: Tensor) -> Tensor:
    """The trapezoidal rule for x' - x = integral of D dalpha + N dsigma."""
    trial = euler(at, to, x_t, x_hat)
    x_next = run.evaluate(to, trial)
    noise = 0.5 * (at.noise(x_t, x_hat) + to.noise(trial, x_next))
    return x_t + (to.alpha - at.alpha) * 0.5 * (x_hat + x_next) + (to.sigma - at.sigma) * noise


def _heun_step(run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
    return heun(run, step.at, step.to, x_t, x_hat)


def _midpoint_step(run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
    """DDIM with D taken from the middle of the step in log(alpha / sigma)."""
    middle = step.extra
    halfway = run.evaluate(middle, euler(step.at, middle, x_t, x_hat))
    return euler(step.at, step.to, x_t, halfway)


def sample_euler(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by Euler's method: -> (b, ...). First order; ``steps`` evaluations.

    It is Euler's method in sigma for :class:`EDM`, in t for :class:`FlowMatching`, and DDIM for every schedule.
    Arguments: see :mod:`functorch_gen.diffusion.sampling`.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.EDM()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_euler(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    run = begin("sample_euler", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    return march(run, without_memory(_euler_step))


def sample_heun(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by Heun's method: -> (b, ...). Second order; 2 ``steps`` - 1 evaluations.

    Its last step, to the data, is Euler's. Arguments: see :mod:`functorch_gen.diffusion.sampling`.

    Source: Karras et al. 2022, algorithm 1 (equal to it for :class:`EDM`), arXiv:2206.00364.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.EDM()
    >>> denoise = lambda x_t, t: x_t / (1 + schedule.sigma(t)[:, None] ** 2)  # of N(0, 1)
    >>> sample_heun(random.key(0), denoise, (1000, 2), schedule=schedule, steps=20).std()
    tensor(1.0383)
    """
    run = begin("sample_heun", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    return march(run, without_memory(_heun_step))


def sample_dpmpp_2s(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by DPM-Solver++(2S): -> (b, ...). Second order; 2 ``steps`` - 1 evaluations.

    The midpoint rule in log(alpha / sigma), by default at ``noise.rho_times``. Its last step, to the data, is Euler's.
    Arguments: see :mod:`functorch_gen.diffusion.sampling`.

    Source: Lu et al. 2022, algorithm 1 with r = 1/2, arXiv:2211.01095.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPLinear()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_dpmpp_2s(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    times = rho_times if times is None else times
    run = begin("sample_dpmpp_2s", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    log_ratio = 0.5 * (run.points.log_ratio[:-1] + run.points.log_ratio[1:])
    middles = point_at(schedule, schedule.t_of((-log_ratio).exp()))
    return march(run, without_memory(_midpoint_step), extra=middles)
