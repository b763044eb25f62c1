"""The derivatives of a flat function as flat functions again: what the rules of remat and scan are made of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_gen.transforms.context import differentiating, is_differentiable

__all__ = ["Flat", "dense_output", "pull_back", "push_forward"]

Flat = Callable[..., tuple[Tensor, ...]]
"""Tensors in, a tuple of tensors out."""


def dense_output(x: Tensor) -> Tensor:
    """Forward mode gives tangents the layout of the output, which an expanded tensor does not have."""
    expanded = any(stride == 0 and n > 1 for stride, n in zip(x.stride(), x.shape, strict=True))
    return x.clone(memory_format=torch.contiguous_format) if expanded else x


def _at(flat: Flat, at: Sequence[int], xs: Sequence[Tensor]) -> Flat:
    """``flat`` as a function of the inputs ``at`` alone."""

    def partial(*varied: Tensor) -> tuple[Tensor, ...]:
        full = list(xs)
        for i, x in zip(at, varied, strict=True):
            full[i] = x
        return tuple(flat(*full))

    return partial


def pull_back(flat: Flat, at: Sequence[int], count: int) -> Flat:
    """(*xs, *cotangents of the floating outputs) -> the cotangents of the inputs ``at``; there are ``count`` xs."""

    def pull(*both: Tensor) -> tuple[Tensor, ...]:
        xs, cotangents = both[:count], both[count:]
        varied = _at(flat, at, xs)

        def floating(*inputs: Tensor) -> tuple[Tensor, ...]:
            return tuple(x for x in varied(*inputs) if is_differentiable(x))

        inputs = [xs[i] for i in at]
        nested = torch._C._are_functorch_transforms_active()
        if nested or (torch.is_grad_enabled() and any(x.requires_grad for x in both)):
            with torch.enable_grad():  # a custom rule below may run with it off
                return torch.func.vjp(floating, *inputs)[1](tuple(cotangents))
        return _pull_back_once(floating, inputs, cotangents)

    return pull


def _pull_back_once(floating: Flat, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """At top level: without a graph of the backward pass."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        pairs = [(y, c) for y, c in zip(floating(*leaves), cotangents, strict=True) if y.requires_grad]
    if not pairs or not leaves:
        return tuple(torch.zeros_like(x) for x in leaves)
    return torch.autograd.grad(
        [y for y, _ in pairs], leaves, [c for _, c in pairs], materialize_grads=True, allow_unused=True
    )


def push_forward(
    flat: Flat, at: Sequence[int], count: int
) -> Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """(*xs, *tangents of the inputs ``at``) -> (the outputs, the tangents of the floating ones)."""

    def push(*both: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        xs, tangents = both[:count], both[count:]
        if not at:
            outputs = tuple(flat(*xs))
            return outputs, tuple(torch.zeros_like(y) for y in outputs if is_differentiable(y))
        primals = tuple(dense_output(xs[i]) for i in at)
        with differentiating():
            pushed: Any = torch.func.jvp(_at(flat, at, xs), primals, tuple(dense_output(t) for t in tangents))
        outputs, moved = pushed
        # torch gives the tangent of a 0-d tensor beside a number the number's dtype
        return outputs, tuple(t.to(y.dtype) for y, t in zip(outputs, moved, strict=True) if is_differentiable(y))

    return push
