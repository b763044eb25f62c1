"""The U-Net of functorch_gen.models as an idiomatic ``torch.nn.Module``: oracle of tests, baseline of the benchmark.

It shares no code with the package. Its ``state_dict`` has the names of ``tree.names(params)``, so
``module.load_state_dict(tree.names(params))`` gives both the same weights.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["UNetModule"]


def zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class SelfAttention(nn.Module):
    """x + attention between the pixels of norm(x)."""

    def __init__(self, channels: int, num_heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels)
        self.attention = nn.MultiheadAttention(channels, num_heads, batch_first=True)
        zero(self.attention.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        y, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return x + y.transpose(1, 2).reshape(x.shape)


class ResBlock(nn.Module):
    """Residual block, scaled and shifted by an embedding."""

    def __init__(self, c_in: int, c_out: int, embed_dim: int, num_heads: int, groups: int, dropout: float):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.embed = nn.Linear(embed_dim, 2 * c_out)
        self.norm2 = nn.GroupNorm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)
        self.attention = SelfAttention(c_out, num_heads, groups) if num_heads else nn.Identity()
        zero(self.conv2)

    def forward(self, x: Tensor, embed: Tensor) -> Tensor:
        scale, shift = self.embed(embed)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = F.silu(self.norm2(h) * (1 + scale) + shift)
        return self.attention(self.skip(x) + self.conv2(self.dropout(h)))


class Stage(nn.Module):
    """Blocks of one resolution; on the way up each takes a skip, the last one first."""

    def __init__(self, *blocks: ResBlock):
        super().__init__()
        for i, block in enumerate(blocks):
            self.add_module(f"block{i}", block)

    def forward(self, x: Tensor, embed: Tensor, skips: list[Tensor] | None = None) -> list[Tensor]:
        outputs = []
        for block in self.children():
            x = block(x if skips is None else torch.cat([x, skips.pop()], dim=1), embed)
            outputs.append(x)
        return outputs


class UNetModule(nn.Module):
    """Same arguments and same function as :class:`functorch_gen.models.UNet`."""

    def __init__(
        self,
        in_channels: int,
        base_channels: int = 64,
        channel_mults: tuple[int, ...] = (1, 2),
        num_blocks: int = 2,
        attention_levels: tuple[int, ...] = (1,),
        num_heads: int = 4,
        num_classes: int | None = None,
        dropout: float = 0.0,
        embed_dim: int | None = None,
        num_groups: int = 8,
        time_scale: float = 1000.0,
    ):
        super().__init__()
        channels = [base_channels * mult for mult in channel_mults]
        top = len(channels) - 1
        embed_dim = embed_dim or 4 * base_channels
        self.num_classes, self.time_scale, self.base_channels = num_classes, time_scale, base_channels

        def block(level: int, c_in: int, attend: bool = True) -> ResBlock:
            heads = num_heads if attend and level in attention_levels else 0
            return ResBlock(c_in, channels[level], embed_dim, heads, num_groups, dropout)

        self.time1 = nn.Linear(base_channels, embed_dim)
        self.time2 = nn.Linear(embed_dim, embed_dim)
        if num_classes is not None:
            self.label = nn.Embedding(num_classes + 1, embed_dim)
        self.stem = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.levels = len(channels)
        for level, c in enumerate(channels):
            if level:
                self.add_module(f"shrink{level}", nn.Conv2d(channels[level - 1], c, 3, stride=2, padding=1))
                self.add_module(f"grow{level}", nn.Conv2d(c, channels[level - 1], 3, padding=1))
            self.add_module(f"down{level}", Stage(*[block(level, c) for _ in range(num_blocks)]))
            self.add_module(f"up{level}", Stage(*[block(level, 2 * c) for _ in range(num_blocks)]))
        c = channels[top]
        self.middle = Stage(block(top, c), block(top, c, attend=False))
        self.norm = nn.GroupNorm(num_groups, channels[0])
        self.head = nn.Conv2d(channels[0], in_channels, 3, padding=1)
        zero(self.head)

    def features(self, t: Tensor) -> Tensor:
        half = self.base_channels // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
        angles = self.time_scale * t[:, None] * frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        embed = self.time2(F.silu(self.time1(self.features(t).to(x.dtype))))
        if self.num_classes is not None:
            embed = embed + self.label(torch.full_like(t, self.num_classes).long() if label is None else label)
        embed = F.silu(embed)
        h, skips = self.stem(x), []
        for level in range(self.levels):
            if level:
                h = self.get_submodule(f"shrink{level}")(h)
            skips.append(self.get_submodule(f"down{level}")(h, embed))
            h = skips[-1][-1]
        h = self.middle(h, embed)[-1]
        for level in reversed(range(self.levels)):
            h = self.get_submodule(f"up{level}")(h, embed, skips.pop())[-1]
            if level:
                h = self.get_submodule(f"grow{level}")(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        return self.head(F.silu(self.norm(h)))
