"""Classifier-free guidance: away from what a model says of any data, towards what it says of this label."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen.noise import expand
from functorch_gen.typing import Number

__all__ = ["guide", "guide_network"]

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Scale: TypeAlias = Number | Callable[[Tensor], Tensor]


def guide(denoise: Denoise, denoise_unconditional: Denoise, scale: Scale) -> Denoise:
    """Guided denoiser D_u + scale (D_c - D_u); 1 is the conditional one, 0 the unconditional.

    Args:
        scale: a number, or a function of t (b,) that gives one of each example (guidance in an interval of times, say).
    Source: Ho and Salimans 2022, eq. 6 with scale = 1 + w, arXiv:2207.12598.

    >>> guided = guide(lambda x_t, t: x_t, lambda x_t, t: torch.zeros_like(x_t), 2.0)
    >>> guided(torch.ones(1, 2), torch.ones(1))
    tensor([[2., 2.]])
    """

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        factor = scale(t) if callable(scale) else scale
        return _extrapolate(denoise_unconditional(x_t, t), denoise(x_t, t), factor)

    return guided


def guide_network(
    network: Callable[[Tensor, Tensor, Tensor], Tensor], label: Tensor, null_label: int, scale: Number
) -> Callable[[Tensor, Tensor], Tensor]:
    """Guided network of the labels (b,), evaluated with and without them in one batch of twice the size.

    Guiding the output guides the denoised estimate alike, since that is linear in the output.

    Args:
        network: ``network(x_t, condition, label) -> output``.
        null_label: the label by which the network knows that there is none.
    Raises:
        ValueError: by the network returned, if ``label`` and ``x_t`` differ in their first axis.

    >>> network = guide_network(lambda x_t, t, label: x_t * label[:, None], torch.tensor([1]), 0, 3.0)
    >>> network(torch.ones(1, 2), torch.ones(1))
    tensor([[3., 3.]])
    """

    def guided(x_t: Tensor, condition: Tensor) -> Tensor:
        if label.shape != x_t.shape[:1]:
            raise ValueError(f"guide_network: label: expected shape {tuple(x_t.shape[:1])}, got {tuple(label.shape)}")
        labels = torch.cat([torch.full_like(label, null_label), label])
        output = network(torch.cat([x_t, x_t]), torch.cat([condition, condition]), labels)
        unconditional, conditional = output.chunk(2)
        return _extrapolate(unconditional, conditional, scale)

    return guided


def _extrapolate(unconditional: Tensor, conditional: Tensor, scale: Number) -> Tensor:
    return unconditional + expand(scale, conditional) * (conditional - unconditional)
