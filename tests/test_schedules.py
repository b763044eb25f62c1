"""optim.schedules: values of optax in float64, closed forms, laws under transforms, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import optim

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "optim.json").read_text())["schedules"]

SCHEDULES = {
    "constant": optim.constant_schedule(0.3),
    "linear": optim.linear_schedule(0.1, 0.7, 20),
    "linear_begin": optim.linear_schedule(0.7, 0.1, 20, 5),
    "cosine": optim.cosine_decay_schedule(0.4, 30, 0.1),
    "warmup_cosine": optim.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02),
    "no_warmup_cosine": optim.warmup_cosine_decay_schedule(0.01, 0.2, 0, 40, 0.02),
    "joined": optim.join_schedules([optim.constant_schedule(1.0), optim.linear_schedule(1.0, 0.0, 8)], [12]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_optax(name):
    found = [SCHEDULES[name](step).item() for step in range(50)]
    assert found == pytest.approx(GOLDENS[name], abs=1e-15, rel=1e-14)  # float64 rounding


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_of_a_tensor_equals_that_of_an_int(name):
    schedule = SCHEDULES[name]
    for step in (0, 7, 12, 100):
        value = schedule(torch.tensor(step))
        assert value.shape == ()
        assert value.equal(schedule(step))


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_batches_over_steps(name):
    schedule, steps = SCHEDULES[name], torch.arange(50)
    assert vmap(schedule)(steps).allclose(torch.stack([schedule(step) for step in steps]), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_traces_for_all_steps_at_once(name):
    schedule = SCHEDULES[name]
    graph = make_fx(schedule, tracing_mode="fake")(torch.tensor(3))
    assert [graph(torch.tensor(step)).item() for step in (0, 11, 30, 60)] == [
        schedule(step).item() for step in (0, 11, 30, 60)
    ]


@given(
    st.integers(0, 50), st.integers(1, 50), st.floats(0, 1), st.floats(0.01, 1), st.floats(0, 1), st.integers(0, 200)
)
def test_warmup_cosine_stays_between_its_ends_and_peak(warmup, length, start, peak, end, step):
    schedule = optim.warmup_cosine_decay_schedule(start, peak, warmup, warmup + length, end)
    low, high = min(start, peak, end), max(start, peak, end)
    assert low - 1e-12 <= schedule(step).item() <= high + 1e-12
    assert schedule(warmup).item() == pytest.approx(peak, abs=1e-15)
    assert schedule(warmup + length + step).item() == pytest.approx(end, abs=1e-15)


def test_warmup_cosine_without_peak_is_finite():
    schedule = optim.warmup_cosine_decay_schedule(0.0, 0.0, 2, 4)
    assert [schedule(step).item() for step in range(6)] == [0.0] * 6


def test_schedule_counts_beyond_float32():
    line = optim.linear_schedule(0.0, 1.0, 2**26)
    step = torch.tensor(2**25 + 1)
    assert line(step).item() == (2**25 + 1) / 2**26  # float32 has no 2^25 + 1


def test_schedule_has_derivatives_in_its_parameters():
    def value(peak):
        return optim.warmup_cosine_decay_schedule(0.0, peak, 10, 30)(torch.tensor(15))

    slope = grad(value)(torch.tensor(0.3, dtype=torch.float64))
    assert slope.item() == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)), rel=1e-14)


def test_schedule_batches_over_its_parameters():
    peaks = torch.tensor([0.1, 0.5], dtype=torch.float64)
    found = vmap(lambda peak: optim.cosine_decay_schedule(peak, 10)(5))(peaks)
    torch.testing.assert_close(found, peaks / 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.linear_schedule(0.0, 1.0, 0), "linear_schedule: expected transition_steps > 0, got 0"),
        (lambda: optim.linear_schedule(0.0, 1.0, 5, -1), "linear_schedule: expected 0 <= transition_begin, got -1"),
        (lambda: optim.cosine_decay_schedule(1.0, -3), "cosine_decay_schedule: expected decay_steps > 0, got -3"),
        (lambda: optim.warmup_cosine_decay_schedule(0.0, 1.0, -1, 5), "expected 0 <= warmup_steps, got -1"),
        (lambda: optim.warmup_cosine_decay_schedule(0.0, 1.0, 5, 5), "expected decay_steps > warmup_steps=5, got 5"),
        (lambda: optim.join_schedules([], [3]), "join_schedules: expected 2 schedules, got 0"),
    ],
)
def test_schedule_rejects_bad_lengths(make, message):
    with pytest.raises(ValueError, match=message):
        make()
