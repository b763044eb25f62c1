"""Losses of yes-or-no answers: binary cross entropy, focal, soft margin, Dice."""

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_number, check_shape
from functorch_gen.losses.per_example import (
    check_alike,
    check_broadcasts,
    check_weight,
    in_float32,
    mean_per_example,
)
from functorch_gen.transforms import custom_jvp
from functorch_gen.typing import Number

__all__ = [
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "dice_loss",
    "multilabel_soft_margin_loss",
    "sigmoid_focal_loss",
    "soft_margin_loss",
]


@in_float32
def binary_cross_entropy(probs: Tensor, targets: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """-w (t log p + (1 - t) log(1 - p)), averaged over the other axes: (b, ...), (b, ...) -> (b,).

    Logarithms are at least -100, and the slope (p - t) / (p (1 - p)) has a denominator of at least 1e-12, so all is
    finite at p = 0 and 1. Equals ``torch.nn.functional.binary_cross_entropy``, gradients there included.

    Args:
        weight: broadcasts to ``probs``.
    Raises:
        TypeError: if the probabilities are not floating.
        ValueError: if the shapes differ.

    >>> binary_cross_entropy(torch.tensor([0.5, 0.0]), torch.tensor([1.0, 1.0]))
    tensor([  0.6931, 100.0000])
    """
    check_alike("binary_cross_entropy", probs=probs, targets=targets)
    check_broadcasts("binary_cross_entropy", probs, weight=weight)
    targets = targets.to(torch.promote_types(probs.dtype, targets.dtype))
    return mean_per_example(_weighed(weight, _cross_entropy(probs, targets)))


_LEAST_VARIANCE = 9.999999960041972e-13  # 1e-12 in float32, as torch has it


def _logarithms(p: Tensor) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p), at least -100."""
    yes = numerics.safe_where(p > 0, torch.log, p, otherwise=-100.0)
    no = numerics.safe_where(p < 1, lambda p: torch.log1p(-p), p, otherwise=-100.0, fill=0.0)
    return yes.clamp(min=-100.0), no.clamp(min=-100.0)


@custom_jvp
def _cross_entropy(p: Tensor, t: Tensor) -> Tensor:
    yes, no = _logarithms(p)
    return -(t * yes + (1 - t) * no)


@_cross_entropy.defjvp
def _cross_entropy_jvp(primals: tuple[Tensor, Tensor], tangents: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    p, t = primals
    yes, no = _logarithms(p)
    slope = (p - t) / (p * (1 - p)).clamp(min=_LEAST_VARIANCE)
    return _cross_entropy(p, t), slope * tangents[0] + (no - yes) * tangents[1]


@in_float32
def binary_cross_entropy_with_logits(
    logits: Tensor, targets: Tensor, *, weight: Tensor | None = None, pos_weight: Tensor | None = None
) -> Tensor:
    """-w (c t log p + (1 - t) log(1 - p)), p = sigmoid(logits), averaged over the other axes: (b, ...) x 2 -> (b,).

    Equals ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Args:
        weight: w, broadcasts to ``logits``.
        pos_weight: c, the weight of positive answers; broadcasts to ``logits``.
    Raises:
        TypeError: if the logits are not floating.
        ValueError: if the shapes differ.

    >>> binary_cross_entropy_with_logits(torch.tensor([0.0, -1e4]), torch.tensor([1.0, 1.0]))
    tensor([6.9315e-01, 1.0000e+04])
    """
    check_alike("binary_cross_entropy_with_logits", logits=logits, targets=targets)
    check_broadcasts("binary_cross_entropy_with_logits", logits, weight=weight, pos_weight=pos_weight)
    return mean_per_example(_weighed(weight, _of_logits(logits, targets, pos_weight)))


def _of_logits(logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    positive = 1 if pos_weight is None else 1 + (pos_weight - 1) * targets
    return (1 - targets) * logits + positive * numerics.softplus(-logits)


def _weighed(weight: Tensor | None, loss: Tensor) -> Tensor:
    return loss if weight is None else weight * loss


def multilabel_soft_margin_loss(logits: Tensor, targets: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """:func:`binary_cross_entropy_with_logits` of c labels that do not exclude each other: (b, c), (b, c) -> (b,).

    Equals ``torch.nn.functional.multilabel_soft_margin_loss``.

    Args:
        weight: of the labels, (c,).
    Raises:
        TypeError: if the logits are not floating.
        ValueError: if a shape differs.

    >>> multilabel_soft_margin_loss(torch.tensor([[9.0, -9.0, 0.0]]), torch.tensor([[1.0, 0.0, 1.0]]))
    tensor([0.2311])
    """
    classes = check_shape(logits, "b c", "multilabel_soft_margin_loss: logits")["c"]
    check_alike("multilabel_soft_margin_loss", logits=logits, targets=targets)
    check_weight("multilabel_soft_margin_loss", weight, classes)
    return binary_cross_entropy_with_logits(logits, targets, weight=weight)


@in_float32
def soft_margin_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """log(1 + exp(-y f)) for y = -1 or 1, averaged over the other axes: (b, ...), (b, ...) -> (b,).

    Equals ``torch.nn.functional.soft_margin_loss``, but does not overflow.

    Raises:
        TypeError: if the scores are not floating.
        ValueError: if the shapes differ.

    >>> soft_margin_loss(torch.tensor([0.0, 1e4]), torch.tensor([1.0, -1.0]))
    tensor([6.9315e-01, 1.0000e+04])
    """
    check_alike("soft_margin_loss", scores=scores, targets=targets)
    return mean_per_example(numerics.softplus(-targets * scores))


@in_float32
def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, alpha: Number | None = None, gamma: Number = 2.0) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log p_t, averaged over the other axes: (b, ...), (b, ...) -> (b,).

    p_t = t p + (1 - t) (1 - p) with p = sigmoid(logits), alpha_t = t alpha + (1 - t) (1 - alpha); between the targets 0
    and 1, log p_t is the cross entropy. The power is taken in the log domain, so derivatives in the logits are finite
    where p_t is 1 in floating point. Equals ``optax.sigmoid_focal_loss``.

    Args:
        alpha: weight of the positive answers, in [0, 1]; None for no weights.
        gamma: the larger, the less well-classified examples count.
    Raises:
        TypeError: if the logits are not floating.
        ValueError: if the shapes differ, ``alpha`` is outside [0, 1] or ``gamma`` < 0.
    Source: Lin et al. 2017, eq. 5, arXiv:1708.02002.

    >>> sigmoid_focal_loss(torch.tensor([0.0, 1e4]), torch.tensor([1.0, 1.0]), alpha=0.25)
    tensor([0.0433, 0.0000])
    """
    check_alike("sigmoid_focal_loss", logits=logits, targets=targets)
    check_number("sigmoid_focal_loss", "gamma", gamma, low=0)
    if alpha is not None:
        check_number("sigmoid_focal_loss", "alpha", alpha, low=0, high=1)
    t = targets.to(torch.promote_types(logits.dtype, targets.dtype))
    no = numerics.log_sigmoid(logits) + numerics.safe_where(
        t < 1, lambda t: torch.log1p(-t), t, otherwise=-torch.inf, fill=0.0
    )
    yes = numerics.log_sigmoid(-logits) + numerics.safe_where(t > 0, torch.log, t, otherwise=-torch.inf)
    factor = torch.exp(gamma * numerics.logsumexp(torch.stack([no, yes]), 0))  # (1 - p_t)^gamma
    weight = None if alpha is None else alpha * t + (1 - alpha) * (1 - t)
    return mean_per_example(_weighed(weight, factor * _of_logits(logits, t)))


