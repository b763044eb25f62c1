"""Lower bounds on log p(x) of p(x, z) = N(z; 0, 1) p(x | z), by a posterior q(z | x) = N(z; mean, exp(log_var)).

A net is any object with ``encode(params, x)``, whose output is mean and log-variance side by side on axis 1,
(b, 2 d, ...), and ``decode(params, z)``, whose output is what the likelihood wants:
:class:`functorch_gen.models.EncoderDecoder` makes one of two layers.
"""

import math
from typing import Any, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import numerics, random, transforms
from functorch_gen.check import check_choice, check_floating, check_number
from functorch_gen.losses import gaussian_kl
from functorch_gen.losses.per_example import in_float32, sum_per_example
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.transforms import stop_gradient, vmap
from functorch_gen.typing import Key, Number, Params
from functorch_gen.vae.likelihoods import Likelihood

__all__ = ["Net", "Posterior", "elbo", "iwae", "log_prob", "log_weights", "posterior"]

_LOG_2PI = math.log(2 * math.pi)


class Net(Protocol):
    """An encoder and a decoder; :class:`functorch_gen.models.EncoderDecoder` and its kin are ones."""

    def encode(self, params: Params, x: Any) -> Tensor:
        """Mean and log-variance of q(z | x), side by side: (b, ...) -> (b, 2 d, ...)."""
        ...

    def decode(self, params: Params, code: Tensor, /) -> Tensor:
        """The parameters of p(x | z): (b, d, ...) -> (b, ...)."""
        ...


class Posterior(NamedTuple):
    """q(z | x), independent normal distributions.

    >>> q = Posterior(torch.ones(1, 2), torch.zeros(1, 2))
    >>> q.kl()
    tensor([[0.5000, 0.5000]])
    """

    mean: Tensor  # (b, d, ...)
    log_var: Tensor  # (b, d, ...)

    def sample(self, key: Key) -> Tensor:
        """z = mean + std noise, a function of mean and log_var: -> (b, d, ...)."""
        noise = random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + torch.exp(0.5 * self.log_var) * noise

    @in_float32
    def log_prob(self, z: Tensor) -> Tensor:
        """log q(z | x): -> (b,)."""
        return sum_per_example(self._log_density(z))

    @in_float32
    def kl(self, z: Tensor | None = None) -> Tensor:
        """KL(q || N(0, 1)) of each latent number: -> (b, d, ...).

        Args:
            z: with it the estimate log q(z) - log N(z; 0, 1) at this one draw, whose mean it is.
        """
        if z is not None:
            return self._log_density(z) - _log_normal(z)
        mean, log_var = (x.reshape(-1, 1) for x in self)
        return gaussian_kl(mean, log_var).reshape(self.mean.shape)

    def _log_density(self, z: Tensor) -> Tensor:
        return _log_normal((z - self.mean) * torch.exp(-0.5 * self.log_var)) - 0.5 * self.log_var


def _log_normal(z: Tensor) -> Tensor:
    """log N(z; 0, 1) of each number."""
    return -0.5 * (z**2 + _LOG_2PI)


def posterior(net: Net, params: Params, x: Tensor) -> Posterior:
    """q(z | x) of each example: (b, ...) -> twice (b, d, ...).

    Raises:
        TypeError: if the encoder's output is not floating.
        ValueError: if it is not (b, 2 d, ...).

    >>> from functorch_gen import models, nn
    >>> net = models.EncoderDecoder(nn.Linear(4, 2 * 3), nn.Linear(3, 4))
    >>> posterior(net, net.init(random.key(0)), torch.ones(5, 4)).mean.shape
    torch.Size([5, 3])
    """
    output = net.encode(params, x)
    check_floating(output, "posterior: encode's output")
    if output.ndim < 2 or output.shape[1] % 2:
        raise ValueError(f"posterior: expected encode's output to be (b, 2 d, ...), got {tuple(output.shape)}")
    return Posterior(*output.chunk(2, 1))


