"""Beam search: the most probable continuations, found by keeping the best beginnings."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.lm.generation import CachedModel, prefill
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.transforms.scan import scan
from functorch_gen.typing import Params

__all__ = ["Beams", "beam_search"]


class Beams(NamedTuple):
    """The result of :func:`beam_search`, the most probable first."""

    tokens: Tensor  # (..., beams, n) int64
    log_prob: Tensor  # (..., beams), of the tokens up to the stop token, float32 or wider; -inf: there are not so many


def beam_search(
    model: CachedModel,
    params: Params,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    beams: int,
    lengths: Tensor | None = None,
    stop_token: int | None = None,
) -> Beams:
    """Probable continuations of a prompt (..., l): of all extensions of the best ``beams`` so far, the best again.

    One beam is greedy decoding; with v^(max_new_tokens - 1) beams of v tokens nothing is left out, and the result is
    exact. Under :func:`jit` it is one program.

    Args:
        lengths: of the prompts, when they are padded on the right; see :func:`prefill`.
        stop_token: ends a sequence, which then keeps its probability; what follows is this token too.
    Raises:
        TypeError: if the prompt is no tensor of integers.
        ValueError: if it is empty, a number is < 1, or prompt and new tokens are longer than the model's context.
    Source: Sutskever et al. 2014, section 3.2, arXiv:1409.3215.

    >>> from functorch_gen import random
    >>> from functorch_gen.models import GPT
    >>> gpt = GPT(vocab_size=5, context=8, num_layers=1, num_heads=1, embed_dim=2)
    >>> found = beam_search(gpt, gpt.init(random.key(0)), torch.tensor([1, 2, 3]), 4, beams=3)
    >>> found.tokens.shape, found.log_prob.shape
    (torch.Size([3, 4]), torch.Size([3]))
    """
    check_sizes("beam_search", max_new_tokens=max_new_tokens, beams=beams)
    logits, cache = prefill(model, params, prompt, max_new_tokens, lengths=lengths)
    axis = prompt.ndim - 1
    logits, cache = tree.map(lambda x: _repeat(x, beams, axis), (logits, cache))
    one = torch.arange(beams, device=prompt.device) == 0  # all beams are alike as yet: one counts
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_prob = torch.where(one, 0.0, -math.inf).to(dtype).expand(logits.shape[:-1])
    log_prob, _, token = _best(log_prob, logits, None, stop_token)
    places = torch.arange(max_new_tokens, device=prompt.device)
    tokens = torch.where(places == 0, token.unsqueeze(-1), 0)

    def step(carry: Any, place: Tensor) -> tuple[Any, None]:
        log_prob, last, tokens, cache = carry
        logits, cache = model(params, last.unsqueeze(-1), cache=cache)
        log_prob, parent, token = _best(log_prob, logits.squeeze(-2), last, stop_token)
        tokens, cache = tree.map(lambda x: _take(x, parent), (tokens, cache))
        tokens = torch.where(places == place, token.unsqueeze(-1), tokens)
        return (log_prob, token, tokens, cache), None

    (log_prob, _, tokens, _), _ = scan(step, (log_prob, token, tokens, cache), places[1:])
    return Beams(tokens, log_prob)


def _best(
    log_prob: Tensor, logits: Tensor, last: Tensor | None, stop_token: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The best k of all k v extensions: log-probabilities, the beams they extend, and the tokens, all (..., k)."""
    k, v = logits.shape[-2:]
    of_next = torch.log_softmax(logits, -1, dtype=log_prob.dtype)
    if stop_token is not None and last is not None:
        stay = torch.where(torch.arange(v, device=logits.device) == stop_token, 0.0, -math.inf).to(of_next.dtype)
        of_next = torch.where((last == stop_token).unsqueeze(-1), stay, of_next)
    log_prob, index = (log_prob.unsqueeze(-1) + of_next).flatten(-2).topk(k)
    return log_prob, index // v, index % v


def _repeat(x: Tensor, beams: int, axis: int) -> Tensor:
    return x.unsqueeze(axis).expand(*x.shape[:axis], beams, *x.shape[axis:])


def _take(x: Tensor, parent: Tensor) -> Tensor:
    """The beams ``parent`` of x: (..., k, ...), (..., k) -> (..., k, ...)."""
    index = parent.reshape(*parent.shape, *[1] * (x.ndim - parent.ndim))
    return torch.take_along_dim(x, index, parent.ndim - 1)
