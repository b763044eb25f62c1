"""Dropout: noise that a key switches on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.typing import Key, Params

__all__ = ["Dropout"]


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
        if not 0 <= self.p <= 1:
            raise ValueError(f"Dropout: expected 0 <= p <= 1, got {self.p}")

    @property
    def draws(self) -> bool:
        """Whether a call with a key draws from it."""
        return self.p > 0

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        if key is None or self.p == 0:
            return x
        if self.p == 1:
            return torch.zeros_like(x)
        kept = random.bernoulli(key, 1 - self.p, tuple(x.shape))
        return torch.where(kept, x / (1 - self.p), 0.0)
