"""A frozen dataclass as a command line: each field is a flag, its comment the help text."""

import argparse
import inspect
import re
from collections.abc import Sequence
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
