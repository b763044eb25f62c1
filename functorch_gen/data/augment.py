"""Augmentations of images as functions of (key, batch): every example its own draw.

They take (b, c, h, w), are differentiable in the images as often as one likes, and trace; one image is
``random_flip(key, x[None])[0]``, and a batch of keys goes by ``vmap``.
"""

import torch
from einops import repeat
from torch import Tensor
from torch.nn import functional as F

from functorch_gen import random
from functorch_gen.check import check_choice, check_floating, check_number, check_positive, check_shape
from functorch_gen.leaves import at_least_float32
from functorch_gen.typing import Key, Number

__all__ = ["affine", "cutmix", "mixup", "random_affine", "random_crop", "random_erase", "random_flip"]


# Crop, flip, erase.


def random_crop(key: Key, x: Tensor, size: int | tuple[int, int], *, padding: int = 0, fill: float = 0.0) -> Tensor:
    """Cuts a window from a uniform place: (b, c, h, w) -> (b, c, size, size).

    Args:
        size: height and width.
        padding: rows and columns of ``fill`` added on every side first.
    Raises:
        ValueError: if ``x`` is not (b, c, h, w), or smaller than ``size`` after the padding.

    >>> random_crop(random.key(0), torch.arange(16).reshape(1, 1, 4, 4), 2)
    tensor([[[[ 9, 10],
              [13, 14]]]])
    """
    sizes = check_shape(x, "b c h w", "random_crop: x")
    new_h, new_w = (size, size) if isinstance(size, int) else size
    check_positive("random_crop", height=new_h, width=new_w)
    h, w = sizes["h"] + 2 * padding, sizes["w"] + 2 * padding
    if padding < 0 or new_h > h or new_w > w:
        raise ValueError(f"random_crop: expected padding >= 0 and a size of at most ({h}, {w}), got {(new_h, new_w)}")
    padded = F.pad(x, (padding,) * 4, value=fill) if padding else x
    key_top, key_left = random.split(key)
    top = random.randint(key_top, (sizes["b"], 1), 0, h - new_h + 1)
    left = random.randint(key_left, (sizes["b"], 1), 0, w - new_w + 1)
    rows = top + torch.arange(new_h, device=x.device)
    columns = left + torch.arange(new_w, device=x.device)
    return _pixels(padded, rows[:, :, None], columns[:, None, :])


def random_flip(key: Key, x: Tensor, *, p: Number = 0.5, axis: str = "horizontal") -> Tensor:
    """Mirrors each image with probability p: (b, c, h, w) -> (b, c, h, w).

    Args:
        axis: "horizontal" exchanges left and right, "vertical" top and bottom.
    Raises:
        ValueError: if ``x`` is not (b, c, h, w), p not in [0, 1] or the axis another.

    >>> random_flip(random.key(0), torch.arange(3).reshape(1, 1, 1, 3), p=1.0)
    tensor([[[[2, 1, 0]]]])
    """
    b = check_shape(x, "b c h w", "random_flip: x")["b"]
    check_choice("random_flip", "axis", axis, ("horizontal", "vertical"))
    flips = random.bernoulli(key, p, (b, 1, 1, 1))
    return torch.where(flips, x.flip(-1 if axis == "horizontal" else -2), x)


def random_erase(key: Key, x: Tensor, size: int, *, fill: float = 0.0) -> Tensor:
    """Fills a square with a uniform centre, cut off at the edges: (b, c, h, w) -> (b, c, h, w).

    Raises:
        ValueError: if ``x`` is not (b, c, h, w) or ``size`` < 1.
    Source: cutout, DeVries and Taylor 2017, arXiv:1708.04552.

    >>> random_erase(random.key(1), torch.ones(1, 1, 3, 4), 2)
    tensor([[[[1., 1., 1., 1.],
              [1., 0., 0., 1.],
              [1., 0., 0., 1.]]]])
    """
    b, _, h, w = check_shape(x, "b c h w", "random_erase: x").values()
    check_positive("random_erase", size=size)
    sides = torch.full((b,), float(size), device=x.device)
    return torch.where(_box(key, sides, sides, h, w), torch.as_tensor(fill, dtype=x.dtype, device=x.device), x)


