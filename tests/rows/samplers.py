"""Rows of samplers, guidance and inverse problems beyond those of ``tests/zoo.py``, which has full rows of samplers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import diffusion, noise

COSINE, EDM = noise.VPCosine(), noise.EDM(sigma_max=5.0)


def network(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_t, t: torch.tanh(x_t @ w) * (1 + t[:, None])


def row(name: str, fun: Callable[..., Tensor], args: Callable[[Draw], tuple[Tensor, ...]], full: bool) -> Case:
    return from_draw(name, fun, args) if full else from_draw(name, fun, args, table=ALIKE)


def sampled(sample: Callable[..., Tensor], schedule: noise.NoiseSchedule, **options: Any) -> Case:
    def fun(w: Tensor, key: Tensor, x_t: Tensor) -> Tensor:
        start = {"schedule": schedule, "steps": 3, "x_t": x_t, "dtype": x_t.dtype}
        return sample(key, network(w), x_t.shape, **start, **options)

    return row(f"diffusion.{sample.__name__}", fun, lambda d: (d(2, 2), d.key(), d(3, 2)), full=False)


def conditional(name: str, method: Callable[..., Any], full: bool = False, **options: Any) -> Case:
    def fun(w: Tensor, a: Tensor, y: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return method(network(w), lambda x: x @ a, y, schedule=COSINE, **options)(x_t, t)

    def args(d: Draw) -> tuple[Tensor, ...]:
        return d(3, 3), d(3, 2), d(2, 2), d(2, 3), d.times(2)

    return row(f"diffusion.{name}", fun, args, full)


def rescaled(w: Tensor, u: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    scale = diffusion.interval_scale(2.5, 0.2, 0.95)
    return diffusion.guide(network(w), network(u), scale, rescale=0.7)(x_t, t)


def classified(w: Tensor, u: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    def log_prob(x_t: Tensor, t: Tensor) -> Tensor:
        return network(u)(x_t, t).log_softmax(1)[:, 0]

    return diffusion.guide_by_classifier(network(w), log_prob, schedule=COSINE, scale=1.5)(x_t, t)


def two_networks(d: Draw) -> tuple[Tensor, ...]:
    return d(3, 3), d(3, 3), d(2, 3), d.times(2)


CASES = [
    sampled(diffusion.sample_dpmpp_2s, COSINE),
    sampled(diffusion.sample_dpmpp_3m, COSINE),
    sampled(diffusion.sample_dpmpp_2m_sde, COSINE),
    sampled(diffusion.sample_unipc, COSINE),
    sampled(diffusion.sample_edm, EDM, churn=1.0),
    sampled(diffusion.sample_predictor_corrector, EDM),
    sampled(diffusion.sample_repaint, COSINE, resamples=2, jump_length=1),
    row("diffusion.guide rescaled", rescaled, two_networks, full=False),
    row("diffusion.guide_by_classifier", classified, two_networks, full=True),
    conditional("project", diffusion.project, noise_std=0.5, iterations=2),
    conditional("pigdm", diffusion.pigdm, full=True, noise_std=0.5, iterations=2),
    conditional("mmps", diffusion.mmps, noise_std=0.5, iterations=2),
    conditional("dps", diffusion.dps, std=0.5),
]
