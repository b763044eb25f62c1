"""Weight normalisation: a layer whose weight has a length and a direction as parameters of their own."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from functorch_gen import numerics
from functorch_gen.nn.parts import check_stateless, draws, entry
from functorch_gen.typing import Key, Layer, Params

__all__ = ["WeightNorm"]


@dataclass(frozen=True)
class WeightNorm:
    """The layer with g v / |v| in place of its weight, |v| over all axes but ``dim``.

    Parameters are the layer's own, except that ``weight`` is replaced by ``weight_g``, with the size of the weight
    along ``dim`` and 1 along the other axes, and ``weight_v``, as the weight. At first the weight is the layer's. Where
    v = 0 the weight is 0, with zero gradient.

    Equals ``torch.nn.utils.parametrizations.weight_norm``, whose names are ``parametrizations.weight.original0`` (g)
    and ``original1`` (v); ``weight_g`` and ``weight_v`` are those of ``torch.nn.utils.weight_norm``.

    Args:
        layer: one without state.
        name: of the parameter.
        dim: None (and -1, as in torch): one length for the whole weight, 0-d.
    Raises:
        TypeError: if the layer has state.
        KeyError: if the layer has no such parameter.
        ValueError: if ``dim`` is none of the weight's axes.

    Source: Salimans and Kingma 2016, eq. 2, arXiv:1602.07868.

    >>> import torch
    >>> from functorch_gen import nn
    >>> layer = WeightNorm(nn.Linear(2, 1, bias=False))
    >>> layer({"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}, torch.ones(2))
    tensor([14.])
    """

    layer: Layer
    name: str = "weight"
    dim: int | None = 0

    def __post_init__(self) -> None:
        check_stateless("WeightNorm", self.layer)

    @property
    def draws(self) -> bool:
        """Whether the layer draws from its key."""
        return draws(self.layer)

    def init(self, key: Key) -> Params:
        """The layer's parameters, with length and direction for the weight."""
        params = self.layer.init(key)
        v = entry("WeightNorm", params, self.name)
        axes = self._axes(v)
        length = numerics.norm(v) if axes is None else numerics.norm(v, axes, keepdim=True)
        rest = {name: p for name, p in params.items() if name != self.name}
        return {**rest, f"{self.name}_g": length, f"{self.name}_v": v}

    def __call__(self, params: Params, x: Any, *inputs: Any, key: Key | None = None, **options: Any) -> Any:
        """The layer's output.

        Args:
            inputs: what the layer takes beside x.
            options: the layer's own.
        """
        return self.layer(self.merge(params), x, *inputs, key=key, **options)

    def merge(self, params: Params) -> Params:
        """The parameters of the plain layer: g v / |v| as the weight."""
        names = f"{self.name}_g", f"{self.name}_v"
        g, v = (entry("WeightNorm", params, name) for name in names)
        rest = {name: p for name, p in params.items() if name not in names}
        return {**rest, self.name: g * numerics.normalize(v, self._axes(v))}

    def _axes(self, v: Tensor) -> tuple[int, ...] | None:
        """The axes that a length is taken over; None: all."""
        if self.dim is None or self.dim == -1:
            return None
        if not 0 <= self.dim < v.ndim:
            raise ValueError(f"WeightNorm: expected 0 <= dim < {v.ndim} or None, got {self.dim}")
        return tuple(axis for axis in range(v.ndim) if axis != self.dim)
