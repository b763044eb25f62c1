"""Bounds on gradients: by element and by global norm."""

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number, check_positive
from functorch_gen.leaves import at_least_float32
from functorch_gen.optim.transformation import GradientTransformation, stateless
from functorch_gen.typing import Number, Tree

__all__ = ["clip", "clip_by_global_norm"]


def _check_bound(name: str, argument: str, value: Number) -> None:
    check_number(name, argument, value)
    if isinstance(value, int | float):
        check_positive(name, **{argument: value})


def clip(max_delta: Number) -> GradientTransformation:
    """Clips every element to [-max_delta, max_delta]. Equals ``optax.clip`` and ``torch.nn.utils.clip_grad_value_``.

    >>> clip(1.0).update([torch.tensor([-3.0, 0.5])], ())[0]
    [tensor([-1.0000,  0.5000])]
    """
    _check_bound("clip", "max_delta", max_delta)

    def transform(grads: Tree, params: Tree, **extra: object) -> Tree:
        return tree.map(lambda g: g.clamp(-max_delta, max_delta).to(g.dtype), grads)

    return stateless("clip", transform)


def clip_by_global_norm(max_norm: Number) -> GradientTransformation:
    """Scales all gradients by one factor, min(1, max_norm / |g|), where |g| is the norm over all leaves.

    Equals ``optax.clip_by_global_norm``; ``torch.nn.utils.clip_grad_norm_`` divides by |g| + 1e-6 instead. The norm is
    taken in at least float32; its derivatives at g = 0 are finite. A NaN anywhere makes every update NaN.

    Source: Pascanu et al. 2013, algorithm 1, arXiv:1211.5063.

    >>> clip_by_global_norm(1.0).update({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, ())[0]
    {'a': tensor([0.6000]), 'b': tensor([0.8000])}
    """
    _check_bound("clip_by_global_norm", "max_norm", max_norm)

    def transform(grads: Tree, params: Tree, **extra: object) -> Tree:
        if not tree.leaves(grads):
            return grads
        norm: Tensor = tree.norm(tree.map(at_least_float32, grads))
        factor = max_norm / torch.where(norm <= max_norm, max_norm, norm)
        return tree.map(lambda g: (factor * g).to(g.dtype), grads)

    return stateless("clip_by_global_norm", transform)
