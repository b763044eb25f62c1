"""What a draw may fall on: functions of the logits (..., v) that lower or remove the unlikely tokens.

A removed token has logit -inf. All keep the most probable token, and tokens that are equally probable together.
"""

import math

import torch
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_number, check_positive, check_shape
from functorch_gen.typing import Key, Number

__all__ = ["apply_temperature", "filter_logits", "keep_min_p", "keep_top_k", "keep_top_p", "sample_token"]


def apply_temperature(logits: Tensor, temperature: Number) -> Tensor:
    """logits / temperature; at 0, its limit: the most probable token alone (the first of several).

    Raises:
        TypeError: if the logits are not floating.
        ValueError: if the temperature is a number < 0.

    >>> apply_temperature(torch.tensor([1.0, 3.0]), 0.5), apply_temperature(torch.tensor([1.0, 3.0]), 0)
    (tensor([2., 6.]), tensor([-inf, 0.]))
    """
    v = _check("apply_temperature", logits)
    check_number("apply_temperature", "temperature", temperature, low=0)
    if isinstance(temperature, int | float) and temperature > 0:
        return logits / temperature
    is_best = torch.arange(v, device=logits.device) == logits.argmax(-1, keepdim=True)
    best = torch.zeros_like(logits).masked_fill(~is_best, -math.inf)
    if isinstance(temperature, int | float):
        return best
    t = (logits.new_ones(()) * temperature).to(logits.dtype)
    return torch.where(t > 0, logits / torch.where(t > 0, t, 1.0), best)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keeps the k most probable tokens, and those that are as probable as the k-th.

    Raises:
        TypeError: if the logits are not floating.
        ValueError: if k < 1.
    Source: Fan et al. 2018, section 5.4, arXiv:1805.04833.

    >>> keep_top_k(torch.tensor([1.0, 3.0, 2.0]), 2)
    tensor([-inf, 3., 2.])
    """
    v = _check("keep_top_k", logits)
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"keep_top_k: expected k to be an integer >= 1, got {k!r}")
    least = logits.topk(min(k, v), -1).values[..., -1:]
    return _keep(logits, logits >= least)


def keep_top_p(logits: Tensor, p: Number) -> Tensor:
    """Keeps the nucleus: the fewest most probable tokens whose probabilities sum to p or more, and their equals.

    Raises:
        TypeError: if the logits are not floating.
        ValueError: if p is a number outside [0, 1].
    Source: Holtzman et al. 2020, eq. 2, arXiv:1904.09751.

    >>> keep_top_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.7).exp()
    tensor([0.5000, 0.3000, 0.0000])
    """
    _check("keep_top_p", logits)
    check_number("keep_top_p", "p", p, low=0, high=1)
    probs = logits.softmax(-1)
    rising = probs.sort(-1).values
    within = rising.cumsum(-1) > 1 - p  # what is less probable, with the token itself, is more than may be left out
    least = torch.where(within, rising, rising[..., -1:]).amin(-1, keepdim=True)
    return _keep(logits, probs >= least)


def keep_min_p(logits: Tensor, p: Number) -> Tensor:
    """Keeps the tokens that are at least p times as probable as the most probable one.

    Raises:
        TypeError: if the logits are not floating.
        ValueError: if p is a number outside [0, 1].
    Source: Nguyen et al. 2024, section 3, arXiv:2407.01082.

    >>> keep_min_p(torch.tensor([0.5, 0.3, 0.2]).log(), 0.5).exp()
    tensor([0.5000, 0.3000, 0.0000])
    """
    _check("keep_min_p", logits)
    check_number("keep_min_p", "p", p, low=0, high=1)
    probs = logits.softmax(-1)
    return _keep(logits, probs >= p * probs.amax(-1, keepdim=True))


def filter_logits(
    logits: Tensor,
    *,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
) -> Tensor:
    """The filters that are given, in this order: (..., v) -> (..., v).

    Args:
        temperature: of :func:`apply_temperature`; 0 leaves only the most probable token.
        top_k, top_p, min_p: of :func:`keep_top_k`, :func:`keep_top_p` and :func:`keep_min_p`; None: all tokens stay.

    >>> filter_logits(torch.tensor([1.0, 3.0, 2.0]), temperature=0.5, top_k=2)
    tensor([-inf, 6., 4.])
    """
    logits = apply_temperature(logits, temperature)
    logits = logits if top_k is None else keep_top_k(logits, top_k)
    logits = logits if top_p is None else keep_top_p(logits, top_p)
    return logits if min_p is None else keep_min_p(logits, min_p)


def sample_token(
    key: Key,
    logits: Tensor,
    *,
    temperature: Number = 1.0,
    top_k: int | None = None,
    top_p: Number | None = None,
    min_p: Number | None = None,
) -> Tensor:
    """A token drawn from the filtered distribution: (..., v) -> (...), int64.

    16-bit logits are filtered and drawn from in float32.

    Args:
        temperature, top_k, top_p, min_p: of :func:`filter_logits`.

    >>> sample_token(random.key(0), torch.tensor([[1.0, 3.0, 2.0], [5.0, 1.0, 0.0]]), temperature=0)
    tensor([1, 0])
    """
    _check("sample_token", logits)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return random.categorical(key, filter_logits(wide, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p))


def _check(name: str, logits: Tensor) -> int:
    check_floating(logits, f"{name}: logits")
    v = check_shape(logits, "... v", f"{name}: logits")["v"]
    check_positive(f"{name}: logits", v=v)
    return v


def _keep(logits: Tensor, kept: Tensor) -> Tensor:
    return torch.where(kept, logits, -math.inf)
