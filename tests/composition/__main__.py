"""``make composition``: runs every cell and writes docs/composition.json and docs/composition.md.

With names of rows, runs these alone and keeps what the file says of the others.
"""

import sys
import time
import traceback
from pathlib import Path

import torch
from composition.columns import COLUMNS, run_cell
from composition.page import Results, page, read, write
from zoo import TABLE
from zoo_case import Case

DOCS = Path(__file__).parents[2] / "docs"


def run_row(case: Case) -> dict[str, float | None]:
    """The relative error of each cell; those that fail are told of and left out."""
    errors = {}
    for column in COLUMNS:
        try:
            errors[column.name] = run_cell(case, column)
        except Exception:  # the other cells are run all the same
            sys.stderr.write(f"{case}, {column}\n{traceback.format_exc()}\n")
    return errors


def load(names: list[str]) -> Results:
    """The rows that the file holds of the table as it is, without those that are to be run."""
    path = DOCS / "composition.json"
    known = read(path.read_text())[1] if names and path.exists() else {}
    columns = [column.name for column in COLUMNS]
    return {row: errors for row, errors in known.items() if list(errors) == columns and row not in names}


def main(names: list[str]) -> int:
    """Runs the rows named, or all. The exit status is the number of cells that fail."""
    unknown = set(names) - {case.name for case in TABLE}
    if unknown:
        sys.exit(f"composition: expected names of rows of the table, got {sorted(unknown)}")
    torch.set_num_threads(1)
    start, rows = time.monotonic(), load(names)
    for case in TABLE:
        if not names or case.name in names:
            rows[case.name] = run_row(case)
            sys.stderr.write(f"{time.monotonic() - start:6.0f} s  {case}\n")
    rows = {case.name: rows[case.name] for case in TABLE if case.name in rows}
    failures = sum(len(COLUMNS) - len(row) for row in rows.values())
    if failures or len(rows) < len(TABLE):
        sys.stderr.write(f"{failures} cells fail, {len(TABLE) - len(rows)} rows are missing: no page is written\n")
        return failures
    (DOCS / "composition.json").write_text(write(rows))
    (DOCS / "composition.md").write_text(page(write(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 125))
