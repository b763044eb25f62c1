"""Rows of flow matching: paths, losses, couplings, samplers; a full row of each kind."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from zoo_case import ALIKE, from_draw

from functorch_gen import flow_matching, random
from functorch_gen.noise import VPCosine

KEY = random.key(7)


def velocity(w: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Some smooth velocity with parameters (3, 2)."""
    return lambda x_t, t: torch.tanh(x_t @ w[:2] + t[:, None] * w[2])


def average_velocity(w: Tensor) -> Callable[..., Tensor]:
    """Some smooth average velocity with parameters (3, 2)."""
    return lambda x_t, r, t: torch.tanh(x_t @ w[:2] + (t * t - r)[:, None] * w[2])


def convert(output: Tensor, x_t: Tensor, t: Tensor, source: str, to: str) -> Tensor:
    return flow_matching.convert(output, x_t, t, schedule=VPCosine(), source=source, to=to)


CONSTANT = "draws pairs by comparing numbers: constant to derivatives"
DETACHED = "the target is held constant: finite differences of the loss see it move"

PATHS = [
    from_draw(
        "flow_matching.ConditionalOT",
        lambda x, noise, t: flow_matching.conditional_velocity(flow_matching.ConditionalOT(0.1), x, noise, t),
        lambda d: (d(2, 3), d(2, 3), d.times(2)),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.conditional_velocity",
        lambda x, noise, t: flow_matching.conditional_velocity(flow_matching.Trigonometric(), x, noise, t),
        lambda d: (d(2, 3), d(2, 3), d.times(2)),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.convert to score",
        partial(convert, source="velocity", to="score"),
        lambda d: (d(2, 3), d(2, 3), d.times(2)),
    ),
    from_draw(
        "flow_matching.convert from score",
        partial(convert, source="score", to="velocity"),
        lambda d: (d(2, 3), d(2, 3), d.times(2)),
        table=ALIKE,
    ),
]

LOSSES = [
    from_draw("flow_matching.loss", lambda w, x: flow_matching.loss(velocity(w), KEY, x), lambda d: (d(3, 2), d(4, 2))),
    from_draw(
        "flow_matching.loss_at",
        lambda w, x, noise, t: flow_matching.loss_at(velocity(w), x, noise, t),
        lambda d: (d(3, 2), d(2, 2), d(2, 2), d.times(2)),
        table=ALIKE,
    ),
]

COUPLINGS = [
    from_draw(
        "flow_matching.sinkhorn",
        partial(flow_matching.sinkhorn, reg=0.5, steps=3),
        lambda d: (d.times(2, 3),),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.squared_distances",
        flow_matching.squared_distances,
        lambda d: (d(2, 3), d(3, 3)),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.entropic_coupling",
        lambda x, noise: flow_matching.entropic_coupling(KEY, x, noise, steps=5),
        lambda d: (d(3, 2), d(3, 2)),
        derivatives=CONSTANT,
    ),
]

SAMPLING = [
    from_draw(
        "flow_matching.sample",
        lambda w: flow_matching.sample(KEY, velocity(w), (2, 2), steps=2, dtype=w.dtype),
        lambda d: (d(3, 2),),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.log_prob",
        lambda w, x: flow_matching.log_prob(velocity(w), x, steps=2, method="heun"),
        lambda d: (d(3, 2), d(2, 2)),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.straightness",
        lambda w: flow_matching.straightness(KEY, velocity(w), (2, 2), steps=2, dtype=w.dtype),
        lambda d: (d(3, 2),),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.reflow",
        lambda w: flow_matching.reflow(KEY, velocity(w), (2, 2), steps=2, dtype=w.dtype),
        lambda d: (d(3, 2),),
        table=ALIKE,
    ),
]

FEW_STEPS = [
    from_draw(
        "flow_matching.mean_flow_loss",
        lambda w, x: flow_matching.mean_flow_loss(average_velocity(w), KEY, x, ratio=0.5),
        lambda d: (d(3, 2), d(4, 2)),
        derivatives=DETACHED,
    ),
    from_draw(
        "flow_matching.average_velocity_target",
        lambda w, x_t, v, r, t: flow_matching.average_velocity_target(average_velocity(w), x_t, v, r, t)[0],
        lambda d: (d(3, 2), d(2, 2), d(2, 2), 0.1 * d.times(2), d.times(2)),
    ),
    from_draw(
        "flow_matching.guided_velocity",
        lambda w, x_t, v, t: flow_matching.guided_velocity(
            lambda x_t, r, t, scale: scale * average_velocity(w)(x_t, r, t), x_t, v, t, 2.0, 0.5, omega=2.0, kappa=0.5
        ),
        lambda d: (d(3, 2), d(2, 2), d(2, 2), d.times(2)),
        derivatives=DETACHED,
    ),
    from_draw(
        "flow_matching.sample_mean_flow",
        lambda w: flow_matching.sample_mean_flow(KEY, average_velocity(w), (2, 2), steps=2, dtype=w.dtype),
        lambda d: (d(3, 2),),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.consistency_function",
        lambda w, x_t, t: flow_matching.consistency_function(velocity(w), sigma_data=0.5)(x_t, t),
        lambda d: (d(3, 2), d(2, 2), d.times(2)),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.consistency_loss",
        lambda w, x: flow_matching.consistency_loss(velocity(w), KEY, x),
        lambda d: (d(3, 2), d(4, 2)),
        derivatives=DETACHED,
    ),
    from_draw(
        "flow_matching.consistency_tangent",
        lambda w, x_t, v, t: flow_matching.consistency_tangent(velocity(w), x_t, v, t)[0],
        lambda d: (d(3, 2), d(2, 2), d(2, 2), d.times(2)),
        table=ALIKE,
    ),
    from_draw(
        "flow_matching.sample_consistency",
        lambda w: flow_matching.sample_consistency(KEY, velocity(w), (2, 2), times=(1.0, 0.7), dtype=w.dtype),
        lambda d: (d(3, 2),),
        table=ALIKE,
    ),
]

CASES = [*PATHS, *LOSSES, *COUPLINGS, *SAMPLING, *FEW_STEPS]
