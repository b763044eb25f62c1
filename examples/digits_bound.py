"""What a diffusion model of the digits is worth in nats: its variational bound on those it has not seen."""

import math
from functools import partial
from typing import Any

import digits
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import diffusion


def bound_nats(
    key: Tensor, params: Any, net: Any, schedule: fg.noise.NoiseSchedule, prediction: Any, draws: int = 10
) -> float:
    """Upper bound on the mean of -log p(digit, label) over the test digits, in a chain of 1000 steps.

    Of each digit, ``draws`` transitions drawn at random stand for the chain: the mean is the same. It ends where the
    noise is a sixth of the distance to the next grey level.
    """
    test = digits.load(digits.TEST)
    times = partial(fg.noise.rho_times, ratio_min=0.02)
    chain: Any = {"schedule": schedule, "steps": 1000, "times": times, "levels": 17, "every_step": False}

    def bound(key: Tensor, params: Any) -> Tensor:
        denoise = diffusion.denoiser(
            lambda x_t, condition: net(params, x_t, condition, test["label"]),
            schedule=schedule,
            prediction=prediction,
            clip=(-1.0, 1.0),
        )
        return diffusion.variational_bound(denoise, key, test["image"], **chain).total.mean()

    compiled = fg.jit(bound, backend="aten")
    bits = torch.stack([compiled(k, params) for k in fg.random.split(key, draws)]).mean()
    return float(bits) * 64 * math.log(2) + math.log(10)
