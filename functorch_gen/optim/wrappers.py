"""Transformations around another: accumulation, averages, hyper-parameters in the state, bad gradients."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number, check_positive
from functorch_gen.gradient_transformation import GradientTransformation, require_params, stateless, update_if
from functorch_gen.leaves import copies, map_same, scalar_zero
from functorch_gen.optim.memory import Leaf, average, check_hyperparameters, remember, weights
from functorch_gen.paths import as_tensor, get
from functorch_gen.schedules import LearningRate
from functorch_gen.typing import Number, Params, State, Tree

__all__ = [
    "ApplyIfFiniteState", "EmaState", "InjectHyperparamsState", "LookaheadState", "MultiStepsState",
    "ScheduleFreeState", "apply_if_finite", "ema", "inject_hyperparams", "lookahead", "multi_steps", "schedule_free",
    "schedule_free_eval_params", "zero_nans",
]  # fmt: skip


class MultiStepsState(NamedTuple):
    """State of :func:`multi_steps`, with optax's names."""

    mini_step: Tensor  # () int64: gradients since the last update
    gradient_step: Tensor  # () int64: updates so far
    inner_opt_state: State
    acc_grads: Tree  # like the parameters, at least float32: mean of the gradients since the last update


def multi_steps(tx: GradientTransformation, every_k_schedule: int | Callable[[Tensor], Any]) -> GradientTransformation:
    """One update of ``tx`` from the mean of k gradients, zero updates between. Equals ``optax.MultiSteps``.

    Of losses that are means, it is the update of one batch k times as large. For k = 1 it is ``tx`` itself. k may be a
    function of the number of updates so far.

    >>> tx = multi_steps(zero_nans(), 2)
    >>> state = tx.update([torch.tensor(1.0)], tx.init([torch.tensor(0.0)]))[1]
    >>> tx.update([torch.tensor(3.0)], state)[0]
    [tensor(2.)]
    """
    if every_k_schedule == 1:
        return tx
    if not callable(every_k_schedule):
        check_positive("multi_steps", every_k_schedule=every_k_schedule)

    def init(params: Params) -> MultiStepsState:
        count = scalar_zero(params, torch.int64)
        return MultiStepsState(count, count.clone(), tx.init(params), tree.zeros_like(copies(params)))

    def update(grads: Tree, state: MultiStepsState, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        n = state.mini_step + 1
        last = n >= (every_k_schedule(state.gradient_step) if callable(every_k_schedule) else every_k_schedule)
        mean = map_same("multi_steps", lambda g, m: (m + (g - m) / n).to(m.dtype), grads, state.acc_grads)
        updates, inner = update_if(last, tx, mean, state.inner_opt_state, params, **extra)
        rest = tree.where(last, tree.zeros_like(mean), mean)
        return updates, MultiStepsState(torch.where(last, 0, n), state.gradient_step + last.long(), inner, rest)

    return GradientTransformation(init, update)


class EmaState(NamedTuple):
    """State of :func:`ema`."""

    count: Tensor  # () int64: updates so far
    ema: Tree  # like the parameters, at least float32: mean of the updates
    ema_weight: Tensor  # () 1 - decay^count


def ema(decay: Number, debias: bool = True) -> GradientTransformation:
    """The mean of updates, m <- decay m + (1 - decay) u, divided by 1 - decay^t if debiased. Equals ``optax.ema``.

    >>> tx, updates = ema(0.9), [torch.tensor([2.0])]
    >>> tx.update(updates, tx.init(updates))[0]
    [tensor([2.])]
    """
    check_hyperparameters("ema", decay=decay)

    def rule(state: EmaState) -> Leaf:
        def leaf(u: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
            m = average(u, m, decay)
            return m / state.ema_weight if debias else m, m

        return leaf

    return remember("ema", EmaState, rule, weights(ema=decay))


class LookaheadState(NamedTuple):
    """State of :func:`lookahead`."""

    fast_state: State
    slow_params: Params  # like the parameters, at least float32: for evaluation
    steps_since_sync: Tensor  # () int64


def lookahead(tx: GradientTransformation, sync_period: int, slow_step_size: Number) -> GradientTransformation:
    """After every ``sync_period`` steps, slow <- slow + slow_step_size (p - slow) and p <- slow.

    The parameters are the fast ones, and run as under ``optax.lookahead``. ``update`` needs them.

    Source: Zhang et al. 2019, algorithm 1, arXiv:1907.08610.

    >>> tx, params = lookahead(zero_nans(), sync_period=1, slow_step_size=0.5), [torch.tensor(3.0)]
    >>> tx.update([torch.tensor(1.0)], tx.init(params), params)[0]
    [tensor(0.5000)]
    """
    check_positive("lookahead", sync_period=sync_period)
    check_number("lookahead", "slow_step_size", slow_step_size, low=0, high=1)

    def init(params: Params) -> LookaheadState:
        return LookaheadState(tx.init(params), copies(params), scalar_zero(params, torch.int64))

    def update(grads: Tree, state: LookaheadState, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        params = require_params("lookahead", params)
        updates, fast = tx.update(grads, state.fast_state, params, **extra)
        steps = state.steps_since_sync + 1
        sync = steps >= sync_period

        def synchronised(slow: Tensor, p: Tensor, u: Tensor) -> Tensor:
            return torch.where(sync, slow + slow_step_size * (p + u - slow), slow).to(slow.dtype)

        slow = map_same("lookahead", synchronised, state.slow_params, params, updates)
        updates = tree.map(lambda u, s, p: torch.where(sync, s - p, u).to(s.dtype), updates, slow, params)
        return updates, LookaheadState(fast, slow, torch.where(sync, 0, steps))

    return GradientTransformation(init, update)


class ScheduleFreeState(NamedTuple):
    """State of :func:`schedule_free`, with optax's names."""

    b1: Tensor  # ()
    weight_sum: Tensor  # () sum of the weights in the average x
    step_count: Tensor  # () int64: 1 before the first update, as in optax
    max_lr: Tensor  # () the highest learning rate so far
    base_optimizer_state: State
    z: Params  # like the parameters, at least float32: the iterates of the base optimizer


def schedule_free(
    tx: GradientTransformation, learning_rate: LearningRate, b1: Number = 0.9, weight_lr_power: float = 2.0
) -> GradientTransformation:
    """Averages the iterates of ``tx`` instead of lowering its learning rate. Equals ``optax.contrib.schedule_free``.

    z <- z + u(y),  x <- (1 - c) x + c z with c = w / sum of all w, w = (highest learning rate)^weight_lr_power,
    y = b1 x + (1 - b1) z

    The parameters are y, and ``update`` needs them; evaluate at x: :func:`schedule_free_eval_params`. ``tx`` should be
    without momentum, ``adam(learning_rate, b1=0.0)``; a schedule is asked for step 1 first, as in optax.

    Source: Defazio et al. 2024, eq. 2 to 4 and algorithm 1, arXiv:2405.15682.

    >>> tx, params = schedule_free(zero_nans(), 0.1), [torch.tensor(3.0)]
    >>> tx.update([torch.tensor(1.0)], tx.init(params), params)[0]
    [tensor(1.)]
    """
    check_number("schedule_free", "b1", b1, low=0, high=1)
    if isinstance(b1, int | float):
        check_positive("schedule_free", b1=b1)

    def init(params: Params) -> ScheduleFreeState:
        zero, one = scalar_zero(params), scalar_zero(params, torch.int64) + 1
        return ScheduleFreeState(as_tensor(zero, b1), zero, one, zero.clone(), tx.init(params), copies(params))

    def update(grads: Tree, state: ScheduleFreeState, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        params, dtype = require_params("schedule_free", params), state.max_lr.dtype
        lr = learning_rate(state.step_count) if callable(learning_rate) else learning_rate
        max_lr = torch.where(state.max_lr < lr, lr, state.max_lr).to(dtype)
        weight = (max_lr**weight_lr_power).to(dtype)
        total = state.weight_sum + weight
        c = weight / torch.where(total == 0, 1, total)
        updates, base = tx.update(grads, state.base_optimizer_state, params, **extra)
        z = map_same("schedule_free", lambda z, u: (z + u).to(z.dtype), state.z, updates)

        def move(y: Tensor, old: Tensor, new: Tensor) -> Tensor:
            x = average(new, _average(y, old, b1), 1 - c)
            return (average(new, x, b1) - y).to(new.dtype)

        new = ScheduleFreeState(state.b1, total, state.step_count + 1, max_lr, base, z)
        return map_same("schedule_free", move, params, state.z, z), new

    return GradientTransformation(init, update)


def _average(y: Tensor, z: Tensor, b1: Number) -> Tensor:  # x, from y = b1 x + (1 - b1) z
    return (y - (1 - b1) * z) / b1


def schedule_free_eval_params(state: State, params: Params) -> Params:
    """The average x to evaluate at, from the state of an optimizer with a :func:`schedule_free` anywhere in it.

    >>> params = [torch.zeros(1)]
    >>> schedule_free_eval_params(schedule_free(zero_nans(), 0.1).init(params), params)
    [tensor([0.])]
    """
    own = get(state, "ScheduleFreeState")
    return map_same("schedule_free_eval_params", lambda y, z: _average(y, z, own.b1).to(y.dtype), params, own.z)


class InjectHyperparamsState(NamedTuple):
    """State of :func:`inject_hyperparams`."""

    count: Tensor  # () int64: updates so far
    hyperparams: dict[str, Tensor]  # each (), in the widest dtype of the parameters: those of the last update
    inner_state: State


def inject_hyperparams(
    inner_factory: Callable[..., GradientTransformation], static_args: str | Sequence[str] = ()
) -> Callable[..., GradientTransformation]:
    """An optimizer whose hyper-parameters lie in its state, to be read and changed between steps.

    Floats, 0-d tensors and schedules among the arguments, defaults too, are entries of ``state.hyperparams``; schedules
    are evaluated at each step. Integers, flags, all else and ``static_args`` (the name of a mask that is a function,
    say) stay. As ``optax.inject_hyperparams``.

    >>> inject_hyperparams(ema)(decay=0.5).init([torch.zeros(2)]).hyperparams
    {'decay': tensor(0.5000)}
    """
    static = (static_args,) if isinstance(static_args, str) else static_args

    @functools.wraps(inner_factory)
    def make(*args: Any, **kwargs: Any) -> GradientTransformation:
        bound = inspect.signature(inner_factory).bind(*args, **kwargs)
        bound.apply_defaults()
        given: dict[str, Any] = bound.arguments
        inner_factory(**given)  # numbers are checked here: of the tensors there is nothing to check
        injected = [k for k, v in given.items() if k not in static and (isinstance(v, float | Tensor) or callable(v))]

        def init(params: Params) -> InjectHyperparamsState:
            zero, count = scalar_zero(params), scalar_zero(params, torch.int64)
            now = {k: as_tensor(zero, given[k](count) if callable(given[k]) else given[k]).clone() for k in injected}
            return InjectHyperparamsState(count, now, inner_factory(**{**given, **now}).init(params))

        def update(grads: Tree, state: State, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
            old: dict[str, Tensor] = state.hyperparams
            now = {k: as_tensor(x, given[k](state.count)) if callable(given[k]) else x for k, x in old.items()}
            tx = inner_factory(**{**given, **now})
            updates, inner = tx.update(grads, state.inner_state, params, **extra)
            return updates, InjectHyperparamsState(state.count + 1, now, inner)

        return GradientTransformation(init, update)

    return make


def zero_nans() -> GradientTransformation:
    """Zeros in the place of NaNs. The updates are those of ``optax.zero_nans``.

    >>> zero_nans().update([torch.tensor([1.0, float("nan")])], ())[0]
    [tensor([1., 0.])]
    """
    return stateless("zero_nans", lambda grads, *_, **extra: tree.map(lambda g: g.masked_fill(g.isnan(), 0), grads))


class ApplyIfFiniteState(NamedTuple):
    """State of :func:`apply_if_finite`, with optax's names."""

    notfinite_count: Tensor  # () int64: gradients in a row that were not finite
    last_finite: Tensor  # () bool: whether the last were
    total_notfinite: Tensor  # () int64: all so far that were not
    inner_state: State


def apply_if_finite(tx: GradientTransformation, max_consecutive_errors: int | None = None) -> GradientTransformation:
    """Leaves an update out when a gradient is NaN or infinite: parameters and the state of ``tx`` stay.

    As ``optax.apply_if_finite``, where the next goes through, NaNs and all, after ``max_consecutive_errors`` in a row.
    By default none ever does.

    >>> tx, grads = apply_if_finite(zero_nans()), [torch.tensor(float("inf"))]
    >>> tx.update(grads, tx.init(grads))[0]
    [tensor(0.)]
    """

    def init(params: Params) -> ApplyIfFiniteState:
        count = scalar_zero(params, torch.int64)
        return ApplyIfFiniteState(count, count == 0, count.clone(), tx.init(params))

    def update(grads: Tree, state: Any, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        finite = tree.all_finite(grads)
        count = torch.where(finite, 0, state.notfinite_count + 1)
        goes = finite if max_consecutive_errors is None else finite | (count > max_consecutive_errors)
        updates, inner = update_if(goes, tx, grads, state.inner_state, params, **extra)
        return updates, ApplyIfFiniteState(count, finite, state.total_notfinite + (~finite).long(), inner)

    return GradientTransformation(init, update)
