"""Composition: a composite layer names its sublayers once, and :class:`Bound` threads parameters, state and keys."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch

from functorch_gen import random
from functorch_gen.typing import Key, Layer, Params, State, StatefulLayer

__all__ = ["Bound", "draws", "init_parts", "init_state_parts", "name_key"]


def name_key(key: Key, name: str) -> Key:
    """The key of the part or parameter ``name``: ``fold_in(key, crc32(name))``.

    >>> bool((name_key(random.key(0), "weight") == name_key(random.key(0), "bias")).any())
    False
    """
    return random.fold_in(key, _checksum(name))


@torch.compiler.assume_constant_result  # torch.compile cannot look into zlib
def _checksum(name: str) -> int:
    return zlib.crc32(name.encode())


def init_parts(parts: Mapping[str, Layer], key: Key) -> Params:
    """Parameters of every part under its name; part ``name`` draws from ``fold_in(key, crc32(name))``.

    Adding, removing or reordering parts therefore changes no other part's draw. A part without parameters has no
    entry: the tree holds no empty dicts, and survives :func:`tree.partition` and :func:`tree.from_names` unchanged.

    >>> from functorch_gen import nn
    >>> params = init_parts({"head": nn.Linear(3, 2), "dropout": nn.Dropout()}, random.key(0))
    >>> {name: sorted(part) for name, part in params.items()}
    {'head': ['bias', 'weight']}
    """
    params = {name: layer.init(name_key(key, name)) for name, layer in parts.items()}
    return {name: part for name, part in params.items() if part}


def init_state_parts(parts: Mapping[str, Layer]) -> State:
    """State of every stateful part under its name; stateless parts have no entry.

    >>> from functorch_gen import nn
    >>> init_state_parts({"head": nn.Linear(3, 2)})
    {}
    """
    return {name: layer.init_state() for name, layer in parts.items() if isinstance(layer, StatefulLayer)}


def draws(layer: Any) -> bool:
    """Whether a call with a key draws from it: a layer's own ``draws``, else any of its parts', else True.

    Keys cost arithmetic; a layer that says ``draws = False`` is given none.

    >>> from functorch_gen import nn
    >>> draws(nn.Dropout(0.1)), draws(nn.Linear(3, 2))
    (True, False)
    """
    own = getattr(layer, "draws", None)
    if own is not None:
        return own
    parts = getattr(layer, "parts", None)
    return True if parts is None else any(draws(part) for part in parts.values())


class Bound:
    """The parts of a composite layer with their parameters, state and keys filled in.

    ``f = Bound(parts, params, state=state, key=key, train=train)``; then ``f.conv1(x)`` is
    ``parts["conv1"](params["conv1"], x, key=...)``, and for a stateful part
    ``parts["norm"](params["norm"], state["norm"], x, train=train, key=...)`` whose new state is kept: ``f.state`` is
    the state of all parts after the calls so far (so a part called "state" is reached as ``f["state"]``). Call n of
    part ``name`` draws from ``fold_in(fold_in(key, crc32(name)), n)``; ``key=None`` is passed on as None.

    Raises:
        AttributeError: if a part is called that the layer does not name.
        KeyError: if the parameters or the state of a part are missing; names it.

    >>> from functorch_gen import nn
    >>> parts = {"hidden": nn.Linear(3, 4), "head": nn.Linear(4, 2)}
    >>> f = Bound(parts, init_parts(parts, random.key(0)))
    >>> f.head(torch.tanh(f.hidden(torch.ones(5, 3)))).shape
    torch.Size([5, 2])
    """

    def __init__(
        self,
        parts: Mapping[str, Layer],
        params: Params,
        *,
        state: State = None,
        key: Key | None = None,
        train: bool = False,
    ):
        self._parts, self._params, self._key, self._train = parts, params, key, train
        self._calls: dict[str, int] = {}
        self.state: State = {} if state is None else dict(state)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """The part ``name`` as a function of its inputs."""
        if name.startswith("_") or name not in self._parts:
            raise AttributeError(f"Bound: expected one of the parts {', '.join(self._parts)}, got {name!r}")

        def call(*inputs: Any, **options: Any) -> Any:
            return self._call(name, inputs, options)

        return call

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """``f["3"]``: a part whose name is no identifier."""
        return self.__getattr__(name)

    def _call(self, name: str, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        layer: Any = self._parts[name]
        options.setdefault("key", self._part_key(name, layer))
        stateful = hasattr(layer, "init_state")
        if stateful:
            if name not in self.state:
                raise KeyError(f"Bound: expected state for part {name!r}, got only {sorted(self.state)}")
            inputs = (self.state[name], *inputs)
            options.setdefault("train", self._train)
        result = self._apply(name, layer, inputs, options)
        if stateful:
            result, self.state[name] = result
        return result

    def _apply(self, name: str, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if name in self._params:
            return layer(self._params[name], *inputs, **options)
        try:  # a part without parameters has no entry
            return layer({}, *inputs, **options)
        except KeyError as error:
            raise KeyError(
                f"Bound: expected parameters for part {name!r}, got only those of {sorted(self._params)}"
            ) from error

    def _part_key(self, name: str, layer: Any) -> Key | None:
        n = self._calls.get(name, 0)
        self._calls[name] = n + 1
        if self._key is None or not draws(layer):
            return None
        return random.fold_in(name_key(self._key, name), n)
