"""Rows of language models: the loss and its units, filters, and generation, whose results are tokens."""

from typing import Any

import torch
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import lm, models, nn, random, tree

GPT = models.GPT(3, 6, 1, 1, 2, rotary_base=100.0, norm=nn.RMSNorm, soft_cap=3.0)
PARAMS = GPT.init(random.key(0))
PROMPT = torch.tensor([[1, 2], [0, 1]])
LENGTHS = torch.tensor([2, 1])
TOKENS = "tokens do not change with the parameters"


def network(params: Any) -> Any:
    return lambda tokens: GPT(params, tokens)


def filtered(name: str, fun: Any, **skip: str) -> Case:
    """Removed tokens are -inf, which have no derivative: what is left of the distribution has."""
    return from_draw(f"lm.{name}", lambda x: fun(x).softmax(-1), lambda d: (d(2, 4),), None, **skip)


def speculated(key: Tensor, params: Any, draft: Any) -> Any:
    return lm.generate_speculative(key, GPT, params, GPT, draft, PROMPT, 2, lookahead=1)


def keyed(d: Draw) -> tuple[Any, ...]:
    return d.key(), d.like(PARAMS)


CASES = [
    from_draw(
        "lm.loss",
        lambda params, tokens: lm.loss(network(params), tokens, mask=torch.tensor([[True, True, False], [True] * 3])),
        lambda d: (d.like(PARAMS), d.labels(3, 2, 3)),
        table=ALIKE,
    ),
    from_draw(
        "lm.text_nll",
        lambda params, text: lm.text_nll(network(params), text, window=3, stride=2, batch_size=2),
        lambda d: (d.like(PARAMS), d.labels(3, 6)),
        table=ALIKE,
    ),
    from_draw("lm.token_nll", lm.token_nll, lambda d: (d(2, 3, 4), d.labels(4, 2, 3))),
    from_draw("lm.bits_per_byte", lm.bits_per_byte, lambda d: (d(2),), table=ALIKE),
    from_draw("lm.perplexity", lm.perplexity, lambda d: (d(2),), table=ALIKE),
    filtered("filter_logits", lambda x: lm.filter_logits(x, temperature=0.7, top_k=3, top_p=0.9, min_p=0.01)),
    filtered("apply_temperature", lambda x: lm.apply_temperature(x, 0.7), table=ALIKE),
    filtered("keep_top_k", lambda x: lm.keep_top_k(x, 2), table=ALIKE),
    filtered("keep_top_p", lambda x: lm.keep_top_p(x, 0.8), table=ALIKE),
    filtered("keep_min_p", lambda x: lm.keep_min_p(x, 0.3), table=ALIKE),
    from_draw("lm.sample_token", lm.sample_token, lambda d: (d.key(), d(2, 4)), derivatives=TOKENS, table=ALIKE),
    from_draw("lm.fill_after", lambda x: lm.fill_after(x, 1), lambda d: (d.labels(3, 2, 4),), table=ALIKE),
    from_draw(
        "lm.prefill",
        lambda params: lm.prefill(GPT, params, PROMPT, 2, lengths=LENGTHS),
        lambda d: (d.like(PARAMS),),
        table=ALIKE,
    ),
    from_draw(
        "lm.decode",
        lambda key, params: lm.decode(key, GPT, params, PROMPT[:, 0], GPT.init_cache(2, 3, torch.float64))[0],
        keyed,
        derivatives=TOKENS,
        table=ALIKE,
    ),
    from_draw(
        "lm.generate",
        lambda key, params: lm.generate(key, GPT, params, PROMPT, 3, top_k=2, lengths=LENGTHS),
        keyed,
        derivatives=TOKENS,
    ),
    from_draw(
        "lm.beam_search",
        lambda params: lm.beam_search(GPT, params, PROMPT, 2, beams=2, lengths=LENGTHS),
        lambda d: (tree.scale(d.like(PARAMS), 2.0),),
        table=ALIKE,
    ),
    from_draw("lm.generate_speculative", speculated, lambda d: (*keyed(d), d.like(PARAMS)), derivatives=TOKENS),
]
