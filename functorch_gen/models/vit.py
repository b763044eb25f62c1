"""The vision transformer: an image as a sequence of patches, classified."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_choice, check_shape
from functorch_gen.models.transformer import TransformerBlock
from functorch_gen.nn import (
    Bound,
    Conv2d,
    Dropout,
    LayerNorm,
    LearnedPositions,
    Linear,
    init_parts,
    initialize,
    trunc_normal,
    zeros,
)
from functorch_gen.nn.sizes import check_sizes, freeze, per_axis
from functorch_gen.typing import Key, Layer, Params

__all__ = ["ViT"]


@dataclass(frozen=True)
class ViT:
    """Logits of the classes of an image: (b, in_channels, h, w) -> (b, num_classes).

    Each patch becomes a vector by one linear map, learned positions are added, blocks of attention and perceptron
    follow, :class:`TransformerBlock`, and a linear layer reads what ``pool`` says.

    Args:
        image_size: height and width, multiples of ``patch_size``; one number for both.
        dropout: of the embedded patches, the attention weights and the output of each branch, when a key is given.
        pool: "token": an extra first vector, learned, is read at the end; "mean": the mean of the patches' vectors.
        norm, gated, qk_norm: of each :class:`TransformerBlock`.
    Raises:
        ValueError: for sizes that do not fit; when called, for an image of another shape.

    Source: Dosovitskiy et al. 2021, section 3.1, arXiv:2010.11929; the mean: Zhai et al. 2022, arXiv:2106.04560.

    >>> from functorch_gen import random
    >>> vit = ViT(1, 10, image_size=8, patch_size=2, num_layers=2, num_heads=2, embed_dim=8)
    >>> vit(vit.init(random.key(0)), torch.ones(3, 1, 8, 8)).shape
    torch.Size([3, 10])
    """

    in_channels: int
    num_classes: int
    image_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    num_layers: int
    num_heads: int
    embed_dim: int
    dropout: float = 0.0
    pool: str = "token"
    norm: Callable[[int], Layer] = field(default=LayerNorm, kw_only=True)
    gated: bool = field(default=False, kw_only=True)
    qk_norm: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("ViT", in_channels=self.in_channels, num_classes=self.num_classes, num_layers=self.num_layers)
        check_sizes("ViT", num_heads=self.num_heads, embed_dim=self.embed_dim)
        check_sizes("ViT", dims=2, image_size=self.image_size, patch_size=self.patch_size)
        check_choice("ViT", "pool", self.pool, ("token", "mean"))
        if any(size % patch for size, patch in zip(self._image, self._patch, strict=True)):
            raise ValueError(
                f"ViT: expected image_size divisible by patch_size={self.patch_size}, got {self.image_size}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"ViT: expected embed_dim divisible by num_heads={self.num_heads}, got {self.embed_dim}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"ViT: expected 0 <= dropout <= 1, got {self.dropout}")

    @property
    def _image(self) -> tuple[int, ...]:
        return per_axis(self.image_size, 2)

    @property
    def _patch(self) -> tuple[int, ...]:
        return per_axis(self.patch_size, 2)

    @property
    def num_patches(self) -> int:
        """How many patches an image has."""
        (h, w), (p, q) = self._image, self._patch
        return (h // p) * (w // q)

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name; the blocks are ``block0``, ``block1``, ..."""
        e = self.embed_dim
        options: dict[str, Any] = {"norm": self.norm, "gated": self.gated, "qk_norm": self.qk_norm}
        block = TransformerBlock(e, self.num_heads, self.dropout, **options)
        return {
            "patches": Conv2d(self.in_channels, e, self.patch_size, stride=self.patch_size),
            "positions": LearnedPositions(self.num_patches + (self.pool == "token"), e),
            "dropout": Dropout(self.dropout),
            **{f"block{i}": block for i in range(self.num_layers)},
            "norm": self.norm(e),
            "head": Linear(e, self.num_classes),
        }

    def init(self, key: Key) -> Params:
        """Weights N(0, 0.02^2), cut at -2 and 2, biases and the extra vector ``token`` zero, norms the identity."""
        laws = {"*weight": functools.partial(trunc_normal, std=0.02), "*bias": zeros}
        norms, rest = tree.partition(init_parts(self.parts, key), lambda path: "norm" in path)
        params = tree.merge(norms, initialize(rest, laws, key))
        if self.pool == "token":
            params["token"] = torch.zeros(self.embed_dim, device=key.device)
        return params

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(b, in_channels, h, w) -> (b, num_classes); ``key`` draws the dropout."""
        h, w = self._image
        check_shape(x, "b c h w", "ViT: x", c=self.in_channels, h=h, w=w)
        f = Bound(self.parts, params, key=key)
        x = rearrange(f.patches(x), "b e h w -> b (h w) e")
        if self.pool == "token":
            x = torch.cat([params["token"].expand(len(x), 1, -1), x], 1)
        x = f.dropout(f.positions(x))
        for i in range(self.num_layers):
            x = f[f"block{i}"](x)
        x = f.norm(x)
        return f.head(x[:, 0] if self.pool == "token" else x.mean(1))
