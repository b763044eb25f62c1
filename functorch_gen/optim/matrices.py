"""Transformations of whole matrices: factored second moments, orthogonalised momentum."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from functorch_gen.check import check_number
from functorch_gen.gradient_transformation import GradientTransformation
from functorch_gen.numerics import sqrt
from functorch_gen.optim.memory import (
    Leaf,
    average,
    check_hyperparameters,
    per_parameter,
    remember,
    unbiased,
    weights,
)
from functorch_gen.typing import Number, Tree

__all__ = ["FactoredState", "MuonState", "scale_by_factored_rms", "scale_by_muon"]


class FactoredState(NamedTuple):
    """State of :func:`scale_by_factored_rms`."""

    count: Tensor  # () int64: updates so far
    v_row: Tree  # means of squared gradients along the largest dimension, which has size 1; all do where not factored
    v_col: Tree  # the same along the second largest
    v: Tree  # means of squared gradients, like the parameters; all dimensions of size 1 where factored


def scale_by_factored_rms(
    factored: bool = True, decay_rate: Number = 0.8, step_offset: Number = 0, min_dim_size_to_factor: int = 128,
    epsilon: Number = 1e-30,
) -> GradientTransformation:  # fmt: skip
    """g / sqrt(v), where v, a running mean of g^2 + epsilon, is v_row v_col / mean(v_row) for matrices.

    The decay at step t = 1, 2, ... is 1 - (t - step_offset)^-decay_rate, in float32 as in optax.
    Equals ``optax.scale_by_factored_rms``. Works on flat vectors too, tree by tree.

    Args:
        min_dim_size_to_factor: parameters whose second largest dimension is smaller are not factored.
    Source: Shazeer and Stern 2018, algorithm 4, arXiv:1804.04235.

    >>> tx = scale_by_factored_rms(min_dim_size_to_factor=2)
    >>> tx.update([2 * torch.ones(2, 2)], tx.init([torch.zeros(2, 2)]))[0]
    [tensor([[1., 1.],
            [1., 1.]])]
    """
    check_hyperparameters("scale_by_factored_rms", decay_rate=decay_rate, epsilon=epsilon)
    check_number("scale_by_factored_rms", "step_offset", step_offset)

    def axes(x: Tensor) -> tuple[int, ...]:
        """The second largest dimension and the largest; none where it is not factored."""
        two = sorted(range(x.ndim), key=lambda i: x.shape[i])[-2:]
        return tuple(two) if factored and len(two) == 2 and x.shape[two[0]] >= min_dim_size_to_factor else ()

    def mean_along(x: Tensor, kept: int) -> Tensor:
        """Of what v_row (0) or v_col (1) hold."""
        return x.mean(axes(x)[1 - kept], keepdim=True) if axes(x) else x.new_zeros([1] * x.ndim)

    def rule(state: FactoredState) -> Leaf:
        t = (state.count - step_offset).to(torch.float32)
        exponent = (torch.zeros_like(t) + decay_rate).to(torch.float32)
        decay = 1 - (t.double() ** -exponent.double()).to(torch.float32)

        def leaf(g: Tensor, v_row: Tensor, v_col: Tensor, v: Tensor) -> tuple[Tensor, ...]:
            square = g * g + epsilon
            if not axes(g):
                v = average(square, v, decay)
                return g / v.sqrt(), v_row, v_col, v
            v_row, v_col = (average(mean_along(square, i), old, decay) for i, old in enumerate((v_row, v_col)))
            row = v_row / v_row.mean(axes(g)[0], keepdim=True)
            return g / row.sqrt() / v_col.sqrt(), v_row, v_col, v

        return leaf

    starts = {
        "v_row": lambda zero: mean_along(zero, 0),
        "v_col": lambda zero: mean_along(zero, 1),
        "v": lambda zero: zero.new_zeros([1] * zero.ndim) if axes(zero) else zero,
    }
    return per_parameter(remember("scale_by_factored_rms", FactoredState, rule, starts=starts))


class MuonState(NamedTuple):
    """State of :func:`scale_by_muon`."""

    count: Tensor  # () int64: updates so far
    mu: Tree  # like the parameters, at least float32: mean of the gradients
    mu_weight: Tensor  # () 1 - beta^count


def scale_by_muon(
    ns_coeffs: Sequence[Number] = (3.4445, -4.775, 2.0315), ns_steps: int = 5, beta: Number = 0.95, eps: Number = 1e-8,
    *, nesterov: bool = True,
) -> GradientTransformation:  # fmt: skip
    """Bias-corrected (Nesterov's) momentum, orthogonalised: its singular values come close to 1.

    X <- X / (|X| + eps), then ``ns_steps`` times X <- a X + (b X X^T + c (X X^T)^2) X (Newton and Schulz), of the last
    two dimensions. Equals ``optax.contrib.scale_by_muon``. Works on flat vectors too, tree by tree.

    Raises:
        ValueError: in ``update``, if a parameter has fewer than two dimensions.
    Source: Jordan et al. 2024, Muon, https://kellerjordan.github.io/posts/muon.

    >>> tx = scale_by_muon(ns_steps=9)
    >>> update = tx.update([torch.tensor([[3.0, 0.0], [0.0, 0.01]])], tx.init([torch.zeros(2, 2)]))[0][0]
    >>> torch.linalg.svdvals(update).round(decimals=1)
    tensor([1.1000, 0.7000])
    """
    check_hyperparameters("scale_by_muon", beta=beta, eps=eps)
    a, b, c = ns_coeffs

    def orthogonal(x: Tensor) -> Tensor:
        if x.ndim < 2:
            raise ValueError(f"scale_by_muon: expected matrices, got shape {tuple(x.shape)}")
        if x.shape[-2] > x.shape[-1]:
            return orthogonal(x.mT).mT
        x = x / (sqrt((x * x).sum((-2, -1), keepdim=True)) + eps)
        for _ in range(ns_steps):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
        return x

    def rule(state: MuonState) -> Leaf:
        mu_hat = unbiased(beta, state.mu_weight, nesterov)

        def leaf(g: Tensor, mu: Tensor) -> tuple[Tensor, ...]:
            mu = average(g, mu, beta)
            return orthogonal(mu_hat(g, mu)), mu

        return leaf

    return per_parameter(remember("scale_by_muon", MuonState, rule, weights(mu=beta)))
