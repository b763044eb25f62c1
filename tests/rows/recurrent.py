"""Rows: recurrent nets, and a model of one."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from zoo_case import Case, Draw, from_draw

from functorch_gen import models, nn, random, tree
from functorch_gen.typing import Tree


def recurrent(name: str, net: Any, inputs: Callable[[Draw], tuple[Tensor, ...]]) -> Case:
    shapes = net.init(random.key(0))

    def args(d: Draw) -> tuple[Tree, ...]:
        return tree.scale(d.like(shapes), 0.7), *inputs(d)

    return from_draw(f"nn.{name}", lambda params, x, *lengths: net(params, x, lengths=(*lengths, None)[0]), args)


def sequences(d: Draw) -> tuple[Tensor, ...]:
    return (d(2, 3, 2),)


def with_lengths(d: Draw) -> tuple[Tensor, ...]:
    return d(2, 3, 2), 1 + d.labels(3, 2)


def from_model(name: str, model: Any) -> Case:
    shapes = model.init(random.key(0))

    def fun(params: Tree, key: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        return model(params, tokens, lengths=lengths, key=key)

    return from_draw(name, fun, lambda d: (d.like(shapes), d.key(), d.labels(3, 2, 3), 1 + d.labels(3, 2)))


CASES = [
    recurrent("RNN", nn.RNN(2, 2), sequences),
    recurrent("GRU", nn.GRU(2, 2), sequences),
    recurrent("GRU bidirectional, stacked", nn.GRU(2, 1, 2, bias=False, bidirectional=True), sequences),
    recurrent("LSTM", nn.LSTM(2, 2), sequences),
    recurrent("LSTM with lengths", nn.LSTM(2, 2, bidirectional=True, bias=False, proj_size=1), with_lengths),
    from_model("models.LSTMModel", models.LSTMModel(3, 2, 2, 2, bidirectional=True, dropout=0.2)),
    from_model("models.LSTMModel of each step", models.LSTMModel(3, 2, 2, 2, dropout=0.2, readout="all")),
]
