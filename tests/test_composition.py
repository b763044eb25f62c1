"""The table of compositions: every row of the zoo by every column, and the page that it makes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from composition.columns import COLUMNS, EAGER, INDUCTOR_COLUMNS, INDUCTOR_ROWS, Column, difference, run_cell
from composition.page import page, read, shape, write
from composition.problem import Problem
from composition.transforms import ROUNDING, slope
from zoo import CASES, DIFFERENTIABLE, TABLE
from zoo_case import Case, Refusal, from_draw

from functorch_gen.transforms.closure import convert_closure

DOCS = Path(__file__).parents[1] / "docs"

# Compiled cells that the quick tests run too: a row of each kind.
QUICK = {"nn.Linear(3, 4)", "nn.Dropout with a key", "ema.warmup", "fori_loop", "custom_jvp", "cross-entropy"}

# Rows that the table must hold whatever is added, by what their names begin with.
KINDS = ["nn.Conv", "nn.BatchNorm", "nn.LSTM", "models.CNN", "models.UNet", "models.GPT", "models.LSTM", "nn.MLP"]
KINDS += [
    "optim.adam",
    "ema.",
    "diffusion.sample",
    "scan",
    "nn.attention",
    "meta-gradient",
    "models.Remat",
    "nn.Dropout",
]


def cells() -> list[Any]:
    """Every cell, and for rows outside the table those that are not compiled."""
    found = [(case, column) for case in DIFFERENTIABLE for column in (COLUMNS if case in TABLE else EAGER)]
    late = [case.name not in QUICK and not (column in EAGER and case in TABLE) for case, column in found]
    return [
        pytest.param(case, column, id=f"{case}-{column}", marks=[pytest.mark.slow] if slow else [])
        for (case, column), slow in zip(found, late, strict=True)
    ]


@pytest.mark.parametrize(("case", "column"), cells())
def test_cell_equals_its_reference(case, column):
    run_cell(case, column)


# What the table is.


def test_table_is_large_and_errors_are_rare():
    refused = sum(len(case.errors) for case in TABLE)
    assert len(TABLE) >= 60
    assert len(COLUMNS) >= 16
    assert 50 * refused <= len(TABLE) * len(COLUMNS)


def test_names_of_rows_and_columns_are_distinct_and_known():
    rows, columns = {case.name for case in CASES}, {column.name for column in COLUMNS}
    assert len(rows) == len(CASES)
    assert len(columns) == len(COLUMNS)
    assert {name for case in CASES for name in case.errors} <= columns
    assert {case.name for case in TABLE} >= {*QUICK, *INDUCTOR_ROWS}
    assert columns >= INDUCTOR_COLUMNS


@pytest.mark.parametrize("kind", KINDS)
def test_table_has_a_row_of_each_kind(kind):
    assert any(case.name.startswith(kind) for case in TABLE)


PROTECTED = ["grad", "jvp", "grad(grad)", "hvp", "vmap(grad)", "jit(vmap(grad))"]
NEVER_REFUSED = ("remat", "scan", "attention", "batchnorm", "lstm", "dropout", "unet", "gpt")


def test_no_error_where_none_is_allowed():
    rows = [case for case in TABLE if any(word in case.name.lower() for word in NEVER_REFUSED)]
    assert not [(case.name, column) for case in rows for column in PROTECTED if column in case.errors]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_row_closes_over_no_tensor(case):
    """Or ``jit`` would take it as a constant of the row instead of an argument."""
    assert not convert_closure(case.fun)[0]


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_row_depends_on_its_inputs(case):
    """Or its derivatives would be zeros, and agree with anything."""
    problem = Problem(case)
    at = problem.point(0)
    assert slope(lambda z: problem.scalar(z, at.data), at.z, at.v).abs() > 1e-6


# The machine that runs it.


def square(x: torch.Tensor) -> torch.Tensor:
    return x**2


WRONG_GRADIENT = from_draw("detached factor", lambda x: x * x.detach(), lambda d: (d(3),))


@pytest.mark.parametrize("column", [c for c in EAGER if c.name in ("grad", "jvp")], ids=str)
def test_cell_fails_where_the_derivative_is_no_slope(column):
    with pytest.raises(AssertionError, match="relative error"):
        run_cell(WRONG_GRADIENT, column)


def compiled(name: str) -> Column:
    return next(column for column in COLUMNS if column.name == name)


def test_cell_fails_where_jit_keeps_a_value():
    kept: list[torch.Tensor] = []

    def first_value(x: torch.Tensor) -> torch.Tensor:
        kept.append(torch.tensor(len(kept), dtype=x.dtype))
        return x * kept[-1]

    with pytest.raises(AssertionError, match="relative error"):
        run_cell(from_draw("counter", first_value, lambda d: (d(3),)), compiled("jit(grad)"))


def test_cell_says_that_an_expected_error_did_not_come():
    case = from_draw("square", square, lambda d: (d(3),), {"grad": Refusal("no gradient", "none")})
    with pytest.raises(AssertionError, match="expected an error like 'no gradient', got a result"):
        run_cell(case, compiled("grad"))


def test_cell_with_its_error_is_none_and_another_error_is_raised():
    def refuse(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("refuse: expected nothing")

    def refusing(message: str) -> Case:
        return from_draw("square", square, lambda d: (d(3),), {"grad": Refusal(message, "")})

    column = Column("grad", "", lambda case: float(refuse(torch.ones(1))))
    assert run_cell(refusing("ValueError: refuse: expected nothing"), column) is None
    with pytest.raises(ValueError, match="refuse"):
        run_cell(refusing("TypeError"), column)


def test_difference_sees_nan_shape_and_dtype():
    one = torch.ones(2, dtype=torch.float64)
    assert difference({"a": one * (1 + 1e-6)}, {"a": one}) == pytest.approx(1e-6)
    assert not difference([one, one * torch.nan, one], [one, one, one]) <= ROUNDING
    with pytest.raises(AssertionError, match=r"expected torch\.float64"):
        difference({"a": one.float()}, {"a": one})
    with pytest.raises(AssertionError, match=r"a: expected .* \(2,\), got .* \(1,\)"):
        difference({"a": one[:1]}, {"a": one})


# The page.


def test_page_shows_the_table_as_it_is():
    """If not, rows, columns or errors have changed: run `make composition`, or those rows alone, by ROWS."""
    text = (DOCS / "composition.json").read_text()
    shown = {row: {column: error is None for column, error in cells.items()} for row, cells in read(text)[1].items()}
    assert shown == shape()
    assert list(shown) == list(shape())
    assert (DOCS / "composition.md").read_text() == page(text)


def test_page_shows_errors_with_their_reasons(monkeypatch):
    case = from_draw("square", square, lambda d: (d(3),), {"jvp": Refusal("TypeError: no", "see pytorch#1")})
    monkeypatch.setattr("composition.page.TABLE", [case])
    errors = {column.name: None if column.name == "jvp" else 1.2e-11 for column in COLUMNS}
    text = page(write({"square": errors}))
    assert "1 rows by" in text
    assert "1 of them raise the errors listed below" in text
    assert "| `square` | 10 | [error 1](#errors) | 10 |" in text
    assert "1. `TypeError: no`: see pytorch#1" in text
