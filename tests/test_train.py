"""The training loop on a quadratic, whose iterates are known, and the checks before it."""

import os
import sys
import time

import pytest
import torch

from functorch_gen import optim, random, tree
from functorch_gen.data import batches
from functorch_gen.step import init_state, make_step
from functorch_gen.train import Every, check_data, check_writable, checkpoint, fit
from functorch_gen.transforms import jit

KEY = random.key(0)
TX = optim.sgd(0.25)


def quadratic(params, key, batch):
    return 0.5 * (params["w"] - batch).square().sum()


STEP = make_step(quadratic, TX)


def start(w=1.0):
    return init_state({"w": torch.tensor([w], dtype=torch.float64)}, TX, KEY)


def zero(n):
    return torch.tensor(0.0, dtype=torch.float64)


def noisy(n):
    return random.normal(random.fold_in(KEY, n), (1,), torch.float64)


def test_fit_records_the_loss_of_every_step():
    """w_n = 0.75^n."""
    train_state, history = fit(STEP, start(), zero, steps=10, progress=False, log_every=4)
    assert train_state.params["w"].item() == pytest.approx(0.75**10, rel=1e-14)
    assert history["loss"] == pytest.approx([0.5 * 0.75 ** (2 * n) for n in range(10)], rel=1e-14)
    assert history["grad_norm"] == pytest.approx([0.75**n for n in range(10)], rel=1e-14)
    assert history["step"] == list(range(10))


def test_fit_measures_seconds_from_the_start():
    def slow(n):
        time.sleep(0.02)
        return zero(n)

    begin = time.perf_counter()
    _, history = fit(STEP, start(), slow, steps=3, progress=False)
    assert history["seconds"][-1] <= time.perf_counter() - begin
    assert all(seconds >= 0.02 * (n + 1) for n, seconds in enumerate(history["seconds"]))
    assert history["seconds"] == sorted(history["seconds"])


def test_fit_in_two_parts_equals_fit_in_one():
    whole, history = fit(STEP, start(), noisy, steps=7, progress=False)
    half, first = fit(STEP, start(), noisy, steps=3, progress=False)
    both, second = fit(STEP, half, noisy, steps=4, progress=False)
    assert tree.equal(both, whole)
    assert first["loss"] + second["loss"] == history["loss"]
    assert first["step"] + second["step"] == history["step"]


def test_fit_takes_an_iterator_a_list_or_a_function():
    data = torch.arange(12.0, dtype=torch.float64).reshape(12, 1)
    listed = list(batches(KEY, data, 4, steps=5))
    sources = [batches(KEY, data, 4), listed, lambda n: listed[n]]
    ends = [fit(STEP, start(), source, steps=5, progress=False)[0] for source in sources]
    assert tree.equal(ends[0], ends[1])
    assert tree.equal(ends[0], ends[2])


def test_fit_takes_no_more_batches_than_steps():
    source = iter(range(10))
    fit(STEP, start(), source, steps=4, progress=False)
    assert next(source) == 4


@pytest.mark.parametrize("log_every", [1, 2, 3, 50])
def test_fit_history_does_not_depend_on_log_every(log_every):
    _, expected = fit(STEP, start(), noisy, steps=6, progress=False)
    _, history = fit(STEP, start(), noisy, steps=6, progress=False, log_every=log_every)
    assert history["loss"] == expected["loss"]


def test_fit_keeps_every_scalar_metric_and_no_other():
    def step(train_state, batch):
        train_state, metrics = STEP(train_state, batch)
        extra = {"w": train_state.params["w"], "accuracy": batch + 1, "aux": {"a": batch}}
        return train_state, {**metrics, **extra}

    _, history = fit(step, start(), zero, steps=2, progress=False)
    assert set(history) == {"step", "seconds", "loss", "grad_norm", "accuracy"}
    assert history["accuracy"] == [1.0, 1.0]


