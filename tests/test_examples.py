"""The example scripts: tiny runs, what they write, and what they refuse before training starts."""

import importlib
import json
from dataclasses import fields

import command_line
import compiled_step
import diffusion_digits as demo
import diffusion_digits_table as table
import digits
import digits_classifiers
import examples_page
import fine_tuning
import linear_regression
import maml_sinusoid as maml
import numpy as np
import optimizer_race
import pytest
import surfaces
import text_classifier
import torch
import your_own_optimizer
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


def pictures(folder):
    """The names of the pictures, all of which can be opened and show something."""
    for path in folder.glob("*.png"):
        with Image.open(path) as image:
            assert min(image.size) > 100
            assert len(image.getcolors(10**6)) > 2
    return {path.name for path in folder.glob("*.png")}


def test_linear_regression_agrees_in_four_ways(tmp_path):
    metrics = linear_regression.main(linear_regression.Config(out=str(tmp_path), steps=300, backend="aten"))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert pictures(tmp_path) == {"convergence.png", "landscape.png", "predictions.png", "weights.png"}
    by_hand, *others = (metrics[name] for name in ("NumPy by hand", "torch by hand", "grad and sgd"))
    for other in others:
        for column in ("training error", "test error", "distance to the closed form"):
            assert other[column] == pytest.approx(by_hand[column], rel=1e-10)
    assert metrics["grad and sgd, momentum"]["distance to the closed form"] < 1e-3 < 0.1 < by_hand[column]


