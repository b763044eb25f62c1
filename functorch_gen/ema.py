"""Averages of parameters over a run: pairs of pure functions.

``init(params) -> state`` starts the average at the parameters; ``update(params, state) -> (average, state)`` moves it:

    average <- average + (1 - decay_t) (params - average)

The state keeps the average in at least float32 (steps of 1e-4 vanish in bfloat16); the average ``update`` returns has
the parameters' dtypes, ready for the model. Averages of whole runs or of checkpoints are in
:func:`functorch_gen.tree.average`.
"""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import numerics, tree
from functorch_gen.check import check_number, check_positive
from functorch_gen.flat import Flat
from functorch_gen.leaves import at_least_float32, check_params, map_same, scalar_zero
from functorch_gen.paths import Mask, resolve_mask
from functorch_gen.transforms.context import is_traced
from functorch_gen.typing import Number, Params, Tree

__all__ = [
    "EMA",
    "EMAState",
    "average",
    "constant",
    "half_life",
    "masked",
    "power",
    "swa",
    "switch",
    "synthesize",
    "warmup",
]


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


def half_life(half_life: Number, batch_size: Number = 1, ramp_up: Number | None = None) -> EMA:
    """decay = 2^(-batch_size / half_life): the weight of a parameter halves in ``half_life`` examples.

    With the default ``batch_size`` of 1 the half-life is one in steps. As in EDM's training code.

    Args:
        ramp_up: the half-life is at most this share of the examples seen before, so that the start is forgotten; EDM
            takes 0.05.
    Raises:
        ValueError: if a number is negative.

    Source: Karras et al. 2022, table 7 and training code, arXiv:2206.00364.

    >>> tx = half_life(3.0)
    >>> state = tx.init([torch.ones(1)])
    >>> for _ in range(3):
    ...     mean, state = tx.update([torch.zeros(1)], state)
    >>> mean
    [tensor([0.5000])]
    """
    check_number("ema.half_life", "half_life", half_life, low=0)
    check_number("ema.half_life", "batch_size", batch_size, low=0)
    check_number("ema.half_life", "ramp_up", 0 if ramp_up is None else ramp_up, low=0)

    def weight(count: Tensor) -> Tensor:
        seen = count.double() * batch_size
        length = seen * 0 + half_life if ramp_up is None else (ramp_up * seen).clamp(max=half_life)
        return -torch.expm1(-math.log(2) * batch_size / length.clamp(min=1e-8))

    return _moving(weight)


def power(std: Number) -> EMA:
    """The power-function average of EDM2, whose profile stretches with the run: parameters of step k weigh ~ k^gamma.

    decay_t = (1 - 1/t)^(gamma + 1) at update t = 1, 2, ..., where std^2 = (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1

    So after n updates params_k has weight (k/n)^(gamma + 1) - ((k - 1)/n)^(gamma + 1), and the initial parameters none.
    From snapshots of two such averages, :func:`synthesize` makes any other.

    Args:
        std: width of the profile as a share of the run's length, 0 < std <= 12^-0.5, which is the plain mean. EDM2
            tracks 0.05 and 0.1.
    Raises:
        ValueError: if ``std`` is a number out of range.

    Source: Karras et al. 2024, eq. 1 to 3, arXiv:2312.02696.

    >>> tx = power(0.1)
    >>> mean, state = tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))
    >>> tx.update([torch.zeros(1)], state)[0]
    [tensor([0.0041])]
    """
    gamma = _exponent("ema.power", std)

    def weight(count: Tensor) -> Tensor:
        base = 1 - 1 / (count.double() + 1)
        return 1 - numerics.safe_where(base > 0, lambda base: base ** (gamma + 1), base)

    return _moving(weight)


def _exponent(name: str, std: Number) -> Number:
    """The largest root of (g + 2)^2 (g + 3) std^2 = g + 1, which is g^3 + 7 g^2 + (16 - s) g + 12 - s, s = std^-2."""
    check_number(name, "std", std, high=12**-0.5)
    if isinstance(std, int | float):
        check_positive(name, std=std)
    lib: Any = math if isinstance(std, int | float) else torch
    s = (std if lib is math else torch.ones((), dtype=torch.float64) * std) ** -2
    p, q = -(s + 1 / 3), 4 / 3 * s + 2 / 27  # of y^3 + p y + q, g = y - 7/3: Viete's formula
    root = lib.sqrt(-p / 3)
    return 2 * root * lib.cos(lib.acos(-q / (2 * root**3)) / 3) - 7 / 3


def swa(start: Number = 0, every: Number = 1) -> EMA:
    """The plain mean of the parameters of updates start, start + every, ...; before, the parameters themselves.

    Equals ``torch.optim.swa_utils.AveragedModel``, updated in these steps.

    Args:
        start: the first update that counts, the very first being 0.
    Raises:
        ValueError: if ``start`` < 0 or ``every`` < 1.

    Source: Izmailov et al. 2018, algorithm 1, arXiv:1803.05407.

    >>> tx = swa()
    >>> mean, state = tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))
    >>> tx.update([torch.zeros(1)], state)[0]
    [tensor([0.5000])]
    """
    check_number("ema.swa", "start", start, low=0)
    check_number("ema.swa", "every", every, low=1)

    def weight(count: Tensor) -> Tensor:
        after = (count - start).double().clamp(min=0)
        return torch.where(after % every == 0, 1 / (1 + after / every), 0.0)

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


