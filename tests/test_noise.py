"""Noise schedules against the formulas of their papers, quadrature and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functorch_gen import random
from functorch_gen.noise import (
    EDM,
    FlowMatching,
    NoiseSchedule,
    VPCosine,
    VPLinear,
    angle_times,
    expand,
    log_snr,
    mix,
    rates,
    rho_times,
    uniform_times,
)

F64 = torch.float64
VARIANCE_PRESERVING = [VPLinear(), VPLinear(0.5, 8.0), VPLinear(3.0, 3.0), VPCosine(), VPCosine(s=0.1, t_max=1.0)]
SCHEDULES = [*VARIANCE_PRESERVING, EDM(), EDM(0.01, 50.0, 3.0), FlowMatching()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
times = st.floats(0, 1, width=32)


def at(*t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=F64)


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING, ids=str)
@given(t=times)
def test_variance_preserving_schedules_keep_the_variance(schedule, t):
    total = schedule.alpha(at(t)) ** 2 + schedule.sigma(at(t)) ** 2
    torch.testing.assert_close(total, at(1.0), rtol=1e-14, atol=0)  # a few roundings


def test_vp_linear_equals_the_integral_of_beta():
    # Song et al. 2021, eq. 33: alpha = exp(-1/2 integral of beta), beta linear: the trapezoidal rule is exact
    for t in (0.1, 0.5, 1.0):
        grid = torch.linspace(0, t, 11, dtype=F64)
        integral = torch.trapezoid(0.1 + grid * 19.9, grid)
        torch.testing.assert_close(VPLinear().alpha(at(t))[0], (-integral / 2).exp(), rtol=1e-14, atol=0)


def test_vp_linear_is_the_limit_of_the_ddpm_chain():
    # Ho et al. 2020: beta from 1e-4 to 0.02 in 1000 steps; the gap is of the order of beta_max = 0.02 in log alpha_bar
    log_alpha_bar = torch.log1p(-torch.linspace(1e-4, 0.02, 1000, dtype=F64)).cumsum(0)
    ours = 2 * VPLinear().alpha(torch.arange(1, 1001, dtype=F64) / 1000).log()
    torch.testing.assert_close(ours, log_alpha_bar, rtol=0.02, atol=1e-3)


def test_vp_cosine_equals_the_papers_formula():
    # Nichol and Dhariwal 2021, eq. 17
    def f(t):
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    t = torch.linspace(0, 0.999, 50, dtype=F64)
    torch.testing.assert_close(VPCosine().alpha(t) ** 2, f(t) / f(at(0.0)), rtol=1e-12, atol=0)  # cos near its zero


def test_vp_cosine_is_constant_beyond_its_clip():
    assert torch.equal(VPCosine().alpha(at(0.9995, 1.0)), VPCosine().alpha(at(0.999, 0.999)))
    assert VPCosine().alpha(at(1.0)) > 1e-3


def test_edm_equals_the_papers_formula():
    # Karras et al. 2022, eq. 5, i counted from the noise
    n, i = 18, torch.arange(18, dtype=F64)
    paper = (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(EDM().sigma(EDM().times(n)), paper, rtol=1e-13, atol=0)
    assert torch.equal(EDM().alpha(i), torch.ones_like(i))


def test_flow_matching_is_the_straight_line():
    t = torch.linspace(0, 1, 11, dtype=F64)
    assert torch.equal(FlowMatching().alpha(t), 1 - t)
    assert torch.equal(FlowMatching().sigma(t), t)


@every_schedule
def test_schedules_start_at_the_data(schedule):
    assert schedule.alpha(at(0.0)) == 1
    wanted = getattr(schedule, "sigma_min", 0.0)
    torch.testing.assert_close(schedule.sigma(at(0.0)), at(wanted), rtol=1e-14, atol=0)


@every_schedule
def test_schedules_meet_the_protocol_and_are_hashable(schedule):
    assert isinstance(schedule, NoiseSchedule)
    assert hash(schedule) == hash(type(schedule)(**vars(schedule)))


@every_schedule
@given(t=times, s=times)
def test_log_snr_falls(schedule, t, s):
    low, high = sorted((t, s))
    if high - low > 1e-6:
        later, earlier = log_snr(schedule, at(high)), log_snr(schedule, at(low))
        assert later < earlier or min(low, high) > getattr(schedule, "t_max", 1) - 1e-6


@every_schedule
def test_log_snr_is_the_ratio_and_finite_at_the_ends(schedule):
    t = at(0.2, 0.7)
    torch.testing.assert_close(log_snr(schedule, t), (schedule.alpha(t) / schedule.sigma(t)).log() * 2)
    ends = torch.tensor([0.0, 1.0])
    slope = torch.func.grad(lambda t: log_snr(schedule, t).sum())(ends)
    assert log_snr(schedule, ends).isfinite().all()
    assert slope.isfinite().all()


@every_schedule
def test_rates_equal_central_differences(schedule):
    t, h = torch.linspace(0.05, 0.95, 10, dtype=F64), 1e-5
    for rate, scale in zip(rates(schedule, t), (schedule.alpha, schedule.sigma), strict=True):
        # truncation h^2 f'''/6, rounding 1e-16/h: below 1e-8 for slopes of order up to 80
        torch.testing.assert_close(rate, (scale(t + h) - scale(t - h)) / (2 * h), rtol=1e-7, atol=1e-7)


@every_schedule
def test_derivatives_are_finite_at_both_ends(schedule):
    for scale in (schedule.alpha, schedule.sigma):
        for t in at(0.0, 1.0):
            first = torch.func.grad(scale)
            assert first(t).isfinite()
            assert torch.func.grad(first)(t).isfinite()


@every_schedule
@given(t=times)
def test_t_of_inverts_the_ratio(schedule, t):
    t = at(t).clamp(max=getattr(schedule, "t_max", 1.0))
    ratio = schedule.sigma(t) / schedule.alpha(t)
    torch.testing.assert_close(schedule.t_of(ratio), t, rtol=1e-9, atol=1e-11)


@every_schedule
def test_t_of_gives_the_nearer_end_out_of_reach(schedule):
    end = getattr(schedule, "t_max", 1.0)
    found = schedule.t_of(torch.tensor([0.0, 1e12, math.inf]))
    torch.testing.assert_close(found, torch.tensor([0.0, end, end]))


@every_schedule
def test_scales_keep_their_relative_accuracy_in_float32(schedule):
    t = torch.tensor([1e-6, 1e-3, 0.3, 0.99])
    for scale in (schedule.alpha, schedule.sigma):
        assert scale(t).dtype == torch.float32
        torch.testing.assert_close(scale(t).double(), scale(t.double()), rtol=1e-5, atol=0)  # t itself is rounded


@every_schedule
def test_scales_take_any_shape_and_vmap(schedule):
    t = random.uniform(random.key(0), (2, 3), F64)
    for scale in (schedule.alpha, schedule.sigma, schedule.t_of):
        torch.testing.assert_close(torch.func.vmap(torch.func.vmap(scale))(t), scale(t), rtol=1e-14, atol=1e-15)


# Grids of times.


@every_schedule
@pytest.mark.parametrize("grid", [uniform_times, angle_times, rho_times, lambda schedule, n: schedule.times(n)])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_times_fall_from_one(schedule, grid, steps):
    t = grid(schedule, steps)
    assert t.shape == (steps,)
    assert t.dtype == F64
    assert t[0] == 1
    assert t.min() >= 0
    assert bool((t.diff() < 0).all())


@every_schedule
def test_angle_times_take_equal_angles(schedule):
    t = angle_times(schedule, 10)
    angle = torch.atan2(schedule.sigma(t), schedule.alpha(t))
    first = angle[0].item()
    wanted = torch.tensor([first * (1 - i / 10) for i in range(10)], dtype=F64)
    wanted = wanted.clamp(min=math.atan(getattr(schedule, "sigma_min", 0)))
    torch.testing.assert_close(angle, wanted, rtol=1e-9, atol=0)


def test_rho_times_are_those_of_edm():
    torch.testing.assert_close(rho_times(EDM(), 12), EDM().times(12), rtol=0, atol=1e-12)


def test_rho_times_end_at_the_least_ratio():
    t = rho_times(FlowMatching(), 7, ratio_min=0.01)
    torch.testing.assert_close(t[-1] / (1 - t[-1]), at(0.01)[0], rtol=1e-12, atol=0)


# Mixing.


@every_schedule
def test_mix_equals_a_loop_over_examples(schedule):
    x, noise = torch.arange(12, dtype=F64).reshape(3, 2, 2), torch.ones(3, 2, 2, dtype=F64)
    t = at(0.1, 0.5, 1.0)
    wanted = [schedule.alpha(t[i]) * x[i] + schedule.sigma(t[i]) * noise[i] for i in range(3)]
    torch.testing.assert_close(mix(schedule, x, noise, t), torch.stack(wanted), rtol=1e-15, atol=0)


def test_expand_leaves_numbers_alone():
    assert expand(0.5, torch.ones(2, 3)) == 0.5
    assert expand(torch.ones(()), torch.ones(2, 3)).shape == ()
    assert expand(torch.ones(2), torch.ones(2)).shape == (2,)


# Bad input.


def test_mix_names_the_bad_argument():
    x = torch.zeros(3, 2)
    with pytest.raises(TypeError, match=r"mix: x: expected a floating-point tensor, got torch\.int64"):
        mix(EDM(), torch.zeros(3, 2, dtype=torch.int64), x, torch.zeros(3))
    with pytest.raises(ValueError, match=r"mix: t: expected shape \(b=3,\), got \(\)"):
        mix(EDM(), x, x, torch.zeros(()))
    with pytest.raises(ValueError, match=r"mix: noise: expected shape \(3, 2\) as x has, got \(3, 1\)"):
        mix(EDM(), x, torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VPLinear(beta_min=0.0), "VPLinear: expected beta_min > 0, got 0.0"),
        (lambda: VPLinear(2.0, 1.0), "VPLinear: expected beta_max >= beta_min=2.0, got 1.0"),
        (lambda: VPCosine(s=-1.0), "VPCosine: expected s > 0, got -1.0"),
        (lambda: VPCosine(t_max=1.5), "VPCosine: expected t_max <= 1, got 1.5"),
        (lambda: EDM(sigma_min=0.0), "EDM: expected sigma_min > 0, got 0.0"),
        (lambda: EDM(3.0, 1.0), "EDM: expected sigma_max > sigma_min=3.0, got 1.0"),
        (lambda: FlowMatching().times(0), "uniform_times: expected steps > 0, got 0"),
        (lambda: VPLinear().times(-1), "angle_times: expected steps > 0, got -1"),
        (lambda: EDM().times(0), "EDM: expected steps > 0, got 0"),
        (lambda: rho_times(EDM(), 4, rho=0.0), "rho_times: expected rho > 0, got 0.0"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
