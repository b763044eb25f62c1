"""Optimizers as pairs of pure functions, with optax's contract and names; schedules as functions of the step."""

from functorch_gen.flat import Flat, Layout
from functorch_gen.optim.clipping import clip, clip_by_global_norm
from functorch_gen.optim.decay import Mask, add_decayed_weights
from functorch_gen.optim.flat import flatten
from functorch_gen.optim.moments import ScaleByAdamState, TraceState, scale_by_adam, trace
from functorch_gen.optim.optimizers import adam, adamw, sgd
from functorch_gen.optim.scaling import ScaleByScheduleState, scale, scale_by_learning_rate, scale_by_schedule
from functorch_gen.optim.schedules import (
    LearningRate,
    constant_schedule,
    cosine_decay_schedule,
    join_schedules,
    linear_schedule,
    warmup_cosine_decay_schedule,
)
from functorch_gen.optim.transformation import (
    EmptyState,
    GradientTransformation,
    apply_updates,
    chain,
    identity,
    stateless,
)

__all__ = [
    "EmptyState",
    "Flat",
    "GradientTransformation",
    "Layout",
    "LearningRate",
    "Mask",
    "ScaleByAdamState",
    "ScaleByScheduleState",
    "TraceState",
    "adam",
    "adamw",
    "add_decayed_weights",
    "apply_updates",
    "chain",
    "clip",
    "clip_by_global_norm",
    "constant_schedule",
    "cosine_decay_schedule",
    "flatten",
    "identity",
    "join_schedules",
    "linear_schedule",
    "scale",
    "scale_by_adam",
    "scale_by_learning_rate",
    "scale_by_schedule",
    "sgd",
    "stateless",
    "trace",
    "warmup_cosine_decay_schedule",
]
