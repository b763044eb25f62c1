"""Networks of two halves: one makes a code of its input, the other an output of the code."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.nn import (
    MLP,
    Bound,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    Linear,
    Sequential,
    Unflatten,
    init_parts,
    is_stateful,
)
from functorch_gen.nn.sizes import check_sizes, freeze
from functorch_gen.typing import Key, Layer, Params

__all__ = ["Autoencoder", "ConvAutoencoder", "EncoderDecoder"]


class _Halves:
    """What the networks here share: they differ in ``parts``, which has an "encoder" and a "decoder"."""

    parts: Any

    def init(self, key: Key) -> Params:
        """``{"encoder": ..., "decoder": ...}``."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Any, *, key: Key | None = None) -> Any:
        """decode(encode(x))."""
        return self.decode(params, self.encode(params, x, key=key), key=key)

    def encode(self, params: Params, x: Any, *, key: Key | None = None) -> Any:
        """The code of ``x``."""
        return Bound(self.parts, params, key=key).encoder(x)

    def decode(self, params: Params, code: Any, *, key: Key | None = None) -> Any:
        """What the decoder makes of a code."""
        return Bound(self.parts, params, key=key).decoder(code)


@dataclass(frozen=True)
class EncoderDecoder(_Halves):
    """Any two layers one after the other, which are also called alone: ``encode(params, x)``, ``decode(params, code)``.

    Raises:
        TypeError: if one is no layer, or has state.

    >>> import torch
    >>> from functorch_gen import random
    >>> net = EncoderDecoder(Linear(4, 2), Linear(2, 3))
    >>> params = net.init(random.key(0))
    >>> net.encode(params, torch.ones(5, 4)).shape, net(params, torch.ones(5, 4)).shape
    (torch.Size([5, 2]), torch.Size([5, 3]))
    """

    encoder: Layer
    decoder: Layer

    def __post_init__(self) -> None:
        for name, layer in self.parts.items():
            if not isinstance(layer, Layer) or is_stateful(layer):
                raise TypeError(f"EncoderDecoder: expected {name} to be a layer without state, got {layer!r}")

    @property
    def parts(self) -> dict[str, Layer]:
        """The halves by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}


@dataclass(frozen=True)
class Autoencoder(_Halves):
    """Two perceptrons that meet in a narrow code: (..., in_features) -> (..., in_features).

    The decoder has the encoder's widths in the opposite order. Without hidden layers and with squared error it finds
    the principal components: the code spans the first ``latent_features`` of them.

    Source: Hinton and Salakhutdinov 2006, Science 313; Baldi and Hornik 1989, Neural Networks 2.

    >>> import torch
    >>> from functorch_gen import random
    >>> net = Autoencoder(64, 8, hidden_features=(32,))
    >>> params = net.init(random.key(0))
    >>> net.encode(params, torch.ones(5, 64)).shape, net(params, torch.ones(5, 64)).shape
    (torch.Size([5, 8]), torch.Size([5, 64]))
    """

    in_features: int
    latent_features: int
    hidden_features: Sequence[int] = (128,)
    activation: Callable[[Tensor], Tensor] = F.silu
    dropout: float = 0.0

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("Autoencoder", in_features=self.in_features, latent_features=self.latent_features)
        if self.hidden_features:
            check_sizes("Autoencoder", dims=len(self.hidden_features), hidden_features=self.hidden_features)

    @property
    def parts(self) -> dict[str, Layer]:
        """The halves by name."""
        n, m, hidden = self.in_features, self.latent_features, self.hidden_features
        return {
            "encoder": MLP(n, hidden, m, activation=self.activation, dropout=self.dropout),
            "decoder": MLP(m, hidden[::-1], n, activation=self.activation, dropout=self.dropout),
        }


@dataclass(frozen=True)
class ConvAutoencoder(_Halves):
    """Strided convolutions down to a code, transposed ones up again: (..., c, h, w) -> (..., c, h, w).

    Each entry of ``channels`` halves height and width; a linear layer makes the code of what is left.

    Args:
        image_size: height and width, or one number for both; multiples of 2^len(channels).
    Raises:
        ValueError: for sizes that are not positive, or an image size that cannot be halved so often.

    Source: Masci et al. 2011, Stacked convolutional auto-encoders.

    >>> import torch
    >>> from functorch_gen import random
    >>> net = ConvAutoencoder(1, 8, image_size=8, channels=(4, 8))
    >>> params, x = net.init(random.key(0)), torch.ones(5, 1, 8, 8)
    >>> net.encode(params, x).shape, net(params, x).shape
    (torch.Size([5, 8]), torch.Size([5, 1, 8, 8]))
    """

    in_channels: int
    latent_features: int
    image_size: int | Sequence[int]
    channels: Sequence[int] = (32, 64)
    activation: Callable[[Tensor], Tensor] = F.silu

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("ConvAutoencoder", in_channels=self.in_channels, latent_features=self.latent_features)
        check_sizes("ConvAutoencoder", dims=len(self.channels), channels=self.channels)
        check_sizes("ConvAutoencoder", dims=2, image_size=self.image_size)
        if any(size % 2 ** len(self.channels) for size in self._image):
            factor = 2 ** len(self.channels)
            raise ValueError(f"ConvAutoencoder: expected image_size divisible by {factor}, got {self.image_size}")

    @property
    def _image(self) -> tuple[int, int]:
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def parts(self) -> dict[str, Layer]:
        """The halves by name: sequences of layers."""
        widths = (self.in_channels, *self.channels)
        h, w = (size // 2 ** len(self.channels) for size in self._image)
        features = widths[-1] * h * w
        down = [(Conv2d(n, m, 3, stride=2, padding=1), self.activation) for n, m in pairwise(widths)]
        up = [(self.activation, ConvTranspose2d(m, n, 4, stride=2, padding=1)) for n, m in pairwise(widths)]
        return {
            "encoder": Sequential(*sum(down, ()), Flatten(-3), Linear(features, self.latent_features)),
            "decoder": Sequential(
                Linear(self.latent_features, features), Unflatten(-1, (widths[-1], h, w)), *sum(up[::-1], ())
            ),
        }

    def encode(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """The code of images: (..., c, h, w) -> (..., latent_features)."""
        h, w = self._image
        check_shape(x, "... c h w", "ConvAutoencoder: x", c=self.in_channels, h=h, w=w)
        return super().encode(params, x, key=key)
