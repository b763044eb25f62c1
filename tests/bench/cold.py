"""One cold start in this process: ``python -m tests.bench.cold CASE`` prints its seconds.

The parent gives the process an empty Inductor cache. Imports, the probe of the vector instructions, the initial weights
and (with JAX) the start of the backend come before the clock.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
import torch._inductor.compile_fx
from torch._inductor.cpu_vec_isa import pick_vec_isa

import functorch_gen as fg
from tests.bench.depth import depth_step
from tests.bench.programs import PROGRAMS
from tests.bench.variants import FunctionalStep, ModuleStep, jax_step

__all__ = ["CASES"]

Prepare = Callable[[], Callable[[], Any]]


def functional(name: str, *, flat: bool = False) -> Prepare:
    """Trace, compile and first run of the whole step."""
    return lambda: FunctionalStep(PROGRAMS[name](), flat=flat)


def module_alone(name: str) -> Prepare:
    """``torch.compile`` of module and loss: first forward and backward pass, no update."""

    def prepare() -> Callable[[], Any]:
        step = ModuleStep(PROGRAMS[name](), compiled=True)
        return step.gradient

    return prepare


def jax_whole(name: str) -> Prepare:
    """Trace, compile and first run of JAX's whole step."""
    return lambda: jax_step(PROGRAMS[name]())


CASES: dict[str, Prepare] = {
    "unet fg": functional("unet"),
    "unet fg flat": functional("unet", flat=True),
    "unet module": module_alone("unet"),
    "gpt fg": functional("gpt"),
    "gpt fg flat": functional("gpt", flat=True),
    "gpt module": module_alone("gpt"),
    "gpt jax": jax_whole("gpt"),
    "unet jax": jax_whole("unet"),
    **{
        f"depth {form} {layers}": lambda form=form, layers=layers: depth_step(form, layers)
        for form in ("scan", "loop")
        for layers in (4, 48)
    },
}


def probe() -> None:
    """What every compilation of the process would otherwise pay once."""
    pick_vec_isa()
    fg.jit(torch.neg, backend="aten")(torch.ones(1))


def cold(case: str) -> float:
    """Seconds from the first call to its result."""
    run = CASES[case]()
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def save(case: str, artifact: Path) -> float:
    """Compiles, takes a step and saves the program; seconds of all that."""
    step = _functional_step(case)
    begin = time.perf_counter()
    step()
    step.step.save(artifact)
    return time.perf_counter() - begin


def warm(case: str, artifact: Path) -> float:
    """Seconds from the imports to the end of the first step: weights, state, loading and the step."""
    begin = time.perf_counter()
    step = _functional_step(case)
    step.step.load(artifact)
    step()
    return time.perf_counter() - begin


def _functional_step(case: str) -> FunctionalStep:
    step = CASES[case]()
    if not isinstance(step, FunctionalStep):
        raise TypeError(f"cold: expected a case of fg.jit, got {case!r}")
    return step


def main() -> None:
    """Prints ``{"seconds": ...}`` on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--save", type=Path, help="save the compiled program to this file")
    parser.add_argument("--load", type=Path, help="start from this file")
    options = parser.parse_args()
    if options.case.endswith("jax"):
        import jax

        jax.devices()
    probe()
    if options.save:
        seconds = save(options.case, options.save)
    elif options.load:
        seconds = warm(options.case, options.load)
    else:
        seconds = cold(options.case)
    sys.stdout.write(json.dumps({"seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
