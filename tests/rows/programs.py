"""Rows: programs as research scripts write them. Losses, meta-gradients, reparametrised draws."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from zoo_case import Case, Draw, from_draw

from functorch_gen import models, nn, optim, random, tree
from functorch_gen.transforms import grad, jvp, remat, vmap
from functorch_gen.typing import Key, Layer, Params, Tree

# Losses.


TRANSFORMER = models.GPT(vocab_size=5, context=4, num_layers=2, num_heads=2, embed_dim=4, dropout=0.2)
DECODER = nn.MLP(2, (3,), 4, activation=torch.tanh)
ENCODER = nn.MLP(4, (3,), 4, activation=F.silu)


def drawn(layer: Layer) -> Callable[[Draw], Params]:
    shapes = layer.init(random.key(0))
    return lambda d: tree.scale(d.like(shapes), 0.5)


def next_token(params: Params, key: Key, tokens: Tensor) -> Tensor:
    logits = TRANSFORMER(params, tokens[:, :-1], key=key)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


def cross_entropy(params: Tree, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x @ params["w"] + params["b"], labels, label_smoothing=0.1, reduction="none")


def elbo(params: Tree, key: Key, x: Tensor) -> Tensor:
    """Negative evidence lower bound of a Gaussian VAE, by one reparametrised draw (Kingma and Welling 2014, eq. 10)."""
    mean, log_variance = ENCODER(params["encoder"], x).chunk(2, -1)
    z = mean + torch.exp(0.5 * log_variance) * random.normal(key, mean.shape, mean.dtype)
    divergence = 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).sum(-1)
    return (DECODER(params["decoder"], z) - x).square().sum(-1) + divergence


def contrastive(x: Tensor, y: Tensor) -> Tensor:
    """InfoNCE (van den Oord et al. 2018, eq. 4)."""
    scores = F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T / 0.5
    return F.cross_entropy(scores, torch.arange(len(x)))


def gradient_penalty(params: Tree, x: Tensor) -> Tensor:
    """Of a critic's slope (Gulrajani et al. 2017, eq. 3): a gradient inside the function."""
    slopes = vmap(grad(lambda x: DECODER(params, x).sum()))(x)
    return (vmap(tree.norm)(slopes) - 1).square()


def mean_flow(params: Tree, key: Key, x: Tensor, t: Tensor) -> Tensor:
    """MeanFlow (Geng et al. 2025, eq. 11): the average velocity's regression target, a jvp inside the function."""
    noise = random.normal(key, x.shape, x.dtype)
    x_t, velocity = (1 - t) * x + t * noise, noise - x

    def average(x_t: Tensor, t: Tensor) -> Tensor:
        return ENCODER(params, torch.cat([x_t, t.expand(len(x_t), 1), t.expand(len(x_t), 1)], -1))[:, :2]

    found, change = jvp(average, (x_t, t), (velocity, torch.ones_like(t)))
    return (found - velocity + t * change).square().mean()


LOSSES = [
    from_draw("GPT loss with dropout", next_token, lambda d: (drawn(TRANSFORMER)(d), d.key(), d.labels(5, 2, 4))),
    from_draw("cross-entropy", cross_entropy, lambda d: ({"w": d(2, 3), "b": d(3)}, d(4, 2), d.labels(3, 4))),
    from_draw(
        "VAE elbo", elbo, lambda d: ({"encoder": drawn(ENCODER)(d), "decoder": drawn(DECODER)(d)}, d.key(), d(2, 4))
    ),
    from_draw("contrastive loss", contrastive, lambda d: (d(3, 2), d(3, 2))),
    from_draw("gradient penalty", gradient_penalty, lambda d: (drawn(DECODER)(d), d(3, 2))),
    from_draw("MeanFlow loss", mean_flow, lambda d: (drawn(ENCODER)(d), d.key(), d(3, 2), d.times())),
]

# Meta-gradients: two updates of an optimizer, by the gradients of a loss, as a function of where and how they start.


def meta_gradient(name: str, optimizer: Callable[[Tensor], optim.GradientTransformation]) -> Case:
    def inner_loss(params: Tree, x: Tensor) -> Tensor:
        return torch.tanh(x @ params["w"] + params["b"]).square().mean()

    def fun(params: Tree, learning_rate: Tensor, x: Tensor) -> Tree:
        tx = optimizer(learning_rate)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grad(remat(inner_loss))(params, x), state, params)
            params = optim.apply_updates(params, updates)
        return params, inner_loss(params, x)

    return from_draw(f"meta-gradient of {name}", fun, lambda d: ({"w": d(2, 2), "b": d(2)}, d.times(), d(3, 2)))


META = [
    meta_gradient("sgd", lambda rate: optim.sgd(rate, momentum=0.9)),
    meta_gradient("adam", optim.adam),
    meta_gradient("clipped adamw", lambda rate: optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(rate))),
]

# Draws, moved and scaled.


def reparametrised(name: str, sample: Callable[..., Tensor], *args: float) -> Case:
    def fun(key: Key, location: Tensor, scale: Tensor) -> Tensor:
        return location + torch.exp(scale) * sample(key, *args, location.shape, location.dtype)

    return from_draw(f"reparametrised {name}", fun, lambda d: (d.key(), d(3), d(3)))


def relaxed(key: Key, logits: Tensor) -> Tensor:
    """The Gumbel softmax (Jang et al. 2017, eq. 2)."""
    return F.softmax((logits + random.gumbel(key, logits.shape, logits.dtype)) / 0.7, dim=-1)


DRAWS = [
    reparametrised("normal", random.normal),
    reparametrised("uniform", random.uniform),
    reparametrised("exponential", random.exponential),
    reparametrised("laplace", random.laplace),
    reparametrised("truncated normal", random.truncated_normal, -1.0, 2.0),
    from_draw("Gumbel softmax", relaxed, lambda d: (d.key(), d(2, 3))),
]

CASES = [*LOSSES, *META, *DRAWS]
