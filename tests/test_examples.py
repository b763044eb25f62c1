"""The example scripts: tiny runs, what they write, and what they refuse before training starts."""

import json
from dataclasses import fields

import command_line
import compiled_step
import diffusion_digits as demo
import diffusion_digits_table as table
import digits
import maml_sinusoid as maml
import numpy as np
import pytest
import torch
from PIL import Image

import functorch_gen as fg

TINY = {"steps": 3, "base_channels": 8, "batch_size": 8, "sample_steps": 2, "samples_per_class": 30, "sample_every": 2}


def tiny(tmp_path, **changes):
    return demo.Config(out=str(tmp_path / "run"), backend="aten", progress=False, **{**TINY, **changes})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    metrics = demo.main(tiny(folder))
    return folder / "run", metrics


def test_demo_writes_samples_on_the_17_levels_with_labels(run):
    folder, _ = run
    with np.load(folder / "samples.npz") as file:
        images, labels = file["images"], file["labels"]
    assert images.shape == (300, 1, 8, 8)
    assert set(np.unique(images)) <= set(range(17))
    assert np.array_equal(np.bincount(labels), [30] * 10)


def test_demo_writes_pictures_and_metrics(run):
    folder, metrics = run
    for name in ("samples.png", "path.png", "loss.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 100
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert {"svc_accuracy", "frechet_ratio", "nearest_ratio", "forest_accuracy", "loss"} <= metrics.keys()


def test_demo_trains_on_any_array_of_images(tmp_path):
    generator = np.random.default_rng(0)
    path = tmp_path / "images.npz"
    np.savez(path, images=generator.uniform(-1, 1, (16, 3, 32, 32)).astype("float32"), labels=np.arange(16) % 2)
    metrics = demo.main(tiny(tmp_path, images=str(path), samples_per_class=2, steps=2))
    assert "svc_accuracy" not in metrics
    with np.load(tmp_path / "run" / "samples.npz") as file:
        assert file["images"].shape == (4, 3, 32, 32)
        assert np.abs(file["images"]).max() <= 1


def save(tmp_path, images, labels):
    path = tmp_path / "images.npz"
    np.savez(path, images=images, labels=labels)
    return str(path)


def refused(tmp_path, images, labels):
    return lambda: demo.main(tiny(tmp_path, images=save(tmp_path, images, labels)))


def test_bad_data_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("training began"))
    good = np.zeros((4, 1, 8, 8), "float32")
    labels = np.arange(4)
    holed = good.copy()
    holed[2, 0, 1, 1] = np.nan
    for images, label, kind, message in (
        (holed, labels, ValueError, r"images.npz: expected finite values at 'image', got nan at index \(2, 0, 1, 1\)"),
        (good[:, 0], labels, ValueError, r"shapes \(n, c, h, w\) and \(n,\)"),
        (good, labels[:3], ValueError, r"got \(\(4, 1, 8, 8\), \(3,\)\)"),
        (good[..., :7], labels, ValueError, r"height and width divisible by 2, got \(1, 1, 8, 7\)"),
        (good, labels - 1, ValueError, r"expected labels in 0..3, got -1 at index 0"),
    ):
        with pytest.raises(kind, match=message):
            refused(tmp_path, images, label)()
    np.savez(tmp_path / "empty.npz", images=good)
    with pytest.raises(KeyError, match=r"expected arrays images and labels in .*empty\.npz, got no labels"):
        demo.main(tiny(tmp_path, images=str(tmp_path / "empty.npz")))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        demo.main(tiny(tmp_path, images=str(tmp_path / "nowhere.npz")))


def test_an_unwritable_folder_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "train", lambda *_: pytest.fail("training began"))
    (tmp_path / "file").write_text("")
    config = demo.Config(out=str(tmp_path / "file" / "run"))
    with pytest.raises(NotADirectoryError, match="expected a folder, got the file"):
        demo.main(config)


@pytest.mark.parametrize("name", ["steps", "batch_size", "sample_steps", "samples_per_class", "learning_rate"])
def test_config_refuses_what_is_not_positive(name):
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"Config: expected {name} > 0, got {value}"):
            demo.Config(**{name: value})


