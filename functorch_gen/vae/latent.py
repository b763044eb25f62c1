"""What to do with a trained VAE: reconstruct, sample, interpolate."""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import numerics, random
from functorch_gen.check import check_choice, check_shape
from functorch_gen.losses.per_example import check_alike
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
    """Codes on the way from ``start`` to ``end``: (b, d, ...), (b, d, ...), (n,) -> (n, b, d, ...).

    Linear: (1 - f) start + f end. Spherical: sin((1 - f) a) / sin(a) start + sin(f a) / sin(a) end, a the angle between
    them, which stays at the distance from 0 at which draws of N(0, 1) lie; the linear way cuts through the ball.
    Between opposite directions there is no shortest arc, and the result means nothing.

    Args:
        kind: ``"linear"`` or ``"spherical"``.
    Raises:
        TypeError: if ``start`` is not floating.
        ValueError: if ``kind`` is another name, or a shape is another.
    Source: Shoemake 1985, Animating rotation with quaternion curves; White 2016, arXiv:1609.04468.

    >>> start, end = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> interpolate(start, end, torch.tensor([0.5]), kind="spherical")
    tensor([[[0.7071, 0.7071]]])
    """
    check_choice("interpolate", "kind", kind, ("linear", "spherical"))
    check_alike("interpolate", start=start, end=end)
    if start.ndim < 2:
        raise ValueError(f"interpolate: start: expected shape (b, d, ...), got {tuple(start.shape)}")
    check_shape(fractions, "n", "interpolate: fractions")
    f = rearrange(fractions.to(start.dtype), f"n -> n {'1 ' * start.ndim}")
    if kind == "linear":
        return (1 - f) * start + f * end
    u, v = (numerics.normalize(rearrange(z, "b ... -> b (...)"), dim=1) for z in (start, end))
    angle = 2 * torch.atan2(numerics.norm(u - v, dim=1), numerics.norm(u + v, dim=1))
    angle, chord = (rearrange(x, f"b -> b {'1 ' * (start.ndim - 1)}") for x in (angle, (u - v).square().sum(1)))
    return _ratio(1 - f, angle, chord) * start + _ratio(f, angle, chord) * end


def _ratio(f: Tensor, angle: Tensor, chord: Tensor) -> Tensor:
    """sin(f a) / sin(a); near a = 0, where a^2 is the squared chord, f + f (1 - f^2) a^2 / 6."""
    small = angle < 1e-3
    safe = torch.where(small, 1.0, angle)
    return torch.where(small, f + f * (1 - f * f) * chord / 6, torch.sin(f * safe) / torch.sin(safe))
