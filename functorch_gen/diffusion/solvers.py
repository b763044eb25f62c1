"""Samplers: from noise to data along the probability flow, or with fresh noise at every step.

All integrate the same equation. Along the path of scales (alpha, sigma), with D the denoised estimate,

    dx = D dalpha + N dsigma, N = (x - alpha D) / sigma

holds for every schedule and every way of running through it (Song et al. 2021, eq. 13; Karras et al. 2022, eq. 4), and
neither end is singular: alpha may start from 0. Its Euler step x' = alpha' D + sigma' N is DDIM.

Every sampler evaluates at ``steps`` times and ends with the denoised estimate at the last of them, which is the Euler
step to sigma = 0. Arguments they share:

    denoise: (x_t, t) -> estimate of x: (b, ...), (b,) -> (b, ...), as :func:`denoiser` makes it.
    shape: of the samples, the batch first.
    steps: number of times, >= 1.
    times: the times, (steps,) and falling, or a function (schedule, steps) -> (steps,), as ``noise.angle_times``; by
        default the schedule's own (``schedule.times``), for the multistep sampler ``noise.rho_times``.
    x_t: the sample at the first time; by default sigma times a draw of noise. With ``times`` from t < 1 this repaints
        given data (Meng et al. 2022).
    dtype: of the samples; step sizes are computed in float64.
    return_path: return (samples, :class:`Path`).

They raise ``TypeError`` for a dtype that is not floating or steps that are no integer, ``ValueError`` for steps < 1 and
for shapes that do not fit.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import repeat
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.diffusion.prediction import to_noise
from functorch_gen.noise import NoiseSchedule, log_snr, rho_times
from functorch_gen.typing import Key

__all__ = ["Path", "sample_ddim", "sample_ddpm", "sample_dpmpp_2m", "sample_euler", "sample_heun"]

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Samples: TypeAlias = Any
"""Tensor (b, ...), or (Tensor, Path) with ``return_path``."""
Times: TypeAlias = Tensor | Callable[[NoiseSchedule, int], Tensor] | None


class Path(NamedTuple):
    """What a sampler went through: at each time, where it was and what it took for the data."""

    t: Tensor  # (steps,) float64
    x_t: Tensor  # (steps, b, ...)
    x_hat: Tensor  # (steps, b, ...); the last are the samples


class _Run(NamedTuple):
    """What the steps of one run share; entry i belongs to evaluation i."""

    denoise: Denoise
    key: Key
    t: Tensor  # (steps,) float64
    alpha: Tensor  # (steps,) float64
    sigma: Tensor  # (steps,) float64
    log_ratio: Tensor  # (steps,) float64, log(alpha / sigma)

    def evaluate(self, i: int, x_t: Tensor) -> Tensor:
        """The denoised estimate at time i: (b, ...) -> (b, ...)."""
        x_hat = self.denoise(x_t, repeat(self.t[i].to(x_t.dtype), "-> b", b=x_t.shape[0]))
        if x_hat.shape != x_t.shape:
            raise ValueError(f"denoise: expected an estimate of shape {tuple(x_t.shape)}, got {tuple(x_hat.shape)}")
        return x_hat

    def noise(self, i: int, x_t: Tensor, x_hat: Tensor) -> Tensor:
        """The noise that ``x_hat`` leaves in ``x_t``."""
        return to_noise("x", x_hat, x_t, self.alpha[i], self.sigma[i])

    def euler(self, i: int, x_t: Tensor, x_hat: Tensor) -> Tensor:
        """x' = alpha' D + sigma' N."""
        return self.alpha[i + 1] * x_hat + self.sigma[i + 1] * self.noise(i, x_t, x_hat)


# (run, i, x_t, x_hat, x_hat of the evaluation before or None) -> x_t of time i + 1
_Step: TypeAlias = Callable[[_Run, int, Tensor, Tensor, Tensor | None], Tensor]


class _Options(NamedTuple):
    """The arguments that all samplers share."""

    schedule: NoiseSchedule
    steps: int
    times: Times
    x_t: Tensor | None
    dtype: torch.dtype
    return_path: bool


