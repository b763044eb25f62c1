"""examples/gan_ring.py: what it counts, its learning rate, runs side by side, a tiny run; the whole of it, slow."""

import json
import math

import gan_ring as example
import pytest
import torch
from PIL import Image

import functorch_gen as fg

TINY = {"steps": 3, "seeds": 2, "hidden": 4, "latent": 2, "batch_size": 8, "warmup": 2, "backend": "aten"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, steps, jit = tmp_path_factory.mktemp("ring"), [], fg.jit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fg, "jit", lambda fun, **options: steps.append(jit(fun, **options)) or steps[-1])
        return folder, example.main(example.Config(out=str(folder), **TINY)), steps


def test_it_writes_metrics_and_pictures(run):
    folder, metrics, _ = run
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert list(metrics) == [*example.SETTINGS, "all runs"]
    for name in ("samples.png", "training.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 100


def test_all_runs_are_one_graph(run):
    assert [step.traces for step in run[2]] == [1]


def test_the_data_cover_all_modes():
    n = 4000
    found = example.coverage(example.ring().sample(fg.random.key(0), n))
    share = 1 - math.exp(-4.5)  # of a normal distribution of the plane within three widths
    assert found["modes"] == 8
    assert found["share near"] == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / n))


def test_coverage_counts_modes_with_one_sample_in_a_hundred():
    centre = example.centres()
    samples = torch.cat([centre[:1].expand(96, 2), centre[1:2], centre[2:3], torch.zeros(2, 2)])
    assert example.coverage(samples) == {"modes": 3.0, "share near": 0.98}
    assert example.coverage(torch.cat([samples, torch.zeros(100, 2)]))["modes"] == 1


def test_the_rate_rises_and_falls_or_stays():
    config = example.Config(steps=100, warmup=10, learning_rate=2.0)
    players, step = example.Players(config), torch.tensor([0, 5, 10, 50, 100])
    expected = [min(s / 10, 1) * (1 + math.cos(math.pi * s / 100)) for s in step.tolist()]
    assert players.rate(0.0)(step).tolist() == pytest.approx(expected, abs=1e-6)  # float32
    assert players.rate(1.0)(step).tolist() == [2.0] * 5


def test_a_run_among_others_is_that_run_alone():
    config = example.Config(**TINY)
    players = example.Players(config)
    states, history = example.train(config, players)
    last, keys = torch.tensor([config.clip, 0.0]), fg.random.split(fg.random.key(config.seed), config.seeds)
    state = players.init(keys[-1], *last)  # the last seed of the last setting
    for n in range(config.steps):
        state, metrics = players.step(state, *last)
        for name, value in metrics.items():
            torch.testing.assert_close(history[name][-1, n], value, rtol=1e-4, atol=1e-6)  # float32, through Adam
    assert fg.tree.allclose(fg.tree.map(lambda x: x[-1], states.params), state.params, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # two minutes
def test_clipping_and_schedule_cover_more(tmp_path):
    metrics = example.main(example.Config(out=str(tmp_path)))
    assert metrics["both"]["modes"] >= 6
