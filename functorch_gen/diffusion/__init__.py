"""Diffusion and flow models: predictions, one objective, samplers, guidance."""

from functorch_gen.diffusion.guidance import guide, guide_network
from functorch_gen.diffusion.objective import (
    EDMWeight,
    LogitNormalTime,
    LogNormalTime,
    MinSNRWeight,
    StratifiedTime,
    TimeSampler,
    UniformTime,
    denoiser,
    loss,
    loss_at,
)
from functorch_gen.diffusion.prediction import (
    Prediction,
    as_prediction,
    convert,
    network_inputs,
    output_scale,
    target,
    to_noise,
    to_x,
)
from functorch_gen.diffusion.solvers import (
    Path,
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_euler,
    sample_heun,
)

__all__ = [
    "EDMWeight",
    "LogNormalTime",
    "LogitNormalTime",
    "MinSNRWeight",
    "Path",
    "Prediction",
    "StratifiedTime",
    "TimeSampler",
    "UniformTime",
    "as_prediction",
    "convert",
    "denoiser",
    "guide",
    "guide_network",
    "loss",
    "loss_at",
    "network_inputs",
    "output_scale",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_heun",
    "target",
    "to_noise",
    "to_x",
]
