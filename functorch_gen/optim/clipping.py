"""Bounds on gradients: by element, by leaf, by unit and by global norm; gradients without mean, and with noise."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import numerics, random, tree
from functorch_gen.check import check_above_zero, check_number, check_shape
from functorch_gen.flat import Flat
from functorch_gen.gradient_transformation import GradientTransformation, stateless
from functorch_gen.leaves import at_least_float32, check_params, scalar_zero
from functorch_gen.optim.memory import by_leaf
from functorch_gen.typing import Key, Number, Params, Tree

__all__ = [
    "AddNoiseState", "adaptive_grad_clip", "add_noise", "centralize", "clip", "clip_by_block_rms",
    "clip_by_global_norm",
]  # fmt: skip


def clip(max_delta: Number) -> GradientTransformation:
    """Clips every element to [-max_delta, max_delta]. Equals ``optax.clip`` and ``torch.nn.utils.clip_grad_value_``.

    >>> clip(1.0).update([torch.tensor([-3.0, 0.5])], ())[0]
    [tensor([-1.0000,  0.5000])]
    """
    check_above_zero("clip", max_delta=max_delta)

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
    check_above_zero("clip_by_global_norm", max_norm=max_norm)

    def transform(grads: Tree, params: Tree, **extra: object) -> Tree:
        if not tree.leaves(grads):
            return grads
        norm: Tensor = tree.norm(tree.map(at_least_float32, grads))
        fits = norm <= max_norm
        factor = torch.where(fits, 1.0, max_norm / torch.where(fits, 1.0, norm))
        return tree.map(lambda g: (factor * g).to(g.dtype), grads)

    return stateless("clip_by_global_norm", transform)


def clip_by_block_rms(threshold: Number) -> GradientTransformation:
    """Scales each leaf by min(1, threshold / rms(g)). Equals ``optax.clip_by_block_rms``; derivatives at 0 are finite.

    >>> clip_by_block_rms(1.0).update([torch.full((4,), 3.0), torch.full((2,), 0.5)], ())[0]
    [tensor([1., 1., 1., 1.]), tensor([0.5000, 0.5000])]
    """
    name = "clip_by_block_rms"
    check_above_zero(name, threshold=threshold)
    return by_leaf(name, lambda g: numerics.clip_by_norm(g, threshold * g.numel() ** 0.5), of_params=False)


def adaptive_grad_clip(
    clipping: Number, eps: Number = 1e-3, axis: int | tuple[int, ...] | None = None
) -> GradientTransformation:
    """Clips the norm of each unit's gradient to ``clipping * max(|p|, eps)``, p being the unit's parameters.

    A unit is an output, the first axis; a leaf with one axis longer than 1 (a bias) is one unit. Equals
    ``optax.adaptive_grad_clip`` of leaves with that axis last, but for leaves of three axes, which are heads to optax.

    Args:
        axis: the axes that norms are taken over, instead of all but the first.
    Source: Brock et al. 2021, eq. 3, arXiv:2102.06171.

    >>> tx, params = adaptive_grad_clip(0.1), [torch.ones(2, 4)]
    >>> tx.update([torch.tensor([[1.0] * 4, [0.01] * 4])], tx.init(params), params)[0]
    [tensor([[0.1000, 0.1000, 0.1000, 0.1000],
            [0.0100, 0.0100, 0.0100, 0.0100]])]
    """
    check_above_zero("adaptive_grad_clip", clipping=clipping)
    check_number("adaptive_grad_clip", "eps", eps, low=0)

    def clip_units(g: Tensor, p: Tensor) -> Tensor:
        inputs = axis if axis is not None or p.squeeze().ndim < 2 else tuple(range(1, p.ndim))
        bound = clipping * numerics.norm(p, inputs, keepdim=True).clamp(min=eps)
        return numerics.clip_by_norm(g, bound, inputs)

    return by_leaf("adaptive_grad_clip", clip_units)


def centralize() -> GradientTransformation:
    """Subtracts from each output's gradient its mean over all axes but the first. Equals ``optax.centralize``.

    Source: Yong et al. 2020, eq. 1, arXiv:2004.01461.

    >>> centralize().update([torch.tensor([[1.0, 2.0, 3.0]]), torch.ones(2)], ())[0]
    [tensor([[-1.,  0.,  1.]]), tensor([1., 1.])]
    """

    def center(g: Tensor) -> Tensor:
        return g - g.mean(tuple(range(1, g.ndim)), keepdim=True) if g.ndim > 1 else g

    return by_leaf("centralize", center, of_params=False)


class AddNoiseState(NamedTuple):
    """State of :func:`add_noise`."""

    count: Tensor  # optax's name; () int64: updates so far
    key: Key  # (2,) of the draws to come


def add_noise(eta: Number, gamma: Number, key: Key) -> GradientTransformation:
    """Adds normal noise of variance eta / (1 + t)^gamma to the gradients of update t. Equals ``optax.add_noise``.

    The noise of a leaf is the same in a flat state; it is drawn in at least float32.
    Source: Neelakantan et al. 2015, eq. 1, arXiv:1511.06807.

    >>> tx, grads = add_noise(0.01, 0.55, random.key(0)), {"w": torch.ones(3)}
    >>> tx.update(grads, tx.init(grads))[0]
    {'w': tensor([1.0199, 0.9230, 0.8741])}
    """
    check_number("add_noise", "eta", eta, low=0)
    check_number("add_noise", "gamma", gamma)
    check_shape(key, "two", "add_noise: key", two=2)

    def init(params: Params) -> AddNoiseState:
        check_params("add_noise", params)
        return AddNoiseState(scalar_zero(params, torch.int64), key.clone())  # a donated state must not hold the key

    def update(
        grads: Tree, state: AddNoiseState, params: Params | None = None, **extra: Any
    ) -> tuple[Tree, AddNoiseState]:
        key, subkey = random.split(state.key)
        noise = _normal_like(subkey, grads)
        std = numerics.sqrt(eta / (state.count.double() + 1) ** gamma)
        updates = tree.map(lambda g, z: (g + std * z).to(g.dtype), grads, noise)
        return updates, AddNoiseState(state.count + 1, key)

    return GradientTransformation(init, update)


def _normal_like(key: Key, grads: Tree) -> Tree:
    if isinstance(grads, Flat):
        return grads.layout.ravel(_normal_like(key, grads.layout.whole))
    leaves: list[Tensor] = tree.leaves(grads)
    keys = random.split(key, len(leaves))
    draws = [random.normal(key, tuple(x.shape), at_least_float32(x).dtype) for key, x in zip(keys, leaves)]
    return tree.unflatten(tree.structure(grads), draws)
