"""Dropout: noise that a key switches on."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_number, check_shape
from functorch_gen.nn.leading_axes import SPACE
from functorch_gen.typing import Key, Params

__all__ = ["AlphaDropout", "DropPath", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "FeatureAlphaDropout"]


@dataclass(frozen=True)
class Dropout:
    """Sets each element to zero with probability p and scales the others by 1 / (1 - p): (...) -> (...).

    The identity when ``key`` is None: that is evaluation. Source: Srivastava et al. 2014, JMLR 15.

    >>> x = torch.ones(4)
    >>> Dropout(0.5)({}, x)
    tensor([1., 1., 1., 1.])
    >>> sorted(set(Dropout(0.5)({}, torch.ones(64), key=random.key(0)).tolist()))
    [0.0, 2.0]
    """

    p: float = 0.5

    def __post_init__(self) -> None:
        check_number(type(self).__name__, "p", self.p, low=0, high=1)

    @property
    def draws(self) -> bool:
        """Whether a call with a key draws from it."""
        return self.p > 0

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        shape = self._mask_shape(x)
        if key is None or self.p == 0:
            return x
        if self.p == 1:
            return torch.zeros_like(x)
        return self._drop(x, random.bernoulli(key, 1 - self.p, shape))

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        """One draw for each element; broadcasts to x."""
        return tuple(x.shape)

    def _drop(self, x: Tensor, kept: Tensor) -> Tensor:
        return torch.where(kept, x / (1 - self.p), 0.0)


@dataclass(frozen=True)
class Dropout1d(Dropout):
    """Dropout of whole channels: (..., c, l) -> the same. ``torch.nn.Dropout1d``.

    >>> y = Dropout1d(0.5)({}, torch.ones(32, 3), key=random.key(0))
    >>> sorted(set(y.sum(-1).tolist()))
    [0.0, 6.0]
    """

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        return _channels("Dropout1d", x, 1)


@dataclass(frozen=True)
class Dropout2d(Dropout):
    """Dropout of whole channels: (..., c, h, w) -> the same. ``torch.nn.Dropout2d``.

    Source: Tompson et al. 2015, section 3.2, arXiv:1411.4280.

    >>> y = Dropout2d(0.5)({}, torch.ones(32, 2, 2), key=random.key(0))
    >>> sorted(set(y.sum((-2, -1)).tolist()))
    [0.0, 8.0]
    """

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        return _channels("Dropout2d", x, 2)


@dataclass(frozen=True)
class Dropout3d(Dropout):
    """Dropout of whole channels: (..., c, d, h, w) -> the same. ``torch.nn.Dropout3d``.

    >>> y = Dropout3d(0.5)({}, torch.ones(32, 1, 2, 2), key=random.key(0))
    >>> sorted(set(y.sum((-3, -2, -1)).tolist()))
    [0.0, 8.0]
    """

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        return _channels("Dropout3d", x, 3)


def _channels(name: str, x: Tensor, dims: int) -> tuple[int, ...]:
    check_shape(x, f"... c {SPACE[dims]}", f"{name}: x")
    return (*x.shape[:-dims], *(1,) * dims)


@dataclass(frozen=True)
class DropPath(Dropout):
    """Stochastic depth: sets whole examples to zero with probability p, scales the others by 1 / (1 - p): (b, ...).

    For the branch of a residual block: ``Residual(Sequential(block, DropPath(0.1)))``.

    Source: Huang et al. 2016, arXiv:1603.09382; scaled in training, as dropout is, instead of in evaluation.

    >>> y = DropPath(0.5)({}, torch.ones(32, 3), key=random.key(0))
    >>> sorted(set(y.sum(-1).tolist()))
    [0.0, 6.0]
    """

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        axes = " ".join(f"n{i}" for i in range(1, getattr(x, "ndim", 1)))
        check_shape(x, f"b {axes}", "DropPath: x")
        return (*x.shape[:1], *(1,) * (x.ndim - 1))


@dataclass(frozen=True)
class AlphaDropout(Dropout):
    """Dropout to the value at which SELU saturates; mean 0 and variance 1 stay so: (...) -> (...).

    a (x or alpha') + b with alpha' = -1.7581, a = ((1 - p) (1 + p alpha'^2))^(-1/2), b = -a p alpha'.
    ``torch.nn.AlphaDropout``. Source: Klambauer et al. 2017, section "New dropout technique", arXiv:1706.02515.

    >>> y = AlphaDropout(0.5)({}, torch.zeros(64), key=random.key(0))
    >>> [round(value, 4) for value in sorted(set(y.tolist()))]
    [-0.7792, 0.7792]
    """

    def _drop(self, x: Tensor, kept: Tensor) -> Tensor:
        a = 1 / math.sqrt((1 - self.p) * (1 + self.p * _SATURATED**2))
        return torch.where(kept, a * x, a * _SATURATED) - a * self.p * _SATURATED


@dataclass(frozen=True)
class FeatureAlphaDropout(AlphaDropout):
    """:class:`AlphaDropout` of whole channels: (b, c, ...) -> the same. ``torch.nn.FeatureAlphaDropout``.

    >>> y = FeatureAlphaDropout(0.5)({}, torch.zeros(2, 8, 3), key=random.key(0))
    >>> bool((y == y[..., :1]).all()), len(y.unique())
    (True, 2)
    """

    def _mask_shape(self, x: Tensor) -> tuple[int, ...]:
        axes = " ".join(f"n{i}" for i in range(2, getattr(x, "ndim", 2)))
        check_shape(x, f"b c {axes}", "FeatureAlphaDropout: x")
        return (*x.shape[:2], *(1,) * (x.ndim - 2))


_SATURATED = -1.7580993408473766  # SELU at minus infinity
