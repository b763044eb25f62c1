"""Exponential moving averages of parameters: pairs of pure functions.

``init(params) -> state`` starts the average at the parameters; ``update(params, state) -> (average, state)`` moves it:

    average <- average + (1 - decay_t) (params - average)

The state keeps the average in at least float32 (steps of 1e-4 vanish in bfloat16); the average ``update`` returns has
the parameters' dtypes, ready for the model.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number
from functorch_gen.leaves import at_least_float32, check_params, map_same, scalar_zero
from functorch_gen.typing import Number, Params

__all__ = ["EMA", "EMAState", "average", "constant", "warmup"]


class EMAState(NamedTuple):
    """State of every average in this module."""

    average: Params  # like the parameters, at least float32
    count: Tensor  # optax's name; () int64: updates so far


class EMA(NamedTuple):
    """``init(params) -> state`` and ``update(params, state) -> (average, state)``.

    >>> tx = constant(0.9)
    >>> mean, state = tx.update({"w": torch.ones(1)}, tx.init({"w": torch.zeros(1)}))
    >>> mean
    {'w': tensor([0.1000])}
    """

    init: Callable[[Params], EMAState]
    update: Callable[[Params, EMAState], tuple[Params, EMAState]]


def average(state: EMAState) -> Params:
    """The average itself, in at least float32.

    >>> average(constant(0.9).init({"w": torch.ones(1)}))
    {'w': tensor([1.])}
    """
    return state.average


def constant(decay: Number) -> EMA:
    """average <- decay * average + (1 - decay) * params, from average = the parameters at ``init``.

    After n updates params_k has weight (1 - decay) decay^(n - k), the initial parameters decay^n. Equals
    ``torch.optim.swa_utils.get_ema_multi_avg_fn(decay)``.

    Raises:
        ValueError: if ``decay`` is a number outside [0, 1].

    >>> average(constant(0.5).update([torch.ones(1)], constant(0.5).init([torch.zeros(1)]))[1])
    [tensor([0.5000])]
    """
    check_number("ema.constant", "decay", decay, low=0, high=1)
    return _moving(lambda count: 1 - decay)


def warmup(decay: Number, offset: Number = 10) -> EMA:
    """An average that forgets its start: decay_t = min(decay, (1 + t) / (offset + t)) after t earlier updates.

    With ``offset=2`` it is the plain mean of all parameters seen until ``decay`` binds, with 10 the rule of
    ``tf.train.ExponentialMovingAverage(num_updates=t)``, as in Ho et al.'s and Song et al.'s diffusion code.

    Args:
        offset: the larger, the faster the start is forgotten; >= 1.
    Raises:
        ValueError: if ``decay`` is a number outside [0, 1], or ``offset`` one below 1.

    >>> tx = warmup(0.999)
    >>> tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))[0]
    [tensor([0.9000])]
    """
    check_number("ema.warmup", "decay", decay, low=0, high=1)
    check_number("ema.warmup", "offset", offset, low=1)

    def weight(count: Tensor) -> Tensor:
        early = (offset - 1) / (offset + count.double())  # 1 - (1 + t) / (offset + t)
        return torch.where(early > 1 - decay, early, 1 - decay)

    return _moving(weight)


def _moving(weight: Callable[[Tensor], Number]) -> EMA:
    """The average that moves by the share ``weight(count)`` = 1 - decay_t of the way to the parameters."""

    def init(params: Params) -> EMAState:
        check_params("ema", params)
        copies = tree.map(lambda p: at_least_float32(p).clone(), params)  # a donated state must not share their memory
        return EMAState(copies, scalar_zero(params, torch.int64))

    def update(params: Params, state: EMAState) -> tuple[Params, EMAState]:
        share = weight(state.count)
        new = map_same("ema", lambda mean, p: mean + (share * (p - mean)).to(mean.dtype), state.average, params)
        return tree.map(lambda mean, p: mean.to(p.dtype), new, params), EMAState(new, state.count + 1)

    return EMA(init, update)
