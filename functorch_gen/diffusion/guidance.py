"""Guidance: denoisers made of denoisers, which lead where a label, a classifier or a better model points.

Each takes ``denoise(x_t, t)`` and returns one, so that every sampler serves.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_number, check_shape
from functorch_gen.losses.per_example import check_alike
from functorch_gen.noise import NoiseSchedule, expand
from functorch_gen.transforms import grad
from functorch_gen.typing import Number

__all__ = ["guide", "guide_by_classifier", "guide_network", "interval_scale", "shift_of_score"]

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> estimate of x: (b, ...), (b,) -> (b, ...)."""

Scale: TypeAlias = Number | Callable[[Tensor], Tensor]
"""A number, or a function of t: (b,) -> (b,)."""


def guide(denoise: Denoise, denoise_unconditional: Denoise, scale: Scale, *, rescale: Number = 0.0) -> Denoise:
    """Guided denoiser D_u + scale (D_c - D_u); 1 is the conditional one, 0 the unconditional.

    With a worse model of the same data in the place of ``denoise_unconditional`` (smaller, or less trained) this is
    autoguidance (Karras et al. 2024, arXiv:2406.02507).

    Args:
        scale: a number, or a function of t (b,) that gives one of each example, as :func:`interval_scale` does.
        rescale: in [0, 1], how far the standard deviation of each guided estimate is brought back to that of the
            conditional one; large scales overexpose without it (Lin et al. 2024, section 3.4, arXiv:2305.08891).
    Raises:
        ValueError: if ``rescale`` is not in [0, 1]; by the denoiser, if the two estimates differ in shape.
    Source: Ho and Salimans 2022, eq. 6 with scale = 1 + w, arXiv:2207.12598.

    >>> guided = guide(lambda x_t, t: x_t, lambda x_t, t: torch.zeros_like(x_t), 2.0)
    >>> guided(torch.ones(1, 2), torch.ones(1))
    tensor([[2., 2.]])
    """
    check_number("guide", "rescale", rescale, low=0, high=1)

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = denoise(x_t, t), denoise_unconditional(x_t, t)
        check_alike("guide", denoise=conditional, denoise_unconditional=unconditional)
        return _extrapolate(unconditional, conditional, scale(t) if callable(scale) else scale, rescale)

    return guided


def guide_network(
    network: Callable[[Tensor, Tensor, Tensor], Tensor],
    label: Tensor,
    null_label: int,
    scale: Number,
    *,
    rescale: Number = 0.0,
) -> Callable[[Tensor, Tensor], Tensor]:
    """Guided network of the labels (b,), evaluated with and without them in one batch of twice the size.

    Guiding the output guides the denoised estimate alike, since that is linear in the output.

    Args:
        network: ``network(x_t, condition, label) -> output``.
        null_label: the label by which the network knows that there is none.
        rescale: as in :func:`guide`, of the network's outputs, as in the paper.
    Raises:
        ValueError: if ``rescale`` is not in [0, 1]; by the network returned, if ``label`` and ``x_t`` differ in their
            first axis.

    >>> network = guide_network(lambda x_t, t, label: x_t * label[:, None], torch.tensor([1]), 0, 3.0)
    >>> network(torch.ones(1, 2), torch.ones(1))
    tensor([[3., 3.]])
    """
    check_number("guide_network", "rescale", rescale, low=0, high=1)

    def guided(x_t: Tensor, condition: Tensor) -> Tensor:
        if label.shape != x_t.shape[:1]:
            raise ValueError(f"guide_network: label: expected shape {tuple(x_t.shape[:1])}, got {tuple(label.shape)}")
        labels = torch.cat([torch.full_like(label, null_label), label])
        output = network(torch.cat([x_t, x_t]), torch.cat([condition, condition]), labels)
        unconditional, conditional = output.chunk(2)
        return _extrapolate(unconditional, conditional, scale, rescale)

    return guided


def _extrapolate(unconditional: Tensor, conditional: Tensor, scale: Number, rescale: Number) -> Tensor:
    guided = unconditional + expand(scale, conditional) * (conditional - unconditional)
    if isinstance(rescale, int | float) and rescale == 0:
        return guided
    shrink = numerics.divide_no_nan(_deviation(conditional), _deviation(guided))
    return (rescale * shrink + (1 - rescale)) * guided


def _deviation(x: Tensor) -> Tensor:
    """Of each example, but for a factor: (b, ...) -> (b, 1, ...)."""
    flat = x[..., None].flatten(1)
    size = numerics.norm(flat - flat.mean(1, keepdim=True), 1)
    return size.reshape(-1, *[1] * (x.ndim - 1))


def interval_scale(scale: Number, low: Number, high: Number) -> Callable[[Tensor], Tensor]:
    """Scale of guidance in an interval of times: ``scale`` for low < t <= high, else 1, which is none: (b,) -> (b,).

    ``schedule.t_of`` tells the time of a noise level sigma / alpha. Much noise needs no guidance but loses variety by
    it, little noise is not changed by it.

    Source: Kynkaanniemi et al. 2024, section 3, arXiv:2404.07724.

    >>> interval_scale(3.0, 0.2, 0.8)(torch.tensor([0.1, 0.5, 0.9]))
    tensor([1., 3., 1.])
    """

    def scale_at(t: Tensor) -> Tensor:
        return torch.where((low < t) & (t <= high), scale, torch.ones_like(t))

    return scale_at


def guide_by_classifier(
    denoise: Denoise, log_prob: Callable[[Tensor, Tensor], Tensor], *, schedule: NoiseSchedule, scale: Number = 1.0
) -> Denoise:
    """Guided denoiser D + scale (sigma^2 / alpha) grad log p(y | x_t): the classifier's gradient added to the score.

    At 1 and with the true p(y | x_t) it is the denoiser of the data given y, by Bayes' rule. Where alpha is 0, x_t
    tells nothing of the data, and nothing is added.

    Args:
        log_prob: log p(y | x_t) of a classifier of noisy data, for the y that is wanted: (x_t, t), (b, ...), (b,) ->
            (b,). Its examples must not depend on one another.
    Raises:
        ValueError: by the denoiser, if ``log_prob`` does not return (b,).
    Source: Dhariwal and Nichol 2021, algorithm 2, arXiv:2105.05233.

    >>> from functorch_gen.noise import EDM
    >>> towards_one = lambda x_t, t: -0.5 * (x_t - 1).square().sum(1)
    >>> guided = guide_by_classifier(lambda x_t, t: x_t, towards_one, schedule=EDM(sigma_max=1.0))
    >>> guided(torch.zeros(1, 2), torch.ones(1))
    tensor([[1., 1.]])
    """

    def total(x_t: Tensor, t: Tensor) -> Tensor:
        each = log_prob(x_t, t)
        check_shape(each, "b", "guide_by_classifier: log_prob", b=len(x_t))
        return each.sum()

    def guided(x_t: Tensor, t: Tensor) -> Tensor:
        gradient = grad(total)(x_t, t)
        return denoise(x_t, t) + scale * shift_of_score(schedule, x_t, t) * gradient

    return guided


def shift_of_score(schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Number:
    """By how much D moves if the score does by one, sigma^2 / alpha, and 0 where alpha is: (b, 1, ...).

    Tweedie's formula: x_t + sigma^2 score = alpha D.
    """
    return expand(numerics.divide_no_nan(schedule.sigma(t) ** 2, schedule.alpha(t)), x_t)
