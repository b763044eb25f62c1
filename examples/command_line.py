"""A frozen dataclass as a command line: each field is a flag, its comment the help text. And tables of results."""

import argparse
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

C = TypeVar("C")


def parse(config: type[C], description: str | None, arguments: Sequence[str] | None = None) -> C:
    """Reads ``config`` from the command line; a wrong flag or value ends the program with a message.

    Args:
        config: frozen dataclass whose fields have types and defaults, and ``# help`` at the end of their lines.
        arguments: instead of ``sys.argv[1:]``.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    notes = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(config), re.MULTILINE))
    described: Any = config
    for field in fields(described):
        text = f"{notes.get(field.name, '')} (default: {field.default!r})".replace("%", "%%")
        options: dict[str, Any] = {"default": field.default, "help": text}
        if isinstance(field.default, bool):
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": type(field.default), "metavar": type(field.default).__name__.upper()}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **options)
    try:
        return config(**vars(parser.parse_args(arguments)))
    except (TypeError, ValueError) as error:
        parser.error(str(error))


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Named rows of numbers under the names of their columns, as lines of text; a row may lack a number."""
    lines = cells(rows)
    first, *widths = (max(len(cell) for cell in column) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(row, widths, strict=True))])
        for name, *row in lines
    )


def cells(rows: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """The same, a list of cells for each line: the names of the columns, then name and numbers of each row."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    text = {
        name: {column: str(value) if isinstance(value, int) else f"{value:.4g}" for column, value in row.items()}
        for name, row in rows.items()
    }
    return [["", *columns], *([name, *(row.get(column, "") for column in columns)] for name, row in text.items())]
