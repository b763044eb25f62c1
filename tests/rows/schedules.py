"""Rows of schedules as functions of their parameters, of clipping and noise, and of averages of parameters."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import ema, optim, tree
from functorch_gen.typing import Tree

IN_FLOAT64 = "a schedule is computed in float64, whatever comes in"


def scheduled(name: str, make: Callable[..., Any], parameters: int, **skip: str) -> Case:
    """The value at step 5, as a function of parameters in [0.1, 0.9]."""

    def args(d: Draw) -> tuple[Tensor, ...]:
        return tuple(d.times() for _ in range(parameters))

    return from_draw(f"optim.{name}", lambda *values: make(*values)(5), args, dtype=IN_FLOAT64, **skip)


def two_updates(name: str, make: Callable[..., optim.GradientTransformation], **skip: str) -> Case:
    """``make`` of a number in [0.1, 0.9]: its second update."""

    def fun(number: Tensor, params: Tree, grads: Tree) -> Tree:
        tx = make(number)
        _, state = tx.update(params, tx.init(params), params, value=number)
        return tx.update(grads, state, params, value=number + 1)[0]

    def small(d: Draw) -> Tree:
        return {"w": d(2, 3), "b": d(2)}

    return from_draw(f"optim.{name}", fun, lambda d: (d.times(), small(d), small(d)), **skip)


def pairs(d: Draw) -> tuple[Tree, ...]:
    return d.times(), {"w": d(2), "b": d()}, {"w": d(2), "b": d()}


def averaged(name: str, make: Callable[..., ema.EMA], **skip: str) -> Case:
    """``make`` of a number in [0.1, 0.9]: the average after two updates."""

    def fun(number: Tensor, a: Tree, b: Tree) -> Tree:
        tx = make(number)
        return tx.update(b, tx.update(a, tx.init(b))[1])[0]

    return from_draw(f"ema.{name}", fun, pairs, **skip)


def synthesized(number: Tensor, a: Tree, b: Tree) -> Tree:
    tx = ema.power(0.1)
    _, early = tx.update(a, tx.init(a))
    _, late = tx.update(b, early)
    return ema.synthesize([(0.1, early), (0.1, late)], 0.2 * number)


def switched(number: Tensor, a: Tree, b: Tree) -> Tree:
    tx = ema.constant(number)
    return ema.switch(b, tx.update(b, tx.init(a))[1], every=1)


CASES = [
    scheduled("constant_schedule", optim.constant_schedule, 1, table=ALIKE),
    scheduled("linear_schedule", lambda a, b: optim.linear_schedule(a, b, 9), 2, table=ALIKE),
    scheduled("cosine_decay_schedule", lambda a, b: optim.cosine_decay_schedule(a, 9, b), 2, table=ALIKE),
    scheduled(
        "join_schedules",
        lambda a, b: optim.join_schedules([optim.constant_schedule(a), optim.linear_schedule(a, b, 4)], [3]),
        2,
        table=ALIKE,
    ),
    scheduled(
        "piecewise_interpolate_schedule",
        lambda a: optim.piecewise_interpolate_schedule("cosine", a, {3: 0.5, 8: 0.3}),
        1,
        table=ALIKE,
    ),
    scheduled("polynomial_schedule", lambda a, b, power: optim.polynomial_schedule(a, b, power, 5), 3),
    scheduled(
        "exponential_decay", lambda a, n, rate, end: optim.exponential_decay(a, n + 4, rate, 1, end_value=end), 4
    ),
    scheduled("step_schedule", lambda a, gamma: optim.step_schedule(a, 2, gamma), 2, table=ALIKE),
    scheduled(
        "piecewise_constant_schedule", lambda a, b: optim.piecewise_constant_schedule(a, {2: b, 4: b}), 2, table=ALIKE
    ),
    scheduled(
        "linear_onecycle_schedule", lambda a, b: optim.linear_onecycle_schedule(9, a, div_factor=1 + b), 2, table=ALIKE
    ),
    scheduled(
        "cosine_onecycle_schedule", lambda a, b: optim.cosine_onecycle_schedule(9, a, div_factor=1 + b), 2, table=ALIKE
    ),
    scheduled("warmup_constant_schedule", lambda a, b: optim.warmup_constant_schedule(a, b, 9), 2, table=ALIKE),
    scheduled(
        "warmup_exponential_decay_schedule",
        lambda a, b, c: optim.warmup_exponential_decay_schedule(a, b, 2, 4, c),
        3,
        table=ALIKE,
    ),
    scheduled(
        "warmup_stable_decay_schedule",
        lambda a, b, n: optim.warmup_stable_decay_schedule(a, b, 2 + n, 1 + n, 7 + n, a / 2, "1-sqrt"),
        3,
    ),
    scheduled("inverse_sqrt_schedule", lambda a, b, n: optim.inverse_sqrt_schedule(a, b, 2 + n), 3, table=ALIKE),
    scheduled(
        "sgdr_schedule",
        lambda a, b: optim.sgdr_schedule([{"init_value": a, "peak_value": b, "warmup_steps": 1, "decay_steps": 4}] * 2),
        2,
        table=ALIKE,
    ),
    two_updates("reduce_on_plateau", lambda a: optim.reduce_on_plateau(a, patience=1)),
    two_updates("clip_by_block_rms", optim.clip_by_block_rms, table=ALIKE),
    two_updates("adaptive_grad_clip", optim.adaptive_grad_clip),
    two_updates("centralize", lambda a: optim.centralize(), table=ALIKE),
    from_draw(
        "optim.add_noise",
        lambda eta, key, g: optim.add_noise(eta, 0.5, key).update(g, optim.add_noise(eta, 0.5, key).init(g))[0],
        lambda d: (d.times(), d.key(), {"w": d(2, 3), "b": d()}),
    ),
    averaged("half_life", lambda a: ema.half_life(3 * a, 2, 2 + a), table=ALIKE),
    averaged("power", lambda a: ema.power(0.25 * a)),
    averaged("swa", lambda a: ema.swa(1), table=ALIKE),
    averaged("masked", lambda a: ema.masked(ema.constant(a), exclude="b"), table=ALIKE),
    from_draw("ema.switch", switched, pairs, table=ALIKE),
    from_draw("ema.synthesize", synthesized, pairs),
    from_draw("tree.average", lambda a, b, w: tree.average([a, b], w), lambda d: (d.params(), d.params(), d.times(2))),
]
