"""Samplers on data whose denoiser is exact: order, moments, the papers' own loops, and behaviour under transforms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import random
from functorch_gen.diffusion import sample_ddim, sample_ddpm, sample_dpmpp_2m, sample_euler, sample_heun
from functorch_gen.exact import Gaussian, isotropic_mixture
from functorch_gen.noise import EDM, FlowMatching, VPCosine, VPLinear, angle_times, rho_times, uniform_times

F64 = torch.float64
KEY = random.key(0)
SCHEDULES = [VPLinear(), VPCosine(), EDM(), FlowMatching()]
SAMPLERS = [sample_ddpm, sample_ddim, sample_euler, sample_heun, sample_dpmpp_2m]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda f: f.__name__)


def normal_data(mean: float, std: float, d: int = 3) -> Gaussian:
    return Gaussian(torch.full((d,), mean, dtype=F64), torch.tensor(std, dtype=F64))


def exact(data, schedule):
    return lambda x_t, t: data.denoise(x_t, schedule.alpha(t), schedule.sigma(t))


def point(value: float):
    return lambda x_t, t: torch.full_like(x_t, value)


# Order (ORACLES): the probability flow of N(m, s^2) is known in closed form.

ORDERS = {sample_euler: (1, 0.1), sample_ddim: (1, 0.1), sample_heun: (2, 0.2), sample_dpmpp_2m: (2, 0.2)}
STEPS = (10, 20, 40, 80, 160)


def measured_order(sampler, schedule, mean: float, std: float) -> float:
    data = normal_data(mean, std)
    start = torch.ones((), dtype=F64)
    scales = schedule.alpha(start), schedule.sigma(start)
    x_t = scales[1] * random.normal(KEY, (2, 3), F64)
    wanted = data.flow(x_t, scales, (1.0, 0.0))
    errors = [
        (sampler(KEY, exact(data, schedule), (2, 3), schedule=schedule, steps=n, x_t=x_t, dtype=F64) - wanted).norm()
        for n in STEPS
    ]
    return -np.polyfit(np.log(STEPS), np.log([error.item() for error in errors]), 1)[0]


@every_schedule
@pytest.mark.parametrize("sampler", [sample_euler, sample_heun, sample_dpmpp_2m], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.7, 1.0)])
def test_samplers_have_their_order(sampler, schedule, mean, std):
    order, tolerance = ORDERS[sampler]
    assert abs(measured_order(sampler, schedule, mean, std) - order) < tolerance


@pytest.mark.slow
@every_schedule
@pytest.mark.parametrize("sampler", ORDERS, ids=lambda f: f.__name__)
def test_samplers_have_their_order_for_narrow_and_wide_data(sampler, schedule):
    order, tolerance = ORDERS[sampler]
    for mean, std in itertools.product((0.0, -1.5), (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)):
        assert abs(measured_order(sampler, schedule, mean, std) - order) < tolerance, (mean, std)


@every_sampler
@every_schedule
@pytest.mark.parametrize("steps", [1, 3])
def test_samplers_are_exact_on_a_point(sampler, schedule, steps):
    x = sampler(KEY, point(3.0), (2, 2), schedule=schedule, steps=steps)
    assert torch.equal(x, torch.full((2, 2), 3.0))


@every_sampler
@every_schedule
def test_one_step_is_the_denoised_estimate(sampler, schedule):
    t = torch.ones(2, dtype=F64)
    x_t = schedule.sigma(t)[:, None] * random.normal(KEY, (2, 3), F64)
    denoise = exact(normal_data(0.3, 0.5), schedule)
    x = sampler(KEY, denoise, (2, 3), schedule=schedule, steps=1, x_t=x_t, dtype=F64)
    torch.testing.assert_close(x, denoise(x_t, t), rtol=1e-14, atol=0)


# The papers' own loops.


def curved(x_t, t):
    """A denoiser with nothing special about it."""
    return torch.sin(x_t) * (0.5 + t[:, None])


def scales(schedule, times):
    clean = torch.tensor([1.0, 0.0], dtype=F64)
    return torch.cat([schedule.alpha(times), clean[:1]]), torch.cat([schedule.sigma(times), clean[1:]])


@every_schedule
def test_ddim_without_noise_is_euler(schedule):
    options = {"schedule": schedule, "steps": 6, "dtype": F64}
    euler = sample_euler(KEY, curved, (2, 3), **options)
    torch.testing.assert_close(sample_ddim(KEY, curved, (2, 3), **options), euler, rtol=0, atol=0)


def test_ddim_equals_the_papers_update():
    # Song, Meng and Ermon 2021, eq. 12 with sigma = 0, in alpha_bar and predicted noise
    schedule, times = VPLinear(), uniform_times(VPLinear(), 8)
    alpha, _ = scales(schedule, times)
    x = start = random.normal(KEY, (2, 3), F64)
    for i in range(8):
        bar, bar_next = alpha[i] ** 2, alpha[i + 1] ** 2
        noise = (x - bar.sqrt() * curved(x, times[i].expand(2))) / (1 - bar).sqrt()
        x = bar_next.sqrt() * (x - (1 - bar).sqrt() * noise) / bar.sqrt() + (1 - bar_next).sqrt() * noise
    found = sample_ddim(KEY, curved, (2, 3), schedule=schedule, steps=8, times=times, x_t=start, dtype=F64)
    torch.testing.assert_close(found, x, rtol=1e-9, atol=1e-9)  # 1 - alpha_bar cancels near the data


def test_heun_equals_algorithm_1_of_edm():
    n, times = 9, EDM().times(9)
    sigma = torch.cat([EDM().sigma(times), torch.zeros(1, dtype=F64)])
    x = start = 80 * random.normal(KEY, (2, 3), F64)
    for i in range(n):
        d = (x - curved(x, times[i].expand(2))) / sigma[i]
        x_next = x + (sigma[i + 1] - sigma[i]) * d
        if i < n - 1:
            d_next = (x_next - curved(x_next, times[i + 1].expand(2))) / sigma[i + 1]
            x_next = x + (sigma[i + 1] - sigma[i]) * 0.5 * (d + d_next)
        x = x_next
    found = sample_heun(KEY, curved, (2, 3), schedule=EDM(), steps=n, x_t=start, dtype=F64)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)


def test_heun_on_the_straight_path_is_heun_in_t():
    n = 9

    def velocity(x, t):  # noise - data
        x_hat = curved(x, t.expand(2))
        return (x - (1 - t) * x_hat) / t - x_hat

    x = start = random.normal(KEY, (2, 3), F64)
    times = torch.tensor([1 - i / n for i in range(n)] + [0], dtype=F64)
    for t, t_next in itertools.pairwise(times):
        v = velocity(x, t)
        trial = x + (t_next - t) * v
        x = trial if t_next == 0 else x + (t_next - t) * 0.5 * (v + velocity(trial, t_next))
    found = sample_heun(KEY, curved, (2, 3), schedule=FlowMatching(), steps=n, x_t=start, dtype=F64)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)


def test_dpmpp_2m_equals_algorithm_2():
    # Lu et al. 2022 (DPM-Solver++), algorithm 2, and the first-order step to the data
    schedule, n = VPCosine(), 7
    times = angle_times(schedule, n)
    alpha, sigma = scales(schedule, times)
    lam = (alpha / sigma).log()
    x = start = random.normal(KEY, (2, 3), F64)
    estimates = []
    for i in range(n):
        estimates.append(curved(x, times[i].expand(2)))
        h, d = lam[i + 1] - lam[i], estimates[i]
        if 0 < i < n - 1:
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * estimates[i] - 1 / (2 * r) * estimates[i - 1]
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * d
    found = sample_dpmpp_2m(KEY, curved, (2, 3), schedule=schedule, steps=n, times=times, x_t=start, dtype=F64)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)


# Samplers that draw.


def test_ddpm_is_ddim_with_all_noise_anew():
    options = {"schedule": VPLinear(), "steps": 6, "dtype": F64}
    found = sample_ddpm(KEY, curved, (2, 3), **options)
    torch.testing.assert_close(found, sample_ddim(KEY, curved, (2, 3), eta=1.0, **options), rtol=0, atol=0)


def ddpm_recursion(schedule, times, s: float) -> float:
    """Variance of the samples for N(0, s^2): each step is linear and adds that of eq. 7 in Ho et al. 2020."""
    alpha, sigma = scales(schedule, times)
    variance = sigma[0] ** 2
    for i in range(len(times)):
        gain = alpha[i] * s**2 / (alpha[i] ** 2 * s**2 + sigma[i] ** 2)  # D = gain x_t
        hop = alpha[i] / alpha[i + 1]
        beta = sigma[i] ** 2 - hop**2 * sigma[i + 1] ** 2  # variance of x_t given x of the next time
        slope = hop * sigma[i + 1] ** 2 / sigma[i] ** 2 + alpha[i + 1] * beta / sigma[i] ** 2 * gain
        variance = slope**2 * variance + beta * sigma[i + 1] ** 2 / sigma[i] ** 2
    return variance.item()


@every_schedule
def test_ddpm_has_the_variance_of_the_recursion(schedule):
    s, n = 0.5, 6
    wanted = ddpm_recursion(schedule, schedule.times(n), s)
    x = sample_ddpm(KEY, exact(normal_data(0.0, s), schedule), (10_000, 3), schedule=schedule, steps=n, dtype=F64)
    assert abs(x.var().item() - wanted) < 4 * wanted * math.sqrt(2 / x.numel())  # 4 standard errors


def test_ddpm_reaches_the_variance_of_the_data():
    # the recursion itself goes to s^2 as the steps go to infinity
    gap = [abs(ddpm_recursion(VPLinear(), angle_times(VPLinear(), n), 0.5) - 0.25) for n in (100, 200, 400)]
    assert gap[1] < 0.6 * gap[0]
    assert gap[2] < 0.6 * gap[1]


def test_ddim_with_eta_has_the_variance_of_the_recursion():
    # for N(0, s^2) each step is linear: x' = (alpha' gain + sqrt(sigma'^2 - w^2) (1 - alpha gain) / sigma) x + w z
    s, n, eta, schedule = 0.5, 6, 0.6, FlowMatching()
    times = schedule.times(n)
    alpha, sigma = scales(schedule, times)
    variance = sigma[0] ** 2
    for i in range(n):
        gain = alpha[i] * s**2 / (alpha[i] ** 2 * s**2 + sigma[i] ** 2)
        beta = sigma[i] ** 2 - (alpha[i] / alpha[i + 1] * sigma[i + 1]) ** 2
        w = eta * (sigma[i + 1] / sigma[i]) * beta.sqrt()  # eq. 16
        slope = alpha[i + 1] * gain + (sigma[i + 1] ** 2 - w**2).sqrt() * (1 - alpha[i] * gain) / sigma[i]
        variance = slope**2 * variance + w**2
    denoise = exact(normal_data(0.0, s), schedule)
    x = sample_ddim(KEY, denoise, (10_000, 3), schedule=schedule, steps=n, eta=eta, dtype=F64)
    assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / x.numel())


@every_sampler
def test_samplers_find_the_modes_by_weight(sampler):
    schedule, n = FlowMatching(), 2000
    means = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [2.0, -2.0]])
    data = isotropic_mixture(torch.tensor([1.0, 2.0, 5.0]), means, torch.full((3,), 0.2))
    x = sampler(KEY, exact(data, schedule), (n, 2), schedule=schedule, steps=40)
    part = torch.nn.functional.one_hot(torch.cdist(x, means).argmin(1), 3).double().mean(0)
    # 4 standard errors and the discretisation, for which the measured gap at 100,000 samples is below 0.01
    assert bool(((part - data.weights).abs() < 4 * (data.weights * (1 - data.weights) / n).sqrt() + 0.01).all())


# Behaviour.


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [(sample_ddpm, 7), (sample_ddim, 7), (sample_euler, 7), (sample_heun, 13), (sample_dpmpp_2m, 7)],
)
def test_samplers_evaluate_as_often_as_they_say(sampler, calls):
    seen = []

    def denoise(x_t, t):
        seen.append(t)
        assert t.shape == (2,)
        return x_t / 2

    sampler(KEY, denoise, (2, 3), schedule=VPLinear(), steps=7)
    assert len(seen) == calls


@every_sampler
def test_path_holds_what_the_sampler_went_through(sampler):
    options = {"schedule": FlowMatching(), "steps": 4, "dtype": F64}
    x, path = sampler(KEY, curved, (2, 3), return_path=True, **options)
    assert path.x_t.shape == path.x_hat.shape == (4, 2, 3)
    assert torch.equal(x, path.x_hat[-1])
    assert torch.equal(x, sampler(KEY, curved, (2, 3), **options))
    for t, x_t, x_hat in zip(*path, strict=True):
        assert torch.equal(curved(x_t, t.expand(2)), x_hat)


@every_sampler
def test_samplers_are_functions_of_the_key(sampler):
    def draw(key):
        return sampler(key, curved, (2, 3), schedule=EDM(), steps=4)

    assert torch.equal(draw(KEY), draw(KEY))
    assert (draw(KEY) - draw(random.key(1))).abs().min() > 1e-6


@every_sampler
def test_samplers_vmap_over_keys(sampler):
    def draw(key):
        return sampler(key, curved, (2, 3), schedule=VPCosine(), steps=4, dtype=F64)

    keys = random.split(KEY, 3)
    wanted = torch.stack([draw(key) for key in keys])
    torch.testing.assert_close(torch.func.vmap(draw)(keys), wanted, rtol=1e-12, atol=1e-12)


@every_schedule
@every_sampler
def test_samplers_differentiate(sampler, schedule):
    def total(scale):
        denoise = lambda x_t, t: torch.tanh(scale * x_t)
        return sampler(KEY, denoise, (2, 3), schedule=schedule, steps=4, dtype=F64).sum()

    scale, h = torch.tensor(0.3, dtype=F64), 1e-5
    difference = (total(scale + h) - total(scale - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(total)(scale), difference, rtol=1e-6, atol=1e-7)


@every_sampler
def test_samplers_trace_to_one_graph(sampler):
    def draw(key, scale):
        denoise = lambda x_t, t: torch.tanh(scale * x_t)
        return sampler(key, denoise, (2, 3), schedule=FlowMatching(), steps=3)

    graph = make_fx(draw, tracing_mode="fake", _allow_non_fake_inputs=True)(KEY, torch.ones(()))
    other = random.key(4), torch.tensor(0.3)
    torch.testing.assert_close(graph(*other), draw(*other))


@every_sampler
def test_samplers_trace_under_dynamo(sampler):
    def draw(key, scale):
        denoise = lambda x_t, t: torch.tanh(scale * x_t)
        return sampler(key, denoise, (2, 3), schedule=VPLinear(), steps=3)

    compiled = torch.compile(draw, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(KEY, torch.ones(())), draw(KEY, torch.ones(())))


@every_sampler
@every_schedule
def test_float32_is_close_to_float64(sampler, schedule):
    denoise = exact(normal_data(0.5, 0.5), schedule)
    start = schedule.sigma(torch.ones(())) * random.normal(KEY, (2, 3))
    options = {"schedule": schedule, "steps": 20, "x_t": start}
    double = sampler(KEY, denoise, (2, 3), dtype=F64, **options)
    single = sampler(KEY, lambda x_t, t: denoise(x_t, t).float(), (2, 3), **options)
    assert single.dtype == torch.float32
    if sampler is not sample_ddpm:  # which draws other numbers in another dtype
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_times_may_be_a_tensor_or_a_function():
    def draw(times):
        return sample_heun(KEY, curved, (2, 3), schedule=VPLinear(), steps=5, times=times, dtype=F64)

    assert torch.equal(draw(angle_times), draw(None))
    assert torch.equal(draw(rho_times), draw(rho_times(VPLinear(), 5)))
    assert not torch.equal(draw(uniform_times), draw(None))


def test_sampling_from_the_middle_keeps_the_flow():
    schedule, data = FlowMatching(), normal_data(0.3, 0.5)
    x_t = random.normal(KEY, (2, 3), F64)
    times = torch.linspace(0.6, 0, 401, dtype=F64)[:-1]
    found = sample_heun(
        KEY, exact(data, schedule), (2, 3), schedule=schedule, steps=400, times=times, x_t=x_t, dtype=F64
    )
    # second order: 1e-5 at 400 steps
    torch.testing.assert_close(found, data.flow(x_t, (0.4, 0.6), (1.0, 0.0)), rtol=2e-5, atol=2e-5)


# Bad input.


@every_sampler
def test_samplers_name_the_bad_argument(sampler):
    name = sampler.__name__

    def draw(shape=(2, 3), denoise=curved, **options):
        return sampler(KEY, denoise, shape, **{"schedule": VPLinear(), "steps": 4, **options})

    for steps in (0, -3):
        with pytest.raises(ValueError, match=f"{name}: expected steps > 0, got {steps}"):
            draw(steps=steps)
    with pytest.raises(TypeError, match=f"{name}: expected steps to be an integer, got float"):
        draw(steps=2.5)
    with pytest.raises(TypeError, match=f"{name}: dtype: expected a floating-point dtype, got torch.int64"):
        draw(dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"{name}: shape: expected \(b, \.\.\.\), got \(\)"):
        draw(shape=())
    with pytest.raises(ValueError, match=rf"{name}: x_t: expected shape \(2, 3\), got \(2, 4\)"):
        draw(x_t=torch.ones(2, 4))
    with pytest.raises(TypeError, match=f"{name}: x_t: expected a floating-point tensor, got torch.int64"):
        draw(x_t=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{name}: times: expected shape \(steps=4,\), got \(5,\)"):
        draw(times=torch.linspace(1, 0.1, 5))
    with pytest.raises(ValueError, match=r"denoise: expected an estimate of shape \(2, 3\), got \(2,\)"):
        draw(denoise=lambda x_t, t: t)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_ddim_refuses_eta_out_of_range(eta):
    with pytest.raises(ValueError, match=rf"sample_ddim: expected eta in \[0, 1\], got {eta}"):
        sample_ddim(KEY, curved, (2, 3), schedule=VPLinear(), steps=4, eta=eta)
