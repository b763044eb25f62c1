"""Rows of losses and of the metrics of classifiers; a full row of each kind."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import losses, metrics
from functorch_gen.typing import Tree

Args = Callable[[Draw], tuple[Tree, ...]]


def full(name: str, args: Args, **settings) -> Case:
    return from_draw(f"losses.{name}", partial(getattr(losses, name), **settings), args)


def alike(name: str, args: Args, **settings) -> Case:
    return from_draw(f"losses.{name}", partial(getattr(losses, name), **settings), args, table=ALIKE)


def pair(d: Draw) -> tuple[Tensor, Tensor]:
    return d(2, 3), d(2, 3)


def triple(d: Draw) -> tuple[Tensor, Tensor, Tensor]:
    return d(2, 3), d(2, 3), d(2, 3)


def scores(d: Draw) -> tuple[Tensor, Tensor]:
    return d(2, 4), d.labels(4, 2)


def signed(d: Draw) -> tuple[Tensor, Tensor]:
    return d(2, 3), 2 * d.labels(2, 2, 3) - 1


def perceptual(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    loss = losses.perceptual_loss(lambda x: {"linear": x @ w, "tanh": torch.tanh(x @ w)}, normalize=True)
    return loss(x, y)


PIECEWISE = "counts do not change with the scores"

LOSSES = [
    full("cross_entropy", scores, label_smoothing=0.1),
    from_draw("losses.cross_entropy soft", losses.cross_entropy, lambda d: (d(2, 4), d(2, 4).softmax(1)), table=ALIKE),
    alike("nll_loss", scores),
    alike("focal_loss", scores),
    full("binary_cross_entropy", lambda d: (d.times(2, 3), d.times(2, 3))),
    alike("binary_cross_entropy_with_logits", pair),
    alike("multilabel_soft_margin_loss", pair),
    alike("soft_margin_loss", signed),
    alike("sigmoid_focal_loss", lambda d: (d(2, 3), d.times(2, 3)), alpha=0.3),
    alike("dice_loss", lambda d: (d.times(2, 3), d.times(2, 3))),
    alike("hinge_loss", signed),
    alike("multiclass_hinge_loss", scores),
    alike("multi_margin_loss", scores, p=2),
    full("multilabel_margin_loss", lambda d: (d(2, 3), torch.tensor([[2, 0, -1], [1, -1, 0]]))),
    alike("hinge_embedding_loss", signed),
    alike("margin_ranking_loss", lambda d: (d(2, 3), d(2, 3), 2 * d.labels(2, 2, 3) - 1)),
    alike("mse_loss", pair),
    alike("l1_loss", pair),
    alike("huber_loss", pair, delta=0.7),
    alike("smooth_l1_loss", pair, beta=0.7),
    alike("log_cosh", pair),
    alike("gaussian_nll_loss", lambda d: (*pair(d), d.times(2, 3))),
    alike("poisson_nll_loss", pair),
    from_draw("losses.kl_div", lambda x, y: losses.kl_div(x, y.softmax(1)), pair, table=ALIKE),
    alike("categorical_kl", pair),
    alike("jensen_shannon", pair),
    alike("gaussian_kl", lambda d: (*pair(d), *pair(d))),
    alike("cosine_distance", pair),
    alike("cosine_embedding_loss", lambda d: (*pair(d), torch.tensor([1, -1]))),
    full("triplet_margin_loss", triple, margin=9.0),
    alike("triplet_margin_with_distance_loss", triple, margin=9.0),
    alike("ntxent", pair),
    alike("info_nce", triple),
    alike("bernoulli_nll", pair),
    alike("categorical_nll", lambda d: (d(2, 2, 3), d.labels(3, 2, 2))),
    full("discretized_logistic_mixture_nll", lambda d: (d(2, 12, 1), d.labels(256, 2, 2, 1))),
    full(
        "ctc_loss", lambda d: (d(2, 4, 3), torch.tensor([[1, 1], [2, 0]]), torch.tensor([4, 3]), torch.tensor([2, 1]))
    ),
    from_draw("losses.perceptual_loss", perceptual, lambda d: (d(3, 2), d(2, 3), d(2, 3)), table=ALIKE),
]

METRICS = [
    from_draw("metrics.accuracy", metrics.accuracy, scores, derivatives=PIECEWISE),
    from_draw("metrics.top_k_accuracy", partial(metrics.top_k_accuracy, k=2), scores, derivatives=PIECEWISE),
    from_draw(
        "metrics.confusion_matrix",
        lambda x, y: metrics.confusion_matrix(x, y, 3),
        lambda d: (d.labels(3, 7), d.labels(3, 7)),
    ),
    from_draw("metrics.precision", metrics.precision, lambda d: (d.times(3, 3),), table=ALIKE),
    from_draw("metrics.recall", metrics.recall, lambda d: (d.times(3, 3),), table=ALIKE),
    from_draw("metrics.f1_score", metrics.f1_score, lambda d: (d.times(3, 3),), table=ALIKE),
    from_draw("metrics.mean_squared_error", metrics.mean_squared_error, pair, table=ALIKE),
    from_draw("metrics.r2_score", metrics.r2_score, pair, table=ALIKE),
    from_draw(
        "metrics.expected_calibration_error",
        metrics.expected_calibration_error,
        lambda d: (d(4, 3).softmax(1), d.labels(3, 4)),
        table=ALIKE,
    ),
]

CASES = [*LOSSES, *METRICS]
