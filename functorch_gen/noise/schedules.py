"""The schedules of the papers: variance-preserving, variance-exploding, and the straight line."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_positive
from functorch_gen.noise.times import angle_times, uniform_times

__all__ = ["EDM", "FlowMatching", "SubVP", "VPCosine", "VPLinear", "VPSigmoid"]


# Of the schedules whose rate of noising is linear in t: B(t) = beta_min t + (beta_max - beta_min) t^2 / 2.


def _check_rates(name: str, beta_min: float, beta_max: float) -> None:
    check_positive(name, beta_min=beta_min, beta_max=beta_max)
    if beta_max < beta_min:
        raise ValueError(f"{name}: expected beta_max >= beta_min={beta_min}, got {beta_max}")


def _integral(t: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """B(t)."""
    return beta_min * t + 0.5 * (beta_max - beta_min) * t**2


def _time_of(integral: Tensor, beta_min: float, beta_max: float) -> Tensor:
    """The root of B(t) = ``integral``, at most 1."""
    root = (beta_min**2 + 2 * (beta_max - beta_min) * integral).sqrt()
    return (2 * integral / (beta_min + root)).clamp(max=1)


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
        _check_rates("VPLinear", self.beta_min, self.beta_max)

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-B(t) / 2)."""
        return (-0.5 * _integral(t, self.beta_min, self.beta_max)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - exp(-B(t)))."""
        return numerics.sqrt(-torch.expm1(-_integral(t, self.beta_min, self.beta_max)))

    def t_of(self, ratio: Tensor) -> Tensor:
        """The root of B(t) = log(1 + ratio^2)."""
        return _time_of(torch.log1p(ratio.clamp(max=1e15) ** 2), self.beta_min, self.beta_max)

    def times(self, steps: int) -> Tensor:
        """Equal angles, see :func:`angle_times`."""
        return angle_times(self, steps)


@dataclass(frozen=True)
class SubVP:
    """The signal of :class:`VPLinear` with less noise: sigma is its variance, 1 - alpha^2.

    alpha = exp(-B / 2), sigma = 1 - exp(-B), B(t) = beta_min t + (beta_max - beta_min) t^2 / 2

    Source: Song et al. 2021, eq. 29 (appendix B), arXiv:2011.13456.

    >>> SubVP().sigma(torch.tensor([0.0, 0.1, 1.0]))
    tensor([0.0000, 0.1037, 1.0000])
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        _check_rates("SubVP", self.beta_min, self.beta_max)

    def alpha(self, t: Tensor) -> Tensor:
        """exp(-B(t) / 2)."""
        return (-0.5 * _integral(t, self.beta_min, self.beta_max)).exp()

    def sigma(self, t: Tensor) -> Tensor:
        """1 - exp(-B(t))."""
        return -torch.expm1(-_integral(t, self.beta_min, self.beta_max))

    def t_of(self, ratio: Tensor) -> Tensor:
        """The root of B(t) = 2 asinh(ratio / 2), as sigma / alpha = 2 sinh(B / 2)."""
        return _time_of(2 * torch.asinh(0.5 * ratio.clamp(max=1e15)), self.beta_min, self.beta_max)

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
        return numerics.sqrt(gone.sin() * (u + self._start).sin()) / math.cos(self._start)

    def t_of(self, ratio: Tensor) -> Tensor:
        """From sin(u)^2 = (ratio^2 + sin(u_0)^2) / (ratio^2 + 1)."""
        tangent = (ratio.clamp(max=1e15) ** 2 + math.sin(self._start) ** 2).sqrt() / math.cos(self._start)
        return (tangent.atan() * (2 / math.pi) * (1 + self.s) - self.s).clamp(0, self.t_max)

    def times(self, steps: int) -> Tensor:
        """Equal angles, see :func:`angle_times`."""
        return angle_times(self, steps)


@dataclass(frozen=True)
class VPSigmoid:
    """Variance-preserving, alpha^2 + sigma^2 = 1, with alpha^2 a falling logistic curve stretched to [0, 1].

    alpha^2 = (sigmoid(u_1) - sigmoid(u)) / (sigmoid(u_1) - sigmoid(u_0)), u(t) = (start + t (end - start)) / tau

    alpha(1) = 0: the last of the signal goes, unlike in the papers' code, which stops at alpha^2 = 1e-9.

    Source: Jabri et al. 2022, arXiv:2212.11972; Chen 2023, algorithm 1, arXiv:2301.10972.

    >>> VPSigmoid().alpha(torch.tensor([0.0, 0.5, 1.0]))
    tensor([1.0000, 0.7071, 0.0000])
    """

    start: float = -3.0
    end: float = 3.0
    tau: float = 1.0

    def __post_init__(self):
        check_positive("VPSigmoid", tau=self.tau)
        if self.end <= self.start:
            raise ValueError(f"VPSigmoid: expected end > start={self.start}, got {self.end}")

    @property
    def _ends(self) -> tuple[float, float]:
        """Half of u at t = 0 and at t = 1."""
        return 0.5 * self.start / self.tau, 0.5 * self.end / self.tau

    # sigmoid(a) - sigmoid(b) = sinh((a - b) / 2) / (2 cosh(a / 2) cosh(b / 2)), so nothing cancels at either end.

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(sinh(h_1 - h) cosh(h_0) / (sinh(h_1 - h_0) cosh(h))), h = u / 2."""
        low, high = self._ends
        span = high - low
        scale = math.cosh(low) / math.sinh(span)
        return numerics.sqrt(((1 - t) * span).sinh() / (low + t * span).cosh() * scale)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(sinh(h - h_0) cosh(h_1) / (sinh(h_1 - h_0) cosh(h))), h = u / 2."""
        low, high = self._ends
        span = high - low
        scale = math.cosh(high) / math.sinh(span)
        return numerics.sqrt((t * span).sinh() / (low + t * span).cosh() * scale)

    def t_of(self, ratio: Tensor) -> Tensor:
        """exp(2 (h - h_0)) = (1 + q exp(d)) / (1 + q exp(-d)), q = ratio^2 cosh(h_0) / cosh(h_1), d = h_1 - h_0."""
        low, high = self._ends
        span = high - low
        q = ratio.clamp(max=1e15) ** 2 * (math.cosh(low) / math.cosh(high))
        gone = torch.log1p(q * math.exp(span)) - torch.log1p(q * math.exp(-span))
        return (gone / (2 * span)).clamp(max=1)

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
