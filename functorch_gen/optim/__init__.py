"""Optimizers as pairs of pure functions, with optax's contract and names; schedules as functions of the step."""

# ruff: noqa: I001 (ruff's own layout, a name a line, would be three times as long)
# fmt: off

from functorch_gen.flat import Flat, Layout
from functorch_gen.optim.clipping import (
    AddNoiseState, adaptive_grad_clip, add_noise, centralize, clip, clip_by_block_rms, clip_by_global_norm,
)
from functorch_gen.optim.matrices import scale_by_factored_rms, scale_by_muon
from functorch_gen.optim.moments import (
    ScaleByAdamState, TraceState, scale_by_adadelta, scale_by_adam, scale_by_adamax, scale_by_adan,
    scale_by_amsgrad, scale_by_belief, scale_by_lion, scale_by_radam, scale_by_rms, scale_by_rss, scale_by_stddev,
    trace,
)
from functorch_gen.optim.optimizers import (
    adabelief, adadelta, adafactor, adagrad, adam, adamax, adamw, adan, amsgrad, lamb, lars, lion, muon, nadam,
    polyak_sgd, radam, rmsprop, sgd, sign_sgd,
)
from functorch_gen.optim.partitions import PartitionState, add_decayed_weights, freeze, masked, partition
from functorch_gen.optim.plateau import ReduceOnPlateauState, reduce_on_plateau
from functorch_gen.optim.scaling import (
    ScaleByScheduleState, scale, scale_by_learning_rate, scale_by_param_block_rms, scale_by_polyak,
    scale_by_schedule, scale_by_sign, scale_by_trust_ratio,
)
from functorch_gen.gradient_transformation import (
    EmptyState, GradientTransformation, apply_updates, chain, flatten, identity, named_chain, set_to_zero,
    stateless,
)
from functorch_gen.optim.wrappers import (
    ApplyIfFiniteState, EmaState, InjectHyperparamsState, LookaheadState, MultiStepsState, ScheduleFreeState,
    apply_if_finite, ema, inject_hyperparams, lookahead, multi_steps, schedule_free, schedule_free_eval_params,
    zero_nans,
)
from functorch_gen.paths import Labels, Mask, get, set
from functorch_gen.precision import LossScaleState, MasterWeightsState, dynamic_loss_scale, master_weights, scale_loss
from functorch_gen.schedules import (
    LearningRate, constant_schedule, cosine_decay_schedule, cosine_onecycle_schedule, exponential_decay,
    inverse_sqrt_schedule, join_schedules, linear_onecycle_schedule, linear_schedule, piecewise_constant_schedule,
    piecewise_interpolate_schedule, polynomial_schedule, sgdr_schedule, step_schedule, warmup_constant_schedule,
    warmup_cosine_decay_schedule, warmup_exponential_decay_schedule, warmup_stable_decay_schedule,
)

__all__ = [
    "AddNoiseState", "ApplyIfFiniteState", "EmaState", "EmptyState", "Flat", "GradientTransformation",
    "InjectHyperparamsState", "Labels", "Layout", "LearningRate", "LookaheadState", "LossScaleState", "Mask",
    "MasterWeightsState", "MultiStepsState", "PartitionState", "ReduceOnPlateauState", "ScaleByAdamState",
    "ScaleByScheduleState", "ScheduleFreeState", "TraceState", "adabelief", "adadelta", "adafactor", "adagrad",
    "adam", "adamax", "adamw", "adan", "adaptive_grad_clip", "add_decayed_weights", "add_noise", "amsgrad",
    "apply_if_finite", "apply_updates", "centralize", "chain", "clip", "clip_by_block_rms", "clip_by_global_norm",
    "constant_schedule", "cosine_decay_schedule", "cosine_onecycle_schedule", "dynamic_loss_scale", "ema",
    "exponential_decay", "flatten", "freeze", "get", "identity", "inject_hyperparams", "inverse_sqrt_schedule",
    "join_schedules", "lamb", "lars", "linear_onecycle_schedule", "linear_schedule", "lion", "lookahead", "masked",
    "master_weights", "multi_steps", "muon", "nadam", "named_chain", "partition", "piecewise_constant_schedule",
    "piecewise_interpolate_schedule", "polyak_sgd", "polynomial_schedule", "radam", "reduce_on_plateau", "rmsprop",
    "scale", "scale_by_adadelta", "scale_by_adam", "scale_by_adamax", "scale_by_adan", "scale_by_amsgrad",
    "scale_by_belief", "scale_by_factored_rms", "scale_by_learning_rate", "scale_by_lion", "scale_by_muon",
    "scale_by_param_block_rms", "scale_by_polyak", "scale_by_radam", "scale_by_rms", "scale_by_rss",
    "scale_by_schedule", "scale_by_sign", "scale_by_stddev", "scale_by_trust_ratio", "scale_loss", "schedule_free",
    "schedule_free_eval_params", "set", "set_to_zero", "sgd", "sgdr_schedule", "sign_sgd", "stateless",
    "step_schedule", "trace", "warmup_constant_schedule", "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule", "warmup_stable_decay_schedule", "zero_nans",
]
