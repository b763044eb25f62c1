"""Rows of ordinary differential equations and of the densities along them; a full row of each kind."""

from functools import partial

import torch
from torch import Tensor
from zoo_case import ALIKE, Draw, from_draw

from functorch_gen import diffusion, noise, ode


def pull(w: Tensor):
    """A field that leans on a tensor it closes over."""
    return lambda y, t: torch.tanh(y @ w) - t * y


def solve(w: Tensor, y: Tensor, times: Tensor, **options) -> Tensor:
    return ode.solve(pull(w), y, times, **options)


def adaptive(w: Tensor, y: Tensor, end: Tensor) -> Tensor:
    return ode.solve_adaptive(pull(w), y, 0.0, end, rtol=1e-12, atol=1e-12)


def divergence(w: Tensor, x: Tensor) -> Tensor:
    return ode.divergence(lambda x: torch.tanh(x @ w), x)


def hutchinson(key: Tensor, w: Tensor, x: Tensor) -> Tensor:
    return ode.hutchinson_divergence(key, lambda x: torch.tanh(x @ w), x)


def log_prob(w: Tensor, x: Tensor, times: Tensor, key: Tensor | None = None) -> Tensor:
    velocity = lambda x, t: torch.tanh(x @ w) - t[:, None] * x
    return ode.log_prob(velocity, x, times, lambda x: -(x**2).sum(1), key=key, method="heun")


def diffusion_log_prob(w: Tensor, x: Tensor) -> Tensor:
    denoise = lambda x_t, t: torch.tanh(x_t @ w) * (1 - t)[:, None]
    return diffusion.log_prob(denoise, x, schedule=noise.FlowMatching(), steps=2, method="heun")


def dequantize(key: Tensor, y: Tensor) -> Tensor:
    return diffusion.dequantize(key, y, levels=4, dtype=torch.float64)


def times(d: Draw) -> Tensor:
    return torch.linspace(0.0, 1.0, 3, dtype=torch.float64) + 0.1 * d(3)


CASES = [
    from_draw("ode.solve", partial(solve, method="heun"), lambda d: (d(2, 2), d(2, 2), times(d))),
    from_draw("ode.solve path", partial(solve, return_path=True), lambda d: (d(2, 2), d(2), times(d)), table=ALIKE),
    from_draw("ode.solve_adaptive", adaptive, lambda d: (d(2, 2), d(2), d.times()), table="tests/test_ode.py has them"),
    from_draw("ode.divergence", divergence, lambda d: (d(2, 2), d(2, 2))),
    from_draw("ode.hutchinson_divergence", hutchinson, lambda d: (d.key(), d(2, 2), d(2, 2)), table=ALIKE),
    from_draw("ode.log_prob", log_prob, lambda d: (d(2, 2), d(2, 2), times(d)), table=ALIKE),
    from_draw("ode.log_prob by probes", log_prob, lambda d: (d(2, 2), d(2, 2), times(d), d.key()), table=ALIKE),
    from_draw("diffusion.log_prob", diffusion_log_prob, lambda d: (d(2, 2), d(2, 2)), table=ALIKE),
    from_draw(
        "diffusion.dequantize",
        dequantize,
        lambda d: (d.key(), d.labels(4, 2, 3)),
        table=ALIKE,
        dtype="the dtype is an argument",
    ),
    from_draw("diffusion.bits_per_dim", lambda x: diffusion.bits_per_dim(x, 3), lambda d: (d(2),), table=ALIKE),
]
