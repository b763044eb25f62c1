"""The columns of the table, in order: every composition, every composition under ``jit``, and ``torch.compile``."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from composition.problem import Problem
from composition.transforms import COMPOSITIONS, ROUNDING, Composition
from zoo import Case

from functorch_gen import tree
from functorch_gen.transforms import jit
from functorch_gen.typing import Tree

__all__ = [
    "COLUMNS",
    "COMPILED",
    "EAGER",
    "INDUCTOR_COLUMNS",
    "INDUCTOR_ROWS",
    "Column",
    "backend",
    "difference",
    "run_cell",
]

# Rows and compositions whose jitted cells run generated code; the others run the traced graph.
INDUCTOR_ROWS = {
    "nn.MLP(3, (5, 4), 2, activation=tanh)",
    "nn.Sequential with a key",
    "scan",
    "optim.adamw",
    "diffusion.sample_heun",
}
INDUCTOR_COLUMNS = {"jit(grad)", "jit(hvp)", "jit(vmap(grad))", "jit(scan(grad))"}


@dataclass(frozen=True)
class Column:
    """``run(case)`` is the relative error; it raises ``AssertionError`` if that is too large."""

    name: str
    against: str  # what the cell is compared with, in words
    run: Callable[[Case], float]

    def __str__(self) -> str:
        return self.name


def difference(found: Tree, expected: Tree) -> float:
    """The largest difference of two trees of equal shapes and dtypes, over the largest number of the leaf."""

    def one(path: str, x: torch.Tensor, y: torch.Tensor) -> float:
        if x.shape != y.shape or x.dtype != y.dtype:
            raise AssertionError(f"{path}: expected {y.dtype} {tuple(y.shape)}, got {x.dtype} {tuple(x.shape)}")
        if not y.numel():
            return 0.0
        gap, size = (x.double() - y.double()).abs().max(), y.double().abs().max()
        return float(gap / size.clamp(min=1e-3))  # smaller ones are rounding beside the values, which are near one

    errors = tree.leaves(tree.map_with_path(one, found, expected))
    return math.nan if any(map(math.isnan, errors)) else max(errors)  # max alone would pass over NaN


def close(found: Tree, expected: Tree, tolerance: float) -> float:
    error = difference(found, expected)
    if not error <= tolerance:  # NaN too
        raise AssertionError(f"relative error {error:.1e} > {tolerance:.0e}\nfound {found}\nexpected {expected}")
    return error


def eagerly(composition: Composition, case: Case) -> float:
    """Against the reference."""
    problem = Problem(case)
    at = composition.at(problem, 0)
    return close(composition.program(problem, at), composition.reference(problem, at), composition.tolerance)


def jitted(composition: Composition, case: Case) -> float:
    """Against the composition without ``jit``, at two sets of values by one trace. The last is not the traced one."""
    problem = Problem(case)
    compiled = jit(partial(composition.program, problem), backend=backend(case.name, f"jit({composition})"))
    errors = []
    for seed in (0, 1):
        at = composition.at(problem, seed)
        errors.append(close(compiled(at), composition.program(problem, at), ROUNDING))
    if compiled.traces != 1:
        raise AssertionError(f"expected one trace for two sets of values, got {compiled.traces}")
    return max(errors)


def compiled_whole(case: Case) -> float:
    """``torch.compile(fullgraph=True)`` of the row itself, all its results, at two sets of values."""
    torch._dynamo.reset()
    try:
        compiled = torch.compile(case.fun, fullgraph=True, backend="aot_eager")
        return max(close(compiled(*args), case.fun(*args), ROUNDING) for args in map(case.args, (0, 1)))
    finally:
        torch._dynamo.reset()


def backend(row: str, column: str) -> str:
    """The backend of ``jit`` in a cell."""
    return "inductor" if row in INDUCTOR_ROWS and column in INDUCTOR_COLUMNS else "aten"


EAGER = [Column(c.name, c.against, partial(eagerly, c)) for c in COMPOSITIONS]
COMPILED = [
    *[Column(f"jit({c})", f"`{c}`", partial(jitted, c)) for c in COMPOSITIONS],
    Column("torch.compile", "the row itself", compiled_whole),
]
COLUMNS = [*EAGER, *COMPILED]


def run_cell(case: Case, column: Column) -> float | None:
    """The relative error; None where the row says that the cell raises an error, and it does."""
    refusal = case.errors.get(column.name)
    if refusal is None:
        return column.run(case)
    try:
        error = column.run(case)
    except Exception as raised:
        if re.search(refusal.message, f"{type(raised).__name__}: {raised}"):
            return None
        raise
    raise AssertionError(f"expected an error like {refusal.message!r}, got a result with relative error {error:.1e}")
