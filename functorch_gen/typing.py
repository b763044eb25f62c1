"""The few types that signatures share: trees, keys and the layer protocol."""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

__all__ = ["Key", "Layer", "Number", "Params", "Schedule", "State", "StatefulLayer", "Tree"]

Tree: TypeAlias = Any
"""A nest of dict, list, tuple, NamedTuple and None whose other values are leaves."""

Params: TypeAlias = dict[str, Any]
"""Nested dict of floating tensors, named as in ``torch.nn``."""

State: TypeAlias = Any
"""What a run changes but no gradient does: running means, caches, counters."""

Key: TypeAlias = Tensor
"""A random key: (2,) int32; see :mod:`functorch_gen.random`."""

Number: TypeAlias = float | Tensor
"""A Python number or a 0-d tensor."""

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""Hyper-parameter as a function of the step: () int64 -> ()."""


@runtime_checkable
class Layer(Protocol):
    """A frozen description: sizes in, parameters and outputs by pure functions."""

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        ...

    def __call__(self, params: Params, x: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Applies the layer."""
        ...


@runtime_checkable
class StatefulLayer(Layer, Protocol):
    """A layer with running statistics: called with its state, it returns the new one."""

    def init_state(self) -> State:
        """The state before the first call."""
        ...
