"""examples/ema_quality.py: averages side by side, the judge, a tiny run; the whole of it, slow."""

import json

import digits
import ema_quality as example
import pytest
import torch
from PIL import Image

import functorch_gen as fg

TINY = {"steps": 4, "checkpoints": 2, "widths": 2, "base_channels": 8, "batch_size": 4, "sample_steps": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder, steps, jit = tmp_path_factory.mktemp("ema"), [], fg.jit
    config = example.Config(out=str(folder), samples_per_class=2, backend="aten", progress=False, **TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fg, "jit", lambda fun, **options: steps.append(jit(fun, **options)) or steps[-1])
        return folder, example.main(config), steps


def test_it_writes_metrics_and_pictures(run):
    folder, metrics, _ = run
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert metrics["by steps"].keys() == {"none", *example.AVERAGES}
    assert all(list(found) == ["2", "4"] for found in metrics["by steps"].values())
    assert list(metrics["made"]) == ["width 0.030", "width 0.200"]
    for name in ("quality.png", "samples.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 100


def test_its_training_is_one_graph(run):
    assert [step.traces for step in run[2]][-1] == 1


def test_averages_side_by_side_are_those_alone():
    both = example.side_by_side(example.AVERAGES)
    path = [{"w": fg.random.normal(fg.random.key(i), (3,))} for i in range(5)]
    state = both.init(path[0])
    alone = {name: average.init(path[0]) for name, average in example.AVERAGES.items()}
    for params in path[1:]:
        returned, state = both.update(params, state)
        assert returned is params
        alone = {name: example.AVERAGES[name].update(params, held)[1] for name, held in alone.items()}
    assert bool(fg.tree.equal(state, alone))


def test_the_judge_gives_real_digits_one(monkeypatch):
    config = example.Config(base_channels=8)
    judge = example.Judge(
        config, example.demo.make_model(example.demo.Config(base_channels=8), digits.load(digits.TRAIN))
    )
    monkeypatch.setattr(judge, "draw", lambda params, label: digits.load(digits.TRAIN)["image"])
    assert judge({}) == pytest.approx(1, rel=1e-5)  # float32
    monkeypatch.setattr(judge, "draw", lambda params, label: torch.zeros(10, 1, 8, 8))
    assert judge({}) > 5


@pytest.mark.slow  # trains and samples often: two minutes
def test_averages_draw_better_samples_than_the_last_parameters(tmp_path):
    found = example.main(example.Config(out=str(tmp_path), progress=False))
    last = {name: list(ratios.values())[-1] for name, ratios in found["by steps"].items()}
    assert max(last["power 0.1"], last["decay 0.99"], last["decay 0.999, warm-up"]) < 0.9 * last["none"]
    assert last["decay 0.999"] > last["none"]  # it remembers the initial parameters
    assert min(found["made"].values()) < 0.9 * last["none"]