def _check(name: str, shape: Sequence[int], options: _Options) -> None:
    if isinstance(options.steps, bool) or not isinstance(options.steps, int):
        raise TypeError(f"{name}: expected steps to be an integer, got {type(options.steps).__name__}")
    check_positive(name, steps=options.steps)
    if not options.dtype.is_floating_point:
        raise TypeError(f"{name}: dtype: expected a floating-point dtype, got {options.dtype}")
    if not shape:
        raise ValueError(f"{name}: shape: expected (b, ...), got {tuple(shape)}")
    if options.x_t is not None:
        check_floating(options.x_t, f"{name}: x_t")
        if tuple(options.x_t.shape) != tuple(shape):
            raise ValueError(f"{name}: x_t: expected shape {tuple(shape)}, got {tuple(options.x_t.shape)}")


def _start(name: str, key: Key, denoise: Denoise, options: _Options, default: Times) -> _Run:
    schedule, steps = options.schedule, options.steps
    times = default if options.times is None else options.times
    if times is None:
        times = schedule.times(steps)
    elif not isinstance(times, Tensor):
        times = times(schedule, steps)
    check_floating(times, f"{name}: times")
    check_shape(times, "steps", f"{name}: times", steps=steps)
    t = times.to(torch.float64)
    scales = (t, schedule.alpha(t), schedule.sigma(t), 0.5 * log_snr(schedule, t))
    return _Run(denoise, key, *[scale.to(key.device) for scale in scales])


def _sample(
    name: str, step: _Step, key: Key, denoise: Denoise, shape: Sequence[int], options: _Options, default: Times = None
) -> Samples:
    _check(name, shape, options)
    key_start, key_steps = random.split(key)
    run = _start(name, key_steps, denoise, options, default)
    given = options.x_t
    x_t = run.sigma[0] * random.normal(key_start, shape, options.dtype) if given is None else given.to(options.dtype)
    before, x_hat = None, run.evaluate(0, x_t)
    path = [(x_t, x_hat)]
    for i in range(options.steps - 1):
        x_t = step(run, i, x_t, x_hat, before)
        before, x_hat = x_hat, run.evaluate(i + 1, x_t)
        path += [(x_t, x_hat)] if options.return_path else []
    return (x_hat, Path(run.t, *[torch.stack(parts) for parts in zip(*path)])) if options.return_path else x_hat


# Along the probability flow.


def _euler_step(run: _Run, i: int, x_t: Tensor, x_hat: Tensor, before: Tensor | None) -> Tensor:
    return run.euler(i, x_t, x_hat)


def _heun_step(run: _Run, i: int, x_t: Tensor, x_hat: Tensor, before: Tensor | None) -> Tensor:
    """The trapezoidal rule for x' - x = integral of D dalpha + N dsigma."""
    trial = run.euler(i, x_t, x_hat)
    x_next = run.evaluate(i + 1, trial)
    noise = 0.5 * (run.noise(i, x_t, x_hat) + run.noise(i + 1, trial, x_next))
    step_alpha, step_sigma = run.alpha[i + 1] - run.alpha[i], run.sigma[i + 1] - run.sigma[i]
    return x_t + step_alpha * 0.5 * (x_hat + x_next) + step_sigma * noise


