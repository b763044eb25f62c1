"""Generation with a cache of keys and values beside the whole forward pass for every token; the tokens are the same."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg
from functorch_gen import lm, models, nn, random
from functorch_gen.typing import Params
from tests.bench.table import Options, Table, attempt
from tests.bench.timing import interleave

__all__ = ["CACHED", "generation_times", "makers"]

CACHED = "fg.jit, cache, one program"
LENGTH, PROMPT = 256, 16
SIZES: dict[str, Any] = {"vocab_size": 256, "num_layers": 4, "num_heads": 6, "embed_dim": 192}

Run = Callable[[], Tensor]


def whole_pass(gpt: models.GPT, params: Params, tokens: Tensor, place: Tensor, key: Tensor) -> Tensor:
    """The tokens (b, l), padding from ``place`` on, with a new one in that place: drawn by a pass over all of them."""
    logits = gpt(params, tokens).index_select(-2, place.reshape(1) - 1).squeeze(-2)
    return torch.where(torch.arange(tokens.shape[-1]) == place, lm.sample_token(key, logits).unsqueeze(-1), tokens)


def makers(backend: str, length: int = LENGTH, start: int = PROMPT, **sizes: int) -> dict[str, Callable[[], Run]]:
    """Every form, as a function that prepares it and returns the call: () -> (1, length - start) tokens."""
    gpt = models.GPT(**{**SIZES, **sizes}, context=length, rotary_base=1e4, norm=nn.RMSNorm, gated=True, qk_norm=True)
    params, key = gpt.init(random.key(0)), random.key(1)
    prompt = random.randint(random.key(2), (1, start), 0, gpt.vocab_size)
    padded = F.pad(prompt, (0, length - start))
    places, keys = torch.arange(start, length), random.split(key, length - start)

    def one_program() -> Run:
        run = fg.jit(lambda key, params, prompt: lm.generate(key, gpt, params, prompt, length - start), backend=backend)
        return lambda: run(key, params, prompt)

    def loop_of_steps() -> Run:
        fill = fg.jit(lambda params, prompt: lm.prefill(gpt, params, prompt, length - start), backend=backend)
        step = fg.jit(lambda key, *args: lm.decode(key, gpt, *args), donate_argnums=3, backend=backend)

        def run() -> Tensor:
            logits, cache = fill(params, prompt)
            tokens = [lm.sample_token(keys[0], logits)]
            for key in keys[1:]:
                token, cache = step(key, params, tokens[-1], cache)
                tokens.append(token)
            return torch.stack(tokens, -1)

        return run

    def whole_in_one_program() -> Run:
        def run(params: Params, tokens: Tensor) -> Tensor:
            step = lambda tokens, x: (whole_pass(gpt, params, tokens, *x), None)
            return fg.scan(step, tokens, (places, keys))[0][:, start:]

        jitted = fg.jit(run, backend=backend)
        return lambda: jitted(params, padded)

    def whole_in_a_loop() -> Run:
        step = fg.jit(lambda params, *args: whole_pass(gpt, params, *args), backend=backend)

        def run() -> Tensor:
            tokens = padded
            for place, key in zip(places, keys, strict=True):
                tokens = step(params, tokens, place, key)
            return tokens[:, start:]

        return run

    def growing() -> Run:
        def run() -> Tensor:
            tokens = prompt
            for place, key in zip(places, keys, strict=True):
                tokens = whole_pass(gpt, params, F.pad(tokens, (0, 1)), place, key)
            return tokens[:, start:]

        return run

    return {
        CACHED: one_program,
        "fg.jit, cache, a step in a loop": loop_of_steps,
        "fg.jit, no cache, one program": whole_in_one_program,
        "fg.jit, no cache, a step in a loop": whole_in_a_loop,
        "uncompiled, no cache, growing": growing,
    }


def generation_times(options: Options) -> Table:
    """Milliseconds of one call in every form.

    Raises:
        RuntimeError: if a form's tokens differ from the first's; names it.
    """
    runs, failures = attempt(makers(options.backend))
    (_, expected), *others = [(name, run()) for name, run in runs.items()]
    for name, tokens in others:
        if not torch.equal(tokens, expected):
            raise RuntimeError(f"bench: expected the same tokens from all, got others from {name}")
    times = interleave(runs, max(3, options.rounds // 8), warmup=0)  # they have run
    return Table("s", times, failures, "All give the same tokens.").scaled(1e3, "ms")
