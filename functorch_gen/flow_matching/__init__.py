"""Flow matching: paths, one objective, couplings, sampling and likelihood; few steps by MeanFlow and consistency."""

from functorch_gen.flow_matching.consistency import (
    consistency_function,
    consistency_loss,
    consistency_tangent,
    sample_consistency,
)
from functorch_gen.flow_matching.coupling import entropic_coupling, exact_coupling, sinkhorn, squared_distances
from functorch_gen.flow_matching.mean_flow import (
    AverageVelocity,
    average_velocity_target,
    guided_velocity,
    mean_flow_loss,
    sample_mean_flow,
)
from functorch_gen.flow_matching.objective import Coupling, loss, loss_at
from functorch_gen.flow_matching.paths import (
    ConditionalOT,
    Trigonometric,
    Velocity,
    check_times,
    check_velocity,
    conditional_velocity,
    convert,
)
from functorch_gen.flow_matching.sampling import log_prob, reflow, sample, straightness

__all__ = [
    "AverageVelocity",
    "ConditionalOT",
    "Coupling",
    "Trigonometric",
    "Velocity",
    "average_velocity_target",
    "check_times",
    "check_velocity",
    "conditional_velocity",
    "consistency_function",
    "consistency_loss",
    "consistency_tangent",
    "convert",
    "entropic_coupling",
    "exact_coupling",
    "guided_velocity",
    "log_prob",
    "loss",
    "loss_at",
    "mean_flow_loss",
    "reflow",
    "sample",
    "sample_consistency",
    "sample_mean_flow",
    "sinkhorn",
    "squared_distances",
    "straightness",
]
