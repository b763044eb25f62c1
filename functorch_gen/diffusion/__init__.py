"""Diffusion and flow models: predictions, one objective, samplers, guidance."""

from functorch_gen.diffusion.guidance import guide, guide_by_classifier, guide_network, interval_scale
from functorch_gen.diffusion.inverse import dps, mmps, pigdm, project
from functorch_gen.diffusion.likelihood import bits_per_dim, dequantize, log_prob
from functorch_gen.diffusion.multistep import sample_dpmpp_2m, sample_dpmpp_3m, sample_unipc
from functorch_gen.diffusion.objective import denoiser, loss, loss_at
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
from functorch_gen.diffusion.sampling import Path
from functorch_gen.diffusion.solvers import sample_dpmpp_2s, sample_euler, sample_heun
from functorch_gen.diffusion.stochastic import (
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m_sde,
    sample_edm,
    sample_predictor_corrector,
    sample_repaint,
)
from functorch_gen.diffusion.times import LogitNormalTime, LogNormalTime, StratifiedTime, TimeSampler, UniformTime
from functorch_gen.diffusion.variational import (
    Posterior,
    VariationalBound,
    decoder_nll,
    denoiser_and_variance,
    discretized_gaussian_nll,
    hybrid_loss,
    interpolate_variance,
    posterior,
    transition_kl,
    variational_bound,
)
from functorch_gen.diffusion.weightings import (
    EDMWeight,
    MinSNRWeight,
    P2Weight,
    Uncertainty,
    balance,
    likelihood_weight,
)

__all__ = [
    "EDMWeight",
    "LogNormalTime",
    "LogitNormalTime",
    "MinSNRWeight",
    "P2Weight",
    "Path",
    "Posterior",
    "Prediction",
    "StratifiedTime",
    "TimeSampler",
    "Uncertainty",
    "UniformTime",
    "VariationalBound",
    "as_prediction",
    "balance",
    "bits_per_dim",
    "convert",
    "decoder_nll",
    "denoiser",
    "denoiser_and_variance",
    "dequantize",
    "discretized_gaussian_nll",
    "dps",
    "guide",
    "guide_by_classifier",
    "guide_network",
    "hybrid_loss",
    "interpolate_variance",
    "interval_scale",
    "likelihood_weight",
    "log_prob",
    "loss",
    "loss_at",
    "mmps",
    "network_inputs",
    "output_scale",
    "pigdm",
    "posterior",
    "project",
    "sample_ddim",
    "sample_ddpm",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s",
    "sample_dpmpp_3m",
    "sample_edm",
    "sample_euler",
    "sample_heun",
    "sample_predictor_corrector",
    "sample_repaint",
    "sample_unipc",
    "target",
    "to_noise",
    "to_x",
    "transition_kl",
    "variational_bound",
]
