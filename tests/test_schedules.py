"""optim.schedules: values of optax and torch in float64, closed forms, laws under transforms, errors."""

import base64
import json
import math
import warnings
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import jit, optim

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "schedules.json").read_text())
STEPS = torch.arange(1000)

CYCLES = [  # of goldens/make_schedules.py
    {"init_value": 0.01, "peak_value": 0.3, "warmup_steps": 20, "decay_steps": 150, "end_value": 0.02},
    {"init_value": 0.02, "peak_value": 0.2, "warmup_steps": 0, "decay_steps": 300, "exponent": 1.5},
    {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 10, "decay_steps": 250},
]

SCHEDULES = {
    "constant": optim.constant_schedule(0.3),
    "linear": optim.linear_schedule(0.1, 0.7, 20),
    "linear_begin": optim.linear_schedule(0.7, 0.1, 500, 5),
    "cosine_short": optim.cosine_decay_schedule(0.4, 30, 0.1),
    "warmup_cosine_short": optim.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02),
    "no_warmup_cosine": optim.warmup_cosine_decay_schedule(0.01, 0.2, 0, 40, 0.02),
    "joined": optim.join_schedules([optim.constant_schedule(1.0), optim.linear_schedule(1.0, 0.0, 8)], [12]),
    "polynomial": optim.polynomial_schedule(0.3, 0.01, 2.5, 600, 100),
    "cosine": optim.cosine_decay_schedule(0.4, 700, 0.1, 1.3),
    "exponential": optim.exponential_decay(0.5, 130, 0.4, 50, end_value=0.02),
    "exponential_growth": optim.exponential_decay(0.01, 100, 1.7, end_value=0.5),
    "staircase": optim.exponential_decay(0.5, 130, 0.4, 50, staircase=True),
    "piecewise_constant": optim.piecewise_constant_schedule(0.7, {100: 0.3, 500: 0.2, 501: 1.5}),
    "piecewise_linear": optim.piecewise_interpolate_schedule("linear", 0.7, {100: 0.3, 0: 1.2, 500: 2.0}),
    "piecewise_cosine": optim.piecewise_interpolate_schedule("cosine", 0.7, {100: 0.3, 500: 2.0}),
    "linear_onecycle": optim.linear_onecycle_schedule(900, 0.6),
    "cosine_onecycle": optim.cosine_onecycle_schedule(777, 0.6, 0.25, 10.0, 1e3),
    "warmup_constant": optim.warmup_constant_schedule(0.05, 0.3, 120),
    "warmup_cosine": optim.warmup_cosine_decay_schedule(0.01, 0.2, 100, 800, 0.02, 0.7),
    "warmup_exponential": optim.warmup_exponential_decay_schedule(0.01, 0.2, 100, 90, 0.5, 30, True, 0.01),
    "sgdr": optim.sgdr_schedule(CYCLES),
}


def unpacked(text):
    return torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.float64)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_equals_optax_at_a_thousand_steps(name):
    found = torch.stack([SCHEDULES[name](step) for step in range(1000)])
    torch.testing.assert_close(found, unpacked(GOLDENS["schedules"][name]), rtol=0, atol=1e-14)  # float64 rounding


