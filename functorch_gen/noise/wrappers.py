"""Schedules made of others: no signal left at the end, or more noise at every time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_positive
from functorch_gen.noise.schedule import NoiseSchedule
from functorch_gen.noise.schedules import EDM, FlowMatching, SubVP
from functorch_gen.noise.times import angle_times
from functorch_gen.transforms import stop_gradient

__all__ = ["Shifted", "ZeroTerminalSNR"]


@dataclass(frozen=True)
class ZeroTerminalSNR:
    """A variance-preserving schedule whose signal falls to 0: alpha is shifted and stretched, from 1 still.

    alpha' = (alpha - alpha(1)) / (1 - alpha(1)), sigma'^2 = 1 - alpha'^2

    A model trained on noise that still holds a trace of the data, and sampled from pure noise, gets the mean of images
    wrong: very dark ones come out grey. At t = 1 a network that predicts the noise says nothing: choose ``"v"``,
    ``"x"`` or ``"flow"``.

    Args:
        schedule: with alpha^2 + sigma^2 = 1.
    Raises:
        ValueError: if it is one of ours that keeps something else.
    Source: Lin et al. 2024, algorithm 1, arXiv:2305.08891.

    >>> from functorch_gen.noise import VPLinear
    >>> ZeroTerminalSNR(VPLinear()).alpha(torch.tensor([0.0, 1.0]))
    tensor([1., 0.])
    """

    schedule: NoiseSchedule

    def __post_init__(self):
        _refuse("ZeroTerminalSNR", self.schedule, SubVP, EDM, FlowMatching)

    def _scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha(t) of the schedule, and alpha(1): where t = 1 the same number, with the derivative of its own."""
        alpha, end = self.schedule.alpha(t), self.schedule.alpha(torch.ones_like(t))
        return alpha, torch.where(t < 1, end, stop_gradient(alpha))

    def alpha(self, t: Tensor) -> Tensor:
        """(alpha - alpha(1)) / (1 - alpha(1)); exactly 0 at t = 1."""
        alpha, end = self._scales(t)
        return ((alpha - end) / (1 - end)).clamp(min=0)

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt((1 - alpha') (1 + alpha')), 1 - alpha' from the schedule's sigma^2 = (1 - alpha) (1 + alpha)."""
        alpha, end = self._scales(t)
        missing = self.schedule.sigma(t) ** 2 / ((1 + alpha) * (1 - end))
        return numerics.sqrt(missing * (1 + (alpha - end) / (1 - end)))

    def t_of(self, ratio: Tensor) -> Tensor:
        """Where the schedule has alpha = alpha(1) + alpha' (1 - alpha(1)), alpha' = 1 / sqrt(1 + ratio^2)."""
        ratio = ratio.clamp(max=1e15)
        end = self.schedule.alpha(torch.ones_like(ratio))
        root = (1 + ratio**2).sqrt()
        missing = (1 - end) * ratio**2 / (root * (1 + root))  # 1 - alpha
        alpha = end + (1 - end) / root
        return self.schedule.t_of(numerics.sqrt(missing * (1 + alpha)) / alpha)

    def times(self, steps: int) -> Tensor:
        """Equal angles, see :func:`angle_times`."""
        return angle_times(self, steps)


@dataclass(frozen=True)
class Shifted:
    """A schedule with sigma / alpha ``factor`` times as large: log-SNR falls by 2 log(factor) at every time.

    Neighbouring pixels tell the same story, so a large image needs more noise to lose as much as a small one: to take a
    schedule from images of width w to width d, factor = d / w. Of a variance-preserving schedule the sum of squares
    stays 1; :class:`FlowMatching` stays a straight line and runs through it in the time
    factor t / (1 + (factor - 1) t), the shift of Stable Diffusion 3.

    Args:
        schedule: with alpha^2 + sigma^2 = 1, or :class:`FlowMatching`.
        factor: > 1 for more noise.
    Raises:
        ValueError: if ``factor`` is not > 0, or ``schedule`` is one of ours that keeps neither sum.
    Source: Hoogeboom et al. 2023, section 3.1, arXiv:2301.11093; Esser et al. 2024, eq. 23, arXiv:2403.03206.

    >>> Shifted(FlowMatching(), 3.0).sigma(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.0000, 0.7500, 1.0000])
    """

    schedule: NoiseSchedule
    factor: float

    def __post_init__(self):
        check_positive("Shifted", factor=self.factor)
        _refuse("Shifted", self.schedule, SubVP, EDM)

    @property
    def _straight(self) -> bool:
        """Whether the schedule keeps alpha + sigma = 1."""
        return isinstance(_innermost(self.schedule), FlowMatching)

    def _total(self, t: Tensor) -> Tensor:
        """alpha + factor sigma, or the root of the sum of squares: what both are divided by."""
        alpha, sigma = self.schedule.alpha(t), self.factor * self.schedule.sigma(t)
        return alpha + sigma if self._straight else (alpha**2 + sigma**2).sqrt()

    def alpha(self, t: Tensor) -> Tensor:
        """alpha of the schedule, divided by the total."""
        return self.schedule.alpha(t) / self._total(t)

    def sigma(self, t: Tensor) -> Tensor:
        """factor sigma of the schedule, divided by the total."""
        return self.factor * self.schedule.sigma(t) / self._total(t)

    def t_of(self, ratio: Tensor) -> Tensor:
        """The schedule's time of ratio / factor."""
        return self.schedule.t_of(ratio / self.factor)

    def times(self, steps: int) -> Tensor:
        """The schedule's own, so that the noise levels evaluated are shifted too."""
        return self.schedule.times(steps)


def _innermost(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule of a paper that others are made of."""
    return _innermost(schedule.schedule) if isinstance(schedule, Shifted | ZeroTerminalSNR) else schedule


def _refuse(name: str, schedule: NoiseSchedule, *kinds: type) -> None:
    """Refuses what is known not to be variance-preserving."""
    if isinstance(_innermost(schedule), kinds):
        raise ValueError(f"{name}: expected a schedule with alpha^2 + sigma^2 = 1, got {schedule}")
