"""Weight decay, of all parameters or of those a mask selects."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

import fnmatch
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_number
from functorch_gen.flat import Layout
from functorch_gen.leaves import map_same
from functorch_gen.optim.transformation import GradientTransformation, stateless
from functorch_gen.typing import Number, Params, Tree

__all__ = ["Mask", "add_decayed_weights"]

Mask: TypeAlias = str | Sequence[str] | Tree | Callable[[Params], Tree]
"""Which leaves: a glob on the path, several globs, a tree of bools, or a function from parameters to one."""


def add_decayed_weights(weight_decay: Number, mask: Mask | None = None) -> GradientTransformation:
    """g + weight_decay * p. Equals ``optax.add_decayed_weights``.

    Before a moment this is L2 regularisation (``torch.optim.Adam(weight_decay=)``), after it decoupled decay (AdamW).

    Args:
        mask: which leaves decay: a glob on the path (``"*.weight"``), several globs, a tree of bools, or a function
            from the parameters to such a tree. By default all.
    Raises:
        ValueError: in ``update``, if it is not given the parameters, or a glob matches no path.

    Source: Loshchilov and Hutter 2019, algorithm 2, arXiv:1711.05101.

    >>> params = {"bias": torch.ones(1), "weight": torch.ones(1)}
    >>> tx = add_decayed_weights(0.1, mask="*weight")
    >>> tx.update({"bias": torch.zeros(1), "weight": torch.zeros(1)}, tx.init(params), params)[0]
    {'bias': tensor([0.]), 'weight': tensor([0.1000])}
    """
    check_number("add_decayed_weights", "weight_decay", weight_decay, low=0)

    def decay(g: Tensor, p: Tensor) -> Tensor:
        return (g + weight_decay * p.to(g.dtype)).to(g.dtype)

    def transform(grads: Tree, params: Params | None, *, layout: Layout | None = None, **extra: object) -> Tree:
        if params is None:
            raise ValueError("add_decayed_weights: expected update(grads, state, params), got params=None")
        decayed = map_same("add_decayed_weights", decay, grads, params)
        if mask is None:
            return decayed
        chosen = _resolve(mask, params) if layout is None else layout.spread(_resolve(mask, layout.whole))
        return tree.map(_choose, chosen, decayed, grads)

    return stateless("add_decayed_weights", transform)


def _choose(keep: bool | Tensor, x: Tensor, y: Tensor) -> Tensor:
    if isinstance(keep, Tensor):
        return torch.where(keep, x, y)
    return x if keep else y


def _resolve(mask: Mask, params: Params) -> Tree:
    """The mask as a tree of bools."""
    if callable(mask):
        return mask(params)
    globs = (mask,) if isinstance(mask, str) else mask
    if not (isinstance(globs, Sequence) and all(isinstance(glob, str) for glob in globs)):
        return mask
    paths = tree.paths(params)
    for glob in globs:
        if not any(_matches(path, glob) for path in paths):
            raise ValueError(
                f"add_decayed_weights: expected mask to match a path, got {glob!r} among {', '.join(paths)}"
            )
    return tree.unflatten(tree.structure(params), [any(_matches(path, glob) for glob in globs) for path in paths])


@torch.compiler.assume_constant_result
def _matches(path: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(path, glob)
