"""One pair of axes on a sheet, made and written without ``pyplot``: no global state is read or changed."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functorch_gen.check import check_shape

__all__ = ["INK", "FilePath", "finite_values", "line_style", "new_axes", "require", "write"]

FilePath = str | os.PathLike[str]
"""Where a picture goes."""

INK = "#1f4e79"
"""What a picture with one colour is drawn in."""

_COLORS = (INK, "#d1495b", "#66a182", "#edae49", "#8d6cab", "#5fa8d3", "#8c564b", "#e377c2", "#7f7f7f", "#17202a")


def require(module: str) -> Any:
    """A module of an optional library.

    Raises:
        ImportError: if it is not installed; names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"plot: needs {module.split('.', maxsplit=1)[0]}: pip install functorch_gen[plot]") from error


def new_axes(title: str, x_label: str, y_label: str, *, width: float = 7, height: float = 4) -> Any:
    """Empty axes on a new sheet of ``width`` times ``height`` inches."""
    figure = require("matplotlib.figure").Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def line_style(i: int) -> dict[str, str]:
    """Colour and dashes of the i-th of several lines; thirty differ."""
    return {"color": _COLORS[i % len(_COLORS)], "linestyle": ("-", "--", ":")[i // len(_COLORS) % 3]}


def write(axes: Any, path: FilePath) -> Path:
    """Writes the sheet that the axes stand on as a PNG file."""
    axes.figure.savefig(path, format="png")
    return Path(path)


def finite_values(
    values: Sequence[float] | Tensor, name: str, *, positive: bool = False, n: int | None = None
) -> Tensor:
    """Values (n,) as float64 on the CPU.

    Args:
        name: who asks, and for which argument.
        positive: for a logarithmic axis.
    Raises:
        ValueError: if they are not (n,), there is none, or one is not finite (or, if ``positive``, not > 0).
    """
    y = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    check_shape(y, "n", name, **({} if n is None else {"n": n}))
    if not len(y) or not torch.isfinite(y).all() or (positive and y.min() <= 0):
        expected = "finite values > 0 for log=True" if positive else "finite values"
        raise ValueError(f"{name}: expected at least one and {expected}, got {y.tolist()[:5]}...")
    return y
