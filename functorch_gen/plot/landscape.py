"""A function of two parameters from above, and the ways that optimizers take over it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from functorch_gen.check import check_positive, check_shape
from functorch_gen.plot.figure import FilePath, line_style, new_axes, write
from functorch_gen.transforms import vmap

__all__ = ["landscape"]


def landscape(
    fun: Callable[[Tensor], Tensor],
    path: FilePath,
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    paths: Mapping[str, Tensor] | None = None,
    minimum: tuple[float, float] | None = None,
    log: bool = True,
    resolution: int = 200,
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> Path:
    """Writes the contours of ``fun``, (2,) -> (), with named paths (n, 2) over them, and returns the file's path.

    Args:
        fun: of a float32 point; evaluated on a row of the grid at once, by ``vmap``.
        paths: each begins at a dot and ends at a cross; what leaves the ranges is cut off, what is not finite left out.
        minimum: a point to mark with a star.
        log: contours at equal distances of the logarithm of ``fun`` less its lowest value on the grid.
        resolution: points along either axis.
    Raises:
        ValueError: if a range is not (low, high) with low < high, a path not (n, 2), or ``fun`` not finite on the grid.
        ImportError: without matplotlib.

    >>> import tempfile
    >>> way = torch.tensor([[1.0, 1.0], [0.2, 0.5], [0.0, 0.1]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "bowl.png"
    ...     landscape(lambda p: p.square().sum(), file, x_range=(-2, 2), y_range=(-2, 2), paths={"sgd": way}).name
    'bowl.png'
    """
    x, y, z = _heights(fun, x_range, y_range, resolution)
    for name, way in (paths or {}).items():
        check_shape(way, "n two", f"landscape: paths: {name!r}", two=2)
    if log:
        z = (z - z.min() + 1e-3 * (z.median() - z.min()) + torch.finfo(z.dtype).tiny).log()
    axes = new_axes(title, x_label, y_label, width=6.5, height=4.5)
    axes.contourf(x.numpy(), y.numpy(), z.numpy(), levels=24, cmap="Greys", alpha=0.7)
    for i, (name, way) in enumerate((paths or {}).items()):
        _draw_path(axes, way.detach().cpu(), name, line_style(i))
    if minimum is not None:
        axes.plot(*minimum, "*", color="gold", markeredgecolor="black", markersize=12, zorder=4)
    axes.set(xlim=x_range, ylim=y_range)
    if paths:
        axes.figure.legend(frameon=False, loc="outside right upper", fontsize=8)
    return write(axes, path)


def _heights(
    fun: Callable[[Tensor], Tensor], x_range: tuple[float, float], y_range: tuple[float, float], resolution: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The grid's axes, and the function over it: (n,), (n,), (n, n), rows along y."""
    check_positive("landscape", resolution=resolution)
    for name, (low, high) in (("x_range", x_range), ("y_range", y_range)):
        if not low < high:
            raise ValueError(f"landscape: expected {name} (low, high) with low < high, got {(low, high)}")
    x, y = torch.linspace(*x_range, resolution), torch.linspace(*y_range, resolution)
    points = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1)
    z = vmap(fun, chunk_size=resolution)(points).detach().cpu()
    check_shape(z, "n", "landscape: values of fun", n=resolution**2)
    if not torch.isfinite(z).all():
        raise ValueError("landscape: expected fun to be finite on the grid, got NaN or infinity")
    return x, y, z.double().unflatten(0, (resolution, resolution))


def _draw_path(axes: Any, way: Tensor, name: str, style: dict[str, str]) -> None:
    way = way[torch.isfinite(way).all(-1)].double()
    axes.plot(*way.T.numpy(), **style, linewidth=1.2, label=name)
    axes.plot(*way[:1].T.numpy(), "o", color=style["color"], markersize=4)
    axes.plot(*way[-1:].T.numpy(), "x", color=style["color"], markersize=6, markeredgewidth=2, zorder=3)
