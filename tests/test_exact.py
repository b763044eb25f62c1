"""Closed forms for Gaussians and mixtures, held to torch.distributions, quadrature, autograd and each other."""

import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal
from torch.func import grad, jacrev, jvp, vmap

from functorch_gen import random
from functorch_gen.exact import Gaussian, GaussianMixture, MultivariateGaussian, isotropic_mixture

F64 = torch.float64


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def some_cov() -> torch.Tensor:
    a = random.normal(random.key(5), (3, 3), F64)
    return a @ a.mT + 0.1 * torch.eye(3, dtype=F64)


GAUSSIAN = Gaussian(tensor(0.5, -1.0, 2.0), tensor(0.3, 1.0, 2.0))
MULTIVARIATE = MultivariateGaussian(tensor(0.5, -1.0, 2.0), some_cov())
MIXTURE = GaussianMixture(
    tensor(0.2, 0.5, 0.3),
    random.normal(random.key(6), (3, 3), F64) * 2,
    torch.stack([some_cov(), 0.25 * torch.eye(3, dtype=F64), 2 * some_cov()]),
)
ALL = {"gaussian": GAUSSIAN, "multivariate": MULTIVARIATE, "mixture": MIXTURE}
every = pytest.mark.parametrize("data", ALL.values(), ids=ALL.keys())

X_T = random.normal(random.key(7), (5, 3), F64)
ALPHA = tensor(1.0, 0.9, 0.5, 0.1, 1.0)  # one scale for each example
SIGMA = tensor(0.1, 0.4, 0.8, 1.0, 20.0)


@every
def test_score_is_the_gradient_of_the_log_density(data):
    wanted = grad(lambda x_t: data.log_prob(x_t, ALPHA, SIGMA).sum())(X_T)
    torch.testing.assert_close(data.score(X_T, ALPHA, SIGMA), wanted, rtol=1e-10, atol=1e-10)


@every
def test_denoise_obeys_tweedie(data):
    # E[x | x_t] = (x_t + sigma^2 score) / alpha, the score by autograd
    score = grad(lambda x_t: data.log_prob(x_t, ALPHA, SIGMA).sum())(X_T)
    wanted = (X_T + SIGMA[:, None] ** 2 * score) / ALPHA[:, None]
    torch.testing.assert_close(data.denoise(X_T, ALPHA, SIGMA), wanted, rtol=1e-10, atol=1e-10)


@every
def test_posterior_covariance_obeys_second_order_tweedie(data):
    # cov[x | x_t] = (sigma^2 / alpha) d E[x | x_t] / d x_t
    one = vmap(jacrev(lambda x, alpha, sigma: data.denoise(x[None], alpha, sigma)[0]))
    wanted = (SIGMA**2 / ALPHA)[:, None, None] * one(X_T, ALPHA, SIGMA)
    if isinstance(data, Gaussian):
        found = torch.diag_embed(data.posterior_variance(X_T, ALPHA, SIGMA))
    else:
        found = data.posterior_cov(X_T, ALPHA, SIGMA)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@every
def test_estimates_of_data_and_noise_add_up(data):
    alpha, sigma = ALPHA[:, None], SIGMA[:, None]
    mixed = alpha * data.denoise(X_T, ALPHA, SIGMA) + sigma * data.noise(X_T, ALPHA, SIGMA)
    torch.testing.assert_close(mixed, X_T, rtol=1e-12, atol=1e-12)


@every
def test_velocity_is_that_of_the_path(data):
    x_hat, noise = data.denoise(X_T, ALPHA, SIGMA), data.noise(X_T, ALPHA, SIGMA)
    torch.testing.assert_close(data.velocity(X_T, ALPHA, SIGMA), noise - x_hat, rtol=1e-14, atol=1e-14)
    found = data.velocity(X_T, ALPHA, SIGMA, -ALPHA, 2 * SIGMA)
    torch.testing.assert_close(found, -ALPHA[:, None] * x_hat + 2 * SIGMA[:, None] * noise, rtol=1e-14, atol=1e-14)


