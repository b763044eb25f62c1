"""What a section measures: rows of one unit, and the rows that failed."""

import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.bench.timing import Timing

__all__ = ["Options", "Table", "attempt"]


@dataclass(frozen=True)
class Options:
    """How much to measure.

    Args:
        rounds: timed calls of each row.
        repeats: processes of each cold row.
        backend: of ``fg.jit``.
    """

    rounds: int = 40
    repeats: int = 3
    backend: str = "inductor"


@dataclass
class Table:
    """Rows by name."""

    unit: str
    rows: dict[str, Timing]
    failures: dict[str, str] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "rows": {name: row._asdict() for name, row in self.rows.items()}}

    def scaled(self, factor: float, unit: str) -> "Table":
        rows = {name: Timing(*[factor * x for x in row]) for name, row in self.rows.items()}
        return Table(unit, rows, self.failures, self.note)


def attempt(makers: dict[str, Callable[[], Any]]) -> tuple[dict[str, Any], dict[str, str]]:
    """What the makers return, and the messages of those that raised: one broken row does not cost the others."""
    made, failures = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make()
        except Exception as error:  # any: it is reported in the table and by the exit status
            traceback.print_exc(file=sys.stderr)
            failures[name] = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"[:200]
    return made, failures
