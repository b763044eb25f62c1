"""Which times a model is trained at: distributions on [0, 1], to be drawn from with a key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_number
from functorch_gen.noise import NoiseSchedule
from functorch_gen.typing import Key

__all__ = ["LogNormalTime", "LogitNormalTime", "StratifiedTime", "TimeSampler", "UniformTime"]


class TimeSampler(Protocol):
    """Draws training times in [0, 1]."""

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32, /) -> Tensor:
        """Times of the given shape."""
        ...


@dataclass(frozen=True)
class UniformTime:
    """Independent times, uniform on [low, high).

    >>> UniformTime(0.5)(random.key(0), (3,)).min() >= 0.5
    tensor(True)
    """

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"UniformTime: expected 0 <= low < high <= 1, got low={self.low}, high={self.high}")

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape."""
        return self.low + (self.high - self.low) * random.uniform(key, shape, dtype)


@dataclass(frozen=True)
class StratifiedTime:
    """Times uniform on [0, 1), one in each of b equal intervals of a batch: the loss has less variance.

    Source: Kingma et al. 2021, appendix I.1, arXiv:2107.00630.

    >>> (4 * StratifiedTime()(random.key(0), (4,))).floor().sort().values
    tensor([0., 1., 2., 3.])
    """

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape; the first axis is the batch."""
        b, *rest = shape
        offset = torch.arange(b, dtype=dtype, device=key.device).reshape(b, *[1] * len(rest)) / b
        return (random.uniform(key, (1, *rest), dtype) + offset) % 1


@dataclass(frozen=True)
class LogitNormalTime:
    """t = sigmoid(mean + std normal): most times in the middle.

    Source: Esser et al. 2024, section 3.1, arXiv:2403.03206.

    >>> LogitNormalTime(std=0.1)(random.key(0), (100,)).sub(0.5).abs().max() < 0.1
    tensor(True)
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        check_number("LogitNormalTime", "std", self.std, low=0)

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape."""
        return torch.sigmoid(self.mean + self.std * random.normal(key, shape, dtype))


@dataclass(frozen=True)
class LogNormalTime:
    """The times of ``schedule`` at which ln(sigma / alpha) is mean + std normal, cut off at its ends.

    Source: Karras et al. 2022, table 1 (P_mean, P_std), arXiv:2206.00364.

    >>> from functorch_gen.noise import EDM
    >>> LogNormalTime(EDM(), std=0.0)(random.key(0), (1,)).allclose(EDM().t_of(torch.tensor([-1.2]).exp()))
    True
    """

    schedule: NoiseSchedule
    mean: float = -1.2
    std: float = 1.2

    def __post_init__(self):
        check_number("LogNormalTime", "std", self.std, low=0)

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape."""
        return self.schedule.t_of((self.mean + self.std * random.normal(key, shape, dtype)).exp())
