"""Losses of a choice among classes: cross entropy, negative log-likelihood, focal.

Classes stand on axis 1, as in torch; further axes are positions of the example (pixels, tokens), whose losses are
averaged. Ignored positions count as 0, and weights only multiply: torch's ``reduction="mean"`` divides by the weights
of the labels that are not ignored, ``loss.sum() / weight[labels].sum()`` where there is one position.
"""

import math

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_number
from functorch_gen.losses.per_example import (
    along_classes,
    check_alike,
    check_classes,
    check_weight,
    in_float32,
    mean_per_example,
)
from functorch_gen.typing import Number

__all__ = ["cross_entropy", "focal_loss", "nll_loss"]


@in_float32
def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-sum_c w_c t_c log softmax(logits)_c, averaged over the positions: (b, c, ...), (b, ...) or (b, c, ...) -> (b,).

    t is the one-hot of integer targets, or the targets themselves where they are floating; smoothed, it is
    (1 - label_smoothing) t + label_smoothing / c. A class of probability 0 (logit -inf) that has target 0 adds 0.
    Equals ``torch.nn.functional.cross_entropy(reduction="none")``, averaged over the positions.

    Args:
        targets: labels (b, ...), integers; or probabilities (b, c, ...).
        weight: of the classes, (c,).
        ignore_index: the label of positions that count as 0.
    Raises:
        TypeError: if the logits are not floating, or the labels no integers.
        ValueError: if a shape differs, or ``label_smoothing`` is outside [0, 1].

    >>> cross_entropy(torch.tensor([[0.0, 0.0], [0.0, 1e4]]), torch.tensor([1, 0]))
    tensor([6.9315e-01, 1.0000e+04])
    """
    check_number("cross_entropy", "label_smoothing", label_smoothing, low=0, high=1)
    soft = isinstance(targets, Tensor) and targets.is_floating_point()
    if soft:
        check_alike("cross_entropy", logits=logits, targets=targets)
        if logits.ndim < 2:
            raise ValueError(f"cross_entropy: logits: expected shape (b, c, ...), got {tuple(logits.shape)}")
        check_weight("cross_entropy", weight, logits.shape[1])
    else:
        check_classes("cross_entropy", targets, weight, logits=logits)
    log_probs = torch.log_softmax(logits, 1)
    flat = label_smoothing / max(logits.shape[1], 1)
    if soft:
        return mean_per_example(-_expected((1 - label_smoothing) * targets + flat, log_probs, weight))
    loss = (1 - label_smoothing) * _picked(log_probs, targets, weight, ignore_index)
    if label_smoothing:
        of_flat = -_expected(torch.full_like(log_probs, flat), log_probs, weight)
        loss = loss + torch.where(targets.long() == ignore_index, 0.0, of_flat)
    return mean_per_example(loss)


@in_float32
def nll_loss(log_probs: Tensor, labels: Tensor, *, weight: Tensor | None = None, ignore_index: int = -100) -> Tensor:
    """-w_y log_probs_y, averaged over the positions: (b, c, ...), (b, ...) -> (b,).

    Equals ``torch.nn.functional.nll_loss(reduction="none")``, averaged over the positions.

    Args:
        weight: of the classes, (c,).
        ignore_index: the label of positions that count as 0.
    Raises:
        TypeError: if the log-probabilities are not floating, or the labels no integers.
        ValueError: if a shape differs.

    >>> nll_loss(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([1]))
    tensor([0.2877])
    """
    check_classes("nll_loss", labels, weight, log_probs=log_probs)
    return mean_per_example(_picked(log_probs, labels, weight, ignore_index))


@in_float32
def focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gamma: Number = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """-w_y (1 - p_y)^gamma log p_y, p = softmax(logits), averaged over the positions: (b, c, ...), (b, ...) -> (b,).

    The power is taken in the log domain, so derivatives are finite where p_y is 1 in floating point.

    Args:
        gamma: 0 is :func:`cross_entropy`; the larger, the less well-classified examples count.
        weight: of the classes, (c,); the paper's alpha.
        ignore_index: the label of positions that count as 0.
    Raises:
        TypeError: if the logits are not floating, or the labels no integers.
        ValueError: if a shape differs, or ``gamma`` < 0.
    Source: Lin et al. 2017, eq. 5, arXiv:1708.02002.

    >>> focal_loss(torch.tensor([[0.0, 0.0], [2.0, 0.0]]), torch.tensor([1, 0]))
    tensor([0.1733, 0.0018])
    """
    check_number("focal_loss", "gamma", gamma, low=0)
    classes = check_classes("focal_loss", labels, weight, logits=logits)
    is_label = labels.unsqueeze(1) == along_classes(torch.arange(classes, device=logits.device), logits)
    others = torch.where(is_label, -math.inf, logits)
    log_rest = numerics.logsumexp(others, 1) - numerics.logsumexp(logits, 1)  # log(1 - p_y)
    nll = _picked(torch.log_softmax(logits, 1), labels, weight, ignore_index)
    return mean_per_example(torch.exp(gamma * log_rest) * nll)


def _picked(log_probs: Tensor, labels: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """-w_y log_probs_y, 0 where y is ignored: (b, c, ...), (b, ...) -> (b, ...)."""
    weighted = log_probs if weight is None else along_classes(weight, log_probs) * log_probs
    labels = labels.long()
    ignored = labels == ignore_index
    index = torch.where(ignored, 0, labels).unsqueeze(1)
    return torch.where(ignored, 0.0, -weighted.gather(1, index).squeeze(1))


def _expected(probs: Tensor, log_probs: Tensor, weight: Tensor | None) -> Tensor:
    """sum_c w_c p_c log_probs_c with 0 * inf = 0: (b, c, ...), (b, c, ...) -> (b, ...)."""
    weighted = probs if weight is None else along_classes(weight, probs) * probs
    impossible = (weighted == 0) & log_probs.isinf()
    return (weighted * torch.where(impossible, 0.0, log_probs)).sum(1)
