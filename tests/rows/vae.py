"""Rows of variational autoencoders: bounds, likelihoods, codes, the latent space; a full row of each kind."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import vae
from functorch_gen.typing import Params, Tree


@dataclass(frozen=True)
class Net:
    """One latent number for each of the data's."""

    def encode(self, params: Params, x: Tensor) -> Tensor:
        return torch.cat([params["a"] * x, params["s"] + 0.1 * x], 1)

    def decode(self, params: Params, code: Tensor) -> Tensor:
        return torch.tanh(params["w"] * code)


NET = Net()


def model(d: Draw) -> tuple[Tree, ...]:
    return {name: d(2) for name in ("a", "s", "w")}, d.key(), d(2, 2)


def bound(name: str, **options: Any) -> Case:
    fun = partial(getattr(vae, name), NET, likelihood=vae.Gaussian(0.8), **options)
    return from_draw(f"vae.{name}", lambda params, key, x: fun(params, key, x), model)


def bound_alike(name: str, fun: Callable[..., Tree], **skip: Any) -> Case:
    return from_draw(f"vae.{name}", fun, model, table=ALIKE, **skip)


def elbo_of_parts(params: Params, key: Tensor, x: Tensor) -> Tensor:
    options = {"kl": "monte_carlo", "beta": 0.5, "free_bits": 0.3}
    return vae.elbo(NET, params, key, x, likelihood=vae.Gaussian(None), **options)


def posterior(params: Params, x: Tensor, z: Tensor) -> Tree:
    q = vae.posterior(NET, params, x)
    return q, q.kl(), q.kl(z), q.log_prob(z)


def reconstruct(params: Params, key: Tensor, x: Tensor) -> Tree:
    return [vae.reconstruct(NET, params, x, likelihood=vae.Bernoulli(), key=k) for k in (None, key)]


def sample(params: Params, key: Tensor, x: Tensor) -> Tensor:
    return vae.sample(key, NET, params, (3, 2), likelihood=vae.Gaussian(0.8), noise=True, dtype=x.dtype)


def mixture(output: Tensor, labels: Tensor) -> Tree:
    likelihood = vae.DiscretizedLogisticMixture(levels=5)
    return likelihood.log_prob(output, labels), likelihood.mean(output)


def categorical(output: Tensor, labels: Tensor) -> Tree:
    likelihood = vae.Categorical(levels=3)
    return likelihood.log_prob(output, labels), likelihood.mean(output)


def vq(state: Tree, key: Tensor, x: Tensor) -> Tree:
    return vae.VQ(3, 2, threshold=0.0)({}, state, x, train=True, key=key)


def vq_args(d: Draw) -> tuple[Tree, ...]:
    codebook = torch.tensor([[2.0, 2.0], [-2.0, 2.0], [0.0, -2.0]], dtype=torch.float64)  # far apart: no ties
    return {"codebook": codebook, "sums": d(3, 2), "counts": d.times(3)}, d.key(), codebook[:2] + 0.3 * d(2, 2)


ESTIMATOR = "straight through: the derivative is by intention not that of a step function"
ESTIMATE = "the gradient is an estimator, by intention not the derivative of the value"

CASES = [
    bound("elbo"),
    bound("iwae", k=2),
    from_draw("vae.elbo, all options", elbo_of_parts, model, table=ALIKE),
    from_draw("vae.posterior", posterior, lambda d: (model(d)[0], d(2, 2), d(2, 2)), table=ALIKE),
    bound_alike(
        "log_prob", lambda p, k, x: vae.log_prob(NET, p, k, x, likelihood=vae.Gaussian(0.8), k=4, batch_size=3)
    ),
    bound_alike("log_weights", lambda p, k, x: vae.log_weights(NET, p, k, x, likelihood=vae.Gaussian(0.8), k=2)),
    bound_alike(
        "iwae stl",
        lambda p, k, x: vae.iwae(NET, p, k, x, likelihood=vae.Gaussian(0.8), k=2, gradient="stl"),
        derivatives=ESTIMATE,
    ),
    bound_alike(
        "iwae dreg",
        lambda p, k, x: vae.iwae(NET, p, k, x, likelihood=vae.Gaussian(0.8), k=2, gradient="dreg"),
        derivatives=ESTIMATE,
    ),
    bound_alike("reconstruct", reconstruct),
    from_draw("vae.sample", sample, model, table=ALIKE),
    from_draw("vae.Bernoulli", vae.Bernoulli().log_prob, lambda d: (d(2, 3), d.times(2, 3)), table=ALIKE),
    from_draw("vae.optimal_std", vae.optimal_std, lambda d: (d(2, 3), d(2, 3)), table=ALIKE),
    from_draw("vae.Categorical", categorical, lambda d: (d(2, 6, 2), d.labels(3, 2, 2, 2)), table=ALIKE),
    from_draw("vae.DiscretizedLogisticMixture", mixture, lambda d: (0.3 * d(2, 6, 2), d.labels(5, 2, 1, 2))),
    from_draw(
        "vae.interpolate",
        partial(vae.interpolate, kind="spherical"),
        lambda d: (d(2, 3), d(2, 3), d.times(2)),
        table=ALIKE,
    ),
    from_draw("vae.VQ", vq, vq_args, derivatives=ESTIMATOR),
    from_draw("vae.FSQ", lambda x: vae.FSQ((3, 4))({}, x), lambda d: (d(3, 2),), derivatives=ESTIMATOR),
    from_draw(
        "vae.perplexity",
        lambda codes: vae.perplexity(codes, 4),
        lambda d: (d.labels(4, 6),),
        dtype="float32 of integers",
    ),
    from_draw(
        "vae.straight_through",
        lambda z: vae.straight_through(z, z.round()),
        lambda d: (d(3),),
        derivatives="the gradient is that of the vector, not of the value, which is a step function",
    ),
    from_draw(
        "vae.pullback_metric",
        lambda w, z: vae.pullback_metric(lambda z: torch.tanh(z @ w), z),
        lambda d: (d(2, 3), d(2, 2)),
    ),
    from_draw(
        "vae.jacobian_spectrum",
        lambda w, z: vae.jacobian_spectrum(lambda z: torch.tanh(z @ w), z),
        lambda d: (d(2, 3), d(2, 2)),
        table=ALIKE,
    ),
]
