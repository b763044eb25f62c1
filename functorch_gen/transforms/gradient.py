"""Reverse mode: value_and_grad, grad, vjp, stop_gradient.

Two engines behind one name. At top level ``torch.autograd.grad`` runs without recording the backward pass, which
halves the memory; inside another transform, or where an outer gradient is wanted, ``torch.func`` does.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs, Primals, check_outputs, primals_of
from functorch_gen.transforms.context import differentiating, is_differentiable, is_inference, is_nested
from functorch_gen.typing import Tree

__all__ = ["grad", "stop_gradient", "value_and_grad", "vjp"]


def value_and_grad(
    fun: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False
) -> Callable[..., Any]:
    """The function that returns the value of ``fun`` and its gradient.

    Args:
        fun: returns a 0-d floating tensor, or a pair of it and any Python object if ``has_aux``.
        argnums: which positional arguments (trees of floating tensors) to differentiate.
    Returns:
        A function of the same arguments: ``(value, grads)``, or ``((value, aux), grads)`` if ``has_aux``. ``grads`` has
        the structure of the argument, or is a tuple if ``argnums`` is one.
    Raises:
        TypeError: if a differentiated leaf is an integer, a bool or None; names its path.
        ValueError: if the value is not 0-d.

    >>> value_and_grad(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 2.0])})
    (tensor(5.), {'w': tensor([2., 4.])})
    """

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        primals = primals_of("grad", fun, args, kwargs, argnums)
        engine = _functorch if is_nested((args, kwargs)) or is_inference(primals.leaves) else _autograd
        with differentiating():
            value, aux, grads = engine(primals, has_aux)
        grads = tree.unflatten(primals.treedef, grads)
        return ((value, aux), grads) if has_aux else (value, grads)

    return wrapped


def grad(fun: Callable[..., Any], argnums: int | tuple[int, ...] = 0, has_aux: bool = False) -> Callable[..., Any]:
    """The gradient of ``fun``; with ``has_aux``, the pair ``(grads, aux)``. See :func:`value_and_grad`.

    >>> grad(lambda x: x.sin())(torch.tensor(0.0))
    tensor(1.)
    """
    both = value_and_grad(fun, argnums, has_aux)

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return wrapped


def _split(result: Any, has_aux: bool) -> tuple[Tensor, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"grad: expected fun to return (value, aux), got {type(result).__name__}")
    value: Any = result[0] if has_aux else result
    aux = result[1] if has_aux else None
    if not is_differentiable(value):
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"grad: expected fun to return a 0-d floating tensor, got {kind}")
    if value.ndim:
        raise ValueError(f"grad: expected fun to return a 0-d tensor, got shape {tuple(value.shape)}")
    if value.is_complex():
        raise TypeError("grad: expected fun to return a real tensor, got a complex one; take its real part")
    return value, aux


def _functorch(primals: Primals, has_aux: bool) -> tuple[Tensor, Any, list[Tensor]]:
    outputs = Outputs()

    def flat(leaves: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        value, aux = _split(primals.call(*leaves), has_aux)
        return value, outputs.put(aux)

    grads, (value, aux) = torch.func.grad_and_value(flat, has_aux=True)(tuple(primals.leaves))
    return value, outputs.get(aux), list(grads)


def _autograd(primals: Primals, has_aux: bool) -> tuple[Tensor, Any, list[Tensor]]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in primals.leaves]
        value, aux = _split(primals.call(*leaves), has_aux)
    others = torch.is_grad_enabled() and _has_other_leaves([value, *tree.leaves(aux)], leaves)
    if leaves and value.requires_grad:
        both = torch.autograd.grad(value, leaves, create_graph=others, allow_unused=True, materialize_grads=True)
        grads = list(both)
    else:
        grads = [torch.zeros_like(x) for x in leaves]
    if others:  # a closed-over tensor wants its gradient: what leaves here keeps its history
        return value, aux, grads
    return value.detach(), tree.map(lambda x: x.detach() if isinstance(x, Tensor) else x, aux), grads


def _has_other_leaves(results: list[Any], leaves: list[Tensor]) -> bool:
    """Whether the graph of ``results`` ends in a leaf that is none of ``leaves``."""
    own = {id(x) for x in leaves}
    tensors = [x for x in results if isinstance(x, Tensor)]
    if any(x.requires_grad and x.is_leaf and id(x) not in own for x in tensors):
        return True
    seen, stack = set(), [x.grad_fn for x in tensors]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) not in own:
            return True
        stack.extend(child for child, _ in node.next_functions)
    return False


def vjp(fun: Callable[..., Any], *primals: Tree, has_aux: bool = False) -> Any:
    """The value of ``fun`` and the function that pulls cotangents back: ``out, vjp_fun = vjp(fun, *primals)``.

    Returns:
        ``(out, vjp_fun)``, or ``(out, vjp_fun, aux)`` if ``has_aux``. ``vjp_fun(cotangent)`` takes a tree shaped like
        ``out`` and returns a tuple of trees, one for each primal.
    Raises:
        TypeError: if a primal or an output leaf cannot be differentiated; names its path.
        ValueError: if the cotangent has another structure or other shapes than ``out``.

    >>> out, pull = vjp(lambda x: {"y": 2 * x}, torch.ones(2))
    >>> pull({"y": torch.ones(2)})
    (tensor([2., 2.]),)
    """
    picked = primals_of("vjp", fun, primals, {}, tuple(range(len(primals))))
    outputs, extra = Outputs(), Outputs()

    def flat(*leaves: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        result = picked.call(*leaves)
        out, aux = result if has_aux else (result, None)
        check_outputs("vjp", out)
        return outputs.put(out), extra.put(aux)

    with differentiating():
        pulled: Any = torch.func.vjp(flat, *picked.leaves, has_aux=True)
    values, pull, aux = pulled
    out = outputs.get(values)

    def vjp_fun(cotangent: Tree) -> tuple[Tree, ...]:
        tree.map(_check_cotangent, out, cotangent)
        cotangents = tuple(
            c for x, c in zip(tree.leaves(out), tree.leaves(cotangent), strict=True) if isinstance(x, Tensor)
        )
        with differentiating():
            return tree.unflatten(picked.treedef, pull(cotangents))

    return (out, vjp_fun, extra.get(aux)) if has_aux else (out, vjp_fun)


def _check_cotangent(x: Any, cotangent: Any) -> None:
    if isinstance(x, Tensor) and (not isinstance(cotangent, Tensor) or x.shape != cotangent.shape):
        got = tuple(cotangent.shape) if isinstance(cotangent, Tensor) else type(cotangent).__name__
        raise ValueError(f"vjp: expected a cotangent of shape {tuple(x.shape)}, got {got}")


def stop_gradient(x: Tree) -> Tree:
    """``x`` as a constant: its derivatives are zero in every mode and at every level.

    >>> grad(lambda x: x * stop_gradient(x))(torch.tensor(3.0))
    tensor(3.)
    """
    return tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, x)
