"""Padding: constants, mirrored, repeated and periodic values around an input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.nn.leading_axes import SPACE, over_leading_axes
from functorch_gen.nn.sizes import freeze
from functorch_gen.typing import Key, Params

__all__ = [
    "CircularPad1d",
    "CircularPad2d",
    "CircularPad3d",
    "ConstantPad1d",
    "ConstantPad2d",
    "ConstantPad3d",
    "ReflectionPad1d",
    "ReflectionPad2d",
    "ReflectionPad3d",
    "ReplicationPad1d",
    "ReplicationPad2d",
    "ReplicationPad3d",
    "ZeroPad1d",
    "ZeroPad2d",
    "ZeroPad3d",
]


@dataclass(frozen=True)
class _Pad:
    """What all paddings share. ``padding`` is one number, or (before, after) of each axis, the last axis first."""

    padding: int | Sequence[int]

    dims: ClassVar[int]
    mode: ClassVar[str] = "constant"
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        freeze(self)
        name, sizes = type(self).__name__, self._sizes()
        if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
            raise TypeError(f"{name}: expected padding to be an int or a tuple of ints, got {self.padding!r}")
        if len(sizes) != 2 * self.dims:
            raise ValueError(f"{name}: expected padding with {2 * self.dims} sizes, got {self.padding!r}")
        if self.mode != "constant" and any(size < 0 for size in sizes):
            raise ValueError(f"{name}: expected padding >= 0, got {self.padding!r}")

    def _sizes(self) -> tuple[int, ...]:
        return tuple(self.padding) if isinstance(self.padding, Sequence) else (self.padding,) * (2 * self.dims)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c, *space) -> (..., c, *space')."""
        check_shape(x, f"... c {SPACE[self.dims]}", f"{type(self).__name__}: x")
        return over_leading_axes(self._pad, x, self.dims + 1)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self._sizes(), mode=self.mode)


@dataclass(frozen=True)
class _ConstantPad(_Pad):
    value: float

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x, self._sizes(), value=self.value)


@dataclass(frozen=True)
class ConstantPad1d(_ConstantPad):
    """A constant around the last axis; a negative padding cuts: (..., c, l) -> (..., c, l').

    Equals ``torch.nn.ConstantPad1d``.

    Args:
        padding: one number, or (left, right).

    >>> import torch
    >>> ConstantPad1d((1, 2), 9.0)({}, torch.ones(1, 2))
    tensor([[9., 1., 1., 9., 9.]])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class ConstantPad2d(_ConstantPad):
    """A constant around the last two axes; a negative padding cuts: (..., c, h, w) -> (..., c, h', w').

    Equals ``torch.nn.ConstantPad2d``.

    Args:
        padding: one number, or (left, right, top, bottom).

    >>> import torch
    >>> ConstantPad2d((0, 0, 1, -1), 9.0)({}, torch.ones(1, 2, 2))
    tensor([[[9., 9.],
             [1., 1.]]])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class ConstantPad3d(_ConstantPad):
    """A constant around the last three axes; a negative padding cuts: (..., c, d, h, w) -> (..., c, d', h', w').

    Equals ``torch.nn.ConstantPad3d``.

    Args:
        padding: one number, or (left, right, top, bottom, front, back).

    >>> import torch
    >>> ConstantPad3d((1, 1, 0, 0, 0, 2), 9.0)({}, torch.ones(1, 2, 2, 2)).shape
    torch.Size([1, 4, 2, 4])
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True)
class ZeroPad1d(_Pad):
    """Zeros around the last axis, as :class:`ConstantPad1d`: (..., c, l) -> (..., c, l'); ``torch.nn.ZeroPad1d``.

    >>> import torch
    >>> ZeroPad1d(1)({}, torch.ones(1, 2))
    tensor([[0., 1., 1., 0.]])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class ZeroPad2d(_Pad):
    """Zeros around the last two axes, as :class:`ConstantPad2d`; ``torch.nn.ZeroPad2d``.

    >>> import torch
    >>> ZeroPad2d(1)({}, torch.ones(1, 2, 2)).shape
    torch.Size([1, 4, 4])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class ZeroPad3d(_Pad):
    """Zeros around the last three axes, as :class:`ConstantPad3d`; ``torch.nn.ZeroPad3d``.

    >>> import torch
    >>> ZeroPad3d(1)({}, torch.ones(1, 2, 2, 2)).shape
    torch.Size([1, 4, 4, 4])
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True)
class ReflectionPad1d(_Pad):
    """The last axis mirrored at its end elements: (..., c, l) -> (..., c, l'); ``torch.nn.ReflectionPad1d``.

    >>> import torch
    >>> ReflectionPad1d(2)({}, torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[3., 2., 1., 2., 3., 2., 1.]])
    """

    dims: ClassVar[int] = 1
    mode: ClassVar[str] = "reflect"


