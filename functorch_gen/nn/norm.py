"""Normalisation without running statistics: group, layer, root-mean-square and local response."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_floating, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.nn.leading_axes import over_leading_axes
from functorch_gen.nn.parts import weight_and_bias
from functorch_gen.nn.sizes import check_nonnegative, check_sizes, freeze, per_axis
from functorch_gen.transforms.context import is_transformed
from functorch_gen.typing import Key, Params

__all__ = ["GroupNorm", "LayerNorm", "LocalResponseNorm", "RMSNorm", "ones_and_zeros"]


def ones_and_zeros(key: Key, shape: tuple[int, ...], *, weight: bool, bias: bool) -> Params:
    """The parameters of a normalisation: ``weight`` ones and ``bias`` zeros, each if asked for."""
    params = {"weight": torch.ones(shape, device=key.device)} if weight else {}
    return {**params, "bias": torch.zeros(shape, device=key.device)} if bias else params


@dataclass(frozen=True)
class GroupNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias over each group of channels: (b, c, ...) -> (b, c, ...).

    Equals ``torch.nn.GroupNorm``. Source: Wu and He 2018, arXiv:1803.08494.

    >>> from functorch_gen import random
    >>> layer = GroupNorm(2, 4)
    >>> y = layer(layer.init(random.key(0)), torch.arange(8.0).reshape(1, 4, 2))
    >>> bool(y[0, :2].mean().abs() < 1e-6)
    True
    """

    num_groups: int
    num_channels: int
    eps: float = 1e-5
    affine: bool = True

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("GroupNorm", num_groups=self.num_groups, num_channels=self.num_channels)
        check_nonnegative("GroupNorm", eps=self.eps)
        if self.num_channels % self.num_groups:
            raise ValueError(
                f"GroupNorm: expected num_channels divisible by num_groups={self.num_groups}, got {self.num_channels}"
            )

    def init(self, key: Key) -> Params:
        """``weight`` ones and ``bias`` zeros, (c,); nothing when not ``affine``."""
        return ones_and_zeros(key, (self.num_channels,), weight=self.affine, bias=self.affine)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(b, c, ...) -> (b, c, ...)."""
        axes = " ".join(f"n{i}" for i in range(2, getattr(x, "ndim", 2)))
        check_shape(x, f"b c {axes}", "GroupNorm: x", c=self.num_channels)
        check_floating(x, "GroupNorm: x")
        weight, bias = weight_and_bias("GroupNorm", params, weight=self.affine, bias=self.affine)
        y = F.group_norm(_as_weight(x, weight), self.num_groups, weight, bias, self.eps)
        return y.to(x.dtype)


@dataclass(frozen=True)
class LayerNorm:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axes: (..., *normalized_shape) -> the same.

    Equals ``torch.nn.LayerNorm``. Source: Ba et al. 2016, arXiv:1607.06450.

    >>> from functorch_gen import random
    >>> layer = LayerNorm(4)
    >>> y = layer(layer.init(random.key(0)), torch.arange(8.0).reshape(2, 4))
    >>> bool(y.mean(-1).abs().max() < 1e-6)
    True
    """

    normalized_shape: int | Sequence[int]
    eps: float = 1e-5
    elementwise_affine: bool = True
    bias: bool = True

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("LayerNorm", normalized_shape=self.normalized_shape)
        check_nonnegative("LayerNorm", eps=self.eps)

    def init(self, key: Key) -> Params:
        """``weight`` ones and ``bias`` zeros, of ``normalized_shape``; nothing when not ``elementwise_affine``."""
        shape = per_axis(self.normalized_shape, 1)
        affine = self.elementwise_affine
        return ones_and_zeros(key, shape, weight=affine, bias=affine and self.bias)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., *normalized_shape) -> (..., *normalized_shape)."""
        shape = per_axis(self.normalized_shape, 1)
        _check_last_axes(x, shape, "LayerNorm: x")
        affine = self.elementwise_affine
        weight, bias = weight_and_bias("LayerNorm", params, weight=affine, bias=affine and self.bias)
        return _layer_norm(x, shape, weight, bias, self.eps)


def _layer_norm(x: Tensor, shape: tuple[int, ...], weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Inside a transform the formula written out: torch's own operation has a wrong derivative of its derivative there
    (its forward rule takes mean and variance for constants, so that ``grad`` of ``jvp`` lacks terms)."""
    if not is_transformed():
        return F.layer_norm(_as_weight(x, weight), shape, weight, bias, eps).to(x.dtype)
    axes = tuple(range(-len(shape), 0))
    h = at_least_float32(x)
    h = h - h.mean(axes, keepdim=True)
    y = h * torch.rsqrt(h.square().mean(axes, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias).to(x.dtype)


def _as_weight(x: Tensor, weight: Tensor | None) -> Tensor:
    """``x`` in the dtype of float32 parameters, if it is narrower: torch's mixed kernels lose dtypes in derivatives."""
    return x if weight is None else x.to(weight.dtype)


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight over the last axes: (..., *normalized_shape) -> the same.

    Equals ``torch.nn.RMSNorm``. Source: Zhang and Sennrich 2019, eq. 4, arXiv:1910.07467.

    Args:
        eps: None stands for the machine epsilon of the input's dtype.

    >>> from functorch_gen import random
    >>> layer = RMSNorm(4)
    >>> layer(layer.init(random.key(0)), torch.full((1, 4), 3.0))
    tensor([[1., 1., 1., 1.]])
    """

    normalized_shape: int | Sequence[int]
    eps: float | None = None
    elementwise_affine: bool = True

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("RMSNorm", normalized_shape=self.normalized_shape)
        check_nonnegative("RMSNorm", eps=0.0 if self.eps is None else self.eps)

    def init(self, key: Key) -> Params:
        """``weight`` ones of ``normalized_shape``; nothing when not ``elementwise_affine``."""
        return ones_and_zeros(key, per_axis(self.normalized_shape, 1), weight=self.elementwise_affine, bias=False)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., *normalized_shape) -> (..., *normalized_shape)."""
        shape = per_axis(self.normalized_shape, 1)
        _check_last_axes(x, shape, "RMSNorm: x")
        weight, _ = weight_and_bias("RMSNorm", params, weight=self.elementwise_affine, bias=False)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return F.rms_norm(_as_weight(x, weight), shape, weight, eps).to(x.dtype)


@dataclass(frozen=True)
class LocalResponseNorm:
    """x / (k + alpha mean(x^2))^beta, the mean over ``size`` neighbouring channels: (b, c, ...) -> (b, c, ...).

    Channels beyond the first and the last count as zeros. Equals ``torch.nn.LocalResponseNorm``. Source: Krizhevsky et
    al. 2012, section 3.3, with the mean for their sum.

    >>> LocalResponseNorm(3, alpha=3.0, beta=1.0)({}, torch.ones(1, 3, 1)).flatten()
    tensor([0.3333, 0.2500, 0.3333])
    """

    size: int
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("LocalResponseNorm", size=self.size)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(b, c, ...) -> (b, c, ...)."""
        axes = " ".join(f"n{i}" for i in range(2, getattr(x, "ndim", 2)))
        check_shape(x, f"b c {axes}", "LocalResponseNorm: x")
        check_floating(x, "LocalResponseNorm: x")
        h = at_least_float32(x)
        squares = F.pad(h.square().movedim(1, -1), (self.size // 2, (self.size - 1) // 2))
        mean = over_leading_axes(lambda h: F.avg_pool1d(h, self.size, 1), squares, 2).movedim(-1, 1)
        return (h / (self.k + self.alpha * mean).pow(self.beta)).to(x.dtype)


def _check_last_axes(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    check_shape(x, " ".join(["...", *map(str, shape)]), name)
    check_floating(x, name)
