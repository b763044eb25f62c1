"""Noise schedules: how x_t = alpha(t) x + sigma(t) noise goes from data (t = 0) to noise (t = 1).

A schedule is a frozen dataclass of numbers with four methods: ``alpha``, ``sigma``, the inverse ``t_of`` of
sigma / alpha, and the ``times`` at which a sampler evaluates by default. Everything else follows from these:
:func:`mix`, :func:`log_snr`, :func:`rates`. Any object with the four methods will do.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.typing import Number

__all__ = [
    "EDM",
    "FlowMatching",
    "NoiseSchedule",
    "VPCosine",
    "VPLinear",
    "angle_times",
    "expand",
    "log_snr",
    "mix",
    "rates",
    "rho_times",
    "uniform_times",
]


@runtime_checkable
class NoiseSchedule(Protocol):
    """Scales of signal and noise: alpha(0) = 1 and falls, sigma rises, sigma / alpha strictly."""

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal at times in [0, 1], of any shape."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the noise at times in [0, 1], of any shape."""
        ...

    def t_of(self, ratio: Tensor) -> Tensor:
        """The time at which sigma / alpha is ``ratio``; ratios out of reach give the nearer end."""
        ...

    def times(self, steps: int) -> Tensor:
        """Times at which a sampler evaluates by default: (steps,) float64, falling from 1, not below 0."""
        ...


# Functions of any schedule.


def expand(value: Number, x: Tensor) -> Number:
    """Gives a value of each example as many axes as ``x``: (b,), (b, ...) -> (b, 1, ...).

    Numbers and 0-d tensors stay as they are.

    >>> expand(torch.ones(2), torch.ones(2, 3, 4)).shape
    torch.Size([2, 1, 1])
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[(..., *[None] * (x.ndim - value.ndim))]


def mix(schedule: NoiseSchedule, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The noisy sample x_t = alpha(t) x + sigma(t) noise: (b, ...), (b, ...), (b,) -> (b, ...).

    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``t`` is not (b,) or ``noise`` has not the shape of ``x``.

    >>> mix(FlowMatching(), torch.zeros(1, 2), torch.ones(1, 2), torch.tensor([0.25]))
    tensor([[0.2500, 0.2500]])
    """
    check_floating(x, "mix: x")
    check_shape(t, "b", "mix: t", b=x.shape[0] if x.ndim else 1)
    if noise.shape != x.shape:
        raise ValueError(f"mix: noise: expected shape {tuple(x.shape)} as x has, got {tuple(noise.shape)}")
    return expand(schedule.alpha(t), x) * x + expand(schedule.sigma(t), x) * noise


def log_snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """log(alpha^2 / sigma^2), of the shape of ``t``; where either is 0, its logarithm is that of the smallest number.

    >>> log_snr(FlowMatching(), torch.tensor([0.0, 0.5, 1.0])).isfinite().all()
    tensor(True)
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    tiny = torch.finfo(alpha.dtype).tiny
    return 2 * (alpha.clamp(min=tiny).log() - sigma.clamp(min=tiny).log())


def rates(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(d alpha / dt, d sigma / dt), each of the shape of ``t``, by forward differentiation.

    Where a variance-preserving schedule starts (t = 0), d sigma / dt diverges; there it is given as 0.

    >>> rates(FlowMatching(), torch.tensor([0.3]))
    (tensor([-1.]), tensor([1.]))
    """
    one = torch.ones_like(t)
    return torch.func.jvp(schedule.alpha, (t,), (one,))[1], torch.func.jvp(schedule.sigma, (t,), (one,))[1]


def _root(x: Tensor) -> Tensor:
    """Square root whose derivatives at 0 are 0."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)


# Times at which a sampler evaluates: (steps,) float64 from t = 1 down. One more step leads from the last to the data.


def uniform_times(schedule: NoiseSchedule, steps: int) -> Tensor:
    """Equal steps in t, the last of them ending at t = 0: t_i = 1 - i / steps.

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

    >>> FlowMatching().sigma(rho_times(FlowMatching(), 3))
    tensor([1.0000, 0.8169, 0.0020], dtype=torch.float64)
    """
    check_positive("rho_times", steps=steps, ratio_min=ratio_min, ratio_max=ratio_max, rho=rho)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    ratio = schedule.sigma(ends) / schedule.alpha(ends).clamp(min=torch.finfo(ends.dtype).tiny)
    low, high = ratio.clamp(ratio_min, ratio_max) ** (1 / rho)
    part = torch.arange(1, steps, dtype=torch.float64) / max(steps - 1, 1)
    return torch.cat([ends[1:], schedule.t_of((high + part * (low - high)) ** rho)])


# The schedules.


@dataclass(frozen=True)
class VPLinear:
    """Variance-preserving, alpha^2 + sigma^2 = 1, with a rate of noising that is linear in t.

    alpha = exp(-B / 2), B(t) = beta_min t + (beta_max - beta_min) t^2 / 2

    Source: Song et al. 2021, eq. 33 (appendix C), arXiv:2011.13456; the limit of Ho et al. 2020.

    >>> VPLinear().alpha(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.0066])
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        check_positive("VPLinear", beta_min=self.beta_min, beta_max=self.beta_max)
        if self.beta_max < self.beta_min:
            raise ValueError(f"VPLinear: expected beta_max >= beta_min={self.beta_min}, got {self.beta_max}")

    def _integral(self, t: Tensor) -> Tensor:
        return self.beta_min * t + 0.5 * (self.beta_max - self.beta_min) * t**2

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-B(t) / 2)."""
        return (-0.5 * self._integral(t)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - exp(-B(t)))."""
        return _root(-torch.expm1(-self._integral(t)))

    def t_of(self, ratio: Tensor) -> Tensor:
        """The root of B(t) = log(1 + ratio^2)."""
        integral = torch.log1p(ratio.clamp(max=1e15) ** 2)
        root = (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * integral).sqrt()
        return (2 * integral / (self.beta_min + root)).clamp(max=1)

    def times(self, steps: int) -> Tensor:
        """Equal angles, see :func:`angle_times`."""
        return angle_times(self, steps)


