"""Losses of real numbers, averaged over all axes but the first: ``.mean()`` is torch's ``reduction="mean"``."""

import math

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_floating, check_number
from functorch_gen.losses.per_example import check_alike, in_float32, mean_per_example
from functorch_gen.typing import Number

__all__ = [
    "gaussian_nll_loss",
    "huber_loss",
    "l1_loss",
    "log_cosh",
    "mse_loss",
    "poisson_nll_loss",
    "smooth_l1_loss",
]


@in_float32
def mse_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """(x - y)^2, averaged over the other axes: (b, ...), (b, ...) -> (b,).

    Equals ``torch.nn.functional.mse_loss``.

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ: nothing is broadcast.

    >>> mse_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 0.0]]))
    tensor([2.])
    """
    return mean_per_example(_difference("mse_loss", predictions, targets).square())


@in_float32
def l1_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """|x - y|, averaged over the other axes: (b, ...), (b, ...) -> (b,).

    Equals ``torch.nn.functional.l1_loss``. The derivative where x = y is 0.

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ.

    >>> l1_loss(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([2.])
    """
    return mean_per_example(_difference("l1_loss", predictions, targets).abs())


@in_float32
def huber_loss(predictions: Tensor, targets: Tensor, *, delta: Number = 1.0) -> Tensor:
    """d^2 / 2 where |d| < delta, else delta (|d| - delta / 2), averaged over the other axes: (b, ...) x 2 -> (b,).

    d = x - y. Equals ``torch.nn.functional.huber_loss``.

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ, or ``delta`` < 0.
    Source: Huber 1964, Robust estimation of a location parameter.

    >>> huber_loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    tensor([1.3125])
    """
    check_number("huber_loss", "delta", delta, low=0)
    d = _difference("huber_loss", predictions, targets)
    return mean_per_example(torch.where(d.abs() < delta, 0.5 * d * d, delta * (d.abs() - 0.5 * delta)))


@in_float32
def smooth_l1_loss(predictions: Tensor, targets: Tensor, *, beta: Number = 1.0) -> Tensor:
    """d^2 / (2 beta) where |d| < beta, else |d| - beta / 2, averaged over the other axes: (b, ...) x 2 -> (b,).

    d = x - y; with beta = 0, :func:`l1_loss`. Equals ``torch.nn.functional.smooth_l1_loss``.

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ, or ``beta`` < 0.
    Source: Girshick 2015, eq. 3, arXiv:1504.08083.

    >>> smooth_l1_loss(torch.tensor([[0.5, 3.0]]), torch.zeros(1, 2))
    tensor([1.3125])
    """
    check_number("smooth_l1_loss", "beta", beta, low=0)
    d = _difference("smooth_l1_loss", predictions, targets)
    near = d.abs() < beta
    scale = torch.where(near, torch.zeros_like(d) + beta, 1.0)  # beta may be 0, where nothing is near
    return mean_per_example(torch.where(near, 0.5 * d * d / scale, d.abs() - 0.5 * beta))


@in_float32
def log_cosh(predictions: Tensor, targets: Tensor) -> Tensor:
    """log cosh(x - y), averaged over the other axes: (b, ...), (b, ...) -> (b,).

    d^2 / 2 near 0, |d| - log 2 far away. Equals ``optax.log_cosh``.

    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ.

    >>> log_cosh(torch.tensor([[1.0], [1e4]]), torch.zeros(2, 1))
    tensor([4.3378e-01, 9.9993e+03])
    """
    d = _difference("log_cosh", predictions, targets)
    return mean_per_example(d + numerics.softplus(-2 * d) - math.log(2))


def _difference(name: str, predictions: Tensor, targets: Tensor) -> Tensor:
    check_alike(name, predictions=predictions, targets=targets)
    return predictions - targets


@in_float32
def gaussian_nll_loss(
    predictions: Tensor, targets: Tensor, var: Tensor, *, full: bool = False, eps: float = 1e-6
) -> Tensor:
    """(log var + (x - y)^2 / var) / 2, averaged over the other axes: (b, ...), (b, ...), (b, ...) -> (b,).

    -log N(y; x, var) for each number, with ``full``. Equals ``torch.nn.functional.gaussian_nll_loss``.

    Args:
        var: of the shape of ``predictions``, or without its last axis (one variance for all), or with that of size 1.
            Raised to ``eps`` where it is below; the derivative there is that at ``eps``.
        full: adds the constant log(2 pi) / 2.
    Raises:
        TypeError: if the predictions or the variances are not floating.
        ValueError: if a shape differs, or ``eps`` < 0.
    Source: Nix and Weigend 1994, Estimating the mean and variance of the target probability distribution.

    >>> gaussian_nll_loss(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 4.0]))
    tensor([0.0000, 1.1931])
    """
    check_number("gaussian_nll_loss", "eps", eps, low=0)
    d = _difference("gaussian_nll_loss", predictions, targets)
    check_floating(var, "gaussian_nll_loss: var")
    var = var if var.ndim == d.ndim else var.unsqueeze(-1)
    if var.shape not in (d.shape, (*d.shape[:-1], 1)):
        raise ValueError(f"gaussian_nll_loss: var: expected shape {tuple(d.shape)}, got {tuple(var.shape)}")
    var = var + (var.clamp(min=eps) - var).detach()
    constant = 0.5 * math.log(2 * math.pi) if full else 0.0
    return mean_per_example(0.5 * (var.log() + d * d / var) + constant)


@in_float32
def poisson_nll_loss(
    predictions: Tensor, targets: Tensor, *, log_input: bool = True, full: bool = False, eps: float = 1e-8
) -> Tensor:
    """exp(x) - y x, or x - y log(x + eps), averaged over the other axes: (b, ...), (b, ...) -> (b,).

    -log of the Poisson probability of y, of rate exp(x) or x, without its constant. Equals
    ``torch.nn.functional.poisson_nll_loss``.

    Args:
        log_input: whether the predictions are logarithms of rates, or rates.
        full: adds Stirling's approximation of log(y!), y log y - y + log(2 pi y) / 2, where y > 1.
        eps: keeps rates of 0 from log(0).
    Raises:
        TypeError: if the predictions are not floating.
        ValueError: if the shapes differ, or ``eps`` < 0.

    >>> poisson_nll_loss(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 3.0]), full=True)
    tensor([1.0000, 2.7641])
    """
    check_number("poisson_nll_loss", "eps", eps, low=0)
    check_alike("poisson_nll_loss", predictions=predictions, targets=targets)
    x, y = predictions, targets
    loss = x.exp() - y * x if log_input else x - y * torch.log(x + eps)
    if full:
        y = y.to(torch.promote_types(x.dtype, y.dtype))
        loss = loss + numerics.safe_where(y > 1, lambda y: y * y.log() - y + 0.5 * torch.log(2 * math.pi * y), y)
    return mean_per_example(loss)
