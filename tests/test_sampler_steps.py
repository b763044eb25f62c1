"""Samplers step by step: the papers' own loops, and for those that draw, the variance by recursion."""

import itertools
import math
from functools import partial

import pytest
import torch
from sampler_cases import F64, KEY, SAMPLERS, curved, every_schedule, exact, normal_data, scales

from functorch_gen import random
from functorch_gen.diffusion import (
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s,
    sample_dpmpp_3m,
    sample_edm,
    sample_euler,
    sample_heun,
    sample_predictor_corrector,
    sample_unipc,
)
from functorch_gen.noise import EDM, FlowMatching, VPCosine, VPLinear, angle_times, rho_times, uniform_times

# The papers' own loops.


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


def multistep_3m(schedule, start, times, curvature):
    """LuChengTHU/dpm-solver, multistep_dpm_solver_third_update, after one step of each order."""
    alpha, sigma = scales(schedule, times)
    lam, x, m = (alpha / sigma).log(), start, []
    for i in range(len(times) - 1):
        m.append(curved(x, times[i].expand(2)))
        h = lam[i + 1] - lam[i]
        phi1 = torch.expm1(-h)
        slope = bend = torch.zeros_like(x)
        if i == 1:
            slope = (m[1] - m[0]) * h / (lam[1] - lam[0])
        if i > 1:
            r0, r1 = (lam[i] - lam[i - 1]) / h, (lam[i - 1] - lam[i - 2]) / h
            d0, d1 = (m[i] - m[i - 1]) / r0, (m[i - 1] - m[i - 2]) / r1
            slope, bend = d0 + r0 / (r0 + r1) * (d0 - d1), curvature * (d0 - d1) / (r0 + r1)
        phi2 = -0.5 * phi1 if i == 1 else phi1 / h + 1
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * (phi1 * m[i] - phi2 * slope + (phi2 / h - 0.5) * bend)
    return x


def test_dpmpp_3m_equals_the_authors_code_but_for_the_curvature():
    # the quadratic D(u) = D + slope (u / h) + bend (u / h)^2 has second derivative 2 bend / h^2; theirs has bend / h^2
    schedule, n = VPCosine(), 7
    times, start = rho_times(schedule, n), random.normal(KEY, (2, 3), F64)
    _, path = sample_dpmpp_3m(KEY, curved, (2, 3), schedule=schedule, steps=n, x_t=start, dtype=F64, return_path=True)
    torch.testing.assert_close(path.x_t[-1], multistep_3m(schedule, start, times, 2), rtol=1e-10, atol=1e-10)
    assert (path.x_t[-1] - multistep_3m(schedule, start, times, 1)).abs().max() > 1e-3


