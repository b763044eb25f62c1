"""Variational autoencoders: bounds, likelihoods, discrete codes, and the geometry of the latent space."""

from functorch_gen.vae.elbo import Net, Posterior, elbo, iwae, log_prob, log_weights, posterior
from functorch_gen.vae.geometry import jacobian_spectrum, pullback_metric
from functorch_gen.vae.latent import interpolate, reconstruct, sample
from functorch_gen.vae.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    Gaussian,
    Likelihood,
    optimal_std,
)
from functorch_gen.vae.quantization import FSQ, VQ, Quantized, perplexity, straight_through

__all__ = [
    "FSQ",
    "VQ",
    "Bernoulli",
    "Categorical",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "Likelihood",
    "Net",
    "Posterior",
    "Quantized",
    "elbo",
    "interpolate",
    "iwae",
    "jacobian_spectrum",
    "log_prob",
    "log_weights",
    "optimal_std",
    "perplexity",
    "posterior",
    "pullback_metric",
    "reconstruct",
    "sample",
    "straight_through",
]
