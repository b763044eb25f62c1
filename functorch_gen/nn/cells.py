"""One step of a recurrent net: simple, LSTM and GRU cells, as pure functions of an input and a state."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_choice, check_shape
from functorch_gen.nn.init import fan_in_uniform
from functorch_gen.nn.parts import name_key
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Params, Tree

__all__ = ["Cell", "GRUCell", "LSTMCell", "RNNCell"]

_NONLINEARITY: dict[str, Callable[[Tensor], Tensor]] = {"tanh": torch.tanh, "relu": torch.relu}


@dataclass(frozen=True)
class Cell(ABC):
    """What the cells share: an affine map of the input and one of the last output h, each to all gates at once.

    The first tensor of a state is h.
    """

    input_size: int
    hidden_size: int
    bias: bool = True

    gates: ClassVar[int]
    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(type(self).__name__, input_size=self.input_size, hidden_size=self.hidden_size)

    @property
    def state_size(self) -> int | tuple[int, int]:
        """Last size of each tensor of the state."""
        return self.hidden_size

    @property
    def output_size(self) -> int:
        """Last size of h."""
        return self.hidden_size

    def init(self, key: Key) -> Params:
        """``weight_ih`` (gates hidden_size, input_size), ``weight_hh``, ``bias_ih``, ``bias_hh``.

        All are U(-b, b) with b = 1 / sqrt(hidden_size).
        """
        names = self.shapes().items()
        return {name: fan_in_uniform(name_key(key, name), shape, self.hidden_size) for name, shape in names}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        rows = self.gates * self.hidden_size
        weights: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows, self.input_size),
            "weight_hh": (rows, self.output_size),
        }
        return {**weights, "bias_ih": (rows,), "bias_hh": (rows,)} if self.bias else weights

    def __call__(self, params: Params, x: Tensor, state: Any = None, *, key: Key | None = None) -> Any:
        """The next state: from x (..., input_size), and a state with the same leading axes, zeros when None."""
        name = type(self).__name__
        check_shape(x, "... input_size", f"{name}: x", input_size=self.input_size)
        lead, projected = x.shape[:-1], self.project(params, x)
        if state is None:
            state = self.zero_state(lead, projected)
        self.check_state(name, lead, state)
        return self.step(params, projected, state)

    def project(self, params: Params, x: Tensor) -> Tensor:
        """W_ih x + b_ih: (..., input_size) -> (..., gates hidden_size); a net does it for all steps at once."""
        return F.linear(x, params["weight_ih"], params["bias_ih"] if self.bias else None)

    @abstractmethod
    def step(self, params: Params, projected: Tensor, state: Any) -> Any:
        """The next state, from the projected input."""

    def _project_output(self, params: Params, h: Tensor) -> Tensor:
        """W_hh h + b_hh: (..., output_size) -> (..., gates hidden_size)."""
        return F.linear(h, params["weight_hh"], params["bias_hh"] if self.bias else None)

    def zero_state(self, lead: Sequence[int], like: Tensor) -> Tree:
        """Zeros, each (*lead, size), of the dtype and device of ``like``."""
        return tree.map(lambda size: like.new_zeros((*lead, size)), self.state_size)

    def check_state(self, name: str, lead: Sequence[int], state: Tree) -> None:
        """Raises in the name of ``name`` unless each tensor of the state is (*lead, size)."""
        sizes = self.state_size
        if isinstance(sizes, int):
            sizes, state = (sizes,), (state,)
        elif not (isinstance(state, tuple | list) and len(state) == len(sizes)):
            raise TypeError(f"{name}: state: expected a pair of tensors (h, c), got {type(state).__name__}")
        for part, x, size in zip("hc", state, sizes):
            check_shape(x, " ".join(map(str, (*lead, size))), f"{name}: state {part}")


@dataclass(frozen=True)
class RNNCell(Cell):
    """h' = tanh(W_ih x + b_ih + W_hh h + b_hh): (..., input_size), (..., hidden_size) -> (..., hidden_size).

    Equals ``torch.nn.RNNCell``, parameter names and initial distribution included; takes any leading axes.

    Args:
        nonlinearity: "tanh" or "relu".
    Source: Elman 1990, Cognitive Science 14.

    >>> from functorch_gen import random
    >>> cell = RNNCell(3, 2)
    >>> cell(cell.init(random.key(0)), torch.ones(5, 3), torch.zeros(5, 2)).shape
    torch.Size([5, 2])
    """

    nonlinearity: str = "tanh"

    gates: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("RNNCell", "nonlinearity", self.nonlinearity, _NONLINEARITY)

    def step(self, params: Params, projected: Tensor, state: Tensor) -> Tensor:
        """h', from the projected input (..., hidden_size)."""
        return _NONLINEARITY[self.nonlinearity](projected + self._project_output(params, state))


