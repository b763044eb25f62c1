"""map: a function of one example over a batch, an example or a chunk at a time."""

from collections.abc import Callable
from typing import Any

import torch

from functorch_gen import tree
from functorch_gen.transforms.batching import vmap
from functorch_gen.transforms.carry import as_tensors, steps_of
from functorch_gen.transforms.scan import scan
from functorch_gen.typing import Tree

__all__ = ["map"]


def map(f: Callable[[Any], Any], xs: Tree, *, batch_size: int | None = None) -> Any:
    """``f`` of each slice of ``xs`` along axis 0, one after another; the results stacked along axis 0.

    The values of ``vmap(f)(xs)`` in the memory of one example, or of ``batch_size`` of them: then it is a loop over
    chunks, ``vmap`` inside, and what is left over at the end is a smaller chunk.

    Args:
        f: x -> y, trees of tensors; numbers in y become tensors.
        xs: a tree of tensors whose leaves share the size of axis 0.
        batch_size: how many examples are computed at once; None: one, without ``vmap``.
    Raises:
        ValueError: if the sizes of axis 0 differ, or ``batch_size`` is no int >= 1; names the path.
        TypeError: if a leaf of ``xs`` is no tensor, or one of a result is no tensor or number; names the path.

    Source: ``jax.lax.map``.

    >>> map(lambda x: x**2, torch.arange(4.0), batch_size=3)
    tensor([0., 1., 4., 9.])
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"map: expected batch_size to be an int >= 1, got {batch_size!r}")
    size = steps_of("map", xs)

    def g(x: Tree) -> Tree:
        return as_tensors("map", "result of f", f(x))

    if batch_size is None or not size:
        return scan(lambda _, x: (None, g(x)), None, xs)[1]
    whole, mapped = size // batch_size * batch_size, vmap(g)
    parts = []
    if whole:
        chunks = tree.map(lambda x: x[:whole].reshape(-1, batch_size, *x.shape[1:]), xs)
        ys = scan(lambda _, x: (None, mapped(x)), None, chunks)[1]
        parts.append(tree.map(lambda y: y.flatten(0, 1), ys))
    if whole < size:
        parts.append(mapped(tree.map(lambda x: x[whole:], xs)))
    return tree.map(lambda *ys: torch.cat(ys), *parts)
