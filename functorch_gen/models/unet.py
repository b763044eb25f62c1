"""U-Net: image to image, for diffusion and flows conditioned on time and class, for segmentation on nothing."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.models.labels import check_integer
from functorch_gen.nn import (
    Bound,
    Conv2d,
    Dropout,
    Embedding,
    GroupNorm,
    Identity,
    Linear,
    MultiHeadAttention,
    SinusoidalFeatures,
    draws,
    init_parts,
)
from functorch_gen.nn.sizes import check_sizes, freeze
from functorch_gen.transforms import remat
from functorch_gen.transforms.context import is_transformed
from functorch_gen.typing import Key, Layer, Params

__all__ = ["Remat", "ResBlock", "SpatialAttention", "Stage", "UNet"]


@dataclass(frozen=True)
class SpatialAttention:
    """Residual self-attention between the pixels of an image: (b, c, h, w) -> (b, c, h, w).

    At initialisation the identity.

    >>> from functorch_gen import random
    >>> layer = SpatialAttention(8, num_heads=2)
    >>> x = torch.ones(1, 8, 4, 4)
    >>> bool((layer(layer.init(random.key(0)), x) == x).all())
    True
    """

    channels: int
    num_heads: int
    num_groups: int = 8

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        return {
            "norm": GroupNorm(self.num_groups, self.channels),
            "attention": MultiHeadAttention(self.channels, self.num_heads, gain=0.0),  # starts as the zero map
        }

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """x + attention(norm(x))."""
        f = Bound(self.parts, params, key=key)
        pixels = rearrange(f.norm(x), "b c h w -> b (h w) c")
        return x + rearrange(f.attention(pixels), "b (h w) c -> b c h w", h=x.shape[-2])


@dataclass(frozen=True)
class ResBlock:
    """Residual block modulated by an embedding: (b, c_in, h, w), (b, d) -> (b, c_out, h, w).

    h = conv1(silu(norm1(x))), y = skip(x) + conv2(silu((1 + scale) norm2(h) + shift)); scale and shift are linear in
    the embedding. At initialisation y = skip(x). With ``num_heads`` > 0 attention between the pixels follows; with
    ``embed_dim`` 0 there is no embedding, scale or shift.

    Source: Dhariwal and Nichol 2021, section 3 (adaptive group normalisation), arXiv:2105.05233.

    >>> from functorch_gen import random
    >>> block = ResBlock(8, 16, embed_dim=4)
    >>> block(block.init(random.key(0)), torch.ones(2, 8, 4, 4), torch.ones(2, 4)).shape
    torch.Size([2, 16, 4, 4])
    """

    in_channels: int
    out_channels: int
    embed_dim: int
    num_heads: int = 0
    dropout: float = 0.0
    num_groups: int = 8

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        c_in, c_out, groups = self.in_channels, self.out_channels, self.num_groups
        embed: dict[str, Layer] = {"embed": Linear(self.embed_dim, 2 * c_out)} if self.embed_dim else {}
        return {
            "norm1": GroupNorm(groups, c_in),
            "conv1": Conv2d(c_in, c_out, 3, padding=1),
            **embed,
            "norm2": GroupNorm(groups, c_out),
            "dropout": Dropout(self.dropout),
            "conv2": Conv2d(c_out, c_out, 3, padding=1, gain=0.0),  # starts as the skip alone
            "skip": Identity() if c_in == c_out else Conv2d(c_in, c_out, 1),
            "attention": SpatialAttention(c_out, self.num_heads, groups) if self.num_heads else Identity(),
        }

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, embed: Tensor | None = None, *, key: Key | None = None) -> Tensor:
        """Applies the block; ``key`` draws the dropout."""
        check_shape(x, "b c h w", "ResBlock: x", c=self.in_channels)
        f = Bound(self.parts, params, key=key)
        h = f.norm2(f.conv1(F.silu(f.norm1(x))))
        if self.embed_dim:
            scale, shift = rearrange(f.embed(embed), "b (two c) -> two b c 1 1", two=2)
            h = (1 + scale) * h + shift
        return f.attention(f.skip(x) + f.conv2(f.dropout(F.silu(h))))


@dataclass(frozen=True)
class Remat:
    """A layer whose inner activations are recomputed in the backward pass; same parameters, same values.

    >>> from functorch_gen import random
    >>> sorted(Remat(Linear(2, 3)).init(random.key(0)))
    ['bias', 'weight']
    """

    layer: Layer

    @property
    def draws(self) -> bool:
        """Whether the layer draws from its key."""
        return draws(self.layer)

    def init(self, key: Key) -> Params:
        """Draws the parameters of the layer."""
        return self.layer.init(key)

    def __call__(self, params: Params, x: Any, *args: Any, key: Key | None = None) -> Any:
        """Applies the layer."""
        return remat(self.layer)(params, x, *args, key=key)


@dataclass(frozen=True)
class Stage:
    """Blocks one after another at one resolution: (b, c_in, h, w), (b, d) -> the output of each.

    On the way up, block i also takes the i-th last of ``skips``, concatenated along the channels.

    >>> from functorch_gen import random
    >>> stage = Stage((ResBlock(8, 8, embed_dim=4), ResBlock(8, 8, embed_dim=4)))
    >>> h = stage(stage.init(random.key(0)), torch.ones(2, 8, 4, 4), torch.ones(2, 4))
    >>> [tuple(y.shape) for y in h]
    [(2, 8, 4, 4), (2, 8, 4, 4)]
    """

    blocks: tuple[Layer, ...]

    @property
    def parts(self) -> dict[str, Layer]:
        """The blocks by name: ``block0``, ``block1``, ..."""
        return {f"block{i}": block for i, block in enumerate(self.blocks)}

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(
        self,
        params: Params,
        x: Tensor,
        embed: Tensor | None = None,
        skips: Sequence[Tensor] = (),
        *,
        key: Key | None = None,
    ) -> list[Tensor]:
        """Applies the blocks; ``key`` draws the dropout."""
        f = Bound(self.parts, params, key=key)
        outputs = []
        for i, name in enumerate(self.parts):
            x = f[name](torch.cat([x, skips[-1 - i]], dim=1) if skips else x, embed)
            outputs.append(x)
        return outputs


@dataclass(frozen=True)
class UNet:
    """Image to image of the same size, given time and class: (b, c, h, w), (b,), (b,) -> (b, out_channels, h, w).

    Level l works at 1 / 2^l of the image's height and width with ``base_channels * channel_mults[l]`` channels. Going
    down it has ``num_blocks`` residual blocks, whose outputs the same level going up takes again. Height and width
    may be any multiples of ``factor`` = 2^(levels - 1). At initialisation the output is zero. With ``timed=False`` it
    takes an image alone, and with ``out_channels`` as many logits as there are classes of pixels: for segmentation.

    Args:
        attention_levels: levels whose blocks end in self-attention (that of the last level includes the middle).
        num_classes: labels are 0 .. num_classes - 1, and ``num_classes`` itself means "no class"; None: no labels.
        embed_dim: width of the embedding of time and class; None: 4 ``base_channels``.
        time_scale: highest angular frequency of the time features per unit of t; the lowest is about 1e-4 of it.
        channels_last: lay activations out as (b, h, w, c) in memory; values are unchanged. The faster layout on a CPU,
            eager and compiled; inside a functorch transform, where layouts have no meaning, it does nothing.
        remat: recompute the inside of each block in the backward pass: less memory, about a quarter more time.
        out_channels: as ``in_channels`` when None.
        timed: False: it is called without t.
        num_times: times that each example has, each with features of its own: with 2 and more, t is (b, num_times).
    Raises:
        ValueError: for sizes that do not fit; when called, for x, t or label of a wrong shape.

    Source: Ho et al. 2020, appendix B, arXiv:2006.11239; Dhariwal and Nichol 2021, section 3, arXiv:2105.05233.

    >>> from functorch_gen import random
    >>> unet = UNet(1, base_channels=8, num_classes=10)
    >>> params = unet.init(random.key(0))
    >>> unet(params, torch.ones(2, 1, 8, 8), torch.tensor([0.1, 0.9]), torch.tensor([3, 10])).shape
    torch.Size([2, 1, 8, 8])
    >>> segment = UNet(3, base_channels=8, out_channels=5, timed=False)
    >>> segment(segment.init(random.key(0)), torch.ones(2, 3, 8, 8)).shape
    torch.Size([2, 5, 8, 8])
    """

    in_channels: int
    base_channels: int = 64
    channel_mults: tuple[int, ...] = (1, 2)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_heads: int = 4
    num_classes: int | None = None
    dropout: float = 0.0
    embed_dim: int | None = None
    num_groups: int = 8
    time_scale: float = 1000.0
    channels_last: bool = False
    remat: bool = False
    out_channels: int | None = None
    timed: bool = True
    num_times: int = 1

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("UNet", in_channels=self.in_channels, base_channels=self.base_channels)
        check_sizes("UNet", channel_mults=self.channel_mults, num_blocks=self.num_blocks)
        check_sizes("UNet", num_heads=self.num_heads, num_groups=self.num_groups, num_times=self.num_times)
        optional = {"num_classes": self.num_classes, "embed_dim": self.embed_dim, "out_channels": self.out_channels}
        check_sizes("UNet", **{name: size for name, size in optional.items() if size is not None})
        check_positive("UNet", time_scale=self.time_scale)
        if self.base_channels % 2:
            raise ValueError(f"UNet: expected base_channels to be even, got {self.base_channels}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"UNet: expected 0 <= dropout <= 1, got {self.dropout}")
        if not set(self.attention_levels) <= set(range(self.levels)):
            raise ValueError(f"UNet: expected attention_levels in 0..{self.levels - 1}, got {self.attention_levels}")
        for level in range(self.levels):
            self._check_divisible(level, "num_groups", self.num_groups)
            if level in self.attention_levels:
                self._check_divisible(level, "num_heads", self.num_heads)

    def _check_divisible(self, level: int, argument: str, n: int) -> None:
        c = self.channels[level]
        if c % n:
            raise ValueError(f"UNet: expected channels of level {level} divisible by {argument}={n}, got {c}")

    @property
    def levels(self) -> int:
        """Number of resolutions."""
        return len(self.channel_mults)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(self.base_channels * mult for mult in self.channel_mults)

    @property
    def factor(self) -> int:
        """What height and width must be divisible by."""
        return 2 ** (self.levels - 1)

    @property
    def _embed_dim(self) -> int:
        if not self.timed and self.num_classes is None:
            return 0
        return 4 * self.base_channels if self.embed_dim is None else self.embed_dim

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name; ``down<l>`` and ``up<l>`` are the stages of level l, which others join."""
        c, d = self.channels, self._embed_dim
        c_out = self.in_channels if self.out_channels is None else self.out_channels
        parts: dict[str, Layer] = {
            "stem": Conv2d(self.in_channels, c[0], 3, padding=1),
            "middle": Stage((self._block(-1), self._block(-1, attend=False))),
            "norm": GroupNorm(self.num_groups, c[0]),
            "head": Conv2d(c[0], c_out, 3, padding=1, gain=0.0),  # starts as the zero map
        }
        if self.timed:
            parts["features"] = SinusoidalFeatures(self.base_channels, scale=self.time_scale)
            parts["time1"], parts["time2"] = Linear(self.num_times * self.base_channels, d), Linear(d, d)
        if self.num_classes is not None:
            parts["label"] = Embedding(self.num_classes + 1, d)
        for level in range(self.levels):
            parts[f"down{level}"] = Stage((self._block(level),) * self.num_blocks)
            parts[f"up{level}"] = Stage((self._block(level, skips=True),) * self.num_blocks)
        for level in range(1, self.levels):
            parts[f"shrink{level}"] = Conv2d(c[level - 1], c[level], 3, stride=2, padding=1)
            parts[f"grow{level}"] = Conv2d(c[level], c[level - 1], 3, padding=1)
        return parts

    def _block(self, level: int, *, skips: bool = False, attend: bool = True) -> Layer:
        c, d = self.channels[level], self._embed_dim
        heads = self.num_heads if attend and level % self.levels in self.attention_levels else 0
        block = ResBlock(2 * c if skips else c, c, d, heads, self.dropout, self.num_groups)
        return Remat(block) if self.remat else block

    def init(self, key: Key) -> Params:
        """Draws the parameters: as torch.nn does, but zeros in the last convolution of each block and in ``head``."""
        return init_parts(self.parts, key)

    def __call__(
        self,
        params: Params,
        x: Tensor,
        t: Tensor | None = None,
        label: Tensor | None = None,
        *,
        key: Key | None = None,
    ) -> Tensor:
        """(b, c, h, w), (b,), (b,) -> (b, out_channels, h, w).

        Args:
            t: time or log noise level, of any range: [0, 1], or ln(sigma) / 4 in EDM; None when not ``timed``. With
                ``num_times`` > 1 (b, num_times).
            label: class of each example, ``num_classes`` for none; None: none for all.
            key: draws the dropout; None: no dropout.
        """
        self._check_inputs(x, t, label)
        f = Bound(self.parts, params, key=key)
        embed = self._embed(f, t, label, x)
        h, skips = f.stem(x), []
        h = _channels_last(h) if self.channels_last else h
        for level in range(self.levels):
            h = f[f"shrink{level}"](h) if level else h
            skips.append(f[f"down{level}"](h, embed))
            h = skips[level][-1]
        h = f.middle(h, embed)[-1]
        for level in reversed(range(self.levels)):
            h = f[f"up{level}"](h, embed, skips[level])[-1]
            h = f[f"grow{level}"](F.interpolate(h, scale_factor=2.0, mode="nearest")) if level else h
        return f.head(F.silu(f.norm(h)))

    def _embed(self, f: Bound, t: Tensor | None, label: Tensor | None, x: Tensor) -> Tensor | None:
        """Time and class as one vector for each example: (b,), (b,) -> (b, d)."""
        features = None if t is None else rearrange(f.features(t).to(x.dtype), "b ... c -> b (... c)")
        embed = None if features is None else f.time2(F.silu(f.time1(features)))
        if self.num_classes is not None:
            none = torch.full((x.shape[0],), self.num_classes, device=x.device)
            row = f.label(none if label is None else label)
            embed = row if embed is None else embed + row
        return None if embed is None else F.silu(embed)

    def _check_inputs(self, x: Tensor, t: Any, label: Any) -> None:
        sizes = check_shape(x, "b c h w", "UNet: x", c=self.in_channels)
        if sizes["h"] % self.factor or sizes["w"] % self.factor:
            raise ValueError(f"UNet: x: expected height and width divisible by {self.factor}, got {tuple(x.shape)}")
        if self.timed:
            check_shape(t, "b" if self.num_times == 1 else "b n", "UNet: t", b=sizes["b"], n=self.num_times)
            check_floating(t, "UNet: t")
        elif t is not None:
            raise ValueError("UNet: t: expected None with timed=False, got a tensor")
        if label is None:
            return
        if self.num_classes is None:
            raise ValueError("UNet: label: expected None without num_classes, got a tensor")
        check_shape(label, "b", "UNet: label", b=sizes["b"])
        check_integer(label, "UNet: label")


def _channels_last(x: Tensor) -> Tensor:
    """Lays x out as (b, h, w, c), where that can be seen.

    Under functorch a layout has no meaning: the derivative of ``F.group_norm`` in forward mode even refuses this one.
    """
    return x if is_transformed() else x.contiguous(memory_format=torch.channels_last)
