"""docs/composition.md and docs/composition.json: the numbers of the cells, and the page made of them."""

import json
import math
from collections.abc import Iterator
from typing import Any

import torch
from composition.columns import COLUMNS, COMPILED, EAGER, Column, backend
from composition.problem import INPUTS, OUTPUTS
from composition.transforms import DIFFERENCE, ROUNDING, STEP
from zoo import TABLE

__all__ = ["Results", "page", "read", "shape", "write"]

Results = dict[str, dict[str, float | None]]  # row -> column -> relative error; None: raises the row's error

HEAD = """# Composition

Every transform of every kind of function, and transforms of transforms: {rows} rows by {columns} columns. Each of the
{cells} cells is a comparison in float64 with something computed in another way. {errors}

Made by `make composition` with torch {torch}. `make test-all` runs every cell again, and a test sees to it that this
page lists the rows, columns and errors that stand in `tests/`.

## How a cell is computed

- **Rows** are pure functions and their arguments, drawn at random (`tests/zoo.py`, `tests/rows`): parameters, data,
  keys, labels. The floating arguments are moved along {inputs} random directions, and the floating results are summed
  with {outputs} sets of random weights, so that all derivatives are small matrices; a wrong entry shows in them. Where
  a column needs one number, it is the sum of the sines of the {outputs}.
- **Differences** are central, of fourth order, with steps of {step}; a cell passes up to {difference}. What is compared
  with a loop, another mode or the same without a transform passes up to {rounding}. Errors are relative to the largest
  number of the tensor.
- **Batches** are three points: other arguments, keys and labels for each.
- **`jit`** takes every tensor as an argument. The program is called with two sets of values, must have been traced
  once, and is compared with the composition without `jit` for both. It runs the traced graph (`backend="aten"`), and in
  cells with a `*` the code that Inductor generates.
- **`torch.compile`** is `torch.compile(fullgraph=True)` of the row itself, at two points.

A number says to how many digits a cell agrees with its reference; `=`: in every bit.
"""


def write(rows: Results) -> str:
    """The rows as JSON, one a line, numbers in the order of the columns."""
    names = [column.name for column in COLUMNS]
    lines = [
        f"{json.dumps(row)}: {json.dumps([_short(errors[name]) for name in names])}" for row, errors in rows.items()
    ]
    torch_version = json.dumps(torch.__version__.partition("+")[0])
    body = ",\n".join(lines)
    return f'{{"torch": {torch_version},\n"columns": {json.dumps(names)},\n"rows": {{\n{body}\n}}}}\n'


def _short(error: float | None) -> float | None:
    return None if error is None else float(f"{error:.1e}")


def read(text: str) -> tuple[str, Results]:
    """The version of torch, and the rows, from what :func:`write` wrote."""
    found: dict[str, Any] = json.loads(text)
    return found["torch"], {row: dict(zip(found["columns"], errors)) for row, errors in found["rows"].items()}


def page(text: str) -> str:
    """The page, from the JSON."""
    version, rows = read(text)
    cells = [error for row in rows.values() for error in row.values()]
    refused = sum(error is None for error in cells)
    head = HEAD.format(
        rows=len(rows),
        columns=len(COLUMNS),
        cells=f"{len(cells):,}",
        errors=f"{refused} of them raise the errors listed below." if refused else "None of them is an error.",
        torch=version,
        inputs=INPUTS,
        outputs=OUTPUTS,
        step=_power(STEP),
        difference=_power(DIFFERENCE),
        rounding=_power(ROUNDING),
    )
    parts = [head, "## Columns\n", *_references(), "\n## Transforms\n", *_table(rows, EAGER)]
    parts += ["\n## Transforms, compiled\n", *_table(rows, COMPILED), *_errors()]
    return "\n".join(parts) + "\n"


def _power(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-")


def shape() -> dict[str, dict[str, bool]]:
    """The table that the code describes: row -> column -> whether the cell is an error."""
    return {case.name: {column.name: column.name in case.errors for column in COLUMNS} for case in TABLE}


def _references() -> Iterator[str]:
    yield "| Column | is compared with |\n|---|---|"
    for column in COLUMNS:
        yield f"| `{column}` | {column.against} |"


def _table(rows: Results, columns: list[Column]) -> Iterator[str]:
    yield "| | " + " | ".join(f"`{column}`" for column in columns) + " |"
    yield "|---|" + "---:|" * len(columns)
    numbers = _footnotes()
    for row, errors in rows.items():
        cells = [_cell(errors[column.name], row, column.name, numbers) for column in columns]
        yield f"| `{row}` | " + " | ".join(cells) + " |"


def _cell(error: float | None, row: str, column: str, numbers: dict[tuple[str, str], int]) -> str:
    if error is None:
        return f"[error {numbers[row, column]}](#errors)"
    digits = "=" if error == 0 else str(math.floor(-math.log10(error)))
    return digits + ("*" if backend(row, column) == "inductor" else "")


def _footnotes() -> dict[tuple[str, str], int]:
    """(row, column) -> the number of its error; equal ones share a number."""
    reasons = {(case.name, column): refusal for case in TABLE for column, refusal in case.errors.items()}
    order = list(dict.fromkeys(reasons.values()))
    return {cell: 1 + order.index(refusal) for cell, refusal in reasons.items()}


def _errors() -> Iterator[str]:
    reasons = dict.fromkeys(refusal for case in TABLE for refusal in case.errors.values())
    if reasons:
        yield "\n## Errors\n"
    for number, refusal in enumerate(reasons, 1):
        yield f"{number}. `{refusal.message}`: {refusal.reason}"
