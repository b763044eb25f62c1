"""scan: a loop that carries a state, with the derivatives of a loop."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.carry import as_tensors, check_alike, steps_of
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.loop_rule import Loop, run_loop
from functorch_gen.transforms.subgraph import is_graph_traced
from functorch_gen.tree import TreeDef
from functorch_gen.typing import Tree

__all__ = ["scan"]


def scan(
    f: Callable[[Any, Any], tuple[Any, Any]],
    init: Tree,
    xs: Tree = None,
    length: int | None = None,
    reverse: bool = False,
) -> tuple[Any, Any]:
    """The loop ``carry, y = f(carry, x)`` over axis 0 of ``xs``: the last carry, and the ys stacked along axis 0.

    Gradients, forward mode, ``vmap`` and their stacks hold to every order, for the carry, the xs and the tensors that
    ``f`` closes over. Under :func:`jit` the loop is one node whose body is traced once: the size of the program and the
    time to build it do not depend on the length. There the backward loop runs each step again from the carry it
    started from, so memory is O(length x (carry + y)); elsewhere it is a Python loop, whose steps keep what they
    computed unless ``f`` is a :func:`remat`. ``torch.compile`` unrolls it.

    Args:
        f: ``(carry, x) -> (carry, y)``, trees of tensors; the carry keeps its structure, shapes and dtypes. Tensors in
            cells, defaults, partials and objects are differentiated; those in globals are constants under ``jit``.
        init: the first carry; numbers become tensors.
        xs: a tree of tensors whose leaves share the size of axis 0, or None: then ``f`` receives None.
        length: the number of steps; needed if ``xs`` has no leaves.
        reverse: runs from the last x to the first; ``ys`` stands in the order of ``xs`` all the same.
    Raises:
        ValueError: if the sizes of axis 0 differ from one another or from ``length``, or there is no length; if ``f``
            changes the carry's structure, shapes or dtypes, or does not return a pair. Names the path.
        TypeError: if a leaf is no tensor (of ``xs``) or no tensor or number (of a carry or y); names the path.

    Source: ``jax.lax.scan``.

    >>> scan(lambda total, x: (total + x, total), torch.tensor(0.0), torch.tensor([1.0, 2.0, 3.0]))
    (tensor(6.), tensor([0., 1., 3.]))
    """
    steps = steps_of("scan", xs, length)
    carry = as_tensors("scan", "init", init)
    body = _Body(f, tree.structure(carry), tree.structure(xs))
    if steps == 0:
        return _no_steps(body, carry, xs)
    if not torch.compiler.is_dynamo_compiling() and is_graph_traced():
        return _as_node(body, carry, xs, steps, reverse)
    return _as_loop(body, carry, xs, steps, reverse)


class _Body:
    """``f`` on flat carries and xs; the structure of y is known when it has run."""

    def __init__(self, f: Callable[[Any, Any], Any], carry: TreeDef, xs: TreeDef):
        self.f, self.carry, self.xs = f, carry, xs
        self.y: TreeDef | None = None

    def __call__(self, f: Callable[[Any, Any], Any], carry: list[Tensor], x: list[Tensor]) -> tuple[Tensor, ...]:
        given = tree.unflatten(self.carry, carry)
        result = f(given, tree.unflatten(self.xs, x))
        if not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"scan: expected f to return (carry, y), got {type(result).__name__}")
        new = as_tensors("scan", "carry of f", result[0])
        check_alike("scan: expected f to keep the carry", given, new)
        leaves, self.y = tree.flatten(as_tensors("scan", "y of f", result[1]))
        return (*tree.leaves(new), *leaves)

    def result(self, carry: list[Tensor], ys: list[Tensor]) -> tuple[Any, Any]:
        assert self.y is not None
        return tree.unflatten(self.carry, carry), tree.unflatten(self.y, ys)


def _as_loop(body: _Body, init: Tree, xs: Tree, steps: int, reverse: bool) -> tuple[Any, Any]:
    carry, leaves = tree.leaves(init), tree.leaves(xs)
    ys: list[tuple[Tensor, ...]] = []
    for i in reversed(range(steps)) if reverse else range(steps):
        out = body(body.f, carry, [x[i] for x in leaves])
        ys.append(out[len(carry) :])
        carry = list(out[: len(carry)])
    return body.result(carry, [torch.stack(y[::-1] if reverse else y) for y in zip(*ys, strict=True)])


def _as_node(body: _Body, init: Tree, xs: Tree, steps: int, reverse: bool) -> tuple[Any, Any]:
    closed_over, rebuild = convert_closure(body.f)
    carry, leaves = tree.leaves(init), tree.leaves(xs)
    counted = leaves or [torch.arange(steps, device=carry[0].device if carry else None)]  # the node's length
    loop = Loop(lambda *flat: step(*loop.split(flat)), len(carry), len(counted), reverse)

    def step(carry: list[Tensor], x: list[Tensor], closed: list[Tensor]) -> tuple[Tensor, ...]:
        return body(rebuild(closed), carry, x[: len(leaves)])

    out = run_loop(loop, [*carry, *counted, *closed_over])
    return body.result(list(out[: len(carry)]), list(out[len(carry) :]))


def _no_steps(body: _Body, init: Tree, xs: Tree) -> tuple[Any, Any]:
    """One step on zeros tells what y would be."""
    x = [x.new_zeros(x.shape[1:]) for x in tree.leaves(xs)]
    carry = tree.leaves(init)
    out = body(body.f, carry, x)
    return body.result(carry, [y.detach()[None][:0] for y in out[len(carry) :]])