@dataclass(frozen=True)
class ReflectionPad2d(_Pad):
    """The last two axes mirrored at their end elements, as :class:`ReflectionPad1d`; ``torch.nn.ReflectionPad2d``.

    >>> import torch
    >>> ReflectionPad2d((1, 0, 0, 1))({}, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[[2., 1., 2.],
             [4., 3., 4.],
             [2., 1., 2.]]])
    """

    dims: ClassVar[int] = 2
    mode: ClassVar[str] = "reflect"


@dataclass(frozen=True)
class ReflectionPad3d(_Pad):
    """The last three axes mirrored at their end elements, as :class:`ReflectionPad1d`; ``torch.nn.ReflectionPad3d``.

    >>> import torch
    >>> ReflectionPad3d(1)({}, torch.ones(1, 2, 2, 2)).shape
    torch.Size([1, 4, 4, 4])
    """

    dims: ClassVar[int] = 3
    mode: ClassVar[str] = "reflect"


@dataclass(frozen=True)
class ReplicationPad1d(_Pad):
    """The end elements of the last axis repeated: (..., c, l) -> (..., c, l'); ``torch.nn.ReplicationPad1d``.

    >>> import torch
    >>> ReplicationPad1d(2)({}, torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[1., 1., 1., 2., 3., 3., 3.]])
    """

    dims: ClassVar[int] = 1
    mode: ClassVar[str] = "replicate"


@dataclass(frozen=True)
class ReplicationPad2d(_Pad):
    """The end elements of the last two axes repeated, as :class:`ReplicationPad1d`; ``torch.nn.ReplicationPad2d``.

    >>> import torch
    >>> ReplicationPad2d((1, 0, 0, 1))({}, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[[1., 1., 2.],
             [3., 3., 4.],
             [3., 3., 4.]]])
    """

    dims: ClassVar[int] = 2
    mode: ClassVar[str] = "replicate"


@dataclass(frozen=True)
class ReplicationPad3d(_Pad):
    """The end elements of the last three axes repeated, as :class:`ReplicationPad1d`; ``torch.nn.ReplicationPad3d``.

    >>> import torch
    >>> ReplicationPad3d(1)({}, torch.ones(1, 2, 2, 2)).shape
    torch.Size([1, 4, 4, 4])
    """

    dims: ClassVar[int] = 3
    mode: ClassVar[str] = "replicate"


@dataclass(frozen=True)
class CircularPad1d(_Pad):
    """The last axis continued with its period: (..., c, l) -> (..., c, l'); ``torch.nn.CircularPad1d``.

    >>> import torch
    >>> CircularPad1d(2)({}, torch.tensor([[1.0, 2.0, 3.0]]))
    tensor([[2., 3., 1., 2., 3., 1., 2.]])
    """

    dims: ClassVar[int] = 1
    mode: ClassVar[str] = "circular"


@dataclass(frozen=True)
class CircularPad2d(_Pad):
    """The last two axes continued with their periods, as :class:`CircularPad1d`; ``torch.nn.CircularPad2d``.

    >>> import torch
    >>> CircularPad2d((1, 0, 0, 1))({}, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
    tensor([[[2., 1., 2.],
             [4., 3., 4.],
             [2., 1., 2.]]])
    """

    dims: ClassVar[int] = 2
    mode: ClassVar[str] = "circular"


@dataclass(frozen=True)
class CircularPad3d(_Pad):
    """The last three axes continued with their periods, as :class:`CircularPad1d`; ``torch.nn.CircularPad3d``.

    >>> import torch
    >>> CircularPad3d(1)({}, torch.ones(1, 2, 2, 2)).shape
    torch.Size([1, 4, 4, 4])
    """

    dims: ClassVar[int] = 3
    mode: ClassVar[str] = "circular"
