"""What all samplers share: their arguments, the points they pass, and the loop from noise to data.

All integrate the same equation. Along the path of scales (alpha, sigma), with D the denoised estimate,

    dx = D dalpha + N dsigma, N = (x - alpha D) / sigma

holds for every schedule and every way of running through it (Song et al. 2021, eq. 13; Karras et al. 2022, eq. 4), and
neither end is singular: alpha may start from 0. Were D constant over a step, the step would be exactly

    x' = alpha' D + sigma' N,

which is :func:`euler`, and DDIM. Samplers of higher order take the same step with a better mean of D over it.

Every sampler evaluates at ``steps`` times and ends with the denoised estimate at the last of them, which is the Euler
step to sigma = 0. The steps are one :func:`scan`: a jitted sampler compiles its network once. Arguments they share:

    denoise: (x_t, t) -> estimate of x: (b, ...), (b,) -> (b, ...), as :func:`denoiser` makes it. It may give a pair,
        as :func:`denoiser_and_variance` does, whose second only :func:`sample_ddpm` reads.
    shape: of the samples, the batch first.
    steps: number of times, >= 1.
    times: the times, (steps,) and falling, or a function (schedule, steps) -> (steps,), as ``noise.angle_times``; by
        default the schedule's own (``schedule.times``), for samplers that step in log-SNR ``noise.rho_times``.
    x_t: the sample at the first time; by default sigma times a draw of noise. With ``times`` from t < 1 this repaints
        given data (Meng et al. 2022).
    dtype: of the samples; step sizes are computed in float64.
    return_path: return (samples, :class:`Path`).

They raise ``TypeError`` for a dtype that is not floating or steps that are no integer, ``ValueError`` for steps < 1 and
for shapes that do not fit.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from einops import repeat
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.diffusion.prediction import to_noise
from functorch_gen.noise import NoiseSchedule, log_snr
from functorch_gen.transforms.scan import scan
from functorch_gen.typing import Key, Tree

__all__ = [
    "Advance",
    "Denoise",
    "Path",
    "Point",
    "Run",
    "Samples",
    "Step",
    "Times",
    "begin",
    "euler",
    "march",
    "point_at",
    "without_memory",
]

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor | tuple[Tensor, Tensor]]
"""(x_t, t) -> estimate of x, or that and v: (b, ...), (b,) -> (b, ...)."""

Samples: TypeAlias = Any
"""Tensor (b, ...), or (Tensor, Path) with ``return_path``."""

Times: TypeAlias = Tensor | Callable[[NoiseSchedule, int], Tensor] | None
"""Times (steps,), a function of the schedule and the number of steps, or the sampler's default."""


class Path(NamedTuple):
    """What a sampler went through: at each time, where it was and what it took for the data."""

    t: Tensor  # (steps,) float64
    x_t: Tensor  # (steps, b, ...)
    x_hat: Tensor  # (steps, b, ...); the last are the samples


class Point(NamedTuple):
    """A time and the schedule there, float64; or several of them, stacked."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    log_ratio: Tensor  # log(alpha / sigma), half the log-SNR

    def noise(self, x_t: Tensor, x_hat: Tensor) -> Tensor:
        """The noise that ``x_hat`` leaves in ``x_t``."""
        return to_noise("x", x_hat, x_t, self.alpha, self.sigma)

    def part(self, which: int | slice | Tensor) -> "Point":
        """Some of the points."""
        return Point(*[x[which] for x in self])


class Step(NamedTuple):
    """The way from one point to the next."""

    index: Tensor  # () int64
    at: Point
    to: Point
    extra: Tree  # what the sampler computed for this step beforehand
    v: Tensor | None = None  # (b, ...) what the denoiser says of the variance, if it does


class Run(NamedTuple):
    """One call of a sampler."""

    schedule: NoiseSchedule
    denoise: Denoise
    key: Key
    points: Point  # (steps,)
    x_t: Tensor  # (b, ...), at the first point
    return_path: bool

    def estimate(self, at: Point, x_t: Tensor) -> tuple[Tensor, Tensor | None]:
        """The denoised estimate, and v where the denoiser gives one: (b, ...) -> (b, ...) each."""
        found = self.denoise(x_t, repeat(at.t.to(x_t.dtype), "-> b", b=x_t.shape[0]))
        x_hat, v = found if isinstance(found, tuple) else (found, None)
        if x_hat.shape != x_t.shape:
            raise ValueError(f"denoise: expected an estimate of shape {tuple(x_t.shape)}, got {tuple(x_hat.shape)}")
        return x_hat.to(x_t.dtype), v

    def evaluate(self, at: Point, x_t: Tensor) -> Tensor:
        """The denoised estimate: (b, ...) -> (b, ...)."""
        return self.estimate(at, x_t)[0]

    def draw(self, index: int | Tensor, x_t: Tensor, more: int = 0) -> Tensor:
        """Noise of the shape of ``x_t``, other for each index and each ``more``."""
        key = random.fold_in(self.key, index)
        return random.normal(random.fold_in(key, more) if more else key, x_t.shape, x_t.dtype)


Advance: TypeAlias = Callable[[Run, Step, Tensor, Tensor, Tree], tuple[Tensor, Tree]]
"""(run, step, x_t and x_hat at step.at, memory) -> (x_t at step.to, memory)."""


def point_at(schedule: NoiseSchedule, t: Tensor) -> Point:
    """The schedule at ``t``."""
    return Point(t, schedule.alpha(t), schedule.sigma(t), 0.5 * log_snr(schedule, t))


def euler(at: Point, to: Point, x_t: Tensor, x_hat: Tensor) -> Tensor:
    """x' = alpha' D + sigma' N: exact if ``x_hat`` is the mean of D over the step, weighted by alpha / sigma."""
    return to.alpha * x_hat + to.sigma * at.noise(x_t, x_hat)