@in_float32
def dice_loss(probs: Tensor, targets: Tensor, *, smooth: Number = 0.0, per_class: bool = False) -> Tensor:
    """1 - (2 sum p t + smooth) / (sum p^2 + sum t^2 + smooth), sums over an example: (b, ...), (b, ...) -> (b,).

    0 / 0, of two empty masks, counts as no overlap, with derivatives 0.

    Args:
        smooth: above 0, empty masks attract, and two of them have loss 0.
        per_class: sums over the pixels of each class, (b, c, ...), and averages the classes.
    Raises:
        TypeError: if the probabilities are not floating.
        ValueError: if the shapes differ, or ``smooth`` < 0.
    Source: Milletari et al. 2016, section 3, arXiv:1606.04797.

    >>> dice_loss(torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
    tensor([0.3333])
    """
    check_alike("dice_loss", probs=probs, targets=targets)
    check_number("dice_loss", "smooth", smooth, low=0)
    axes = tuple(range(2 if per_class else 1, probs.ndim))
    if not axes:
        raise ValueError(f"dice_loss: probs: expected axes to sum over, got shape {tuple(probs.shape)}")
    overlap = 2 * (probs * targets).sum(axes) + smooth
    total = (probs * probs + targets * targets).sum(axes) + smooth
    return mean_per_example(1 - numerics.divide_no_nan(overlap, total))