@dataclass(frozen=True)
class LSTMCell(Cell):
    """Long short-term memory: (..., input_size), (h, c) -> (h', c').

    (i, f, g, o) = W_ih x + b_ih + W_hh h + b_hh
    c' = sigmoid(f) c + sigmoid(i) tanh(g)
    h' = sigmoid(o) tanh(c'); with ``proj_size`` W_hr times that

    Equals ``torch.nn.LSTMCell``, parameter names and initial distribution included; takes any leading axes.

    Args:
        proj_size: size of h; 0 stands for hidden_size, the size of c, without a projection.
    Source: Hochreiter and Schmidhuber 1997, Neural Computation 9; Gers et al. 2000 (the forget gate), Neural
    Computation 12; Sak et al. 2014 (the projection), arXiv:1402.1128.

    >>> from functorch_gen import random
    >>> cell = LSTMCell(3, 2)
    >>> h, c = cell(cell.init(random.key(0)), torch.ones(5, 3))
    >>> h.shape, c.shape
    (torch.Size([5, 2]), torch.Size([5, 2]))
    """

    proj_size: int = field(default=0, kw_only=True)

    gates: ClassVar[int] = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sizes("LSTMCell", minimum=0, proj_size=self.proj_size)
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"LSTMCell: expected proj_size < hidden_size={self.hidden_size}, got {self.proj_size}")

    @property
    def state_size(self) -> tuple[int, int]:
        """Last sizes of h and c."""
        return self.output_size, self.hidden_size

    @property
    def output_size(self) -> int:
        """Last size of h."""
        return self.proj_size or self.hidden_size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        projection = {"weight_hr": (self.proj_size, self.hidden_size)} if self.proj_size else {}
        return {**super().shapes(), **projection}

    def step(self, params: Params, projected: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """(h', c'), from the projected input (..., 4 hidden_size)."""
        h, c = state
        i, f, g, o = (projected + self._project_output(params, h)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return (F.linear(h, params["weight_hr"]) if self.proj_size else h), c


@dataclass(frozen=True)
class GRUCell(Cell):
    """Gated recurrent unit: (..., input_size), (..., hidden_size) -> (..., hidden_size).

    r = sigmoid(W_ir x + b_ir + W_hr h + b_hr), z likewise
    n = tanh(W_in x + b_in + r (W_hn h + b_hn))
    h' = (1 - z) n + z h

    Equals ``torch.nn.GRUCell``, parameter names and initial distribution included; takes any leading axes.
    Source: Cho et al. 2014, arXiv:1406.1078; torch applies r after the product.

    >>> from functorch_gen import random
    >>> cell = GRUCell(3, 2)
    >>> cell(cell.init(random.key(0)), torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """

    gates: ClassVar[int] = 3

    def step(self, params: Params, projected: Tensor, state: Tensor) -> Tensor:
        """h', from the projected input (..., 3 hidden_size)."""
        r_x, z_x, n_x = projected.chunk(3, -1)
        r_h, z_h, n_h = self._project_output(params, state).chunk(3, -1)
        r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
        n = (n_x + r * n_h).tanh()
        return (1 - z) * n + z * state
