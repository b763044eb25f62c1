"""Vectors for indices and for real numbers: lookup tables, sinusoidal and Fourier features."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.nn.parts import entry, name_key
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["Embedding", "FourierFeatures", "SinusoidalFeatures"]


@dataclass(frozen=True)
class Embedding:
    """Rows of a table: (...) integers -> (..., embedding_dim).

    Equals ``torch.nn.Embedding``, initial distribution included.

    Args:
        padding_idx: this row starts at zero and gets no gradient, neither in reverse nor in forward mode.

    >>> layer = Embedding(10, 4)
    >>> layer(layer.init(random.key(0)), torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 4])
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        n = self.num_embeddings
        check_sizes("Embedding", num_embeddings=n, embedding_dim=self.embedding_dim)
        if self.padding_idx is not None and not -n <= self.padding_idx < n:
            raise ValueError(f"Embedding: expected -{n} <= padding_idx < {n}, got {self.padding_idx}")

    def init(self, key: Key) -> Params:
        """``weight`` (num_embeddings, embedding_dim): N(0, 1), zeros in the padding row."""
        weight = random.normal(name_key(key, "weight"), (self.num_embeddings, self.embedding_dim))
        if self.padding_idx is not None:
            rows = rearrange(torch.arange(self.num_embeddings, device=weight.device), "n -> n 1")
            weight = torch.where(rows == self.padding_idx % self.num_embeddings, 0.0, weight)
        return {"weight": weight}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) integers in [0, num_embeddings) -> (..., embedding_dim)."""
        if not isinstance(x, Tensor) or x.dtype not in (torch.int64, torch.int32):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"Embedding: x: expected an int64 or int32 tensor, got {got}")
        y = F.embedding(x, entry("Embedding", params, "weight"))
        if self.padding_idx is None:
            return y
        padding = rearrange(x == self.padding_idx % self.num_embeddings, "... -> ... 1")
        return torch.where(padding, y.detach(), y)


@dataclass(frozen=True)
class SinusoidalFeatures:
    """Cosines and sines of a number at geometrically spaced frequencies: (...) -> (..., features).

    [cos(w_i s t), sin(w_i s t)] with w_i = max_period^(-i / half), i = 0 .. half - 1, half = features / 2.

    Args:
        features: how many; even.
        scale: s; 1000 for a time in [0, 1], where the cited paper counts 1000 steps.
    Source: Vaswani et al. 2017, section 3.5, arXiv:1706.03762; in this order: Dhariwal and Nichol 2021,
    arXiv:2105.05233.

    >>> SinusoidalFeatures(4)({}, torch.zeros(2))
    tensor([[1., 1., 0., 0.],
            [1., 1., 0., 0.]])
    """

    features: int
    max_period: float = 10000.0
    scale: float = 1.0

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_even("SinusoidalFeatures", self.features)
        check_positive("SinusoidalFeatures", max_period=self.max_period, scale=self.scale)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (..., features), in the dtype of ``x``; float32 for integers."""
        half = self.features // 2
        dtype = torch.promote_types(x.dtype, torch.float32)
        index = torch.arange(half, dtype=dtype, device=x.device)
        frequency = self.scale * torch.exp(-math.log(self.max_period) / half * index)
        return _cos_sin(rearrange(x.to(dtype), "... -> ... 1") * frequency).to(_floating(x))


@dataclass(frozen=True)
class FourierFeatures:
    """Cosines and sines of random projections: (..., in_features) -> (..., features).

    [cos(2 pi B x), sin(2 pi B x)] with B (features / 2, in_features) ~ N(0, std^2), fixed by ``seed``: no parameters.
    The frequencies are the same in every precision. A time (b,) goes in as (b, 1).

    Source: Tancik et al. 2020, eq. 5, arXiv:2006.10739.

    >>> FourierFeatures(1, 6, std=16.0)({}, torch.zeros(2, 1)).abs()
    tensor([[1., 1., 1., 0., 0., 0.],
            [1., 1., 1., 0., 0., 0.]])
    """

    in_features: int
    features: int
    std: float = 1.0
    seed: int = 0

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("FourierFeatures", in_features=self.in_features)
        _check_even("FourierFeatures", self.features)
        check_positive("FourierFeatures", std=self.std)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def frequencies(self) -> Tensor:
        """B, in cycles per unit of the input: (features / 2, in_features) float32."""
        return self.std * random.normal(random.key(self.seed), (self.features // 2, self.in_features))

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., in_features) -> (..., features)."""
        check_floating(x, "FourierFeatures: x")
        check_shape(x, "... in_features", "FourierFeatures: x", in_features=self.in_features)
        dtype = torch.promote_types(x.dtype, torch.float32)
        frequencies = self.frequencies().to(device=x.device, dtype=dtype)
        return _cos_sin(2 * math.pi * F.linear(x.to(dtype), frequencies)).to(x.dtype)


def _check_even(name: str, features: int) -> None:
    check_sizes(name, features=features)
    if features % 2:
        raise ValueError(f"{name}: expected features to be even, got {features}")


def _cos_sin(angle: Tensor) -> Tensor:
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def _floating(x: Tensor) -> torch.dtype:
    return x.dtype if torch.is_floating_point(x) else torch.float32
