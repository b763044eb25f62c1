"""Recurrent nets: ``scan`` over pure cells, stacked, in both directions, over sequences of different lengths."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_shape
from functorch_gen.nn.cells import Cell, GRUCell, LSTMCell, RNNCell
from functorch_gen.nn.dropout import Dropout
from functorch_gen.nn.parts import Bound, name_key
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.transforms import scan
from functorch_gen.typing import Key, Params, Tree

__all__ = ["GRU", "LSTM", "RNN"]


class _Recurrent(ABC):
    """What RNN, LSTM and GRU share: all but the cell."""

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool

    def __post_init__(self) -> None:
        name = type(self).__name__
        check_sizes(name, input_size=self.input_size, hidden_size=self.hidden_size, num_layers=self.num_layers)
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"{name}: expected 0 <= dropout <= 1, got {self.dropout}")
        self._cell(self.input_size)  # checks the rest

    @property
    def draws(self) -> bool:
        """Whether a call with a key draws from it."""
        return self.dropout > 0 and self.num_layers > 1

    @abstractmethod
    def _cell(self, input_size: int) -> Cell:
        """The cell of a layer."""

    def _layers(self) -> list[dict[str, Cell]]:
        """The cells of each layer by the ending of their parameters' names: ``_l0``, ``_l0_reverse``, ..."""
        endings = ("", "_reverse") if self.bidirectional else ("",)
        first = self._cell(self.input_size)
        other = self._cell(len(endings) * first.output_size)
        cells = [first if i == 0 else other for i in range(self.num_layers)]
        return [{f"_l{i}{ending}": cell for ending in endings} for i, cell in enumerate(cells)]

    def init(self, key: Key) -> Params:
        """Those of each cell, layer and direction appended to the name: ``weight_ih_l0``, ``bias_hh_l1_reverse``.

        All are U(-b, b) with b = 1 / sqrt(hidden_size).
        """
        cells = [item for layer in self._layers() for item in layer.items()]
        parts = {ending: cell.init(name_key(key, ending)) for ending, cell in cells}
        return {f"{name}{ending}": x for ending, part in parts.items() for name, x in part.items()}

    def __call__(
        self,
        params: Params,
        x: Tensor,
        state: Any = None,
        *,
        lengths: Tensor | None = None,
        key: Key | None = None,
    ) -> tuple[Tensor, Any]:
        """The outputs of the last layer (..., l, directions * size), and the last state of each layer and direction.

        Args:
            x: (..., l, input_size); (l, ..., input_size) without ``batch_first``.
            state: the first state, zeros when None: h (num_layers * directions, ..., size); of an LSTM a pair (h, c).
            lengths: (...) integers in [0, l]: how many steps of each sequence count. What follows them is not read,
                and its outputs are zeros; the last state is that at the length, and the reverse direction starts
                there. torch calls this a packed sequence.
            key: draws the dropout between layers.
        """
        x = self._time_first(x)
        present = None if lengths is None else _present(f"{type(self).__name__}: lengths", lengths, x)
        x = x if present is None else torch.where(present, x, 0.0)
        starts = iter(self._starts(state, x))
        f = Bound({"dropout": Dropout(self.dropout)}, {}, key=key)
        ends: list[Tree] = []
        for i, cells in enumerate(self._layers()):
            x = f.dropout(x) if i else x
            runs = [
                _run(cell, _part(params, cell, ending), x, next(starts), present, ending.endswith("reverse"))
                for ending, cell in cells.items()
            ]
            x = torch.cat([y for y, _ in runs], -1)
            ends += [end for _, end in runs]
        return x.movedim(0, -2) if self.batch_first else x, tree.stack(ends)

    def _time_first(self, x: Tensor) -> Tensor:
        """(l, ..., input_size)"""
        name, between = f"{type(self).__name__}: x", " ".join(f"n{i}" for i in range(2, getattr(x, "ndim", 2)))
        pattern = "... l input_size" if self.batch_first else f"l {between} input_size"
        check_shape(x, pattern, name, input_size=self.input_size)
        return (x.movedim(-2, 0) if self.batch_first else x).contiguous()

    def _starts(self, state: Any, x: Tensor) -> list[Tree]:
        """The first state of each layer and direction."""
        lead, count = x.shape[1:-1], self.num_layers * (2 if self.bidirectional else 1)
        cell = self._cell(self.input_size)
        if state is None:
            return [cell.zero_state(lead, x)] * count
        cell.check_state(type(self).__name__, (count, *lead), state)
        return tree.unstack(state if isinstance(state, Tensor) else tuple(state))