def test_dpmpp_2s_equals_algorithm_1():
    # Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2
    schedule, n = FlowMatching(), 6
    times = torch.linspace(0.95, 0.05, n, dtype=F64)
    alpha, sigma = scales(schedule, times)
    lam, x = (alpha / sigma).log(), random.normal(KEY, (2, 3), F64)
    start = x
    for i in range(n - 1):
        h, t = lam[i + 1] - lam[i], times[i].expand(2)
        middle = schedule.t_of((-lam[i] - h / 2).exp())
        a, s = schedule.alpha(middle), schedule.sigma(middle)
        u = s / sigma[i] * x - a * torch.expm1(-h / 2) * curved(x, t)
        d = curved(x, t) + (curved(u, middle.expand(2)) - curved(x, t))  # 1 / (2 r) = 1
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * d
    x = curved(x, times[-1].expand(2))
    found = sample_dpmpp_2s(KEY, curved, (2, 3), schedule=schedule, steps=n, times=times, x_t=start, dtype=F64)
    torch.testing.assert_close(found, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_equals_its_algorithm(order):
    # Zhao et al. 2023, algorithms 5 to 8 with B(h) = e^h - 1, as in wl-zhao/UniPC, multistep_uni_pc_bh_update
    schedule, n = VPLinear(), 8
    times = rho_times(schedule, n)
    alpha, sigma = scales(schedule, times)
    lam, x = (alpha / sigma).log(), random.normal(KEY, (2, 3), F64)
    start, m = x, [curved(x, times[0].expand(2))]
    for i in range(n - 1):
        h, p = lam[i + 1] - lam[i], min(order, i + 1)
        r = torch.tensor([(lam[i - k] - lam[i]) / h for k in range(1, p)] + [1.0], dtype=F64)
        hh, b_h = -h, torch.expm1(-h)
        phi, wanted = b_h / hh - 1, []
        for k in range(1, p + 1):
            wanted.append(phi * math.factorial(k) / b_h)
            phi = phi / hh - 1 / math.factorial(k + 1)
        powers, wanted = torch.stack([r**k for k in range(p)]), torch.stack(wanted)
        ahead = torch.linalg.solve(powers[:-1, :-1], wanted[:-1]) if p > 2 else torch.full((p - 1,), 0.5, dtype=F64)
        behind = torch.linalg.solve(powers, wanted) if p > 1 else torch.full((1,), 0.5, dtype=F64)
        change = [(m[i - k] - m[i]) / r[k - 1] for k in range(1, p)]
        base = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * b_h * m[i]
        trial = base - alpha[i + 1] * b_h * sum([w * d for w, d in zip(ahead, change, strict=True)], torch.zeros(()))
        m.append(curved(trial, times[i + 1].expand(2)))
        change.append(m[i + 1] - m[i])
        x = base - alpha[i + 1] * b_h * sum([w * d for w, d in zip(behind, change, strict=True)], torch.zeros(()))
    options = {"schedule": schedule, "steps": n, "x_t": start, "dtype": F64, "order": order}
    torch.testing.assert_close(sample_unipc(KEY, curved, (2, 3), **options), m[-1], rtol=1e-9, atol=1e-9)


def test_sde_2m_without_noise_is_2m():
    options = {"schedule": VPCosine(), "steps": 6, "dtype": F64}
    found = sample_dpmpp_2m_sde(KEY, curved, (2, 3), eta=0.0, **options)
    torch.testing.assert_close(found, sample_dpmpp_2m(KEY, curved, (2, 3), **options), rtol=0, atol=0)


@every_schedule
def test_edm_without_churn_is_heun(schedule):
    options = {"schedule": schedule, "steps": 6, "dtype": F64}
    found = sample_edm(KEY, curved, (2, 3), churn=0.0, **options)
    torch.testing.assert_close(found, sample_heun(KEY, curved, (2, 3), **options), rtol=0, atol=0)


def test_repeated_times_are_harmless():
    # t_max of the cosine schedule and two equal times: steps of no length
    times = torch.tensor([1.0, 0.9995, 0.7, 0.7, 0.7, 0.4, 0.2], dtype=F64)
    once = torch.tensor([1.0, 0.7, 0.4, 0.2], dtype=F64)
    for sampler in (sample_euler, sample_heun, sample_dpmpp_2s):
        draw = partial(sampler, KEY, curved_in_x, (2, 3), schedule=VPCosine(), x_t=torch.ones(2, 3), dtype=F64)
        torch.testing.assert_close(draw(steps=7, times=times), draw(steps=4, times=once), rtol=1e-12, atol=1e-12)
    for sampler in SAMPLERS:
        assert sampler(KEY, curved, (2, 3), schedule=VPCosine(), steps=7, times=times).isfinite().all()


@pytest.mark.parametrize("schedule", [VPLinear(), FlowMatching()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("times", [[1.0, 1.0, 0.6, 0.3], [1.0, 0.6, 0.0, 0.0]], ids=str)
def test_times_repeated_at_an_end_are_harmless(schedule, times):
    # where alpha or sigma is 0, what a step keeps of the noise is 0 / 0
    for sampler in SAMPLERS:
        options = {"schedule": schedule, "steps": 4, "times": torch.tensor(times, dtype=F64)}
        assert sampler(KEY, curved, (2, 3), **options).isfinite().all()


def curved_in_x(x_t, t):
    return torch.sin(x_t)


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


def gains(schedule, times, s: float):
    """D = gain x_t for N(0, s^2), at each time."""
    alpha, sigma = scales(schedule, times)
    return alpha * s**2 / (alpha**2 * s**2 + sigma**2)


def check_variance(x, wanted):
    assert abs(x.var() - wanted) < 4 * wanted * math.sqrt(2 / x.numel())  # 4 standard errors


@every_schedule
def test_sde_2m_has_the_variance_of_the_recursion(schedule):
    # Lu et al. 2022: x' = (sigma' / sigma) e^-h x + alpha' (1 - e^-2h) (D + (h / 2 h_before) (D - D_before)) + w z
    s, n = 0.5, 6
    times = rho_times(schedule, n)
    (alpha, sigma), gain = scales(schedule, times), gains(schedule, times, s)
    lam = alpha.clamp(min=1e-300).log() - sigma.log()
    cov = torch.zeros(2, 2, dtype=F64)  # of x here and one step before
    cov[0, 0] = sigma[0] ** 2
    for i in range(n - 1):
        h = lam[i + 1] - lam[i]
        ratio = 0 if i == 0 else h / (2 * (lam[i] - lam[i - 1]))
        pull = -alpha[i + 1] * torch.expm1(-2 * h)
        a = sigma[i + 1] / sigma[i] * (-h).exp() + pull * (1 + ratio) * gain[i]
        b = -pull * ratio * (0 if i == 0 else gain[i - 1])
        step = torch.tensor([[a, b], [1, 0]], dtype=F64)
        cov = step @ cov @ step.T
        cov[0, 0] += -(sigma[i + 1] ** 2) * torch.expm1(-2 * h)
    x = sample_dpmpp_2m_sde(
        KEY, exact(normal_data(0.0, s), schedule), (10_000, 3), schedule=schedule, steps=n, dtype=F64
    )
    check_variance(x, gain[n - 1] ** 2 * cov[0, 0])


@pytest.mark.parametrize("schedule", [EDM(sigma_max=10.0), VPLinear(), FlowMatching()], ids=lambda s: type(s).__name__)
def test_edm_has_the_variance_of_the_recursion(schedule):
    # Karras et al. 2022, algorithm 2, on x / alpha; Heun's step is linear in x
    s, n, churn, low, high, scale = 0.5, 6, 1.2, 0.05, 5.0, 1.1
    times = schedule.times(n)
    alpha, sigma = scales(schedule, times)
    variance = sigma[0] ** 2
    for i in range(n):
        gamma = churn / n if low <= sigma[i] / alpha[i] <= high else 0.0
        t = schedule.t_of((1 + gamma) * sigma[i] / alpha[i]) if gamma else times[i]
        a, b = schedule.alpha(t), schedule.sigma(t)
        if gamma:
            ratio = sigma[i] / alpha[i]
            variance = a**2 * (variance / alpha[i] ** 2 + scale**2 * (((1 + gamma) * ratio) ** 2 - ratio**2))
        gain, next_gain = (p * s**2 / (p**2 * s**2 + q**2) for p, q in ((a, b), (alpha[i + 1], sigma[i + 1])))
        noise = (1 - a * gain) / b
        if i == n - 1:
            variance = gain**2 * variance
            break
        trial = alpha[i + 1] * gain + sigma[i + 1] * noise
        next_noise = (1 - alpha[i + 1] * next_gain) / sigma[i + 1]
        mean_data, mean_noise = (gain + next_gain * trial) / 2, (noise + next_noise * trial) / 2
        variance = (1 + (alpha[i + 1] - a) * mean_data + (sigma[i + 1] - b) * mean_noise) ** 2 * variance
    options = {"churn": churn, "churn_range": (low, high), "noise_scale": scale, "dtype": F64}
    denoise = exact(normal_data(0.0, s), schedule)
    x = sample_edm(KEY, denoise, (10_000, 3), schedule=schedule, steps=n, **options)
    check_variance(x, variance)


@pytest.mark.parametrize("schedule", [EDM(), VPCosine()], ids=lambda s: type(s).__name__)
def test_predictor_corrector_has_the_variance_of_the_recursion(schedule):
    s, n, snr = 0.5, 5, 0.3
    times = schedule.times(n)
    (alpha, sigma), gain = scales(schedule, times), gains(schedule, times, s)
    variance = sigma[0] ** 2
    for i in range(n - 1):
        kept = alpha[i] * sigma[i + 1] / (alpha[i + 1] * sigma[i])
        slope = alpha[i + 1] * gain[i] + sigma[i + 1] * kept * (1 - alpha[i] * gain[i]) / sigma[i]
        variance = slope**2 * variance + sigma[i + 1] ** 2 * (1 - kept**2)
        for _ in range(2):  # x + e score + sqrt(2 e) z, score = -x / (alpha^2 s^2 + sigma^2)
            e = 2 * (snr * sigma[i + 1]) ** 2
            variance = (1 - e / (alpha[i + 1] ** 2 * s**2 + sigma[i + 1] ** 2)) ** 2 * variance + 2 * e
    denoise = exact(normal_data(0.0, s), schedule)
    options = {"snr": snr, "corrections": 2, "dtype": F64}
    x = sample_predictor_corrector(KEY, denoise, (10_000, 3), schedule=schedule, steps=n, **options)
    check_variance(x, gain[n - 1] ** 2 * variance)


def test_without_corrections_only_the_predictor_is_left():
    options = {"schedule": VPCosine(), "steps": 5, "dtype": F64}
    found = sample_predictor_corrector(KEY, curved, (2, 3), corrections=0, **options)
    torch.testing.assert_close(found, sample_ddpm(KEY, curved, (2, 3), **options), rtol=0, atol=0)


@pytest.mark.parametrize("v", [0.0, 0.4, 1.0])
def test_ddpm_draws_with_the_learned_variance(v):
    # Nichol and Dhariwal 2021, eq. 15, for variance-preserving schedules: between beta-tilde and beta of the step
    schedule, n = VPLinear(), 4
    times = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=F64)
    alpha, sigma = scales(schedule, times)
    variance = torch.zeros((), dtype=F64)
    for i in range(n - 1):
        beta = 1 - (alpha[i] / alpha[i + 1]) ** 2
        slope = (alpha[i] / alpha[i + 1]) * sigma[i + 1] ** 2 / sigma[i] ** 2
        lower = beta * sigma[i + 1] ** 2 / sigma[i] ** 2
        variance = slope**2 * variance + beta**v * lower ** (1 - v)
    denoise = lambda x_t, t: (torch.zeros_like(x_t), torch.full_like(x_t, v))
    options = {"schedule": schedule, "steps": n, "times": times, "return_path": True, "dtype": F64}
    _, path = sample_ddpm(KEY, denoise, (10_000, 3), x_t=torch.zeros(10_000, 3), **options)
    check_variance(path.x_t[-1], variance)


def test_other_samplers_leave_the_learned_variance_alone():
    options = {"schedule": VPLinear(), "steps": 4, "dtype": F64}
    found = sample_heun(KEY, lambda x_t, t: (curved(x_t, t), x_t), (2, 3), **options)
    torch.testing.assert_close(found, sample_heun(KEY, curved, (2, 3), **options), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (sample_dpmpp_2m_sde, {"eta": 1.5}, "sample_dpmpp_2m_sde: expected 0 <= eta <= 1, got 1.5"),
        (sample_edm, {"churn": -1.0}, "sample_edm: expected 0 <= churn, got -1.0"),
        (sample_edm, {"noise_scale": -1.0}, "sample_edm: expected 0 <= noise_scale, got -1.0"),
        (sample_unipc, {"order": 4}, "sample_unipc: expected order to be one of 1, 2, 3, got 4"),
        (sample_predictor_corrector, {"snr": -0.1}, "sample_predictor_corrector: expected 0 <= snr, got -0.1"),
        (sample_predictor_corrector, {"corrections": -1}, "expected 0 <= corrections, got -1"),
    ],
    ids=lambda x: x.__name__ if callable(x) else "",
)
def test_samplers_refuse_options_out_of_range(sampler, options, message):
    with pytest.raises(ValueError, match=message):
        sampler(KEY, curved, (2, 3), schedule=VPLinear(), steps=4, **options)
