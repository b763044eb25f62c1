"""The programs as idiomatic ``torch.nn.Module``s; the U-Net is in unet_module.py. They share no code with the package.

Their ``state_dict``s have the names of ``tree.names(params)``.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["GPTModule", "mlp_module"]


def mlp_module(widths: tuple[int, ...]) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for n, m in pairwise(widths):
        layers += [nn.Linear(n, m), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        heads = (b, n, self.num_heads, d // self.num_heads)
        q, k, v = (y.view(heads).transpose(1, 2) for y in self.qkv(self.norm1(x)).split(d, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPTModule(nn.Module):
    """Logits of the next token."""

    def __init__(self, vocabulary: int, length: int, width: int, num_heads: int, num_layers: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.num_layers = num_layers
        for i in range(num_layers):
            self.add_module(f"block{i}", Block(width, num_heads))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for i in range(self.num_layers):
            x = self.get_submodule(f"block{i}")(x)
        return self.head(self.norm(x))
