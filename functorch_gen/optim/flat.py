"""Element-wise transformations that run on one vector per dtype and device."""

from __future__ import annotations  # Dynamo cannot evaluate those of a function that is made inside it

from typing import Any

from functorch_gen.flat import Flat, Layout
from functorch_gen.optim.transformation import GradientTransformation
from functorch_gen.typing import Params, State, Tree

__all__ = ["flatten"]


def flatten(tx: GradientTransformation) -> GradientTransformation:
    """Runs ``tx`` on one vector per dtype and device; equals ``tx`` when it is element-wise. As ``optax.flatten``.

    Global-norm clipping and masks by path inside ``tx`` work too. The state has a few long leaves instead of many short
    ones, but gradients and parameters are copied into vectors at every update, which takes time to compile and to run.
    What is flat already (``init_state(..., flat=True)``) goes to ``tx`` as it is.

    Raises:
        ValueError: if gradients differ from parameters in structure or shape; names the first path that does.

    >>> import torch
    >>> from functorch_gen import optim, tree
    >>> params = {"bias": torch.zeros(2), "weight": torch.zeros(3, 2)}
    >>> tx = flatten(optim.adam(0.1))
    >>> state = tx.init(params)
    >>> tree.leaves(state[0].mu)
    [tensor([0., 0., 0., 0., 0., 0., 0., 0.])]
    >>> tx.update(tree.ones_like(params), state, params)[0]["weight"].shape
    torch.Size([3, 2])
    """

    def init(params: Tree) -> State:
        flat: Tree = params if isinstance(params, Flat) else Layout.of(params).ravel(params)
        return tx.init(flat)

    def update(grads: Tree, state: State, params: Params | None = None, **extra: Any) -> tuple[Tree, State]:
        if isinstance(grads, Flat):
            return tx.update(grads, state, params, **extra)
        layout = Layout.of(grads if params is None else params)
        vectors = None if params is None else layout.ravel(params)
        updates, state = tx.update(layout.ravel(grads), state, vectors, **{**extra, "layout": layout})
        return updates.tree(), state

    return GradientTransformation(init, update)