def test_help_lists_every_field_with_its_default(capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.parse(demo.Config, demo.__doc__, ["--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(demo.Config):
        assert f"--{field.name.replace('_', '-')}" in text
        assert f"(default: {field.default!r})" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", "3"], "unrecognized arguments: --stepz 3"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--steps", "0"], "Config: expected steps > 0, got 0"),
        (["--step", "3"], "unrecognized arguments"),
    ],
)
def test_a_wrong_flag_or_value_is_a_clear_error(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command_line.parse(demo.Config, demo.__doc__, arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_flags_set_fields():
    config = command_line.parse(demo.Config, "", ["--steps", "7", "--attention", "--no-progress", "--images", "a.npz"])
    assert (config.steps, config.attention, config.progress, config.images) == (7, True, False, "a.npz")


def test_to_levels_inverts_the_scaling_of_the_data():
    data = digits.load(digits.TEST)
    from sklearn.datasets import load_digits

    assert torch.equal(digits.to_levels(data["image"])[:, 0].double(), torch.from_numpy(load_digits().images[1350:]))


def test_judge_tells_real_digits_from_noise_and_copies():
    real = digits.load(digits.TRAIN)
    judged = digits.judge(real["image"], real["label"])
    assert judged["svc_accuracy"] > 0.99
    assert judged["frechet_ratio"] == pytest.approx(1, abs=1e-6)
    assert judged["nearest_ratio"] == 0  # copies
    noise = digits.judge(fg.random.uniform(fg.random.key(0), (447, 1, 8, 8), minval=-1, maxval=1), real["label"][:447])
    assert noise["svc_accuracy"] < 0.3
    assert noise["frechet_ratio"] > 10
    assert noise["forest_accuracy"] > 0.99


def test_the_demo_step_is_one_graph_that_compiles_once(tmp_path):
    traced = []
    original = fg.jit

    def spy(fun, **options):
        traced.append(original(fun, **options))
        return traced[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fg, "jit", spy)
        config = tiny(tmp_path, steps=6)
        data = demo.load_data(config)
        state, history = demo.train(fg.random.key(0), config, demo.make_model(config, data), data)
    (step,) = traced
    assert step.traces == 1
    assert int(state.step) == len(history["loss"]) == 6


def test_the_table_replaces_its_rows_and_measures_memory():
    page = "a\n<!-- remat -->\nold\n<!-- /remat -->\nb"
    assert table.replace(page, "remat", ["new", "rows"]) == "a\n<!-- remat -->\nnew\nrows\n<!-- /remat -->\nb"
    assert 4e6 <= table.peak_bytes(lambda: torch.ones(10**6) + torch.ones(1)) <= 9e6
    rows = table.remat_rows(demo.Config(base_channels=8, batch_size=8, backend="aten"), calls=2)
    assert [r.split(" | ")[0] for r in rows] == ["| no", "| yes"]


SMALL = {"steps": 12, "width": 16, "depth": 2, "length": 8, "batch_size": 4}


def test_compiled_step_learns_and_shows_its_cost(tmp_path, capsys):
    file = tmp_path / "step.bin"
    result = compiled_step.main(compiled_step.Config(file=str(file), backend="aten", **SMALL))
    assert result["last loss"] < result["first loss"]
    table = capsys.readouterr().out
    assert "Block > MultiHeadAttention" in table
    assert "peak memory" in table
    assert not file.exists()  # there is no generated code to save


@pytest.mark.slow  # compiles
def test_compiled_step_trains_alike_from_its_file(tmp_path, capsys):
    config = compiled_step.Config(file=str(tmp_path / "run" / "step.bin"), **SMALL)
    first, again = compiled_step.main(config), compiled_step.main(config)
    assert capsys.readouterr().out.count("peak memory") == 1  # the second run did not trace
    assert [first[name] for name in ("first loss", "last loss")] == [again["first loss"], again["last loss"]]


@pytest.mark.slow  # trains the whole demo: about two minutes on two cores
def test_demo_draws_digits_that_pass_for_real(tmp_path):
    metrics = demo.main(demo.Config(out=str(tmp_path), progress=False))
    assert metrics["svc_accuracy"] >= 0.98
    assert metrics["frechet_ratio"] <= 1.2
    assert metrics["nearest_ratio"] >= 0.75
    assert metrics["forest_accuracy"] <= metrics["forest_accuracy_real"] + 0.05


def test_maml_writes_metrics_and_a_picture(tmp_path):
    config = maml.Config(out=str(tmp_path), steps=2, tasks=2, shots=3, hidden=4, backend="aten")
    metrics = maml.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert len(metrics) == 8
    with Image.open(tmp_path / "curves.png") as image:
        assert min(image.size) > 100


def test_maml_gradient_is_that_of_the_steps_written_out():
    """One step: d/dp of L(p - r g(p)) is (I - r H) g_test, eq. 1 of the paper."""
    learner = maml.Learner(maml.Config(hidden=3))
    params = fg.tree.cast(learner.init(fg.random.key(0)), torch.float64)
    task = fg.tree.cast(maml.draw_task(fg.random.key(1), 4, 5), torch.float64)
    found = fg.grad(lambda p: learner.error(learner.adapt(p, task, 1)[0], task.x_test, task.y_test))(params)["net"]

    def flat(net):
        return fg.tree.ravel(net)[0]

    vector, unravel = fg.tree.ravel(params["net"])
    rates = flat(fg.tree.map(lambda x, r: r.exp().expand_as(x), params["net"], params["log_rate"]))
    train_error = lambda v: learner.error(unravel(v), task.x, task.y)
    test_error = lambda v: learner.error(unravel(v), task.x_test, task.y_test)
    slope = torch.func.grad(test_error)(vector - rates * torch.func.grad(train_error)(vector))
    expected = slope - torch.func.hessian(train_error)(vector) @ (rates * slope)
    torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-12)
