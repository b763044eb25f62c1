"""Loops whose number of steps is a value: while_loop, and fori_loop, which is a scan if the number is known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop as compiled_loop
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from functorch_gen import tree
from functorch_gen.transforms.carry import as_predicate, as_tensors, check_alike
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.context import is_differentiable, requires_gradient
from functorch_gen.transforms.derivatives import Flat, dense_output, push_forward
from functorch_gen.transforms.indexing import TensorIndices
from functorch_gen.transforms.loop_node import repeat_node
from functorch_gen.transforms.scan import scan
from functorch_gen.transforms.subgraph import abstract, decide, is_abstract, is_graph_traced
from functorch_gen.tree import TreeDef
from functorch_gen.typing import Tree

__all__ = ["fori_loop", "while_loop"]


def while_loop(cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], init: Tree) -> Any:
    """The last carry of ``while cond_fun(carry): carry = body_fun(carry)``, from ``init``.

    Forward mode to every order and ``vmap`` hold, for the carry and the tensors that the functions close over. Under
    ``vmap`` the loop runs until all examples are done; those that are done keep their carry. Reverse mode would need
    the memory of a number of steps that is not known: it is an error where a gradient flows through the loop. Use
    :func:`scan`, or :func:`fori_loop` with int bounds, for a loop that is to be differentiated so.

    Under :func:`jit` the loop is one operation, whose functions are traced once. Under ``torch.compile`` it is torch's
    own, without the transforms.

    Args:
        cond_fun: carry -> a scalar tensor or a number; other than bools are True if they are not 0.
        body_fun: carry -> carry, with the same structure, shapes and dtypes.
        init: a tree of tensors; numbers become tensors.
    Raises:
        ValueError: if ``body_fun`` changes the carry's structure, shapes or dtypes (names the path), or ``cond_fun``
            returns no scalar. In a backward pass through the loop. Under ``jit``, if a function writes to its arguments
            in place.
        TypeError: if a leaf of a carry is no tensor or number; names the path.

    Source: ``jax.lax.while_loop``.

    >>> while_loop(lambda x: x < 100, lambda x: 2 * x, torch.tensor(3))
    tensor(192)
    """
    leaves, treedef = tree.flatten(as_tensors("while_loop", "init", init))
    if torch.compiler.is_dynamo_compiling():  # it cannot trace how functions are rebuilt
        return _as_compiled(cond_fun, body_fun, leaves, treedef)
    of_cond, rebuild_cond = convert_closure(cond_fun)
    of_body, rebuild_body = convert_closure(body_fun)
    count, end = len(leaves), len(leaves) + len(of_cond)

    def go_on(*flat: Tensor) -> tuple[Tensor, ...]:
        with TensorIndices():
            return (_go_on(rebuild_cond(flat[count:end]), tree.unflatten(treedef, flat[:count])),)

    def body(*flat: Tensor) -> tuple[Tensor, ...]:
        with TensorIndices():
            return _next(rebuild_body(flat[end:]), tree.unflatten(treedef, flat[:count]))

    return tree.unflatten(treedef, _run(_Repetition(go_on, body, count), [*leaves, *of_cond, *of_body]))


def _as_compiled(
    cond_fun: Callable[[Any], Any], body_fun: Callable[[Any], Any], leaves: Sequence[Tensor], treedef: TreeDef
) -> Any:
    """torch's own loop, which torch.compile knows, if it stands below no transform."""
    if torch._C._are_functorch_transforms_active():
        raise ValueError("while_loop: expected no transform around it under torch.compile, got one; use fg.jit")

    def body(*flat: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in _next(body_fun, tree.unflatten(treedef, flat)))

    out = compiled_loop(lambda *flat: _go_on(cond_fun, tree.unflatten(treedef, flat)), body, tuple(leaves))
    return tree.unflatten(treedef, list(out))


def _go_on(cond_fun: Callable[[Any], Any], carry: Tree) -> Tensor:
    holds = as_predicate("while_loop", "the result of cond_fun", cond_fun(carry))
    return holds if isinstance(holds, Tensor) else torch.full((), holds)


