"""Jacobians and Hessians of functions on trees."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs, Primals, check_outputs, dense, primals_of
from functorch_gen.transforms.context import differentiating
from functorch_gen.transforms.forward import jvp
from functorch_gen.transforms.gradient import grad
from functorch_gen.typing import Tree

__all__ = ["hessian", "hvp", "jacfwd", "jacrev"]

_Argnums = int | tuple[int, ...]


def jacrev(
    fun: Callable[..., Any], argnums: _Argnums = 0, has_aux: bool = False, *, chunk_size: int | None = None
) -> Callable[..., Any]:
    """The Jacobian of ``fun`` by reverse mode, one pull-back for each output element.

    Args:
        chunk_size: how many rows are computed at once; None: all.
    Returns:
        A function of the same arguments whose result has the structure of ``fun``'s output, with the structure of the
        differentiated argument inside: each leaf (*output shape, *input shape). With ``has_aux``: ``(jacobian, aux)``.

    >>> jacrev(lambda x: x**2)(torch.tensor([1.0, 2.0]))
    tensor([[2., 0.],
            [0., 4.]])
    """
    return _jacobian("jacrev", _rows, fun, argnums, has_aux, chunk_size)


def jacfwd(
    fun: Callable[..., Any], argnums: _Argnums = 0, has_aux: bool = False, *, chunk_size: int | None = None
) -> Callable[..., Any]:
    """The Jacobian of ``fun`` by forward mode, one push-forward for each input element. See :func:`jacrev`.

    >>> jacfwd(lambda x: x**2)(torch.tensor([1.0, 2.0]))
    tensor([[2., 0.],
            [0., 4.]])
    """
    return _jacobian("jacfwd", _columns, fun, argnums, has_aux, chunk_size)


def _jacobian(
    name: str,
    entries: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: _Argnums,
    has_aux: bool,
    chunk_size: int | None,
) -> Callable[..., Any]:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{name}: expected chunk_size >= 1, got {chunk_size}")

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        primals = primals_of(name, fun, args, kwargs, argnums)
        outputs, extra = Outputs(), Outputs()

        def flat(*leaves: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            result = primals.call(*leaves)
            out, aux = result if has_aux else (result, None)
            check_outputs(name, out)
            return outputs.put(out), extra.put(aux)

        if any(x.numel() for x in primals.leaves):
            with differentiating():
                matrix, aux = entries(flat, primals, chunk_size)  # one list over inputs for each output
        else:
            out, aux = flat(*primals.leaves)
            matrix = [[y.new_zeros((*y.shape, *x.shape)) for x in primals.leaves] for y in out]
        jacobian = outputs.get([tree.unflatten(primals.treedef, row) for row in matrix])
        return (jacobian, extra.get(aux)) if has_aux else jacobian

    return wrapped


def _rows(flat: Callable[..., Any], primals: Primals, chunk_size: int | None) -> tuple[list[list[Tensor]], Any]:
    result: Any = torch.func.vjp(flat, *primals.leaves, has_aux=True)
    out, pull, aux = result
    if not out:
        return [], aux
    pulled = torch.func.vmap(pull, chunk_size=chunk_size)(_basis(out))
    by_input = [list(rows.split([x.numel() for x in out])) for rows in pulled]
    return [
        [rows[i].reshape((*y.shape, *x.shape)) for rows, x in zip(by_input, primals.leaves, strict=True)]
        for i, y in enumerate(out)
    ], aux


def _columns(flat: Callable[..., Any], primals: Primals, chunk_size: int | None) -> tuple[list[list[Tensor]], Any]:
    leaves = tuple(dense(x) for x in primals.leaves)
    basis = _basis(leaves)
    total = sum(x.numel() for x in leaves)

    def push(tangents: tuple[Tensor, ...]) -> tuple[Any, Any]:
        result: Any = torch.func.jvp(flat, leaves, tangents, has_aux=True)
        _, moved, aux = result
        return moved, aux

    push = torch.func.vmap(push)  # out_dims=None would refuse an aux that an outer vmap maps
    step = chunk_size or total
    chunks = [push(tuple(rows[i : i + step] for rows in basis)) for i in range(0, total, step)]
    moved = [torch.cat(parts) for parts in zip(*[chunk[0] for chunk in chunks], strict=True)]
    aux = tuple(x[0] for x in chunks[-1][1])  # the same for all directions
    columns = [list(y.movedim(0, -1).split([x.numel() for x in leaves], -1)) for y in moved]
    return [
        [part.reshape((*y.shape[1:], *x.shape)) for part, x in zip(parts, leaves, strict=True)]
        for parts, y in zip(columns, moved, strict=True)
    ], aux


def _basis(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The rows of the identity over all elements of ``tensors``, split into their shapes: (total, *shape) each."""
    sizes = [x.numel() for x in tensors]
    total = sum(sizes)
    basis, start = [], 0
    for x, size in zip(tensors, sizes, strict=True):
        rows = torch.zeros(total, size, dtype=x.dtype, device=x.device)
        rows = rows.diagonal_scatter(torch.ones(size, dtype=x.dtype, device=x.device), offset=-start)
        basis.append(rows.reshape(total, *x.shape))
        start += size
    return tuple(basis)


def hessian(
    fun: Callable[..., Any], argnums: _Argnums = 0, has_aux: bool = False, *, chunk_size: int | None = None
) -> Callable[..., Any]:
    """The Hessian of ``fun``, forward over reverse: ``jacfwd(jacrev(fun))``. See :func:`jacrev`.

    >>> hessian(lambda x: (x**3).sum())(torch.tensor([1.0, 2.0]))
    tensor([[ 6.,  0.],
            [ 0., 12.]])
    """
    return jacfwd(jacrev(fun, argnums, has_aux, chunk_size=chunk_size), argnums, has_aux, chunk_size=chunk_size)


def hvp(fun: Callable[..., Any], primals: tuple[Tree, ...], tangents: tuple[Tree, ...]) -> Tree:
    """The Hessian of a scalar ``fun`` at ``primals`` times ``tangents``, forward over reverse, without the matrix.

    Returns:
        A tree shaped like the gradient for a single primal, else a tuple of them.

    >>> hvp(lambda x: (x**3).sum(), (torch.tensor([1.0, 2.0]),), (torch.ones(2),))
    tensor([ 6., 12.])
    """
    if not isinstance(primals, tuple | list):
        raise TypeError(f"hvp: expected primals to be a tuple, got {type(primals).__name__}")
    argnums = 0 if len(primals) == 1 else tuple(range(len(primals)))
    return jvp(grad(fun, argnums), tuple(primals), tuple(tangents))[1]
