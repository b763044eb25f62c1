"""The next-token loss, its units, and its value over a text of any length.

``network(tokens) -> logits`` is the model with its parameters bound: ``lambda tokens: gpt(params, tokens)``. Its logits
at position i are those of token i + 1, given the tokens up to i.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_floating, check_positive, check_shape
from functorch_gen.losses.per_example import check_integers, in_float32
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.transforms.scan import scan

__all__ = ["bits_per_byte", "loss", "perplexity", "text_nll", "token_nll"]

Network: TypeAlias = Callable[[Tensor], Tensor]
"""(b, l) integers -> (b, l, v) logits of the tokens that follow."""


@in_float32
def token_nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log softmax(logits)_token of every token, in nats: (..., v), (...) -> (...).

    Raises:
        TypeError: if the logits are not floating, or the tokens no integers.
        ValueError: if the shapes differ.

    >>> token_nll(torch.tensor([[0.0, 0.0], [0.0, 100.0]]), torch.tensor([1, 0]))
    tensor([  0.6931, 100.0000])
    """
    check_floating(logits, "token_nll: logits")
    check_shape(logits, "... v", "token_nll: logits")
    check_integers("token_nll: tokens", tokens, tuple(logits.shape[:-1]))
    return -torch.log_softmax(logits, -1).gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)


def loss(network: Network, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the tokens of each sequence but the first, in nats: (b, l + 1) -> (b,).

    -1/l sum_i log p(token_i | token_0 ... token_(i-1)), i = 1 .. l

    Args:
        mask: (b, l + 1), bool: the tokens that are to be predicted, over which is averaged: False for padding, say, or
            for a prompt. A sequence without any has loss 0. The first token never is.
    Raises:
        TypeError: if the tokens are no integers, or the mask is not bool.
        ValueError: if there are fewer than two tokens, or the shapes differ.
    Source: Bengio et al. 2003, section 2, "A neural probabilistic language model".

    >>> tokens = torch.tensor([[0, 1, 1], [1, 0, 0]])
    >>> loss(lambda tokens: torch.zeros(*tokens.shape, 4), tokens)  # ln 4
    tensor([1.3863, 1.3863])
    """
    if check_shape(tokens, "b l", "loss: tokens")["l"] < 2:
        raise ValueError(f"loss: tokens: expected at least two of each sequence, got shape {tuple(tokens.shape)}")
    nll = token_nll(network(tokens[:, :-1]), tokens[:, 1:])
    if mask is None:
        return nll.mean(-1)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"loss: mask: expected a bool tensor, got {got}")
    check_shape(mask, "b l", "loss: mask", b=tokens.shape[0], l=tokens.shape[1])
    counted = mask[:, 1:]
    return torch.where(counted, nll, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


def bits_per_byte(nats: Tensor, bytes_per_token: float = 1.0) -> Tensor:
    """A loss in nats per token as bits per byte of the text: nats / (ln 2 bytes_per_token).

    Raises:
        TypeError: if ``nats`` is not floating.
        ValueError: if ``bytes_per_token`` is not positive.

    >>> bits_per_byte(torch.tensor(256.0).log())
    tensor(8.)
    """
    check_floating(nats, "bits_per_byte: nats")
    check_positive("bits_per_byte", bytes_per_token=bytes_per_token)
    return (nats / (math.log(2) * bytes_per_token)).to(nats.dtype)


def perplexity(nats: Tensor) -> Tensor:
    """exp(loss): the number of equally likely tokens that would be as hard to predict.

    Raises:
        TypeError: if ``nats`` is not floating.

    >>> perplexity(torch.tensor(5.0).log())
    tensor(5.)
    """
    check_floating(nats, "perplexity: nats")
    return nats.exp()


def text_nll(
    network: Network, text: Tensor, *, window: int, stride: int | None = None, start: int = 0, batch_size: int = 32
) -> Tensor:
    """-log p of every token of one long text, each predicted exactly once, in nats: (n,) integers -> (n,).

    Windows of ``window`` tokens begin every ``stride`` tokens. Of each the last ``stride`` predictions count, of the
    first all, so that a token is predicted from at least the ``window - stride`` before it, as far as there are any,
    and from ``window`` at most.

    Args:
        network: called with batches (batch_size, window) alone, the last of them padded: a jitted one compiles once.
        stride: half a window when None. Smaller is better and dearer.
        start: the token that stands before the text.
    Raises:
        TypeError: if the text is no tensor of integers.
        ValueError: if there is no token, a size is < 1, ``start`` < 0, or ``stride`` > ``window``.

    >>> nll = text_nll(lambda tokens: torch.zeros(*tokens.shape, 4), torch.tensor([0, 1, 2, 3, 0]), window=2)
    >>> nll.shape, perplexity(nll.mean())
    (torch.Size([5]), tensor(4.))
    """
    n = check_shape(text, "n", "text_nll: text")["n"]
    check_integers("text_nll: text", text, (n,))
    stride = -(-window // 2) if stride is None else stride
    check_sizes("text_nll", tokens=n, window=window, stride=stride, batch_size=batch_size)
    check_sizes("text_nll", minimum=0, start=start)
    if stride > window:
        raise ValueError(f"text_nll: expected stride <= window={window}, got {stride}")
    count = 1 + max(0, math.ceil((n - window) / stride))
    batch_size = min(batch_size, count)
    count = math.ceil(count / batch_size) * batch_size
    begin = stride * torch.arange(count, device=text.device)
    index = begin.unsqueeze(-1) + torch.arange(window, device=text.device)
    padded = F.pad(F.pad(text.long(), (1, 0), value=start), (0, window + (count - 1) * stride - n))
    inputs, targets = (padded[index + shift].unflatten(0, (-1, batch_size)) for shift in (0, 1))
    _, nll = scan(lambda _, both: (None, token_nll(network(both[0]), both[1])), None, (inputs, targets))
    nll = nll.flatten(0, 1)
    return torch.cat([nll[0, : window - stride], nll[:, window - stride :].flatten()])[:n]
