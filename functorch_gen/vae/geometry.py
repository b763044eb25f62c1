"""The geometry that a decoder gives the latent space: lengths and volumes of what small steps of z make of x."""

from collections.abc import Callable

import torch
from einops import einsum
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.transforms import jacfwd, vmap

__all__ = ["jacobian_spectrum", "pullback_metric"]

Decode = Callable[[Tensor], Tensor]


def _jacobian(name: str, decode: Decode, z: Tensor) -> Tensor:
    """dx/dz of each code, with x flat: (b, d) -> (b, n, d)."""
    check_shape(z, "b d", f"{name}: z")
    # contiguous: torch.compile (2.13) fails on F.linear in vmap(jvp) of a slice, and a posterior's mean is one
    return vmap(jacfwd(lambda z: decode(z.unsqueeze(0)).flatten()))(z.contiguous())


def pullback_metric(decode: Decode, z: Tensor) -> Tensor:
    """J^T J, J the Jacobian of the decoder at z: (b, d) -> (b, d, d).

    |decode(z + dz) - decode(z)|^2 = dz^T (J^T J) dz for small steps; sqrt det(J^T J) is the volume that a unit cube of
    codes takes among the data.

    Args:
        decode: codes to data, each example by itself: ``lambda z: net.decode(params, z)``.
    Raises:
        ValueError: if ``z`` is not (b, d).
    Source: Arvanitidis et al. 2018, arXiv:1710.11379; Shao et al. 2018, arXiv:1711.08014.

    >>> pullback_metric(lambda z: z @ torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]), torch.zeros(1, 2))
    tensor([[[4., 0.],
             [0., 9.]]])
    """
    jacobian = _jacobian("pullback_metric", decode, z)
    return einsum(jacobian, jacobian, "b n i, b n j -> b i j")


def jacobian_spectrum(decode: Decode, z: Tensor) -> Tensor:
    """Singular values of the decoder's Jacobian, the largest first: (b, d) -> (b, min(n, d)).

    How far x moves for a unit step along each principal direction of z. Directions near 0 are not used by the decoder:
    there the posterior has collapsed to the prior.

    Raises:
        ValueError: if ``z`` is not (b, d).

    >>> jacobian_spectrum(lambda z: z @ torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]]), torch.zeros(1, 2))
    tensor([[3., 2.]])
    """
    jacobian = _jacobian("jacobian_spectrum", decode, z)
    return torch.linalg.svdvals(at_least_float32(jacobian)).to(jacobian.dtype)
