"""Cold compilations and warm starts: every one in a process of its own, with an empty Inductor cache."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.bench.table import Options, Table
from tests.bench.timing import summary

__all__ = ["cold_times", "warm_times"]

ROOT = Path(__file__).parents[2]
WARM = {"fg.jit": "unet fg", "fg.jit, flat": "unet fg flat"}


def run_case(*arguments: str) -> float:
    """Seconds that ``tests.bench.cold`` reports."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "XDG_CACHE_HOME": cache}
        command = [sys.executable, "-m", "tests.bench.cold", *arguments]
        result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.stderr.write(result.stderr)
        raise RuntimeError(next(reversed(result.stderr.strip().splitlines()), f"exit status {result.returncode}"))
    return json.loads(result.stdout.splitlines()[-1])["seconds"]


def repeat(rows: dict[str, Callable[[], float]], repeats: int) -> Table:
    """Takes every row ``repeats`` times; the order rotates."""
    names = list(rows)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    failures: dict[str, str] = {}
    for i in range(repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            try:
                seconds[name].append(rows[name]())
            except RuntimeError as error:
                failures[name] = str(error)[:200]
    return Table("s", {name: summary(s) for name, s in seconds.items() if s}, failures)


def cold_times(cases: dict[str, str]) -> Callable[[Options], Table]:
    """Seconds of each case, by row name."""
    return lambda options: repeat(
        {row: lambda case=case: run_case(case) for row, case in cases.items()}, options.repeats
    )


def warm_times(options: Options) -> Table:
    """Seconds from imports to the end of the first step in a process that loads what another has saved."""
    with tempfile.TemporaryDirectory() as folder:

        def start(case: str) -> float:
            artifact = Path(folder) / case.replace(" ", "_")
            if not artifact.exists():
                run_case(case, "--save", str(artifact))
            return run_case(case, "--load", str(artifact))

        return repeat({row: lambda case=case: start(case) for row, case in WARM.items()}, options.repeats)
