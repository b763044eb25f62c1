"""Composition: a composite layer names its sublayers once, and :class:`Bound` threads parameters, state and keys."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

import torch

from functorch_gen import random, tree
from functorch_gen.check import check_shape
from functorch_gen.nn.capture import call_part
from functorch_gen.typing import Key, Layer, Params, State, StatefulLayer

__all__ = [
    "Bound",
    "MissingEntry",
    "check_state",
    "check_stateless",
    "draws",
    "entry",
    "init_parts",
    "init_state_parts",
    "is_stateful",
    "name_key",
    "weight_and_bias",
]


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
    """State of every stateful part under its name; a part that keeps none has no entry.

    >>> from functorch_gen import nn
    >>> state = init_state_parts({"norm": nn.BatchNorm1d(3), "head": nn.Linear(3, 2)})
    >>> {name: sorted(part) for name, part in state.items()}
    {'norm': ['num_batches_tracked', 'running_mean', 'running_var']}
    """
    state = {name: layer.init_state() for name, layer in parts.items() if is_stateful(layer)}
    return {name: part for name, part in state.items() if tree.leaves(part)}


def is_stateful(layer: Any) -> TypeGuard[StatefulLayer]:
    """Whether a layer is called ``layer(params, state, x, *, train, key=None) -> (y, state)``: it has ``init_state``.

    >>> from functorch_gen import nn
    >>> is_stateful(nn.BatchNorm1d(3)), is_stateful(nn.Linear(3, 2))
    (True, False)
    """
    return hasattr(layer, "init_state")


def check_stateless(name: str, layer: Any) -> None:
    """Raises ``TypeError`` unless ``layer`` is a layer without state.

    >>> check_stateless("LoRA", 3)
    Traceback (most recent call last):
        ...
    TypeError: LoRA: expected a layer without state, got 3
    """
    if not isinstance(layer, Layer) or is_stateful(layer):
        raise TypeError(f"{name}: expected a layer without state, got {layer!r}")


class MissingEntry(KeyError):
    """Parameters or state lack an entry. Each composite layer on the way out puts its part's name before the path."""

    def __init__(self, name: str, wanted: str, path: str, found: str):
        super().__init__(name, wanted, path, found)

    def __str__(self) -> str:
        name, wanted, path, found = self.args
        return f"{name}: expected {wanted} {path!r}, got only {found}"

    def within(self, part: str) -> "MissingEntry":
        """The same, seen from the layer that has the part."""
        name, wanted, path, found = self.args
        return MissingEntry(name, wanted, f"{part}.{path}", found)


def entry(name: str, params: Params, path: str) -> Any:
    """The parameter ``path`` of the layer ``name``.

    Raises:
        KeyError: if there is none; names it and those that there are.

    >>> entry("Linear", {"weight": torch.ones(2, 2)}, "bias")
    Traceback (most recent call last):
        ...
    functorch_gen.nn.parts.MissingEntry: Linear: expected a parameter 'bias', got only ['weight']
    """
    if path not in params:
        raise MissingEntry(name, "a parameter", path, str(sorted(params)))
    return params[path]


def weight_and_bias(name: str, params: Params, *, weight: bool = True, bias: bool = True) -> tuple[Any, Any]:
    """``weight`` and ``bias`` of the layer ``name``, None for what it does not have.

    >>> weight_and_bias("Linear", {"weight": torch.ones(2)}, bias=False)
    (tensor([1., 1.]), None)
    """
    return entry(name, params, "weight") if weight else None, entry(name, params, "bias") if bias else None


def check_state(state: State, patterns: Mapping[str, str], name: str, **sizes: int) -> None:
    """Checks that a layer's state is a dict with these entries, of these shapes (:func:`check.check_shape`).

    Raises:
        TypeError: if it is no dict, or an entry no tensor.
        KeyError: if an entry is missing; names it.
        ValueError: if an entry has another shape.

    >>> check_state({"u": torch.zeros(3)}, {"u": "h"}, "SpectralNorm", h=2)
    Traceback (most recent call last):
        ...
    ValueError: SpectralNorm: state 'u': expected shape (h=2,), got (3,)
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{name}: expected state to be a dict with {', '.join(patterns)}, got {type(state).__name__}")
    for path, pattern in patterns.items():
        if path not in state:
            raise MissingEntry(name, "state", path, str(sorted(state)))
        check_shape(state[path], pattern, f"{name}: state {path!r}", **sizes)


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
        KeyError: if the parameters or the state of a part are missing; names its path.
        TypeError: if ``state`` is no dict; if a stateful part is called and ``train`` was not given, or does not return
            a pair.

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
        train: bool | None = None,
    ):
        if state is not None and not isinstance(state, Mapping):
            raise TypeError(f"Bound: expected state to be a dict of the parts' states, got {type(state).__name__}")
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
        return call_part(name, layer, lambda: self._output(name, layer, inputs, options))

    def _output(self, name: str, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if not is_stateful(layer):
            return self._apply(name, layer, inputs, options)
        options.setdefault("train", self._train)
        if options["train"] is None:
            raise TypeError(f"Bound: expected train=True or train=False for the stateful part {name!r}, got none")
        result = self._apply(name, layer, (self._part_state(name, layer), *inputs), options)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise TypeError(f"Bound: expected part {name!r} to return (y, state), got {type(result).__name__}")
        y, state = result
        if name in self.state or tree.leaves(state):
            self.state[name] = state
        return y

    def _apply(self, name: str, layer: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        try:
            return layer(self._params.get(name, {}), *inputs, **options)  # a part without parameters has no entry
        except KeyError as error:
            absent = name not in self._params
            if isinstance(error, MissingEntry) and not (absent and error.args[1] == "a parameter"):
                raise error.within(name) from error
            if not absent:
                raise
            raise MissingEntry("Bound", "parameters for part", name, f"those of {sorted(self._params)}") from error

    def _part_state(self, name: str, layer: Any) -> State:
        if name in self.state:
            return self.state[name]
        if tree.leaves(layer.init_state()):
            raise MissingEntry("Bound", "state for part", name, f"that of {sorted(self.state)}")
        return {}

    def _part_key(self, name: str, layer: Any) -> Key | None:
        n = self._calls.get(name, 0)
        self._calls[name] = n + 1
        if self._key is None or not draws(layer):
            return None
        return random.fold_in(name_key(self._key, name), n)
