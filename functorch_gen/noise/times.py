"""Times at which a sampler evaluates: (steps,) float64, from t = 1 down. One more step leads from there to the data."""

import torch
from torch import Tensor

from functorch_gen.check import check_positive
from functorch_gen.noise.schedule import NoiseSchedule

__all__ = ["angle_times", "rho_times", "uniform_times"]


def uniform_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Equal steps in t, the last of them ending at t = 0: t_i = 1 - i / steps.

    >>> from functorch_gen.noise import FlowMatching
    >>> uniform_times(FlowMatching(), 4)
    tensor([1.0000, 0.7500, 0.5000, 0.2500], dtype=torch.float64)
    """
    check_positive("uniform_times", steps=steps)
    return 1 - torch.arange(steps, dtype=torch.float64) / steps


def angle_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Equal steps in the angle atan(sigma / alpha), the last of them ending at the data.

    On this grid the noise of the last evaluation falls as 1 / steps for every schedule, so that the step from there to
    the data costs a second-order sampler nothing. In equal steps of t it falls only as steps^(-1/2) where sigma^2 is
    linear at t = 0, as for :class:`VPLinear`.

    >>> from functorch_gen.noise import FlowMatching
    >>> angle_times(FlowMatching(), 2)
    tensor([1.0000, 0.5000], dtype=torch.float64)
    """
    check_positive("angle_times", steps=steps)
    end = torch.ones((), dtype=torch.float64)
    part = 1 - torch.arange(1, steps, dtype=torch.float64) / steps
    angle = part * torch.atan2(schedule.sigma(end), schedule.alpha(end))
    return torch.cat([end[None], schedule.t_of(angle.tan())])


def rho_times(
    schedule: NoiseSchedule, steps: int, *, ratio_min: float = 0.002, ratio_max: float = 160.0, rho: float = 7.0
) -> Tensor:
    """Equal steps in (sigma / alpha)^(1 / rho) from t = 1 down to ``ratio_min``, both ends evaluated.

    Steps in log-SNR are then even over the whole range, as multistep samplers need. Ratios above ``ratio_max``, where
    nothing happens, are passed in the first step. For :class:`EDM` with its defaults these are its own times.

    Source: Karras et al. 2022, eq. 5, arXiv:2206.00364.

    >>> from functorch_gen.noise import FlowMatching
    >>> FlowMatching().sigma(rho_times(FlowMatching(), 3))
    tensor([1.0000, 0.8169, 0.0020], dtype=torch.float64)
    """
    check_positive("rho_times", steps=steps, ratio_min=ratio_min, ratio_max=ratio_max, rho=rho)
    if ratio_max < ratio_min:
        raise ValueError(f"rho_times: expected ratio_max >= ratio_min={ratio_min}, got {ratio_max}")
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ratio = schedule.sigma(ends) / schedule.alpha(ends).clamp(min=torch.finfo(ends.dtype).tiny)
    low, high = ratio.clamp(ratio_min, ratio_max) ** (1 / rho)
    part = torch.arange(1, steps, dtype=torch.float64) / max(steps - 1, 1)
    return torch.cat([ends[1:], schedule.t_of((high + part * (low - high)) ** rho)])
