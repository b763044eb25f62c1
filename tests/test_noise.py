"""Noise schedules against the formulas of their papers, quadrature and finite differences."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from functorch_gen import grad, jit, random, vmap
from functorch_gen.noise import (
    EDM,
    FlowMatching,
    NoiseSchedule,
    Shifted,
    SubVP,
    VPCosine,
    VPLinear,
    VPSigmoid,
    ZeroTerminalSNR,
    angle_times,
    expand,
    log_snr,
    mix,
    rates,
    rho_times,
    uniform_times,
)

F64 = torch.float64
VARIANCE_PRESERVING = [
    VPLinear(),
    VPLinear(0.5, 8.0),
    VPLinear(3.0, 3.0),
    VPCosine(),
    VPCosine(s=0.1, t_max=1.0),
    VPSigmoid(),
    VPSigmoid(0.0, 3.0, 0.7),
    ZeroTerminalSNR(VPLinear()),
    ZeroTerminalSNR(VPCosine()),
    Shifted(VPCosine(), 4.0),
    Shifted(ZeroTerminalSNR(VPLinear(0.5, 8.0)), 0.5),
]
OTHERS = [SubVP(), SubVP(0.5, 8.0), EDM(), EDM(0.01, 50.0, 3.0), FlowMatching(), Shifted(FlowMatching(), 3.0)]
SCHEDULES = [*VARIANCE_PRESERVING, *OTHERS]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
times = st.floats(0, 1, width=32)


def at(*t: float) -> torch.Tensor:
    return torch.tensor(t, dtype=F64)


def last(schedule) -> float:
    """The time beyond which it is constant."""
    return last(schedule.schedule) if hasattr(schedule, "schedule") else getattr(schedule, "t_max", 1.0)


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


def test_sub_vp_has_the_variance_of_its_stochastic_equation():
    # Song et al. 2021, eq. 12: dx = -beta x / 2 dt + sqrt(beta (1 - exp(-2 B))) dw; d var / dt = -beta var + the rest
    t = torch.linspace(0.1, 0.9, 9, dtype=F64)
    variance = lambda t: SubVP().sigma(t) ** 2
    slope = torch.func.jvp(variance, (t,), (torch.ones_like(t),))[1]
    beta, integral = 0.1 + 19.9 * t, 0.1 * t + 9.95 * t**2
    torch.testing.assert_close(slope, -beta * variance(t) + beta * (1 - (-2 * integral).exp()), rtol=1e-12, atol=1e-14)
    assert torch.equal(SubVP().alpha(t), VPLinear().alpha(t))


def test_sub_vp_has_less_noise_than_vp():
    t = torch.linspace(0.01, 1, 50, dtype=F64)
    torch.testing.assert_close(SubVP().sigma(t), VPLinear().sigma(t) ** 2, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("start", "end", "tau"), [(-3.0, 3.0, 1.0), (0.0, 3.0, 0.3), (-3.0, 3.0, 0.5)])
def test_vp_sigmoid_equals_the_papers_code(start, end, tau):
    # Chen 2023, algorithm 1, without its clip at 1e-9
    t = torch.linspace(0, 1, 21, dtype=F64)
    v_start, v_end = (torch.sigmoid(at(u / tau)) for u in (start, end))
    gamma = (v_end - torch.sigmoid((t * (end - start) + start) / tau)) / (v_end - v_start)
    schedule = VPSigmoid(start, end, tau)
    torch.testing.assert_close(schedule.alpha(t) ** 2, gamma, rtol=0, atol=1e-14)
    torch.testing.assert_close(schedule.sigma(t) ** 2, 1 - gamma, rtol=0, atol=1e-14)


def test_zero_terminal_snr_equals_the_papers_algorithm():
    # Lin et al. 2024, algorithm 1, on the square roots of alpha_bar of a chain
    t = torch.arange(0, 1001, dtype=F64) / 1000
    root = VPLinear().alpha(t)
    paper = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    torch.testing.assert_close(ZeroTerminalSNR(VPLinear()).alpha(t), paper, rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("inner", [VPLinear(), VPCosine(), VPCosine(t_max=1.0), VPSigmoid(), Shifted(VPLinear(), 4.0)])
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_zero_terminal_snr_ends_without_signal(inner, dtype):
    schedule = ZeroTerminalSNR(inner)
    for t in (torch.ones((), dtype=dtype), torch.linspace(0, 1, 37, dtype=dtype)):  # one number, and a vector's lane
        assert schedule.alpha(t).reshape(-1)[-1] == 0
        torch.testing.assert_close(schedule.sigma(t).reshape(-1)[-1:], torch.ones(1, dtype=dtype))
        compiled = jit(schedule.alpha, backend="aten")(t)
        assert compiled.reshape(-1)[-1] == 0
    assert rates(schedule, torch.linspace(0, 1, 5, dtype=dtype))[0].isfinite().all()


def test_zero_terminal_snr_keeps_the_slope_at_the_end():
    slope, _ = rates(ZeroTerminalSNR(VPLinear()), at(1.0))
    end = VPLinear().alpha(at(1.0))  # alpha' = -beta(1) alpha / 2, stretched
    torch.testing.assert_close(slope, -10 * end / (1 - end), rtol=1e-12, atol=0)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VPSigmoid(), FlowMatching()], ids=str)
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_shifted_shifts_the_log_snr(schedule, factor):
    # Hoogeboom et al. 2023, section 3.1: the log-SNR of resolution d is that of 64 + 2 log(64 / d), factor = d / 64
    t = torch.linspace(0.01, 0.99, 11, dtype=F64)
    shifted = log_snr(Shifted(schedule, factor), t)
    torch.testing.assert_close(shifted, log_snr(schedule, t) - 2 * math.log(factor), rtol=1e-12, atol=1e-12)


def test_shifted_flow_matching_is_the_time_shift_of_stable_diffusion_3():
    # Esser et al. 2024, eq. 23: t_m = f t_n / (1 + (f - 1) t_n), f = sqrt(m / n)
    t = torch.linspace(0, 1, 11, dtype=F64)
    moved = 3 * t / (1 + 2 * t)
    for schedule in (Shifted(FlowMatching(), 3.0), Shifted(Shifted(FlowMatching(), 2.0), 1.5)):
        torch.testing.assert_close(schedule.sigma(t), FlowMatching().sigma(moved), rtol=1e-14, atol=0)
        torch.testing.assert_close(schedule.alpha(t), FlowMatching().alpha(moved), rtol=1e-13, atol=1e-16)


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
        assert later < earlier or low > last(schedule) - 1e-6


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
@pytest.mark.parametrize("shape", [(4,), (3, 2)], ids=str)
def test_rates_take_an_expanded_time(schedule, shape):
    # a tangent cannot be written in the layout of a tensor whose elements share memory
    t = torch.tensor(0.3, dtype=F64)
    expected = [rate.expand(shape) for rate in rates(schedule, t)]
    torch.testing.assert_close(list(rates(schedule, t.expand(shape))), expected)
    torch.testing.assert_close(list(jit(lambda t: rates(schedule, t.expand(shape)), backend="aten")(t)), expected)
    total = lambda t: sum(rate.sum() for rate in rates(schedule, t.expand(shape)))
    h, n = 1e-5, math.prod(shape)
    difference = sum(n * (a - b) / (2 * h) for a, b in zip(rates(schedule, t + h), rates(schedule, t - h), strict=True))
    torch.testing.assert_close(vmap(grad(total))(t.expand(2)), difference.expand(2), rtol=1e-6, atol=1e-6)


@every_schedule
def test_derivatives_are_finite_at_both_ends(schedule):
    for scale in (schedule.alpha, schedule.sigma):
        for t in at(0.0, 1.0):
            first = torch.func.grad(scale)
            assert first(t).isfinite()
            assert torch.func.grad(first)(t).isfinite()


@every_schedule
def test_rates_of_one_time_keep_its_dtype(schedule):
    # forward mode of torch alone gives float64: a 0-d float32 tensor times a Python number
    t = torch.tensor(0.4)
    assert all(rate.dtype == torch.float32 for rate in rates(schedule, t))
    assert all(rate.dtype == torch.float32 for rate in vmap(lambda t: rates(schedule, t))(t.expand(3)))


@every_schedule
@pytest.mark.parametrize("ratio", [0.0, 1.0, math.inf])
def test_t_of_has_a_finite_derivative(schedule, ratio):
    assert torch.func.grad(schedule.t_of)(torch.tensor(ratio)).isfinite()


@every_schedule
@given(t=times)
def test_t_of_inverts_the_ratio(schedule, t):
    t = at(t).clamp(max=last(schedule))
    ratio = schedule.sigma(t) / schedule.alpha(t)
    torch.testing.assert_close(schedule.t_of(ratio), t, rtol=1e-9, atol=1e-11)


@every_schedule
def test_t_of_gives_the_nearer_end_out_of_reach(schedule):
    end = last(schedule)
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
        (lambda: SubVP(beta_min=0.0), "SubVP: expected beta_min > 0, got 0.0"),
        (lambda: VPSigmoid(tau=0.0), "VPSigmoid: expected tau > 0, got 0.0"),
        (lambda: VPSigmoid(3.0, -3.0), "VPSigmoid: expected end > start=3.0, got -3.0"),
        (lambda: Shifted(VPLinear(), 0.0), "Shifted: expected factor > 0, got 0.0"),
        (lambda: Shifted(EDM(), 2.0), r"Shifted: expected a schedule with alpha\^2 \+ sigma\^2 = 1, got EDM\("),
        (
            lambda: ZeroTerminalSNR(FlowMatching()),
            r"ZeroTerminalSNR: expected a schedule with .* = 1, got FlowMatching",
        ),
        (lambda: ZeroTerminalSNR(Shifted(FlowMatching(), 2.0)), r"ZeroTerminalSNR: expected .*, got Shifted\("),
        (lambda: EDM(sigma_min=0.0), "EDM: expected sigma_min > 0, got 0.0"),
        (lambda: EDM(3.0, 1.0), "EDM: expected sigma_max > sigma_min=3.0, got 1.0"),
        (lambda: FlowMatching().times(0), "uniform_times: expected steps > 0, got 0"),
        (lambda: VPLinear().times(-1), "angle_times: expected steps > 0, got -1"),
        (lambda: EDM().times(0), "EDM: expected steps > 0, got 0"),
        (lambda: rho_times(EDM(), 4, rho=0.0), "rho_times: expected rho > 0, got 0.0"),
        (
            lambda: rho_times(EDM(), 4, ratio_min=2.0, ratio_max=1.0),
            "rho_times: expected ratio_max >= ratio_min=2.0, got 1.0",
        ),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
