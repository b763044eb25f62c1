"""Pooling: maxima, means and norms over windows, of a given size or as many as are asked for."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_positive, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.nn.leading_axes import SPACE, over_leading_axes
from functorch_gen.nn.sizes import check_sizes, freeze, per_axis
from functorch_gen.numerics import safe_where
from functorch_gen.typing import Key, Params

__all__ = [
    "AdaptiveAvgPool1d",
    "AdaptiveAvgPool2d",
    "AdaptiveAvgPool3d",
    "AdaptiveMaxPool1d",
    "AdaptiveMaxPool2d",
    "AdaptiveMaxPool3d",
    "AvgPool1d",
    "AvgPool2d",
    "AvgPool3d",
    "LPPool1d",
    "LPPool2d",
    "LPPool3d",
    "MaxPool1d",
    "MaxPool2d",
    "MaxPool3d",
]

_Pool = Callable[..., Any]
_MAX: dict[int, _Pool] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVG: dict[int, _Pool] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_ADAPTIVE_MAX: dict[int, _Pool] = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
_ADAPTIVE_AVG: dict[int, _Pool] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}


def _mean(x: Tensor, dims: int, *sizes: Any) -> Tensor:
    wide = at_least_float32(x) if dims == 3 else x  # on CPUs torch has no kernel of 16 bits for three axes
    return _AVG[dims](wide, *sizes).to(x.dtype)


class _Pooling(ABC):
    """What all pooling layers share: no parameters, any leading axes."""

    dims: ClassVar[int]
    draws: ClassVar[bool] = False

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Any:
        """(..., c, *space) -> (..., c, *space')."""
        check_shape(x, f"... c {SPACE[self.dims]}", f"{type(self).__name__}: x")
        return over_leading_axes(self._pool, x, self.dims + 1)

    @abstractmethod
    def _pool(self, x: Tensor) -> Any:
        """(n, c, *space) -> (n, c, *space')."""

    def _check_windows(self, kernel_size: Any, stride: Any, **sizes: Any) -> None:
        freeze(self)
        step = kernel_size if stride is None else stride
        check_sizes(type(self).__name__, dims=self.dims, kernel_size=kernel_size, stride=step, **sizes)

    def _check_padding(self, padding: int | Sequence[int], widths: Sequence[int]) -> None:
        """Padding is at most half a window, so that none holds padding alone."""
        check_sizes(type(self).__name__, dims=self.dims, minimum=0, padding=padding)
        for pad, width in zip(per_axis(padding, self.dims), widths, strict=True):
            if 2 * pad > width:
                raise ValueError(f"{type(self).__name__}: expected padding <= {width // 2}, half a window, got {pad}")


@dataclass(frozen=True)
class _MaxPool(_Pooling):
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] | None = None
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    return_indices: bool = False
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        self._check_windows(self.kernel_size, self.stride, dilation=self.dilation)
        kernel, dilation = per_axis(self.kernel_size, self.dims), per_axis(self.dilation, self.dims)
        self._check_padding(self.padding, [d * (k - 1) + 1 for k, d in zip(kernel, dilation)])

    def _pool(self, x: Tensor) -> Any:
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation)
        return _MAX[self.dims](x, *sizes, ceil_mode=self.ceil_mode, return_indices=self.return_indices)


