"""examples/flow_digits.py: a tiny run and what it writes; the whole of it, slow, against the bars."""

import json

import flow_digits as demo
import numpy as np
import pytest
import torch
from PIL import Image

import functorch_gen as fg

TINY = {
    "steps": 2,
    "mean_flow_steps": 2,
    "base_channels": 8,
    "batch_size": 8,
    "sample_steps": 2,
    "samples_per_class": 10,
}


def tiny(tmp_path, **changes):
    return demo.Config(out=str(tmp_path), backend="aten", progress=False, **{**TINY, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        jit = fg.jit
        patch.setattr(demo.digits, "two_sample_forest", lambda *_: 0.5)  # seconds each
        patch.setattr(fg, "jit", lambda fun, **options: steps.append(jit(fun, **options)) or steps[-1])
        return folder, demo.main(tiny(folder)), steps


def test_both_trainings_are_one_graph_each(run):
    assert [step.traces for step in run[2]] == [1, 1]


def test_it_writes_samples_on_the_17_levels_with_labels(run):
    folder, *_ = run
    drawn = {}
    for name in ("samples.npz", "samples_one_step.npz", "mean_flow/samples.npz"):
        with np.load(folder / name) as file:
            assert file["images"].shape == (100, 1, 8, 8)
            assert set(np.unique(file["images"])) <= set(range(17))
            assert np.array_equal(np.bincount(file["labels"]), [10] * 10)
            drawn[name] = file["images"]
    assert np.array_equal(drawn["samples_one_step.npz"], drawn["mean_flow/samples.npz"])
    assert not np.array_equal(drawn["samples_one_step.npz"], drawn["samples.npz"])


def test_it_writes_pictures_and_metrics(run):
    folder, metrics, _ = run
    for name in ("samples.png", "loss.png", "mean_flow/samples.png", "mean_flow/loss.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 100
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert len(metrics) == 5
    for row in metrics.values():
        assert {"svc_accuracy", "frechet_ratio", "nearest_ratio", "forest_accuracy"} <= row.keys()


def test_the_scales_of_the_network_are_those_of_edm():
    """At t = 1 the estimate of the data, x_t - u, is the output of the network alone, sigma_data times it."""
    model = demo.make_model(demo.Config(base_channels=8), {"image": torch.tensor([-0.5, 0.5])})
    params = fg.tree.map(lambda x: x + 0.1, model.net.init(fg.random.key(0)))
    x_t, r, t, label = torch.ones(2, 1, 8, 8), torch.zeros(2), torch.ones(2), torch.tensor([1, 2])
    output = model.net(params, x_t, torch.ones(2, 2), label)
    estimate = x_t - model.average_velocity(params)(x_t, r, t, label)
    torch.testing.assert_close(estimate, model.prediction.sigma_data * output, rtol=1e-5, atol=1e-5)


def test_config_refuses_what_is_not_positive():
    for name in ("steps", "mean_flow_steps", "batch_size", "learning_rate", "mean_flow_rate", "samples_per_class"):
        with pytest.raises(ValueError, match=f"Config: expected {name} > 0, got 0"):
            demo.Config(**{name: 0})


@pytest.mark.slow  # trains twice: some five minutes on two cores
def test_samples_pass_for_digits(tmp_path):
    metrics = demo.main(demo.Config(out=str(tmp_path), progress=False))
    for name, svc, frechet, forest in (("flow matching", 0.98, 1.2, 0.05), ("MeanFlow, 1", 0.95, 1.5, 0.12)):
        row = metrics[name]
        assert row["svc_accuracy"] >= svc
        assert row["frechet_ratio"] <= frechet
        assert row["nearest_ratio"] >= 0.7
        assert row["forest_accuracy"] <= row["forest_accuracy_real"] + forest
