"""A decoder-only transformer: logits of the next token at every position."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_positive, check_shape
from functorch_gen.models.transformer import TransformerBlock
from functorch_gen.nn import (
    Bound,
    Dropout,
    Embedding,
    KVCache,
    LayerNorm,
    LearnedPositions,
    Linear,
    init_parts,
    initialize,
    normal,
    scaled_residual,
    zeros,
)
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Layer, Params

__all__ = ["GPT", "GPTBlock"]

_STD = 0.02
"""Standard deviation of the initial weights in GPT-2."""


@dataclass(frozen=True)
class GPTBlock(TransformerBlock):
    """The causal :class:`TransformerBlock`: a position sees itself and those before it.

    Source: Radford et al. 2019, section 2.3, "Language models are unsupervised multitask learners".

    >>> from functorch_gen import random
    >>> block = GPTBlock(8, num_heads=2)
    >>> block(block.init(random.key(0)), torch.ones(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    is_causal: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class GPT:
    """Logits of the next token: (..., l) integers -> (..., l, vocab_size), l at most ``context``.

    Position i sees the tokens 0 .. i. Positions are learned vectors, unless the blocks know them by ``rotary_base`` or
    ``alibi``; norms stand before each branch and at the end.

    Args:
        dropout: of the embedded tokens, the attention weights and the output of each branch, when a key is given.
        tied: the matrix of the logits is the table of the tokens' vectors (Press and Wolf 2017, arXiv:1608.05859).
        hidden_features: width of the perceptrons; 4 embed_dim when None.
        norm: ``nn.LayerNorm``, or ``nn.RMSNorm`` (arXiv:1910.07467): a function of the width.
        gated: the perceptrons are SwiGLU (arXiv:2002.05202).
        num_kv_heads: heads of keys and values, fewer than ``num_heads``: grouped queries (arXiv:2305.13245).
        qk_norm: RMSNorm of the queries and keys of each head.
        rotary_base: RoPE (arXiv:2104.09864) with this base, 10000 in the paper; None: none.
        alibi: a bias that falls with the distance (arXiv:2108.12409).
        soft_cap: the logits are soft_cap tanh(logits / soft_cap), between -soft_cap and soft_cap (Gemma 2, section 2,
            arXiv:2408.00118); None: as they are.
    Raises:
        ValueError: for sizes that do not fit; when called, for more tokens than ``context``.
        TypeError: if ``norm`` is no function; when called, if the tokens are no integers.

    Source: Radford et al. 2019, section 2.3, "Language models are unsupervised multitask learners".

    >>> from functorch_gen import random
    >>> gpt = GPT(vocab_size=11, context=8, num_layers=2, num_heads=2, embed_dim=4)
    >>> params = gpt.init(random.key(0))
    >>> logits = gpt(params, torch.tensor([[1, 5, 2]]))
    >>> first, cache = gpt(params, torch.tensor([[1, 5]]), cache=gpt.init_cache(1))
    >>> last, cache = gpt(params, torch.tensor([[2]]), cache=cache)
    >>> torch.allclose(torch.cat([first, last], 1), logits, atol=1e-6)
    True
    """

    vocab_size: int
    context: int
    num_layers: int
    num_heads: int
    embed_dim: int
    dropout: float = 0.0
    tied: bool = True
    hidden_features: int | None = field(default=None, kw_only=True)
    norm: Callable[[int], Layer] = field(default=LayerNorm, kw_only=True)
    gated: bool = field(default=False, kw_only=True)
    num_kv_heads: int | None = field(default=None, kw_only=True)
    qk_norm: bool = field(default=False, kw_only=True)
    rotary_base: float | None = field(default=None, kw_only=True)
    alibi: bool = field(default=False, kw_only=True)
    soft_cap: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_sizes("GPT", vocab_size=self.vocab_size, context=self.context, num_layers=self.num_layers)
        check_sizes("GPT", num_heads=self.num_heads, embed_dim=self.embed_dim)
        if self.embed_dim % self.num_heads:
            raise ValueError(f"GPT: expected embed_dim divisible by num_heads={self.num_heads}, got {self.embed_dim}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"GPT: expected 0 <= dropout <= 1, got {self.dropout}")
        if self.soft_cap is not None:
            check_positive("GPT", soft_cap=self.soft_cap)
        if not callable(self.norm):
            raise TypeError(f"GPT: expected norm to be a function of the width, as nn.RMSNorm, got {self.norm!r}")
        _ = self._block.attention  # checks its own sizes

    @property
    def _block(self) -> GPTBlock:
        names = ("hidden_features", "norm", "gated", "num_kv_heads", "qk_norm", "rotary_base", "alibi")
        options: dict[str, Any] = {name: getattr(self, name) for name in names}
        return GPTBlock(self.embed_dim, self.num_heads, self.dropout, **options)

    @property
    def _learned(self) -> bool:
        """Whether positions are vectors added to those of the tokens."""
        return self.rotary_base is None and not self.alibi

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name; the blocks are ``block0``, ``block1``, ..."""
        parts: dict[str, Layer] = {
            "tokens": Embedding(self.vocab_size, self.embed_dim),
            "dropout": Dropout(self.dropout),
            **{f"block{i}": self._block for i in range(self.num_layers)},
            "norm": self.norm(self.embed_dim),
        }
        if self._learned:
            parts["positions"] = LearnedPositions(self.context, self.embed_dim)
        if not self.tied:
            parts["head"] = Linear(self.embed_dim, self.vocab_size, bias=False)
        return parts

    def init(self, key: Key) -> Params:
        """GPT-2's: weights N(0, 0.02^2), biases zero, norms as they are drawn, the identity.

        What ends a residual branch is N(0, 0.02^2 / (2 num_layers)), so that the sum of all branches has the scale
        of one.
        """
        ends_branch = functools.partial(scaled_residual, num_layers=self.num_layers, std=_STD)
        laws = {
            "*weight": functools.partial(normal, std=_STD),
            "*bias": zeros,
            "*.out_proj.weight": ends_branch,
            "*.mlp.down.weight" if self.gated else "*.mlp.2.weight": ends_branch,
        }
        norms, rest = tree.partition(init_parts(self.parts, key), lambda path: "norm" in path)
        return tree.merge(norms, initialize(rest, laws, key))

    def init_cache(
        self,
        batch: int | tuple[int, ...],
        max_length: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> dict[str, KVCache]:
        """Empty caches of the blocks, by name, for up to ``max_length`` tokens; ``context``, the most, when None."""
        length = self.context if max_length is None else max_length
        if length > self.context:
            raise ValueError(f"GPT: expected max_length <= context={self.context}, got {length}")
        attention = self._block.attention
        return {f"block{i}": attention.init_cache(batch, length, dtype, device) for i in range(self.num_layers)}

    def __call__(
        self,
        params: Params,
        tokens: Tensor,
        *,
        cache: dict[str, KVCache] | None = None,
        lengths: Tensor | None = None,
        key: Key | None = None,
    ) -> Any:
        """(..., l) integers -> (..., l, vocab_size).

        Args:
            cache: of :meth:`init_cache` or an earlier call. Then the tokens continue the sequences, and the result is
                the pair of logits and the new cache.
            lengths: with a cache, (...) integers: how many of the tokens count in each sequence; the rest is padding.
            key: draws the dropout.
        """
        length = check_shape(tokens, "... l", "GPT: tokens")["l"]
        if length > self.context:
            raise ValueError(f"GPT: tokens: expected at most context={self.context} positions, got {length}")
        if cache is None and lengths is not None:
            raise ValueError("GPT: expected lengths only with a cache, got them without")
        f = Bound(self.parts, params, key=key)
        positions = torch.arange(length, device=tokens.device)
        if cache is not None:
            self._check_cache(cache)
            positions = rearrange(cache["block0"].lengths, "... -> ... 1") + positions
        x = f.tokens(tokens)
        x = f.dropout(f.positions(x, positions=positions) if self._learned else x)
        caches = {}
        for name in [f"block{i}" for i in range(self.num_layers)]:
            if cache is None:
                x = f[name](x)
            else:
                x, caches[name] = f[name](x, cache=cache[name], lengths=lengths)
        x = f.norm(x)
        logits = x @ rearrange(params["tokens"]["weight"], "v e -> e v") if self.tied else f.head(x)
        if self.soft_cap is not None:
            logits = self.soft_cap * torch.tanh(logits / self.soft_cap)
        return logits if cache is None else (logits, caches)

    def _check_cache(self, cache: dict[str, KVCache]) -> None:
        expected = [f"block{i}" for i in range(self.num_layers)]
        if not isinstance(cache, dict) or sorted(cache) != sorted(expected):
            got = sorted(cache) if isinstance(cache, dict) else type(cache).__name__
            raise ValueError(f"GPT: expected a cache of {', '.join(expected)}, got {got}")
