"""Resampling of space: interpolation, and channels that become space and back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_choice, check_positive, check_shape
from functorch_gen.nn.leading_axes import SPACE, over_leading_axes
from functorch_gen.nn.sizes import check_sizes, freeze
from functorch_gen.typing import Key, Params

__all__ = ["PixelShuffle", "PixelUnshuffle", "Upsample"]

_INTERPOLATE: Callable[..., Tensor] = F.interpolate
_DIMS = {"nearest": None, "linear": 1, "bilinear": 2, "bicubic": 2, "trilinear": 3}


@dataclass(frozen=True)
class Upsample:
    """x at the points of another grid, finer or coarser: (..., c, *space) -> (..., c, *space').

    Equals ``torch.nn.Upsample``. Either ``size`` or ``scale_factor`` is given, one number or one of each axis. The mode
    tells how many axes are space; with "nearest" the number of sizes does, and where that is one number, x is
    (b, c, *space).

    Args:
        mode: "nearest", "linear", "bilinear", "bicubic" or "trilinear".
        align_corners: whether the centres of the corner pixels stay, instead of their corners; not for "nearest".
        recompute_scale_factor: whether points lie by the ratio of the sizes, instead of by ``scale_factor``.

    >>> import torch
    >>> Upsample(scale_factor=2.0)({}, torch.tensor([[[1.0, 2.0]]]))
    tensor([[[1., 1., 2., 2.]]])
    >>> Upsample(3, mode="linear", align_corners=True)({}, torch.tensor([[1.0, 2.0]]))
    tensor([[1.0000, 1.5000, 2.0000]])
    """

    size: int | Sequence[int] | None = None
    scale_factor: float | Sequence[float] | None = None
    mode: str = "nearest"
    align_corners: bool | None = None
    recompute_scale_factor: bool | None = None

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        freeze(self)
        check_choice("Upsample", "mode", self.mode, _DIMS)
        if (self.size is None) == (self.scale_factor is None):
            raise ValueError(
                f"Upsample: expected one of size and scale_factor, got {self.size!r} and {self.scale_factor!r}"
            )
        if self.mode == "nearest" and self.align_corners is not None:
            raise ValueError(f"Upsample: expected align_corners=None with mode='nearest', got {self.align_corners}")
        if self.size is not None:
            check_sizes("Upsample", dims=_DIMS[self.mode], size=self.size)
            return
        factors = self.scale_factor if isinstance(self.scale_factor, tuple) else (self.scale_factor,)
        for factor in factors:
            check_positive("Upsample", scale_factor=factor)
        dims = _DIMS[self.mode]
        if isinstance(self.scale_factor, tuple) and (not factors or (dims and len(factors) != dims)):
            raise ValueError(f"Upsample: expected scale_factor with {dims or 'at least 1'} numbers, got {factors}")

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c, *space) -> (..., c, *space')."""
        given = self.scale_factor if self.size is None else self.size
        dims = _DIMS[self.mode] or (len(given) if isinstance(given, tuple) else getattr(x, "ndim", 4) - 2)
        check_shape(x, f"... c {SPACE.get(dims, 'l')}", "Upsample: x")
        return over_leading_axes(self._interpolate, x, dims + 1)

    def _interpolate(self, x: Tensor) -> Tensor:
        if not x.shape[0]:  # torch cannot trace "nearest" without examples
            return self._interpolate(torch.cat([x, x.new_zeros(1, *x.shape[1:])]))[:0]
        how = (self.mode, self.align_corners, self.recompute_scale_factor)
        return _INTERPOLATE(x, self.size, self.scale_factor, *how)


@dataclass(frozen=True)
class PixelShuffle:
    """r^2 channels become r x r pixels of one: (..., c r^2, h, w) -> (..., c, h r, w r), r = ``upscale_factor``.

    Equals ``torch.nn.PixelShuffle``. Source: Shi et al. 2016, eq. 4, arXiv:1609.05158.

    >>> import torch
    >>> PixelShuffle(2)({}, torch.arange(4.0).reshape(4, 1, 1))
    tensor([[[0., 1.],
             [2., 3.]]])
    """

    upscale_factor: int

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("PixelShuffle", upscale_factor=self.upscale_factor)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c r^2, h, w) -> (..., c, h r, w r)."""
        r = self.upscale_factor
        channels = check_shape(x, "... c h w", "PixelShuffle: x")["c"]
        if channels % r**2:
            raise ValueError(f"PixelShuffle: x: expected channels divisible by {r**2}, got {channels}")
        return rearrange(x, "... (c r s) h w -> ... c (h r) (w s)", r=r, s=r)


@dataclass(frozen=True)
class PixelUnshuffle:
    """r x r pixels become r^2 channels, r = ``downscale_factor``: (..., c, h r, w r) -> (..., c r^2, h, w).

    Inverse of :class:`PixelShuffle`; equals ``torch.nn.PixelUnshuffle``.

    >>> import torch
    >>> PixelUnshuffle(2)({}, torch.arange(4.0).reshape(1, 2, 2)).flatten()
    tensor([0., 1., 2., 3.])
    """

    downscale_factor: int

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("PixelUnshuffle", downscale_factor=self.downscale_factor)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c, h r, w r) -> (..., c r^2, h, w)."""
        r = self.downscale_factor
        sizes = check_shape(x, "... c h w", "PixelUnshuffle: x")
        if sizes["h"] % r or sizes["w"] % r:
            raise ValueError(f"PixelUnshuffle: x: expected h and w divisible by {r}, got {sizes['h']} and {sizes['w']}")
        return rearrange(x, "... c (h r) (w s) -> ... (c r s) h w", r=r, s=r)
