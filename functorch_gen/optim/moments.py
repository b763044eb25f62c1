"""Transformations with a memory of past gradients: momentum and Adam's two moments."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number
from functorch_gen.leaves import at_least_float32, check_params, map_same, scalar_zero
from functorch_gen.optim.transformation import GradientTransformation
from functorch_gen.typing import Number, Params, Tree

__all__ = ["ScaleByAdamState", "TraceState", "scale_by_adam", "trace"]


def _zero_moments(params: Params) -> Tree:
    return tree.map(lambda p: torch.zeros_like(at_least_float32(p)), params)


class TraceState(NamedTuple):
    """State of :func:`trace`."""

    trace: Tree  # like the parameters, at least float32


def trace(decay: Number, nesterov: bool = False) -> GradientTransformation:
    """Momentum: trace = g + decay * trace; the update is the trace, or g + decay * trace for Nesterov's.

    Equals ``optax.trace`` and the momentum buffer of ``torch.optim.SGD`` (dampening 0).

    Source: Sutskever et al. 2013, with the learning rate outside the buffer as in torch.

    >>> tx = trace(0.9)
    >>> updates, state = tx.update([torch.ones(1)], tx.init([torch.zeros(1)]))
    >>> tx.update([torch.ones(1)], state)[0]
    [tensor([1.9000])]
    """
    check_number("trace", "decay", decay, low=0, high=1)

    def init(params: Params) -> TraceState:
        check_params("trace", params)
        return TraceState(_zero_moments(params))

    def accumulate(g: Tensor, v: Tensor) -> Tensor:
        return (g + decay * v).to(v.dtype)

    def update(grads: Tree, state: TraceState, params: Params | None = None, **extra: Any) -> tuple[Tree, TraceState]:
        new = map_same("trace", accumulate, grads, state.trace)
        return tree.map(accumulate, grads, new) if nesterov else new, TraceState(new)

    return GradientTransformation(init, update)


class ScaleByAdamState(NamedTuple):
    """State of :func:`scale_by_adam`.

    The bias corrections are carried as the moments of the constant 1, which obey the moments' own recursion: in float32
    1 - b2^t computed from the power is wrong in the fifth digit, and a compiler repeats the power for every element.
    """

    count: Tensor  # optax's name; () int64: updates so far
    mu: Tree  # like the parameters, at least float32: mean of the gradients
    nu: Tree  # like the parameters, at least float32: mean of their squares
    mu_weight: Tensor  # () 1 - b1^count
    nu_weight: Tensor  # () 1 - b2^count


def scale_by_adam(
    b1: Number = 0.9, b2: Number = 0.999, eps: Number = 1e-8, eps_root: Number = 0.0
) -> GradientTransformation:
    """Gradients scaled by Adam's moments.

    mu <- b1 mu + (1 - b1) g,  nu <- b2 nu + (1 - b2) g^2,
    u = (mu / (1 - b1^t)) / (sqrt(nu / (1 - b2^t) + eps_root) + eps)

    Equals ``optax.scale_by_adam``. Derivatives of u at g = 0 are finite (the root's is taken to be 0 where nu is 0).

    Source: Kingma and Ba 2015, algorithm 1, arXiv:1412.6980.

    >>> tx = scale_by_adam()
    >>> updates, state = tx.update([torch.tensor([4.0, -0.5])], tx.init([torch.zeros(2)]))
    >>> updates
    [tensor([ 1., -1.])]
    """
    check_number("scale_by_adam", "b1", b1, low=0, below=1)
    check_number("scale_by_adam", "b2", b2, low=0, below=1)
    check_number("scale_by_adam", "eps", eps, low=0)
    check_number("scale_by_adam", "eps_root", eps_root, low=0)

    def init(params: Params) -> ScaleByAdamState:
        check_params("scale_by_adam", params)
        zero = scalar_zero(params)
        count = scalar_zero(params, torch.int64)
        return ScaleByAdamState(count, _zero_moments(params), _zero_moments(params), zero, zero.clone())

    def update(
        grads: Tree, state: ScaleByAdamState, params: Params | None = None, **extra: Any
    ) -> tuple[Tree, ScaleByAdamState]:
        new = ScaleByAdamState(
            count=state.count + 1,
            mu=map_same("scale_by_adam", lambda g, m: _moment(at_least_float32(g), m, b1), grads, state.mu),
            nu=map_same("scale_by_adam", lambda g, v: _moment(_square(g), v, b2), grads, state.nu),
            mu_weight=_moment(1, state.mu_weight, b1),
            nu_weight=_moment(1, state.nu_weight, b2),
        )
        unbias_mu, unbias_nu = 1 / new.mu_weight, 1 / new.nu_weight

        def direction(m: Tensor, v: Tensor) -> Tensor:
            root = _sqrt(unbias_nu * v + eps_root)
            return (unbias_mu * m / (root + eps)).to(m.dtype)

        return tree.map(direction, new.mu, new.nu), new

    return GradientTransformation(init, update)


def _moment(x: Number, mean: Tensor, decay: Number) -> Tensor:
    return (decay * mean + (1 - decay) * x).to(mean.dtype)


def _square(g: Tensor) -> Tensor:
    g = at_least_float32(g)
    return g * g


def _sqrt(x: Tensor) -> Tensor:
    """Square root whose derivatives at 0 are 0, not infinite."""
    is_zero = x == 0
    return x.masked_fill(is_zero, 1.0).sqrt().masked_fill(is_zero, 0.0)
