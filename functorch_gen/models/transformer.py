"""The pre-norm transformer block that the models share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from functorch_gen.nn import MLP, Bound, Dropout, GatedMLP, KVCache, LayerNorm, MultiHeadAttention, init_parts
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Layer, Params

__all__ = ["TransformerBlock"]


@dataclass(frozen=True)
class TransformerBlock:
    """x + attention(norm1(x)), then x + mlp(norm2(x)): (..., l, embed_dim) -> (..., l, embed_dim).

    The perceptron has one hidden layer and GELU, by its exact formula.

    Args:
        dropout: of the attention weights and of the output of each branch, when a key is given.
        is_causal: a position sees itself and those before it; else all.
        hidden_features: width of the perceptron; 4 embed_dim when None.
        norm: makes a normalisation of its width: ``nn.LayerNorm``, ``nn.RMSNorm``.
        gated: the perceptron is SwiGLU, a :class:`GatedMLP`.
        num_kv_heads, qk_norm, rotary_base, alibi: as in :class:`MultiHeadAttention`.
    Source: Xiong et al. 2020, arXiv:2002.04745.

    >>> import torch
    >>> from functorch_gen import random
    >>> block = TransformerBlock(8, num_heads=2)
    >>> block(block.init(random.key(0)), torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    embed_dim: int
    num_heads: int
    dropout: float = 0.0
    is_causal: bool = field(default=False, kw_only=True)
    hidden_features: int | None = field(default=None, kw_only=True)
    norm: Callable[[int], Layer] = field(default=LayerNorm, kw_only=True)
    gated: bool = field(default=False, kw_only=True)
    num_kv_heads: int | None = field(default=None, kw_only=True)
    qk_norm: bool = field(default=False, kw_only=True)
    rotary_base: float | None = field(default=None, kw_only=True)
    alibi: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_sizes(
            type(self).__name__, embed_dim=self.embed_dim, num_heads=self.num_heads, hidden_features=self._hidden
        )

    @property
    def _hidden(self) -> int:
        return 4 * self.embed_dim if self.hidden_features is None else self.hidden_features

    @property
    def attention(self) -> MultiHeadAttention:
        """The attention layer."""
        return MultiHeadAttention(
            self.embed_dim,
            self.num_heads,
            self.dropout,
            num_kv_heads=self.num_kv_heads,
            qk_norm=self.qk_norm,
            rotary_base=self.rotary_base,
            alibi=self.alibi,
        )

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        e, hidden = self.embed_dim, self._hidden
        return {
            "norm1": self.norm(e),
            "attention": self.attention,
            "norm2": self.norm(e),
            "mlp": GatedMLP(e, hidden, e) if self.gated else MLP(e, (hidden,), e, activation=F.gelu),
            "dropout": Dropout(self.dropout),
        }

    def init(self, key: Key) -> Params:
        """Draws the parameters of the sublayers."""
        return init_parts(self.parts, key)

    def __call__(
        self,
        params: Params,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        lengths: Tensor | None = None,
        key: Key | None = None,
    ) -> Any:
        """(..., l, embed_dim) -> (..., l, embed_dim); with a cache the pair of that and the new cache.

        Args:
            mask, cache, lengths: of :class:`MultiHeadAttention`.
            key: draws the dropout.
        """
        f = Bound(self.parts, params, key=key)
        options = {} if cache is None else {"cache": cache, "lengths": lengths}
        h = f.attention(f.norm1(x), mask=mask, is_causal=self.is_causal, **options)
        h, cache = (h, None) if cache is None else h
        x = x + f.dropout(h)
        x = x + f.dropout(f.mlp(f.norm2(x)))
        return x if cache is None else (x, cache)
