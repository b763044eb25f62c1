"""The benchmark itself: equal work, honest turns, a page of nothing but what was measured."""

import json
import subprocess
import sys

import pytest
import torch

import functorch_gen as fg
from tests.bench import __main__ as command
from tests.bench import adversaries, bars, families, generation, programs, sampler, starts, variants
from tests.bench.depth import depth_step
from tests.bench.memory import peak_bytes
from tests.bench.page import page, summary
from tests.bench.steps import check_equal, first_losses, time_steps
from tests.bench.table import Options, Table, attempt
from tests.bench.timing import Timing, busy_processors, interleave

SMALL = {
    "mlp": lambda: programs.mlp((12, 8, 8, 5), batch_size=16),
    "unet": lambda: programs.unet(batch_size=4, side=8, base_channels=8, num_groups=4),
    "gpt": lambda: programs.gpt(batch_size=2, length=8, width=12, num_heads=3, num_layers=2, vocabulary=11),
}
FAMILIES = {
    "vae": lambda: families.vae_program(batch_size=5, hidden=(7, 6), latent=3),
    "diffusion": lambda: families.diffusion_program(batch_size=3, base_channels=8),
    "flow": lambda: families.flow_program(batch_size=3, base_channels=8),
    "mean_flow": lambda: families.mean_flow_program(batch_size=4, base_channels=8),
}
GAMES = {
    "convolutional": lambda: adversaries.convolutional(batch_size=3, channels=(4, 6), latent=5),
    "perceptrons": lambda: adversaries.perceptrons(batch_size=3, hidden=(7, 6), latent=5),
}
each_game = pytest.mark.parametrize("game", GAMES.values(), ids=list(GAMES))
each_program = pytest.mark.parametrize("make", SMALL.values(), ids=list(SMALL))
ROUNDING = 1e-4  # float32, five steps of Adam: a tenth of what the benchmark itself allows


# Equal work.


# The kernels of 1x1 convolutions have other strides, which mean nothing, under channels-last.
@pytest.mark.filterwarnings("ignore:jit. no output has the shape:UserWarning")
@each_program
def test_functional_and_module_steps_are_equal(make):
    forms = variants.makers(make(), "aten")
    del forms["JAX"]
    losses = {name: first_losses(form()) for name, form in forms.items()}
    assert check_equal(losses) < ROUNDING


def check_one_program(step):
    """One trace, whose calls take the old state's memory."""
    old = fg.tree.leaves(step.state)
    step()
    assert step.step.traces == 1
    assert all(x.numel() == 0 for x in old if x.ndim)


@pytest.mark.filterwarnings("ignore:jit. no output has the shape:UserWarning")
@pytest.mark.parametrize("name", ["vae", "diffusion", pytest.param("flow", marks=pytest.mark.slow), "mean_flow"])
def test_step_of_a_family_is_one_program_equal_to_the_modules(name):
    program = FAMILIES[name]()
    functional, module = variants.FunctionalStep(program, backend="aten"), variants.ModuleStep(program)
    assert check_equal({"module": first_losses(module), "fg": first_losses(functional)}) < ROUNDING
    check_one_program(functional)


@each_game
def test_step_of_a_gan_is_one_program_equal_to_the_modules(game):
    forms = {name: make() for name, make in adversaries.gan_makers(game(), "aten").items()}
    assert check_equal({name: first_losses(form) for name, form in forms.items()}) < ROUNDING
    check_one_program(forms["fg.jit"])


@pytest.mark.slow  # compiles
@each_game
def test_compiled_forms_of_a_gan_are_equal(game):
    losses = {name: first_losses(make()) for name, make in adversaries.gan_makers(game()).items()}
    assert len(losses) == 4 + game().images
    assert check_equal(losses) < ROUNDING


def test_programs_without_a_form_of_jax_have_no_row_of_it():
    program = FAMILIES["vae"]()
    assert "JAX" not in variants.makers(program, "aten")
    with pytest.raises(ValueError, match="jax_step: expected a program with a JAX form"):
        variants.jax_step(program)


def test_what_torch_cannot_compile_is_not_tried():
    forms = variants.makers(FAMILIES["mean_flow"]())
    assert [name for name in forms if "Module" in name] == [
        "nn.Module eager",
        "nn.Module with its update compiled",
    ]


