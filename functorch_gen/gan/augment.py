"""Differentiable augmentation: real and generated images alike are changed before the discriminator sees them.

So it cannot learn the few real ones by heart, and the generator does not learn the changes (Zhao et al. 2020). These
change colours. :func:`functorch_gen.data.random_crop` with padding moves images and
:func:`functorch_gen.data.random_erase` cuts squares out of them: differentiable functions of (key, x) too.
"""

from collections.abc import Callable

from einops import reduce
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.typing import Key, Number

__all__ = ["augment", "random_brightness", "random_contrast", "random_saturation"]


def augment(key: Key, x: Tensor, *augmentations: Callable[[Key, Tensor], Tensor]) -> Tensor:
    """Applies functions of (key, x) one after the other, each with a key of its own: (b, c, h, w) -> (b, c, h, w).

    Source: Zhao et al. 2020, algorithm 1, arXiv:2006.10738.

    >>> import torch
    >>> augment(random.key(0), torch.ones(2, 1, 4, 4), random_brightness, random_contrast).shape
    torch.Size([2, 1, 4, 4])
    """
    for part, change in zip(random.split(key, max(1, len(augmentations))), augmentations, strict=False):
        x = change(part, x)
    return x


def _factors(name: str, key: Key, x: Tensor, strength: Number) -> Tensor:
    """Uniform in [-strength, strength], one for each image: -> (b, 1, 1, 1)."""
    check_floating(x, f"{name}: x")
    b = check_shape(x, "b c h w", f"{name}: x")["b"]
    check_number(name, "strength", strength, low=0)
    return (strength * (2 * random.uniform(key, (b, 1, 1, 1), x.dtype) - 1)).to(x.dtype)


def random_brightness(key: Key, x: Tensor, *, strength: Number = 0.5) -> Tensor:
    """Adds a number in [-strength, strength] to each image: (b, c, h, w) -> (b, c, h, w).

    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``x`` is not (b, c, h, w), or ``strength`` < 0.
    Source: Zhao et al. 2020, the authors' code (DiffAugment), arXiv:2006.10738.

    >>> import torch
    >>> random_brightness(random.key(0), torch.zeros(1, 1, 1, 2), strength=1.0).unique().numel()
    1
    """
    return x + _factors("random_brightness", key, x, strength)


def random_saturation(key: Key, x: Tensor, *, strength: Number = 1.0) -> Tensor:
    """Scales each pixel's distance from its grey, the mean of its channels, by 1 +- strength: (b, c, h, w) -> same.

    Raises:
        TypeError, ValueError: as :func:`random_brightness`.
    Source: Zhao et al. 2020, the authors' code (DiffAugment), arXiv:2006.10738.

    >>> import torch
    >>> random_saturation(random.key(0), torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """
    factor = 1 + _factors("random_saturation", key, x, strength)
    grey = reduce(x, "b c h w -> b 1 h w", "mean")
    return grey + factor * (x - grey)


def random_contrast(key: Key, x: Tensor, *, strength: Number = 0.5) -> Tensor:
    """Scales each pixel's distance from the mean of its image by 1 +- strength: (b, c, h, w) -> (b, c, h, w).

    Raises:
        TypeError, ValueError: as :func:`random_brightness`.
    Source: Zhao et al. 2020, the authors' code (DiffAugment), arXiv:2006.10738.

    >>> import torch
    >>> random_contrast(random.key(0), torch.ones(1, 1, 1, 2))
    tensor([[[[1., 1.]]]])
    """
    factor = 1 + _factors("random_contrast", key, x, strength)
    mean = reduce(x, "b c h w -> b 1 1 1", "mean")
    return mean + factor * (x - mean)