def test_mixture_equals_bayes_by_quadrature():
    # one dimension, x on a fine grid: the trapezoidal rule of smooth decaying functions converges beyond 1e-12
    data = isotropic_mixture(tensor(1.0, 3.0), tensor([-1.0], [0.7]), tensor(0.3, 0.6))
    grid = torch.linspace(-8, 8, 8001, dtype=F64)
    first, second = (Normal(*tensor(mean, std)) for mean, std in ((-1.0, 0.3), (0.7, 0.6)))
    prior = 0.25 * first.log_prob(grid).exp() + 0.75 * second.log_prob(grid).exp()
    alpha, sigma = 0.8, 0.5
    for x_t in (-1.5, 0.1, 2.0):
        joint = prior * Normal(alpha * grid, tensor(sigma)).log_prob(tensor(x_t)).exp()
        evidence = torch.trapezoid(joint, grid)
        mean = torch.trapezoid(grid * joint, grid) / evidence
        variance = torch.trapezoid((grid - mean) ** 2 * joint, grid) / evidence
        x = tensor([x_t])
        torch.testing.assert_close(data.log_prob(x, alpha, sigma)[0], evidence.log(), rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(data.denoise(x, alpha, sigma)[0, 0], mean, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(data.posterior_cov(x, alpha, sigma)[0, 0, 0], variance, rtol=1e-10, atol=1e-10)


def test_log_prob_equals_torch_distributions():
    gaussian = Normal(GAUSSIAN.mean, GAUSSIAN.std).log_prob(X_T).sum(1)
    torch.testing.assert_close(GAUSSIAN.log_prob(X_T), gaussian, rtol=1e-12, atol=0)
    multivariate = MultivariateNormal(MULTIVARIATE.mean, MULTIVARIATE.cov).log_prob(X_T)
    torch.testing.assert_close(MULTIVARIATE.log_prob(X_T), multivariate, rtol=1e-12, atol=0)
    mixture = MixtureSameFamily(Categorical(MIXTURE.weights), MultivariateNormal(MIXTURE.means, MIXTURE.covs))
    torch.testing.assert_close(MIXTURE.log_prob(X_T), mixture.log_prob(X_T), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["log_prob", "score", "denoise", "noise", "velocity"])
def test_three_forms_of_one_gaussian_agree(method):
    multivariate = MultivariateGaussian(GAUSSIAN.mean, torch.diag(GAUSSIAN.std**2))
    mixture = GaussianMixture(tensor(1.0), multivariate.mean[None], multivariate.cov[None])
    wanted = getattr(GAUSSIAN, method)(X_T, ALPHA, SIGMA)
    for other in (multivariate, mixture):
        torch.testing.assert_close(getattr(other, method)(X_T, ALPHA, SIGMA), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("data", [GAUSSIAN, MULTIVARIATE], ids=["gaussian", "multivariate"])
def test_flow_moves_with_the_velocity(data):
    # along alpha = 1 - t, sigma = t: d flow / dt = velocity at the place reached
    def place(t):
        return data.flow(X_T, (0.4, 0.6), (1 - t, t))

    reached, speed = jvp(place, (tensor(0.3)[0],), (tensor(1.0)[0],))
    torch.testing.assert_close(speed, data.velocity(reached, 0.7, 0.3), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(place(tensor(0.6)[0]), X_T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("data", [GAUSSIAN, MULTIVARIATE], ids=["gaussian", "multivariate"])
def test_flow_carries_one_density_to_the_other(data):
    start, end = (0.4, 0.6), (1.0, 0.0)
    volume = vmap(jacrev(lambda x: data.flow(x[None], start, end)[0]))(X_T)
    moved = data.log_prob(data.flow(X_T, start, end)) + torch.linalg.slogdet(volume).logabsdet
    torch.testing.assert_close(moved, data.log_prob(X_T, *start), rtol=1e-11, atol=1e-11)


def test_flow_of_zero_mean_data_is_the_closed_form():
    s, high = 0.5, 80.0
    data = Gaussian(torch.zeros(3, dtype=F64), tensor(s)[0])
    for sigma in (0.0, 0.3, 10.0):
        wanted = X_T * math.sqrt((s**2 + sigma**2) / (s**2 + high**2))
        torch.testing.assert_close(data.flow(X_T, (1.0, high), (1.0, sigma)), wanted, rtol=1e-14, atol=0)


@every
def test_sample_has_the_moments(data):
    n = 20_000
    x = data.sample(random.key(1), n)
    if isinstance(data, Gaussian):
        mean, cov = data.mean, torch.diag(data.std**2)
    elif isinstance(data, MultivariateGaussian):
        mean, cov = data.mean, data.cov
    else:
        mean = data.weights @ data.means
        gap = data.means - mean
        cov = torch.einsum("k,kij->ij", data.weights, data.covs + gap[:, :, None] * gap[:, None])
    spread = cov.diagonal().sqrt()
    assert bool(((x.mean(0) - mean).abs() < 4 * spread / math.sqrt(n)).all())  # 4 standard errors
    # an element of the empirical covariance has standard error below sqrt(3 / n) spread_i spread_j for such mixtures
    assert bool(((x.T.cov() - cov).abs() < 4 * math.sqrt(3 / n) * spread[:, None] * spread).all())


def test_mixture_samples_its_components_by_weight():
    data = isotropic_mixture(tensor(1.0, 3.0), tensor([-10.0], [10.0]), tensor(0.1, 0.1))
    n = 4000
    part = (data.sample(random.key(2), n) > 0).double().mean()
    assert abs(part - 0.75) < 4 * math.sqrt(0.75 * 0.25 / n)


def test_responsibilities_are_the_posterior_of_the_component():
    data = isotropic_mixture(tensor(1.0, 1.0), tensor([-1.0], [1.0]), tensor(0.5, 0.5))
    found = data.responsibilities(tensor([0.3]), 1.0, 0.5)[0, 1]
    torch.testing.assert_close(found, torch.sigmoid(tensor(2 * 0.3 / 0.5)[0]))  # variance 0.25 + 0.25


def test_gaussian_takes_events_of_any_shape():
    data = Gaussian(torch.zeros(2, 4, 4, dtype=F64), tensor(0.5)[0])
    x = data.sample(random.key(3), 3)
    assert x.shape == (3, 2, 4, 4)
    assert data.log_prob(x, tensor(1.0, 0.5, 0.1), tensor(0.1, 0.5, 1.0)).shape == (3,)
    assert data.denoise(x, 1.0, 0.5).shape == x.shape
    torch.testing.assert_close(data.denoise(x, 1.0, 0.5), 0.5 * x, rtol=1e-14, atol=0)


def test_a_point_mass_is_denoised_to_its_point():
    point = Gaussian(tensor(1.0, 2.0, 3.0), tensor(0.0)[0])
    for sigma in (0.0, 0.5):
        torch.testing.assert_close(point.denoise(X_T, 1.0, sigma), point.mean.expand(5, 3))
    vector = MultivariateGaussian(point.mean, torch.zeros(3, 3, dtype=F64))
    assert torch.equal(vector.sample(random.key(0), 1)[0], point.mean)


@every
def test_estimates_are_finite_at_both_ends(data):
    for alpha, sigma in ((1.0, 0.0), (0.0, 1.0)):
        for method in ("denoise", "noise", "score", "velocity"):
            assert getattr(data, method)(X_T, alpha, sigma).isfinite().all()
    torch.testing.assert_close(data.denoise(X_T, 1.0, 0.0), X_T, rtol=1e-9, atol=1e-9)


def test_distributions_are_trees_that_vmap_and_differentiate():
    stds = tensor(0.5, 2.0)
    many = Gaussian(torch.zeros(2, 3, dtype=F64), stds)
    found = vmap(lambda data: data.denoise(X_T, 1.0, 1.0))(many)
    torch.testing.assert_close(found, (stds**2 / (stds**2 + 1))[:, None, None] * X_T)
    slope = grad(lambda data: data.log_prob(X_T).sum())(GAUSSIAN)
    torch.testing.assert_close(slope.mean, ((X_T - GAUSSIAN.mean) / GAUSSIAN.std**2).sum(0))


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"MultivariateGaussian: x_t: expected shape \(b, d=3\), got \(2, 4\)"):
        MULTIVARIATE.denoise(torch.zeros(2, 4, dtype=F64), 1.0, 1.0)
    with pytest.raises(ValueError, match=r"isotropic_mixture: stds: expected shape \(k=2,\), got \(3,\)"):
        isotropic_mixture(torch.ones(2), torch.ones(2, 1), torch.ones(3))
