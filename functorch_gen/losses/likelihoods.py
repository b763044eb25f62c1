"""Negative log-likelihoods of a whole example, in nats: summed over all axes but the first."""

import math

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_floating, check_positive
from functorch_gen.losses.per_example import check_alike, check_integers, in_float32, sum_per_example

__all__ = ["bernoulli_nll", "categorical_nll", "discretized_logistic_mixture_nll"]


@in_float32
def bernoulli_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-t log p - (1 - t) log(1 - p) with p = sigmoid(logits), summed over the other axes: (b, ...), (b, ...) -> (b,).

    Args:
        targets: 0 or 1, or in between.
    Raises:
        TypeError: if the logits are not floating.
        ValueError: if the shapes differ.

    >>> bernoulli_nll(torch.tensor([[0.0, 0.0]]), torch.tensor([[0, 1]]))
    tensor([1.3863])
    """
    check_alike("bernoulli_nll", logits=logits, targets=targets)
    return sum_per_example((1 - targets) * logits + numerics.softplus(-logits))


@in_float32
def categorical_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)_y over the last axis, summed over the others: (b, ..., c), (b, ...) -> (b,).

    Raises:
        TypeError: if the logits are not floating, or the labels no integers.
        ValueError: if the shapes differ.

    >>> categorical_nll(torch.zeros(1, 3, 2), torch.tensor([[0, 1, 0]]))
    tensor([2.0794])
    """
    check_floating(logits, "categorical_nll: logits")
    if logits.ndim < 2:
        raise ValueError(f"categorical_nll: logits: expected shape (b, ..., c), got {tuple(logits.shape)}")
    check_integers("categorical_nll: labels", labels, tuple(logits.shape[:-1]))
    log_probs = torch.log_softmax(logits, -1)
    return sum_per_example(-log_probs.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1))


@in_float32
def discretized_logistic_mixture_nll(params: Tensor, targets: Tensor, *, levels: int = 256) -> Tensor:
    """-log of a mixture of m logistics cut into levels, summed over pixels: (b, k, ...), (b, c, ...) -> (b,).

    A level y stands at x = 2 y / (levels - 1) - 1 and has the mass of the bin of half width h = 1 / (levels - 1)
    around it, the first and the last level that of the tails:

        P(x | mu, s) = sigmoid((x + h - mu) / s) - sigmoid((x - h - mu) / s)

    The channels of a pixel share the component; the mean of channel i is mu_i + sum_{j < i} tanh(a_ij) x_j. The
    difference is taken in the log domain, exact where PixelCNN++ falls back on the density. Over all levels of all
    channels of a pixel the probabilities sum to 1.

    Args:
        params: k = m (1 + 2 c + c (c - 1) / 2) channels, in this order: m logits of the components; means, c blocks
            of m; log s, c blocks of m (raised to -7, as in PixelCNN++); a_10, a_20, a_21, ..., blocks of m.
        targets: integers in [0, levels).
    Raises:
        TypeError: if the parameters are not floating, or the targets no integers.
        ValueError: if the shapes differ, k is no multiple of the channels a component needs, or ``levels`` < 2.
    Source: Salimans et al. 2017, eq. 2 and 3, arXiv:1701.05517.

    >>> params = torch.zeros(1, 10, 1)  # one component for three channels: means 0, scales 1
    >>> discretized_logistic_mixture_nll(params, torch.tensor([[[0], [128], [255]]]))
    tensor([8.8552])
    """
    m = _count_components(params, targets, levels)
    c = targets.shape[1]
    logits, means, log_scales, couplings = params.split([m, c * m, c * m, c * (c - 1) // 2 * m], 1)
    x = rearrange(2 * targets.to(params.dtype) / (levels - 1) - 1, "b c ... -> b c 1 ...")
    means = _coupled_means(rearrange(means, "b (c m) ... -> b c m ...", c=c), torch.tanh(couplings), x)
    log_scales = rearrange(log_scales, "b (c m) ... -> b c m ...", c=c).clamp(min=-7.0)
    of_channels = _log_mass(x, means, log_scales, targets.unsqueeze(2), levels)  # b c m ...
    log_probs = numerics.logsumexp(torch.log_softmax(logits, 1) + of_channels.sum(1), 1)
    return sum_per_example(-log_probs)


def _count_components(params: Tensor, targets: Tensor, levels: int) -> int:
    name = "discretized_logistic_mixture_nll"
    check_positive(name, levels=levels - 1)
    check_floating(params, f"{name}: params")
    if params.ndim < 2:
        raise ValueError(f"{name}: params: expected shape (b, k, ...), got {tuple(params.shape)}")
    channels = targets.shape[1] if getattr(targets, "ndim", 0) > 1 else 1
    check_integers(f"{name}: targets", targets, (params.shape[0], channels, *params.shape[2:]))
    needed = 1 + 2 * channels + channels * (channels - 1) // 2
    found = params.shape[1]
    if found == 0 or found % needed:
        raise ValueError(f"{name}: params: expected a multiple of {needed} channels, for c = {channels}, got {found}")
    return found // needed


def _coupled_means(means: Tensor, couplings: Tensor, x: Tensor) -> Tensor:
    """mu_i + sum_{j < i} a_ij x_j: (b, c, m, ...), (b, c (c - 1) / 2 m, ...), (b, c, 1, ...) -> (b, c, m, ...)."""
    m = means.shape[2]
    blocks = iter(couplings.split(m, 1)) if couplings.shape[1] else iter(())
    shifted = []
    for i in range(means.shape[1]):
        mean = means[:, i]
        for j in range(i):
            mean = mean + next(blocks) * x[:, j]
        shifted.append(mean)
    return torch.stack(shifted, 1)


def _log_mass(x: Tensor, mean: Tensor, log_scale: Tensor, level: Tensor, levels: int) -> Tensor:
    """log of the mass of a bin.

    sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)); an edge takes one of the three factors.
    """
    half = 1 / (levels - 1)
    precision = torch.exp(-log_scale)
    upper, lower = precision * (x - mean + half), precision * (x - mean - half)
    log_width = math.log(2 * half) - log_scale
    wide = log_width > -40  # else log(1 - exp(-w)) is log w to rounding
    log_factor = numerics.safe_where(wide, lambda u: numerics.log1mexp(u.exp()), log_width, otherwise=log_width)
    first, last = level == 0, level == levels - 1
    mass = torch.where(last, 0.0, numerics.log_sigmoid(upper)) + torch.where(first, 0.0, numerics.log_sigmoid(-lower))
    return mass + torch.where(first | last, 0.0, log_factor)
