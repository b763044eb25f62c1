"""Conditional denoisers on Gaussian data, where E[x | x_t, y] is known in closed form."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import functorch_gen as fg
from functorch_gen import random
from functorch_gen.diffusion import dps, mmps, pigdm, project, sample_ddpm, sample_heun, sample_repaint
from functorch_gen.exact import Gaussian, MultivariateGaussian
from functorch_gen.noise import EDM, FlowMatching, SubVP, VPCosine, VPLinear, mix

F64 = torch.float64
KEY = random.key(0)
SCHEDULES = [VPCosine(), EDM(sigma_max=20.0), FlowMatching(), SubVP()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
D, M = 5, 3


def matrix(m: int = M) -> torch.Tensor:
    return random.normal(random.key(3), (m, D), F64)


def correlated() -> MultivariateGaussian:
    root = random.normal(random.key(4), (D, D), F64)
    return MultivariateGaussian(random.normal(random.key(5), (D,), F64), root @ root.T + 0.1 * torch.eye(D, dtype=F64))


def independent(std: float) -> MultivariateGaussian:
    return MultivariateGaussian(random.normal(random.key(5), (D,), F64), std**2 * torch.eye(D, dtype=F64))


def exact(data, schedule):
    return lambda x_t, t: data.denoise(x_t, schedule.alpha(t), schedule.sigma(t))


def given(data: MultivariateGaussian, a: torch.Tensor, y: torch.Tensor, noise_std: float) -> MultivariateGaussian:
    """p(x | y) for y = a x + noise, by the formula of conditional Gaussians."""
    gain = torch.linalg.solve(a @ data.cov @ a.T + noise_std**2 * torch.eye(len(a), dtype=F64), a @ data.cov).T
    return MultivariateGaussian(data.mean + gain @ (y - a @ data.mean), data.cov - gain @ a @ data.cov)


def inputs(schedule, n: int = 4):
    t = torch.linspace(0.2, 0.9, n, dtype=F64)
    return mix(schedule, random.normal(KEY, (n, D), F64), random.normal(random.key(1), (n, D), F64), t), t


@every_schedule
@pytest.mark.parametrize("noise_std", [0.05, 0.7])
def test_mmps_is_exact_on_gaussian_data(schedule, noise_std):
    data, a, y = correlated(), matrix(), torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    x_t, t = inputs(schedule)
    options = {"schedule": schedule, "noise_std": noise_std, "iterations": M}
    found = mmps(exact(data, schedule), lambda x: x @ a.T, y.expand(len(t), M), **options)(x_t, t)
    wanted = exact(given(data, a, y, noise_std), schedule)(x_t, t)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


@every_schedule
@pytest.mark.parametrize("method", [project, pigdm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("noise_std", [0.05, 0.7])
def test_pigdm_and_project_are_exact_on_independent_gaussian_data(method, schedule, noise_std):
    data, a, y = independent(0.6), matrix(), torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    x_t, t = inputs(schedule)
    options = {"schedule": schedule, "noise_std": noise_std, "sigma_data": 0.6, "iterations": M}
    found = method(exact(data, schedule), lambda x: x @ a.T, y.expand(len(t), M), **options)(x_t, t)
    wanted = exact(given(data, a, y, noise_std), schedule)(x_t, t)
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)


def test_pigdm_equals_its_formula_on_correlated_data():
    # D + (sigma^2 / alpha) J^T A^T (r^2 A A^T + s^2)^-1 (y - A D), dense
    schedule, data, a, s = VPCosine(), correlated(), matrix(), 0.3
    x_t, t = inputs(schedule)
    y, denoise = random.normal(random.key(6), (len(t), M), F64), exact(data, schedule)
    found = pigdm(denoise, lambda x: x @ a.T, y, schedule=schedule, noise_std=s, sigma_data=0.8)(x_t, t)
    for i in range(len(t)):
        alpha, sigma = schedule.alpha(t[i]), schedule.sigma(t[i])
        r2 = sigma**2 * 0.64 / (alpha**2 * 0.64 + sigma**2)
        x_hat = denoise(x_t[i : i + 1], t[i : i + 1])[0]
        jacobian = torch.func.jacrev(lambda x, i=i: denoise(x[None], t[i : i + 1])[0])(x_t[i])
        solved = torch.linalg.solve(r2 * a @ a.T + s**2 * torch.eye(M, dtype=F64), y[i] - a @ x_hat)
        wanted = x_hat + sigma**2 / alpha * jacobian.T @ a.T @ solved
        torch.testing.assert_close(found[i], wanted, rtol=1e-9, atol=1e-9)


# Dps.


@pytest.mark.parametrize("std", [0.4, None])
def test_dps_of_a_linear_denoiser_equals_the_gradient_by_hand(std):
    schedule, a, w = EDM(sigma_max=2.0), matrix(), random.normal(random.key(9), (D, D), F64)
    x_t, t = inputs(schedule)
    y = random.normal(random.key(6), (len(t), M), F64)
    options = {"schedule": schedule, "std": std, "scale": 0.7}
    found = dps(lambda x_t, t: x_t @ w.T, lambda x: x @ a.T, y, **options)(x_t, t)
    residual = y - x_t @ w.T @ a.T
    variance = std**2 if std else residual.square().mean(1, keepdim=True)  # at which y is likeliest
    shift = schedule.sigma(t)[:, None] ** 2 * residual @ a @ w / variance
    torch.testing.assert_close(found, x_t @ w.T + 0.7 * shift, rtol=1e-12, atol=1e-12)


def test_dps_takes_a_nonlinear_operator():
    schedule = VPCosine()
    x_t, t = inputs(schedule)
    y = torch.full((len(t), 1), 2.0, dtype=F64)
    norm = lambda x: x.square().sum(1, keepdim=True)
    found = dps(lambda x_t, t: x_t / 2, norm, y, schedule=schedule, std=1.0)(x_t, t)
    scale = (schedule.sigma(t) ** 2 / schedule.alpha(t))[:, None]
    wanted = x_t / 2 + scale * (y - norm(x_t / 2)) * x_t / 2  # J = 1/2, grad |x|^2 = 2 x = x_t
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("noise_std", [3.0, 10.0])
def test_dps_approaches_the_posterior_as_y_says_less(noise_std):
    # it leaves out A C A^T beside s^2, so that its shift is too long by the factor (A C A^T + s^2) / s^2
    schedule, data, a = VPCosine(), correlated(), matrix(1)
    x_t, t = inputs(schedule)
    denoise, y = exact(data, schedule), torch.full((len(t), 1), 4.0, dtype=F64)
    found = dps(denoise, lambda x: x @ a.T, y, schedule=schedule, std=noise_std)(x_t, t) - denoise(x_t, t)
    right = exact(given(data, a, y[0], noise_std), schedule)(x_t, t) - denoise(x_t, t)
    spread = data.posterior_cov(x_t, schedule.alpha(t), schedule.sigma(t))
    excess = torch.einsum("i,bij,j->b", a[0], spread, a[0]) / noise_std**2
    torch.testing.assert_close(found, (1 + excess)[:, None] * right, rtol=1e-8, atol=1e-10)


def test_dps_is_finite_where_the_residual_is_zero():
    guided = dps(lambda x_t, t: x_t, lambda x: x, torch.ones(2, 3), schedule=EDM())
    assert torch.equal(guided(torch.ones(2, 3), torch.ones(2)), torch.ones(2, 3))


# Replacement.


def test_project_on_a_mask_replaces_the_known_elements():
    mask, y = torch.tensor([1.0, 0, 1, 0, 0], dtype=F64), random.normal(random.key(2), (4, D), F64)
    x_t, t = inputs(VPCosine())
    found = project(lambda x_t, t: torch.sin(x_t), lambda x: mask * x, mask * y, schedule=VPCosine())(x_t, t)
    torch.testing.assert_close(found, torch.where(mask > 0, y, torch.sin(x_t)), rtol=1e-12, atol=1e-12)


def test_project_keeps_known_elements_on_the_forward_process():
    # Song et al. 2021, appendix I.2: x_t of what is known is alpha y + sigma noise at every step, here in distribution
    schedule, n, known = VPCosine(), 4000, torch.tensor([1.0, 0.0], dtype=F64)
    denoise = exact(Gaussian(torch.zeros(2, dtype=F64), torch.tensor(1.0, dtype=F64)), schedule)
    y = torch.tensor([[2.0, 0.0]], dtype=F64).expand(n, 2)
    conditional = project(denoise, lambda x: known * x, y, schedule=schedule)
    x, path = sample_ddpm(KEY, conditional, (n, 2), schedule=schedule, steps=5, dtype=F64, return_path=True)
    torch.testing.assert_close(x[:, 0], y[:, 0])
    for t, x_t in zip(path.t, path.x_t[..., 0], strict=True):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        assert abs(x_t.mean() - (alpha if t < 1 else 0) * 2) < 4 * sigma / math.sqrt(n) + 1e-9
        assert abs(x_t.std() / sigma - 1) < 4 * math.sqrt(0.5 / n)


def test_project_of_patch_means_has_those_means():
    pool = lambda x: F.avg_pool2d(x, 2)
    y = random.normal(random.key(2), (3, 1, 2, 2), F64)
    x_t, t = random.normal(KEY, (3, 1, 4, 4), F64), torch.full((3,), 0.5, dtype=F64)
    conditional = project(lambda x_t, t: torch.sin(x_t), pool, y, schedule=VPCosine(), iterations=1)
    found = conditional(x_t, t)
    torch.testing.assert_close(pool(found), y, rtol=1e-12, atol=1e-12)
    moved = found - torch.sin(x_t)  # the least way: equal within each patch
    torch.testing.assert_close(moved, F.interpolate(pool(moved), scale_factor=2), rtol=1e-12, atol=1e-12)


# Samples of the posterior.


@pytest.mark.parametrize(
    ("sampler", "steps"),
    [pytest.param(sample_heun, 30, id="heun"), pytest.param(sample_ddpm, 200, id="ddpm", marks=pytest.mark.slow)],
)
def test_samples_have_the_moments_of_the_posterior(sampler, steps):
    schedule, n, s = VPCosine(), 2000, 0.5
    data, a, y = correlated(), matrix(1), torch.tensor([4.0], dtype=F64)
    wanted = given(data, a, y, s)
    conditional = mmps(exact(data, schedule), lambda x: x @ a.T, y.expand(n, 1), schedule=schedule, noise_std=s)
    x = sampler(KEY, conditional, (n, D), schedule=schedule, steps=steps, dtype=F64)
    std = wanted.cov.diagonal().sqrt()
    # 4 standard errors, and what the steps leave: 1 % of the standard deviation
    assert bool(((x.mean(0) - wanted.mean).abs() < (4 / math.sqrt(n) + 0.01) * std).all())
    correlation = (x.T.cov() - wanted.cov) / std / std[:, None]
    assert correlation.abs().max() < 4 * math.sqrt(2 / n) + 0.02


# Resampling.

PAIR = torch.tensor([[1.0, 0.9], [0.9, 1.0]], dtype=F64)  # the covariance of two elements, the first of them known


def repaint_moments(schedule, times, y: float, resamples: int):
    """Of the second element by algorithm 1 of Lugmayr et al. 2022: each step is affine, and adds what it draws."""
    alpha, sigma, eye = schedule.alpha(times), schedule.sigma(times), torch.eye(2, dtype=F64)
    known = torch.tensor([y, 0.0], dtype=F64)
    mean, cov = torch.zeros(2, dtype=F64), sigma[0] ** 2 * eye
    for i in range(len(times)):
        gain = alpha[i] * PAIR @ torch.linalg.inv(alpha[i] ** 2 * PAIR + sigma[i] ** 2 * eye)
        gain = torch.stack([torch.zeros_like(known), gain[1]])  # x_hat = gain x_t + known
        if i == len(times) - 1:
            return (gain @ mean)[1], (gain @ cov @ gain.T)[1, 1]
        kept = (alpha[i] / alpha[i + 1]) ** 2  # 1 - beta
        to_x = alpha[i + 1] * (1 - kept) / sigma[i] ** 2
        slope = kept.sqrt() * sigma[i + 1] ** 2 / sigma[i] ** 2 * eye + to_x * gain
        for u in range(resamples):
            mean = slope @ mean + to_x * known
            cov = slope @ cov @ slope.T + (1 - kept) * sigma[i + 1] ** 2 / sigma[i] ** 2 * eye
            if u < resamples - 1:
                mean, cov = kept.sqrt() * mean, kept * cov + (1 - kept) * eye


def paint(n: int, y: float, **options) -> torch.Tensor:
    schedule = VPLinear()
    denoise = exact(MultivariateGaussian(torch.zeros(2, dtype=F64), PAIR), schedule)
    conditional = project(denoise, lambda x: x[:, :1], torch.full((n, 1), y, dtype=F64), schedule=schedule)
    return sample_repaint(KEY, conditional, (n, 2), schedule=schedule, dtype=F64, **options)


@pytest.mark.parametrize("resamples", [1, 4])
def test_repaint_has_the_moments_of_the_papers_algorithm(resamples):
    n, y = 10_000, 2.0
    mean, variance = repaint_moments(VPLinear(), VPLinear().times(10), y, resamples)
    x = paint(n, y, steps=10, resamples=resamples, jump_length=1)
    torch.testing.assert_close(x[:, 0], torch.full((n,), y, dtype=F64))
    assert abs(x[:, 1].mean() - mean) < 4 * (variance / n).sqrt()  # 4 standard errors
    assert abs(x[:, 1].var() / variance - 1) < 4 * math.sqrt(2 / n)


def test_repaint_comes_to_match_what_is_known():
    # the posterior is N(1.8, 0.19); at 20,000 samples one try has 1.19 and 0.32, ten have 1.66 and 0.18
    once, often = (paint(2000, 2.0, steps=21, resamples=n, jump_length=4)[:, 1] for n in (1, 10))
    assert abs(once.mean() - 1.8) > 0.5
    assert abs(often.mean() - 1.8) < 0.14 + 4 * math.sqrt(0.19 / 2000)  # 4 standard errors
    assert abs(often.var() / 0.19 - 1) < 0.05 + 4 * math.sqrt(2 / 2000)


def test_repaint_takes_each_stretch_again():
    seen = []

    def denoise(x_t, t):
        seen.append(round(10 * t[0].item()))
        return x_t

    options = {"schedule": FlowMatching(), "steps": 10, "return_path": True}
    x, path = sample_repaint(KEY, denoise, (1, 2), resamples=2, jump_length=4, **options)
    assert seen == [10, 9, 8, 7, 10, 9, 8, 7, 6, 5, 4, 3, 6, 5, 4, 3, 2, 2, 1]
    assert [round(10 * t) for t in path.t.tolist()] == seen
    assert torch.equal(x, path.x_hat[-1])


def test_repaint_without_resamples_is_ddpm():
    denoise = lambda x_t, t: torch.sin(x_t) * (0.5 + t[:, None])
    options = {"schedule": EDM(), "steps": 7, "dtype": F64}
    found = sample_repaint(KEY, denoise, (2, 3), resamples=1, jump_length=3, **options)
    assert torch.equal(found, sample_ddpm(KEY, denoise, (2, 3), **options))


@pytest.mark.parametrize("argument", ["resamples", "jump_length"])
def test_repaint_refuses_what_is_no_number_of_steps(argument):
    def draw(value: Any):
        options: dict[str, Any] = {argument: value}
        return sample_repaint(KEY, lambda x_t, t: x_t, (1, 2), schedule=VPCosine(), steps=4, **options)

    with pytest.raises(ValueError, match=f"sample_repaint: expected {argument} > 0, got 0"):
        draw(0)
    with pytest.raises(TypeError, match=f"sample_repaint: expected {argument} to be an integer, got float"):
        draw(2.0)


# Behaviour.


def test_y_may_be_one_number_of_each_example():
    # of pixels: the mean of an image; 5 numbers in a row, the sum of which is measured
    data, schedule = correlated(), VPCosine()
    x_t, t = inputs(schedule)
    y, denoise, a = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=F64), exact(data, schedule), torch.ones(1, D, dtype=F64)
    options = {"schedule": schedule, "noise_std": 0.3}
    found = mmps(denoise, lambda x: x.sum(1), y, **options)(x_t, t)
    for i in range(4):
        wanted = exact(given(data, a, y[i : i + 1], 0.3), schedule)(x_t[i : i + 1], t[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], wanted, rtol=1e-8, atol=1e-8)
    for method in (project, pigdm):
        column = method(denoise, lambda x: x.sum(1, keepdim=True), y[:, None], **options)(x_t, t)
        torch.testing.assert_close(method(denoise, lambda x: x.sum(1), y, **options)(x_t, t), column)
    column = dps(denoise, lambda x: x.sum(1, keepdim=True), y[:, None], schedule=schedule)(x_t, t)
    torch.testing.assert_close(dps(denoise, lambda x: x.sum(1), y, schedule=schedule)(x_t, t), column)


METHODS = {
    "project": lambda denoise, operator, y, schedule: project(denoise, operator, y, schedule=schedule),
    "pigdm": lambda denoise, operator, y, schedule: pigdm(denoise, operator, y, schedule=schedule, iterations=2),
    "mmps": lambda denoise, operator, y, schedule: mmps(denoise, operator, y, schedule=schedule, noise_std=0.1),
    "dps": lambda denoise, operator, y, schedule: dps(denoise, operator, y, schedule=schedule),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "pigdm" else pytest.mark.slow) for n in METHODS])
def test_conditional_samplers_compile_to_one_program_and_differentiate(name):
    schedule, a = VPCosine(), matrix(2)

    def total(w, key, y):
        conditional = METHODS[name](lambda x_t, t: torch.tanh(w * x_t), lambda x: x @ a.T, y, schedule)
        return sample_heun(key, conditional, (2, D), schedule=schedule, steps=3, dtype=F64).square().sum()

    w, y, h = torch.tensor(0.8, dtype=F64), random.normal(random.key(2), (2, 2), F64), 1e-5
    gradient = fg.grad(total)
    difference = (total(w + h, KEY, y) - total(w - h, KEY, y)) / (2 * h)
    torch.testing.assert_close(gradient(w, KEY, y), difference, rtol=1e-5, atol=1e-6)
    compiled = fg.jit(gradient, backend="aten")
    torch.testing.assert_close(compiled(w, KEY, y), gradient(w, KEY, y), rtol=1e-8, atol=1e-8)
    assert compiled.traces == 1


@pytest.mark.parametrize("name", METHODS)
def test_float32_stays_float32(name):
    x_t, t = torch.ones(2, D), torch.full((2,), 0.5)
    conditional = METHODS[name](lambda x_t, t: x_t / 2, lambda x: x[:, :2], torch.zeros(2, 2), VPCosine())
    assert conditional(x_t, t).dtype == torch.float32


@pytest.mark.parametrize("method", [project, pigdm], ids=lambda f: f.__name__)
@pytest.mark.parametrize("measured", [slice(0, 1), slice(0, 3)], ids=["one", "three"])
def test_derivatives_do_not_overflow_where_conjugate_gradients_have_converged(method, measured):
    # one iteration is exact; in the others the residual is rounding, and its powers vanish in float32
    def total(w, x_t, t):
        y = torch.cos(x_t)[:, measured]
        conditional = method(lambda x_t, t: torch.tanh(w * x_t), lambda x: x[:, measured], y, schedule=VPCosine())
        return conditional(x_t, t).square().sum()

    x_t, t = inputs(VPCosine())
    w = torch.linspace(0.5, 1.0, D, dtype=F64)
    hessian = fg.hessian(total)(w, x_t, t)
    h = 1e-5 * torch.eye(D, dtype=F64)
    slopes = torch.stack([fg.grad(total)(w + e, x_t, t) - fg.grad(total)(w - e, x_t, t) for e in h]) / 2e-5
    torch.testing.assert_close(hessian, slopes, rtol=1e-6, atol=1e-6)
    found = fg.grad(total)(w.float(), x_t.float(), t.float())
    torch.testing.assert_close(found.double(), fg.grad(total)(w, x_t, t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_batch_stays_empty(name):
    conditional = METHODS[name](lambda x_t, t: x_t / 2, lambda x: x[:, :2], torch.zeros(0, 2), VPCosine())
    assert conditional(torch.ones(0, D), torch.ones(0)).shape == (0, D)


@pytest.mark.parametrize("name", METHODS)
def test_y_of_another_shape_is_refused(name):
    conditional = METHODS[name](lambda x_t, t: x_t, lambda x: x[:, :2], torch.zeros(2, 3), VPCosine())
    with pytest.raises(ValueError, match=rf"{name}: y: expected shape \(2, 2\) as operator gives, got \(2, 3\)"):
        conditional(torch.ones(2, D), torch.ones(2))


@pytest.mark.parametrize("method", [project, pigdm, mmps], ids=lambda f: f.__name__)
def test_options_out_of_range_are_refused(method):
    nothing, options = lambda x_t, t: x_t, {"schedule": VPCosine(), "noise_std": 0.1}
    with pytest.raises(ValueError, match=f"{method.__name__}: expected 0 <= noise_std, got -1.0"):
        method(nothing, lambda x: x, torch.ones(1), **{**options, "noise_std": -1.0})
    with pytest.raises(ValueError, match=f"{method.__name__}: expected iterations > 0, got 0"):
        method(nothing, lambda x: x, torch.ones(1), **options, iterations=0)
    with pytest.raises(ValueError, match="dps: expected std > 0, got 0"):
        dps(nothing, lambda x: x, torch.ones(1), schedule=VPCosine(), std=0)