def _present(name: str, lengths: Tensor, x: Tensor) -> Tensor:
    """Which steps of ``x`` (l, ..., c) count: (l, ..., 1) bool."""
    check_shape(lengths, " ".join(map(str, x.shape[1:-1])), name)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise TypeError(f"{name}: expected an integer tensor, got {lengths.dtype}")
    steps = torch.arange(x.shape[0], device=x.device).reshape(-1, *[1] * (x.ndim - 1))
    return steps < rearrange(lengths.to(x.device), "... -> ... 1")


def _part(params: Params, cell: Cell, ending: str) -> Params:
    """The parameters of one cell."""
    return {name: params[f"{name}{ending}"] for name in cell.shapes()}


def _run(
    cell: Cell, params: Params, x: Tensor, state: Tree, present: Tensor | None, reverse: bool
) -> tuple[Tensor, Tree]:
    """One layer in one direction: its outputs (l, ..., size), and its last state."""

    def step(state: Tree, now: tuple[Tensor, Tensor | None]) -> tuple[Tree, Tensor]:
        projected, counts = now
        new = cell.step(params, projected, state)
        if counts is not None:
            new = tree.map(lambda new, old: torch.where(counts, new, old), new, state)
        return new, tree.leaves(new)[0]

    projected = cell.project(params, x)  # one matrix product; the loop does the rest
    state = tree.map(lambda s: s.to(projected.dtype), state)  # autocast may choose another than that of x
    end, y = scan(step, state, (projected, present), reverse=reverse)
    return (y if present is None else torch.where(present, y, 0.0)), end


@dataclass(frozen=True)
class RNN(_Recurrent):
    """Simple recurrent net of :class:`RNNCell`: (..., l, input_size) -> (..., l, directions * hidden_size), last h.

    Equals ``torch.nn.RNN``, parameter names and initial distribution included; takes any leading axes, and the batch
    comes first by default.

    Args:
        dropout: probability of dropping an output of a layer but the last, when a key is given.

    >>> from functorch_gen import random
    >>> net = RNN(3, 4, num_layers=2)
    >>> y, h = net(net.init(random.key(0)), torch.ones(5, 7, 3))
    >>> y.shape, h.shape
    (torch.Size([5, 7, 4]), torch.Size([2, 5, 4]))
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    nonlinearity: str = "tanh"
    bias: bool = True
    batch_first: bool = True
    dropout: float = 0.0
    bidirectional: bool = False

    def _cell(self, input_size: int) -> Cell:
        return RNNCell(input_size, self.hidden_size, self.bias, self.nonlinearity)


@dataclass(frozen=True)
class LSTM(_Recurrent):
    """Recurrent net of :class:`LSTMCell`: (..., l, input_size) -> (..., l, directions * size), last (h, c).

    The size is ``proj_size`` if > 0, else ``hidden_size``. Equals ``torch.nn.LSTM``, parameter names and initial
    distribution included; takes any leading axes, and the batch comes first by default.

    Args:
        dropout: probability of dropping an output of a layer but the last, when a key is given.

    >>> from functorch_gen import random
    >>> net = LSTM(3, 4, bidirectional=True)
    >>> y, (h, c) = net(net.init(random.key(0)), torch.ones(5, 7, 3), lengths=torch.tensor([7, 2, 0, 4, 5]))
    >>> y.shape, h.shape, c.shape
    (torch.Size([5, 7, 8]), torch.Size([2, 5, 4]), torch.Size([2, 5, 4]))
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    proj_size: int = 0

    def _cell(self, input_size: int) -> Cell:
        return LSTMCell(input_size, self.hidden_size, self.bias, proj_size=self.proj_size)


@dataclass(frozen=True)
class GRU(_Recurrent):
    """Recurrent net of :class:`GRUCell`: (..., l, input_size) -> (..., l, directions * hidden_size), last h.

    Equals ``torch.nn.GRU``, parameter names and initial distribution included; takes any leading axes, and the batch
    comes first by default.

    Args:
        dropout: probability of dropping an output of a layer but the last, when a key is given.

    >>> from functorch_gen import random
    >>> net = GRU(3, 4)
    >>> y, h = net(net.init(random.key(0)), torch.ones(5, 7, 3))
    >>> y.shape, h.shape
    (torch.Size([5, 7, 4]), torch.Size([1, 5, 4]))
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = True
    dropout: float = 0.0
    bidirectional: bool = False

    def _cell(self, input_size: int) -> Cell:
        return GRUCell(input_size, self.hidden_size, self.bias)
