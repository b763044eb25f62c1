"""A decoder-only transformer: logits of the next token at every position."""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from functorch_gen import random, tree
from functorch_gen.check import check_shape
from functorch_gen.nn import (
    MLP,
    Bound,
    Dropout,
    Embedding,
    LayerNorm,
    Linear,
    MultiHeadAttention,
    init_parts,
    name_key,
)
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Layer, Params

__all__ = ["GPT", "GPTBlock"]

_STD = 0.02
"""Standard deviation of the initial weights in GPT-2."""


@dataclass(frozen=True)
class GPTBlock:
    """x + attention(norm1(x)), then x + mlp(norm2(x)): (..., l, embed_dim) -> (..., l, embed_dim).

    A position sees itself and those before it. The perceptron has one hidden layer of 4 embed_dim and GELU, by its
    exact formula. Source: Radford et al. 2019, section 2.3, "Language models are unsupervised multitask learners".

    >>> block = GPTBlock(8, num_heads=2)
    >>> block(block.init(random.key(0)), torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    embed_dim: int
    num_heads: int
    dropout: float = 0.0

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        e = self.embed_dim
        return {
            "norm1": LayerNorm(e),
            "attention": MultiHeadAttention(e, self.num_heads, self.dropout),
            "norm2": LayerNorm(e),
            "mlp": MLP(e, (4 * e,), e, activation=F.gelu),
            "dropout": Dropout(self.dropout),
        }

    def init(self, key: Key) -> Params:
        """Draws the parameters of the sublayers."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """Applies the block; ``key`` draws the dropout of the attention weights and of both branches."""
        f = Bound(self.parts, params, key=key)
        x = x + f.dropout(f.attention(f.norm1(x), is_causal=True))
        return x + f.dropout(f.mlp(f.norm2(x)))


@dataclass(frozen=True)
class GPT:
    """Logits of the next token: (..., l) integers -> (..., l, vocab_size), l at most ``context``.

    Position i sees the tokens 0 .. i. Positions are learned vectors; norms stand before each branch and at the end.

    Args:
        dropout: of the embedded tokens, the attention weights and the output of each branch, when a key is given.
        tied: the matrix of the logits is the table of the tokens' vectors (Press and Wolf 2017, arXiv:1608.05859).
    Raises:
        ValueError: for sizes that do not fit; when called, for more tokens than ``context``.
        TypeError: when called, if the tokens are no integers.

    Source: Radford et al. 2019, section 2.3, "Language models are unsupervised multitask learners".

    >>> gpt = GPT(vocab_size=11, context=8, num_layers=2, num_heads=2, embed_dim=4)
    >>> gpt(gpt.init(random.key(0)), torch.tensor([[1, 5, 2]])).shape
    torch.Size([1, 3, 11])
    """

    vocab_size: int
    context: int
    num_layers: int
    num_heads: int
    embed_dim: int
    dropout: float = 0.0
    tied: bool = True

    def __post_init__(self) -> None:
        check_sizes("GPT", vocab_size=self.vocab_size, context=self.context, num_layers=self.num_layers)
        check_sizes("GPT", num_heads=self.num_heads, embed_dim=self.embed_dim)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"GPT: expected embed_dim divisible by num_heads={self.num_heads}, got {self.embed_dim}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"GPT: expected 0 <= dropout <= 1, got {self.dropout}")

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name; the blocks are ``block0``, ``block1``, ..."""
        block = GPTBlock(self.embed_dim, self.num_heads, self.dropout)
        parts: dict[str, Layer] = {
            "tokens": Embedding(self.vocab_size, self.embed_dim),
            "positions": Embedding(self.context, self.embed_dim),
            "dropout": Dropout(self.dropout),
            **{f"block{i}": block for i in range(self.num_layers)},
            "norm": LayerNorm(self.embed_dim),
        }
        if not self.tied:
            parts["head"] = Linear(self.embed_dim, self.vocab_size, bias=False)
        return parts

    def init(self, key: Key) -> Params:
        """GPT-2's: weights N(0, 0.02^2), biases zero, norms the identity.

        What ends a residual branch is N(0, 0.02^2 / (2 num_layers)), so that the sum of all branches has the scale
        of one.
        """

        def draw(path: str, x: Tensor) -> Tensor:
            if "norm" in path:
                return x
            if path.endswith("bias"):
                return torch.zeros_like(x)
            ends_branch = path.endswith(("out_proj.weight", "mlp.2.weight"))
            std = _STD / math.sqrt(2 * self.num_layers) if ends_branch else _STD
            return std * random.normal(name_key(key, path), tuple(x.shape))

        return tree.map_with_path(draw, init_parts(self.parts, key))

    def __call__(self, params: Params, tokens: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., l) integers -> (..., l, vocab_size); ``key`` draws the dropout."""
        length = check_shape(tokens, "... l", "GPT: tokens")["l"]
        if length > self.context:
            raise ValueError(f"GPT: tokens: expected at most context={self.context} positions, got {length}")
        f = Bound(self.parts, params, key=key)
        x = f.dropout(f.tokens(tokens) + f.positions(torch.arange(length, device=tokens.device)))
        for i in range(self.num_layers):
            x = f[f"block{i}"](x)
        x = f.norm(x)
        return x @ rearrange(params["tokens"]["weight"], "v e -> e v") if self.tied else f.head(x)
