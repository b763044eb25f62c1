"""A decoder-only transformer of functorch_gen's layers: the functional form of the benchmark's GPT."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from functorch_gen.nn import Bound, Embedding, LayerNorm, Linear, init_parts
from functorch_gen.typing import Key, Layer, Params

__all__ = ["GPT", "Block"]


@dataclass(frozen=True)
class Block:
    """x + attention(norm1(x)), then x + mlp(norm2(x)): (b, n, width) -> (b, n, width).

    Source: Radford et al. 2019, section 2.3 (norms before each part), GELU by its exact formula.
    """

    width: int
    num_heads: int

    @property
    def parts(self) -> dict[str, Layer]:
        d = self.width
        return {
            "norm1": LayerNorm(d),
            "qkv": Linear(d, 3 * d),
            "out": Linear(d, d),
            "norm2": LayerNorm(d),
            "up": Linear(d, 4 * d),
            "down": Linear(4 * d, d),
        }

    def init(self, key: Key) -> Params:
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        f = Bound(self.parts, params)
        q, k, v = rearrange(f.qkv(f.norm1(x)), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + f.out(rearrange(y, "b h n d -> b n (h d)"))
        return x + f.down(F.gelu(f.up(f.norm2(x))))


@dataclass(frozen=True)
class GPT:
    """Logits of the next token: (b, n) integers -> (b, n, vocabulary)."""

    vocabulary: int
    length: int
    width: int
    num_heads: int
    num_layers: int

    @property
    def parts(self) -> dict[str, Layer]:
        blocks = {f"block{i}": Block(self.width, self.num_heads) for i in range(self.num_layers)}
        return {
            "tokens": Embedding(self.vocabulary, self.width),
            "positions": Embedding(self.length, self.width),
            **blocks,
            "norm": LayerNorm(self.width),
            "head": Linear(self.width, self.vocabulary, bias=False),
        }

    def init(self, key: Key) -> Params:
        return init_parts(self.parts, key)

    def __call__(self, params: Params, tokens: Tensor, *, key: Key | None = None) -> Tensor:
        f = Bound(self.parts, params)
        x = f.tokens(tokens) + f.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for i in range(self.num_layers):
            x = f[f"block{i}"](x)
        return f.head(f.norm(x))