def masked(tx: EMA, include: Mask | None = None, exclude: Mask = ()) -> EMA:
    """Averages the leaves that ``include`` selects and ``exclude`` does not; the others are the current parameters.

    Args:
        include: a glob on the path, several globs, a tree of bools, or a function from the parameters to such a tree;
            by default all.
        exclude: the same; by default none.
    Raises:
        ValueError: in ``update``, if a glob matches no path.

    >>> tx = masked(constant(0.9), exclude="*.bias")
    >>> params = {"layer": {"bias": torch.zeros(1), "weight": torch.zeros(1)}}
    >>> tx.update(tree.ones_like(params), tx.init(params))[0]
    {'layer': {'bias': tensor([1.]), 'weight': tensor([0.1000])}}
    """

    def chosen(params: Params) -> Tree:
        whole = params.layout.whole if isinstance(params, Flat) else params
        dropped = resolve_mask("ema.masked", exclude, whole)
        kept = tree.map(lambda drop: not drop, dropped)
        if include is not None:
            kept = tree.map(lambda keep, drop: keep and not drop, resolve_mask("ema.masked", include, whole), dropped)
        return params.layout.spread(kept) if isinstance(params, Flat) else kept

    def choose(keep: bool | Tensor, mean: Tensor, p: Tensor) -> Tensor:
        if isinstance(keep, Tensor):
            return torch.where(keep, mean, p)
        return mean if keep else p.to(mean.dtype, copy=True)  # a donated state must not share memory

    def update(params: Params, state: EMAState) -> tuple[Params, EMAState]:
        kept, (_, new) = chosen(params), tx.update(params, state)
        mean = tree.map(choose, kept, new.average, params)
        return tree.map(lambda mean, p: mean.to(p.dtype), mean, params), new._replace(average=mean)

    return EMA(tx.init, update)


def switch(params: Params, state: EMAState, every: Number) -> Params:
    """Switch EMA: the average in place of the parameters after each ``every``-th update, else the parameters.

    Called after the training step; the average goes on from where it is::

        train_state, metrics = step(train_state, batch)
        params = ema.switch(train_state.params, train_state.ema, every=1000)
        train_state = train_state._replace(params=params)

    Args:
        every: steps; Li et al. take an epoch.

    Source: Li et al. 2024, algorithm 1, arXiv:2402.09240.

    >>> state = EMAState([torch.zeros(1)], torch.tensor(10))
    >>> switch([torch.ones(1)], state, every=5), switch([torch.ones(1)], state, every=4)
    ([tensor([0.])], [tensor([1.])])
    """
    check_number("ema.switch", "every", every, low=1)
    now = (state.count > 0) & (state.count % every == 0)
    return map_same("ema.switch", lambda p, mean: torch.where(now, mean.to(p.dtype), p), params, state.average)


def synthesize(snapshots: Sequence[tuple[Number, EMAState]], std: Number, step: Number | None = None) -> Params:
    """The power-function average of width ``std`` at ``step``, from snapshots of others: post-hoc EMA.

    Of the weighted sums of snapshots, the one whose profile has the least squared distance to the wanted profile.

    Args:
        snapshots: pairs of a width and the state that :func:`power` of that width left after some update: at several
            steps, and of two widths or more.
        std: as in :func:`power`.
        step: where the wanted profile ends; by default at the latest snapshot.
    Raises:
        ValueError: if there are no snapshots, one is of before the first update, two have width and step in common, or
            a width is out of range.

    Source: Karras et al. 2024, section 3.2 and appendix C, arXiv:2312.02696.

    >>> tx = power(0.1)
    >>> _, state = tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))
    >>> synthesize([(0.1, state)], std=0.1)
    [tensor([1.])]
    """
    if not snapshots:
        raise ValueError("ema.synthesize: expected at least one snapshot, got none")
    times = torch.stack([state.count for _, state in snapshots]).double()
    gammas = torch.stack([0 * times[0] + _exponent("ema.synthesize", width) for width, _ in snapshots])
    if not is_traced():
        _check_distinct(times, gammas)
    time = times.amax() if step is None else 0 * times[0] + step
    gamma = 0 * time + _exponent("ema.synthesize", std)
    gram = _inner(times[:, None], gammas[:, None], times, gammas)
    # not by linalg.solve, whose forward derivatives are wrong under vmap in torch 2.13
    weights = (torch.linalg.inv(gram) @ _inner(times, gammas, time, gamma)).unbind()

    def combine(*averages: Tensor) -> Tensor:
        total: Any = sum(w * x for w, x in zip(weights, averages, strict=True))
        return total.to(averages[0].dtype)

    return map_same("ema.synthesize", combine, *[state.average for _, state in snapshots])


def _check_distinct(times: Tensor, gammas: Tensor) -> None:
    if not (times > 0).all():
        raise ValueError("ema.synthesize: expected snapshots after an update, got one with count 0")
    if len({*zip(times.tolist(), gammas.tolist(), strict=True)}) < len(times):
        raise ValueError("ema.synthesize: expected snapshots that differ in width or step, got two alike")


def _inner(t_a: Tensor, gamma_a: Tensor, t_b: Tensor, gamma_b: Tensor) -> Tensor:
    """Inner products of the profiles (gamma + 1) tau^gamma / t^(gamma + 1) on [0, t]: appendix C."""
    ratio = (t_a / t_b) ** torch.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * torch.maximum(t_a, t_b))
