"""How far predicted numbers are from the true ones, in float64 and returned in the dtype of the inputs."""

import torch
from torch import Tensor

from functorch_gen.check import check_floating

__all__ = ["mean_squared_error", "r2_score"]


def mean_squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of (x - y)^2 over all numbers: (n, ...), (n, ...) -> ().

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ.

    >>> mean_squared_error(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor(2.)
    """
    _check("mean_squared_error", predictions, targets)
    return (predictions.double() - targets.double()).square().mean().to(predictions.dtype)


def r2_score(predictions: Tensor, targets: Tensor) -> Tensor:
    """Coefficient of determination, 1 - sum (x - y)^2 / sum (y - mean y)^2, sums over n: (n, ...), (n, ...) -> ().

    Several outputs (further axes) are averaged. Of constant targets it is 1 where they are met, else 0.

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ.

    >>> r2_score(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0])).round(decimals=4)
    tensor(0.7857)
    """
    _check("r2_score", predictions, targets)
    x, y = predictions.double(), targets.double()
    residual, total = (x - y).square().sum(0), (y - y.mean(0)).square().sum(0)
    constant = total == 0
    score = torch.where(constant, (residual == 0).double(), 1 - residual / torch.where(constant, 1.0, total))
    return score.mean().to(predictions.dtype)


def _check(name: str, predictions: Tensor, targets: Tensor) -> None:
    check_floating(predictions, f"{name}: predictions")
    if not isinstance(targets, Tensor):
        raise TypeError(f"{name}: targets: expected a tensor, got {type(targets).__name__}")
    if predictions.ndim == 0 or targets.shape != predictions.shape:
        expected = tuple(predictions.shape) or "(n, ...)"
        raise ValueError(f"{name}: targets: expected shape {expected}, got {tuple(targets.shape)}")
