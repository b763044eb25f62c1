"""torch's normalisations without writing in place, and with derivatives of every order.

The saved mean and deviation of ``F.layer_norm``, ``F.batch_norm`` and ``F.instance_norm`` are constants to torch's
forward rules, which makes derivatives of forward mode wrong without an error (pytorch issues 196699 and 196700);
``F.group_norm`` has them right.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from functorch_gen.interop.record import Record
from functorch_gen.numerics import norm
from functorch_gen.transforms.context import is_transformed

__all__ = ["NORMS", "weight_norm"]


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    record: Record, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not is_transformed():
        return F.layer_norm(input, normalized_shape, weight, bias, eps)
    rows = F.group_norm(input.reshape(-1, 1, math.prod(normalized_shape)), 1, eps=eps)
    return _affine(rows.reshape(input.shape), weight, bias)


def _batch_norm(
    record: Record, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None,
    weight: Tensor | None = None, bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    """Source: Ioffe and Szegedy 2015, algorithms 1 and 2, arXiv:1502.03167."""
    if training or running_mean is None or running_var is None:
        channels = input.transpose(0, 1)
        if training:
            _move(record, (running_mean, running_var), channels.flatten(1), momentum)
        y = F.group_norm(channels.reshape(1, channels.shape[0], -1), channels.shape[0], weight, bias, eps)
        return y.reshape(channels.shape).transpose(0, 1)
    along = (-1, *[1] * (input.ndim - 2))  # torch's kernel has no derivatives in the statistics
    mean, scale = record.value(running_mean), torch.rsqrt(record.value(running_var) + eps)
    y = (input - mean.reshape(along)) * scale.reshape(along)
    weight, bias = (None if x is None else x.reshape(along) for x in (weight, bias))
    return _affine(y, weight, bias).to(input.dtype)


def _instance_norm(
    record: Record, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(record, input, running_mean, running_var, weight, bias, False, momentum, eps)
    _move(record, (running_mean, running_var), input.flatten(2), momentum)
    return F.group_norm(input, input.shape[1], weight, bias, eps)


def _move(record: Record, buffers: tuple[Tensor | None, Tensor | None], x: Tensor, momentum: float) -> None:
    """running <- (1 - momentum) running + momentum (mean, unbiased variance) of (..., c, n), a constant."""
    for old, moment in zip(buffers, (torch.mean, torch.var), strict=True):
        if old is not None:
            now = moment(x.detach().to(old.dtype), -1)
            record.write(old, (1 - momentum) * record.value(old) + momentum * (now.mean(0) if now.ndim > 1 else now))


def _normalize(
    record: Record, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Tensor:
    """By ``out=``, which has no transforms, spectral_norm writes its buffers, as constants."""
    y = F.normalize(input, p, dim, eps)
    return y if out is None else out.copy_(y.detach())


def weight_norm(record: Record, v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """``torch._weight_norm``, g v / |v|, in forward mode too.

    Source: Salimans and Kingma 2016, eq. 2, arXiv:1602.07868.
    """
    axes = [i for i in range(v.ndim) if dim == -1 or i != dim % v.ndim]
    return v * (g / norm(v, tuple(axes), keepdim=dim != -1))


NORMS: dict[Any, Callable[..., Tensor]] = {
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
    F.layer_norm: _layer_norm,
    F.normalize: _normalize,
}
"""What stands for torch's functions; each takes the record of the call first."""
