"""Closed forms for Gaussian data: all that a diffusion or flow model estimates, known exactly.

With x from the distribution and x_t = alpha x + sigma noise, each class gives the density and score of x_t, the
denoised estimate E[x | x_t], the velocity E[dx_t/dt | x_t], the posterior covariance and, for single Gaussians, the
probability-flow map. ``alpha`` and ``sigma`` are numbers, 0-d tensors or one value per example (b,).

The classes are NamedTuples of tensors: they pass through ``vmap``, ``grad`` and ``jit`` as trees.
"""

import math
from typing import NamedTuple, TypeAlias

import torch
from einops import einsum, rearrange
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_shape
from functorch_gen.noise import expand
from functorch_gen.typing import Key, Number

__all__ = ["Gaussian", "GaussianMixture", "MultivariateGaussian", "isotropic_mixture"]

Scales: TypeAlias = tuple[Number, Number]
"""(alpha, sigma)"""

_LOG_2PI = math.log(2 * math.pi)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is."""
    return torch.where(b == 0, 0, a / torch.where(b == 0, 1, b))


def _root(x: Tensor) -> Tensor:
    """Square root of what is positive, else 0, with derivatives 0 there."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), 0)


def _velocity(x_hat: Tensor, noise_hat: Tensor, dalpha: Number, dsigma: Number) -> Tensor:
    """E[dx_t/dt | x_t] = dalpha E[x | x_t] + dsigma E[noise | x_t]."""
    return expand(dalpha, x_hat) * x_hat + expand(dsigma, x_hat) * noise_hat


