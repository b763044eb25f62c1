"""One signature's compiled program, and how a call's leaves go in and come out."""

import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_gen.transforms.tracing.backends import compile_graph
from functorch_gen.transforms.tracing.donation import Donation, check_donated, donate, release, separate_outputs
from functorch_gen.transforms.tracing.numbers import number_dtype
from functorch_gen.transforms.tracing.trace import Trace, trace
from functorch_gen.typing import Tree

__all__ = ["Program"]

_COMPILING = threading.RLock()  # tracing patches state that all threads share


class Program:
    """``fun``, traced for leaves like ``leaves`` and compiled.

    Args:
        fun: function of the flat leaves.
        leaves: tensors and Python numbers.
        names: what to call each leaf in a message.
        donated: indices of the leaves whose memory the outputs may take.
    """

    def __init__(
        self,
        fun: Callable[..., Tree],
        leaves: Sequence[Any],
        *,
        names: Sequence[str],
        donated: Sequence[int],
        backend: str,
        compiled: bool = True,
    ):
        self._names, self._donated = names, tuple(donated)
        with _COMPILING:
            self.trace: Trace = trace(fun, leaves)
            self.text = self.trace.graph.print_readable(print_output=False)
            count = len(self.trace.outputs.others) - sum(x is not None for x in self.trace.outputs.others)
            self._donation = Donation([None] * count, [])
            if donated:
                self._donation = donate(self.trace.graph, donated)
            else:
                separate_outputs(self.trace.graph)
            self._strides = [x.stride() for x in self.trace.inputs]
            if compiled:
                fakes = [n.meta["val"] for n in self.trace.graph.graph.nodes if n.op == "placeholder"]
                self._run = compile_graph(self.trace.graph, fakes, backend)
        if self._donation.unused:
            listed = ", ".join(names[i] for i in self._donation.unused)
            warnings.warn(f"jit: no output has the shape, dtype and strides of the donated {listed}", stacklevel=4)

    def __call__(self, leaves: Sequence[Any]) -> Tree:
        """Runs the program; the donated leaves are left empty."""
        inputs = [self._enter(x, strides) for x, strides in zip(leaves, self._strides, strict=True)]
        if self._donated:
            check_donated([*inputs, *self.trace.constants], self._donated, [*self._names, *_closed_over(self.trace)])
        with torch.no_grad():
            returned = iter(self._run(*inputs, *self.trace.constants))
        results = [
            next(returned) if i is None else self._hand_over(leaves[i], inputs[i]) for i in self._donation.sources
        ]
        for i in self._donation.unused:
            release(leaves[i])
        return self.trace.outputs.get(results)

    @staticmethod
    def _enter(x: Any, strides: tuple[int, ...]) -> Tensor:
        if not isinstance(x, Tensor):
            return torch.full((), x, dtype=number_dtype(x))
        if x.stride() == strides:
            return x
        return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)

    @staticmethod
    def _hand_over(leaf: Tensor, entered: Tensor) -> Tensor:
        moved = release(leaf)
        return moved if entered is leaf else entered


def _closed_over(traced: Trace) -> list[str]:
    return [f"the closed-over tensor {i}" for i in range(len(traced.constants))]
