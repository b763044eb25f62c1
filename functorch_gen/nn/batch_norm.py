"""Batch normalisation: statistics of the batch in training, running statistics, which are state, in evaluation."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.nn.norm import ones_and_zeros
from functorch_gen.nn.parts import check_state, weight_and_bias
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.transforms import axis_size, pmean
from functorch_gen.typing import Key, Params, State

__all__ = ["STATISTICS", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "initial_statistics"]

STATISTICS = {"running_mean": "c", "running_var": "c", "num_batches_tracked": ""}
"""The state of a normalisation with running statistics, and the axes of its entries."""


def initial_statistics(num_features: int, device: torch.device | None = None) -> State:
    """Running mean 0 and variance 1, (c,), and a count of 0, () int64."""
    return {
        "running_mean": torch.zeros(num_features, device=device),
        "running_var": torch.ones(num_features, device=device),
        "num_batches_tracked": torch.zeros((), dtype=torch.int64, device=device),
    }


@dataclass(frozen=True)
class _BatchNorm:
    """What BatchNorm1d, BatchNorm2d and BatchNorm3d share: all but the axes of the input."""

    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    track_running_stats: bool = True
    bias: bool = True
    axis_name: str | tuple[str, ...] | None = None

    dims: ClassVar[int]
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_sizes(name, num_features=self.num_features)
        check_nonnegative(name, eps=self.eps)
        if self.momentum is not None:
            check_number(name, "momentum", self.momentum, low=0, high=1)
        names = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,)
        if self.axis_name is not None and not all(isinstance(word, str) for word in names):
            raise TypeError(f"{name}: expected axis_name to be a string or a tuple of them, got {self.axis_name!r}")

    def init(self, key: Key) -> Params:
        """``weight`` ones and ``bias`` zeros, (c,); nothing when not ``affine``."""
        return ones_and_zeros(key, (self.num_features,), weight=self.affine, bias=self.affine and self.bias)

    def init_state(self) -> State:
        """Running mean 0 and variance 1, (c,), and a count of 0, () int64; nothing without ``track_running_stats``."""
        return initial_statistics(self.num_features) if self.track_running_stats else {}

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        """The normalised x, in its own dtype, and the new state; in evaluation the state stays.

        Args:
            train: take the statistics from x, and move the running ones towards them.
        Raises:
            ValueError: for x or a state of a wrong shape; in training, for a single value of each channel.
            KeyError: if the state lacks an entry; names it.
        """
        self._check(state, x)
        axis = 1 if self.dims == 1 else x.ndim - self.dims - 1  # of the channels
        if axis == x.ndim:  # BatchNorm1d of one example
            y, state = self(params, state, x[None], train=train)
            return y[0], state

        def spread(v: Tensor) -> Tensor:
            return v.reshape(-1, *(1,) * (x.ndim - axis - 1))

        affine = self.affine
        weight, bias = weight_and_bias(type(self).__name__, params, weight=affine, bias=affine and self.bias)
        h = at_least_float32(x)
        if (train or not self.track_running_stats) and x.numel():
            count = self._count(x)
            mean = self._average(h, axis)
            centred = h - spread(mean)
            var = self._average(centred.square(), axis)
            if self.track_running_stats:
                state = _moved(state, mean, var * (count / (count - 1)), self.momentum)
        else:
            known = state if self.track_running_stats else initial_statistics(self.num_features, x.device)
            centred = h - spread(known["running_mean"].to(h.dtype))
            var = known["running_var"].to(h.dtype)
            if train and self.track_running_stats:  # an empty batch counts, as in torch, but moves nothing
                state = {**state, "num_batches_tracked": state["num_batches_tracked"] + 1}
        scale = torch.rsqrt(var + self.eps)
        y = centred * spread(scale if weight is None else scale * weight)
        y = y if bias is None else y + spread(bias)
        return y.to(x.dtype), state

    def _average(self, x: Tensor, axis: int) -> Tensor:
        """Over all axes but that of the channels, and over the examples of ``axis_name``: (c,)."""
        mean = x.mean([i for i in range(x.ndim) if i != axis])
        return mean if self.axis_name is None else pmean(mean, self.axis_name)

    def _count(self, x: Tensor) -> int:
        """How many values of each channel the statistics are taken from."""
        count = x.numel() // self.num_features * (1 if self.axis_name is None else axis_size(self.axis_name))
        if count < 2:
            raise ValueError(
                f"{type(self).__name__}: expected at least two values of each channel in training, got {tuple(x.shape)}"
            )
        return count

    def _check(self, state: State, x: Tensor) -> None:
        name, c = type(self).__name__, self.num_features
        if self.dims == 1:
            ndim = getattr(x, "ndim", 3)
            check_shape(x, {1: "c", 2: "b c"}.get(ndim, "b c l"), f"{name}: x", c=c)
        else:
            check_shape(x, "... c h w" if self.dims == 2 else "... c d h w", f"{name}: x", c=c)
        check_floating(x, f"{name}: x")
        if self.track_running_stats:
            check_state(state, STATISTICS, name, c=c)


def _moved(state: State, mean: Tensor, var: Tensor, momentum: float | None) -> State:
    """The running statistics after one more batch, whose ``var`` is unbiased; each keeps its dtype."""
    count = state["num_batches_tracked"] + 1
    share = 1 / count.to(mean.dtype) if momentum is None else momentum  # None: the average over all batches

    def toward(old: Tensor, new: Tensor) -> Tensor:
        return ((1 - share) * old + share * new).to(old.dtype)

    return {
        "running_mean": toward(state["running_mean"], mean),
        "running_var": toward(state["running_var"], var),
        "num_batches_tracked": count,
    }


@dataclass(frozen=True)
class BatchNorm1d(_BatchNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias of each channel over the batch: (b, c) or (b, c, l) -> the same.

    Equals ``torch.nn.BatchNorm1d``: in training mean and var are the batch's, and the running statistics move by
    ``momentum`` towards its mean and unbiased variance; in evaluation the running statistics are used. An input (c,) is
    one example; two axes are always (b, c). The new statistics are functions of the input: give them out as aux where a
    gradient is taken.

    Under ``vmap`` each example is a batch of its own. With ``axis_name`` the statistics are those of all examples along
    a named axis, of a vmap or of processes: ``torch.nn.SyncBatchNorm``. The name must be bound in training.

    Args:
        momentum: None stands for the average over all batches so far.
        axis_name: one name or several (:func:`functorch_gen.transforms.pmean`).
    Source: Ioffe and Szegedy 2015, algorithms 1 and 2, arXiv:1502.03167.

    >>> from functorch_gen import random
    >>> layer = BatchNorm1d(2)
    >>> params, state = layer.init(random.key(0)), layer.init_state()
    >>> y, state = layer(params, state, torch.tensor([[1.0, 5.0], [3.0, 7.0]]), train=True)
    >>> y
    tensor([[-1.0000, -1.0000],
            [ 1.0000,  1.0000]])
    >>> state["running_mean"]
    tensor([0.2000, 0.6000])
    """

    dims: ClassVar[int] = 1


