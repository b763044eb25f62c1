"""Measures of a model: how often and how surely it is right, how far two samples are apart."""

from functorch_gen.metrics.classification import (
    accuracy,
    confusion_matrix,
    expected_calibration_error,
    f1_score,
    precision,
    recall,
    top_k_accuracy,
)
from functorch_gen.metrics.regression import mean_squared_error, r2_score
from functorch_gen.metrics.two_sample import (
    frechet_distance,
    mmd,
    moments,
    nearest_distance,
    sliced_wasserstein,
)

__all__ = [
    "accuracy",
    "confusion_matrix",
    "expected_calibration_error",
    "f1_score",
    "frechet_distance",
    "mean_squared_error",
    "mmd",
    "moments",
    "nearest_distance",
    "precision",
    "r2_score",
    "recall",
    "sliced_wasserstein",
    "top_k_accuracy",
]
