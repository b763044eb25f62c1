"""One signature's compiled program, and how a call's leaves go in and come out."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from functorch_gen.transforms.context import requires_gradient
from functorch_gen.transforms.tracing.backends import compile_graph
from functorch_gen.transforms.tracing.donation import (
    Donation,
    donate,
    extent_of,
    release,
    separate_outputs,
    shared_memory,
)
from functorch_gen.transforms.tracing.numbers import number_dtype
from functorch_gen.transforms.tracing.trace import Trace, trace
from functorch_gen.typing import Tree

__all__ = ["BUILDING", "Program"]

BUILDING = threading.RLock()
"""Held while something is traced or compiled: both patch state that all threads share."""


class Program:
    """``fun``, traced for leaves like ``leaves``; compiled at its first call.

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
    ):
        self._names, self._donated, self._backend = names, frozenset(donated), backend
        self._run: Callable[..., Sequence[Tensor]] | None = None
        with BUILDING:
            self.trace: Trace = trace(fun, leaves)
        self.text = self.trace.graph.print_readable(print_output=False)
        if donated:
            self._donation = donate(self.trace.graph, donated)
        else:
            separate_outputs(self.trace.graph)
            self._donation = Donation([None] * self.trace.outputs.others.count(None), [])
        self._strides = [x.stride() for x in self.trace.inputs]
        self._extents = [extent_of(x) for x in (*self.trace.inputs, *self.trace.constants)]
        self._closed_over = [(x.shape, x.stride()) for x in self.trace.constants]
        if self._donation.unused:
            listed = ", ".join(names[i] for i in self._donation.unused)
            warnings.warn(f"jit: no output has the shape, dtype and strides of the donated {listed}", stacklevel=5)

    def compile(self) -> Callable[..., Sequence[Tensor]]:
        """Compiles the graph, once."""
        with BUILDING, torch._C._DisableAutocast():  # the casts are in the graph already
            if self._run is None:
                graph = self.trace.graph
                fakes = [n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"]
                self._run = compile_graph(graph, fakes, self._backend)
            return self._run

    def requires_gradient(self) -> bool:
        """Whether a derivative is taken with respect to a tensor that the function closes over."""
        return requires_gradient(self.trace.constants)

    def __call__(self, leaves: Sequence[Any]) -> Tree:
        """Runs the program; the donated leaves are left empty."""
        run = self._run or self.compile()
        inputs = [
            x if isinstance(x, Tensor) and x.stride() == strides else _enter(x, strides)
            for x, strides in zip(leaves, self._strides, strict=True)
        ]
        inputs += self.trace.constants
        self._check(inputs)
        with torch.no_grad(), torch._C._DisableAutocast():
            results = run(*inputs)
            if self._donated:
                results = self._hand_over(leaves, inputs, iter(results))
        return self.trace.outputs.get(results)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """Raises ``ValueError`` before anything is written, or memory read that is not there."""
        for i, (x, traced) in enumerate(zip(self.trace.constants, self._closed_over, strict=True)):
            if (x.shape, x.stride()) != traced:
                raise ValueError(
                    f"jit: expected the closed-over tensor {i} to keep its shape {tuple(traced[0])} and strides, "
                    f"got {tuple(x.shape)}; was it donated or resized?"
                )
        shared = shared_memory(inputs, self._extents, self._donated) if self._donated else None
        if shared:
            names = [*self._names, *[f"the closed-over tensor {i}" for i in range(len(self.trace.constants))]]
            listed = " and ".join(names[i] for i in shared)
            raise ValueError(f"jit: expected donated buffers to be distinct, got one for {listed}")

    def _hand_over(self, leaves: Sequence[Any], inputs: Sequence[Tensor], returned: Iterator[Tensor]) -> list[Tensor]:
        results: list[Tensor] = []
        for source in self._donation.sources:
            if source is None:
                results.append(next(returned))
                continue
            moved = release(leaves[source])
            results.append(moved if inputs[source] is leaves[source] else inputs[source])
        for i in self._donation.unused:
            release(leaves[i])
        return results


def _enter(x: Any, strides: tuple[int, ...]) -> Tensor:
    """A number as a tensor, a tensor in the layout of the trace."""
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=number_dtype(x), device="cpu")
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)
