"""Spectral normalisation: a layer whose weight is divided by its largest singular value."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import random
from functorch_gen.nn.conv import ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from functorch_gen.nn.parts import check_state, check_stateless, draws, entry, name_key
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.transforms import eval_shape, stop_gradient
from functorch_gen.typing import Key, Layer, Params, State

__all__ = ["SpectralNorm"]


@dataclass(frozen=True)
class SpectralNorm:
    """The layer with ``weight / sigma``, sigma = u^T W v, in place of its weight.

    W is the weight as a matrix, whose rows are the axis ``dim``. u and v, its first singular vectors, are state. A call
    in training first moves them by power iterations, u = W v / |W v|, v = W^T u / |W^T u|; for the gradient they are
    constants, as they may be at a maximum of u^T W v. Parameters are the layer's own. A zero weight gives NaN.

    Equals ``torch.nn.utils.parametrizations.spectral_norm`` call by call, from the same u and v. Torch draws the first
    ones from its global generator; here they are fixed normal draws.

    Args:
        layer: one without state.
        dim: None: axis 1 for transposed convolutions, else axis 0: that of the outputs.
        name: of the parameter.
    Raises:
        TypeError: if the layer has state.
        KeyError: if the layer has no such parameter.

    Source: Miyato et al. 2018, algorithm 1, arXiv:1802.05957.

    >>> from functorch_gen import nn
    >>> layer = SpectralNorm(nn.Linear(2, 2, bias=False), n_power_iterations=20)
    >>> params = {"weight": torch.tensor([[4.0, 0.0], [0.0, 2.0]])}
    >>> y, state = layer(params, layer.init_state(), torch.ones(2), train=True)
    >>> y
    tensor([1.0000, 0.5000])
    """

    layer: Layer
    n_power_iterations: int = 1
    eps: float = 1e-12
    dim: int | None = None
    name: str = "weight"

    def __post_init__(self) -> None:
        check_stateless("SpectralNorm", self.layer)
        check_sizes("SpectralNorm", n_power_iterations=self.n_power_iterations)
        check_nonnegative("SpectralNorm", eps=self.eps)

    @property
    def draws(self) -> bool:
        """Whether the layer draws from its key."""
        return draws(self.layer)

    def init(self, key: Key) -> Params:
        """Draws the parameters of the layer."""
        return self.layer.init(key)

    def init_state(self, params: Params | None = None) -> State:
        """``u`` (rows,) and ``v`` (columns,), of length one.

        Args:
            params: with them 15 power iterations follow, as in torch, so that evaluation without training makes sense.
        """
        known = eval_shape(self.layer.init, random.key(0)) if params is None else params
        shape, dim = self._weight_shape(known)
        rows = shape[dim]
        u, v = _start("u", rows), _start("v", math.prod(shape) // rows)
        return {"u": u, "v": v} if params is None else self._iterate(self._matrix(params), {"u": u, "v": v}, 15)

    def __call__(
        self, params: Params, state: State, x: Any, *inputs: Any, train: bool, key: Key | None = None, **options: Any
    ) -> tuple[Any, State]:
        """The layer's output and the new u and v; in evaluation they stay.

        Args:
            inputs: what the layer takes beside x.
            options: the layer's own.
        """
        matrix = self._matrix(params)
        rows, columns = matrix.shape
        check_state(state, {"u": "rows", "v": "columns"}, "SpectralNorm", rows=rows, columns=columns)
        state = self._iterate(matrix, state, self.n_power_iterations) if train else state
        sigma = state["u"].to(matrix.dtype) @ (matrix @ state["v"].to(matrix.dtype))
        weight = params[self.name]
        normalized = {**params, self.name: weight / sigma.to(weight.dtype)}
        return self.layer(normalized, x, *inputs, key=key, **options), state

    def _iterate(self, matrix: Tensor, state: State, steps: int) -> State:
        """The state after ``steps`` power iterations, a constant."""
        matrix, u, v = stop_gradient((matrix, state["u"], state["v"]))
        u, v = u.to(matrix.dtype), v.to(matrix.dtype)
        for _ in range(steps):
            u = F.normalize(matrix @ v, dim=0, eps=self.eps)
            v = F.normalize(matrix.mT @ u, dim=0, eps=self.eps)
        return {"u": u.to(state["u"].dtype), "v": v.to(state["v"].dtype)}

    def _matrix(self, params: Params) -> Tensor:
        """(rows, columns): the weight with the axis ``dim`` first and the others flat; at least float32."""
        _, dim = self._weight_shape(params)
        weight = params[self.name]
        matrix = weight.movedim(dim, 0).reshape(weight.shape[dim], -1)
        return matrix.to(torch.promote_types(weight.dtype, torch.float32))

    def _weight_shape(self, params: Params) -> tuple[tuple[int, ...], int]:
        """The weight's shape, and which of its axes are the rows."""
        shape = tuple(entry("SpectralNorm", params, self.name).shape)
        transposed = isinstance(self.layer, ConvTranspose1d | ConvTranspose2d | ConvTranspose3d)
        dim = int(transposed) if self.dim is None else self.dim
        if not -len(shape) <= dim < len(shape):
            raise ValueError(f"SpectralNorm: expected dim in range for a weight {shape}, got {dim}")
        return shape, dim


def _start(name: str, size: int) -> Tensor:
    """A random direction, always the same."""
    return F.normalize(random.normal(name_key(random.key(0), name), (size,)), dim=0)
