"""The example that completes digits: a tiny run, the closed form it is compared with, and the trained one."""

import json

import inpaint_digits as demo
import numpy as np
import pytest
import torch
from PIL import Image

import functorch_gen as fg

PROBLEMS = ["upper half", "random half", "2x2 means"]
METHODS = ["seen", "Gaussian", "project", "dps", "pigdm", "mmps"]


def test_inpaint_digits_writes_pictures_samples_and_metrics(tmp_path):
    sizes = {"steps": 2, "batch_size": 4, "base_channels": 8, "digits": 10, "draws": 2, "sample_steps": 2}
    metrics = demo.main(demo.Config(out=str(tmp_path), backend="aten", progress=False, **sizes))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    rows = [f"{problem}: {method}" for problem in PROBLEMS for method in METHODS]
    assert list(metrics) == ["truth", "mean image", *rows, "seconds"]
    assert metrics["truth"]["error"] == 0
    for problem in PROBLEMS:
        file = problem.replace(" ", "_")
        with Image.open(tmp_path / f"{file}.png") as image:
            assert min(image.size) > 100
        with np.load(tmp_path / f"{file}.npz") as arrays:
            assert arrays["pigdm"].shape == (2, 10, 1, 8, 8)
            assert set(np.unique(arrays["pigdm"])) <= set(range(17))


@pytest.mark.parametrize("title", PROBLEMS)
def test_problems_show_what_they_see(title):
    problem = demo.problems(fg.random.key(0))[title]
    x = fg.random.uniform(fg.random.key(1), (3, 1, 8, 8), minval=-1, maxval=1)
    y = problem.operator(x)
    torch.testing.assert_close(problem.operator(problem.shown(y)), y)  # the shown image would be seen alike
    assert y[0].numel() == (16 if "means" in title else 32)


def test_the_gaussian_baseline_is_the_best_linear_prediction():
    # least squares on the training digits with noisy measurements, in closed form
    import digits

    problem, std = demo.problems(fg.random.key(0))["2x2 means"], 0.1
    x = digits.load(digits.TRAIN)["image"].double()
    y = problem.operator(x).flatten(1)
    centred, seen = (v - v.mean(0) for v in (x.flatten(1), y))
    noise = (len(x) - 1) * std**2 * torch.eye(y.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(seen.T @ seen + noise, seen.T @ centred)
    wanted = x.flatten(1).mean(0) + seen @ weights
    found = demo.gaussian_mean(problem, problem.operator(x).float(), std).flatten(1)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["steps", "batch_size", "digits", "draws", "sample_steps", "noise_std"])
def test_config_refuses_what_is_not_positive(name):
    with pytest.raises(ValueError, match=f"Config: expected {name} > 0, got 0"):
        demo.Config(**{name: 0})


@pytest.mark.slow  # trains: some minutes
def test_inpaint_digits_beats_the_best_linear_prediction(tmp_path):
    metrics = demo.main(demo.Config(out=str(tmp_path), progress=False))
    for problem in PROBLEMS:
        seen, gaussian, blind = (metrics[f"{problem}: {name}"] for name in ("seen", "Gaussian", "project"))
        guided = [metrics[f"{problem}: {name}"] for name in ("dps", "pigdm")]
        assert max(found["error"] for found in guided) < blind["error"]  # the gradient of the denoiser tells more
        assert min(found["recognised"] for found in guided) > seen["recognised"]
        if problem != "upper half":  # of which the lower half follows only roughly
            assert min(found["error of mean"] for found in guided) < gaussian["error"]
