"""Instance normalisation: statistics of each channel of each example; running ones, if tracked, are state."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.nn.batch_norm import STATISTICS, initial_statistics
from functorch_gen.nn.leading_axes import SPACE, over_leading_axes
from functorch_gen.nn.norm import ones_and_zeros
from functorch_gen.nn.parts import check_state, weight_and_bias
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.typing import Key, Params, State

__all__ = ["InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d"]


@dataclass(frozen=True)
class _InstanceNorm:
    """What InstanceNorm1d, InstanceNorm2d and InstanceNorm3d share: all but the number of dimensions."""

    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = False
    track_running_stats: bool = False
    bias: bool = True

    dims: ClassVar[int]
    draws: ClassVar[bool] = False

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """One with state if it shall track running statistics, the fifth field."""
        tracks = fields.get("track_running_stats", args[4:5] == (True,))
        return object.__new__(_WITH_STATE.get(cls, cls) if tracks else cls)

    @property
    def name(self) -> str:
        """The public name, for messages."""
        return f"InstanceNorm{self.dims}d"

    def __post_init__(self) -> None:
        check_sizes(self.name, num_features=self.num_features)
        check_nonnegative(self.name, eps=self.eps)
        if self.momentum is not None:
            check_number(self.name, "momentum", self.momentum, low=0, high=1)

    def init(self, key: Key) -> Params:
        """``weight`` ones and ``bias`` zeros, (c,); nothing when not ``affine``."""
        return ones_and_zeros(key, (self.num_features,), weight=self.affine, bias=self.affine and self.bias)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c, *space) -> (..., c, *space)."""
        self._check(x)
        if x.shape[-self.dims :].numel() == 1:
            raise ValueError(f"{self.name}: expected more than one value of each channel, got {tuple(x.shape)}")
        weight, bias = self._affine(params)

        def normalize(x: Tensor) -> Tensor:  # each channel is a group
            return F.group_norm(x, self.num_features, weight, bias, self.eps)

        return over_leading_axes(normalize, x, self.dims + 1)

    def _affine(self, params: Params) -> tuple[Tensor | None, Tensor | None]:
        return weight_and_bias(self.name, params, weight=self.affine, bias=self.affine and self.bias)

    def _check(self, x: Tensor) -> None:
        check_shape(x, f"... c {SPACE[self.dims]}", f"{self.name}: x", c=self.num_features)
        check_floating(x, f"{self.name}: x")


class _Tracking(_InstanceNorm):
    """An instance normalisation with running statistics."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.track_running_stats:  # of ``replace``, which keeps the class
            raise ValueError(f"{self.name}: expected track_running_stats=True of a layer with state, got False")

    def init_state(self) -> State:
        """Running mean 0 and variance 1, (c,), and, as in torch, a count that stays 0."""
        return initial_statistics(self.num_features)

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        """The normalised x and the new state; in evaluation the running statistics normalise, and stay."""
        self._check(x)
        check_state(state, STATISTICS, self.name, c=self.num_features)
        if train:
            return super().__call__(params, x), self._moved(state, at_least_float32(x)) if x.numel() else state
        h = at_least_float32(x)
        mean, var = state["running_mean"].to(h.dtype), state["running_var"].to(h.dtype)
        y = (h - self._spread(mean)) * self._spread(torch.rsqrt(var + self.eps))
        weight, bias = self._affine(params)
        y = y if weight is None else y * self._spread(weight)
        y = y if bias is None else y + self._spread(bias)
        return y.to(x.dtype), state

    def _spread(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *(1,) * self.dims)

    def _moved(self, state: State, x: Tensor) -> State:
        """The running statistics, a step towards the means of those of the examples."""
        share = 0.0 if self.momentum is None else self.momentum
        values = x.flatten(-self.dims)
        others = list(range(x.ndim - self.dims - 1))
        found = {"running_mean": values.mean(-1), "running_var": values.var(-1)}

        def toward(old: Tensor, new: Tensor) -> Tensor:
            return ((1 - share) * old + share * (new.mean(others) if others else new)).to(old.dtype)

        return {**state, **{name: toward(state[name], new) for name, new in found.items()}}


@dataclass(frozen=True)
class InstanceNorm1d(_InstanceNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and var of each channel of each example: (..., c, l) -> same.

    Equals ``torch.nn.InstanceNorm1d``. With ``track_running_stats`` it has state: ``init_state()``, and
    ``layer(params, state, x, train=..., key=None) -> (y, state)``; in training the running statistics move by
    ``momentum`` towards the means of the examples' mean and unbiased variance, in evaluation they are used.

    Args:
        momentum: None stands for 0, as in torch: the running statistics stay.
    Source: Ulyanov et al. 2016, arXiv:1607.08022.

    >>> from functorch_gen import random
    >>> layer = InstanceNorm1d(1)
    >>> layer(layer.init(random.key(0)), torch.tensor([[1.0, 3.0]]))
    tensor([[-1.0000,  1.0000]])
    >>> layer = InstanceNorm1d(1, track_running_stats=True)
    >>> y, state = layer({}, layer.init_state(), torch.tensor([[1.0, 3.0]]), train=True)
    >>> state["running_mean"]
    tensor([0.2000])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class InstanceNorm2d(_InstanceNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and var of each channel of each example: (..., c, h, w).

    Equals ``torch.nn.InstanceNorm2d``. Else as :class:`InstanceNorm1d`.

    >>> from functorch_gen import random
    >>> layer = InstanceNorm2d(3, affine=True)
    >>> layer(layer.init(random.key(0)), torch.ones(2, 3, 4, 4)).shape
    torch.Size([2, 3, 4, 4])
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class InstanceNorm3d(_InstanceNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and var of each channel of each example: (..., c, d, h, w).

    Equals ``torch.nn.InstanceNorm3d``. Else as :class:`InstanceNorm1d`.

    >>> from functorch_gen import random
    >>> layer = InstanceNorm3d(3)
    >>> layer(layer.init(random.key(0)), torch.ones(2, 3, 2, 4, 4)).shape
    torch.Size([2, 3, 2, 4, 4])
    """

    dims: ClassVar[int] = 3


class _Tracking1d(_Tracking, InstanceNorm1d):
    """With running statistics."""


class _Tracking2d(_Tracking, InstanceNorm2d):
    """With running statistics."""


class _Tracking3d(_Tracking, InstanceNorm3d):
    """With running statistics."""


_WITH_STATE: dict[type, type] = {
    InstanceNorm1d: _Tracking1d,
    InstanceNorm2d: _Tracking2d,
    InstanceNorm3d: _Tracking3d,
}
