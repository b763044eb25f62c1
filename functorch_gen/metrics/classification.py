"""How often a classifier is right, about which classes, and whether it knows: from scores or predicted classes.

Classes stand on axis 1 of scores, as in the losses; all other axes are counted alike.
"""

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_positive, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.losses.per_example import check_classes

__all__ = [
    "accuracy",
    "confusion_matrix",
    "expected_calibration_error",
    "f1_score",
    "precision",
    "recall",
    "top_k_accuracy",
]


def accuracy(predictions: Tensor, labels: Tensor) -> Tensor:
    """Share of correct predictions: (n, c, ...) scores or (n, ...) classes, (n, ...) -> ().

    Args:
        predictions: floating scores, of which the highest counts; or integer classes.
    Raises:
        TypeError: if the labels are no integers.
        ValueError: if the shapes differ.

    >>> accuracy(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 0]))
    tensor(0.5000)
    """
    if isinstance(predictions, Tensor) and not predictions.is_floating_point():
        _check_same("accuracy", predictions, labels)
        return (predictions == labels).float().mean()
    check_classes("accuracy", labels, predictions=predictions)
    return at_least_float32((predictions.argmax(1) == labels).to(predictions.dtype)).mean()


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> Tensor:
    """Share of labels among the ``k`` highest scores: (n, c, ...), (n, ...) -> ().

    Raises:
        TypeError: if the scores are not floating, or the labels no integers.
        ValueError: if the shapes differ, or ``k`` is not in [1, c].

    >>> top_k_accuracy(torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([1, 2]), 2)
    tensor(0.5000)
    """
    classes = check_classes("top_k_accuracy", labels, scores=scores)
    if not 1 <= k <= classes:
        raise ValueError(f"top_k_accuracy: expected 1 <= k <= {classes}, got {k}")
    hits = (scores.topk(k, 1).indices == labels.unsqueeze(1)).any(1)
    return at_least_float32(hits.to(scores.dtype)).mean()


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """How often label i was predicted as j: (n, ...), (n, ...) -> (num_classes, num_classes) int64.

    Pairs with a number outside [0, num_classes) are left out, as an ignored label of -100. Matrices of batches add up.

    Raises:
        TypeError: if the classes are floating.
        ValueError: if the shapes differ, or ``num_classes`` < 1.

    >>> confusion_matrix(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 1, 1]), 2)
    tensor([[1, 1],
            [0, 2]])
    """
    check_positive("confusion_matrix", num_classes=num_classes)
    _check_same("confusion_matrix", predictions, labels)
    classes = torch.arange(num_classes, device=labels.device)

    def one_hot(x: Tensor) -> Tensor:
        return (rearrange(x, "... -> (...) 1") == classes).double()  # whose sums are exact to 2^53

    return (one_hot(labels).T @ one_hot(predictions)).round().long()


def precision(confusion: Tensor) -> Tensor:
    """Of what was predicted as a class, the share that is it: (c, c) -> (c,); 0 for a class never predicted.

    Args:
        confusion: of :func:`confusion_matrix`.

    >>> precision(torch.tensor([[1, 1], [0, 2]]))
    tensor([1.0000, 0.6667])
    """
    return _ratio(_diagonal("precision", confusion), confusion.sum(0))


def recall(confusion: Tensor) -> Tensor:
    """Of what is a class, the share predicted as it: (c, c) -> (c,); 0 for a class without examples.

    Args:
        confusion: of :func:`confusion_matrix`.

    >>> recall(torch.tensor([[1, 1], [0, 2]]))
    tensor([0.5000, 1.0000])
    """
    return _ratio(_diagonal("recall", confusion), confusion.sum(1))


def f1_score(confusion: Tensor) -> Tensor:
    """Harmonic mean of precision and recall of each class: (c, c) -> (c,); 0 for a class that never occurs.

    Its mean is the macro average.

    Args:
        confusion: of :func:`confusion_matrix`.

    >>> f1_score(torch.tensor([[1, 1], [0, 2]]))
    tensor([0.6667, 0.8000])
    """
    return _ratio(2 * _diagonal("f1_score", confusion), confusion.sum(0) + confusion.sum(1))


def expected_calibration_error(probs: Tensor, labels: Tensor, *, bins: int = 15) -> Tensor:
    """sum_m |B_m| / n |accuracy(B_m) - confidence(B_m)|: (n, c, ...), (n, ...) -> ().

    B_m holds the examples whose highest probability, the confidence, lies in ((m - 1) / bins, m / bins].

    Raises:
        TypeError: if the probabilities are not floating, or the labels no integers.
        ValueError: if the shapes differ, or ``bins`` < 1.
    Source: Guo et al. 2017, eq. 3, arXiv:1706.04599.

    >>> expected_calibration_error(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([0, 0]))  # (0.1 + 0.6) / 2
    tensor(0.3500)
    """
    check_positive("expected_calibration_error", bins=bins)
    check_classes("expected_calibration_error", labels, probs=probs)
    confidence, predicted = probs.double().max(1)
    surplus = rearrange(confidence - (predicted == labels).double(), "... -> (...) 1")
    bin_of = rearrange((confidence * bins).ceil().clamp(1, bins), "... -> (...) 1")
    in_bin = bin_of == torch.arange(1, bins + 1, device=probs.device)
    error = torch.where(in_bin, surplus, 0.0).sum(0).abs().sum() / predicted.numel()
    return error.to(torch.promote_types(probs.dtype, torch.float32))


def _check_same(name: str, predictions: Tensor, labels: Tensor) -> None:
    for argument, x in (("predictions", predictions), ("labels", labels)):
        if not isinstance(x, Tensor) or x.is_floating_point():
            found = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name}: {argument}: expected a tensor of classes, got {found}")
    if labels.shape != predictions.shape:
        raise ValueError(f"{name}: labels: expected shape {tuple(predictions.shape)}, got {tuple(labels.shape)}")


def _diagonal(name: str, confusion: Tensor) -> Tensor:
    check_shape(confusion, "c c", f"{name}: confusion")
    return confusion.diagonal()


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
    return numerics.divide_no_nan(x.double(), y.double()).to(dtype)
