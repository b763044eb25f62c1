"""Paths from data to noise, the velocity along them, and what a velocity says of data, noise and score.

A path is a schedule of :mod:`functorch_gen.noise`, x_t = alpha(t) x + sigma(t) noise, and its velocity for one pair of
data and noise is dalpha/dt x + dsigma/dt noise. A network learns the mean of it given x_t, which moves the density of
the data into that of the noise.

Time t is 0 at the data and 1 at the noise. Lipman et al., Liu et al. and Tong et al. count it from the noise: their
time is 1 - t, their velocity minus ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.diffusion import Prediction, target, to_noise, to_x
from functorch_gen.noise import NoiseSchedule, expand, rates, uniform_times
from functorch_gen.numerics import divide_no_nan

__all__ = [
    "ConditionalOT",
    "Trigonometric",
    "Velocity",
    "check_times",
    "check_velocity",
    "conditional_velocity",
    "convert",
]

Velocity: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> dx_t/dt: (b, ...), (b,) -> (b, ...)."""


@dataclass(frozen=True)
class ConditionalOT:
    """The straight line to noise from a Gaussian of width ``sigma_min`` about each example.

    alpha = 1 - t, sigma = sigma_min + (1 - sigma_min) t; with ``sigma_min`` = 0 it is ``noise.FlowMatching``.

    Source: Lipman et al. 2023, eq. 20 to 23 with time reversed, arXiv:2210.02747.

    >>> ConditionalOT(0.1).sigma(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.1000, 0.5500, 1.0000])
    """

    sigma_min: float = 1e-4

    def __post_init__(self):
        if not 0 <= self.sigma_min < 1:
            raise ValueError(f"ConditionalOT: expected 0 <= sigma_min < 1, got {self.sigma_min}")

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t."""
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        """From sigma_min to 1."""
        return self.sigma_min + (1 - self.sigma_min) * t

    def t_of(self, ratio: Tensor) -> Tensor:
        """(ratio - sigma_min) / (ratio + 1 - sigma_min)."""
        ratio = ratio.clamp(self.sigma_min, 1e30)
        return (ratio - self.sigma_min) / (ratio + 1 - self.sigma_min)

    def times(self, steps: int) -> Tensor:
        """Equal steps, see ``noise.uniform_times``."""
        return uniform_times(self, steps)


@dataclass(frozen=True)
class Trigonometric:
    """A quarter of a circle: alpha = cos(pi t / 2), sigma = sin(pi t / 2), at the constant speed pi / 2.

    Source: Albergo and Vanden-Eijnden 2023, eq. 5, arXiv:2209.15571; TrigFlow of Lu and Song 2024, section 3,
    arXiv:2410.11081, whose time is the angle.

    >>> Trigonometric().alpha(torch.tensor([0.0, 0.5]))
    tensor([1.0000, 0.7071])
    """

    def alpha(self, t: Tensor) -> Tensor:
        """cos(pi t / 2)."""
        return torch.cos(0.5 * math.pi * t)

    def sigma(self, t: Tensor) -> Tensor:
        """sin(pi t / 2)."""
        return torch.sin(0.5 * math.pi * t)

    def t_of(self, ratio: Tensor) -> Tensor:
        """The angle over pi / 2."""
        return ratio.atan() * (2 / math.pi)

    def times(self, steps: int) -> Tensor:
        """Equal steps, see ``noise.uniform_times``."""
        return uniform_times(self, steps)


def check_times(t: Tensor, x: Tensor, name: str) -> None:
    """Raises ``ValueError`` when ``t`` is not one time for each example of ``x``, (b,).

    >>> check_times(torch.ones(3), torch.ones(2, 3), "convert: t")
    Traceback (most recent call last):
        ...
    ValueError: convert: t: expected shape (b=2,), got (3,)
    """
    check_shape(t, "b", name, b=x.shape[0] if x.ndim else 1)


def check_velocity(velocity: Tensor, x_t: Tensor, name: str = "network") -> None:
    """Raises ``ValueError`` when what a network puts out has not the shape of ``x_t``.

    Args:
        name: where the velocity comes from, as the message shall name it.
    Raises:
        TypeError: if it is no tensor.

    >>> check_velocity(torch.ones(2), torch.ones(2, 3))
    Traceback (most recent call last):
        ...
    ValueError: network: expected a velocity of shape (2, 3), got (2,)
    """
    if not isinstance(velocity, Tensor):
        raise TypeError(f"{name}: expected a velocity of shape {tuple(x_t.shape)}, got {type(velocity).__name__}")
    if velocity.shape != x_t.shape:
        raise ValueError(f"{name}: expected a velocity of shape {tuple(x_t.shape)}, got {tuple(velocity.shape)}")


def _check_alike(x: Tensor, like: Tensor, name: str) -> None:
    if x.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(x.shape)}")


def conditional_velocity(schedule: NoiseSchedule, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """dalpha/dt x + dsigma/dt noise, the velocity of x_t for one pair: (b, ...), (b, ...), (b,) -> (b, ...).

    Raises:
        ValueError: if ``t`` is not (b,) or ``noise`` has not the shape of ``x``.

    >>> from functorch_gen.noise import FlowMatching
    >>> conditional_velocity(FlowMatching(), torch.ones(1, 2), torch.zeros(1, 2), torch.tensor([0.3]))
    tensor([[-1., -1.]])
    """
    check_times(t, x, "conditional_velocity: t")
    _check_alike(noise, x, "conditional_velocity: noise")
    dalpha, dsigma = rates(schedule, t)
    return expand(dalpha, x) * x + expand(dsigma, x) * noise


def convert(
    output: Tensor, x_t: Tensor, t: Tensor, *, schedule: NoiseSchedule, source: str | Prediction, to: str | Prediction
) -> Tensor:
    """What ``to`` is where ``source`` is ``output``: (b, ...), (b, ...), (b,) -> (b, ...).

    Each is a linear combination of data and noise, as is x_t = alpha x + sigma noise; the two are solved for data and
    noise, and these combined anew:

    ==============  ==================================================================
    ``"velocity"``  dalpha/dt x + dsigma/dt noise, the velocity of any schedule
    ``"score"``     -noise / sigma, the gradient of log p(x_t); given as 0 where sigma = 0
    others          the predictions of :class:`diffusion.Prediction`: eps, x, v, flow, edm
    ==============  ==================================================================

    Where a variance-preserving schedule starts (t = 0) its velocity is infinite, and the noise is given as 0.

    Raises:
        ValueError: if ``t`` is not (b,), ``output`` has not the shape of ``x_t``, or ``source`` or ``to`` is unknown.

    >>> from functorch_gen.noise import FlowMatching
    >>> x_t, t, schedule = torch.ones(1, 2), torch.tensor([0.25]), FlowMatching()
    >>> convert(torch.zeros(1, 2), x_t, t, schedule=schedule, source="velocity", to="x")
    tensor([[1., 1.]])
    >>> convert(torch.zeros(1, 2), x_t, t, schedule=schedule, source="velocity", to="score")
    tensor([[-4., -4.]])
    """
    check_times(t, x_t, "convert: t")
    _check_alike(output, x_t, "convert: output")
    x, noise = _data_and_noise(output, x_t, t, schedule, source)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if to == "velocity":
        return conditional_velocity(schedule, x, noise, t)
    if to == "score":
        return -divide_no_nan(noise, torch.zeros_like(noise) + expand(sigma, noise))
    return target(to, x, noise, alpha, sigma)


def _data_and_noise(
    output: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule, source: str | Prediction
) -> tuple[Tensor, Tensor]:
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    if source == "velocity":
        return _solve(output, x_t, (alpha, sigma), rates(schedule, t))
    if source == "score":
        source, output = "eps", -expand(sigma, output) * output
    return to_x(source, output, x_t, alpha, sigma), to_noise(source, output, x_t, alpha, sigma)


def _solve(
    velocity: Tensor, x_t: Tensor, scales: tuple[Tensor, Tensor], rates: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """x and noise of alpha x + sigma noise = x_t and dalpha x + dsigma noise = velocity, by Cramer's rule."""
    alpha, sigma, dalpha, dsigma = (rearrange(a, f"b -> b {'1 ' * (x_t.ndim - 1)}") for a in (*scales, *rates))
    det = alpha * dsigma - sigma * dalpha
    singular = det == 0
    det = torch.where(singular, 1.0, det)
    x = torch.where(singular, x_t, (dsigma * x_t - sigma * velocity) / det)
    return x, torch.where(singular, 0.0, (alpha * velocity - dalpha * x_t) / det)