def _multistep(run: _Run, i: int, x_t: Tensor, x_hat: Tensor, before: Tensor | None) -> Tensor:
    """DDIM with D extrapolated to the middle of the step, linearly in log(alpha / sigma)."""
    if before is None:
        return run.euler(i, x_t, x_hat)
    step, last = run.log_ratio[i + 1] - run.log_ratio[i], run.log_ratio[i] - run.log_ratio[i - 1]
    ratio = torch.where(last > 0, step / torch.where(last > 0, last, 1), 0)
    return run.euler(i, x_t, x_hat + 0.5 * ratio * (x_hat - before))


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
    Arguments: see :mod:`functorch_gen.diffusion.solvers`.

    >>> from functorch_gen.noise import EDM
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_euler(random.key(0), point, (1, 2), schedule=EDM(), steps=5)
    tensor([[3., 3.]])
    """
    options = _Options(schedule, steps, times, x_t, dtype, return_path)
    return _sample("sample_euler", _euler_step, key, denoise, shape, options)


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

    Its last step, to the data, is Euler's. Arguments: see :mod:`functorch_gen.diffusion.solvers`.

    Source: Karras et al. 2022, algorithm 1 (equal to it for :class:`EDM`), arXiv:2206.00364.

    >>> from functorch_gen.noise import EDM
    >>> denoise = lambda x_t, t: x_t / (1 + EDM().sigma(t)[:, None] ** 2)  # of N(0, 1)
    >>> sample_heun(random.key(0), denoise, (1000, 2), schedule=EDM(), steps=20).std()
    tensor(1.0383)
    """
    options = _Options(schedule, steps, times, x_t, dtype, return_path)
    return _sample("sample_heun", _heun_step, key, denoise, shape, options)


def sample_dpmpp_2m(
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
    """Samples by DPM-Solver++(2M): -> (b, ...). Second order; ``steps`` evaluations.

    The first step and the last, to the data, are of first order. By default it evaluates at ``noise.rho_times``: where
    a grid takes long steps in log-SNR, extrapolating in it goes wrong. Arguments: see
    :mod:`functorch_gen.diffusion.solvers`.

    Source: Lu et al. 2022, algorithm 2, arXiv:2211.01095.

    >>> from functorch_gen.noise import VPLinear
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_dpmpp_2m(random.key(0), point, (1, 2), schedule=VPLinear(), steps=5)
    tensor([[3., 3.]])
    """
    options = _Options(schedule, steps, times, x_t, dtype, return_path)
    return _sample("sample_dpmpp_2m", _multistep, key, denoise, shape, options, rho_times)


# With fresh noise.


def _ddim_step(eta: float, run: _Run, i: int, x_t: Tensor, x_hat: Tensor, before: Tensor | None) -> Tensor:
    """Euler's step with a part of the noise drawn anew."""
    kept = run.alpha[i] * run.sigma[i + 1] / (run.alpha[i + 1] * run.sigma[i])
    fresh = eta**2 * (1 - kept**2).clamp(min=0)  # part of the variance of the noise
    draw = random.normal(random.fold_in(run.key, i), x_t.shape, x_t.dtype)
    noise = (1 - fresh).sqrt() * run.noise(i, x_t, x_hat) + fresh.sqrt() * draw
    return run.alpha[i + 1] * x_hat + run.sigma[i + 1] * noise


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
        schedule, steps, times, x_t, dtype, return_path: see :mod:`functorch_gen.diffusion.solvers`.
    Raises:
        ValueError: if ``eta`` is not in [0, 1].
    Source: Song, Meng and Ermon 2021, eq. 12 and 16, arXiv:2010.02502, for any alpha and sigma.

    >>> from functorch_gen.noise import VPLinear
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_ddim(random.key(0), point, (1, 2), schedule=VPLinear(), steps=5, eta=0.5)
    tensor([[3., 3.]])
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"sample_ddim: expected eta in [0, 1], got {eta}")
    options = _Options(schedule, steps, times, x_t, dtype, return_path)
    step = _euler_step if eta == 0 else partial(_ddim_step, eta)
    return _sample("sample_ddim", step, key, denoise, shape, options)


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

    The variance is that of the posterior, the lower of the paper's two. Arguments: see
    :mod:`functorch_gen.diffusion.solvers`.

    Source: Ho et al. 2020, eq. 6 and 7, algorithm 2, arXiv:2006.11239, for any alpha and sigma.

    >>> from functorch_gen.noise import VPCosine
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_ddpm(random.key(0), point, (1, 2), schedule=VPCosine(), steps=5)
    tensor([[3., 3.]])
    """
    options = _Options(schedule, steps, times, x_t, dtype, return_path)
    return _sample("sample_ddpm", partial(_ddim_step, 1.0), key, denoise, shape, options)
