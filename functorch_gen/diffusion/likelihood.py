"""Likelihoods by the probability flow: the density of what a diffusion or flow model samples, exact or estimated.

Divided by hypot(alpha, sigma), every schedule is the same rotation from data to noise. With the angle
theta = atan(sigma / alpha), D the denoised estimate and N the noise it leaves,

    z = cos(theta) x + sin(theta) noise,    dz/dtheta = cos(theta) N - sin(theta) D = (cos(theta) z - D) / sin(theta)

is the probability flow (Salimans and Ho 2022, appendix D: the "v" prediction), smooth for all schedules and at both
ends: neither alpha = 0 nor d sigma / dt = infinity is seen.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from functorch_gen import numerics, ode, random
from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.diffusion.sampling import Times
from functorch_gen.losses.per_example import check_alike, sum_per_example
from functorch_gen.noise import NoiseSchedule, expand, rho_times
from functorch_gen.typing import Key

__all__ = ["bits_per_dim", "dequantize", "log_prob"]

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> estimate of x: (b, ...), (b,) -> (b, ...)."""


def log_prob(
    denoise: Denoise,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = None,
    key: Key | None = None,
    num_probes: int = 1,
    probe: str = "rademacher",
    method: str = "rk4",
    return_latent: bool = False,
) -> Any:
    """Log-density of the samples that the probability flow makes of noise N(0, sigma(1)^2): (b, ...) -> (b,), in nats.

    The flow ends where the noise is least, at the last of ``times``: what is measured is the density of data with that
    much noise left in it, x + (sigma / alpha) noise. :func:`functorch_gen.ode.log_prob` follows it from x to the noise.

    Args:
        denoise: (x_t, t) -> estimate of x, as :func:`denoiser` makes it.
        steps: number of steps, each of as many evaluations as ``method`` has.
        times: (steps + 1,) and falling from 1, or a function (schedule, number) -> (number,), by default steps even in
            (sigma / alpha)^(1/7) from 0.002 on; ``functools.partial(rho_times, ratio_min=...)`` leaves more noise,
            a last time of 0 none.
        key: None: the exact divergence, which takes as many derivatives as x has elements; else Hutchinson's estimate.
        num_probes, probe: see :func:`functorch_gen.ode.hutchinson_divergence`.
        method: see :func:`functorch_gen.ode.solve`.
        return_latent: return (log_prob, x_t at the first time), from which the samplers lead back to x.
    Raises:
        TypeError: if ``x`` or the times are not floating.
        ValueError: if ``steps`` < 1, ``times`` has another number, or the estimate another shape than ``x``; as
            :func:`functorch_gen.ode.log_prob`.
    Source: Song et al. 2021, eq. 39 and 40 (appendix D.2), arXiv:2011.13456, for any alpha and sigma.

    >>> from functorch_gen.noise import FlowMatching
    >>> schedule = FlowMatching()
    >>> def denoise(x_t, t):  # of data N(0, 1)
    ...     alpha, sigma = expand(schedule.alpha(t), x_t), expand(schedule.sigma(t), x_t)
    ...     return alpha * x_t / (alpha**2 + sigma**2)
    >>> log_prob(denoise, torch.zeros(1, 2), schedule=schedule, steps=20)  # -log(2 pi)
    tensor([-1.8379])
    """
    check_floating(x, "log_prob: x")
    check_positive("log_prob", steps=steps)
    given = times if isinstance(times, Tensor) else (times or rho_times)(schedule, steps + 1)
    check_floating(given, "log_prob: times")
    check_shape(given, "n", "log_prob: times", n=steps + 1)
    t = given.to(x.device, torch.float64).flip(0)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    angle = torch.atan2(sigma, alpha)

    def velocity(z: Tensor, angle: Tensor) -> Tensor:
        cos, sin = angle.cos(), angle.sin()
        t = schedule.t_of(sin / cos.clamp(min=1e-30))
        size = torch.hypot(schedule.alpha(t), schedule.sigma(t))
        x_hat = denoise(expand(size, z) * z, t)
        check_alike("log_prob", x=z, denoise=x_hat)
        sin = sin.reshape(-1, *[1] * (z.ndim - 1))
        return numerics.divide_no_nan(expand(cos, z) * z - x_hat, sin)  # without noise, D = z

    start, end = angle[0].cos().to(x.dtype), angle[-1].sin().to(x.dtype)
    options: Any = {"num_probes": num_probes, "probe": probe, "method": method, "return_latent": True}
    found, z = ode.log_prob(velocity, start * x, angle, lambda z: _normal(z, end), key=key, **options)
    found = found + math.prod(x.shape[1:]) * start.log()
    return (found, torch.hypot(alpha[-1], sigma[-1]).to(x.dtype) * z) if return_latent else found


def _normal(x: Tensor, std: Tensor) -> Tensor:
    """Log-density of N(0, std^2) in every element: (b, ...) -> (b,)."""
    return -sum_per_example(0.5 * (x / std) ** 2 + std.log() + 0.5 * math.log(2 * math.pi))


def dequantize(key: Key, y: Tensor, *, levels: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """Levels 0 .. ``levels`` - 1 as numbers drawn from their bins of [-1, 1]: x = 2 (y + u) / levels - 1, u in [0, 1).

    A density of x bounds the probability of y: log P(y) >= E_u[log p(x)] + d log(2 / levels).

    Raises:
        ValueError: if ``levels`` < 1.
    Source: Theis et al. 2016, section 3.1, arXiv:1511.01844.

    >>> dequantize(random.key(0), torch.tensor([[0, 1]]), levels=2).sign()
    tensor([[-1.,  1.]])
    """
    check_positive("dequantize", levels=levels)
    return 2 * (y + random.uniform(key, y.shape, dtype)) / levels - 1


def bits_per_dim(log_prob: Tensor, dim: int, *, levels: int | None = 256) -> Tensor:
    """-log2 of a likelihood per dimension, of the shape of ``log_prob``.

    Args:
        log_prob: in nats; of data in [-1, 1] that :func:`dequantize` made of ``levels`` levels.
        dim: number of elements of an example.
        levels: None: the likelihood is one of discrete data, or a density to be taken as it is.
    Raises:
        ValueError: if ``dim`` or ``levels`` < 1.
    Source: Theis et al. 2016, section 3.1, arXiv:1511.01844.

    >>> bits_per_dim(torch.tensor([3 * math.log(0.5)]), 3)  # uniform on [-1, 1]^3: 8 bits
    tensor([8.])
    """
    check_positive("bits_per_dim", dim=dim)
    bits = -log_prob / (dim * math.log(2))
    if levels is None:
        return bits
    check_positive("bits_per_dim", levels=levels)
    return bits + math.log2(levels / 2)
