"""Layers over the last axes of an input with any axes before them."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from functorch_gen import tree

__all__ = ["SPACE", "over_leading_axes"]

SPACE = {1: "l", 2: "h w", 3: "d h w"}
"""Names of the axes of space, by their number."""


def over_leading_axes(fun: Callable[[Tensor], Any], x: Tensor, axes: int) -> Any:
    """``fun`` of the last ``axes`` axes of ``x``, where ``fun`` takes exactly one batch axis before them.

    The outputs, a tree, have the axes of ``x`` that come before.
    """
    lead = x.shape[: x.ndim - axes]
    if len(lead) == 1:
        return fun(x)
    if not lead:
        return tree.map(lambda y: y.squeeze(0), fun(x.unsqueeze(0)))
    return tree.map(lambda y: y.unflatten(0, lead), fun(x.flatten(0, len(lead) - 1)))
