"""What a scan costs: memory beside a backward pass written by hand, and time to build whatever the length."""

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree
from tests.bench import loops


@pytest.mark.parametrize("jitted", [False, True])
def test_scan_gradient_is_the_one_written_by_hand(jitted):
    arguments = tree.cast(loops.problem(9, batch_size=4, width=8), torch.float64)
    gradient = fg.jit(loops.scan_gradient, backend="aten") if jitted else loops.scan_gradient
    # sums of a few hundred products of order one, in another order
    assert tree.allclose(gradient(*arguments), loops.hand_written_gradient(*arguments), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_scan_gradient_takes_no_more_memory_than_one_written_by_hand(backend):
    peaks = loops.gradient_peaks(backend, length=64, batch_size=32, width=32)
    assert peaks["fg.scan"] < 1.3 * peaks["by hand"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aten", "inductor"])
def test_scan_of_256_steps_builds_as_fast_as_one_of_4(backend):
    sizes = {"backend": backend, "batch_size": 8, "width": 16}
    loops.build_seconds(3, **sizes)  # imports, and the compiler's probes
    few, many = [min(loops.build_seconds(length + i, **sizes) for i in range(3)) for length in (4, 256)]
    assert many < 1.3 * few
