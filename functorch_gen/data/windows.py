"""Windows of series: stretches of neighbouring time steps, as views."""

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_positive
from functorch_gen.transforms.context import is_transformed
from functorch_gen.typing import Tree

__all__ = ["windows"]


def windows(series: Tree, length: int, *, stride: int = 1, horizon: int | None = None) -> Tree:
    """Every stretch of ``length`` steps: a tree of tensors (time, ...) -> a tree of (n, length, ...).

    Window i begins at step i * stride; n is as large as the series allows. Outside of transforms the windows are views:
    nothing is copied, and of a memory-mapped series only those steps are read that a batch holds.

    Args:
        stride: steps between the beginnings of neighbouring windows.
        horizon: gives a pair instead, (inputs, targets): the targets (n, horizon, ...) are the steps after each window.
    Raises:
        TypeError: if a leaf is no tensor; names its path.
        ValueError: if a size is < 1, or a series is too short for one window; names its path.

    >>> windows(torch.arange(5), 3)
    tensor([[0, 1, 2],
            [1, 2, 3],
            [2, 3, 4]])
    >>> inputs, targets = windows(torch.arange(6), 3, stride=2, horizon=1)
    >>> inputs.tolist(), targets.tolist()
    ([[0, 1, 2], [2, 3, 4]], [[3], [5]])
    """
    check_positive("windows", length=length, stride=stride)
    if horizon is None:
        return tree.map_with_path(lambda path, x: _windows(path, x, length, stride), series)
    check_positive("windows", horizon=horizon)
    both = tree.map_with_path(lambda path, x: _windows(path, x, length + horizon, stride), series)
    return tree.map(lambda x: x[:, :length], both), tree.map(lambda x: x[:, length:], both)


def _windows(path: str, x: Tensor, length: int, stride: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"windows: series: expected a tensor at {path!r}, got {type(x).__name__}")
    if x.ndim == 0 or x.shape[0] < length:
        raise ValueError(f"windows: series: expected at least {length} steps at {path!r}, got shape {tuple(x.shape)}")
    if not is_transformed():
        return x.unfold(0, length, stride).movedim(-1, 1)
    steps = torch.arange(x.shape[0], device=x.device).unfold(0, length, stride)
    return x.index_select(0, steps.flatten()).unflatten(0, steps.shape)  # vmap has no rule for the derivative of unfold
