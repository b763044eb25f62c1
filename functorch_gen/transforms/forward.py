"""Forward mode: jvp and linearize."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs, dense, primals_of, tangents_of
from functorch_gen.transforms.context import (
    differentiating,
    is_differentiable,
    is_inference,
    is_nested,
    is_traced,
    outside_inference,
)
from functorch_gen.typing import Tree

__all__ = ["jvp", "linearize"]


def jvp(fun: Callable[..., Any], primals: tuple[Tree, ...], tangents: tuple[Tree, ...], has_aux: bool = False) -> Any:
    """The value of ``fun`` at ``primals`` and its directional derivative along ``tangents``.

    Returns:
        ``(out, tangent_out)``, or ``(out, tangent_out, aux)`` if ``has_aux``.
    Raises:
        TypeError: if ``primals`` is no tuple, or a leaf cannot be differentiated; names its path.
        ValueError: if ``tangents`` has another structure, shape or dtype; names the path.

    >>> jvp(torch.sin, (torch.tensor(0.0),), (torch.tensor(2.0),))
    (tensor(0.), tensor(2.))
    """
    for name, value in (("primals", primals), ("tangents", tangents)):
        if not isinstance(value, tuple | list):
            raise TypeError(f"jvp: expected {name} to be a tuple, got {type(value).__name__}")
    picked = primals_of("jvp", fun, primals, {}, tuple(range(len(primals))))
    directions = tangents_of("jvp", tuple(primals), tuple(tangents))
    outputs, extra = Outputs(), Outputs()

    def flat(*leaves: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        result = picked.call(*leaves)
        out, aux = result if has_aux else (result, None)
        return outputs.put(out), extra.put(aux)

    if not picked.leaves:  # torch.func.jvp asks for one tensor at least
        values, aux = flat()
        tangents_out = [torch.zeros_like(x) for x in values]
    else:
        leaves = tuple(dense(x) for x in picked.leaves)
        with differentiating():
            pushed: Any = torch.func.jvp(flat, leaves, tuple(dense(v) for v in directions), has_aux=True)
        values, tangents_out, aux = pushed
        # torch gives the tangent of a 0-d tensor beside a number the number's dtype
        tangents_out = [t.to(x.dtype) if is_differentiable(x) else t for x, t in zip(values, tangents_out, strict=True)]
    out, tangent_out = outputs.get(values), outputs.get(tangents_out)
    return (out, tangent_out, extra.get(aux)) if has_aux else (out, tangent_out)


def linearize(fun: Callable[..., Any], *primals: Tree) -> tuple[Tree, Callable[..., Tree]]:
    """The value of ``fun`` and its derivative as a linear function: ``out, jvp_fun = linearize(fun, *primals)``.

    ``jvp_fun(*tangents)`` equals ``jvp(fun, primals, tangents)[1]``. At top level it is a graph of the linear part
    alone, so the work that depends on the primals only is done once; inside another transform it runs ``jvp`` again.

    >>> out, push = linearize(lambda x: x**2, torch.tensor(3.0))
    >>> out, push(torch.tensor(1.0))
    (tensor(9.), tensor(6.))
    """

    def again(*tangents: Tree) -> Tree:
        return jvp(fun, primals, tangents)[1]

    if is_nested(primals) or is_traced() or is_inference(tree.leaves(primals)) or not tree.leaves(primals):
        return fun(*primals), again
    picked = primals_of("linearize", fun, primals, {}, tuple(range(len(primals))))
    outputs = Outputs()
    with warnings.catch_warnings(), outside_inference():
        # torch's constant folding warns of a step of its own
        warnings.filterwarnings("ignore", "Attempted to insert a get_attr Node", UserWarning)
        leaves = map(dense, picked.leaves)
        try:
            values, push = torch.func.linearize(lambda *leaves: outputs.put(picked.call(*leaves)), *leaves)
        except RuntimeError as error:
            if "Nested forward mode" not in str(error):
                raise
            return fun(*primals), again  # fun goes forward itself
    out = outputs.get(values)
    if any(x.requires_grad for x in values):  # a closed-over tensor wants its gradient
        return out, again

    def jvp_fun(*tangents: Tree) -> Tree:
        moved = push(*tangents_of("linearize", primals, tangents))
        return outputs.get([_moved(x, v) for x, v in zip(values, moved, strict=True)])

    return out, jvp_fun


def _moved(x: Tensor, tangent: Tensor) -> Tensor:
    """torch returns something else, or a folded constant (a Parameter), where ``x`` depends on no input: zero."""
    constant = not is_differentiable(x) or isinstance(tangent, torch.nn.Parameter)
    return torch.zeros_like(x) if constant else tangent