def from_torch(scheduler, steps=1000, **options):
    """The learning rates of a scheduler of torch.optim that starts at 0.3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a scheduler that is stepped without its optimizer
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
        scheduler = scheduler(optimizer, **options)
        rates = []
        for _ in range(steps):
            rates.append(optimizer.param_groups[0]["lr"])
            scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


TORCH = {
    "StepLR": (optim.step_schedule(0.3, 90, 0.7), {"step_size": 90, "gamma": 0.7}),
    "MultiStepLR": (optim.step_schedule(0.3, [50, 400, 400, 700]), {"milestones": [50, 400, 400, 700]}),
    "ExponentialLR": (optim.exponential_decay(0.3, 1, 0.997), {"gamma": 0.997}),
    "LinearLR": (optim.linear_schedule(0.1, 0.3, 600), {"start_factor": 1 / 3, "total_iters": 600}),
    "PolynomialLR": (optim.polynomial_schedule(0.3, 0.0, 1.7, 800), {"power": 1.7, "total_iters": 800}),
    "CosineAnnealingLR": (optim.cosine_decay_schedule(0.3, 1000, 0.1), {"T_max": 1000, "eta_min": 0.03}),
    "CosineAnnealingWarmRestarts": (
        optim.sgdr_schedule(
            [
                {"init_value": 0.3, "peak_value": 0.3, "warmup_steps": 0, "decay_steps": 70 * 2**i, "end_value": 0.01}
                for i in range(4)
            ]
        ),
        {"T_0": 70, "T_mult": 2, "eta_min": 0.01},
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_schedule_equals_torch_at_a_thousand_steps(name):
    schedule, options = TORCH[name]
    found = vmap(schedule)(STEPS)
    expected = from_torch(getattr(torch.optim.lr_scheduler, name), **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)  # torch multiplies step by step


def stable_decay(t, shape):
    """Hägele et al. 2024, section 3: 120 steps of warm-up, 500 stable, 300 of decay from 0.2 to 0.01."""
    if t < 120:
        return 0.05 + (0.2 - 0.05) * t / 120
    x = min(max((t - 620) / 300, 0), 1)
    return 0.01 + 0.19 * {"linear": 1 - x, "cosine": 0.5 + 0.5 * math.cos(math.pi * x), "1-sqrt": 1 - x**0.5}[shape]


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_warmup_stable_decay_follows_its_formula(shape):
    found = vmap(optim.warmup_stable_decay_schedule(0.05, 0.2, 120, 500, 300, 0.01, shape))(STEPS)
    assert found.tolist() == pytest.approx([stable_decay(t, shape) for t in range(1000)], rel=1e-14)


def test_inverse_sqrt_is_the_schedule_of_the_transformer():
    d, w = 512, 40
    found = vmap(optim.inverse_sqrt_schedule(0.0, (d * w) ** -0.5, w))(STEPS[1:])
    expected = [d**-0.5 * min(t**-0.5, t * w**-1.5) for t in range(1, 1000)]
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


def test_inverse_sqrt_decays_on_its_own_timescale():
    found = vmap(optim.inverse_sqrt_schedule(0.1, 0.3, 40, timescale=200))(STEPS)
    expected = [0.1 + 0.2 * t / 40 if t < 40 else 0.3 * math.sqrt(200 / (200 + t - 40)) for t in range(1000)]
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


ALL = SCHEDULES | {name: schedule for name, (schedule, _) in TORCH.items()}
ALL["inverse_sqrt"] = optim.inverse_sqrt_schedule(0.0, 0.3, 20)
ALL["stable_decay"] = optim.warmup_stable_decay_schedule(0.0, 0.3, 5, 10, 20, decay_type="1-sqrt")


@pytest.mark.parametrize("name", ALL)
def test_schedule_of_a_tensor_equals_that_of_an_int(name):
    schedule = ALL[name]
    for step in (0, 7, 12, 100):
        value = schedule(torch.tensor(step))
        assert (value.shape, value.dtype) == ((), torch.float64)
        assert value.equal(schedule(step))


@pytest.mark.parametrize("name", ALL)
def test_schedule_batches_over_steps(name):
    schedule, steps = ALL[name], torch.arange(0, 1000, 20)
    assert vmap(schedule)(steps).allclose(torch.stack([schedule(step) for step in steps]), rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("name", ALL)
def test_schedule_traces_for_all_steps_at_once(name):
    schedule = ALL[name]
    graph = make_fx(schedule, tracing_mode="fake")(torch.tensor(3))
    assert [graph(torch.tensor(step)).item() for step in (0, 11, 30, 700)] == [
        schedule(step).item() for step in (0, 11, 30, 700)
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


@pytest.mark.parametrize("step", [0, 3, 10, 11])
def test_schedule_has_second_derivatives_at_its_ends(step):
    def value(numbers):
        a, b, power = numbers
        fall = optim.polynomial_schedule(a, b, power, 10)(step) + optim.cosine_decay_schedule(a, 10, b, power)(step)
        return fall + optim.warmup_stable_decay_schedule(0.0, a, 3, 4, power + 2, b, "1-sqrt")(step)

    assert hessian(value)(torch.tensor([0.3, 0.1, 1.0], dtype=torch.float64)).isfinite().all()


def test_schedule_batches_over_lengths():
    lengths = torch.tensor([5.0, 20.0])
    found = vmap(lambda n: optim.warmup_cosine_decay_schedule(0.1, 0.3, n, 3 * n)(7))(lengths)
    expected = [optim.warmup_cosine_decay_schedule(0.1, 0.3, n, 3 * n)(7) for n in (5, 20)]
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("rate", [0.6, 1.4])
def test_exponential_decay_stops_at_its_end_for_a_rate_that_is_traced(rate):
    def value(rate, end):
        return optim.exponential_decay(1.0, 1, rate, end_value=end)(4)

    traced = jit(value, backend="aten")
    assert [traced(rate, end).item() for end in (0.5, 2.0)] == [value(rate, end).item() for end in (0.5, 2.0)]


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
        (
            lambda: optim.polynomial_schedule(0.0, 1.0, 2, 0),
            "polynomial_schedule: expected transition_steps > 0, got 0",
        ),
        (lambda: optim.exponential_decay(1.0, 5, 0.0), "exponential_decay: expected decay_rate > 0, got 0.0"),
        (lambda: optim.exponential_decay(1.0, 5, 0.5, -2), "exponential_decay: expected 0 <= transition_begin, got -2"),
        (lambda: optim.step_schedule(1.0, 0), "step_schedule: expected step_size > 0, got 0"),
        (
            lambda: optim.piecewise_constant_schedule(1.0, {3: -0.5}),
            r"piecewise_constant_schedule: expected 0 <= boundaries_and_scales\[3\], got -0.5",
        ),
        (
            lambda: optim.piecewise_interpolate_schedule("cubic", 1.0),
            "piecewise_interpolate_schedule: expected interpolate_type to be one of 'linear', 'cosine', got 'cubic'",
        ),
        (lambda: optim.linear_onecycle_schedule(0, 1.0), "linear_onecycle_schedule: expected transition_steps > 0"),
        (lambda: optim.cosine_onecycle_schedule(0, 1.0), "cosine_onecycle_schedule: expected transition_steps > 0"),
        (lambda: optim.warmup_constant_schedule(0.0, 1.0, 0), "warmup_constant_schedule: expected warmup_steps > 0"),
        (
            lambda: optim.warmup_exponential_decay_schedule(0.0, 1.0, -1, 5, 0.5),
            "warmup_exponential_decay_schedule: expected 0 <= warmup_steps, got -1",
        ),
        (
            lambda: optim.warmup_stable_decay_schedule(0.0, 1.0, 1, 2, 3, decay_type="sqrt"),
            "expected decay_type to be one of 'linear', 'cosine', '1-sqrt', got 'sqrt'",
        ),
        (lambda: optim.warmup_stable_decay_schedule(0.0, 1.0, 1, -2, 3), "expected 0 <= stable_steps, got -2"),
        (lambda: optim.warmup_stable_decay_schedule(0.0, 1.0, 1, 2, 0), "expected decay_steps > 0, got 0"),
        (lambda: optim.inverse_sqrt_schedule(0.0, 1.0, 0), "inverse_sqrt_schedule: expected timescale > 0, got 0"),
    ],
)
def test_schedule_rejects_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# reduce_on_plateau.

PLATEAUS = {  # of goldens/make_schedules.py
    "plain": {"factor": 0.5, "patience": 3},
    "cooldown": {"factor": 0.3, "patience": 2, "cooldown": 4, "rtol": 0.0, "atol": 0.05, "min_scale": 0.02},
    "mean": {"factor": 0.5, "patience": 2, "accumulation_size": 3, "rtol": 0.01, "cooldown": 1},
}
T = torch.arange(200, dtype=torch.float64)
LOSSES = 1 / (1 + 0.1 * T.clamp(max=60)) + 0.05 * torch.cos(2.1 * T)


def scales(tx, losses, update=None):
    grads = {"w": torch.ones(1, dtype=torch.float64)}
    state, found = tx.init(grads), []
    for loss in losses:
        updates, state = (update or tx.update)(grads, state, value=loss)
        found.append(updates["w"])
    return torch.cat(found)


@pytest.mark.parametrize("name", PLATEAUS)
def test_reduce_on_plateau_equals_optax(name):
    expected = unpacked(GOLDENS["plateaus"][name])
    assert len(expected.unique()) > 3
    torch.testing.assert_close(scales(optim.reduce_on_plateau(**PLATEAUS[name]), LOSSES), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"patience": 3, "rtol": 0.02}, {"patience": 2, "threshold": 0.02}),
        ({"patience": 1, "rtol": 0.0, "atol": 0.05}, {"patience": 0, "threshold": 0.05, "threshold_mode": "abs"}),
        (
            {"factor": 0.4, "patience": 2, "cooldown": 5, "min_scale": 0.1},
            {"factor": 0.4, "patience": 1, "cooldown": 5},
        ),
    ],
    ids=["relative", "absolute", "cooldown"],
)
def test_reduce_on_plateau_equals_torch(ours, theirs):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, min_lr=ours.get("min_scale", 0), eps=0, **theirs)
    expected = []
    for loss in LOSSES:
        scheduler.step(loss)
        expected.append(optimizer.param_groups[0]["lr"])
    assert len({*expected}) > 3
    assert scales(optim.reduce_on_plateau(**ours), LOSSES).tolist() == pytest.approx(expected, rel=1e-14)


def test_reduce_on_plateau_works_in_a_chain_traced_and_batched():
    tx = optim.chain(optim.sgd(0.1), optim.reduce_on_plateau(0.5, 3))
    expected = -0.1 * scales(optim.reduce_on_plateau(0.5, 3), LOSSES[:40])
    traced = jit(lambda grads, state, value: tx.update(grads, state, value=value), backend="aten")
    torch.testing.assert_close(scales(tx, LOSSES[:40], traced), expected)

    def run(factor):
        return scales(optim.reduce_on_plateau(factor, 3), LOSSES[:40])

    factors = torch.tensor([0.5, 0.2], dtype=torch.float64)
    torch.testing.assert_close(vmap(run)(factors), torch.stack([run(0.5), run(0.2)]))


def test_reduce_on_plateau_has_derivatives_and_keeps_dtypes():
    last = lambda factor: scales(optim.reduce_on_plateau(factor, 3), LOSSES)[-1]
    factor = torch.tensor(0.5, dtype=torch.float64)
    reductions = round(math.log(last(factor).item(), 0.5))
    torch.testing.assert_close(grad(last)(factor), reductions * factor ** (reductions - 1))
    tx, grads = optim.reduce_on_plateau(), {"w": torch.ones(2, dtype=torch.bfloat16)}
    updates, state = tx.update(grads, tx.init(grads), value=torch.tensor(1.0, dtype=torch.float64))
    assert updates["w"].dtype == torch.bfloat16
    assert [x.dtype for x in state] == [x.dtype for x in tx.init(grads)]
    assert state.scale.dtype == torch.float32


def test_reduce_on_plateau_survives_a_loss_that_is_not_finite():
    losses = [1.0, math.nan, math.inf, 0.5, 0.4]
    assert scales(optim.reduce_on_plateau(0.5, 2), losses).tolist() == [1, 1, 0.5, 0.5, 0.5]


def test_reduce_on_plateau_names_what_is_missing():
    tx = optim.reduce_on_plateau()
    with pytest.raises(ValueError, match=r"reduce_on_plateau: expected .*value=loss\) with a 0-d loss, got none"):
        tx.update([torch.ones(1)], tx.init([torch.ones(1)]))
    with pytest.raises(ValueError, match=r"reduce_on_plateau: .* 0-d loss, got one of shape \(2,\)"):
        tx.update([torch.ones(1)], tx.init([torch.ones(1)]), value=torch.ones(2))
    with pytest.raises(ValueError, match="reduce_on_plateau: expected 1 <= patience, got 0"):
        optim.reduce_on_plateau(patience=0)
    with pytest.raises(ValueError, match="reduce_on_plateau: expected 0 <= atol, got -1"):
        optim.reduce_on_plateau(atol=-1)
