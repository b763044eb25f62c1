"""Settings of the process: ``fg.config.update(debug_nans=True)``, or the variable ``FUNCTORCH_GEN_DEBUG_NANS=1``.

Variables are read at import. Settings hold for all threads, and programs that are compiled already follow them too.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

__all__ = ["Settings", "current", "from_environment", "override", "update"]


@dataclass(frozen=True)
class Settings:
    """All settings and their defaults.

    Attributes:
        debug_nans: jitted functions run operation by operation, and the first that yields NaN or infinity raises
            ``FloatingPointError`` with the user's line.
        debug_sink: where ``debug.print`` writes its lines; None: standard output.
        explain_retraces: a jitted function that is traced again says which leaf has changed, and how.
        poison_donated: results get memory of their own, and all donated buffers are filled with NaN.
        show_compilation: what is compiled, and for how long, is written to standard error; ``"auto"``: if that is a
            terminal.

    >>> Settings().debug_nans
    False
    """

    debug_nans: bool = False
    debug_sink: Callable[[str], object] | None = None
    explain_retraces: bool = False
    poison_donated: bool = False
    show_compilation: bool | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name in ("debug_nans", "explain_retraces", "poison_donated"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"config: expected {name} to be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.show_compilation, bool) and self.show_compilation != "auto":
            raise ValueError(
                f"config: expected show_compilation to be True, False or 'auto', got {self.show_compilation!r}"
            )
        if self.debug_sink is not None and not callable(self.debug_sink):
            raise TypeError(f"config: expected debug_sink to be a function or None, got {self.debug_sink!r}")


def from_environment(environment: Mapping[str, str]) -> Settings:
    """The settings that variables such as ``FUNCTORCH_GEN_DEBUG_NANS=1`` ask for; ``debug_sink`` has none.

    Raises:
        ValueError: if a value is none of 1, 0, true, false (or auto, for ``show_compilation``); names the variable.

    >>> from_environment({"FUNCTORCH_GEN_DEBUG_NANS": "1"}).debug_nans
    True
    """
    words: dict[str, Any] = {"1": True, "true": True, "0": False, "false": False}
    found = {}
    for name in [field.name for field in fields(Settings) if field.name != "debug_sink"]:
        variable = f"FUNCTORCH_GEN_{name.upper()}"
        allowed = {**words, "auto": "auto"} if name == "show_compilation" else words
        if variable in environment:
            value = environment[variable].lower()
            if value not in allowed:
                raise ValueError(f"config: expected {variable} to be one of {', '.join(allowed)}, got {value!r}")
            found[name] = allowed[value]
    return Settings(**found)


_settings = from_environment(os.environ)


def current() -> Settings:
    """The settings as they are now.

    >>> current().explain_retraces
    False
    """
    return _settings


def update(**settings: Any) -> None:
    """Changes the named settings, for all threads.

    Raises:
        ValueError: if there is no setting of that name, or ``show_compilation`` is given another value than its three.
        TypeError: if a value is of the wrong type.

    >>> update(debug_nans=False)
    >>> current().debug_nans
    False
    """
    global _settings
    names = [field.name for field in fields(Settings)]
    for name in settings:
        if name not in names:
            raise ValueError(f"config: expected one of {', '.join(names)}, got {name!r}")
    _settings = replace(_settings, **settings)


@contextmanager
def override(**settings: Any) -> Iterator[Settings]:
    """Changes the named settings until the block is left, for all threads; then those have their old values again.

    >>> with override(debug_nans=True) as settings:
    ...     settings.debug_nans, current().debug_nans
    (True, True)
    >>> current().debug_nans
    False
    """
    before = _settings
    update(**settings)
    try:
        yield _settings
    finally:
        update(**{name: getattr(before, name) for name in settings})
