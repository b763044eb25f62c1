"""Scikit-learn's 8x8 digits, and what to measure of digits that a model drew. Shared by the digit examples."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import functorch_gen as fg

TRAIN = slice(0, 1350)
TEST = slice(1350, 1797)


def load(part: slice) -> dict[str, Tensor]:
    """Images (n, 1, 8, 8) in [-1, 1] and labels (n,)."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy(digits.images[part]).float() / 8 - 1
    return {"image": images[:, None], "label": torch.from_numpy(digits.target[part]).long()}


def to_levels(images: Tensor) -> Tensor:
    """Images in [-1, 1] as the 17 grey levels 0, 1, ..., 16 of the data, clipped and rounded."""
    return ((images.clamp(-1, 1) + 1) * 8).round()


def save(path: Path, images: Tensor, label: Tensor) -> None:
    """Writes samples (n, 1, 8, 8) in [-1, 1] as arrays ``images``, in grey levels, and ``labels`` (n,)."""
    np.savez_compressed(path, images=to_levels(images).numpy(), labels=label.numpy())


def judge(images: Tensor, label: Tensor) -> dict[str, float]:
    """Compares samples (n, 1, 8, 8) in [-1, 1] with the real digits.

    Returns:
        svc_accuracy: share of samples that a classifier of real digits takes for their label.
        frechet_ratio: Frechet distance of their pixels to the test digits over that of the training digits.
        nearest_ratio: median distance to the nearest training digit over that of the test digits; low: memorised.
        forest_accuracy: of a random forest that tells samples from test digits; 0.5: cannot tell.
        forest_accuracy_real: the same of the training digits: what a perfect model scores.
    """
    from sklearn.svm import SVC

    train, test = load(TRAIN), load(TEST)
    samples, real, held_out = (to_levels(x).flatten(1) / 8 - 1 for x in (images, train["image"], test["image"]))
    classifier = SVC().fit(real.numpy(), train["label"].numpy())
    frechet, near = fg.metrics.frechet_distance, fg.metrics.nearest_distance
    return {
        "svc_accuracy": float(classifier.score(samples.numpy(), label.numpy())),
        "frechet_ratio": float(frechet(samples, held_out) / frechet(real, held_out)),
        "nearest_ratio": float(near(samples, real).median() / near(held_out, real).median()),
        "forest_accuracy": two_sample_forest(samples, held_out),
        "forest_accuracy_real": two_sample_forest(real, held_out),
    }


def two_sample_forest(samples: Tensor, held_out: Tensor) -> float:
    """Accuracy of a random forest that tells samples from held-out digits: balanced, five-fold."""
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    n, draw = min(len(samples), len(held_out)), np.random.default_rng(0)
    x = np.concatenate([draw.permutation(part.numpy())[:n] for part in (samples, held_out)])
    y = np.repeat([0, 1], n)
    forest = RandomForestClassifier(200, random_state=0, n_jobs=2)
    return float(cross_val_score(forest, x, y, cv=StratifiedKFold(5, shuffle=True, random_state=0)).mean())
