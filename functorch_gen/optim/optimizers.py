"""The optimizers by name: short chains of the transformations in this folder."""

from functorch_gen.check import check_number
from functorch_gen.optim.decay import Mask, add_decayed_weights
from functorch_gen.optim.moments import scale_by_adam, trace
from functorch_gen.optim.scaling import scale_by_learning_rate
from functorch_gen.optim.schedules import LearningRate
from functorch_gen.optim.transformation import GradientTransformation, chain, identity
from functorch_gen.typing import Number

__all__ = ["adam", "adamw", "sgd"]


def sgd(learning_rate: LearningRate, momentum: Number | None = None, nesterov: bool = False) -> GradientTransformation:
    """Gradient descent: p <- p - learning_rate v with v = g, or momentum (v <- g + momentum v), or Nesterov's.

    Nesterov's step is g + momentum v, with the new v. Equals ``optax.sgd`` and ``torch.optim.SGD`` (dampening 0).

    Args:
        learning_rate: a number, a 0-d tensor, or a function of the step.
    Raises:
        ValueError: if a number is out of its range, or ``nesterov`` is asked for without momentum.

    >>> import torch
    >>> tx = sgd(0.1, momentum=0.9)
    >>> tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))[0]
    [tensor([-0.1000])]
    """
    if nesterov and momentum is None:
        raise ValueError("sgd: expected momentum with nesterov=True, got None")
    if momentum is not None:
        check_number("sgd", "momentum", momentum, low=0, high=1)
    _check_learning_rate("sgd", learning_rate)
    return chain(
        identity() if momentum is None else trace(momentum, nesterov),
        scale_by_learning_rate(learning_rate),
    )


def adam(
    learning_rate: LearningRate, b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0
) -> GradientTransformation:
    """Adam: p <- p - learning_rate mu_hat / (sqrt(nu_hat + eps_root) + eps); see :func:`scale_by_adam`.

    Equals ``optax.adam``, and ``torch.optim.Adam`` when ``eps_root`` is 0.

    Args:
        learning_rate: a number, a 0-d tensor, or a function of the step.
        b1: decay of the mean of gradients.
        b2: decay of the mean of squared gradients.
        eps: added to the root of the second moment.
        eps_root: added under the root; bounds the derivatives of the update where gradients vanish.
    Raises:
        ValueError: if a number is out of its range.

    Source: Kingma and Ba 2015, algorithm 1, arXiv:1412.6980.

    >>> import torch
    >>> tx = adam(0.1)
    >>> tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))[0]
    [tensor([-0.1000,  0.1000])]
    """
    _check_learning_rate("adam", learning_rate)
    return chain(scale_by_adam(b1, b2, eps, eps_root), scale_by_learning_rate(learning_rate))


def adamw(
    learning_rate: LearningRate,
    b1: Number = 0.9,
    b2: Number = 0.999,
    eps: Number = 1e-8,
    eps_root: Number = 0.0,
    weight_decay: Number = 1e-4,
    mask: Mask | None = None,
) -> GradientTransformation:
    """Adam with decoupled decay: p <- p - learning_rate (mu_hat / (sqrt(nu_hat + eps_root) + eps) + weight_decay p).

    Equals ``optax.adamw``, and ``torch.optim.AdamW`` when ``eps_root`` is 0 (whose default decay is 1e-2, not 1e-4).
    ``update`` needs the parameters.

    Args:
        mask: which parameters decay: ``"*.weight"``, say; see :func:`add_decayed_weights`.
    Raises:
        ValueError: if a number is out of its range.

    Source: Loshchilov and Hutter 2019, algorithm 2, arXiv:1711.05101.

    >>> import torch
    >>> tx, params = adamw(0.1, weight_decay=0.5), [torch.ones(1)]
    >>> tx.update([torch.zeros(1)], tx.init(params), params)[0]
    [tensor([-0.0500])]
    """
    _check_learning_rate("adamw", learning_rate)
    return chain(
        scale_by_adam(b1, b2, eps, eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
    )


def _check_learning_rate(name: str, learning_rate: LearningRate) -> None:
    if not callable(learning_rate):
        check_number(name, "learning_rate", learning_rate, low=0)
