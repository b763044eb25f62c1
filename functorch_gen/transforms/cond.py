"""cond: one of two functions, as a value turns out, with the derivatives of that function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

from functorch_gen import tree
from functorch_gen.transforms.carry import as_predicate, as_tensors, check_alike
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.context import functorch, is_differentiable
from functorch_gen.transforms.derivatives import Flat, pull_back, push_forward
from functorch_gen.transforms.loop_node import choice_node
from functorch_gen.transforms.shapes import ShapeDtypeStruct
from functorch_gen.transforms.subgraph import decide, is_abstract, is_graph_traced
from functorch_gen.typing import Tree

__all__ = ["cond"]


def cond(pred: Any, true_fun: Callable[..., Tree], false_fun: Callable[..., Tree], *operands: Tree) -> Any:
    """``true_fun(*operands)`` if ``pred`` holds, else ``false_fun(*operands)``.

    Only the branch taken runs, and only it is differentiated, to every order, with respect to the operands and the
    tensors that the functions close over. Under :func:`jit` both are traced, once, and the choice is made when the
    program runs; its backward pass chooses again, and computes the branch anew.

    Where ``pred`` differs between the examples of a ``vmap``, and under ``torch.compile``, both branches run for all
    examples and the results are selected. There the branch not taken gets no gradient and no tangent, so NaN and
    infinity in it do not spread: not through values that belong to one example, under ``torch.compile`` not through the
    operands. Through a closed-over tensor that all examples share they may, as in JAX.

    Args:
        pred: a scalar tensor, or a number; other than bools are True if they are not 0.
        true_fun: returns a tree of tensors; numbers become tensors.
        false_fun: returns the same structure, shapes and dtypes. That is checked where both run or are traced.
        operands: trees, with leaves of any type.
    Raises:
        ValueError: if ``pred`` is no scalar, or the branches return other structures, shapes or dtypes; names the path.
            Under ``jit``, if a branch writes to its arguments in place.
        TypeError: if ``pred`` is no tensor or number, or a branch returns a leaf that is neither; names the path.

    Source: ``jax.lax.cond``.

    >>> cond(torch.tensor(True), torch.sin, torch.cos, torch.tensor(0.0))
    tensor(0.)
    """
    holds = as_predicate("cond", "pred", pred)
    if not isinstance(holds, Tensor):
        return _run("true_fun", true_fun, operands) if holds else _run("false_fun", false_fun, operands)
    branches = _Branches(true_fun, false_fun, operands)
    if torch.compiler.is_dynamo_compiling() or is_abstract() or _mapped_level(holds) is not None:
        return branches.result(_select(branches.choice, holds, branches.flat))
    if is_graph_traced():
        return branches.result(_run_choice(branches.choice, holds, branches.flat))
    return _run("true_fun", true_fun, operands) if decide(holds) else _run("false_fun", false_fun, operands)


def _run(name: str, fun: Callable[..., Tree], operands: Sequence[Tree]) -> Tree:
    return as_tensors("cond", f"result of {name}", fun(*operands))


@dataclass(frozen=True)
class _Choice:
    """Two functions of the same tensors that return alike."""

    true: Flat
    false: Flat

    def map(self, transform: Callable[[Flat], Flat]) -> "_Choice":
        return _Choice(transform(self.true), transform(self.false))


class _Branches:
    """Both functions on flat tensors: those among the operands, then those that each function closes over."""

    def __init__(self, true_fun: Callable[..., Tree], false_fun: Callable[..., Tree], operands: Sequence[Tree]):
        self._leaves, self._treedef = tree.flatten(operands)
        self._at = [i for i, x in enumerate(self._leaves) if isinstance(x, Tensor)]
        self._results: dict[str, Tree] = {}
        self.flat: list[Tensor] = [self._leaves[i] for i in self._at]
        self.choice = _Choice(self._flat("true_fun", true_fun), self._flat("false_fun", false_fun))

    def _flat(self, name: str, fun: Callable[..., Tree]) -> Flat:
        if torch.compiler.is_dynamo_compiling():  # it cannot trace how functions are rebuilt
            return lambda *flat: self._call(name, fun, flat)
        start = len(self.flat)
        closed_over, rebuild = convert_closure(fun)
        self.flat += closed_over
        end = len(self.flat)
        return lambda *flat: self._call(name, rebuild(flat[start:end]), flat)

    def _call(self, name: str, fun: Callable[..., Tree], flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        full = list(self._leaves)
        for i, x in zip(self._at, flat, strict=False):
            full[i] = x
        result = _run(name, fun, tree.unflatten(self._treedef, full))
        self._results[name] = tree.map(lambda x: ShapeDtypeStruct(x.shape, x.dtype), result)
        if len(self._results) == 2:
            expected = "cond: expected false_fun to return a result like true_fun"
            check_alike(expected, self._results["true_fun"], self._results["false_fun"])
        return tuple(tree.leaves(result))

    def result(self, out: Sequence[Tensor]) -> Tree:
        return tree.unflatten(tree.structure(self._results["true_fun"]), out)


def _mapped_level(pred: Tensor) -> int | None:
    """The innermost ``vmap`` between whose examples ``pred`` differs."""
    while functorch.is_functorch_wrapped_tensor(pred):
        if functorch.is_batchedtensor(pred):
            return functorch.maybe_get_level(pred)
        pred = functorch.get_unwrapped(pred)
    return None


def _select(choice: _Choice, pred: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Both branches, and of each result the one that holds."""
    true = choice.true(*_cut(flat, pred, pred))
    false = choice.false(*_cut(flat, pred, ~pred))
    return tuple(torch.where(pred, x, y) for x, y in zip(true, false, strict=True))


