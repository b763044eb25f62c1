"""Speculative decoding: a small model drafts tokens, the large one checks them all in one pass."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_shape
from functorch_gen.lm.filters import filter_logits, sample_token
from functorch_gen.lm.generation import CachedModel, fill_after, prefill
from functorch_gen.nn import KVCache
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.transforms.scan import scan
from functorch_gen.transforms.while_loop import while_loop
from functorch_gen.typing import Key, Number, Params

__all__ = ["Speculation", "generate_speculative"]


Cache: TypeAlias = dict[str, KVCache]
Network: TypeAlias = Callable[[Tensor, Cache], tuple[Tensor, Cache]]
"""tokens (..., l) -> filtered logits (..., l, v), with the cache before and after."""


class Speculation(NamedTuple):
    """The result of :func:`generate_speculative`."""

    tokens: Tensor  # (..., n) int64
    accepted: Tensor  # (...) int64: drafted tokens that were kept, of lookahead * rounds
    rounds: Tensor  # (...) int64: passes of the model after the prompt's


class _Sequences(NamedTuple):
    """What a round changes. Both caches hold all tokens but the newest."""

    token: Tensor  # (...) the newest
    caches: tuple[Cache, Cache]  # of the model and of the draft
    tokens: Tensor  # (..., n) what is generated so far
    count: Tensor  # (...) how many that are, or would be beyond n
    accepted: Tensor  # (...)
    rounds: Tensor  # (...)


def generate_speculative(
    key: Key,
    model: CachedModel,
    params: Params,
    draft: CachedModel,
    draft_params: Params,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    lookahead: int = 4,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    lengths: Tensor | None = None,
    stop_token: int | None = None,
) -> Speculation:
    """Tokens that continue a prompt, of the distribution of :func:`generate`: (..., l) -> (..., max_new_tokens).

    In each round the draft draws x_1 ... x_g from its q_1 ... q_g, and one pass of the model gives p_1 ... p_(g+1).
    x_i is kept with probability min(1, p_i(x_i) / q_i(x_i)), up to the first that is not; in place of that one comes a
    token of max(0, p_i - q_i), normalised, or, if all are kept, one of p_(g+1). Every token then has the law p,
    whatever q is. Sequences advance each by its own number of tokens.

    Args:
        draft: a cheaper model of the same tokens.
        lookahead: g.
        temperature, top_k, top_p, min_p: of :func:`filter_logits`, for both models. At temperature 0 the tokens are
            those of the model alone.
        lengths: of the prompts, when they are padded on the right; see :func:`prefill`.
        stop_token: ends a sequence; what would follow is this token too.
    Raises:
        TypeError: if the prompt is no tensor of integers.
        ValueError: if it is empty, a number is < 1, prompt, new tokens and ``lookahead`` together are longer than the
            context of one of the models, or these have not the same tokens.
    Source: Leviathan et al. 2023, algorithm 1, arXiv:2211.17192.

    >>> from functorch_gen.models import GPT
    >>> gpt = GPT(vocab_size=5, context=16, num_layers=1, num_heads=1, embed_dim=2)
    >>> params, prompt = gpt.init(random.key(0)), torch.tensor([[1, 2, 3]])
    >>> generate_speculative(random.key(1), gpt, params, gpt, params, prompt, 9, lookahead=3).accepted  # its own draft
    tensor([6])
    """
    check_sizes("generate_speculative", max_new_tokens=max_new_tokens, lookahead=lookahead)
    options: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    room = max_new_tokens + lookahead
    logits, cache = prefill(model, params, prompt, room, lengths=lengths)
    draft_logits, draft_cache = prefill(draft, draft_params, prompt, room, lengths=lengths)
    check_shape(draft_logits, "... v", "generate_speculative: logits of the draft", v=logits.shape[-1])
    network, draft_network = _filtered(model, params, options), _filtered(draft, draft_params, options)

    def advance(state: tuple[Tensor, _Sequences]) -> tuple[Tensor, _Sequences]:
        number, old = state
        key_draft, key_keep, key_new = random.split(random.fold_in(key_rounds, number), 3)
        x, q, draft_cache = _guess(random.split(key_draft, lookahead + 1), draft_network, old.token, old.caches[1])
        logits, cache = network(torch.cat([old.token.unsqueeze(-1), x], -1), old.caches[0])
        kept, token = _verify(key_keep, key_new, x, logits.softmax(-1), q)
        return number + 1, _accept(old, (cache, draft_cache), x, kept, token)

    key_first, key_rounds = random.split(key)
    token = sample_token(key_first, logits, **options)
    tokens = torch.where(torch.arange(max_new_tokens, device=token.device) == 0, token.unsqueeze(-1), 0)
    one, accepted, rounds = torch.ones_like(token), torch.zeros_like(token), torch.zeros_like(token)
    start = _Sequences(token, (cache, draft_cache), tokens, one, accepted, rounds)
    begin = torch.zeros((), dtype=torch.int64, device=token.device)
    _, end = while_loop(lambda state: (state[1].count < max_new_tokens).any(), advance, (begin, start))
    tokens = end.tokens if stop_token is None else fill_after(end.tokens, stop_token)
    return Speculation(tokens, end.accepted, end.rounds)


def _filtered(model: CachedModel, params: Params, options: dict[str, Any]) -> Network:
    def network(tokens: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        logits, cache = model(params, tokens, cache=cache)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))  # 16-bit probabilities are another law
        return filter_logits(wide, **options), cache

    return network


def _guess(keys: Key, network: Network, token: Tensor, cache: Cache) -> tuple[Tensor, Tensor, Cache]:
    """x_1 ... x_g (..., g), q_1 ... q_g (..., g, v) and a cache that holds them all, by g + 1 keys."""

    def step(carry: Any, key: Key) -> tuple[Any, tuple[Tensor, Tensor]]:
        token, cache = carry
        logits, cache = network(token.unsqueeze(-1), cache)
        token = random.categorical(key, logits.squeeze(-2))
        return (token, cache), (token, logits.squeeze(-2).softmax(-1))

    (_, cache), (x, q) = scan(step, (token, cache), keys)
    return x[:-1].movedim(0, -1), q[:-1].movedim(0, -2), cache  # the last step was for the cache alone


def _verify(key_keep: Key, key_new: Key, x: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """How many of x (..., g) are kept and the token after them, by p (..., g + 1, v) and q (..., g, v): both (...)."""
    p_x, q_x = (r.gather(-1, x.unsqueeze(-1)).squeeze(-1) for r in (p[..., :-1, :], q))
    keep = random.uniform(key_keep, x.shape, p.dtype) * q_x < p_x
    kept = keep.to(torch.int64).cumprod(-1).sum(-1)
    q = torch.cat([q, torch.zeros_like(q[..., :1, :])], -2)  # after all of them nothing was drafted
    rest = torch.take_along_dim((p - q).clamp(min=0), kept.unsqueeze(-1).unsqueeze(-1), -2).squeeze(-2)
    return kept, random.categorical(key_new, rest.log())


def _accept(old: _Sequences, caches: tuple[Cache, Cache], x: Tensor, kept: Tensor, token: Tensor) -> _Sequences:
    """The sequences with x_1 ... x_kept and the token after them; those that are complete stay as they are."""
    n, g = old.tokens.shape[-1], x.shape[-1]
    active = old.count < n
    new = torch.where(torch.arange(g, device=x.device) < kept.unsqueeze(-1), x, token.unsqueeze(-1))
    new = torch.cat([new, token.unsqueeze(-1)], -1)
    index = torch.arange(n, device=x.device) - old.count.unsqueeze(-1)  # which of the new tokens goes into the place
    written = (index >= 0) & (index <= kept.unsqueeze(-1))
    tokens = torch.where(written, new.gather(-1, index.clamp(0, g)), old.tokens)
    more = torch.where(active, kept + 1, 0)
    lengths = next(iter(old.caches[0].values())).lengths + more  # what was not kept lies beyond, and is not read
    cache, draft_cache = ({name: c._replace(lengths=lengths) for name, c in held.items()} for held in caches)
    token = torch.where(active, token, old.token)
    accepted = old.accepted + torch.where(active, kept, 0)
    return _Sequences(token, (cache, draft_cache), tokens, old.count + more, accepted, old.rounds + active)
