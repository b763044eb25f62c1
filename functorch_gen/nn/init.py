"""Initial distributions: those that ``torch.nn`` draws from, as functions of a key."""

import math
from collections.abc import Sequence

from torch import Tensor

from functorch_gen import random
from functorch_gen.nn.parts import name_key
from functorch_gen.typing import Key, Params

__all__ = ["fan_in_uniform", "init_affine", "xavier_uniform"]


def fan_in_uniform(key: Key, shape: Sequence[int], fan_in: int, gain: float = 1.0) -> Tensor:
    """U(-b, b) with b = gain / sqrt(fan_in): the weights and biases of torch's linear and convolution layers.

    It is He's uniform law with a = sqrt(5). Source: He et al. 2015, arXiv:1502.01852; ``torch.nn.Linear``.

    >>> bool(fan_in_uniform(random.key(0), (2, 16), fan_in=16).abs().max() <= 0.25)
    True
    """
    bound = gain / math.sqrt(fan_in)
    return random.uniform(key, tuple(shape), minval=-bound, maxval=bound)


def xavier_uniform(key: Key, shape: tuple[int, int], gain: float = 1.0) -> Tensor:
    """U(-b, b) with b = gain sqrt(6 / (fan_in + fan_out)) for a matrix (fan_out, fan_in).

    Source: Glorot and Bengio 2010, eq. 16.

    >>> bool(xavier_uniform(random.key(0), (4, 2)).abs().max() <= 1.0)
    True
    """
    bound = gain * math.sqrt(6 / sum(shape))
    return random.uniform(key, shape, minval=-bound, maxval=bound)


def init_affine(key: Key, shape: tuple[int, ...], *, fan_in: int, bias_size: int | None, gain: float = 1.0) -> Params:
    """``{"weight": shape, "bias": (bias_size,)}`` by :func:`fan_in_uniform`; no bias when ``bias_size`` is None.

    >>> sorted(init_affine(random.key(0), (2, 3), fan_in=3, bias_size=2))
    ['bias', 'weight']
    """
    params = {"weight": fan_in_uniform(name_key(key, "weight"), shape, fan_in, gain)}
    if bias_size is not None:
        params["bias"] = fan_in_uniform(name_key(key, "bias"), (bias_size,), fan_in, gain)
    return params
