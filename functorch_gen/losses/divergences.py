"""Distances between distributions, in nats, summed over all axes but the first."""

import math

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_floating
from functorch_gen.losses.per_example import check_alike, check_broadcasts, in_float32, sum_per_example
from functorch_gen.typing import Number

__all__ = ["categorical_kl", "gaussian_kl", "jensen_shannon", "kl_div"]


@in_float32
def kl_div(log_probs: Tensor, targets: Tensor, *, log_target: bool = False) -> Tensor:
    """t (log t - log_probs), summed over the other axes: (b, ...), (b, ...) -> (b,).

    KL(t || p) for distributions over the other axes; a target of 0 adds 0. Equals ``torch.nn.functional.kl_div``: the
    mean is its ``reduction="batchmean"``.

    Args:
        log_target: whether the targets are logarithms of probabilities.
    Raises:
        TypeError: if the log-probabilities are not floating.
        ValueError: if the shapes differ.

    >>> kl_div(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.0, 1.0]]))
    tensor([0.6931])
    """
    check_alike("kl_div", log_probs=log_probs, targets=targets)
    if log_target:
        return sum_per_example(_relative_entropy(targets, log_probs))
    return sum_per_example(numerics.xlogy(targets, targets) - _product(targets, log_probs))


@in_float32
def categorical_kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p || q) = sum p (log p - log q), p, q = softmax over the last axis, summed: (b, ..., c) x 2 -> (b,).

    A class of probability 0 under p (logit -inf) adds 0; one that only q excludes makes it infinite.

    Raises:
        TypeError: if the logits are not floating.
        ValueError: if the shapes differ.

    >>> categorical_kl(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.0, 0.0]]))
    tensor([0.6931])
    """
    check_alike("categorical_kl", logits=logits, other_logits=other_logits)
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(other_logits, -1)
    return sum_per_example(_relative_entropy(log_p, log_q))


@in_float32
def jensen_shannon(logits: Tensor, other_logits: Tensor) -> Tensor:
    """(KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, p, q = softmax over the last axis: (b, ..., c) x 2 -> (b,).

    Symmetric, and at most log 2 for each distribution; summed over the axes between.

    Raises:
        TypeError: if the logits are not floating.
        ValueError: if the shapes differ.
    Source: Lin 1991, Divergence measures based on the Shannon entropy, eq. 4.1.

    >>> jensen_shannon(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    tensor([0.6931])
    """
    check_alike("jensen_shannon", logits=logits, other_logits=other_logits)
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(other_logits, -1)
    log_m = numerics.logaddexp(log_p, log_q) - math.log(2)
    return sum_per_example(0.5 * _relative_entropy(log_p, log_m) + 0.5 * _relative_entropy(log_q, log_m))


def _relative_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p = 0."""
    impossible = log_p == -math.inf
    difference = torch.where(impossible, 0.0, log_p) - torch.where(impossible, 0.0, log_q)
    return log_p.exp() * difference


def _product(probs: Tensor, log_q: Tensor) -> Tensor:
    """p log q with 0 * inf = 0."""
    return probs * torch.where((probs == 0) & log_q.isinf(), 0.0, log_q)


@in_float32
def gaussian_kl(
    mean: Tensor, log_var: Tensor, other_mean: Tensor | Number = 0.0, other_log_var: Tensor | Number = 0.0
) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(other_mean, exp(other_log_var))), diagonal, summed: (b, ...) x 4 -> (b,).

    Sum of (exp(r) - 1 - r + (mean - other_mean)^2 exp(-other_log_var)) / 2 with r = log_var - other_log_var. Without
    the others, the divergence from the standard normal distribution.

    Args:
        other_mean: broadcasts to ``mean``, as does ``other_log_var``.
    Raises:
        TypeError: if ``mean`` is not floating.
        ValueError: if a shape differs.
    Source: Kingma and Welling 2013, appendix B, arXiv:1312.6114.

    >>> gaussian_kl(torch.tensor([[1.0, 2.0]]), torch.zeros(1, 2))
    tensor([2.5000])
    """
    check_alike("gaussian_kl", mean=mean, log_var=log_var)
    check_floating(log_var, "gaussian_kl: log_var")
    check_broadcasts("gaussian_kl", mean, other_mean=other_mean, other_log_var=other_log_var)
    r = log_var - other_log_var
    precision = torch.exp(torch.zeros_like(r) - other_log_var)
    return sum_per_example(0.5 * (torch.expm1(r) - r + (mean - other_mean).square() * precision))