def test_fit_calls_hooks_at_multiples_of_the_step_counter():
    """In a resumed run too; each sees the state after its step."""
    calls = []

    def hook(name):
        return lambda train_state: calls.append((name, train_state.step.item(), train_state.params["w"].item()))

    hooks = [Every(2, hook("a")), Every(3, hook("b"))]
    half, _ = fit(STEP, start(), zero, steps=3, progress=False, hooks=hooks)
    fit(STEP, half, zero, steps=3, progress=False, hooks=hooks)
    expected = [("a", 2), ("b", 3), ("a", 4), ("a", 6), ("b", 6)]
    assert [call[:2] for call in calls] == expected
    assert [call[2] for call in calls] == pytest.approx([0.75**n for _, n in expected], rel=1e-14)


# Checkpoints.


def stops_at(n):
    """``noisy`` until the run breaks off before step n."""

    def batch(step):
        if step == n:
            raise KeyboardInterrupt
        return noisy(step)

    return batch


@pytest.mark.parametrize("broken_at", [[2], [3, 4], [1, 6, 9]], ids=str)
def test_fit_goes_on_from_the_newest_checkpoint(tmp_path, broken_at):
    """The same call each time; steps after the newest checkpoint are taken again."""
    whole, history = fit(STEP, start(), noisy, steps=10, progress=False)
    for n in broken_at:
        with pytest.raises(KeyboardInterrupt):
            fit(STEP, start(), stops_at(n), steps=10, progress=False, checkpoints=tmp_path, save_every=3)
        assert max(checkpoint.steps(tmp_path), default=0) == n // 3 * 3
    last = broken_at[-1] // 3 * 3
    state, rest = fit(STEP, start(), noisy, steps=10, progress=False, checkpoints=tmp_path, save_every=3)
    assert tree.equal(state, whole)
    assert (rest["step"], rest["loss"]) == (history["step"][last:], history["loss"][last:])
    assert list(checkpoint.steps(tmp_path)) == [6, 9, 10]


def test_fit_of_a_finished_run_takes_no_step(tmp_path):
    whole, _ = fit(STEP, start(), noisy, steps=4, progress=False, checkpoints=tmp_path)
    again, history = fit(None, start(), noisy, steps=4, progress=False, checkpoints=tmp_path)
    assert tree.equal(again, whole)
    assert history["step"] == []


