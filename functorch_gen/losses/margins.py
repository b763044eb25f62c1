"""Losses that vanish beyond a margin. At a kink the derivative is one of the slopes beside it, that of torch."""

import torch
from torch import Tensor

from functorch_gen.check import check_choice, check_floating, check_number, check_shape
from functorch_gen.losses.per_example import (
    check_alike,
    check_classes,
    check_integers,
    in_float32,
    mean_per_example,
)
from functorch_gen.typing import Number

__all__ = [
    "hinge_embedding_loss",
    "hinge_loss",
    "margin_ranking_loss",
    "multi_margin_loss",
    "multiclass_hinge_loss",
    "multilabel_margin_loss",
]


@in_float32
def hinge_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """max(0, 1 - y f) for y = -1 or 1, averaged over the other axes: (b, ...), (b, ...) -> (b,).

    Equals ``optax.hinge_loss``.

    Raises:
        TypeError: if the scores are not floating.
        ValueError: if the shapes differ.

    >>> hinge_loss(torch.tensor([0.5, 0.5]), torch.tensor([1.0, -1.0]))
    tensor([0.5000, 1.5000])
    """
    check_alike("hinge_loss", scores=scores, targets=targets)
    return mean_per_example((1 - targets * scores).clamp(min=0.0))


@in_float32
def multiclass_hinge_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """max_j (f_j + [j != y]) - f_y: (b, c), (b,) -> (b,).

    Equals ``optax.losses.multiclass_hinge_loss``. At ties of the maximum the gradient is shared.

    Raises:
        TypeError: if the scores are not floating, or the labels no integers.
        ValueError: if the shapes differ.
    Source: Crammer and Singer 2001, On the algorithmic implementation of multiclass kernel-based vector machines.

    >>> multiclass_hinge_loss(torch.tensor([[0.0, 0.5, -1.0]]), torch.tensor([0]))
    tensor([1.5000])
    """
    check_shape(scores, "b c", "multiclass_hinge_loss: scores")
    check_classes("multiclass_hinge_loss", labels, scores=scores)
    return (_differences(scores, labels) + ~_is_label(scores, labels)).amax(1)


@in_float32
def multi_margin_loss(
    scores: Tensor, labels: Tensor, *, p: int = 1, margin: Number = 1.0, weight: Tensor | None = None
) -> Tensor:
    """w_y / c sum_{j != y} max(0, margin - f_y + f_j)^p: (b, c), (b,) -> (b,).

    Equals ``torch.nn.functional.multi_margin_loss(reduction="none")``.

    Args:
        p: 1 or 2.
        weight: of the classes, (c,).
    Raises:
        TypeError: if the scores are not floating, or the labels no integers.
        ValueError: if a shape differs, or ``p`` is another.

    >>> multi_margin_loss(torch.tensor([[0.0, 0.5, -1.0]]), torch.tensor([0]))
    tensor([0.5000])
    """
    check_choice("multi_margin_loss", "p", p, (1, 2))
    check_number("multi_margin_loss", "margin", margin)
    check_shape(scores, "b c", "multi_margin_loss: scores")
    classes = check_classes("multi_margin_loss", labels, weight, scores=scores)
    terms = torch.relu(margin + _differences(scores, labels))
    terms = terms if p == 1 else terms * terms
    loss = torch.where(_is_label(scores, labels), 0.0, terms).sum(1) / max(classes, 1)
    return loss if weight is None else weight.gather(0, labels.long()) * loss


def _column(labels: Tensor) -> Tensor:
    return labels.long().unsqueeze(1)


def _differences(scores: Tensor, labels: Tensor) -> Tensor:
    """f_j - f_y: (b, c), (b,) -> (b, c)."""
    return scores - scores.gather(1, _column(labels))


def _is_label(scores: Tensor, labels: Tensor) -> Tensor:
    return labels.unsqueeze(1) == torch.arange(scores.shape[1], device=scores.device)


@in_float32
def multilabel_margin_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """1 / c sum_{i not in labels} sum_{j in labels} max(0, 1 - f_j + f_i): (b, c), (b, c) -> (b,).

    Equals ``torch.nn.functional.multilabel_margin_loss(reduction="none")``. Memory grows as b c^2.

    Args:
        labels: integers; the first negative one of a row ends its labels.
    Raises:
        TypeError: if the scores are not floating, or the labels no integers.
        ValueError: if the shapes differ.

    >>> multilabel_margin_loss(torch.tensor([[0.0, 0.5, -1.0]]), torch.tensor([[0, -1, -1]]))
    tensor([0.5000])
    """
    classes = check_shape(scores, "b c", "multilabel_margin_loss: scores")["c"]
    check_floating(scores, "multilabel_margin_loss: scores")
    check_integers("multilabel_margin_loss: labels", labels, tuple(scores.shape))
    valid = (labels < 0).cumsum(1) == 0
    index = torch.where(valid, labels, 0).long()
    hits = valid.unsqueeze(2) & (index.unsqueeze(2) == torch.arange(classes, device=scores.device))  # b j i
    margins = torch.relu(1 - scores.gather(1, index).unsqueeze(2) + scores.unsqueeze(1))
    counted = valid.unsqueeze(2) & ~hits.any(1, keepdim=True)
    return torch.where(counted, margins, 0.0).sum((1, 2)) / max(classes, 1)


@in_float32
def hinge_embedding_loss(x: Tensor, targets: Tensor, *, margin: Number = 1.0) -> Tensor:
    """x for the target 1, max(0, margin - x) for -1, averaged over the other axes: (b, ...), (b, ...) -> (b,).

    x is a distance, small where the target is 1. Equals ``torch.nn.functional.hinge_embedding_loss``.

    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if the shapes differ.

    >>> hinge_embedding_loss(torch.tensor([0.3, 0.3]), torch.tensor([1, -1]))
    tensor([0.3000, 0.7000])
    """
    check_alike("hinge_embedding_loss", x=x, targets=targets)
    check_number("hinge_embedding_loss", "margin", margin)
    near = torch.where(targets == -1, 0.0, x)
    return mean_per_example(near + torch.where(targets == 1, 0.0, (margin - x).clamp(min=0.0)))


@in_float32
def margin_ranking_loss(x: Tensor, y: Tensor, targets: Tensor, *, margin: Number = 0.0) -> Tensor:
    """max(0, margin - t (x - y)), averaged over the other axes: (b, ...) x 3 -> (b,).

    Equals ``torch.nn.functional.margin_ranking_loss``.

    Args:
        targets: 1 where ``x`` should be the larger, -1 where ``y`` should.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if the shapes differ.

    >>> margin_ranking_loss(torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1, -1]))
    tensor([0., 1.])
    """
    check_alike("margin_ranking_loss", x=x, y=y, targets=targets)
    check_number("margin_ranking_loss", "margin", margin)
    return mean_per_example((margin - targets * (x - y)).clamp(min=0.0))
