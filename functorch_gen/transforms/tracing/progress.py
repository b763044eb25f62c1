"""Says what is being traced or compiled, and for how long."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from functorch_gen import config

__all__ = ["shown"]

_PATIENCE = 2.0
"""Seconds after which something is said."""


@contextlib.contextmanager
def shown(what: str) -> Iterator[None]:
    """Writes ``what`` and the seconds it has taken to standard error while the block runs, if settings want it."""
    setting, stream = config.current().show_compilation, sys.stderr
    if not (stream.isatty() if setting == "auto" else setting):
        yield
        return
    begin, done = time.perf_counter(), threading.Event()

    def tell() -> None:
        while not done.wait(_PATIENCE):
            stream.write(f"\rfunctorch_gen: {what}: {time.perf_counter() - begin:.0f} s")
            stream.flush()

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
        if (seconds := time.perf_counter() - begin) > _PATIENCE:
            stream.write(f"\rfunctorch_gen: {what}: {seconds:.1f} s\n")
            stream.flush()
