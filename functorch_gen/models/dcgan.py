"""Convolutional generator and discriminator of images, conditioned on a class if wanted; stateless."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from functorch_gen.check import check_shape
from functorch_gen.models.labels import check_integer
from functorch_gen.nn import (
    Bound,
    Conv2d,
    ConvTranspose2d,
    Embedding,
    Flatten,
    Linear,
    MinibatchStdDev,
    Unflatten,
    init_parts,
)
from functorch_gen.nn.sizes import check_sizes, freeze, per_axis
from functorch_gen.typing import Key, Layer, Params

__all__ = ["DCGANDiscriminator", "DCGANGenerator", "PlainResBlock"]


def _activation(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


@dataclass(frozen=True)
class PlainResBlock:
    """x + conv2(act(conv1(act(x)))) without normalisation, act = leaky ReLU: (b, c, h, w) -> (b, c, h, w).

    At initialisation the identity.

    Source: Huang et al. 2024 (R3GAN), arXiv:2501.05441, whose blocks have a bottleneck.

    >>> from functorch_gen import random
    >>> block, x = PlainResBlock(4), torch.ones(1, 4, 2, 2)
    >>> bool((block(block.init(random.key(0)), x) == x).all())
    True
    """

    channels: int

    def __post_init__(self) -> None:
        check_sizes("PlainResBlock", channels=self.channels)

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        c = self.channels
        return {"conv1": Conv2d(c, c, 3, padding=1), "conv2": Conv2d(c, c, 3, padding=1, gain=0.0)}

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """Applies the block."""
        f = Bound(self.parts, params)
        return x + f.conv2(_activation(f.conv1(_activation(x))))


@dataclass(frozen=True)
class _DCGAN:
    """What both share: images of one size, and channels from the full resolution to the lowest."""

    image_channels: int
    image_size: int | Sequence[int]
    channels: Sequence[int] = (64, 128)
    num_blocks: int = 0
    num_classes: int | None = None

    def __post_init__(self) -> None:
        freeze(self)
        name = type(self).__name__
        check_sizes(name, image_channels=self.image_channels)
        if self.num_classes is not None:
            check_sizes(name, num_classes=self.num_classes)
        check_sizes(name, dims=len(self.channels), channels=self.channels)
        check_sizes(name, dims=2, image_size=self.image_size)
        check_sizes(name, minimum=0, num_blocks=self.num_blocks)
        factor = 2 ** (len(self.channels) - 1)
        if any(size % factor for size in per_axis(self.image_size, 2)):
            raise ValueError(f"{name}: expected image_size divisible by {factor}, got {self.image_size}")

    @property
    def _lowest(self) -> tuple[int, int, int]:
        """Channels, height and width at the lowest resolution."""
        h, w = (size // 2 ** (len(self.channels) - 1) for size in per_axis(self.image_size, 2))
        return self.channels[-1], h, w

    @property
    def _blocks(self) -> dict[str, Layer]:
        return {f"block{n}_{i}": PlainResBlock(c) for n, c in enumerate(self.channels) for i in range(self.num_blocks)}

    def _at_level(self, f: Bound, level: int, h: Tensor) -> Tensor:
        for i in range(self.num_blocks):
            h = f[f"block{level}_{i}"](h)
        return h

    def _check_label(self, label: Tensor | None, b: int) -> None:
        name = f"{type(self).__name__}: label"
        if (label is None) != (self.num_classes is None):
            want = "no label without num_classes" if self.num_classes is None else "labels (b,)"
            raise ValueError(f"{name}: expected {want}, got {None if label is None else tuple(label.shape)}")
        if label is not None:
            check_integer(label, name)
            check_shape(label, "b", name, b=b)


@dataclass(frozen=True)
class DCGANGenerator(_DCGAN):
    """Latents to images: (b, latent_dim), labels (b,) -> (b, image_channels, h, w).

    A linear layer makes the lowest resolution; transposed convolutions double it. In place of DCGAN's batch
    normalisation, which ties the examples of a batch together, there may be residual blocks.

    Args:
        image_size: height and width, or one number for both; multiples of 2^(len(channels) - 1).
        channels: of each resolution, the image's own first.
        num_blocks: :class:`PlainResBlock` at each resolution; 0 is DCGAN's layout, 1 or more R3GAN's.
        num_classes: None: without labels. Else a learned vector of the label joins the latent.
        output: what the last layer's values go through; tanh keeps images in (-1, 1), whose ends it never reaches.
    Raises:
        ValueError: for sizes that are not positive, or an image size that cannot be halved so often.

    Source: Radford et al. 2016, section 3, arXiv:1511.06434.

    >>> from functorch_gen import random
    >>> net = DCGANGenerator(1, 8, channels=(8, 16), num_classes=10, latent_dim=4)
    >>> net(net.init(random.key(0)), torch.ones(5, 4), torch.arange(5)).shape
    torch.Size([5, 1, 8, 8])
    """

    latent_dim: int = 64
    output: Callable[[Tensor], Tensor] = torch.tanh

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("DCGANGenerator", latent_dim=self.latent_dim)

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        d, lowest = self.latent_dim, self._lowest
        parts: dict[str, Layer] = {"start": Linear(d, math.prod(lowest)), "unflatten": Unflatten(-1, lowest)}
        if self.num_classes is not None:
            parts |= {"embed": Embedding(self.num_classes, d), "start": Linear(2 * d, math.prod(lowest))}
        for level, (c_out, c_in) in enumerate(pairwise(self.channels)):
            parts[f"up{level}"] = ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1)
        return {**parts, **self._blocks, "head": Conv2d(self.channels[0], self.image_channels, 3, padding=1)}

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, z: Tensor, label: Tensor | None = None, *, key: Key | None = None) -> Tensor:
        """Draws nothing: z is the randomness."""
        b = check_shape(z, "b d", "DCGANGenerator: z", d=self.latent_dim)["b"]
        self._check_label(label, b)
        f = Bound(self.parts, params)
        h = f.unflatten(f.start(z if label is None else torch.cat([z, f.embed(label)], 1)))
        for level in reversed(range(len(self.channels))):
            h = self._at_level(f, level, h)
            h = f[f"up{level - 1}"](_activation(h)) if level else h
        return self.output(f.head(_activation(h)))


@dataclass(frozen=True)
class DCGANDiscriminator(_DCGAN):
    """Images to logits, high for real ones: (b, image_channels, h, w), labels (b,) -> (b,).

    Strided convolutions halve the resolution. With c features phi(x) the logit is w^T phi(x) + b, and v_y^T phi(x) / c
    more with a label y: a projection discriminator.

    Args:
        image_size, channels, num_blocks: as of :class:`DCGANGenerator`.
        num_classes: None: without labels.
        group_size: of :class:`functorch_gen.nn.MinibatchStdDev`, which then joins the features; 0: none.
    Raises:
        ValueError: for sizes that are not positive, or an image size that cannot be halved so often.

    Source: Radford et al. 2016, section 3, arXiv:1511.06434; Miyato and Koyama 2018, arXiv:1802.05637.

    >>> from functorch_gen import random
    >>> net = DCGANDiscriminator(1, 8, channels=(8, 16), num_classes=10)
    >>> net(net.init(random.key(0)), torch.ones(5, 1, 8, 8), torch.arange(5)).shape
    torch.Size([5])
    """

    group_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("DCGANDiscriminator", minimum=0, group_size=self.group_size)

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        c, h, w = self._lowest
        parts: dict[str, Layer] = {"stem": Conv2d(self.image_channels, self.channels[0], 3, padding=1)}
        for level, (c_in, c_out) in enumerate(pairwise(self.channels)):
            parts[f"down{level}"] = Conv2d(c_in, c_out, 4, stride=2, padding=1)
        if self.group_size:
            parts["stddev"] = MinibatchStdDev(self.group_size)
        if self.num_classes is not None:
            parts["embed"] = Embedding(self.num_classes, c)
        features = Linear((c + bool(self.group_size)) * h * w, c)
        return {**parts, **self._blocks, "flatten": Flatten(1), "features": features, "head": Linear(c, 1)}

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, label: Tensor | None = None, *, key: Key | None = None) -> Tensor:
        """The logits."""
        h, w = per_axis(self.image_size, 2)
        b = check_shape(x, "b c h w", "DCGANDiscriminator: x", c=self.image_channels, h=h, w=w)["b"]
        self._check_label(label, b)
        f = Bound(self.parts, params)
        y = f.stem(x)
        for level in range(len(self.channels)):
            y = f[f"down{level - 1}"](_activation(y)) if level else y
            y = self._at_level(f, level, y)
        y = f.stddev(_activation(y)) if self.group_size else _activation(y)
        phi = _activation(f.features(f.flatten(y)))
        logit = f.head(phi)[:, 0]
        return logit if label is None else logit + (f.embed(label) * phi).mean(1)