def elbo(
    net: Net,
    params: Params,
    key: Key,
    x: Tensor,
    *,
    likelihood: Likelihood,
    kl: str = "analytic",
    beta: Number = 1.0,
    free_bits: Number | None = None,
) -> Tensor:
    """E_q[log p(x | z)] - beta KL(q(z | x) || N(0, 1)), the expectation by one draw of z: (b, ...) -> (b,).

    A lower bound on log p(x) for beta >= 1 without free bits. Its negative is the loss of a VAE.

    Args:
        kl: ``"analytic"``, or ``"monte_carlo"``: at the same draw of z. That one has no variance left where q is the
            true posterior.
        beta: weight of the divergence (Higgins et al. 2017). To anneal it, give a schedule of the step.
        free_bits: nats that each latent number may tell, on average over the batch, at no cost beyond them: where the
            average is below, the divergence counts as this many and has no gradient (Kingma et al. 2016).
    Raises:
        ValueError: if ``kl`` is another name, ``beta`` or ``free_bits`` is negative, or shapes do not fit.
    Source: Kingma and Welling 2013, eq. 3 and 10, arXiv:1312.6114; Higgins et al. 2017, beta-VAE; Kingma et al. 2016,
        appendix C, arXiv:1606.04934.

    >>> from functorch_gen import models, nn, vae
    >>> net = models.EncoderDecoder(nn.Linear(4, 2 * 3), nn.Linear(3, 4))
    >>> params, key, x = net.init(random.key(0)), random.key(1), torch.ones(5, 4)
    >>> elbo(net, params, key, x, likelihood=vae.Gaussian(), beta=0.5).shape
    torch.Size([5])
    """
    check_choice("elbo", "kl", kl, ("analytic", "monte_carlo"))
    check_number("elbo", "beta", beta, low=0)
    check_number("elbo", "free_bits", 0 if free_bits is None else free_bits, low=0)
    q = posterior(net, params, x)
    z = q.sample(key)
    divergence = q.kl() if kl == "analytic" else q.kl(z)
    if free_bits is not None:
        divergence = torch.where(divergence.mean(0) < free_bits, free_bits, divergence)
    return likelihood.log_prob(net.decode(params, z), x) - beta * sum_per_example(divergence)


def log_weights(
    net: Net, params: Params, key: Key, x: Tensor, *, likelihood: Likelihood, k: int, sticking: bool = False
) -> Tensor:
    """log w_i = log p(x, z_i) - log q(z_i | x) of k draws of z: (b, ...) -> (k, b). The mean of w_i is p(x).

    Args:
        sticking: holds q's mean and variance constant in log q(z | x), as :func:`iwae` does for ``"stl"``.
    Raises:
        ValueError: if k < 1.

    >>> from functorch_gen import models, nn, vae
    >>> net = models.EncoderDecoder(nn.Linear(4, 2 * 3), nn.Linear(3, 4))
    >>> params, key, x = net.init(random.key(0)), random.key(1), torch.ones(5, 4)
    >>> log_weights(net, params, key, x, likelihood=vae.Gaussian(), k=2).shape
    torch.Size([2, 5])
    """
    check_sizes("log_weights", k=k)
    q = posterior(net, params, x)
    density = stop_gradient(q) if sticking else q
    return vmap(lambda key: _log_weight(net, params, x, q.sample(key), density, likelihood))(random.split(key, k))


def _log_weight(net: Net, params: Params, x: Tensor, z: Tensor, q: Posterior, likelihood: Likelihood) -> Tensor:
    """log p(x | z) + log N(z; 0, 1) - log q(z | x): (b, d, ...) -> (b,)."""
    log_joint = likelihood.log_prob(net.decode(params, z), x) + sum_per_example(_log_normal(z))
    return log_joint - q.log_prob(z)