@dataclass(frozen=True)
class VPCosine:
    """Variance-preserving, alpha^2 + sigma^2 = 1, with alpha close to a quarter of a cosine wave.

    alpha = cos(u) / cos(u_0), u(t) = (pi / 2) (t + s) / (1 + s), u_0 = u(0)

    At t = 1 the signal would vanish, and with it what a network that predicts the noise can say of the data. Times
    beyond ``t_max`` are therefore taken as ``t_max``, where alpha = 0.0016; it stands where the paper's own clipping of
    beta acts on a chain of 1000 steps, on its last.

    Source: Nichol and Dhariwal 2021, eq. 17, arXiv:2102.09672.

    >>> VPCosine().alpha(torch.tensor([0.0, 1.0]))
    tensor([1.0000, 0.0016])
    """

    s: float = 0.008
    t_max: float = 0.999

    def __post_init__(self):
        check_positive("VPCosine", s=self.s, t_max=self.t_max)
        if self.t_max > 1:
            raise ValueError(f"VPCosine: expected t_max <= 1, got {self.t_max}")

    @property
    def _start(self) -> float:
        return 0.5 * math.pi * self.s / (1 + self.s)

    def _angle(self, t: Tensor) -> Tensor:
        return 0.5 * math.pi * (t.clamp(max=self.t_max) + self.s) / (1 + self.s)

    def alpha(self, t: Tensor) -> Tensor:
        """cos(u) / cos(u_0); at ``t_max`` = 1 rounded up to 0."""
        return (self._angle(t).cos() / math.cos(self._start)).clamp(min=0)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(cos(u_0)^2 - cos(u)^2) / cos(u_0), without the cancellation."""
        u = self._angle(t)
        gone = 0.5 * math.pi * t.clamp(max=self.t_max) / (1 + self.s)
        return _root(gone.sin() * (u + self._start).sin()) / math.cos(self._start)

    def t_of(self, ratio: Tensor) -> Tensor:
        """From sin(u)^2 = (ratio^2 + sin(u_0)^2) / (ratio^2 + 1)."""
        tangent = (ratio.clamp(max=1e15) ** 2 + math.sin(self._start) ** 2).sqrt() / math.cos(self._start)
        return (tangent.atan() * (2 / math.pi) * (1 + self.s) - self.s).clamp(0, self.t_max)

    def times(self, steps: int) -> Tensor:
        """Equal angles, see :func:`angle_times`."""
        return angle_times(self, steps)


@dataclass(frozen=True)
class EDM:
    """Variance-exploding, alpha = 1, with noise levels spaced evenly in sigma^(1 / rho).

    sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho

    sigma(0) is ``sigma_min``, not 0: the least noise a network is asked to remove.

    Source: Karras et al. 2022, eq. 5 with t counted from the data, arXiv:2206.00364.

    >>> EDM().sigma(torch.tensor([0.0, 1.0]))
    tensor([2.0000e-03, 8.0000e+01])
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self):
        check_positive("EDM", sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho)
        if self.sigma_max <= self.sigma_min:
            raise ValueError(f"EDM: expected sigma_max > sigma_min={self.sigma_min}, got {self.sigma_max}")

    @property
    def _ends(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def alpha(self, t: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        """Linear in t, to the power rho."""
        low, high = self._ends
        return (low + t * (high - low)) ** self.rho

    def t_of(self, ratio: Tensor) -> Tensor:
        """The inverse of ``sigma``."""
        low, high = self._ends
        return ((ratio.clamp(self.sigma_min, self.sigma_max) ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)

    def times(self, steps: int) -> Tensor:
        """Equal steps in t from sigma_max to sigma_min, both evaluated: the paper's noise levels."""
        check_positive("EDM", steps=steps)
        return 1 - torch.arange(steps, dtype=torch.float64) / max(steps - 1, 1)


@dataclass(frozen=True)
class FlowMatching:
    """The straight line from data to noise: alpha = 1 - t, sigma = t.

    Source: Lipman et al. 2023, eq. 20 with sigma_min = 0 and time reversed, arXiv:2210.02747; Liu et al. 2023.

    >>> FlowMatching().alpha(torch.tensor([0.25]))
    tensor([0.7500])
    """

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """The time itself."""
        return t

    def t_of(self, ratio: Tensor) -> Tensor:
        """ratio / (1 + ratio)."""
        ratio = ratio.clamp(max=1e30)
        return ratio / (1 + ratio)

    def times(self, steps: int) -> Tensor:
        """Equal steps, see :func:`uniform_times`."""
        return uniform_times(self, steps)