def test_linear_regression_in_closed_form_is_that_of_scikit_learn():
    from sklearn.linear_model import LinearRegression

    data = linear_regression.load_data(linear_regression.Config())
    fitted = LinearRegression().fit(data.x[:, :-1].numpy(), data.y.numpy())
    expected = torch.from_numpy(np.append(fitted.coef_, fitted.intercept_))
    torch.testing.assert_close(linear_regression.closed_form(data, 0.0, 0)[-1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", surfaces.SURFACES)
def test_a_surface_is_least_where_it_says(name):
    surface = surfaces.SURFACES[name]
    minimum = torch.tensor(surface.minimum, dtype=torch.float64)
    assert surface.fun(minimum) == 0
    assert (torch.linalg.eigvalsh(fg.hessian(surface.fun)(minimum)) > 0).all()
    for (low, high), end in zip((surface.x_range, surface.y_range), surface.minimum, strict=True):
        assert low < end < high


def test_the_race_has_every_optimizer():
    assert set(importlib.import_module("functorch_gen.optim.optimizers").__all__) <= set(optimizer_race.RACERS)


def test_a_sweep_is_a_loop_over_learning_rates():
    """Against torch.optim.Adam, one run after the other."""
    surface, rates, steps = surfaces.SURFACES["Rosenbrock"], torch.tensor([1e-3, 1e-2]), 20
    problem = optimizer_race.Problem(
        lambda params, batch: surface.fun(params["p"]), {"p": torch.tensor(surface.start)}, torch.zeros(steps)
    )
    runs = optimizer_race.sweep(optimizer_race.RACERS["adam"], problem, rates, "aten")
    for i, rate in enumerate(rates.tolist()):
        p = torch.tensor(surface.start, requires_grad=True)
        adam = torch.optim.Adam([p], rate)
        for step in range(steps):
            torch.testing.assert_close(runs.path[i, step], p.detach(), rtol=1e-5, atol=1e-5)
            loss = surface.fun(p)
            torch.testing.assert_close(runs.loss[i, step], loss.detach(), rtol=1e-4, atol=1e-5)
            adam.zero_grad()
            loss.backward()
            adam.step()


def test_a_run_that_diverged_is_not_the_best():
    loss = torch.tensor([[1.0, torch.nan], [2.0, torch.inf], [2.0, 1.5], [0.0, 3.0]])
    assert optimizer_race.best_run(optimizer_race.Runs(loss, loss, {})) == 2


def test_the_race_writes_pictures_and_a_table(tmp_path):
    options = {"optimizers": "sgd,muon,polyak_sgd", "surface_steps": 3, "digits_steps": 3, "rates": 2, "hidden": 4}
    metrics = optimizer_race.main(optimizer_race.Config(out=str(tmp_path), **options))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert list(metrics) == ["sgd", "muon", "polyak_sgd"]
    assert pictures(tmp_path) == {"Beale.png", "Rosenbrock.png", "digits.png", "race.png"}


def test_an_unknown_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Config: expected models to be one of 'mlp', 'cnn', 'lstm', got 'svm'"):
        digits_classifiers.Config(models="mlp,svm")
    with pytest.raises(ValueError, match=r"Config: expected optimizers to be one of 'adabelief', .*, got 'adem'"):
        optimizer_race.main(optimizer_race.Config(out=str(tmp_path), optimizers="adem"))


def test_a_table_has_a_column_for_each_number():
    rows = {"a": {"error": 0.56789, "count": 12345}, "long": {"error": 1e-9}}
    assert command_line.table(rows).split("\n") == ["       error  count", "a     0.5679  12345", "long   1e-09       "]


def test_the_page_shows_what_was_measured(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "text_classifier"
    run.mkdir(parents=True)
    (run / "metrics.json").write_text(json.dumps({"lines": 12345, "accuracy": 0.95}))
    (run / "confusion.png").write_bytes(b"picture")
    page = tmp_path / "examples.md"
    page.write_text(
        "a\n<!-- fine_tuning -->\n<!-- /fine_tuning -->\n<!-- text_classifier -->\nold\n<!-- /text_classifier -->"
    )
    monkeypatch.setattr(examples_page, "DOCS", tmp_path)
    examples_page.main(examples_page.Config(runs=str(tmp_path / "runs")))
    rows = "|  | value |\n| --- | --- |\n| lines | 12345 |\n| accuracy | 0.95 |\n"
    assert page.read_text() == (
        f"a\n<!-- fine_tuning -->\n<!-- /fine_tuning -->\n<!-- text_classifier -->\n{rows}<!-- /text_classifier -->"
    )
    assert (tmp_path / "text_confusion.png").read_bytes() == b"picture"


def test_the_page_has_a_place_for_every_example():
    listed = (examples_page.DOCS / "examples.md").read_text()
    for name, pictures in examples_page.PICTURES.items():
        page = examples_page.page_of(name).read_text()
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- /{name} -->") == 1
        assert f"(../examples/{name}.py)" in listed
        for picture in pictures.values():
            assert f"]({picture}.png)" in page
            assert (examples_page.DOCS / f"{picture}.png").stat().st_size < 150_000


def test_classifiers_of_digits_write_pictures_and_a_table(tmp_path):
    config = digits_classifiers.Config(out=str(tmp_path), steps=2, batch_size=8, backend="aten", validate=True)
    metrics = digits_classifiers.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    kinds = ("cnn", "lstm", "mlp")
    assert sorted(metrics) == list(kinds)
    assert pictures(tmp_path) == {f"{name}_{kind}.png" for name in ("confusion", "gradient_flow") for kind in kinds}


@pytest.mark.slow  # trains three networks
def test_classifiers_of_digits_are_right(tmp_path):
    metrics = digits_classifiers.main(digits_classifiers.Config(out=str(tmp_path)))
    for name, least in (("mlp", 0.93), ("cnn", 0.96), ("lstm", 0.93)):
        assert metrics[name]["accuracy"] >= least


SOURCE = '''#!/usr/bin/python
"""A module.

>>> f()
"""
import os  # a remark

def f(x):
    r"""Does nothing."""
    # A comment
    text = """over
    lines"""
    return (x,
            "text")
'''


def test_prose_and_code_are_told_apart():
    prose, code = text_classifier.prose_and_code(SOURCE)
    assert [line for line in prose if line] == [
        "/usr/bin/python",
        "A module.",
        "a remark",
        "Does nothing.",
        "A comment",
    ]
    assert code == ["def f(x):", "return (x,", '"text")']


def test_lines_of_text_are_balanced_and_none_is_in_both_parts():
    train, test = text_classifier.load_data(text_classifier.Config(files=10))
    for part in (train, test):
        assert part["label"].double().mean() == 0.5
        assert (part["bytes"].ne(0).sum(1) == part["length"]).all()
        assert part["length"].min() >= 8
    cut = {bytes(row) for row, n in zip(train["bytes"].tolist(), train["length"]) if n < 64}
    assert not cut & {bytes(row) for row in test["bytes"].tolist()}


def test_text_classifier_writes_a_picture_and_metrics(tmp_path):
    options = {"steps": 2, "batch_size": 4, "files": 5, "hidden": 4, "embed": 4, "length": 8}
    metrics = text_classifier.main(text_classifier.Config(out=str(tmp_path), backend="aten", **options))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert pictures(tmp_path) == {"confusion.png", "loss.png"}


@pytest.mark.slow  # trains
def test_text_classifier_is_right(tmp_path):
    assert text_classifier.main(text_classifier.Config(out=str(tmp_path)))["accuracy"] >= 0.9


def test_fine_tuning_writes_a_table(tmp_path):
    options = {"shots": 2, "draws": 2, "pretraining": 2, "steps": 2, "width": 4, "backend": "aten"}
    metrics = fine_tuning.main(fine_tuning.Config(out=str(tmp_path), **options))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert {name: row["parameters"] for name, row in metrics.items()} == {
        "pretraining, old classes": 4 * 9 + 8 + 8 * 36 + 16 + 7 * 9,
        "head, by tree.partition": 3 * 9,
        "head, by optim.freeze": 4 * 9 + 8 + 8 * 36 + 16 + 3 * 9,
        "head and norms": 8 + 16 + 3 * 9,
        "head and LoRA": 2 * (4 + 9) + 2 * (8 + 36) + 3 * 9,
        "everything": 4 * 9 + 8 + 8 * 36 + 16 + 3 * 9,
        "everything, from scratch": 4 * 9 + 8 + 8 * 36 + 16 + 3 * 9,
    }


@pytest.mark.parametrize("name", fine_tuning.WAYS)
def test_fine_tuning_changes_what_it_says(name):
    way, net = (
        fine_tuning.WAYS[name],
        fine_tuning.Adapted(fg.models.CNN(1, 3, channels=(4,)), fine_tuning.WAYS[name].rank),
    )
    key = fg.random.key(0)
    params = net.extend(key, net.net.init(key))
    data = {"image": fg.random.normal(key, (6, 1, 8, 8)), "label": torch.arange(3).repeat(2)}
    tuned, _ = fine_tuning.tune(way, net, params, net.net.init_state(), data, steps=2)
    changed = {path for path, x in fg.tree.names(tuned).items() if not torch.equal(x, fg.tree.names(params)[path])}
    head, norm = {"head.weight", "head.bias"}, {"block0.norm.weight", "block0.norm.bias"}
    assert changed == {
        "head and norms": head | norm,
        "head and LoRA": head | {"block0.conv.lora_a", "block0.conv.lora_b"},
        "everything": head | norm | {"block0.conv.weight"},
        "everything, from scratch": head | norm | {"block0.conv.weight"},
    }.get(name, head)


def test_a_frozen_part_is_frozen_alike_by_partition_and_by_freeze():
    net, key = fine_tuning.Adapted(fg.models.CNN(1, 3, channels=(4,)), 0), fg.random.key(0)
    data = {"image": fg.random.normal(key, (6, 1, 8, 8)), "label": torch.arange(3).repeat(2)}
    ways = [fine_tuning.WAYS[name] for name in ("head, by tree.partition", "head, by optim.freeze")]
    one, other = (fine_tuning.tune(way, net, net.net.init(key), net.net.init_state(), data, steps=3)[0] for way in ways)
    assert fg.tree.allclose(one, other)


def test_examples_of_new_classes_are_drawn_without_repetition():
    by_class = [torch.arange(10 * c, 10 * c + 5).reshape(5, 1, 1, 1) for c in range(3)]
    drawn = fine_tuning.draw_examples(fg.random.key(0), by_class, 5)
    assert drawn["label"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert drawn["image"].flatten().sort().values.tolist() == torch.cat(by_class).flatten().tolist()


def test_your_own_optimizer_ends_where_the_librarys_does(tmp_path):
    config = your_own_optimizer.Config(out=str(tmp_path), steps=5, hidden=4, batch_size=8, backend="aten")
    metrics = your_own_optimizer.main(config)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    assert metrics["distance from optim.scale_by_lion"] == 0
    assert metrics["test accuracy at rate 3e-03"] == metrics["test accuracy"]