@dataclass(frozen=True)
class MaxPool1d(_MaxPool):
    """Largest value of each window: (..., c, l) -> (..., c, l').

    Equals ``torch.nn.MaxPool1d``; at ties the first element has the gradient. With ``return_indices`` the result is
    (y, indices), those of the maxima in the flat space of x.

    Args:
        stride: None stands for ``kernel_size``: windows side by side.

    >>> import torch
    >>> MaxPool1d(2)({}, torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    tensor([[3., 2.]])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class MaxPool2d(_MaxPool):
    """Largest value of each window: (..., c, h, w) -> (..., c, h', w').

    Equals ``torch.nn.MaxPool2d``. Else as :class:`MaxPool1d`.

    >>> import torch
    >>> MaxPool2d(3, stride=2, padding=1)({}, torch.ones(2, 4, 8, 8)).shape
    torch.Size([2, 4, 4, 4])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class MaxPool3d(_MaxPool):
    """Largest value of each window: (..., c, d, h, w) -> (..., c, d', h', w').

    Equals ``torch.nn.MaxPool3d``. Else as :class:`MaxPool1d`.

    >>> import torch
    >>> MaxPool3d((1, 2, 2))({}, torch.ones(2, 4, 3, 8, 8)).shape
    torch.Size([2, 4, 3, 4, 4])
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True)
class _AvgPool(_Pooling):
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] | None = None
    padding: int | Sequence[int] = 0
    ceil_mode: bool = False
    count_include_pad: bool = True

    def __post_init__(self) -> None:
        self._check_windows(self.kernel_size, self.stride)
        self._check_padding(self.padding, per_axis(self.kernel_size, self.dims))

    def _pool(self, x: Tensor) -> Tensor:
        return _mean(x, self.dims, *self._arguments())

    def _arguments(self) -> tuple[Any, ...]:
        return self.kernel_size, self.stride, self.padding, self.ceil_mode, self.count_include_pad


@dataclass(frozen=True)
class AvgPool1d(_AvgPool):
    """Mean of each window: (..., c, l) -> (..., c, l').

    Equals ``torch.nn.AvgPool1d``.

    Args:
        stride: None stands for ``kernel_size``: windows side by side.
        ceil_mode: a last window may reach beyond the end; only what is inside counts.
        count_include_pad: whether padding counts, with zeros.

    >>> import torch
    >>> AvgPool1d(2)({}, torch.tensor([[1.0, 3.0, 2.0, 0.0]]))
    tensor([[2., 1.]])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class _AvgPoolDivided(_AvgPool):
    divisor_override: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divisor_override is not None:
            check_sizes(type(self).__name__, divisor_override=self.divisor_override)

    def _arguments(self) -> tuple[Any, ...]:
        return *super()._arguments(), self.divisor_override


@dataclass(frozen=True)
class AvgPool2d(_AvgPoolDivided):
    """Mean of each window: (..., c, h, w) -> (..., c, h', w').

    Equals ``torch.nn.AvgPool2d``. Else as :class:`AvgPool1d`.

    Args:
        divisor_override: what the sum of a window is divided by, instead of the number of its elements.

    >>> import torch
    >>> AvgPool2d(2)({}, torch.ones(2, 4, 8, 8)).shape
    torch.Size([2, 4, 4, 4])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class AvgPool3d(_AvgPoolDivided):
    """Mean of each window: (..., c, d, h, w) -> (..., c, d', h', w').

    Equals ``torch.nn.AvgPool3d``. Else as :class:`AvgPool2d`.

    >>> import torch
    >>> AvgPool3d((1, 2, 2))({}, torch.ones(2, 4, 3, 8, 8)).shape
    torch.Size([2, 4, 3, 4, 4])
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True)
class _LPPool(_Pooling):
    norm_type: float
    kernel_size: int | Sequence[int]
    stride: int | Sequence[int] | None = None
    ceil_mode: bool = False

    def __post_init__(self) -> None:
        check_positive(type(self).__name__, norm_type=self.norm_type)
        self._check_windows(self.kernel_size, self.stride)

    def _pool(self, x: Tensor) -> Tensor:
        p, width = self.norm_type, math.prod(per_axis(self.kernel_size, self.dims))
        if p == math.inf:
            return _MAX[self.dims](x.abs(), self.kernel_size, self.stride, 0, 1, self.ceil_mode)
        powers = width * _mean(x.pow(p), self.dims, self.kernel_size, self.stride, 0, self.ceil_mode)
        return safe_where(powers != 0, lambda s: s.pow(1 / p), powers)


@dataclass(frozen=True)
class LPPool1d(_LPPool):
    """(sum x^p)^(1/p) of each window, p = ``norm_type``, or max |x|: (..., c, l) -> (..., c, l').

    Equals ``torch.nn.LPPool1d``, except for the gradient where the sum is 0: it is 0, torch's is NaN.

    >>> import torch
    >>> LPPool1d(2, 2)({}, torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
    tensor([[5., 0.]])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class LPPool2d(_LPPool):
    """(sum x^p)^(1/p) of each window, p = ``norm_type``: (..., c, h, w) -> (..., c, h', w').

    Equals ``torch.nn.LPPool2d``. Else as :class:`LPPool1d`.

    >>> import torch
    >>> LPPool2d(1, 2)({}, torch.ones(1, 2, 2))
    tensor([[[4.]]])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class LPPool3d(_LPPool):
    """(sum x^p)^(1/p) of each window, p = ``norm_type``: (..., c, d, h, w) -> (..., c, d', h', w').

    Equals ``torch.nn.LPPool3d``. Else as :class:`LPPool1d`.

    >>> import torch
    >>> LPPool3d(3, 2)({}, torch.ones(1, 2, 2, 2))
    tensor([[[[2.]]]])
    """

    dims: ClassVar[int] = 3


def _check_output_size(name: str, output_size: Any, dims: int) -> None:
    """As :func:`check_sizes`; in a tuple, None stands for the size of the input."""
    known = (
        tuple(1 if size is None else size for size in output_size) if isinstance(output_size, tuple) else output_size
    )
    check_sizes(name, dims=dims, output_size=known)


@dataclass(frozen=True)
class _AdaptiveAvgPool(_Pooling):
    output_size: int | Sequence[int | None]

    def __post_init__(self) -> None:
        freeze(self)
        _check_output_size(type(self).__name__, self.output_size, self.dims)

    def _pool(self, x: Tensor) -> Tensor:
        return _ADAPTIVE_AVG[self.dims](x, self.output_size)


@dataclass(frozen=True)
class AdaptiveAvgPool1d(_AdaptiveAvgPool):
    """Means of as many windows as are asked for: (..., c, l) -> (..., c, output_size).

    Window i of m is [floor(i l / m), ceil((i + 1) l / m)). Equals ``torch.nn.AdaptiveAvgPool1d``.

    >>> import torch
    >>> AdaptiveAvgPool1d(2)({}, torch.tensor([[1.0, 3.0, 5.0]]))
    tensor([[2., 4.]])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class AdaptiveAvgPool2d(_AdaptiveAvgPool):
    """Means of as many windows as are asked for: (..., c, h, w) -> (..., c, *output_size).

    Equals ``torch.nn.AdaptiveAvgPool2d``; in a tuple, None stands for the size of x. Else as
    :class:`AdaptiveAvgPool1d`.

    >>> import torch
    >>> AdaptiveAvgPool2d((1, None))({}, torch.ones(2, 4, 8, 6)).shape
    torch.Size([2, 4, 1, 6])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class AdaptiveAvgPool3d(_AdaptiveAvgPool):
    """Means of as many windows as are asked for: (..., c, d, h, w) -> (..., c, *output_size).

    Equals ``torch.nn.AdaptiveAvgPool3d``. Else as :class:`AdaptiveAvgPool2d`.

    >>> import torch
    >>> AdaptiveAvgPool3d(1)({}, torch.ones(2, 4, 3, 8, 6)).shape
    torch.Size([2, 4, 1, 1, 1])
    """

    dims: ClassVar[int] = 3


@dataclass(frozen=True)
class _AdaptiveMaxPool(_AdaptiveAvgPool):
    return_indices: bool = False

    def _pool(self, x: Tensor) -> Any:
        return _ADAPTIVE_MAX[self.dims](x, self.output_size, return_indices=self.return_indices)


@dataclass(frozen=True)
class AdaptiveMaxPool1d(_AdaptiveMaxPool):
    """Maxima of as many windows as are asked for: (..., c, l) -> (..., c, output_size).

    Equals ``torch.nn.AdaptiveMaxPool1d``. Windows as in :class:`AdaptiveAvgPool1d`, indices as in :class:`MaxPool1d`.

    >>> import torch
    >>> AdaptiveMaxPool1d(2)({}, torch.tensor([[1.0, 3.0, 5.0]]))
    tensor([[3., 5.]])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class AdaptiveMaxPool2d(_AdaptiveMaxPool):
    """Maxima of as many windows as are asked for: (..., c, h, w) -> (..., c, *output_size).

    Equals ``torch.nn.AdaptiveMaxPool2d``; None as in :class:`AdaptiveAvgPool2d`. Else as :class:`AdaptiveMaxPool1d`.

    >>> import torch
    >>> AdaptiveMaxPool2d((1, None))({}, torch.ones(2, 4, 8, 6)).shape
    torch.Size([2, 4, 1, 6])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class AdaptiveMaxPool3d(_AdaptiveMaxPool):
    """Maxima of as many windows as are asked for: (..., c, d, h, w) -> (..., c, *output_size).

    Equals ``torch.nn.AdaptiveMaxPool3d``. Else as :class:`AdaptiveMaxPool2d`.

    >>> import torch
    >>> AdaptiveMaxPool3d(1)({}, torch.ones(2, 4, 3, 8, 6)).shape
    torch.Size([2, 4, 1, 1, 1])
    """

    dims: ClassVar[int] = 3
