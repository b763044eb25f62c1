"""The benchmark itself: equal work, honest turns, a page of what was measured."""

import diffusion_digits as demo
import pytest

from tests.bench import step as bench
from tests.bench.timing import busy_processors, interleave


def test_benchmark_compares_equal_work_and_writes_a_page():
    result = bench.measure(demo.Config(steps=100, base_channels=8, batch_size=16, backend="aten"), rounds=3)
    assert result["loss_difference_over_5_steps"] < 1e-4
    assert set(result["milliseconds"]) == {"fg.jit", "nn.Module eager", "nn.Module eager channels-last"}
    best = result["milliseconds"][result["best_module"]]["median"]
    assert result["ratio_to_best_module"] == pytest.approx(result["milliseconds"]["fg.jit"]["median"] / best)
    page = bench.page(result)
    assert "| fg.jit |" in page
    assert "| 1.00 |" in page


def test_benchmark_refuses_unequal_work():
    config = demo.Config(steps=100, base_channels=8, batch_size=16, backend="aten")
    run, params = bench.functional_step(config)
    module = bench.ModuleStep(config, params, compiled=False, channels_last=False)
    data = {name: x[:16] for name, x in bench.digits.load(bench.digits.TRAIN).items()}
    loss = module.loss
    module.loss = lambda *drawn: 1.01 * loss(*drawn)
    with pytest.raises(RuntimeError, match="expected equal losses"):
        bench.assert_equal_work(run, module, data)


def test_interleave_takes_turns_and_counts_only_the_timed_rounds():
    calls = []
    times = interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=1)
    assert sorted(calls) == ["a"] * 5 + ["b"] * 5
    assert set(zip(calls[::2], calls[1::2], strict=True)) == {("a", "b"), ("b", "a")}
    assert all(t.minimum <= t.median for t in times.values())


def test_busy_processors_counts_at_most_all():
    assert busy_processors(0.1) >= 0
