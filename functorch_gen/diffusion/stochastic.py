"""Samplers that draw fresh noise on the way; arguments: :mod:`functorch_gen.diffusion.sampling`."""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from functorch_gen.check import check_number, check_positive
from functorch_gen.diffusion.multistep import mean_weights, weighted_mean
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
from functorch_gen.diffusion.solvers import heun
from functorch_gen.diffusion.variational import interpolate_variance, posterior
from functorch_gen.noise import NoiseSchedule, rho_times
from functorch_gen.typing import Key, Tree

__all__ = [
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m_sde",
    "sample_edm",
    "sample_predictor_corrector",
    "sample_repaint",
]


def _renew(eta: float, run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
    """Euler's step with a part of the noise drawn anew; for ``eta`` = 1 a draw from q(x' | x_t, x = D)."""
    at, to = step.at, step.to
    if eta == 0:
        return euler(at, to, x_t, x_hat)
    before = to.alpha * at.sigma
    kept = torch.where(before > 0, at.alpha * to.sigma / torch.where(before > 0, before, 1), 1)
    fresh = eta**2 * (1 - kept**2).clamp(min=0)  # part of the variance of the noise
    noise = (1 - fresh).sqrt() * at.noise(x_t, x_hat) + fresh.sqrt() * run.draw(step.index, x_t)
    return to.alpha * x_hat + to.sigma * noise


def sample_ddim(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 0.0,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by DDIM: -> (b, ...). First order for ``eta`` = 0; ``steps`` evaluations.

    Args:
        eta: part of the posterior standard deviation that is drawn anew: 0 is the probability flow, 1 is ancestral.
        schedule, steps, times, x_t, dtype, return_path: see :mod:`functorch_gen.diffusion.sampling`.
    Raises:
        ValueError: if ``eta`` is not in [0, 1].
    Source: Song, Meng and Ermon 2021, eq. 12 and 16, arXiv:2010.02502, for any alpha and sigma.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPLinear()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_ddim(random.key(0), point, (1, 2), schedule=schedule, steps=5, eta=0.5)
    tensor([[3., 3.]])
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sample_ddim: expected eta in [0, 1], got {eta}")
    run = begin("sample_ddim", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    return march(run, without_memory(partial(_renew, eta)))


def sample_ddpm(
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
    """Samples ancestrally: -> (b, ...); each step draws from q(x_s | x_t, x = D). ``steps`` evaluations.

    The variance is that of the posterior, the lower of the paper's two, or the learned one if ``denoise`` gives
    (x_hat, v), as :func:`denoiser_and_variance` does. Arguments: see :mod:`functorch_gen.diffusion.sampling`.

    Source: Ho et al. 2020, eq. 6 and 7, algorithm 2, arXiv:2006.11239, for any alpha and sigma; Nichol and Dhariwal
    2021, eq. 15, arXiv:2102.09672.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPCosine()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_ddpm(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    run = begin("sample_ddpm", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    return march(run, without_memory(_ancestral))


def _ancestral(run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
    if step.v is None:
        return _renew(1.0, run, step, x_t, x_hat)
    mean, lower, upper = posterior(run.schedule, x_hat, x_t, step.to.t, step.at.t)
    return mean + (0.5 * interpolate_variance(step.v, lower, upper)).exp() * run.draw(step.index, x_t)


def sample_dpmpp_2m_sde(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    eta: float = 1.0,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by SDE-DPM-Solver++(2M): -> (b, ...). ``steps`` evaluations.

    The ancestral step of :func:`sample_ddpm` with D extrapolated as in :func:`sample_dpmpp_2m`, and at its times.

    Args:
        eta: part of the posterior standard deviation that is drawn anew: 1 is the paper's, 0 is
            :func:`sample_dpmpp_2m`.
        schedule, steps, times, x_t, dtype, return_path: see :mod:`functorch_gen.diffusion.sampling`.
    Raises:
        ValueError: if ``eta`` is not in [0, 1].
    Source: Lu et al. 2022, section 5 and appendix B, arXiv:2211.01095.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPCosine()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_dpmpp_2m_sde(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    check_number("sample_dpmpp_2m_sde", "eta", eta, low=0, high=1)
    times = rho_times if times is None else times
    run = begin("sample_dpmpp_2m_sde", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)

    def advance(run: Run, step: Step, x_t: Tensor, x_hat: Tensor, before: Tree) -> tuple[Tensor, Tree]:
        return _renew(eta, run, step, x_t, weighted_mean(step.extra, (x_hat, before))), x_hat

    return march(run, advance, torch.zeros_like(run.x_t), mean_weights(run.points.log_ratio, [-1]))


def _add_noise(at: Point, to: Point, x_t: Tensor, noise: Tensor) -> Tensor:
    """From x_t at ``at`` to a time with more noise, as the data would go; x_t itself if there is none to add."""
    hop = torch.where(at.alpha > 0, to.alpha / torch.where(at.alpha > 0, at.alpha, 1), 1)
    added = (to.sigma**2 - (hop * at.sigma) ** 2).clamp(min=0).sqrt()
    return torch.where(added > 0, hop * x_t + added * noise, x_t)


def sample_edm(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    churn: float = 40.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    noise_scale: float = 1.0,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by EDM's stochastic sampler: -> (b, ...). 2 ``steps`` - 1 evaluations.

    Before each of Heun's steps it adds noise until sigma / alpha has grown by a factor 1 + min(churn / steps,
    sqrt(2) - 1), or the schedule ends. It evaluates there, and its path has those times. Fresh noise undoes the errors
    of earlier steps.

    Args:
        churn: S_churn; 0 is :func:`sample_heun`.
        churn_range: (S_tmin, S_tmax): the sigma / alpha between which noise is added.
        noise_scale: S_noise, of the noise added; slightly above 1 it makes up for detail that the network removes.
        schedule, steps, times, x_t, dtype, return_path: see :mod:`functorch_gen.diffusion.sampling`.
    Raises:
        ValueError: if ``churn`` or ``noise_scale`` is negative.
    Source: Karras et al. 2022, algorithm 2, arXiv:2206.00364, of x_t / alpha for any alpha.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.EDM()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_edm(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    check_number("sample_edm", "churn", churn, low=0)
    check_number("sample_edm", "noise_scale", noise_scale, low=0)
    run = begin("sample_edm", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    grid = run.points
    ratio, gamma = (-grid.log_ratio).exp(), min(churn / steps, math.sqrt(2) - 1)
    chosen = (ratio >= churn_range[0]) & (ratio <= churn_range[1]) & (grid.sigma > 0) & (gamma > 0)
    noisier = point_at(schedule, torch.where(chosen, schedule.t_of(ratio * (1 + gamma)), grid.t))

    def advance(run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
        x_t = heun(run, step.at, step.extra, x_t, x_hat)
        return _add_noise(step.extra, step.to, x_t, noise_scale * run.draw(step.index + 1, x_t))

    x_t = _add_noise(grid.part(0), noisier.part(0), run.x_t, noise_scale * run.draw(0, run.x_t))
    run = run._replace(points=noisier, x_t=x_t)
    return march(run, without_memory(advance), extra=grid.part(slice(1, None)))


def sample_predictor_corrector(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    corrections: int = 1,
    snr: float = 0.16,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by predictor and corrector: -> (b, ...). (``corrections`` + 1) ``steps`` - ``corrections`` evaluations.

    After each ancestral step, which predicts, steps of Langevin dynamics at the same time correct the distribution:
    x + e score + sqrt(2 e) z with e = 2 (snr sigma)^2. The paper has e = 2 (snr |z| / |score|)^2, norms averaged over
    the batch; as score = -N / sigma, that is the same where the noise N in x_t is known. Here no example depends on
    another.

    Args:
        corrections: Langevin steps at each time, >= 0; 0 is :func:`sample_ddpm`.
        snr: step size, r in the paper; above 1 / sqrt(2) a step goes too far.
        schedule, steps, times, x_t, dtype, return_path: see :mod:`functorch_gen.diffusion.sampling`.
    Raises:
        ValueError: if ``corrections`` or ``snr`` is negative.
    Source: Song et al. 2021, algorithms 1 and 4 (appendix G), arXiv:2011.13456, for any alpha and sigma.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPCosine()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_predictor_corrector(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    check_number("sample_predictor_corrector", "corrections", corrections, low=0)
    check_number("sample_predictor_corrector", "snr", snr, low=0)
    run = begin("sample_predictor_corrector", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)

    def advance(run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
        x_t = _ancestral(run, step, x_t, x_hat)
        for n in range(corrections):
            noise, z = step.to.noise(x_t, run.evaluate(step.to, x_t)), run.draw(step.index, x_t, n + 1)
            x_t = x_t + 2 * snr * step.to.sigma * (z - snr * noise)
        return x_t

    return march(run, without_memory(advance))


def sample_repaint(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    resamples: int = 10,
    jump_length: int = 10,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples ancestrally, with repetitions: -> (b, ...). ``resamples`` (``steps`` - 1) + 1 evaluations.

    For denoisers that know a part of the data, as :func:`project` makes them. One ancestral step draws the rest before
    it has seen the part known; so the steps are taken in stretches of ``jump_length``, and after each try but the last
    noise is added until the stretch begins anew. Where a try ends, what it found is the next one's start, and the rest
    comes to match what is known.

    The known elements are drawn from q(x_s | x_t, x = y); the paper draws them from q(x_s | x = y). At each time they
    have the same distribution.

    Args:
        resamples: how often each stretch is taken; 1 is :func:`sample_ddpm`.
        jump_length: steps of a stretch; the last may be shorter.
        schedule, steps, times, x_t, dtype, return_path: see :mod:`functorch_gen.diffusion.sampling`.
    Raises:
        TypeError: if ``resamples`` or ``jump_length`` is no integer.
        ValueError: if it is < 1.
    Source: Lugmayr et al. 2022, algorithm 1, there with ``jump_length`` = 1, arXiv:2201.09865.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPCosine()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_repaint(random.key(0), point, (1, 2), schedule=schedule, steps=5, jump_length=2)
    tensor([[3., 3.]])
    """
    for argument, value in {"resamples": resamples, "jump_length": jump_length}.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"sample_repaint: expected {argument} to be an integer, got {type(value).__name__}")
    check_positive("sample_repaint", resamples=resamples, jump_length=jump_length)
    run = begin("sample_repaint", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    last = steps - 1
    stretches = [range(i, min(i + jump_length, last)) for i in range(0, last, jump_length)]
    taken = [i for stretch in stretches for _ in range(resamples) for i in stretch]
    at = torch.tensor([*taken, last], device=key.device)

    def advance(run: Run, step: Step, x_t: Tensor, x_hat: Tensor) -> Tensor:
        x_t = _ancestral(run, step._replace(to=step.extra), x_t, x_hat)
        return _add_noise(step.extra, step.to, x_t, run.draw(step.index, x_t, 1))

    landings = run.points.part(at[:-1] + 1)
    return march(run._replace(points=run.points.part(at)), without_memory(advance), extra=landings)
