"""The two-dimensional targets against scikit-learn, quadrature and their own samples; the example's run."""

import importlib
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import functorch_gen as fg

demo = importlib.import_module("densities_2d")
families = importlib.import_module("families_2d")
targets = importlib.import_module("targets_2d")

every_target = pytest.mark.parametrize("name", targets.TARGETS)


@every_target
def test_a_density_integrates_to_one(name):
    """By the midpoint rule, whose squares fit the checkerboard's; rounding is that of float32."""
    density = targets.make_target(name).log_prob(targets.grid(150)).double().exp()
    assert density.sum().item() * (10 / 150) ** 2 == pytest.approx(1, abs=1e-4)


@every_target
def test_the_entropy_is_the_mean_of_its_samples(name):
    """To four standard errors; that of the checkerboard is the logarithm of its area, 32."""
    target = targets.make_target(name)
    log_p = target.log_prob(target.sample(fg.random.key(0), 10_000)).double()
    assert abs(-log_p.mean() - targets.entropy(target)) < 4 * log_p.std() / 100 + 1e-5
    if name == "checkerboard":
        assert targets.entropy(target).item() == pytest.approx(math.log(32), abs=1e-5)


@every_target
def test_samples_fall_where_the_density_is(name):
    """Counts in 10 x 10 squares against the density there: chi-squared below its mean plus six deviations."""
    target, n = targets.make_target(name), 10_000
    fine = targets.grid(150).reshape(10, 15, 10, 15, 2).transpose(1, 2).reshape(100, 225, 2)
    expected = torch.stack([target.log_prob(x).double().exp().mean() for x in fine])
    found = targets.histogram(target.sample(fg.random.key(1), n), 10).double()
    often = expected * n > 5  # expected counts, the squares having area 1
    chi = (n * (found - expected) ** 2 / expected.clamp(min=1e-12))[often].sum().item()
    count = int(often.sum())
    assert chi < count + 6 * math.sqrt(2 * count)


def test_moons_are_those_of_scikit_learn():
    """Moments and log-density of its own draws: four standard errors."""
    from sklearn.datasets import make_moons

    target, n = targets.make_target("moons"), 20_000
    x = torch.from_numpy(make_moons(n, noise=0.1, random_state=0)[0]).float()
    log_p = target.log_prob(x).double()
    assert abs(log_p.mean() + targets.entropy(target)) < 4 * log_p.std() / n**0.5
    ours = target.sample(fg.random.key(0), n)
    assert ((x.mean(0) - ours.mean(0)).abs() < 4 * x.std(0) * (2 / n) ** 0.5).all()


def test_the_pinwheel_keeps_areas():
    """The turn by an angle that depends on the radius has determinant 1."""
    turn = lambda x: targets.rotate(x[None], 0.25 * x.norm().exp()[None])[0]
    x = fg.random.normal(fg.random.key(0), (20, 2), torch.float64)
    det = torch.linalg.det(fg.vmap(fg.jacfwd(turn))(x))
    torch.testing.assert_close(det, torch.ones_like(det), rtol=1e-12, atol=0)


def test_a_histogram_stands_as_the_grid_does():
    grid = targets.grid(4, 2.0)
    counts = targets.histogram(torch.tensor([[-1.9, 1.9], [-1.9, 1.9], [0.1, -0.1], [9.0, 0.0]]), 4, 2.0)
    assert torch.equal(counts.nonzero().flatten(), torch.tensor([0, 10]))
    assert torch.equal(grid[[0, 10]], torch.tensor([[-1.5, 1.5], [0.5, -0.5]]))
    assert counts.sum() == 0.75  # a square has area 1


def test_a_model_trains_alone_as_among_others():
    """The stacked models share nothing but the step."""
    config = demo.Config(steps=3, batch_size=4, width=4, backend="aten")
    family = families.FAMILIES["flow matching"](4, 2)
    data = fg.random.normal(fg.random.key(0), (2, 10, 2))
    other = torch.stack([data[0], 5 * data[1]])
    first, second = (demo.train(fg.random.key(1), config, family, x) for x in (data, other))
    for path, x in fg.tree.names(first).items():
        torch.testing.assert_close(x[0], fg.tree.names(second)[path][0], rtol=1e-5, atol=1e-6)


def tiny(folder, **options):
    sizes = {"steps": 2, "batch_size": 4, "width": 4, "train_points": 20, "test_points": 8, "samples": 8}
    return demo.Config(out=str(folder), ode_steps=1, cells=4, backend="aten", **sizes, **options)


def test_densities_write_a_picture_samples_and_a_table(tmp_path):
    metrics = demo.main(tiny(tmp_path))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert tuple(metrics) == targets.TARGETS
    names = ["diffusion", "flow matching", "VAE", "GAN"]
    columns = [f"{name} {what}" for name in names for what in ("KL", "distance") if (name, what) != ("GAN", "KL")]
    assert list(metrics["moons"]) == ["entropy", *columns]
    with np.load(tmp_path / "samples.npz") as file:
        assert {name: file[name].shape for name in file} == dict.fromkeys(["real", *names], (6, 8, 2))
    with Image.open(tmp_path / "densities.png") as image:
        assert image.width > 5 * demo.CELL  # room for the names above the panels
        assert len(image.getcolors(10**6)) > 2


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"Config: expected models to be one of 'diffusion', .*, got 'flows'"):
        demo.Config(models="diffusion,flows")


@pytest.mark.slow  # trains twelve models: some minutes on two cores
def test_densities_are_near_the_truth_after_half_of_the_training(tmp_path):
    metrics = demo.main(demo.Config(out=str(tmp_path), models="diffusion,flow matching", steps=3000))
    for name, most in (("moons", 0.10), ("8 gaussians", 0.10), ("checkerboard", 0.25)):
        for model in ("diffusion", "flow matching"):
            assert metrics[name][f"{model} KL"] <= most, (name, model)
