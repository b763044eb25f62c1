"""Values over the steps of a run: one curve with its moving average, or several with a legend."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functorch_gen.check import check_positive
from functorch_gen.plot.figure import INK, FilePath, finite_values, line_style, new_axes, write

__all__ = ["curve", "curves"]


def curve(
    values: Sequence[float] | Tensor,
    path: FilePath,
    *,
    steps: Sequence[float] | Tensor | None = None,
    log: bool = True,
    window: int | None = None,
    title: str = "",
    x_label: str = "step",
    y_label: str = "loss",
) -> Path:
    """Writes a curve (n,), with its moving average over ``window`` values in front, and returns the path.

    Args:
        steps: (n,), where the values lie on the x axis; by default 0, ..., n - 1.
        log: logarithmic y axis.
        window: by default a fiftieth of the values; 1 draws no average.
    Raises:
        ValueError: if ``values`` is empty, not finite, or not positive with ``log``; if ``steps`` differs in length.
        ImportError: without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     curve([1.0, 0.5, 0.25], Path(folder) / "loss.png").name
    'loss.png'
    """
    y = finite_values(values, "curve: values", positive=log)
    x = _places(steps, len(y), "curve: steps")
    window = max(1, len(y) // 50) if window is None else window
    check_positive("curve", window=window)
    axes = new_axes(title, x_label, y_label)
    if window > 1:
        axes.plot(x.numpy(), y.numpy(), color="#9db8d2", linewidth=0.8, label="each step")
        axes.plot(x.numpy(), _moving_average(y, window).numpy(), color=INK, linewidth=1.8, label=f"mean of {window}")
        axes.legend(frameon=False)
    else:
        axes.plot(x.numpy(), y.numpy(), color=INK, linewidth=1.5)
    _scale_and_grid(axes, log)
    return write(axes, path)


def curves(
    values: Mapping[str, Sequence[float] | Tensor],
    path: FilePath,
    *,
    steps: Sequence[float] | Tensor | None = None,
    log: bool = True,
    title: str = "",
    x_label: str = "step",
    y_label: str = "loss",
) -> Path:
    """Writes several named curves, each (n,) for an n of its own, and returns the path.

    Args:
        steps: (n,), where the values of every curve lie on the x axis; by default each counts from 0.
        log: logarithmic y axis.
    Raises:
        ValueError: as :func:`curve`, naming the curve; if there is none.
        ImportError: without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     curves({"sgd": [1.0, 0.5, 0.25], "adam": [1.0, 0.1]}, Path(folder) / "race.png").name
    'race.png'
    """
    check_positive("curves", values=len(values))
    drawn = {name: finite_values(y, f"curves: {name!r}", positive=log) for name, y in values.items()}
    places = {name: _places(steps, len(y), f"curves: {name!r}: steps") for name, y in drawn.items()}
    axes = new_axes(title, x_label, y_label)
    for i, (name, y) in enumerate(drawn.items()):
        axes.plot(places[name].numpy(), y.numpy(), **line_style(i), linewidth=1.5, label=name)
    _scale_and_grid(axes, log)
    axes.figure.legend(frameon=False, loc="outside right upper")
    return write(axes, path)


def _places(steps: Sequence[float] | Tensor | None, n: int, name: str) -> Tensor:
    return torch.arange(n) if steps is None else finite_values(steps, name, n=n)


def _scale_and_grid(axes: Any, log: bool) -> None:
    axes.set_yscale("log" if log else "linear")
    axes.grid(visible=True, which="both", color="0.9", linewidth=0.6)
    axes.margins(x=0.01)


def _moving_average(y: Tensor, window: int) -> Tensor:
    """Mean over the window around every value, cut off at the ends: (n,) -> (n,)."""
    n = y.shape[0]
    total = torch.cat([y.new_zeros(1), y.cumsum(0)])
    start = (torch.arange(n) - (window - 1) // 2).clamp(min=0)
    stop = (torch.arange(n) + window // 2 + 1).clamp(max=n)
    return (total[stop] - total[start]) / (stop - start)