@pytest.mark.slow  # compiles
@each_program
def test_jax_step_equals_module_step(make):
    pytest.importorskip("jax", reason="jax is in the extra `bench`, which `make bench` installs")
    pytest.importorskip("optax", reason="optax is in the extra `bench`, which `make bench` installs")
    program = make()
    module, jax = variants.ModuleStep(program), variants.jax_step(program)
    assert check_equal({"module": first_losses(module), "jax": first_losses(jax)}) < ROUNDING


@pytest.mark.slow  # compiles module and update
def test_compiled_module_step_equals_eager():
    program = SMALL["mlp"]()
    eager, compiled = (variants.ModuleStep(program, compiled=c, compiled_update=c) for c in (False, True))
    assert check_equal({"eager": first_losses(eager), "compiled": first_losses(compiled)}) < ROUNDING


def test_check_equal_refuses_other_losses():
    with pytest.raises(RuntimeError, match=r"got \[1.0, 2.01\] from b"):
        check_equal({"a": [1.0, 2.0], "b": [1.0, 2.01]})
    with pytest.raises(RuntimeError, match="from b"):
        check_equal({"a": [1.0], "b": [float("nan")]})


def test_scan_and_loop_of_blocks_take_equal_steps():
    scan, loop = (depth_step(form, 3, backend="aten") for form in ("scan", "loop"))
    torch.testing.assert_close([scan() for _ in range(3)], [loop() for _ in range(3)])


# Turns.


def test_interleave_takes_turns_and_counts_only_the_timed_rounds():
    calls = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=1)
    assert sorted(calls) == ["a"] * 5 + ["b"] * 5
    assert set(zip(calls[::2], calls[1::2], strict=True)) == {("a", "b"), ("b", "a")}
    assert all(t.minimum <= t.median for t in times.values())


def test_interleave_settles_before_each_timed_call():
    calls = []
    interleave({name: lambda name=name: calls.append(name) for name in "ab"}, rounds=2, warmup=0, settle=1e-9)
    assert calls == ["a", "a", "b", "b", "b", "b", "a", "a"]


def test_repeat_rotates_and_reports_the_row_that_failed():
    order = []

    def fail() -> float:
        order.append("b")
        raise RuntimeError("no compiler")

    table = starts.repeat({"a": lambda: order.append("a") or 2.0, "b": fail}, repeats=2)
    assert order == ["a", "b", "b", "a"]
    assert table.rows == {"a": Timing(2.0, 2.0)}
    assert table.failures == {"b": "no compiler"}


@pytest.mark.slow  # starts a process that imports torch
def test_run_case_reports_the_error_of_its_process():
    with pytest.raises(RuntimeError, match="invalid choice: 'nothing'"):
        starts.run_case("nothing")


def test_attempt_keeps_the_rows_that_work(capsys):
    made, failures = attempt({"good": lambda: 1, "bad": lambda: 1 / 0})
    assert made == {"good": 1}
    assert failures == {"bad": "ZeroDivisionError: division by zero"}
    assert "ZeroDivisionError" in capsys.readouterr().err


# A busy machine.


def test_busy_processors_sees_a_busy_process():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            assert busy_processors(0.5) > command.BUSY
        finally:
            process.kill()


