"""Language models: the next-token loss, its value over long texts, and ways to generate."""

from functorch_gen.lm.beam import Beams, beam_search
from functorch_gen.lm.filters import (
    apply_temperature,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample_token,
)
from functorch_gen.lm.generation import CachedModel, decode, fill_after, generate, prefill
from functorch_gen.lm.objective import bits_per_byte, loss, perplexity, text_nll, token_nll
from functorch_gen.lm.speculative import Speculation, generate_speculative

__all__ = [
    "Beams",
    "CachedModel",
    "Speculation",
    "apply_temperature",
    "beam_search",
    "bits_per_byte",
    "decode",
    "fill_after",
    "filter_logits",
    "generate",
    "generate_speculative",
    "keep_min_p",
    "keep_top_k",
    "keep_top_p",
    "loss",
    "perplexity",
    "prefill",
    "sample_token",
    "text_nll",
    "token_nll",
]