def iwae(
    net: Net, params: Params, key: Key, x: Tensor, *, likelihood: Likelihood, k: int, gradient: str = "total"
) -> Tensor:
    """log (1/k) sum_i w_i, w_i = p(x, z_i) / q(z_i | x), z_i drawn from q: (b, ...) -> (b,).

    In expectation a lower bound on log p(x) that rises with k; k = 1 is the ELBO. The value is the same for all
    gradients, and so is the expected gradient of the decoder; of the encoder's, with v_i = w_i / sum_j w_j:

    ==========  ========================================================================================
    "total"     the derivative of the bound; its signal falls beneath its noise as k grows
    "stl"       sum_i v_i dlog w_i/dz_i dz_i, without the derivative of log q by its own mean and variance.
                No variance where q is the true posterior. Unbiased for k = 1, biased beyond
    "dreg"      sum_i v_i^2 dlog w_i/dz_i dz_i: unbiased for every k, and no variance there either
    ==========  ========================================================================================

    The last two are estimators: derivatives of them are not those of the bound. ``"dreg"`` evaluates the decoder a
    second time, for the weights.

    Raises:
        ValueError: if k < 1, or ``gradient`` is another name.
    Source: Burda et al. 2016, eq. 8, arXiv:1509.00519; Roeder et al. 2017, arXiv:1703.09194; Tucker et al. 2019,
        arXiv:1810.04152.

    >>> from functorch_gen import models, nn, vae
    >>> net = models.EncoderDecoder(nn.Linear(4, 2 * 3), nn.Linear(3, 4))
    >>> params, key, x = net.init(random.key(0)), random.key(1), torch.ones(5, 4)
    >>> iwae(net, params, key, x, likelihood=vae.Gaussian(), k=8, gradient="dreg").shape
    torch.Size([5])
    """
    check_choice("iwae", "gradient", gradient, ("total", "stl", "dreg"))
    check_sizes("iwae", k=k)
    if gradient == "dreg":
        return _dreg(net, params, key, x, likelihood, k)
    log_w = log_weights(net, params, key, x, likelihood=likelihood, k=k, sticking=gradient == "stl")
    return numerics.logsumexp(log_w, 0) - math.log(k)


def _dreg(net: Net, params: Params, key: Key, x: Tensor, likelihood: Likelihood, k: int) -> Tensor:
    """The bound with sum_i v_i dlog w_i as the gradient of the decoder, and v_i^2 for v_i on the way through z."""
    q = posterior(net, params, x)
    z, density = vmap(q.sample)(random.split(key, k)), stop_gradient(q)

    def log_weight(params: Params, z: Tensor) -> Tensor:
        return vmap(lambda z: _log_weight(net, params, x, z, density, likelihood))(z)

    log_w = stop_gradient(log_weight(stop_gradient(params), stop_gradient(z)))
    v = log_w.softmax(0)
    of_z = rearrange(v, f"k b -> k b {'1 ' * (z.ndim - 2)}")
    damped = stop_gradient(z) + of_z * (z - stop_gradient(z))  # z, whose gradient is multiplied by v
    surrogate = (v * log_weight(params, damped)).sum(0)
    return numerics.logsumexp(log_w, 0) - math.log(k) + (surrogate - stop_gradient(surrogate))


def log_prob(
    net: Net, params: Params, key: Key, x: Tensor, *, likelihood: Likelihood, k: int = 1000, batch_size: int = 100
) -> Tensor:
    """log p(x) by importance sampling, :func:`iwae` of many draws in little memory: (b, ...) -> (b,).

    Args:
        batch_size: draws computed at once.
    Raises:
        ValueError: if ``k`` or ``batch_size`` < 1.

    >>> from functorch_gen import models, nn, vae
    >>> net = models.EncoderDecoder(nn.Linear(4, 2 * 3), nn.Linear(3, 4))
    >>> params, key, x = net.init(random.key(0)), random.key(1), torch.ones(5, 4)
    >>> log_prob(net, params, key, x, likelihood=vae.Gaussian(), k=200).shape
    torch.Size([5])
    """
    check_sizes("log_prob", k=k, batch_size=batch_size)
    q = posterior(net, params, x)

    def log_weight(key: Key) -> Tensor:
        return _log_weight(net, params, x, q.sample(key), q, likelihood)

    log_w = transforms.map(log_weight, random.split(key, k), batch_size=batch_size)
    return numerics.logsumexp(log_w, 0) - math.log(k)
