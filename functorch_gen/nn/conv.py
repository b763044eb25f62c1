"""Convolutions and transposed convolutions in one, two and three dimensions."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_choice, check_shape
from functorch_gen.nn.init import init_affine
from functorch_gen.nn.leading_axes import SPACE, over_leading_axes
from functorch_gen.nn.parts import weight_and_bias
from functorch_gen.nn.sizes import check_nonnegative, check_sizes, freeze, per_axis
from functorch_gen.transforms.autocast import narrow_operands
from functorch_gen.typing import Key, Params

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"]

_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}


@dataclass(frozen=True)
class _Conv:
    """What Conv1d, Conv2d and Conv3d share: all but the number of dimensions."""

    in_channels: int
    out_channels: int
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] | str = 0
    dilation: int | Sequence[int] = 1
    groups: int = 1
    bias: bool = True
    padding_mode: str = "zeros"
    gain: float = 1.0

    dims: ClassVar[int]
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        freeze(self)
        name = type(self).__name__
        check_sizes(name, in_channels=self.in_channels, out_channels=self.out_channels, groups=self.groups)
        check_sizes(name, dims=self.dims, kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation)
        if isinstance(self.padding, str):
            check_choice(name, "padding", self.padding, ("same", "valid"))
        else:
            check_sizes(name, dims=self.dims, minimum=0, padding=self.padding)
        if self.padding == "same" and any(step != 1 for step in per_axis(self.stride, self.dims)):
            raise ValueError(f"{name}: expected stride=1 with padding='same', got {self.stride}")
        check_choice(name, "padding_mode", self.padding_mode, ("zeros", "reflect", "replicate", "circular"))
        _check_groups(name, self.groups, self.in_channels, self.out_channels)
        check_nonnegative(name, gain=self.gain)

    def init(self, key: Key) -> Params:
        """``weight`` (out, in / groups, *kernel) and ``bias`` (out,): U(-b, b), b = gain / sqrt(fan_in)."""
        shape = (self.out_channels, self.in_channels // self.groups, *per_axis(self.kernel_size, self.dims))
        bias_size = self.out_channels if self.bias else None
        return init_affine(key, shape, fan_in=math.prod(shape[1:]), bias_size=bias_size, gain=self.gain)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., in_channels, *space) -> (..., out_channels, *space')."""
        check_shape(x, f"... c {SPACE[self.dims]}", f"{type(self).__name__}: x", c=self.in_channels)
        weight, bias = weight_and_bias(type(self).__name__, params, bias=self.bias)
        x, weight, bias = narrow_operands(x, weight, bias)
        pads = self._pads()
        by_conv = self.padding_mode == "zeros" and all(before == after for before, after in pads)
        padding = tuple(before for before, _ in pads) if by_conv else 0

        def conv(x: Tensor) -> Tensor:
            x = x if by_conv else self._pad(x, pads)
            return _CONV[self.dims](x, weight, bias, self.stride, padding, self.dilation, self.groups)

        return over_leading_axes(conv, x, self.dims + 1)

    def _pads(self) -> list[tuple[int, int]]:
        """Padding (before, after) of each axis."""
        if self.padding == "same":
            kernel, dilation = per_axis(self.kernel_size, self.dims), per_axis(self.dilation, self.dims)
            totals = [d * (k - 1) for k, d in zip(kernel, dilation)]
            return [(total // 2, total - total // 2) for total in totals]
        padding = 0 if isinstance(self.padding, str) else self.padding
        return [(p, p) for p in per_axis(padding, self.dims)]

    def _pad(self, x: Tensor, pads: list[tuple[int, int]]) -> Tensor:
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        return F.pad(x, [p for pair in reversed(pads) for p in pair], mode=mode)


def _check_groups(name: str, groups: int, in_channels: int, out_channels: int) -> None:
    for argument, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
        if channels % groups:
            raise ValueError(f"{name}: expected {argument} divisible by groups={groups}, got {channels}")


@dataclass(frozen=True)
class Conv1d(_Conv):
    """Convolution (cross-correlation) over one axis: (..., in_channels, l) -> (..., out_channels, l').

    Equals ``torch.nn.Conv1d``, string paddings, padding modes and initial distribution included.

    Args:
        gain: scales the initial weight and bias; with 0 the layer starts as the zero map.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = Conv1d(3, 8, 5, padding="same")
    >>> layer(layer.init(random.key(0)), torch.ones(2, 3, 16)).shape
    torch.Size([2, 8, 16])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class Conv2d(_Conv):
    """Convolution (cross-correlation) over two axes: (..., in_channels, h, w) -> (..., out_channels, h', w').

    Equals ``torch.nn.Conv2d``, string paddings, padding modes and initial distribution included.

    Args:
        gain: scales the initial weight and bias; with 0 the layer starts as the zero map.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = Conv2d(3, 8, 3, stride=2, padding=1)
    >>> layer(layer.init(random.key(0)), torch.ones(2, 3, 16, 16)).shape
    torch.Size([2, 8, 8, 8])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class Conv3d(_Conv):
    """Convolution (cross-correlation) over three axes: (..., in_channels, d, h, w) -> (..., out_channels, d', h', w').

    Equals ``torch.nn.Conv3d``, string paddings, padding modes and initial distribution included.

    Args:
        gain: scales the initial weight and bias; with 0 the layer starts as the zero map.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = Conv3d(1, 2, (1, 3, 3))
    >>> layer(layer.init(random.key(0)), torch.ones(1, 4, 8, 8)).shape
    torch.Size([2, 4, 6, 6])
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True)
class _ConvTranspose:
    """What ConvTranspose1d, ConvTranspose2d and ConvTranspose3d share: all but the number of dimensions."""

    in_channels: int
    out_channels: int
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    output_padding: int | Sequence[int] = 0
    groups: int = 1
    bias: bool = True
    dilation: int | Sequence[int] = 1
    padding_mode: str = "zeros"
    gain: float = 1.0

    dims: ClassVar[int]
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        freeze(self)
        name = type(self).__name__
        check_sizes(name, in_channels=self.in_channels, out_channels=self.out_channels, groups=self.groups)
        check_sizes(name, dims=self.dims, kernel_size=self.kernel_size, stride=self.stride, dilation=self.dilation)
        check_sizes(name, dims=self.dims, minimum=0, padding=self.padding, output_padding=self.output_padding)
        strides, dilations = per_axis(self.stride, self.dims), per_axis(self.dilation, self.dims)
        for extra, stride, dilation in zip(per_axis(self.output_padding, self.dims), strides, dilations):
            if extra >= max(stride, dilation):
                raise ValueError(
                    f"{name}: expected output_padding < max(stride, dilation) = {max(stride, dilation)}, got {extra}"
                )
        check_choice(name, "padding_mode", self.padding_mode, ("zeros",))
        _check_groups(name, self.groups, self.in_channels, self.out_channels)
        check_nonnegative(name, gain=self.gain)

    def init(self, key: Key) -> Params:
        """``weight`` (in, out / groups, *kernel) and ``bias`` (out,): U(-b, b), b = gain / sqrt(fan).

        As in torch, fan = (out / groups) * prod(kernel), the product of the weight's axes after the first.
        """
        shape = (self.in_channels, self.out_channels // self.groups, *per_axis(self.kernel_size, self.dims))
        bias_size = self.out_channels if self.bias else None
        return init_affine(key, shape, fan_in=math.prod(shape[1:]), bias_size=bias_size, gain=self.gain)

    def __call__(
        self, params: Params, x: Tensor, *, output_size: Sequence[int] | None = None, key: Key | None = None
    ) -> Tensor:
        """(..., in_channels, *space) -> (..., out_channels, *space').

        Args:
            output_size: space', of the ``stride`` sizes of each axis that a convolution maps to that of x; by default
                the smallest plus ``output_padding``.
        """
        check_shape(x, f"... c {SPACE[self.dims]}", f"{type(self).__name__}: x", c=self.in_channels)
        weight, bias = weight_and_bias(type(self).__name__, params, bias=self.bias)
        x, weight, bias = narrow_operands(x, weight, bias)
        extra = self.output_padding if output_size is None else self._output_padding(x, output_size)
        sizes = (self.stride, self.padding, extra, self.groups, self.dilation)

        def conv(x: Tensor) -> Tensor:
            return _CONV_TRANSPOSE[self.dims](x, weight, bias, *sizes)

        return over_leading_axes(conv, x, self.dims + 1)

    def _output_padding(self, x: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        fields = (self.kernel_size, self.stride, self.padding, self.dilation)
        sizes = zip(x.shape[-self.dims :], *(per_axis(field, self.dims) for field in fields))
        smallest = tuple((n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in sizes)
        extra = tuple(size - least for size, least in zip(output_size, smallest))
        if len(output_size) != self.dims or any(
            not 0 <= e < s for e, s in zip(extra, per_axis(self.stride, self.dims))
        ):
            raise ValueError(
                f"{type(self).__name__}: expected output_size from {smallest} to less than a stride above, "
                f"got {tuple(output_size)}"
            )
        return extra


@dataclass(frozen=True)
class ConvTranspose1d(_ConvTranspose):
    """Transpose of :class:`Conv1d` as a linear map: (..., in_channels, l) -> (..., out_channels, l').

    Equals ``torch.nn.ConvTranspose1d``, initial distribution included.

    Args:
        gain: scales the initial weight and bias; with 0 the layer starts as the zero map.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = ConvTranspose1d(3, 8, 4, stride=2, padding=1)
    >>> layer(layer.init(random.key(0)), torch.ones(2, 3, 8)).shape
    torch.Size([2, 8, 16])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class ConvTranspose2d(_ConvTranspose):
    """Transpose of :class:`Conv2d` as a linear map: (..., in_channels, h, w) -> (..., out_channels, h', w').

    Equals ``torch.nn.ConvTranspose2d``, initial distribution included.

    Args:
        gain: scales the initial weight and bias; with 0 the layer starts as the zero map.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = ConvTranspose2d(3, 8, 4, stride=2, padding=1)
    >>> layer(layer.init(random.key(0)), torch.ones(2, 3, 8, 8)).shape
    torch.Size([2, 8, 16, 16])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class ConvTranspose3d(_ConvTranspose):
    """Transpose of :class:`Conv3d` as a linear map: (..., in_channels, d, h, w) -> (..., out_channels, d', h', w').

    Equals ``torch.nn.ConvTranspose3d``, initial distribution included.

    Args:
        gain: scales the initial weight and bias; with 0 the layer starts as the zero map.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = ConvTranspose3d(1, 2, 2, stride=2)
    >>> layer(layer.init(random.key(0)), torch.ones(1, 1, 4, 4, 4)).shape
    torch.Size([1, 2, 8, 8, 8])
    """

    dims: ClassVar[int] = 3
