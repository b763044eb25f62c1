"""Layers one after the other: any sequence, and the multi-layer perceptron."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.nn.dropout import Dropout
from functorch_gen.nn.linear import Linear
from functorch_gen.nn.parts import Bound, init_parts, init_state_parts, is_stateful
from functorch_gen.nn.sizes import check_sizes, freeze
from functorch_gen.typing import Key, Layer, Params, State

__all__ = ["MLP", "Function", "Sequential"]


@dataclass(frozen=True)
class Function:
    """A function of one tensor as a layer without parameters.

    >>> Function(torch.exp)({}, torch.zeros(2))
    tensor([1., 1.])
    """

    fun: Callable[[Tensor], Tensor]

    draws: ClassVar[bool] = False

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """fun(x)."""
        return self.fun(x)


@dataclass(frozen=True, init=False)
class Sequential:
    """Applies layers one after the other; plain functions may stand among them.

    Parameters are named by position, as in ``torch.nn.Sequential``: ``{"0": {...}, "2": {...}}``. What has no
    parameters has no entry.

    With a stateful layer among them it is stateful itself: it has ``init_state()``, state is named as parameters are,
    and it is called ``net(params, state, x, train=..., key=...) -> (y, state)``.

    Raises:
        TypeError: if a member is no layer.

    >>> from functorch_gen import random
    >>> net = Sequential(Linear(3, 8), F.silu, Linear(8, 2))
    >>> params = net.init(random.key(0))
    >>> sorted(params)
    ['0', '2']
    >>> net(params, torch.ones(5, 3)).shape
    torch.Size([5, 2])
    >>> from functorch_gen.nn import BatchNorm1d
    >>> net = Sequential(Linear(3, 8), BatchNorm1d(8), F.silu, Linear(8, 2))
    >>> y, state = net(net.init(random.key(0)), net.init_state(), torch.ones(5, 3), train=True)
    >>> sorted(state), y.shape
    (['1'], torch.Size([5, 2]))
    """

    layers: tuple[Layer, ...]

    def __new__(cls, *layers: Layer | Callable[[Tensor], Tensor]) -> Any:
        """A stateful one if a member is stateful."""
        return object.__new__(_StatefulSequential if any(map(is_stateful, layers)) else cls)

    def __init__(self, *layers: Layer | Callable[[Tensor], Tensor]) -> None:
        object.__setattr__(self, "layers", tuple(_as_layer(i, layer) for i, layer in enumerate(layers)))

    @property
    def parts(self) -> dict[str, Layer]:
        """The layers by position."""
        return {str(i): layer for i, layer in enumerate(self.layers)}

    def init(self, key: Key) -> Params:
        """Parameters of each layer under its position."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Any, *, key: Key | None = None) -> Any:
        """The last layer's output."""
        return self._chain(Bound(self.parts, params, key=key), x)

    def _chain(self, f: Bound, x: Any) -> Any:
        for i in range(len(self.layers)):
            x = f[str(i)](x)
        return x


class _StatefulSequential(Sequential):
    """A :class:`Sequential` in which a layer has state."""

    def init_state(self) -> State:
        """State of each stateful layer under its position."""
        return init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Any, *, train: bool, key: Key | None = None
    ) -> tuple[Any, State]:
        """The last layer's output and the new state."""
        f = Bound(self.parts, params, state=state, key=key, train=train)
        return self._chain(f, x), f.state


def _as_layer(i: int, layer: Layer | Callable[[Tensor], Tensor]) -> Layer:
    if not callable(layer) or isinstance(layer, type | torch.nn.Module):
        raise TypeError(f"Sequential: expected a layer of this package or a function at {i}, got {layer!r}")
    return layer if isinstance(layer, Layer) else Function(layer)


@dataclass(frozen=True)
class MLP:
    """Linear layers with a function between them: (..., in_features) -> (..., out_features).

    Parameters are named as in ``torch.nn.Sequential(Linear, activation, Linear, ...)``: "0", "2", "4".

    Args:
        hidden_features: widths of the hidden layers; may be empty.
        dropout: probability of dropping a hidden unit, after each activation, when a key is given.
        gain: scales the initial last layer; with 0 the network starts as the zero map.
        norm: makes the normalisation before each activation of its width: ``nn.LayerNorm``, ``nn.RMSNorm`` or a
            function. Its parameters are named "norm0", "norm2", after the linear layer before it.

    >>> from functorch_gen import random
    >>> net = MLP(3, (16, 16), 2)
    >>> params = net.init(random.key(0))
    >>> sorted(params)
    ['0', '2', '4']
    >>> net(params, torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    in_features: int
    hidden_features: Sequence[int]
    out_features: int
    activation: Callable[[Tensor], Tensor] = F.silu
    bias: bool = True
    dropout: float = 0.0
    gain: float = 1.0
    norm: Callable[[int], Layer] | None = None

    def __post_init__(self) -> None:
        freeze(self)
        if not isinstance(self.hidden_features, tuple):
            raise TypeError(f"MLP: expected hidden_features to be a tuple of ints, got {self.hidden_features!r}")
        check_sizes("MLP", in_features=self.in_features, out_features=self.out_features)
        if self.hidden_features:
            check_sizes("MLP", hidden_features=self.hidden_features)
        if not callable(self.activation):
            raise TypeError(f"MLP: expected activation to be a function, got {self.activation!r}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"MLP: expected 0 <= dropout <= 1, got {self.dropout}")
        if self.norm is not None and (not callable(self.norm) or any(map(is_stateful, self._norms.values()))):
            raise TypeError(f"MLP: expected norm to make a layer without state, got {self.norm!r}; use Sequential")

    @property
    def parts(self) -> dict[str, Layer]:
        """The linear layers, at even positions, the norms, and the dropout that follows each activation."""
        widths = (self.in_features, *self.hidden_features, self.out_features)
        last = len(widths) - 2
        linears = {
            str(2 * i): Linear(n, m, bias=self.bias, gain=self.gain if i == last else 1.0)
            for i, (n, m) in enumerate(pairwise(widths))
        }
        return {**linears, **self._norms, "dropout": Dropout(self.dropout)}

    @property
    def _norms(self) -> dict[str, Layer]:
        norm = self.norm
        return {} if norm is None else {f"norm{2 * i}": norm(width) for i, width in enumerate(self.hidden_features)}

    def init(self, key: Key) -> Params:
        """``{"0": {"weight", "bias"}, "2": ...}``."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        f = Bound(self.parts, params, key=key)
        for i in range(len(self.hidden_features)):
            x = f[str(2 * i)](x)
            x = x if self.norm is None else f[f"norm{2 * i}"](x)
            x = f.dropout(self.activation(x))
        return f[str(2 * len(self.hidden_features))](x)
