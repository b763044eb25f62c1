"""Minibatch standard deviation: how much examples differ, as a feature that a discriminator sees."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange, reduce
from torch import Tensor

from functorch_gen.check import check_positive, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["MinibatchStdDev"]


@dataclass(frozen=True)
class MinibatchStdDev:
    """Appends the mean standard deviation within groups of examples: (b, c, *space) -> (b, c + f, *space).

    Examples i, i + b / g, i + 2 b / g, ... are a group of g. sqrt(var + eps) over a group, averaged over space and over
    each of f = ``num_new_features`` shares of the channels, is a new channel, the same for the whole group. A batch
    below ``group_size`` is one group.

    Args:
        group_size: g; None: the whole batch, as in the first paper.
    Raises:
        ValueError: if g does not divide the batch, or f the channels.
    Source: Karras et al. 2018, section 3, arXiv:1710.10196; groups as in Karras et al. 2020, arXiv:1912.04958.

    >>> x = torch.tensor([[1.0], [5.0]])
    >>> MinibatchStdDev()({}, x)
    tensor([[1., 2.],
            [5., 2.]])
    """

    group_size: int | None = 4
    num_new_features: int = 1
    eps: float = 1e-8

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        size = 1 if self.group_size is None else self.group_size
        check_sizes("MinibatchStdDev", group_size=size, num_new_features=self.num_new_features)
        check_positive("MinibatchStdDev", eps=self.eps)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(b, c, *space) -> (b, c + num_new_features, *space)."""
        space = " ".join(f"n{i}" for i in range(2, getattr(x, "ndim", 2)))
        sizes = check_shape(x, f"b c {space}", "MinibatchStdDev: x")
        b, c, f = sizes["b"], sizes["c"], self.num_new_features
        g = max(1, b if self.group_size is None else min(self.group_size, b))
        if b % g or c % f:
            raise ValueError(f"MinibatchStdDev: x: expected batch divisible by {g}, channels by {f}, got {b} and {c}")
        h = rearrange(at_least_float32(x), "(g n) (f c) ... -> g n f c ...", g=g, f=f)
        deviation = ((h - h.mean(0)).square().mean(0) + self.eps).sqrt()
        feature = reduce(deviation, "n f ... -> n f", "mean").repeat(g, 1).to(x.dtype)
        return torch.cat([x, feature.reshape(b, f, *(1,) * (x.ndim - 2)).expand(b, f, *x.shape[2:])], 1)
