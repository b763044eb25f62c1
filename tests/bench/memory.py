"""Peak memory, as torch's allocator counts it, and the time that saving it costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import functorch_gen as fg
from tests.bench.programs import PROGRAMS, Program
from tests.bench.steps import SETTLE
from tests.bench.table import Options, Table, attempt
from tests.bench.timing import Timing, interleave
from tests.bench.variants import FunctionalStep

__all__ = ["eager_memory", "eager_times", "peak_bytes", "predicted_peaks", "remat_memory", "remat_times"]

Loss = Callable[[Any, Tensor], Tensor]

BLOCKS, LAYERS, ROWS, WIDTH = 12, 3, 4096, 512
MEGABYTE = 1e6


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes alive at once that ``run`` allocates through torch, its result included.

    From the profiler's record of every allocation: exact, and blind to what was alive before.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as record:
        result = run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    del result
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def block(params: list[Tensor], x: Tensor) -> Tensor:
    """Layers tanh(x w)."""
    for w in params:
        x = torch.tanh(x @ w)
    return x


def blocks_problem(*, remat: bool, rows: int = ROWS, width: int = WIDTH) -> tuple[Loss, Any, Tensor]:
    """The loss of the blocks, their weights and their input."""
    layer = fg.remat(block) if remat else block
    keys = fg.random.split(fg.random.key(0), BLOCKS * LAYERS)
    weights = [fg.random.normal(key, (width, width)) / width**0.5 for key in keys]
    params = [weights[i : i + LAYERS] for i in range(0, len(weights), LAYERS)]

    def loss(params: Any, x: Tensor) -> Tensor:
        for p in params:
            x = layer(p, x)
        return x.square().mean()

    return loss, params, fg.random.normal(fg.random.key(1), (rows, width))


def block_gradients(options: Options, **sizes: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """The compiled gradient of the blocks, with and without remat."""

    def compiled(remat: bool) -> Callable[[], Any]:
        loss, params, x = blocks_problem(remat=remat, **sizes)
        gradient = fg.jit(fg.grad(loss), backend=options.backend)
        gradient(params, x)
        return lambda: gradient(params, x)

    return {"fg.jit": lambda: compiled(False), "fg.jit, fg.remat": lambda: compiled(True)}


def eager_gradients() -> dict[str, Callable[[], Callable[[], Any]]]:
    """The eager gradient of the blocks by fg and by torch.func."""
    loss, params, x = blocks_problem(remat=False)
    ours, theirs = fg.value_and_grad(loss), torch.func.grad_and_value(loss)
    return {
        "fg.value_and_grad": lambda: lambda: ours(params, x),
        "torch.func.grad_and_value": lambda: lambda: theirs(params, x),
    }


def peaks(makers: dict[str, Callable[[], Callable[[], Any]]]) -> Table:
    """Megabytes of each row."""

    def measured(make: Callable[[], Callable[[], Any]]) -> int:
        run = make()
        run()
        return peak_bytes(run)

    found, failures = attempt({name: lambda make=make: measured(make) for name, make in makers.items()})
    return Table("MB", {name: Timing(n / MEGABYTE, n / MEGABYTE) for name, n in found.items()}, failures)


def times(makers: dict[str, Callable[[], Callable[[], Any]]], rounds: int) -> Table:
    """Milliseconds of each row."""
    runs, failures = attempt(makers)
    return Table("s", interleave(runs, rounds, warmup=1, settle=SETTLE), failures).scaled(1e3, "ms")


def remat_memory(options: Options) -> Table:
    """Peak of the compiled gradient, without its arguments and with the gradients it returns."""
    return peaks(block_gradients(options))


def remat_times(options: Options) -> Table:
    """Time of the compiled gradient."""
    return times(block_gradients(options), options.rounds)


def eager_memory(options: Options) -> Table:
    """Peak of the eager gradient."""
    return peaks(eager_gradients())


def eager_times(options: Options) -> Table:
    """Time of the eager gradient."""
    return times(eager_gradients(), options.rounds)


def predicted_peaks(options: Options) -> Table:
    """``lower(...).cost()`` beside the measured peak of a step, in which the arguments count too."""
    found, failures = attempt(
        {name: lambda make=make: predicted_and_measured(make(), options.backend) for name, make in PROGRAMS.items()}
    )
    rows = {
        f"{name}, {what}": Timing(n / MEGABYTE, n / MEGABYTE)
        for name, both in found.items()
        for what, n in zip(("predicted", "measured"), both, strict=True)
    }
    return Table("MB", rows, failures)


def predicted_and_measured(program: Program, backend: str) -> tuple[int, int]:
    """Bytes of the program's compiled step by ``cost()`` and by the allocator."""
    step = FunctionalStep(program, backend=backend)
    predicted = step.step.lower(step.state, step.batch).cost().peak
    step()
    arguments = fg.tree.nbytes((step.state, step.batch))
    return predicted, arguments + peak_bytes(step)
