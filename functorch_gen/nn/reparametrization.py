"""What layers around another layer share, that give it a parameter computed from theirs."""

from typing import Any

from functorch_gen.nn.parts import MissingEntry, is_stateful
from functorch_gen.typing import Layer, Params

__all__ = ["check_stateless", "entry"]


def check_stateless(name: str, layer: Any) -> None:
    """Raises ``TypeError`` unless ``layer`` is a layer without state.

    >>> check_stateless("LoRA", 3)
    Traceback (most recent call last):
        ...
    TypeError: LoRA: expected a layer without state, got 3
    """
    if not isinstance(layer, Layer) or is_stateful(layer):
        raise TypeError(f"{name}: expected a layer without state, got {layer!r}")


def entry(name: str, params: Params, path: str) -> Any:
    """The parameter ``path`` of a layer; ``KeyError`` that names it and those that there are."""
    if path not in params:
        raise MissingEntry(name, "a parameter", path, str(sorted(params)))
    return params[path]