def test_harness_refuses_a_busy_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "busy_processors", lambda: 1.2)
    with pytest.raises(SystemExit, match=r"expected an idle machine, got 1\.2 busy processors"):
        command.main(["--only", "mlp_step", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


# Memory.


def test_peak_bytes_counts_what_is_alive_at_once():
    def run() -> torch.Tensor:
        a = torch.zeros(1000, 1000)
        b = a + 1
        del a
        return torch.cat([b[:1], b[1:2]])

    assert peak_bytes(run) == pytest.approx(2 * 4_000_000, abs=100)  # and the scalar 1


# The page.


def test_page_is_made_from_the_json():
    results = json.loads((command.DOCS / "benchmarks.json").read_text())
    assert (command.DOCS / "benchmarks.md").read_text() == page(results)


def steps_table(**medians: float) -> dict:
    names = {"tree": "fg.jit", "flat": "fg.jit, flat", "eager": "nn.Module eager", "compiled": "nn.Module compiled"}
    rows = {names.get(name, name): Timing(x, x) for name, x in medians.items()}
    return Table("ms", rows).as_json()


def test_readme_shows_the_ratios_of_the_json():
    results = json.loads((command.DOCS / "benchmarks.json").read_text())
    assert f"<!-- bench -->\n{summary(results)}\n<!-- /bench -->" in command.README.read_text()


def test_page_tells_which_form_meets_the_bar():
    table = steps_table(tree=0.95, flat=0.8, eager=2.0, compiled=1.0, JAX=0.5)
    text = page({"machine": {"cores": "2"}, "sections": {"mlp_step": table}})
    assert "Made by `make bench` on cores 2." in text
    assert "| MLP step, fg / best nn.Module | 0.95 tree, 0.80 flat | 0.9 | 0.75 | flat only |" in text
    assert "| MLP step, fg / JAX | 1.90 tree, 1.60 flat | 1 | 0.8 | no |" in text
    assert "| Tiny MLP step, fg / JAX | not measured | 0.85 | 0.5 | |" in text
    assert "| nn.Module compiled | 1 | 1 |" in text


def test_page_compares_with_the_fastest_module():
    assert bars.best_module(steps_table(tree=0.5, eager=1.0, compiled=2.0)) == "nn.Module eager"


def test_page_tells_why_a_row_is_missing():
    table = Table("ms", {}, {"JAX": "ModuleNotFoundError: No module named 'jax'"}).as_json()
    text = page({"machine": {}, "sections": {"mlp_step": table}})
    assert "| JAX | failed: `ModuleNotFoundError: No module named 'jax'` | |" in text


def test_traffic_ratio_is_at_least_its_bar():
    rows = {"fg.jit": Timing(10.0, 10.0), "Tensor.copy_": Timing(1.0, 1.0)}  # ten vectors in 10 s, two in 1 s
    text = page({"machine": {}, "sections": {"update_traffic": Table("ms", rows).as_json()}})
    assert "| AdamW + clip + EMA on 50M: bytes per second / a copy's | 0.50 | at least 0.75 | 0.9 | no |" in text


def test_sampler_and_generation_are_at_least_their_bars():
    rows = {sampler.LOOP: Timing(3.0, 3.0), sampler.PROGRAM: Timing(1.5, 1.5)}
    others = {generation.CACHED: Timing(1.0, 1.0), "a, no cache": Timing(4.0, 4.0), "b, no cache": Timing(7.0, 7.0)}
    tables = {"sampler": Table("ms", rows).as_json(), "generation": Table("ms", others).as_json()}
    text = page({"machine": {}, "sections": tables})
    assert "| Sampler of 20 steps, uncompiled / one program | 2.00 | at least 1.5 |  | yes |" in text
    assert "| Generation of 256 tokens, the fastest without a cache / with it | 4.00 | at least 5 |  | no |" in text


def test_merge_keeps_the_other_sections_of_the_same_machine_only(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "machine", lambda: {"cores": "2"})
    command.merge(tmp_path, "normals", Table("ms", {"fg.jit": Timing(2.0, 1.0)}))
    command.merge(tmp_path, "mlp_step", Table("ms", {"fg.jit": Timing(4.0, 3.0)}))
    results = json.loads((tmp_path / "benchmarks.json").read_text())
    assert list(results["sections"]) == ["mlp_step", "normals"]
    assert results["sections"]["normals"]["rows"] == {"fg.jit": {"median": 2.0, "minimum": 1.0}}
    assert (tmp_path / "benchmarks.md").read_text() == page(results)
    monkeypatch.setattr(command, "machine", lambda: {"cores": "64"})
    command.merge(tmp_path, "normals", Table("ms", {}))
    assert list(json.loads((tmp_path / "benchmarks.json").read_text())["sections"]) == ["normals"]


def test_time_steps_measures_every_form():
    table = time_steps(SMALL["mlp"](), Options(rounds=2, backend="aten"))
    measured = {*table.rows, *table.failures}
    assert measured == {"fg.jit", "fg.jit, flat", "nn.Module eager", "JAX"}
    assert table.failures.keys() <= {"JAX"}
    assert "agree to" in table.note
