"""Compound operations written out so that a CPU's loops over them are fast, where torch's own way is not."""

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

__all__ = ["DECOMPOSITIONS", "group_norm", "group_norm_backward", "nll_loss_backward", "weight_gradient"]


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _per_channel(x: Tensor, like: Tensor) -> Tensor:
    """(n, c) -> (n, c, 1, ...), to be combined with ``like``."""
    return x.reshape(*x.shape, *[1] * (like.ndim - 2))


def _over_pixels(x: Tensor) -> Tensor:
    """The sum over all axes but the first two: whole vectors of channels or of pixels, whichever lie side by side."""
    return x.sum(list(range(2, x.ndim)))


def _split(x: Tensor | None, groups: int) -> Tensor:
    """(c,) or (n, c) -> (..., groups, c / groups); None is 1."""
    return torch.ones(()) if x is None else rearrange(x, "... (g s) -> ... g s", g=groups)


def _stored(x: Tensor) -> Tensor:
    """(n, groups, size) -> (n, c): computed to memory, where Inductor would repeat it for every pixel."""
    n, groups, size = x.shape
    return x.contiguous().as_strided((n, groups * size), (groups * size, 1))


def group_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, n: int, c: int, pixels: int, groups: int, eps: float
) -> Any:
    """``aten.native_group_norm``: y, mean and 1 / std of each group; the variance is taken about the mean."""
    if x.ndim < 3 or not x.numel():
        return NotImplemented
    z, size = _precise(x), c // groups
    mean = _split(_over_pixels(z), groups).sum(2) / (pixels * size)
    wide = mean[:, :, None].expand(n, groups, size)
    centred = z - _per_channel(_stored(wide.clone()), z)
    rstd = (_split(_over_pixels(centred * centred), groups).sum(2) / (pixels * size) + eps).rsqrt()
    scale = rstd[:, :, None].expand(n, groups, size) * _split(weight, groups)
    shift = (0.0 if bias is None else _split(bias, groups)) - wide * scale
    y = z * _per_channel(_stored(scale), z) + _per_channel(_stored(shift), z)
    return y.to(x.dtype), mean.to(x.dtype), rstd.to(x.dtype)


def group_norm_backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
    n: int, c: int, pixels: int, groups: int, output_mask: list[bool],
) -> Any:  # fmt: skip
    """``aten.native_group_norm_backward``: dx = c1 grad + c2 x + c3 with coefficients from two sums over pixels."""
    if x.ndim < 3 or not x.numel():
        return NotImplemented
    g, z, mean, rstd = _precise(grad), _precise(x), _precise(mean)[:, :, None], _precise(rstd)[:, :, None]
    w, size = _split(weight, groups), c // groups
    products, sums = _split(_over_pixels(g * z), groups), _split(_over_pixels(g), groups)
    of_products, of_sums = (products * w).sum(2, keepdim=True), (sums * w).sum(2, keepdim=True)
    c2 = (of_sums * mean - of_products) * rstd * rstd * rstd / (pixels * size)
    c3 = -c2 * mean - of_sums * rstd / (pixels * size)
    c1, c2, c3 = [_per_channel(_stored(k.expand(n, groups, size).clone()), z) for k in (rstd * w, c2, c3)]
    d_weight = ((products - sums * mean) * rstd).sum(0).flatten()
    grads = (c1 * g + c2 * z + c3).to(x.dtype), d_weight.to(x.dtype), sums.sum(0).flatten().to(x.dtype)
    return tuple(d if wanted else None for d, wanted in zip(grads, output_mask, strict=True))


def nll_loss_backward(
    grad: Tensor, x: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int, total: Tensor
) -> Any:
    """``aten.nll_loss_backward`` for classes (b, c): by comparison with the class numbers, without a scatter."""
    if x.ndim != 2 or weight is not None:
        return NotImplemented
    share = grad / total if reduction == 1 else grad
    hit = torch.arange(x.shape[1], device=x.device) == target[:, None]
    wanted = hit & (target != ignore_index)[:, None]
    return torch.where(wanted, -(share[:, None] if share.ndim else share), 0.0).to(x.dtype)


_aten: Any = torch.ops.aten


def weight_gradient(
    x: Tensor, w: Tensor, bias: Tensor | None, stride: list[int], padding: list[int], dilation: list[int],
    transposed: bool, output_padding: list[int], groups: int,
) -> Any:  # fmt: skip
    """A convolution with a kernel of the size of images as what it is: the gradient of the weight of another one.

    torch writes it so in the second derivative (of a gradient penalty, say), with channels and batch interchanged, for
    which oneDNN's kernels are two to three times slower.
    """
    if bias is not None or transposed or groups != 1 or x.ndim != 4 or not (_is_turned(x) and _is_turned(w)):
        return NotImplemented
    axes = list(zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True))
    kernel = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
    output = [(n + 2 * p - s * (k - 1) - 1) // d + 1 for (n, _, s, p, d), k in zip(axes, kernel, strict=True)]
    if output != list(w.shape[2:]) or max(kernel) > max(output):
        return NotImplemented
    like = x.new_empty(()).expand(w.shape[0], x.shape[0], *kernel)
    _, gradient, _ = _aten.convolution_backward.default(
        w.transpose(0, 1), x.transpose(0, 1), like, None, dilation, padding, stride, False, [0, 0], 1,
        [False, True, False],
    )  # fmt: skip
    return gradient.transpose(0, 1)


def _is_turned(x: Tensor) -> bool:
    """Whether the first two axes have changed places, or may have."""
    return x.stride(0) <= x.stride(1)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.convolution.default: weight_gradient,
    _aten.native_group_norm.default: group_norm,
    _aten.native_group_norm_backward.default: group_norm_backward,
    _aten.nll_loss_backward.default: nll_loss_backward,
    _aten._neg_view.default: torch.neg,  # generated loops know no lazy signs
}
