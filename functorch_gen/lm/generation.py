"""Generation with a cache: the prompt is read once, then each token costs one position."""

from typing import Any, Protocol

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_shape
from functorch_gen.lm.filters import sample_token
from functorch_gen.losses.per_example import check_integers
from functorch_gen.nn import KVCache
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.transforms.scan import scan
from functorch_gen.typing import Key, Number, Params

__all__ = ["CachedModel", "decode", "fill_after", "generate", "prefill"]


class CachedModel(Protocol):
    """What generation asks of a model; :class:`functorch_gen.models.GPT` is one."""

    def init_cache(
        self,
        batch: tuple[int, ...],
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        /,
    ) -> dict[str, KVCache]:
        """Empty caches by name."""
        ...

    def __call__(
        self, params: Params, tokens: Tensor, /, *, cache: dict[str, KVCache], lengths: Tensor | None = None
    ) -> Any:
        """Logits (..., l, v) of the tokens that follow those of (..., l), and the new cache."""
        ...


def prefill(
    model: CachedModel, params: Params, prompt: Tensor, max_new_tokens: int, *, lengths: Tensor | None = None
) -> tuple[Tensor, dict[str, KVCache]]:
    """Reads a prompt (..., l): the logits (..., v) of the next token, and a cache with room for more.

    Args:
        max_new_tokens: that the cache is to hold besides the prompt.
        lengths: (...) integers in [1, l]: how many of the tokens are the prompt of each sequence, the rest is padding;
            all when None.
    Raises:
        TypeError: if the prompt is no tensor of integers.
        ValueError: if it is empty, or both together are longer than the model's context.

    >>> from functorch_gen.models import GPT
    >>> gpt = GPT(vocab_size=5, context=8, num_layers=1, num_heads=1, embed_dim=2)
    >>> logits, cache = prefill(gpt, gpt.init(random.key(0)), torch.tensor([[1, 2, 3]]), max_new_tokens=5)
    >>> logits.shape, cache["block0"].lengths
    (torch.Size([1, 5]), tensor([3]))
    """
    length = check_shape(prompt, "... l", "prefill: prompt")["l"]
    check_integers("prefill: prompt", prompt, tuple(prompt.shape))
    if not length:
        raise ValueError(f"prefill: prompt: expected at least one token, got shape {tuple(prompt.shape)}")
    dtype = next((x.dtype for x in tree.leaves(params)), torch.float32)
    cache = model.init_cache(tuple(prompt.shape[:-1]), length + max_new_tokens, dtype, prompt.device)
    logits, cache = model(params, prompt, cache=cache, lengths=lengths)
    if lengths is None:
        return logits[..., -1, :], cache
    last = (lengths.to(torch.int64) - 1).unsqueeze(-1).unsqueeze(-1)
    return torch.take_along_dim(logits, last, -2).squeeze(-2), cache


def decode(
    key: Key,
    model: CachedModel,
    params: Params,
    token: Tensor,
    cache: dict[str, KVCache],
    *,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
) -> tuple[Tensor, dict[str, KVCache]]:
    """One step: the token (...) goes in, the next one is drawn: -> (token (...), cache).

    In a loop of one's own: ``step = jit(lambda key, params, token, cache: decode(key, model, params, token, cache),
    donate_argnums=3)`` writes each cache over the one before.

    Args:
        temperature, top_k, top_p, min_p: of :func:`filter_logits`.

    >>> from functorch_gen.models import GPT
    >>> gpt = GPT(vocab_size=5, context=8, num_layers=1, num_heads=1, embed_dim=2)
    >>> params = gpt.init(random.key(0))
    >>> token, cache = decode(random.key(1), gpt, params, torch.tensor([3]), gpt.init_cache(1))
    >>> token.shape, cache["block0"].lengths
    (torch.Size([1]), tensor([1]))
    """
    logits, cache = model(params, token.unsqueeze(-1), cache=cache)
    options: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    return sample_token(key, logits.squeeze(-2), **options), cache


def generate(
    key: Key,
    model: CachedModel,
    params: Params,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
    lengths: Tensor | None = None,
    stop_token: int | None = None,
) -> Tensor:
    """Tokens that continue a prompt: (..., l) -> (..., max_new_tokens), the new ones alone.

    The prompt is read at once, then a :func:`scan` draws one token after the other. Under :func:`jit` all of it is one
    program, whose size does not depend on the number of tokens.

    Args:
        temperature, top_k, top_p, min_p: of :func:`filter_logits`; temperature 0 takes the most probable token.
        lengths: of the prompts, when they are padded on the right; see :func:`prefill`.
        stop_token: ends a sequence; what would follow is this token too.
    Raises:
        TypeError: if the prompt is no tensor of integers.
        ValueError: if it is empty, ``max_new_tokens`` < 1, or both together are longer than the model's context.

    >>> from functorch_gen.models import GPT
    >>> gpt = GPT(vocab_size=5, context=8, num_layers=1, num_heads=1, embed_dim=2)
    >>> prompt = torch.tensor([[1, 2, 3], [4, 0, 0]])
    >>> generate(random.key(1), gpt, gpt.init(random.key(0)), prompt, 4, lengths=torch.tensor([3, 1])).shape
    torch.Size([2, 4])
    """
    check_sizes("generate", max_new_tokens=max_new_tokens)
    options: Any = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    logits, cache = prefill(model, params, prompt, max_new_tokens, lengths=lengths)
    keys = random.split(key, max_new_tokens)
    first = sample_token(keys[0], logits, **options)

    def step(carry: Any, key: Key) -> tuple[Any, Tensor]:
        token, cache = carry
        token, cache = decode(key, model, params, token, cache, **options)
        return (token, cache), token

    _, rest = scan(step, (first, cache), keys[1:])
    tokens = torch.cat([first.unsqueeze(0), rest]).movedim(0, -1)
    return tokens if stop_token is None else fill_after(tokens, stop_token)


def fill_after(tokens: Tensor, stop_token: int) -> Tensor:
    """``stop_token`` in every place after its first: (..., n) -> (..., n).

    >>> fill_after(torch.tensor([[3, 0, 2, 1], [1, 1, 2, 0]]), 0)
    tensor([[3, 0, 0, 0],
            [1, 1, 2, 0]])
    """
    return torch.where((tokens == stop_token).cumsum(-1) > 0, stop_token, tokens)