@dataclass(frozen=True)
class BatchNorm2d(_BatchNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias of each channel over the batch: (..., c, h, w) -> the same.

    Equals ``torch.nn.BatchNorm2d``; all axes but c are the batch. Else as :class:`BatchNorm1d`.

    >>> from functorch_gen import random
    >>> layer = BatchNorm2d(3)
    >>> params, state = layer.init(random.key(0)), layer.init_state()
    >>> y, state = layer(params, state, torch.ones(2, 3, 4, 4), train=True)
    >>> y.shape, state["running_mean"]
    (torch.Size([2, 3, 4, 4]), tensor([0.1000, 0.1000, 0.1000]))
    """

    dims: ClassVar[int] = 2


@dataclass(frozen=True)
class BatchNorm3d(_BatchNorm):
    """(x - mean) / sqrt(var + eps) * weight + bias of each channel over the batch: (..., c, d, h, w) -> the same.

    Equals ``torch.nn.BatchNorm3d``; all axes but c are the batch. Else as :class:`BatchNorm1d`.

    >>> from functorch_gen import random
    >>> layer = BatchNorm3d(2)
    >>> params, state = layer.init(random.key(0)), layer.init_state()
    >>> y, state = layer(params, state, torch.ones(2, 2, 3, 4, 4), train=False)
    >>> y.shape, state["num_batches_tracked"]
    (torch.Size([2, 2, 3, 4, 4]), tensor(0))
    """

    dims: ClassVar[int] = 3
