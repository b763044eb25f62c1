"""Honest ratios: variants take turns within one process, and the median of many rounds counts."""

import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Timing", "busy_processors", "interleave"]


class Timing(NamedTuple):
    """Seconds of one call."""

    median: float
    minimum: float


def interleave(variants: dict[str, Callable[[], object]], rounds: int = 40, warmup: int = 3) -> dict[str, Timing]:
    """Times every variant ``rounds`` times; the order rotates from round to round."""
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(-warmup, rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            begin = time.perf_counter()
            variants[name]()
            if i >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return {name: Timing(statistics.median(s), min(s)) for name, s in seconds.items()}


def busy_processors(seconds: float = 1.0) -> float:
    """How many processors others keep busy, measured while this process sleeps."""
    before = _busy_ticks()
    time.sleep(seconds)
    return (_busy_ticks() - before) / os.sysconf("SC_CLK_TCK") / seconds


def _busy_ticks() -> int:
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _idle, _iowait, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return user + nice + system + irq + softirq
