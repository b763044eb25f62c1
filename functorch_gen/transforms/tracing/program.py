"""One signature's compiled program, and how a call's leaves go in and come out."""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from functorch_gen import config
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.context import requires_gradient
from functorch_gen.transforms.effects import has_effects
from functorch_gen.transforms.tracing.backends import compile_graph, decomposed, on_cpu, run_as_is
from functorch_gen.transforms.tracing.cost import Cost, estimate
from functorch_gen.transforms.tracing.decompose import TRACING
from functorch_gen.transforms.tracing.donation import (
    Distinct,
    Donation,
    are_forgotten,
    donate,
    extent_of,
    nothing_like,
    poison,
    release,
    separate_outputs,
)
from functorch_gen.transforms.tracing.executor import Executable, planned_peak
from functorch_gen.transforms.tracing.numbers import number_dtype
from functorch_gen.transforms.tracing.progress import shown
from functorch_gen.transforms.tracing.sites import site_of
from functorch_gen.transforms.tracing.stepwise import runner
from functorch_gen.transforms.tracing.text import readable
from functorch_gen.transforms.tracing.trace import Trace, trace
from functorch_gen.typing import Tree

__all__ = ["TRACING", "Plan", "Program"]

_COMPILING = threading.RLock()

_Run = Callable[..., Sequence[Tensor]]


@dataclass
class Plan:
    """How leaves become the inputs of a program, and its outputs the result. It can be pickled."""

    names: list[str]  # of the leaves, for messages
    donated: frozenset[int]  # leaves whose memory the outputs may take
    strides: list[tuple[int, ...]]  # of the leaves
    extents: list[int]  # bytes, of the leaves and the tensors closed over
    closed_over: list[tuple[torch.Size, tuple[int, ...]]]  # shapes and strides
    donation: Donation
    outputs: Outputs


