"""``x[i]`` where i is a 0-d tensor: torch asks such an index for its value, which a trace or a ``vmap`` has not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["TensorIndices"]


class TensorIndices(TorchFunctionMode):
    """Inside, ``x[i]`` and ``x[:, i, None]`` take the slice that the integer in ``i`` names, without its value.

    >>> with TensorIndices():
    ...     torch.arange(6).reshape(2, 3)[:, torch.tensor(-1)]
    tensor([2, 5])
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Every function of torch passes here."""
        if func is Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(_is_scalar(i) for i in index) and all(_is_scalar(i) or _is_basic(i) for i in index):
                return _taken(args[0], index)
        return func(*args, **(kwargs or {}))


def _is_scalar(i: Any) -> bool:
    if not isinstance(i, Tensor) or i.ndim:
        return False
    return not (i.is_floating_point() or i.is_complex() or i.dtype == torch.bool)


def _is_basic(i: Any) -> bool:
    return i is None or i is ... or isinstance(i, slice) or (isinstance(i, int) and not isinstance(i, bool))


def _taken(x: Tensor, index: tuple[Any, ...]) -> Tensor:
    """Cuts by what is known first, then takes one slice for each tensor, from the last axis to the first."""
    rest = x.ndim - sum(i is not None and i is not ... for i in index)
    axes, axis = [], 0
    for i in index:
        if _is_scalar(i):
            axes.append((axis, i))
        axis += rest if i is ... else not isinstance(i, int)
    x = x[tuple(slice(None) if _is_scalar(i) else i for i in index)]
    for axis, i in reversed(axes):
        i = torch.where(i < 0, i + x.shape[axis], i)
        x = x.index_select(axis, i.reshape(1)).squeeze(axis)
    return x
