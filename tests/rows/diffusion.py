"""Rows of the training side of diffusion: schedules, weights of noise levels, transitions and the variational bound."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from zoo_case import ALIKE, Case, from_draw

from functorch_gen import diffusion, noise
from functorch_gen.typing import Tree

COSINE = noise.VPCosine()


def scheduled(name: str, schedule: noise.NoiseSchedule, **skip: str) -> Case:
    def fun(x: Tensor, draw: Tensor, t: Tensor) -> Tree:
        return noise.mix(schedule, x, draw, t), noise.log_snr(schedule, t), noise.rates(schedule, t), schedule.t_of(t)

    return from_draw(f"noise.{name}", fun, lambda d: (d(2, 3), d(2, 3), d.times(2)), **skip)


def network(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_t, t: torch.tanh(x_t @ w) * (1 + t[:, None])


def weighted(name: str, weighting: Any, **skip: str) -> Case:
    def fun(w: Tensor, x: Tensor, draw: Tensor, t: Tensor) -> Tensor:
        return diffusion.loss_at(network(w), x, draw, t, schedule=COSINE, weighting=weighting)

    return from_draw(f"diffusion.loss_at {name}", fun, lambda d: (d(3, 3), d(2, 3), d(2, 3), d.times(2)), **skip)


def uncertain(params: Tree, w: Tensor, x: Tensor, draw: Tensor, t: Tensor) -> Tensor:
    layer = diffusion.Uncertainty(4)
    return diffusion.loss_at(network(w), x, draw, t, schedule=COSINE, uncertainty=lambda level: layer(params, level))


S, T = torch.tensor([0.3, 0.5], dtype=torch.float64), torch.tensor([0.4, 0.9], dtype=torch.float64)


def transition(x_hat: Tensor, v: Tensor, x: Tensor, x_t: Tensor) -> Tensor:
    return diffusion.transition_kl(COSINE, (x_hat, v), x, x_t, S.to(x), T.to(x))


def bound(w: Tensor, key: Tensor, x: Tensor) -> Tree:
    denoise = diffusion.denoiser(network(w), schedule=COSINE)
    options: dict[str, Any] = {"schedule": COSINE, "steps": 3, "levels": None}
    every = diffusion.variational_bound(denoise, key, x, **options)
    return every, diffusion.variational_bound(denoise, key, x, every_step=False, **options).total


def hybrid(w: Tensor, key: Tensor, x: Tensor) -> Tensor:
    return diffusion.hybrid_loss(network(w), key, x, schedule=COSINE, steps=4, levels=None)


def estimate(w: Tensor, x_t: Tensor, t: Tensor) -> Tree:
    return diffusion.denoiser_and_variance(network(w), schedule=COSINE, prediction="v")(x_t, t)


def levels_like(x: Tensor) -> Tensor:
    return torch.tensor([-1.0, 0.0, 1.0], dtype=x.dtype).expand(x.shape)


CASES = [
    scheduled("ZeroTerminalSNR", noise.ZeroTerminalSNR(noise.VPLinear()), table=ALIKE),
    scheduled("SubVP", noise.SubVP(), table=ALIKE),
    scheduled("VPSigmoid", noise.VPSigmoid(), table=ALIKE),
    scheduled("Shifted", noise.Shifted(COSINE, 2.0), table=ALIKE),
    scheduled("Shifted FlowMatching", noise.Shifted(noise.FlowMatching(), 2.0), table=ALIKE),
    weighted("p2", "p2", table=ALIKE),
    weighted("likelihood", "likelihood", table=ALIKE),
    from_draw(
        "diffusion.Uncertainty",
        uncertain,
        lambda d: ({"linear": {"weight": d(1, 4), "bias": d(1)}}, d(3, 3), d(2, 3), d(2, 3), d.times(2)),
        table=ALIKE,
    ),
    from_draw("diffusion.P2Weight", diffusion.P2Weight(0.5, 2.0), lambda d: (d(3),), table=ALIKE),
    from_draw("diffusion.balance", diffusion.balance, lambda d: (d.times(3), d(3)), table=ALIKE),
    from_draw(
        "diffusion.likelihood_weight",
        lambda t: diffusion.likelihood_weight(COSINE, t),
        lambda d: (d.times(3),),
        table=ALIKE,
    ),
    from_draw(
        "diffusion.posterior",
        lambda x, x_t: diffusion.posterior(COSINE, x, x_t, S.to(x), T.to(x)),
        lambda d: (d(2, 3), d(2, 3)),
        table=ALIKE,
    ),
    from_draw(
        "diffusion.interpolate_variance",
        diffusion.interpolate_variance,
        lambda d: (d(2, 3), d.times(2, 1), 1 + d.times(2, 1)),
        table=ALIKE,
    ),
    from_draw("diffusion.transition_kl", transition, lambda d: (d(2, 3), d(2, 3), d(2, 3), d(2, 3)), table=ALIKE),
    from_draw(
        "diffusion.discretized_gaussian_nll",
        lambda mean, log_var: diffusion.discretized_gaussian_nll(mean, log_var, levels_like(mean), levels=3),
        lambda d: (d(2, 3), d(2, 3)),
    ),
    from_draw(
        "diffusion.decoder_nll",
        lambda x_hat, t: diffusion.decoder_nll(COSINE, x_hat, levels_like(x_hat), t, levels=3),
        lambda d: (d(2, 3), d.times(2)),
        table=ALIKE,
    ),
    from_draw("diffusion.variational_bound", bound, lambda d: (d(2, 2), d.key(), d(2, 2)), table=ALIKE),
    from_draw(
        "diffusion.hybrid_loss",
        hybrid,
        lambda d: (d(2, 4), d.key(), d(3, 2)),
        derivatives="its bound holds the estimate of x constant",
    ),
    from_draw("diffusion.denoiser_and_variance", estimate, lambda d: (d(2, 4), d(3, 2), d.times(3)), table=ALIKE),
]