def _box(key: Key, height: Tensor, width: Tensor, h: int, w: int) -> Tensor:
    """Which pixels lie in a box of uniform centre: sizes (b,) -> (b, 1, h, w) bool."""
    key_row, key_column = random.split(key)
    inside = [
        (
            (torch.arange(n, device=size.device) + 0.5 - n * random.uniform(k, (*size.shape, 1))).abs()
            < size[:, None] / 2
        )
        for k, n, size in ((key_row, h, height), (key_column, w, width))
    ]
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


# Affine maps.


def affine(
    x: Tensor,
    *,
    degrees: Number = 0.0,
    translate: tuple[Number, Number] = (0.0, 0.0),
    scale: Number = 1.0,
    shear: Number = 0.0,
    fill: float = 0.0,
) -> Tensor:
    """Shears, scales, rotates and moves images, in this order, about their centre: (b, c, h, w) -> (b, c, h, w).

    Bilinear: the output at p is the input at M^-1 (p - translate), M = rotation * scale * shear. Differentiable in the
    images and in all four, piecewise in these.

    Args:
        degrees: counter-clockwise; 90 is ``torch.rot90(x, 1, (-2, -1))``.
        translate: to the right and down, in pixels.
        scale: > 1 enlarges.
        shear: degrees by which vertical lines lean to the right as they go down.
        fill: what lies outside of the images. All numbers but this one may be tensors (b,).
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``x`` is not (b, c, h, w).

    >>> x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    >>> affine(x, translate=(1.0, 0.0))
    tensor([[[[0., 1.],
              [0., 3.]]]])
    """
    check_floating(x, "affine: x")
    b, _, h, w = check_shape(x, "b c h w", "affine: x").values()
    like = at_least_float32(x.new_zeros(b))

    def each(value: Number) -> Tensor:
        return (like + value).to(like.dtype)[:, None, None]

    angle, lean = torch.deg2rad(each(degrees)), torch.tan(torch.deg2rad(each(shear)))
    cos, sin = torch.cos(angle) / each(scale), torch.sin(angle) / each(scale)
    down = torch.arange(h, dtype=like.dtype, device=x.device)[:, None] - (h - 1) / 2 - each(translate[1])
    right = torch.arange(w, dtype=like.dtype, device=x.device) - (w - 1) / 2 - each(translate[0])
    upright, below = cos * right - sin * down, sin * right + cos * down  # rotated and scaled back; rows point down
    return _bilinear(x, below + (h - 1) / 2, upright - lean * below + (w - 1) / 2, fill)


def random_affine(
    key: Key,
    x: Tensor,
    *,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: tuple[float, float] = (1.0, 1.0),
    shear: float = 0.0,
    fill: float = 0.0,
) -> Tensor:
    """:func:`affine` with uniform draws for each image: (b, c, h, w) -> (b, c, h, w).

    Args:
        degrees, shear: drawn from [-degrees, degrees], [-shear, shear].
        translate: the largest shift, as a part of the height and of the width.
        scale: drawn from [scale[0], scale[1]].
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``x`` is not (b, c, h, w), a range is negative, or not 0 < scale[0] <= scale[1].

    >>> x = torch.ones(2, 1, 8, 8)
    >>> torch.equal(random_affine(random.key(0), x), x), torch.equal(random_affine(random.key(0), x, degrees=30), x)
    (True, False)
    """
    b, _, h, w = check_shape(x, "b c h w", "random_affine: x").values()
    check_number("random_affine", "degrees", degrees, low=0)
    check_number("random_affine", "translate", translate, low=0)
    check_number("random_affine", "shear", shear, low=0)
    check_positive("random_affine", scale=scale[0])
    check_number("random_affine", "scale", scale[1], low=scale[0])
    u = random.uniform(key, (5, b), at_least_float32(x).dtype)
    both = 2 * u - 1
    return affine(
        x,
        degrees=degrees * both[0],
        shear=shear * both[1],
        translate=(translate * w * both[2], translate * h * both[3]),
        scale=scale[0] + (scale[1] - scale[0]) * u[4],
        fill=fill,
    )