def _next(body_fun: Callable[[Any], Any], carry: Tree) -> tuple[Tensor, ...]:
    new = as_tensors("while_loop", "result of body_fun", body_fun(carry))
    check_alike("while_loop: expected body_fun to keep the carry", carry, new)
    return tuple(tree.leaves(new))


@dataclass(frozen=True)
class _Repetition:
    """``while go_on(*carry, *closed): carry = body(*carry, *closed)``; ``carries`` says how many are the carry."""

    go_on: Flat
    body: Flat
    carries: int


def _run(loop: _Repetition, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The last carry, with derivatives where one is taken."""
    if torch._C._are_functorch_transforms_active() or requires_gradient(flat):
        return _WhileLoop.apply(loop, *flat)
    return _repeat(loop, flat)


def _repeat(loop: _Repetition, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
    carry, closed = tuple(flat[: loop.carries]), flat[loop.carries :]
    if is_graph_traced():
        return repeat_node(loop.go_on, loop.body, carry, closed)
    if is_abstract():  # there is no value to ask
        return loop.body(*flat)
    while decide(*loop.go_on(*carry, *closed)):
        carry = loop.body(*carry, *closed)
    return carry


class _WhileLoop(torch.autograd.Function):
    """A loop whose batched form and forward derivatives are such loops, so that every stack of them is."""

    @staticmethod
    def forward(loop: _Repetition, *flat: Tensor) -> tuple[Tensor, ...]:
        given = {x.untyped_storage()._cdata for x in flat}
        out = _repeat(loop, flat)
        return tuple(x.clone() if x.untyped_storage()._cdata in given else dense_output(x) for x in out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.loop, *flat = inputs
        ctx.save_for_forward(*flat)
        ctx.likes = [(x.shape, x.dtype, x.device) for x in flat]
        ctx.floating = [is_differentiable(x) for x in output]
        ctx.mark_non_differentiable(*[x for x in output if not is_differentiable(x)])

    @staticmethod
    def vmap(info: Any, in_dims: Any, loop: _Repetition, *flat: Tensor) -> Any:
        """Runs until all examples are done; those that are done keep their carry, and its tangent."""
        size, count = info.batch_size, loop.carries
        given = [x if dim is None else x.movedim(dim, 0) for x, dim in zip(flat, in_dims[1:], strict=True)]
        given[:count] = [
            x.expand(size, *x.shape) if dim is None else x
            for x, dim in zip(given[:count], in_dims[1 : 1 + count], strict=True)
        ]
        dims = (*[0] * count, *[None if dim is None else 0 for dim in in_dims[1 + count :]])
        go_on = torch.func.vmap(loop.go_on, dims, randomness=info.randomness)
        body = torch.func.vmap(loop.body, dims, randomness=info.randomness)

        def advance(*flat: Tensor) -> tuple[Tensor, ...]:
            (active,) = go_on(*flat)
            pairs = zip(body(*flat), flat, strict=False)
            return tuple(torch.where(active.reshape(-1, *[1] * (old.ndim - 1)), new, old) for new, old in pairs)

        out = _WhileLoop.apply(_Repetition(lambda *flat: (go_on(*flat)[0].any(),), advance, count), *given)
        return out, (0,) * count

    @staticmethod
    def backward(ctx: Any, *_cotangents: Tensor) -> Any:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        if any(i < ctx.loop.carries for i in wanted) or _reads(ctx.loop, wanted, ctx.likes):
            raise ValueError(
                "while_loop: expected no gradient in reverse mode, which needs to know the number of steps beforehand, "
                "got one; use scan, fori_loop with int bounds, or forward mode (jvp, jacfwd)"
            )
        return (None,) * (1 + len(ctx.likes))

    @staticmethod
    def jvp(ctx: Any, _loop: None, *tangents: Tensor | None) -> Any:
        unpack = torch._VF._unpack_dual  # this level's tangent off
        flat = [unpack(x, level=0)[0] if is_differentiable(x) else x for x in ctx.saved_tensors]
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            moved = iter(_forward_loop(ctx.loop, flat, tangents))
        return tuple(next(moved) if floating else None for floating in ctx.floating)


def _reads(loop: _Repetition, wanted: Sequence[int], likes: Sequence[Any]) -> bool:
    """Whether the carry depends on the inputs ``wanted``: a function may close over a tensor for its dtype alone."""
    with abstract(), torch.enable_grad():
        flat = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in likes]
        for i in wanted:
            flat[i].requires_grad_()
        return any(x.requires_grad for x in loop.body(*flat))


def _forward_loop(loop: _Repetition, flat: Sequence[Tensor], tangents: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """The tangents of the floating carries: a loop over the carry and its tangent."""
    count, total = loop.carries, len(flat)
    of_carry = [i for i in range(count) if is_differentiable(flat[i])]
    of_closed = [i for i in range(count, total) if is_differentiable(flat[i]) and tangents[i] is not None]
    push, end = push_forward(loop.body, [*of_carry, *of_closed], total), count + len(of_carry)

    def parts(both: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Primals and tangents of ``(*carry, *its tangents, *closed, *their tangents)``."""
        rest = end + total - count
        return (*both[:count], *both[end:rest]), (*both[count:end], *both[rest:])

    def body(*both: Tensor) -> tuple[Tensor, ...]:
        primals, moving = parts(both)
        outputs, moved = push(*primals, *moving)
        return (*outputs, *moved)

    def go_on(*both: Tensor) -> tuple[Tensor, ...]:
        return loop.go_on(*parts(both)[0])

    moving = [torch.zeros_like(flat[i]) if tangents[i] is None else tangents[i] for i in of_carry]
    given: Any = [*flat[:count], *moving, *flat[count:], *[tangents[i] for i in of_closed]]
    return _run(_Repetition(go_on, body, end), given)[count:]


def fori_loop(lower: Any, upper: Any, body_fun: Callable[[Any, Any], Any], init: Tree) -> Any:
    """The last carry of ``for i in range(lower, upper): carry = body_fun(i, carry)``, from ``init``.

    With int bounds it is a :func:`scan`, with all derivatives; with a tensor among them a :func:`while_loop`, with
    those of forward mode.

    Args:
        lower: the first i, an int or a 0-d integer tensor.
        upper: behind the last i, an int or a 0-d integer tensor.
        body_fun: ``(i, carry) -> carry``, with the same structure, shapes and dtypes; i is a 0-d tensor, of int64 if
            the bounds are ints.
        init: a tree of tensors; numbers become tensors.
    Raises:
        TypeError: if a bound is no integer; if a leaf of a carry is no tensor or number (names the path).
        ValueError: if a bound is no scalar, or ``body_fun`` changes the carry's structure, shapes or dtypes; names the
            path.

    Source: ``jax.lax.fori_loop``.

    >>> fori_loop(1, 5, lambda i, x: x * i, torch.tensor(1))
    tensor(24)
    """
    start, stop = _bound("lower", lower), _bound("upper", upper)
    carry = as_tensors("fori_loop", "init", init)

    def body(i: Tensor, carry: Tree) -> Tree:
        new = as_tensors("fori_loop", "result of body_fun", body_fun(i, carry))
        check_alike("fori_loop: expected body_fun to keep the carry", carry, new)
        return new

    if isinstance(start, int) and isinstance(stop, int):
        steps = torch.arange(start, max(start, stop), device=next((x.device for x in tree.leaves(carry)), None))
        return scan(lambda carry, i: (body(i, carry), None), carry, steps)[0]
    first = start + 0 * stop  # the dtype and device of both
    return while_loop(lambda c: c[0] < stop, lambda c: (c[0] + 1, body(*c)), (first, carry))[1]


def _bound(name: str, x: Any) -> Any:
    """An int, or a 0-d integer tensor."""
    x = x.to_tensor() if hasattr(x, "to_tensor") else x
    if isinstance(x, Tensor):
        if x.ndim:
            raise ValueError(f"fori_loop: expected {name} to be a scalar, got shape {tuple(x.shape)}")
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            raise TypeError(f"fori_loop: expected {name} to be an integer, got {x.dtype}")
        return x
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"fori_loop: expected {name} to be an int or an integer tensor, got {type(x).__name__}")
    return x