def test_fit_counts_steps_from_the_state_that_is_given(tmp_path):
    """A second fit into the same folder goes on, and its own checkpoints are the newest."""
    whole, _ = fit(STEP, start(), noisy, steps=9, progress=False)
    half, _ = fit(STEP, start(), noisy, steps=4, progress=False, checkpoints=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(STEP, half, stops_at(7), steps=5, progress=False, checkpoints=tmp_path, save_every=2)
    end, history = fit(STEP, half, noisy, steps=5, progress=False, checkpoints=tmp_path, save_every=2)
    assert tree.equal(end, whole)
    assert history["step"] == [6, 7, 8]


def test_fit_leaves_out_the_batches_of_steps_taken_before(tmp_path):
    data = torch.arange(12.0, dtype=torch.float64).reshape(12, 1)
    listed = list(batches(KEY, data, 4, steps=6))
    whole, _ = fit(STEP, start(), listed, steps=6, progress=False)
    for make in (lambda: batches(KEY, data, 4), lambda: listed, lambda: lambda n: listed[n]):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        fit(STEP, start(), make(), steps=4, progress=False, checkpoints=folder)
        assert tree.equal(fit(STEP, start(), make(), steps=6, progress=False, checkpoints=folder)[0], whole)


def test_fit_keeps_the_given_state_where_it_is_ahead_of_the_folder(tmp_path):
    half, _ = fit(STEP, start(), noisy, steps=4, progress=False)
    checkpoint.save_step(tmp_path, 2, start(w=100.0)._replace(step=torch.tensor(2)))
    checkpoint.save_step(tmp_path, 4, start(w=100.0)._replace(step=torch.tensor(4)))
    end, _ = fit(STEP, half, noisy, steps=2, progress=False, checkpoints=tmp_path)
    assert tree.equal(end, fit(STEP, half, noisy, steps=2, progress=False)[0])


def test_fit_saves_no_state_after_a_loss_that_is_not_finite(tmp_path):
    def batch(n):
        return torch.tensor(torch.nan if n == 5 else 1.0, dtype=torch.float64)

    with pytest.raises(FloatingPointError, match="got nan at step 5"):
        fit(STEP, start(), batch, steps=20, progress=False, checkpoints=tmp_path, save_every=2)
    assert list(checkpoint.steps(tmp_path)) == [2, 4]


def test_fit_saves_donated_states(tmp_path):
    step = jit(STEP, donate_argnums=0, backend="aten")
    end, _ = fit(step, start(), noisy, steps=5, progress=False, checkpoints=tmp_path, save_every=1, keep=None)
    for n, path in checkpoint.steps(tmp_path).items():
        assert tree.equal(checkpoint.load(path, like=end), fit(STEP, start(), noisy, steps=n, progress=False)[0])


def test_fit_of_a_bad_checkpoint_fails_before_it_starts(tmp_path):
    fit(STEP, start(), noisy, steps=4, progress=False, checkpoints=tmp_path)
    with pytest.raises(
        ValueError, match=r"fit: expected no checkpoint beyond step 3, the last of this run, got '.*4.saf"
    ):
        fit(None, start(), noisy, steps=3, progress=False, checkpoints=tmp_path)
    other = init_state({"v": torch.ones(1)}, TX, KEY)
    with pytest.raises(ValueError, match=r"missing from the file: 'params.v' \(float32 \(1,\)\)"):
        fit(None, other, noisy, steps=9, progress=False, checkpoints=tmp_path)
    newest = checkpoint.latest(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.raises(checkpoint.CheckpointError, match="truncated or corrupt"):
        fit(None, start(), noisy, steps=9, progress=False, checkpoints=tmp_path)
    with pytest.raises(ValueError, match="fit: expected save_every > 0, got 0"):
        fit(None, start(), noisy, steps=9, progress=False, checkpoints=tmp_path, save_every=0)


# Display.


def test_fit_shows_the_first_step_the_bar_and_the_loss_on_stderr(capsys):
    def slow_first(train_state, batch):
        if train_state.step == 0:
            time.sleep(1.2)
        return STEP(train_state, batch)

    fit(slow_first, start(), zero, steps=3)
    out, err = capsys.readouterr()
    assert out == ""
    assert "first step, compilation included: 1 s" in err
    assert "first step 1.2 s" in err
    assert "3/3" in err
    assert f"loss={0.5 * 0.75**4:.4g}" in err


def test_fit_shows_how_far_a_resumed_run_is(tmp_path, capsys):
    fit(STEP, start(), zero, steps=3, progress=False, checkpoints=tmp_path)
    fit(STEP, start(), zero, steps=5, checkpoints=tmp_path)
    assert "5/5" in capsys.readouterr().err


def test_fit_without_progress_is_silent_and_needs_no_tqdm(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    fit(STEP, start(), zero, steps=2, progress=False)
    assert capsys.readouterr() == ("", "")


def test_fit_with_progress_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(ImportError, match=r"pip install functorch_gen\[train\]"):
        fit(STEP, start(), zero, steps=2)


# Errors.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "fit: expected steps > 0, got 0"),
        ({"steps": -3}, ValueError, "fit: expected steps > 0, got -3"),
        ({"steps": 2.5}, TypeError, "fit: expected steps to be an integer > 0, got 2.5"),
        ({"steps": 3, "log_every": 0}, ValueError, "fit: expected log_every > 0, got 0"),
    ],
)
def test_fit_of_a_bad_number_fails_before_it_starts(options, error, message):
    def never(n):
        raise AssertionError("a batch was drawn")

    with pytest.raises(error, match=message):
        fit(STEP, start(), never, progress=False, **options)


def test_every_of_zero_steps_is_an_error():
    with pytest.raises(ValueError, match="Every: expected steps > 0, got 0"):
        Every(0, print)


def test_fit_of_too_short_a_list_fails_before_it_starts():
    with pytest.raises(ValueError, match="fit: expected batches for steps=3, got only 2"):
        fit(None, start(), [1, 2], steps=3, progress=False)  # a step that cannot be called


def test_fit_of_an_exhausted_iterator_is_an_error():
    with pytest.raises(ValueError, match="fit: expected batches for steps=3, got only 2"):
        fit(STEP, start(), (zero(n) for n in range(2)), steps=3, progress=False)


def test_fit_of_a_loss_that_is_not_finite_names_the_step_and_the_parameters():
    def loss_fn(params, key, batch):
        return (params["layer"]["bad"] * batch + params["good"]).sum()

    params = {"layer": {"bad": torch.ones(2)}, "good": torch.ones(2)}
    train_state = init_state(params, TX, KEY)
    message = "expected a finite loss, got nan at step 3; parameters that are not finite after step 4: layer.bad\nfit"
    with pytest.raises(FloatingPointError, match=message):
        fit(
            make_step(loss_fn, TX),
            train_state,
            lambda n: torch.tensor(torch.nan if n == 3 else 1.0),
            steps=10,
            log_every=5,
            progress=False,
        )


def test_fit_of_a_loss_that_is_not_finite_lists_five_parameters():
    def loss_fn(params, key, batch):
        return sum(p.sum() for p in params.values()) * torch.nan

    train_state = init_state({f"p{i}": torch.ones(2) for i in range(7)}, TX, KEY)
    with pytest.raises(FloatingPointError, match=r"after step 0: p0, p1, p2, p3, p4 and 2 more\nfit: the last"):
        fit(make_step(loss_fn, TX), train_state, zero, steps=1, progress=False)


# Checks.


def test_check_data_accepts_finite_and_integer_leaves():
    check_data({"x": torch.ones(3), "label": [torch.arange(3)], "mask": torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_check_data_names_path_and_index(value):
    x = torch.zeros(4, 3)
    x[2, 1] = value
    with pytest.raises(ValueError, match=rf"expected finite values at 'train.1', got {value} at index \(2, 1\)"):
        check_data({"train": [torch.zeros(2), x]})


def test_check_data_of_a_leaf_that_is_no_tensor_is_an_error():
    with pytest.raises(TypeError, match=r"check_data: data: expected a tensor at 'x\.0', got float"):
        check_data({"x": [1.0]})


def test_check_writable_makes_the_folder(tmp_path):
    folder = tmp_path / "runs" / "first"
    assert check_writable(str(folder)) == folder
    assert folder.is_dir()
    assert check_writable(folder) == folder


def test_check_writable_makes_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("runs/first")
    assert (tmp_path / "runs" / "first").is_dir()


def test_check_writable_of_a_file_is_an_error(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(NotADirectoryError, match=r"check_writable: expected a folder, got the file '.*file'$"):
        check_writable(file)
    with pytest.raises(NotADirectoryError, match=r"got the file '.*file' on the way to '.*file/runs/first'"):
        check_writable(file / "runs" / "first")


def test_check_writable_of_a_read_only_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != str(tmp_path))  # root may write anywhere
    with pytest.raises(PermissionError, match=f"check_writable: expected a writable folder, got '{tmp_path}/runs'"):
        check_writable(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_fit_names_the_leaf_by_which_a_batch_differs():
    given = [{"x": torch.ones(2), "y": torch.ones(2)}, {"x": torch.ones(2)}]
    tx = optim.sgd(0.1)
    state = init_state({"w": torch.ones(2)}, tx, random.key(0))
    step = make_step(lambda p, key, batch: (p["w"] * batch["x"]).sum(), tx)
    with pytest.raises(ValueError, match=r"fit: expected batches of one structure, got another at step 1: .*'y'"):
        fit(step, state, given, steps=2, progress=False)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_fit_hands_on_the_last_state_when_it_is_stopped(error):
    def batches_then_stop(n):
        if n == 2:
            raise error("stop")
        return torch.ones(2)

    tx = optim.sgd(0.1)
    step = jit(make_step(lambda p, key, batch: (p["w"] * batch).sum(), tx), donate_argnums=0, backend="aten")
    state = init_state({"w": torch.ones(2)}, tx, random.key(0))
    with pytest.raises(error) as caught:
        fit(step, state, batches_then_stop, steps=5, progress=False)
    assert int(caught.value.train_state.step) == 2
    assert torch.allclose(caught.value.train_state.params["w"], torch.tensor([0.8, 0.8]))
    assert caught.value.history["step"] == [0, 1]
    with pytest.raises(ValueError, match="train_state in use, got one whose memory was donated"):
        fit(step, state, batches_then_stop, steps=5, progress=False)