def _cut(flat: Sequence[Tensor], pred: Tensor, taken: Tensor) -> list[Tensor]:
    """``flat`` with derivatives only where ``taken``: zero times infinity would be NaN in the branch that is not.

    What the examples share stays shared: one copy for each example is no price for it.
    """
    compiling = torch.compiler.is_dynamo_compiling()
    level = None if compiling else _mapped_level(pred)

    def own(x: Tensor) -> bool:
        return compiling or (level is not None and functorch.maybe_get_level(x) >= level)

    return [torch.where(taken, x, x.detach()) if is_differentiable(x) and own(x) else x for x in flat]


def _run_choice(choice: _Choice, pred: Tensor, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """A choice that is being traced, and made when the program runs."""
    requires_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in flat)
    if torch._C._are_functorch_transforms_active() or requires_gradient:
        return _Cond.apply(choice, pred, *flat)
    return choice_node(choice.true, choice.false, pred, flat)


class _Cond(torch.autograd.Function):
    """A node whose derivatives are such nodes: every order and every stack of transforms ends in this rule."""

    @staticmethod
    def forward(choice: _Choice, pred: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return choice_node(choice.true, choice.false, pred, flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.choice, *given = inputs
        ctx.save_for_backward(*given)
        ctx.save_for_forward(*given)
        ctx.floating = [is_differentiable(x) for x in output]
        ctx.mark_non_differentiable(*[x for x in output if not is_differentiable(x)])

    @staticmethod
    def vmap(info: Any, in_dims: Any, choice: _Choice, pred: Tensor, *flat: Tensor) -> Any:
        """``pred`` has no axis here: cond() selects where it has one."""
        dims = tuple(in_dims[2:])
        mapped = choice.map(lambda fun: torch.func.vmap(fun, dims, randomness=info.randomness))
        out = _Cond.apply(mapped, pred, *flat)
        return out, (0,) * len(out)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        pred, *flat = ctx.saved_tensors
        wanted = [i for i, x in enumerate(flat) if is_differentiable(x) and ctx.needs_input_grad[2 + i]]
        given = [c for c, floating in zip(cotangents, ctx.floating, strict=True) if floating]
        pulled = ctx.choice.map(lambda fun: pull_back(fun, wanted, len(flat)))
        grads = dict(zip(wanted, _run_choice(pulled, pred, [*flat, *given]), strict=True))
        return (None, None, *[grads.get(i) for i in range(len(flat))])

    @staticmethod
    def jvp(ctx: Any, _choice: None, _pred: None, *tangents: Tensor | None) -> Any:
        unpack = torch._VF._unpack_dual  # this level's tangent off
        pred, *saved = ctx.saved_tensors
        flat = [unpack(x, level=0)[0] if is_differentiable(x) else x for x in saved]
        moving = {i: t for i, t in enumerate(tangents) if t is not None and is_differentiable(flat[i])}
        pushed = ctx.choice.map(lambda fun: _tangents(fun, list(moving), len(flat)))
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            moved = iter(_run_choice(pushed, pred, [*flat, *moving.values()]))
        return tuple(next(moved) if floating else None for floating in ctx.floating)


def _tangents(fun: Flat, at: Sequence[int], count: int) -> Flat:
    """(*xs, *tangents of the inputs ``at``) -> the tangents of the floating outputs."""
    push = push_forward(fun, at, count)
    return lambda *both: push(*both)[1]