def _bilinear(x: Tensor, rows: Tensor, columns: Tensor, fill: float) -> Tensor:
    """Images between their pixels: (b, c, h, w), coordinates (b, h', w') -> (b, c, h', w')."""
    top, left = rows.detach().floor(), columns.detach().floor()
    below, right = rows - top, columns - left
    corners = [
        (top, left, (1 - below) * (1 - right)),
        (top, left + 1, (1 - below) * right),
        (top + 1, left, below * (1 - right)),
        (top + 1, left + 1, below * right),
    ]
    h, w = x.shape[-2:]
    wide = at_least_float32(x)
    total = torch.zeros((), dtype=wide.dtype, device=x.device)
    for row, column, weight in corners:
        inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
        pixels = _pixels(wide, row.clamp(0, h - 1).long(), column.clamp(0, w - 1).long())
        total = total + weight[:, None] * torch.where(inside[:, None], pixels, fill)
    return total.to(x.dtype)


def _pixels(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """x[:, :, rows, columns], indices (b, h', w') for each image: (b, c, h, w) -> (b, c, h', w')."""
    index = rows * x.shape[-1] + columns
    flat = repeat(index, "b h w -> b c (h w)", c=x.shape[1])
    return x.flatten(2).gather(2, flat).unflatten(2, index.shape[1:])


# Mixtures of examples.


def mixup(key: Key, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Mixes each example with another of the batch: (b, ...), (b, k) -> (b, ...), (b, k).

    share * example + (1 - share) * other, of the inputs and of the targets, with a share from Beta(1, 1) = U(0, 1) for
    each example; the others are a permutation of the batch.

    Args:
        target: floating: one-hot labels, say.
    Raises:
        TypeError: if ``x`` or ``target`` is not floating.
        ValueError: if they differ in their number of examples.
    Source: Zhang et al. 2018, arXiv:1710.09412, section 2, alpha = 1.

    >>> x, target = mixup(random.key(0), torch.eye(2), torch.eye(2))
    >>> torch.equal(x, target), target.sum(1)
    (True, tensor([1., 1.]))
    """
    b = _check_pair("mixup", x, target)
    key_order, key_share = random.split(key)
    order = random.permutation(key_order, b)
    share = random.uniform(key_share, (b,), at_least_float32(x).dtype)
    return _mix(share, x, x[order]), _mix(share, target, target[order])


def cutmix(key: Key, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Pastes a box of another image of the batch into each: (b, c, h, w), (b, k) -> (b, c, h, w), (b, k).

    The box has the image's proportions, an area uniform in [0, 1] of it and a uniform centre, and is cut off at the
    edges. Targets are mixed by the pixels that were pasted in fact.

    Args:
        target: floating: one-hot labels, say.
    Raises:
        TypeError: if ``target`` is not floating.
        ValueError: if ``x`` is not (b, c, h, w) or the two differ in their number of examples.
    Source: Yun et al. 2019, arXiv:1905.04899, section 3.1, alpha = 1.

    >>> x, target = cutmix(random.key(0), torch.eye(2)[:, :, None, None].expand(2, 2, 8, 8), torch.eye(2))
    >>> torch.equal(x.mean((2, 3)), target)
    True
    """
    b, _, h, w = check_shape(x, "b c h w", "cutmix: x").values()
    _check_pair("cutmix", x, target)
    key_order, key_box, key_area = random.split(key, 3)
    order = random.permutation(key_order, b)
    side = random.uniform(key_area, (b,)).sqrt()
    box = _box(key_box, side * h, side * w, h, w)
    share = 1 - box.to(at_least_float32(target).dtype).mean((1, 2, 3))
    return torch.where(box, x[order], x), _mix(share, target, target[order])


def _check_pair(name: str, x: Tensor, target: Tensor) -> int:
    check_floating(target, f"{name}: target")
    b = check_shape(x[:, None] if x.ndim == 1 else x.flatten(1), "b n", f"{name}: x")["b"]
    check_shape(target, "b k", f"{name}: target", b=b)
    return b


def _mix(share: Tensor, x: Tensor, other: Tensor) -> Tensor:
    """share * x + (1 - share) * other, in at least float32: (b,), (b, ...), (b, ...) -> (b, ...)."""
    start, end = at_least_float32(other), at_least_float32(x)
    return torch.lerp(start, end, share.to(end.dtype).reshape(-1, *[1] * (x.ndim - 1))).to(x.dtype)
