"""Draws with replacement, each example as often as its weight says: a pure function of (key, step)."""

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.transforms.context import is_traced
from functorch_gen.typing import Key

__all__ = ["balanced_weights", "check_weights", "weighted_indices"]


def balanced_weights(labels: Tensor) -> Tensor:
    """Probabilities by which every class that occurs is drawn equally often: (n,) integers -> (n,) float64.

    1 / (number of classes * size of the example's class)

    Raises:
        TypeError: if the labels are no integers.
        ValueError: if they are not (n,), or there are none.

    >>> balanced_weights(torch.tensor([0, 2, 2, 2]))
    tensor([0.5000, 0.1667, 0.1667, 0.1667], dtype=torch.float64)
    """
    check_positive("balanced_weights: labels", n=check_shape(labels, "n", "balanced_weights: labels")["n"])
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"balanced_weights: labels: expected integers, got {labels.dtype}")
    classes, which, counts = labels.unique(return_inverse=True, return_counts=True)
    return 1.0 / (len(classes) * counts.double())[which]


def weighted_indices(key: Key, weights: Tensor, batch_size: int, step: int | Tensor) -> Tensor:
    """Which examples batch ``step`` holds, drawn with replacement: -> (batch_size,) int64.

    Index i has probability weights_i / sum(weights); a weight of zero is never drawn. Traces, with ``step`` a tensor.

    Args:
        weights: (n,), >= 0; need not sum to 1.
    Raises:
        TypeError: if ``weights`` is not floating.
        ValueError: if ``batch_size`` < 1, ``weights`` is not (n,), or (outside of a trace) one is negative or not
            finite or all are zero.

    >>> weighted_indices(random.key(0), torch.tensor([0.0, 1.0, 3.0]), 6, step=0)
    tensor([1, 2, 2, 1, 2, 2])
    """
    check_positive("weighted_indices", batch_size=batch_size)
    check_weights("weighted_indices", weights)
    return random.choice(random.fold_in(key, step), len(weights), (batch_size,), p=weights.double())


def check_weights(name: str, weights: Tensor, **sizes: int) -> None:
    """Checks that weights are (n,), floating and, outside of a trace, finite, >= 0 and not all zero."""
    check_floating(weights, f"{name}: weights")
    check_shape(weights, "n", f"{name}: weights", **sizes)
    if not is_traced() and not (bool(((weights >= 0) & weights.isfinite()).all()) and bool((weights > 0).any())):
        raise ValueError(f"{name}: expected finite weights >= 0 that are not all zero")
