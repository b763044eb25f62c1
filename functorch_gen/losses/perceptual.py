"""Distances between the activations of a network."""

import functools
from collections.abc import Callable

import torch
from einops import reduce
from torch import Tensor

from functorch_gen import numerics, tree
from functorch_gen.losses.per_example import along_classes, check_alike, in_float32, mean_per_example
from functorch_gen.typing import Tree

__all__ = ["perceptual_loss"]


def perceptual_loss(
    features: Callable[[Tensor], Tree], weights: Tree = None, *, normalize: bool = False
) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss ``(x, y) -> sum_l w_l mean (features(x)_l - features(y)_l)^2``: (b, ...), (b, ...) -> (b,).

    The mean is over all axes of an activation but the first. The network's parameters are constants if ``features``
    closes over them, as ``lambda x: nn.capture(net, names)(params, x)[1]`` does.

    Args:
        features: a tree of activations (b, ...).
        weights: a tree like the activations, of numbers or, for channels on axis 1, of tensors (c,); by default ones.
        normalize: makes the vector of channels at each place a unit vector (zero vectors stay), and sums over the
            channels instead of averaging: LPIPS.
    Raises:
        ValueError: of the loss, if there are no activations or the trees differ (names the path).
    Source: Johnson et al. 2016, eq. 2, arXiv:1603.08155; normalised: Zhang et al. 2018, eq. 1, arXiv:1801.03924, with
        the weights applied to the squares, as in their code.

    >>> loss = perceptual_loss(lambda x: {"id": x, "tanh": torch.tanh(x)}, {"id": 1.0, "tanh": 0.0})
    >>> loss(torch.ones(1, 2), torch.tensor([[1.0, 3.0]]))
    tensor([2.])
    """
    distance = _unit_distance if normalize else _distance

    def loss(x: Tensor, y: Tensor) -> Tensor:
        of_x, of_y = features(x), features(y)
        scales = tree.map(lambda _: 1.0, of_x) if weights is None else weights
        distances: list[Tensor] = tree.leaves(tree.map(distance, of_x, of_y, scales))
        if not distances:
            raise ValueError("perceptual_loss: expected features to return activations, got an empty tree")
        return functools.reduce(torch.add, distances)

    return loss


@in_float32
def _distance(x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
    check_alike("perceptual_loss", x=x, y=y)
    return mean_per_example(_weigh(weight, (x - y).square()))


@in_float32
def _unit_distance(x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
    check_alike("perceptual_loss", x=x, y=y)
    if x.ndim < 2:
        raise ValueError(f"perceptual_loss: expected activations of shape (b, c, ...), got {tuple(x.shape)}")
    squares = (numerics.normalize(x, 1) - numerics.normalize(y, 1)).square()
    return mean_per_example(reduce(_weigh(weight, squares), "b c ... -> b ...", "sum"))


def _weigh(weight: float | Tensor, x: Tensor) -> Tensor:
    return (along_classes(weight, x) if isinstance(weight, Tensor) and weight.ndim else weight) * x
