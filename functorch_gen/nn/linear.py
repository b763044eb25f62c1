"""Affine maps of the last axis, and the layer that does nothing."""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.nn.init import init_affine
from functorch_gen.nn.parts import weight_and_bias
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["Identity", "Linear"]


@dataclass(frozen=True)
class Identity:
    """Returns its input.

    >>> import torch
    >>> Identity()({}, torch.ones(2))
    tensor([1., 1.])
    """

    draws: ClassVar[bool] = False

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """Returns ``x``."""
        return x


@dataclass(frozen=True)
class Linear:
    """x W^T + b on the last axis: (..., in_features) -> (..., out_features).

    Equals ``torch.nn.Linear``, initial distribution included.

    Args:
        gain: scales the initial weight and bias; with 0 the layer starts as the zero map.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = Linear(3, 2)
    >>> layer(layer.init(random.key(0)), torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    in_features: int
    out_features: int
    bias: bool = True
    gain: float = 1.0

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("Linear", in_features=self.in_features, out_features=self.out_features)
        check_nonnegative("Linear", gain=self.gain)

    def init(self, key: Key) -> Params:
        """``weight`` (out, in) and ``bias`` (out,), both U(-b, b) with b = gain / sqrt(in)."""
        shape = (self.out_features, self.in_features)
        bias_size = self.out_features if self.bias else None
        return init_affine(key, shape, fan_in=self.in_features, bias_size=bias_size, gain=self.gain)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        check_shape(x, "... in_features", "Linear: x", in_features=self.in_features)
        return F.linear(x, *weight_and_bias("Linear", params, bias=self.bias))
