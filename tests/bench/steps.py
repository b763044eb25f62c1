"""Time of one training step of each program in every form, after all of them took five equal steps."""

from collections.abc import Callable
from typing import Any

from tests.bench.programs import Program
from tests.bench.table import Options, Table, attempt
from tests.bench.timing import interleave
from tests.bench.variants import makers

__all__ = ["check_equal", "first_losses", "step_times", "time_forms", "time_steps"]

STEPS, TOLERANCE = 5, 1e-3  # float32 and Adam's g / |g|, which turns rounding errors of small gradients into steps
SETTLE = 0.01  # seconds; an OpenMP thread of torch spins for some milliseconds after its last work


def first_losses(run: Callable[[], Any]) -> list[float]:
    """Losses of the first five steps."""
    return [float(run()) for _ in range(STEPS)]


def check_equal(losses: dict[str, list[float]]) -> float:
    """The largest relative difference between the losses of any variant and the first.

    Raises:
        RuntimeError: if a variant's differ by more than 1e-3; names it.
    """
    (_, expected), *_ = losses.items()
    worst = 0.0
    for name, values in losses.items():
        gap = max(abs(x - y) / abs(y) for x, y in zip(values, expected, strict=True))
        if not gap <= TOLERANCE:
            raise RuntimeError(
                f"bench: expected equal losses over {STEPS} steps, got {values} from {name}, not {expected}"
            )
        worst = max(worst, gap)
    return worst


def time_forms(makers: dict[str, Callable[[], Callable[[], Any]]], options: Options) -> Table:
    """Milliseconds of one step in every form."""

    def start(make: Callable[[], Callable[[], Any]]) -> tuple[Callable[[], Any], list[float]]:
        run = make()
        return run, first_losses(run)

    started, failures = attempt({name: lambda make=make: start(make) for name, make in makers.items()})
    worst = check_equal({name: losses for name, (_, losses) in started.items()})
    times = interleave({name: run for name, (run, _) in started.items()}, options.rounds, settle=SETTLE)
    note = f"Losses of the first five steps agree to {worst:.0e}."
    return Table("s", times, failures, note).scaled(1e3, "ms")


def time_steps(program: Program, options: Options) -> Table:
    """:func:`time_forms` of a program."""
    return time_forms(makers(program, options.backend), options)


def step_times(program: Callable[[], Program]) -> Callable[[Options], Table]:
    """The section of a program."""
    return lambda options: time_steps(program(), options)
