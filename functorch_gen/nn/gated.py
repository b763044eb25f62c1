"""The gated perceptron of transformers: SwiGLU, GeGLU and their kin."""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from functorch_gen.nn.dropout import Dropout
from functorch_gen.nn.linear import Linear
from functorch_gen.nn.parts import Bound, init_parts
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Layer, Params

__all__ = ["GatedMLP"]


@dataclass(frozen=True)
class GatedMLP:
    """down(activation(gate(x)) * up(x)): (..., in_features) -> (..., out_features).

    SwiGLU with ``F.silu``, GeGLU with ``F.gelu``, ReGLU with ``F.relu``, GLU with ``torch.sigmoid``. With 2/3 of the
    hidden features it has as many parameters as an :class:`MLP` of one hidden layer.

    Args:
        bias: of the three linear layers.
        dropout: probability of dropping a hidden unit, when a key is given.
        gain: scales the initial last layer; with 0 the network starts as the zero map.
    Source: Shazeer 2020, eq. 6, arXiv:2002.05202.

    >>> import torch
    >>> from functorch_gen import random
    >>> layer = GatedMLP(3, 8, 3, activation=F.gelu)
    >>> params = layer.init(random.key(0))
    >>> sorted(params), layer(params, torch.ones(5, 3)).shape
    (['down', 'gate', 'up'], torch.Size([5, 3]))
    """

    in_features: int
    hidden_features: int
    out_features: int
    activation: Callable[[Tensor], Tensor] = F.silu
    bias: bool = True
    dropout: float = 0.0
    gain: float = 1.0

    def __post_init__(self) -> None:
        check_sizes("GatedMLP", in_features=self.in_features, hidden_features=self.hidden_features)
        check_sizes("GatedMLP", out_features=self.out_features)
        if not callable(self.activation):
            raise TypeError(f"GatedMLP: expected activation to be a function, got {self.activation!r}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"GatedMLP: expected 0 <= dropout <= 1, got {self.dropout}")

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        return {
            "gate": Linear(self.in_features, self.hidden_features, self.bias),
            "up": Linear(self.in_features, self.hidden_features, self.bias),
            "dropout": Dropout(self.dropout),
            "down": Linear(self.hidden_features, self.out_features, self.bias, self.gain),
        }

    def init(self, key: Key) -> Params:
        """Draws the parameters of the sublayers."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        f = Bound(self.parts, params, key=key)
        return f.down(f.dropout(self.activation(f.gate(x)) * f.up(x)))
