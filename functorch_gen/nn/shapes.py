"""Layers that only rearrange: flat axes, windows of an image, channels in turn."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.nn.leading_axes import over_leading_axes
from functorch_gen.nn.sizes import check_sizes, freeze, per_axis
from functorch_gen.typing import Key, Params

__all__ = ["ChannelShuffle", "Flatten", "Fold", "Unflatten", "Unfold"]


class _Rearranging:
    """A layer without parameters."""

    draws: ClassVar[bool] = False

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}


@dataclass(frozen=True)
class Flatten(_Rearranging):
    """Axes ``start_dim`` to ``end_dim`` as one: by default all but the first. Equals ``torch.nn.Flatten``.

    >>> import torch
    >>> Flatten()({}, torch.ones(2, 3, 4, 5)).shape
    torch.Size([2, 60])
    """

    start_dim: int = 1
    end_dim: int = -1

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(b, *axes) -> (b, n)."""
        return x.flatten(self.start_dim, self.end_dim)


@dataclass(frozen=True)
class Unflatten(_Rearranging):
    """The axis ``dim`` as several; one size may be -1. Equals ``torch.nn.Unflatten``.

    >>> import torch
    >>> Unflatten(1, (3, 4))({}, torch.ones(2, 12)).shape
    torch.Size([2, 3, 4])
    """

    dim: int
    unflattened_size: Sequence[int]

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("Unflatten", minimum=-1, unflattened_size=self.unflattened_size)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., n, ...) -> (..., *unflattened_size, ...)."""
        return x.unflatten(self.dim, per_axis(self.unflattened_size, 1))


@dataclass(frozen=True)
class Unfold(_Rearranging):
    """The windows of an image as columns: (..., c, h, w) -> (..., c * prod(kernel_size), windows).

    Equals ``torch.nn.Unfold``.

    >>> import torch
    >>> Unfold(2)({}, torch.arange(6.0).reshape(1, 2, 3))
    tensor([[0., 1.],
            [1., 2.],
            [3., 4.],
            [4., 5.]])
    """

    kernel_size: int | Sequence[int]
    dilation: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    stride: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("Unfold", dims=2, kernel_size=self.kernel_size, dilation=self.dilation, stride=self.stride)
        check_sizes("Unfold", dims=2, minimum=0, padding=self.padding)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c, h, w) -> (..., c * prod(kernel_size), windows)."""
        check_shape(x, "... c h w", "Unfold: x")
        sizes = [per_axis(s, 2) for s in (self.kernel_size, self.dilation, self.padding, self.stride)]
        return over_leading_axes(lambda x: F.unfold(x, *sizes), x, 3)


@dataclass(frozen=True)
class Fold(_Rearranging):
    """Sums of columns at their windows of an image: (..., c * prod(kernel_size), windows) -> (..., c, *output_size).

    Transpose of :class:`Unfold` as a linear map; equals ``torch.nn.Fold``.

    >>> import torch
    >>> Fold((2, 3), 2)({}, torch.ones(4, 2))
    tensor([[[1., 2., 1.],
             [1., 2., 1.]]])
    """

    output_size: int | Sequence[int]
    kernel_size: int | Sequence[int]
    dilation: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    stride: int | Sequence[int] = 1

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("Fold", dims=2, output_size=self.output_size, kernel_size=self.kernel_size)
        check_sizes("Fold", dims=2, dilation=self.dilation, stride=self.stride)
        check_sizes("Fold", dims=2, minimum=0, padding=self.padding)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c * prod(kernel_size), windows) -> (..., c, *output_size)."""
        rows, window = check_shape(x, "... rows windows", "Fold: x")["rows"], math.prod(per_axis(self.kernel_size, 2))
        if rows % window:
            raise ValueError(f"Fold: x: expected rows divisible by prod(kernel_size)={window}, got {rows}")
        given = (self.output_size, self.kernel_size, self.dilation, self.padding, self.stride)
        sizes = [per_axis(s, 2) for s in given]
        return over_leading_axes(lambda x: F.fold(x, *sizes), x, 2)


@dataclass(frozen=True)
class ChannelShuffle(_Rearranging):
    """Takes the channels of ``groups`` groups in turn, the first of each, the second ...: (b, c, ...) -> the same.

    Between grouped convolutions it mixes the groups. Equals ``torch.nn.ChannelShuffle``. Source: Zhang et al. 2017,
    section 3.1, arXiv:1707.01083.

    >>> import torch
    >>> ChannelShuffle(2)({}, torch.arange(6.0).reshape(1, 6))
    tensor([[0., 3., 1., 4., 2., 5.]])
    """

    groups: int

    def __post_init__(self) -> None:
        check_sizes("ChannelShuffle", groups=self.groups)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(b, c, ...) -> (b, c, ...)."""
        axes = " ".join(f"n{i}" for i in range(2, getattr(x, "ndim", 2)))
        channels = check_shape(x, f"b c {axes}", "ChannelShuffle: x")["c"]
        if channels % self.groups:
            raise ValueError(f"ChannelShuffle: x: expected channels divisible by {self.groups}, got {channels}")
        return rearrange(x, "b (g c) ... -> b (c g) ...", g=self.groups)
