"""Honest times: variants take turns within one process, the order rotates, and the median of many rounds counts."""

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Timing", "busy_processors", "interleave", "summary"]


class Timing(NamedTuple):
    """One row of a table: seconds of one call, or whatever the table's unit is."""

    median: float
    minimum: float


def interleave(
    variants: dict[str, Callable[[], object]], rounds: int = 40, warmup: int = 3, settle: float = 0.0
) -> dict[str, Timing]:
    """Times every variant ``rounds`` times; the order rotates from round to round.

    Args:
        settle: a variant runs untimed for so many seconds, at least once, before its timed call, so that the thread
            pool of the variant before it has stopped spinning and its own is awake.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            run = variants[name]
            if settle:
                _run_for(run, settle)
            begin = time.perf_counter()
            run()
            if i >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: summary(s) for name, s in seconds.items()}


def summary(values: list[float]) -> Timing:
    """Median and minimum."""
    return Timing(statistics.median(values), min(values))


def _run_for(run: Callable[[], object], seconds: float) -> None:
    until = time.perf_counter() + seconds
    run()
    while time.perf_counter() < until:
        run()


def busy_processors(seconds: float = 1.0) -> float:
    """How many processors others keep busy, measured while this process sleeps."""
    before = _busy_ticks()
    time.sleep(seconds)
    return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def _busy_ticks() -> int:
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return user + nice + system + irq + softirq
