"""Losses: batch axis first, one value for each example, (b,); ``.mean()`` is the loss of the batch.

Those with torch's or optax's name average over the other axes; log-likelihoods and divergences sum over them: their
first lines say so. All are finite, with two derivatives, at large logits, ties and zeros; 16-bit inputs are computed
in float32 and rounded once.
"""

from functorch_gen.losses.binary import (
    binary_cross_entropy,
    binary_cross_entropy_with_logits,
    dice_loss,
    multilabel_soft_margin_loss,
    sigmoid_focal_loss,
    soft_margin_loss,
)
from functorch_gen.losses.categorical import cross_entropy, focal_loss, nll_loss
from functorch_gen.losses.divergences import categorical_kl, gaussian_kl, jensen_shannon, kl_div
from functorch_gen.losses.embeddings import (
    cosine_distance,
    cosine_embedding_loss,
    info_nce,
    ntxent,
    triplet_margin_loss,
    triplet_margin_with_distance_loss,
)
from functorch_gen.losses.likelihoods import bernoulli_nll, categorical_nll, discretized_logistic_mixture_nll
from functorch_gen.losses.margins import (
    hinge_embedding_loss,
    hinge_loss,
    margin_ranking_loss,
    multi_margin_loss,
    multiclass_hinge_loss,
    multilabel_margin_loss,
)
from functorch_gen.losses.perceptual import perceptual_loss
from functorch_gen.losses.regression import (
    gaussian_nll_loss,
    huber_loss,
    l1_loss,
    log_cosh,
    mse_loss,
    poisson_nll_loss,
    smooth_l1_loss,
)
from functorch_gen.losses.sequence import ctc_loss

__all__ = [
    "bernoulli_nll",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "categorical_kl",
    "categorical_nll",
    "cosine_distance",
    "cosine_embedding_loss",
    "cross_entropy",
    "ctc_loss",
    "dice_loss",
    "discretized_logistic_mixture_nll",
    "focal_loss",
    "gaussian_kl",
    "gaussian_nll_loss",
    "hinge_embedding_loss",
    "hinge_loss",
    "huber_loss",
    "info_nce",
    "jensen_shannon",
    "kl_div",
    "l1_loss",
    "log_cosh",
    "margin_ranking_loss",
    "mse_loss",
    "multi_margin_loss",
    "multiclass_hinge_loss",
    "multilabel_margin_loss",
    "multilabel_soft_margin_loss",
    "nll_loss",
    "ntxent",
    "perceptual_loss",
    "poisson_nll_loss",
    "sigmoid_focal_loss",
    "smooth_l1_loss",
    "soft_margin_loss",
    "triplet_margin_loss",
    "triplet_margin_with_distance_loss",
]