class Gaussian(NamedTuple):
    """Independent N(mean, std^2) in every element of an event of any shape.

    >>> data = Gaussian(torch.zeros(3), torch.tensor(0.5))
    >>> data.denoise(torch.ones(1, 3), 1.0, 0.5)
    tensor([[0.5000, 0.5000, 0.5000]])
    """

    mean: Tensor  # (...)
    std: Tensor  # broadcastable to (...); 0 is a point mass

    def sample(self, key: Key, n: int) -> Tensor:
        """n draws: -> (n, ...)."""
        return self.mean + self.std * random.normal(key, (n, *self.mean.shape), self.mean.dtype)

    def _variance(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Variance of x_t: alpha^2 std^2 + sigma^2."""
        return (expand(alpha, x_t) * self.std) ** 2 + expand(sigma, x_t) ** 2

    def log_prob(self, x_t: Tensor, alpha: Number = 1.0, sigma: Number = 0.0) -> Tensor:
        """Log-density of x_t, of the data by default: (b, ...) -> (b,)."""
        variance = self._variance(x_t, alpha, sigma)
        squared = (x_t - expand(alpha, x_t) * self.mean) ** 2 / variance
        return -0.5 * rearrange(squared + variance.log() + _LOG_2PI, "b ... -> b (...)").sum(1)

    def score(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Gradient of the log-density in x_t: (b, ...) -> (b, ...)."""
        return -_divide(x_t - expand(alpha, x_t) * self.mean, self._variance(x_t, alpha, sigma))

    def denoise(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """E[x | x_t]: (b, ...) -> (b, ...)."""
        return self.mean - expand(alpha, x_t) * self.std**2 * self.score(x_t, alpha, sigma)

    def noise(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """E[noise | x_t]: (b, ...) -> (b, ...)."""
        return -expand(sigma, x_t) * self.score(x_t, alpha, sigma)

    def velocity(
        self, x_t: Tensor, alpha: Number, sigma: Number, dalpha: Number = -1.0, dsigma: Number = 1.0
    ) -> Tensor:
        """E[dalpha x + dsigma noise | x_t], by default of noise - x: (b, ...) -> (b, ...)."""
        return _velocity(self.denoise(x_t, alpha, sigma), self.noise(x_t, alpha, sigma), dalpha, dsigma)

    def posterior_variance(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Variance of each element of x given x_t: (b, ...) -> (b, ...)."""
        variance = self._variance(x_t, alpha, sigma)
        return _divide((self.std * expand(sigma, x_t)) ** 2 + torch.zeros_like(x_t), variance)

    def flow(self, x_t: Tensor, start: Scales, end: Scales) -> Tensor:
        """Where the probability flow carries x_t from scales ``start`` to ``end``: (b, ...) -> (b, ...)."""
        ratio = _root(_divide(self._variance(x_t, *end), self._variance(x_t, *start)))
        return expand(end[0], x_t) * self.mean + ratio * (x_t - expand(start[0], x_t) * self.mean)


class MultivariateGaussian(NamedTuple):
    """N(mean, cov) on vectors.

    >>> data = MultivariateGaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 3.0])))
    >>> data.denoise(torch.ones(1, 2), 1.0, 1.0)
    tensor([[0.5000, 0.7500]])
    """

    mean: Tensor  # (d,)
    cov: Tensor  # (d, d), symmetric

    def sample(self, key: Key, n: int) -> Tensor:
        """n draws: -> (n, d)."""
        noise = random.normal(key, (n, *self.mean.shape), self.mean.dtype)
        return self.mean + noise @ _matrix_root(self.cov)

    def _factor(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Cholesky factor of the covariance alpha^2 cov + sigma^2 of x_t: (b, d, d) or (d, d)."""
        matrix = x_t[..., None]
        eye = torch.eye(self.mean.shape[-1], dtype=x_t.dtype, device=x_t.device)
        return torch.linalg.cholesky_ex(expand(alpha, matrix) ** 2 * self.cov + expand(sigma, matrix) ** 2 * eye).L

    def _gap(self, x_t: Tensor, alpha: Number) -> Tensor:
        """x_t - E[x_t]: (b, d)."""
        check_shape(x_t, "b d", f"{type(self).__name__}: x_t", d=self.mean.shape[-1])
        return x_t - expand(alpha, x_t) * self.mean

    def log_prob(self, x_t: Tensor, alpha: Number = 1.0, sigma: Number = 0.0) -> Tensor:
        """Log-density of x_t, of the data by default: (b, d) -> (b,)."""
        factor, gap = self._factor(x_t, alpha, sigma), self._gap(x_t, alpha)
        white = torch.linalg.solve_triangular(factor, gap[..., None], upper=False)[..., 0]
        log_det = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * ((white**2).sum(-1) + log_det + gap.shape[-1] * _LOG_2PI)

    def score(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Gradient of the log-density in x_t: (b, d) -> (b, d)."""
        return -torch.cholesky_solve(self._gap(x_t, alpha)[..., None], self._factor(x_t, alpha, sigma))[..., 0]

    def denoise(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """E[x | x_t]: (b, d) -> (b, d)."""
        return self.mean - expand(alpha, x_t) * (self.score(x_t, alpha, sigma) @ self.cov)

    def noise(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """E[noise | x_t]: (b, d) -> (b, d)."""
        return -expand(sigma, x_t) * self.score(x_t, alpha, sigma)

    def velocity(
        self, x_t: Tensor, alpha: Number, sigma: Number, dalpha: Number = -1.0, dsigma: Number = 1.0
    ) -> Tensor:
        """E[dalpha x + dsigma noise | x_t], by default of noise - x: (b, d) -> (b, d)."""
        return _velocity(self.denoise(x_t, alpha, sigma), self.noise(x_t, alpha, sigma), dalpha, dsigma)

    def posterior_cov(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Covariance of x given x_t: (b, d) -> (b, d, d)."""
        factor = self._factor(x_t, alpha, sigma)
        white = torch.linalg.solve_triangular(factor, self.cov.expand(factor.shape), upper=False)
        cov = self.cov - expand(alpha, x_t[..., None]) ** 2 * white.mT @ white
        return cov.expand(x_t.shape[0], -1, -1)

    def flow(self, x_t: Tensor, start: Scales, end: Scales) -> Tensor:
        """Where the probability flow carries x_t from scales ``start`` to ``end``: (b, d) -> (b, d).

        In the eigenvectors of ``cov`` the elements are independent.
        """
        values, vectors = torch.linalg.eigh(self.cov)
        rotated = Gaussian(self.mean @ vectors, _root(values))
        return rotated.flow(x_t @ vectors, start, end) @ vectors.mT


def _matrix_root(cov: Tensor) -> Tensor:
    """Symmetric square root of a positive semi-definite matrix: (..., d, d) -> (..., d, d)."""
    values, vectors = torch.linalg.eigh(cov)
    return vectors * _root(values)[..., None, :] @ vectors.mT


class GaussianMixture(NamedTuple):
    """Mixture of N(means[k], covs[k]) with weights that sum to one, on vectors.

    >>> data = isotropic_mixture(torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.tensor([0.1, 0.1]))
    >>> data.denoise(torch.zeros(1, 1), 1.0, 1.0)
    tensor([[0.]])
    """

    weights: Tensor  # (k,)
    means: Tensor  # (k, d)
    covs: Tensor  # (k, d, d)

    def sample(self, key: Key, n: int) -> Tensor:
        """n draws: -> (n, d)."""
        key_component, key_noise = random.split(key)
        component = random.categorical(key_component, self.weights.log(), shape=(n,))
        noise = random.normal(key_noise, (n, self.means.shape[-1]), self.means.dtype)
        return self.means[component] + einsum(noise, _matrix_root(self.covs)[component], "n i, n i j -> n j")

    def _each(self, method: str, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """A quantity of each component, stacked: (k, b, ...)."""
        components = MultivariateGaussian(self.means, self.covs)
        return torch.func.vmap(lambda component: getattr(component, method)(x_t, alpha, sigma))(components)

    def _log_joint(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """log p(component, x_t): (b, k)."""
        return rearrange(self._each("log_prob", x_t, alpha, sigma), "k b -> b k") + self.weights.log()

    def log_prob(self, x_t: Tensor, alpha: Number = 1.0, sigma: Number = 0.0) -> Tensor:
        """Log-density of x_t, of the data by default: (b, d) -> (b,)."""
        return self._log_joint(x_t, alpha, sigma).logsumexp(-1)

    def responsibilities(self, x_t: Tensor, alpha: Number = 1.0, sigma: Number = 0.0) -> Tensor:
        """p(component | x_t): (b, d) -> (b, k)."""
        return self._log_joint(x_t, alpha, sigma).softmax(-1)

    def _average(self, method: str, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Expectation over the component given x_t: (b, d) -> (b, d)."""
        each = self._each(method, x_t, alpha, sigma)
        return einsum(self.responsibilities(x_t, alpha, sigma), each, "b k, k b d -> b d")

    def score(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Gradient of the log-density in x_t: (b, d) -> (b, d)."""
        return self._average("score", x_t, alpha, sigma)

    def denoise(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """E[x | x_t]: (b, d) -> (b, d)."""
        return self._average("denoise", x_t, alpha, sigma)

    def noise(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """E[noise | x_t]: (b, d) -> (b, d)."""
        return -expand(sigma, x_t) * self.score(x_t, alpha, sigma)

    def velocity(
        self, x_t: Tensor, alpha: Number, sigma: Number, dalpha: Number = -1.0, dsigma: Number = 1.0
    ) -> Tensor:
        """E[dalpha x + dsigma noise | x_t], by default of noise - x: (b, d) -> (b, d)."""
        return _velocity(self.denoise(x_t, alpha, sigma), self.noise(x_t, alpha, sigma), dalpha, dsigma)

    def posterior_cov(self, x_t: Tensor, alpha: Number, sigma: Number) -> Tensor:
        """Covariance of x given x_t, within and between components: (b, d) -> (b, d, d)."""
        weights = self.responsibilities(x_t, alpha, sigma)
        each = self._each("denoise", x_t, alpha, sigma)
        gap = each - einsum(weights, each, "b k, k b d -> b d")
        within = einsum(weights, self._each("posterior_cov", x_t, alpha, sigma), "b k, k b i j -> b i j")
        return within + einsum(weights, gap, gap, "b k, k b i, k b j -> b i j")


def isotropic_mixture(weights: Tensor, means: Tensor, stds: Tensor) -> GaussianMixture:
    """Mixture of N(means[k], stds[k]^2) with weights in proportion to those given: (k,), (k, d), (k,).

    Raises:
        ValueError: if the shapes do not fit.

    >>> isotropic_mixture(torch.ones(2), torch.zeros(2, 3), torch.ones(2)).covs.shape
    torch.Size([2, 3, 3])
    """
    sizes = check_shape(means, "k d", "isotropic_mixture: means")
    check_shape(weights, "k", "isotropic_mixture: weights", k=sizes["k"])
    check_shape(stds, "k", "isotropic_mixture: stds", k=sizes["k"])
    eye = torch.eye(sizes["d"], dtype=means.dtype, device=means.device)
    return GaussianMixture(weights / weights.sum(), means, einsum(stds**2, eye, "k, i j -> k i j"))
