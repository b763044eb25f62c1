"""The GAN of digits: a tiny run and what it writes, one compiled step; the bars of a whole run."""

import json

import gan_digits as demo
import numpy as np
import pytest
import torch
from PIL import Image

import functorch_gen as fg

TINY = {"steps": 2, "width": 4, "num_blocks": 0, "batch_size": 8, "samples_per_class": 50, "sample_every": 1}


def tiny(tmp_path, **changes):
    return demo.Config(out=str(tmp_path / "run"), backend="aten", progress=False, **{**TINY, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder, the metrics and the functions that were jitted."""
    traced, original = [], fg.jit

    def spy(fun, **options):
        traced.append(original(fun, **options))
        return traced[-1]

    folder = tmp_path_factory.mktemp("gan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fg, "jit", spy)
        metrics = demo.main(tiny(folder))
    return folder / "run", metrics, traced


def test_demo_writes_samples_on_the_17_levels_with_labels(run):
    folder, _, _ = run
    with np.load(folder / "samples.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (500, 1, 8, 8)
    assert set(np.unique(images)) <= set(range(17))
    assert np.array_equal(np.bincount(labels), [50] * 10)


def test_demo_writes_pictures_and_metrics(run):
    folder, metrics, _ = run
    assert {path.name for path in folder.glob("*.png")} == {"samples.png", "progress.png", "losses.png"}
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 50
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"svc_accuracy", "frechet_ratio", "forest_accuracy", "d_loss", "g_loss"} <= metrics.keys()


def test_the_demo_step_is_one_graph_that_compiles_once(run):
    _, _, (step,) = run
    assert step.traces == 1


def test_the_worst_class_of_real_digits_is_recognised_and_not_under_anothers_name():
    real = demo.digits.load(demo.digits.TEST)
    assert demo.recognised_of_worst_class(real["image"], real["label"]) > 0.7
    exchanged = torch.tensor([0, 1, 2, 8, 4, 5, 6, 7, 3, 9])[real["label"]]
    assert demo.recognised_of_worst_class(real["image"], exchanged) < 0.2


@pytest.mark.parametrize("name", ["steps", "batch_size", "sample_every", "g_learning_rate"])
def test_config_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=f"Config: expected {name} > 0, got 0"):
        demo.Config(**{name: 0})


@pytest.mark.slow  # trains the whole demo: some minutes
def test_demo_draws_digits_that_pass_for_real(tmp_path):
    metrics = demo.main(demo.Config(out=str(tmp_path), progress=False))
    assert metrics["svc_accuracy"] >= 0.93
    assert metrics["recognised_of_worst_class"] >= 0.7
    assert metrics["frechet_ratio"] <= 1.8
    assert metrics["nearest_ratio"] >= 0.7
    assert metrics["forest_accuracy"] <= metrics["forest_accuracy_real"] + 0.15
