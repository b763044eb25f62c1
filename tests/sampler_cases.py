"""What the tests of samplers run over: the samplers, schedules, and denoisers that are known exactly."""

import pytest
import torch

from functorch_gen import random
from functorch_gen.diffusion import (
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s,
    sample_dpmpp_3m,
    sample_edm,
    sample_euler,
    sample_heun,
    sample_predictor_corrector,
    sample_unipc,
)
from functorch_gen.exact import Gaussian
from functorch_gen.noise import EDM, FlowMatching, Shifted, SubVP, VPCosine, VPLinear, VPSigmoid, ZeroTerminalSNR

F64 = torch.float64
KEY = random.key(0)
SCHEDULES = [VPLinear(), VPCosine(), EDM(), FlowMatching()]
NEWER = [SubVP(), VPSigmoid(), ZeroTerminalSNR(VPLinear()), Shifted(VPCosine(), 2.0)]
DETERMINISTIC = [
    sample_ddim,
    sample_euler,
    sample_heun,
    sample_dpmpp_2s,
    sample_dpmpp_2m,
    sample_dpmpp_3m,
    sample_unipc,
]
DRAWING = [sample_ddpm, sample_dpmpp_2m_sde, sample_edm, sample_predictor_corrector]
SAMPLERS = [*DRAWING, *DETERMINISTIC]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda f: f.__name__)


def normal_data(mean: float, std: float, d: int = 3) -> Gaussian:
    return Gaussian(torch.full((d,), mean, dtype=F64), torch.tensor(std, dtype=F64))


def exact(data, schedule):
    return lambda x_t, t: data.denoise(x_t, schedule.alpha(t), schedule.sigma(t))


def curved(x_t, t):
    """A denoiser with nothing special about it."""
    return torch.sin(x_t) * (0.5 + t[:, None])


def scales(schedule, times):
    clean = torch.tensor([1.0, 0.0], dtype=F64)
    return torch.cat([schedule.alpha(times), clean[:1]]), torch.cat([schedule.sigma(times), clean[1:]])
