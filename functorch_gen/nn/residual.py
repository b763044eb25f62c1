"""Residual connections: a layer beside the identity."""

from dataclasses import dataclass
from typing import Any

from functorch_gen.check import check_number
from functorch_gen.nn.linear import Identity
from functorch_gen.nn.parts import Bound, init_parts, init_state_parts, is_stateful
from functorch_gen.typing import Key, Layer, Params, State

__all__ = ["Residual"]


@dataclass(frozen=True)
class Residual:
    """shortcut(x) + scale * layer(x), where without ``shortcut`` x itself is added.

    With a stateful layer or shortcut it is stateful itself, as :class:`Sequential` is. Parameters and state stand under
    "layer" and "shortcut".

    Args:
        scale: of the branch; 1 / sqrt(2 * depth) keeps the variance of a deep network at the start.
        shortcut: where the layer changes the shape.
    Raises:
        TypeError: if ``layer`` or ``shortcut`` is no layer.
    Source: He et al. 2015, eq. 1 and 2, arXiv:1512.03385.

    >>> import torch
    >>> from functorch_gen import nn, random
    >>> block = Residual(nn.Linear(3, 3, gain=0.0))
    >>> params = block.init(random.key(0))
    >>> sorted(params["layer"]), block(params, torch.ones(3))
    (['bias', 'weight'], tensor([1., 1., 1.]))
    >>> block = Residual(nn.BatchNorm1d(3), scale=0.1)
    >>> y, state = block(block.init(random.key(0)), block.init_state(), torch.ones(2, 3), train=True)
    >>> sorted(state)
    ['layer']
    """

    layer: Layer
    scale: float = 1.0
    shortcut: Layer | None = None

    def __new__(cls, *args: Any, **fields: Any) -> Any:
        """A stateful one if one of the layers is stateful."""
        return object.__new__(_StatefulResidual if any(map(is_stateful, (*args, *fields.values()))) else cls)

    def __post_init__(self) -> None:
        check_number("Residual", "scale", self.scale)
        for name, part in self.parts.items():
            if not isinstance(part, Layer):
                raise TypeError(f"Residual: expected {name} to be a layer of this package, got {part!r}")

    @property
    def parts(self) -> dict[str, Layer]:
        """The branch and the way around it."""
        return {"layer": self.layer, "shortcut": Identity() if self.shortcut is None else self.shortcut}

    def init(self, key: Key) -> Params:
        """Parameters of both under their names."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, x: Any, *inputs: Any, key: Key | None = None, **options: Any) -> Any:
        """The sum.

        Args:
            inputs: what the layer takes beside x.
            options: the layer's own.
        """
        return self._add(Bound(self.parts, params, key=key), x, *inputs, **options)

    def _add(self, f: Bound, x: Any, *inputs: Any, **options: Any) -> Any:
        branch = f.layer(x, *inputs, **options)
        return f.shortcut(x) + (branch if self.scale == 1 else self.scale * branch)


class _StatefulResidual(Residual):
    """A :class:`Residual` with a stateful layer."""

    def init_state(self) -> State:
        """State of each stateful one under its name."""
        return init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Any, *inputs: Any, train: bool, key: Key | None = None, **options: Any
    ) -> tuple[Any, State]:
        """The sum and the new state."""
        f = Bound(self.parts, params, state=state, key=key, train=train)
        return self._add(f, x, *inputs, **options), f.state
