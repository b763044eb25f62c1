"""What to do with a trained VAE: reconstruct, sample, interpolate."""

from collections.abc import Sequence

import torch
from torch import Tensor

from functorch_gen import numerics, random
from functorch_gen.check import check_choice
from functorch_gen.typing import Key, Params
from functorch_gen.vae.elbo import Net, posterior
from functorch_gen.vae.likelihoods import Likelihood

__all__ = ["interpolate", "reconstruct", "sample"]


def reconstruct(net: Net, params: Params, x: Tensor, *, likelihood: Likelihood, key: Key | None = None) -> Tensor:
    """The mean of p(x' | z) at the mean of q(z | x), or at a draw of it: (b, ...) -> (b, ...).

    Args:
        key: draws z; None: z is the mean.

    >>> from functorch_gen import models, nn, vae
    >>> net = models.EncoderDecoder(nn.Linear(4, 2 * 3), nn.Linear(3, 4))
    >>> reconstruct(net, net.init(random.key(0)), torch.ones(5, 4), likelihood=vae.Gaussian()).shape
    torch.Size([5, 4])
    """
    q = posterior(net, params, x)
    return likelihood.mean(net.decode(params, q.mean if key is None else q.sample(key)))


def sample(
    key: Key,
    net: Net,
    params: Params,
    shape: Sequence[int],
    *,
    likelihood: Likelihood,
    noise: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The mean of p(x | z), or a draw of it, at z ~ N(0, 1) of the given shape (n, d, ...): -> (n, ...).

    Args:
        noise: draws x too. The mean of x looks cleaner, but is no sample of the model.

    >>> from functorch_gen import models, nn, vae
    >>> net = models.EncoderDecoder(nn.Linear(4, 2 * 3), nn.Linear(3, 4))
    >>> sample(random.key(1), net, net.init(random.key(0)), (5, 3), likelihood=vae.Bernoulli()).shape
    torch.Size([5, 4])
    """
    key_latent, key_data = random.split(key)
    output = net.decode(params, random.normal(key_latent, tuple(shape), dtype))
    return likelihood.sample(key_data, output) if noise else likelihood.mean(output)


def interpolate(start: Tensor, end: Tensor, fractions: Tensor, *, kind: str = "linear") -> Tensor:
    """Codes on the way from ``start`` to ``end``: (b, d), (b, d), (n,) -> (n, b, d).

    Linear: (1 - f) start + f end. Spherical: sin((1 - f) a) / sin(a) start + sin(f a) / sin(a) end, a the angle between
    them, which stays at the distance from 0 at which draws of N(0, 1) lie; the linear way cuts through the ball.
    Between opposite directions there is no shortest arc, and the result is not finite.

    Args:
        kind: ``"linear"`` or ``"spherical"``.
    Raises:
        ValueError: if ``kind`` is another name, or the shapes of the ends differ.
    Source: Shoemake 1985, Animating rotation with quaternion curves; White 2016, section 2.1, arXiv:1609.04468.

    >>> start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> interpolate(start, end, torch.tensor([0.5]), kind="spherical")
    tensor([[[0.7071, 0.7071]]])
    """
    check_choice("interpolate", "kind", kind, ("linear", "spherical"))
    if start.shape != end.shape:
        raise ValueError(f"interpolate: end: expected shape {tuple(start.shape)}, got {tuple(end.shape)}")
    f = fractions.reshape(-1, *[1] * start.ndim)
    if kind == "linear":
        return (1 - f) * start + f * end
    u, v = numerics.normalize(start, dim=-1), numerics.normalize(end, dim=-1)
    angle = 2 * torch.atan2(numerics.norm(u - v, dim=-1, keepdim=True), numerics.norm(u + v, dim=-1, keepdim=True))
    return _ratio(1 - f, angle) * start + _ratio(f, angle) * end


def _ratio(f: Tensor, angle: Tensor) -> Tensor:
    """sin(f a) / sin(a), and its limit f at a = 0."""
    small = angle < 1e-3
    safe = torch.where(small, 1.0, angle)
    return torch.where(small, f, torch.sin(f * safe) / torch.sin(safe))
