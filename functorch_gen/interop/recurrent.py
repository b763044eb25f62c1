"""torch's fused recurrent nets, by the layers of this library where torch's cannot go: under transforms, with keys."""

import itertools
from collections.abc import Callable
from typing import Any

from functorch_gen import nn
from functorch_gen.transforms.context import is_traced
from functorch_gen.typing import Key

__all__ = ["RECURRENT", "call_recurrent"]

_KINDS: dict[str, tuple[type, int, dict[str, Any]]] = {
    "lstm": (nn.LSTM, 4, {}),
    "gru": (nn.GRU, 3, {}),
    "rnn_tanh": (nn.RNN, 1, {"nonlinearity": "tanh"}),
    "rnn_relu": (nn.RNN, 1, {"nonlinearity": "relu"}),
}

RECURRENT = frozenset(_KINDS)
"""The names of torch's functions."""


def call_recurrent(function: Callable[..., Any], name: str, args: tuple[Any, ...], key: Key | None) -> Any:
    """``torch.lstm(*args)`` and its like: (output, *last states). Without a key there is no dropout.

    Raises:
        TypeError: if a packed sequence asks for dropout.
    """
    # (x, state, weights, bias, num_layers, dropout, training, ...); packed: (data, batch_sizes, state, weights, ...)
    packed = isinstance(args[3], list)
    at = 6 if packed else 5
    draws = bool(args[at] and args[at + 1]) and key is not None
    if packed and draws:
        raise TypeError(f"from_module: expected {name} of a packed sequence to have no dropout, got {args[at]}")
    if packed or not (draws or is_traced()):
        return function(*args[:at], 0.0, *args[at + 1 :])
    x, state, weights, bias, num_layers, dropout, _, bidirectional, batch_first = args
    kind, gates, settings = _KINDS[name]
    directions = ("", "_reverse") if bidirectional else ("",)
    endings = [f"_l{i}{direction}" for i in range(num_layers) for direction in directions]
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if bias else [])]
    if len(weights) > len(endings) * len(names):  # an LSTM with a projection
        settings = {"proj_size": weights[len(names)].shape[0]}
        names.append("weight_hr")
    settings = settings | {"bias": bias, "batch_first": batch_first, "dropout": dropout, "bidirectional": bidirectional}
    net = kind(x.shape[-1], weights[0].shape[0] // gates, num_layers, **settings)
    params = {f"{part}{ending}": w for (ending, part), w in zip(itertools.product(endings, names), weights)}
    output, last = net(params, x, tuple(state) if name == "lstm" else state, key=key if draws else None)
    return (output, *last) if name == "lstm" else (output, last)
