"""What a model does: its confusions, its predictions beside the truth, the gradients of its layers."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_positive, check_shape
from functorch_gen.plot.figure import INK, FilePath, finite_values, new_axes, write
from functorch_gen.typing import Tree

__all__ = ["confusion", "gradient_flow", "scatter"]


def confusion(counts: Tensor, path: FilePath, *, labels: Sequence[str] = (), title: str = "") -> Path:
    """Writes a confusion matrix (c, c), its counts in the cells, and returns the path.

    Row i holds the examples of class i, column j those taken for class j, as in
    :func:`functorch_gen.metrics.confusion_matrix`. The shade of a cell is its share of the row.

    Args:
        labels: names of the classes; by default their numbers.
    Raises:
        ValueError: if ``counts`` is not square, is empty or holds a negative number, or the labels do not fit.
        ImportError: without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     confusion(torch.tensor([[9, 1], [0, 10]]), Path(folder) / "confusion.png", labels=["cat", "dog"]).name
    'confusion.png'
    """
    c = check_shape(counts, "c c", "confusion: counts")["c"]
    check_positive("confusion", counts=counts.numel())
    if (counts < 0).any():
        raise ValueError(f"confusion: counts: expected counts >= 0, got {counts.min().item()}")
    if labels and len(labels) != c:
        raise ValueError(f"confusion: expected {c} labels, got {len(labels)}")
    counts = counts.detach().cpu()
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    axes = new_axes(title, "taken for", "is", width=1.5 + 0.45 * c, height=1.3 + 0.42 * c)
    axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    for i, j in counts.nonzero().tolist():
        color = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, f"{counts[i, j].item():g}", ha="center", va="center", color=color, fontsize=8)
    names = list(labels) or [str(i) for i in range(c)]
    axes.set_xticks(range(c), names)
    axes.set_yticks(range(c), names)
    return write(axes, path)


def gradient_flow(grads: Tree, path: FilePath, *, title: str = "") -> Path:
    """Writes the norm of each leaf's gradient as a bar, by name and on a logarithmic axis, and returns the path.

    Bars that fall by orders of magnitude towards the input tell that gradients vanish on their way. The norm is divided
    by the root of the number of elements: large layers do not look better than small ones. A gradient of zero has no
    bar, only its name.

    Raises:
        ValueError: if there is no leaf or one that is not finite; names its path.
        ImportError: without matplotlib.

    >>> import tempfile
    >>> grads = {"0": {"weight": torch.ones(3, 2), "bias": torch.ones(3)}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     gradient_flow(grads, Path(folder) / "flow.png").name
    'flow.png'
    """
    sizes = {name: x.detach().double().square().mean().sqrt().item() for name, x in tree.names(grads).items()}
    check_positive("gradient_flow", grads=len(sizes))
    for name, size in sizes.items():
        finite_values([size], f"gradient_flow: grads: {name!r}")
    axes = new_axes(title, "root mean square of the gradient", "", height=1 + 0.22 * len(sizes))
    axes.barh(range(len(sizes)), list(sizes.values()), color=INK)
    axes.set_yticks(range(len(sizes)), list(sizes), fontsize=8)
    axes.invert_yaxis()
    axes.set_xscale("log" if any(sizes.values()) else "linear")
    return write(axes, path)


def scatter(
    actual: Sequence[float] | Tensor,
    predicted: Sequence[float] | Tensor,
    path: FilePath,
    *,
    title: str = "",
    x_label: str = "actual",
    y_label: str = "predicted",
) -> Path:
    """Writes predicted against actual values, both (n,), as points beside the line where they agree; returns the path.

    Raises:
        ValueError: if the two differ in length, are empty or not finite.
        ImportError: without matplotlib.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     scatter([1.0, 2.0], [1.1, 1.8], Path(folder) / "predictions.png").name
    'predictions.png'
    """
    x = finite_values(actual, "scatter: actual")
    y = finite_values(predicted, "scatter: predicted", n=len(x))
    axes = new_axes(title, x_label, y_label, width=4.5, height=4.5)
    both = torch.cat([x, y])
    ends = [both.min().item(), both.max().item()]
    axes.plot(ends, ends, color="0.6", linewidth=1)
    axes.plot(x.numpy(), y.numpy(), ".", color=INK, alpha=0.5, markersize=6)
    axes.set_aspect("equal")
    return write(axes, path)
