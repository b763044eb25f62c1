"""Where in its sequence a vector stands: vectors that are added to it, rotations of queries and keys, biases."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.nn.parts import entry, name_key
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["LearnedPositions", "SinusoidalPositions", "alibi_bias", "apply_rotary"]


@dataclass(frozen=True)
class LearnedPositions:
    """Adds a learned vector for each position: (..., l, features) -> (..., l, features), l at most ``max_length``.

    Args:
        std: deviation of the initial vectors, 0.02 as in GPT-2 and the vision transformer.
    Source: Gehring et al. 2017, section 3.1, arXiv:1705.03122.

    >>> layer = LearnedPositions(10, 4)
    >>> layer(layer.init(random.key(0)), torch.zeros(2, 3, 4)).shape
    torch.Size([2, 3, 4])
    """

    max_length: int
    features: int
    std: float = 0.02

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("LearnedPositions", max_length=self.max_length, features=self.features)
        check_positive("LearnedPositions", std=self.std)

    def init(self, key: Key) -> Params:
        """``weight`` (max_length, features): N(0, std^2)."""
        return {"weight": self.std * random.normal(name_key(key, "weight"), (self.max_length, self.features))}

    def __call__(self, params: Params, x: Tensor, *, positions: Tensor | None = None, key: Key | None = None) -> Tensor:
        """(..., l, features) -> (..., l, features).

        Args:
            positions: (..., l) integers, those from ``max_length`` on are taken for the last; 0 .. l - 1 when None.
        """
        length = check_shape(x, "... l features", "LearnedPositions: x", features=self.features)["l"]
        weight = entry("LearnedPositions", params, "weight")
        if positions is not None:
            return x + weight[positions.clamp(max=self.max_length - 1)]
        if length > self.max_length:
            raise ValueError(
                f"LearnedPositions: x: expected at most max_length={self.max_length} positions, got {length}"
            )
        return x + weight[:length]


@dataclass(frozen=True)
class SinusoidalPositions:
    """Adds sines and cosines of each position: (..., l, features) -> (..., l, features), any l.

    Channel 2i: sin(p / max_period^(2i / features)), channel 2i + 1: the cosine of the same.

    Source: Vaswani et al. 2017, section 3.5, arXiv:1706.03762.

    >>> SinusoidalPositions(4)({}, torch.zeros(2, 4))
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])
    """

    features: int
    max_period: float = 10000.0

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_even("SinusoidalPositions", "features", self.features)
        check_positive("SinusoidalPositions", max_period=self.max_period)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, positions: Tensor | None = None, key: Key | None = None) -> Tensor:
        """(..., l, features) -> (..., l, features); ``positions`` (..., l) are 0 .. l - 1 when None."""
        check_floating(x, "SinusoidalPositions: x")
        length = check_shape(x, "... l features", "SinusoidalPositions: x", features=self.features)["l"]
        positions = torch.arange(length, device=x.device) if positions is None else positions
        angle = _angles(positions, self.features, self.max_period, x.dtype)
        return x + rearrange(torch.stack([angle.sin(), angle.cos()], -1), "... d two -> ... (d two)").to(x.dtype)


def apply_rotary(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotates each pair of channels by an angle proportional to the position: (..., l, d), (..., l) -> (..., l, d).

    Channels (2i, 2i + 1), as one complex number, are multiplied by exp(j p base^(-2i / d)): pairs are neighbours, as
    in the paper, and not channels i and i + d / 2, as elsewhere. Products q.k of rotated vectors depend on the
    difference of their positions only.

    Args:
        positions: numbers that broadcast to x's axes but the last.
    Raises:
        ValueError: if d is odd, or the base is not positive.
    Source: Su et al. 2021, eq. 15 and 34, arXiv:2104.09864.

    >>> apply_rotary(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
    tensor([[1.0000, 0.0000],
            [0.5403, 0.8415]])
    """
    check_floating(x, "apply_rotary: x")
    check_positive("apply_rotary", base=base)
    d = check_shape(x, "... l d", "apply_rotary: x")["d"]
    _check_even("apply_rotary", "d", d)
    angle = _angles(positions, d, base, x.dtype)
    cos, sin = angle.cos(), angle.sin()
    real, imaginary = rearrange(x.to(angle.dtype), "... (d two) -> two ... d", two=2)
    rotated = torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], -1)
    return rearrange(rotated, "... d two -> ... (d two)").to(x.dtype)


def _angles(positions: Tensor, d: int, base: float, dtype: torch.dtype) -> Tensor:
    """p base^(-2i / d): (..., l) -> (..., l, d / 2), at least in float32."""
    dtype = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, d, 2, dtype=dtype, device=positions.device)
    return rearrange(positions.to(dtype), "... -> ... 1") * torch.exp(-math.log(base) / d * even)


def alibi_bias(
    num_heads: int, positions: Tensor, key_positions: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """-slope_h |p_i - p_j|, to be added to attention's scores: (..., l), (..., s) -> (..., num_heads, l, s).

    The slopes are 2^(-8 h / num_heads), h = 1 .. num_heads; where their number is no power of two, those of the power
    below and then every second one of the power above, as the authors have it.

    Args:
        positions: of the queries.
        key_positions: of the keys; ``positions`` when None.
    Source: Press et al. 2022, section 3, arXiv:2108.12409.

    >>> alibi_bias(2, torch.arange(2))
    tensor([[[-0.0000, -0.0625],
             [-0.0625, -0.0000]],
    <BLANKLINE>
            [[-0.0000, -0.0039],
             [-0.0039, -0.0000]]])
    """
    check_sizes("alibi_bias", num_heads=num_heads)
    key_positions = positions if key_positions is None else key_positions
    distance = rearrange(positions, "... l -> ... 1 l 1") - rearrange(key_positions, "... s -> ... 1 1 s")
    slopes = torch.tensor(_alibi_slopes(num_heads), dtype=dtype, device=positions.device)
    return -rearrange(slopes, "h -> h 1 1") * distance.abs()


def _alibi_slopes(num_heads: int) -> list[float]:
    power = 2 ** (num_heads.bit_length() - 1)
    slopes = [2 ** (-8 * h / power) for h in range(1, power + 1)]
    return slopes + [2 ** (-4 * h / power) for h in range(1, 2 * (num_heads - power), 2)]


def _check_even(name: str, argument: str, size: int) -> None:
    check_sizes(name, **{argument: size})
    if size % 2:
        raise ValueError(f"{name}: expected {argument} to be even, got {size}")