def begin(
    name: str,
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    schedule: NoiseSchedule,
    steps: int,
    times: Times,
    x_t: Tensor | None,
    dtype: torch.dtype,
    return_path: bool,
) -> Run:
    """Checks the arguments that samplers share and draws the start."""
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"{name}: expected steps to be an integer, got {type(steps).__name__}")
    check_positive(name, steps=steps)
    if not dtype.is_floating_point:
        raise TypeError(f"{name}: dtype: expected a floating-point dtype, got {dtype}")
    if not shape:
        raise ValueError(f"{name}: shape: expected (b, ...), got {tuple(shape)}")
    if x_t is not None:
        check_floating(x_t, f"{name}: x_t")
        if tuple(x_t.shape) != tuple(shape):
            raise ValueError(f"{name}: x_t: expected shape {tuple(shape)}, got {tuple(x_t.shape)}")
    key_start, key_steps = random.split(key)
    points = Point(*[x.to(key.device) for x in point_at(schedule, _times(name, schedule, steps, times))])
    start = points.sigma[0] * random.normal(key_start, shape, dtype) if x_t is None else x_t.to(dtype)
    return Run(schedule, denoise, key_steps, points, start, return_path)


def _times(name: str, schedule: NoiseSchedule, steps: int, times: Times) -> Tensor:
    if times is None:
        times = schedule.times(steps)
    elif callable(times):
        times = times(schedule, steps)
    check_floating(times, f"{name}: times")
    check_shape(times, "steps", f"{name}: times", steps=steps)
    return times.to(torch.float64)


def march(run: Run, advance: Advance, memory: Tree = (), extra: Tree = ()) -> Samples:
    """Goes from point to point.

    Args:
        memory: what the sampler carries from step to step besides x_t, a tree of tensors.
        extra: tensors whose row i belongs to the step from point i.
    """
    points, x_t, steps = run.points, run.x_t, len(run.points.t)
    path: Any = ()

    def body(carry: tuple[Tensor, Tree], step: Step) -> tuple[tuple[Tensor, Tree], Tree]:
        x_t, memory = carry
        x_hat, v = run.estimate(step.at, x_t)
        moved = advance(run, step._replace(v=v), x_t, x_hat, memory)
        return moved, (x_t, x_hat) if run.return_path else ()

    if steps > 1:
        index = torch.arange(steps - 1, device=points.t.device)
        every = Step(index, points.part(slice(-1)), points.part(slice(1, None)), extra)
        (x_t, _), path = scan(body, (x_t, memory), every)
    x_hat = run.evaluate(points.part(-1), x_t)
    if not run.return_path:
        return x_hat
    before = path if steps > 1 else (x_t[None][:0], x_hat[None][:0])
    ends = zip(before, (x_t, x_hat), strict=True)
    return x_hat, Path(points.t, *[torch.cat([parts, end[None]]) for parts, end in ends])


def without_memory(step: Callable[[Run, Step, Tensor, Tensor], Tensor]) -> Advance:
    """The sampler whose steps are ``step(run, step, x_t, x_hat) -> x_t``."""
    return lambda run, here, x_t, x_hat, memory: (step(run, here, x_t, x_hat), memory)
