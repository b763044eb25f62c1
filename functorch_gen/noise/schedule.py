"""What a schedule is, and what follows from any: x_t = alpha(t) x + sigma(t) noise, data at t = 0, noise at t = 1.

A schedule is a frozen dataclass of numbers with four methods: ``alpha``, ``sigma``, the inverse ``t_of`` of
sigma / alpha, and the ``times`` at which a sampler evaluates by default. Everything else follows from these:
:func:`mix`, :func:`log_snr`, :func:`rates`. Any object with the four methods will do.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from functorch_gen.check import check_floating, check_shape
from functorch_gen.transforms import jvp
from functorch_gen.typing import Number

__all__ = ["NoiseSchedule", "expand", "log_snr", "mix", "rates"]


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

    >>> from functorch_gen.noise import FlowMatching
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

    >>> from functorch_gen.noise import FlowMatching
    >>> log_snr(FlowMatching(), torch.tensor([0.0, 0.5, 1.0])).isfinite().all()
    tensor(True)
    """
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    tiny = torch.finfo(alpha.dtype).tiny
    return 2 * (alpha.clamp(min=tiny).log() - sigma.clamp(min=tiny).log())


def rates(schedule: NoiseSchedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(d alpha / dt, d sigma / dt), each of the shape of ``t``, by forward differentiation.

    Where a variance-preserving schedule starts (t = 0), d sigma / dt diverges; there it is given as 0.

    >>> from functorch_gen.noise import FlowMatching
    >>> rates(FlowMatching(), torch.tensor([0.3]))
    (tensor([-1.]), tensor([1.]))
    """
    one = torch.ones_like(t)
    return jvp(schedule.alpha, (t,), (one,))[1], jvp(schedule.sigma, (t,), (one,))[1]