class Program:
    """A plan and what runs it, which is compiled at the first call."""

    def __init__(self, plan: Plan, backend: str, name: str, traced: Trace | None = None, text: str = ""):
        self.plan, self._backend, self.name, self.text = plan, backend, name, text
        self._trace = traced
        self._constants = traced.constants if traced else []
        self._run: _Run | None = None
        self._distinct = Distinct(plan.extents, plan.donated)
        self.executable: Executable | None = None
        self._nothing: list[list[Tensor]] | None = None
        self._shells: list[list[Tensor]] = []  # the leaves that the last call emptied
        self._starting = threading.Lock()

    @classmethod
    def trace(
        cls,
        fun: Callable[..., Tree],
        leaves: Sequence[Any],
        *,
        names: Sequence[str],
        donated: Sequence[int],
        backend: str,
        name: str,
    ) -> "Program":
        """The program of ``fun``, a function of flat leaves, for leaves like these.

        Args:
            leaves: tensors and Python numbers.
            names: what to call each leaf in a message.
            donated: indices of the leaves whose memory the outputs may take.
        """
        with TRACING, shown(f"tracing {name}"):
            traced = trace(fun, leaves)
        text = readable(traced, [_path(n) for n in names])
        if donated:
            donation = donate(traced.graph, donated)
        else:
            separate_outputs(traced.graph)
            donation = Donation([None] * traced.outputs.others.count(None), [])
        if donation.unused:
            listed = ", ".join(names[i] for i in donation.unused)
            warnings.warn(f"jit: no output has the shape, dtype and strides of the donated {listed}", stacklevel=6)
        plan = Plan(
            names=list(names),
            donated=frozenset(donated),
            strides=[x.stride() for x in traced.inputs],
            extents=[extent_of(x) for x in (*traced.inputs, *traced.constants)],
            closed_over=[(x.shape, x.stride()) for x in traced.constants],
            donation=donation,
            outputs=traced.outputs,
        )
        return cls(plan, backend, name, traced, text)

    @classmethod
    def restore(cls, plan: Plan, executable: Executable, backend: str, name: str) -> "Program":
        """A program that another process compiled."""
        program = cls(plan, backend, name)
        program.executable, program._run = executable, executable.load()
        return program

    def saved(self) -> tuple[Plan, Executable]:
        """What :meth:`restore` takes.

        Raises:
            ValueError: if the program holds what another process has not: tensors closed over, callbacks, or no
                generated code.
        """
        self.compile(wait=True)
        if self._constants:
            shapes = ", ".join(str(tuple(x.shape)) for x in self._constants)
            raise ValueError(
                f"jit: expected {self.name} to close over no tensors, so that it can be saved, got shapes {shapes}; "
                "pass them as arguments"
            )
        if self._trace is not None and has_effects(self._trace.graph.graph):
            raise ValueError(
                f"jit: expected {self.name} to call nothing back, so that it can be saved, got debug.print"
            )
        if self.executable is None:
            raise ValueError(f"jit: expected {self.name} to be compiled with backend='inductor' on a CPU to be saved")
        return self.plan, self.executable

    def files(self) -> set[str]:
        """The source files that the operations come from."""
        if self._trace is None:
            return set()
        sites = [site_of(node) for node in self._trace.graph.graph.nodes]
        return {site.file for site in sites if site is not None}

    def cost(self) -> Cost:
        """Estimated operations, bytes and peak memory of a call."""
        if self._trace is None:
            raise ValueError(
                f"jit: expected {self.name} to be traced in this process, got a program loaded from a file"
            )
        graph = self._trace.graph
        cost = estimate(graph, fused=self._backend != "aten")
        if self._backend == "aten" or not on_cpu(graph):
            return cost
        peak = self.executable.code.peak if self.executable else planned_peak(decomposed(graph))
        inputs = [*self._trace.inputs, *self._constants]
        return replace(cost, peak=peak + sum(x.nbytes for x in inputs))

    def compile(self, wait: bool = False) -> _Run:
        """Compiles the graph, once; with backend="tiered" in the background, unless ``wait``."""
        if self._backend == "tiered" and not wait:
            self._answer_at_once()
        elif self._run is None or (self._backend == "tiered" and self.executable is None):
            with _COMPILING:
                if self._run is None or self.executable is None:
                    self._compile()
        assert self._run is not None
        return self._run

    def _answer_at_once(self) -> None:
        with self._starting:  # not the lock of those that compile: a new shape does not wait for them
            if self._run is None and self._trace is not None:
                self._run = run_as_is(self._trace.graph)
                threading.Thread(target=self._improve, daemon=True, name=f"compiling {self.name}").start()

    def _compile(self) -> None:
        if self._trace is None:
            return
        with shown(f"compiling {self.name}"), torch.no_grad(), torch._C._DisableAutocast():  # casts are in the graph
            run, self.executable = compile_graph(self._trace.graph, self._backend, self._fixed())
        self._run = run

    def _fixed(self) -> list[int]:
        """The inputs that stay where they are from call to call: donated, or closed over."""
        leaves = len(self.plan.names)
        return [*self.plan.donated, *range(leaves, leaves + len(self._constants))]

    def _improve(self) -> None:
        """Compiles while the graph runs as it is."""
        try:
            with _COMPILING:
                self._compile()
        except Exception as error:
            warnings.warn(f"jit: {self.name} goes on without generated code: {error}", stacklevel=1)

    def requires_gradient(self) -> bool:
        """Whether a derivative is taken with respect to a tensor that the function closes over."""
        return bool(self._constants) and requires_gradient(self._constants)

    def __call__(self, leaves: Sequence[Any], *, laid_out: bool = False) -> Tree:
        """Runs the program; the donated leaves are left empty.

        Args:
            laid_out: whether it is known that all leaves are tensors in the layout of the trace.
        """
        run = self._run or self.compile()
        if self._trace is not None:
            run = runner(self._trace.graph, self.plan.names) or run
        inputs = leaves if laid_out else [*map(_enter, leaves, self.plan.strides)]
        if self._constants:
            inputs = [*inputs, *self._constants]
        self._check(inputs)
        with torch.no_grad(), torch._C._DisableAutocast():
            results = run(*inputs)
            if self.plan.donated:
                results = self._hand_over(leaves, inputs, iter(results), laid_out)
        return self.plan.outputs.get(results)

    def _check(self, inputs: Sequence[Tensor]) -> None:
        """Raises ``ValueError`` before anything is written, or memory read that is not there."""
        for i, (x, traced) in enumerate(zip(self._constants, self.plan.closed_over, strict=True)):
            if (x.shape, x.stride()) != traced:
                raise ValueError(
                    f"jit: expected the closed-over tensor {i} to keep its shape {tuple(traced[0])} and strides, "
                    f"got {tuple(x.shape)}; was it donated or resized?"
                )
        shared = self._distinct.shared(inputs) if self.plan.donated else None
        if shared:
            names = [*self.plan.names, *[f"the closed-over tensor {i}" for i in range(len(self._constants))]]
            listed = " and ".join(names[i] for i in shared)
            raise ValueError(f"jit: expected donated buffers to be distinct, got one for {listed}")

    def _hand_over(
        self, leaves: Sequence[Any], inputs: Sequence[Tensor], returned: Iterator[Tensor], laid_out: bool
    ) -> list[Tensor]:
        sources, unused = self.plan.donation.sources, self.plan.donation.unused
        taken = [i for i in sources if i is not None]
        if self._nothing is None:
            self._nothing = [[nothing_like(leaves[i]) for i in part] for part in (taken, unused)]
        given = [leaves[i] for i in taken]
        moved = release(given, self._nothing[0], self._spare() if laid_out else ())
        self._shells = [given]
        if not laid_out:  # a leaf in another layout was copied on its way in
            moved = [x if inputs[i] is leaves[i] else inputs[i] for x, i in zip(moved, taken, strict=True)]
        rest = release([leaves[i] for i in unused], self._nothing[1])
        if config.current().poison_donated:
            old, moved = moved, [x.clone() for x in moved]
            for x in (*old, *rest):
                poison(x)
        ready = iter(moved)
        return [next(returned) if i is None else next(ready) for i in sources]

    def _spare(self) -> list[Tensor]:
        """Tensors that :meth:`_hand_over` may make new ones of; each is given to one call."""
        try:
            shells = self._shells.pop()
        except IndexError:
            return []
        return shells if are_forgotten(shells) else []


def _enter(x: Any, strides: tuple[int, ...]) -> Tensor:
    """A number as a tensor, a tensor in the layout of the trace."""
    if not isinstance(x, Tensor):
        return torch.full((), x, dtype=number_dtype(x), device="cpu")
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def _path(name: str) -> str:
    """``argument 'params' at 'w.bias'`` as ``params.w.bias``."""
    return name.removeprefix("argument ").replace(" at ", ".").replace("'", "")
