"""Implicit differentiation: derivatives of a solution from its equation, not from the algorithm that found it."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.context import is_differentiable
from functorch_gen.transforms.custom_call import Kept, Like, Vectors, call, is_followed, likes, materialize, transpose
from functorch_gen.transforms.derivatives import Flat, pull_back, push_forward
from functorch_gen.transforms.forward import jvp
from functorch_gen.tree import TreeDef
from functorch_gen.typing import Tree

__all__ = ["custom_linear_solve", "custom_root"]


def custom_root(
    f: Callable[[Any], Any],
    initial_guess: Tree,
    solve: Callable[[Callable[..., Any], Any], Any],
    tangent_solve: Callable[[Callable[..., Any], Any], Any],
    has_aux: bool = False,
) -> Any:
    """A root x of ``f``, f(x) = 0, found by ``solve(f, initial_guess)`` and differentiated as a root.

    With f(x, θ) = 0 the derivative is dx = -(∂f/∂x)⁻¹ ∂f/∂θ dθ, whatever ``solve`` does: it may loop until it
    converges, and keeps no memory of it. Derivatives of all orders, in both modes, with respect to the tensors that
    ``f`` closes over (in cells, defaults, partials and objects; those in globals are constants). The guess has none.

    Args:
        f: from a tree of tensors to one of the same structure and shapes.
        initial_guess: a tree of floating tensors or numbers.
        solve: ``(f, initial_guess) -> root``; with ``has_aux``, ``(root, aux)``.
        tangent_solve: ``(g, y) -> x`` with g(x) = y for the linear function g, ``f`` linearised at the root. It is
            itself differentiated as a function of y, so it is a formula, or :func:`custom_linear_solve`.
    Returns:
        The root, or ``(root, aux)`` if ``has_aux``; aux has no derivative.
    Raises:
        ValueError: if the root or f of it differ from the guess in structure, shape or dtype; names the path.
        TypeError: if a leaf is no floating tensor; for a derivative inside ``torch.compile``, which does not see what
            ``f`` closes over (``jit`` does).

    Source: ``jax.lax.custom_root``; Blondel et al. 2022, Efficient and modular implicit differentiation, eq. 2,
    arXiv:2105.15183.

    >>> from functorch_gen.transforms import grad
    >>> def newton(f, x):
    ...     for _ in range(20):
    ...         value, slope = jvp(f, (x,), (torch.ones(()),))
    ...         x = x - value / slope
    ...     return x
    >>> def square_root(a):
    ...     return custom_root(lambda x: x**2 - a, 1.0, newton, lambda g, y: y / g(torch.ones(())))
    >>> square_root(torch.tensor(4.0)), grad(square_root)(torch.tensor(4.0))
    (tensor(2.), tensor(0.2500))
    """
    guess = tree.map_with_path(lambda path, x: _as_tensor("custom_root: initial_guess", path, x), initial_guess)
    leaves, treedef = tree.flatten(guess)
    if torch.compiler.is_dynamo_compiling():
        root, aux = _split_aux("custom_root", solve(f, guess), has_aux)
        root = _values_alone("custom_root", root, f(root))
        return (root, aux) if has_aux else root
    closed_over, rebuild = convert_closure(functools.partial(_within, _Equation(f, solve, tangent_solve)))
    rule = _Root(rebuild, len(closed_over), likes(leaves), treedef, has_aux)
    return _solution(rule, [*closed_over, *leaves])


def custom_linear_solve(
    matvec: Callable[[Any], Any],
    b: Tree,
    solve: Callable[[Callable[..., Any], Any], Any],
    transpose_solve: Callable[[Callable[..., Any], Any], Any] | None = None,
    symmetric: bool = False,
    has_aux: bool = False,
) -> Any:
    """The solution x of A x = b, found by ``solve(matvec, b)`` and differentiated as a solution.

    dx = A⁻¹ (db - dA x), and in reverse mode b̄ = A⁻ᵀ x̄, Ā = -b̄ xᵀ: each derivative is such a solve again. Derivatives
    of all orders, with respect to ``b`` and the tensors that ``matvec`` closes over (in cells, defaults, partials and
    objects; those in globals are constants).

    Args:
        matvec: x -> A x, linear; from trees shaped like ``b`` to trees shaped like ``b``.
        b: a tree of floating tensors.
        solve: ``(matvec, b) -> x``; with ``has_aux``, ``(x, aux)``.
        transpose_solve: ``(vecmat, b) -> x`` for Aᵀ x = b, with ``vecmat`` x -> Aᵀ x. Reverse mode needs it.
        symmetric: A is symmetric: ``solve`` serves both.
    Returns:
        x, or ``(x, aux)`` if ``has_aux``; aux has no derivative.
    Raises:
        ValueError: if the solution differs from ``b`` in structure, shape or dtype; names the path.
        TypeError: if a leaf is no floating tensor; in reverse mode, without ``transpose_solve``; for a derivative
            inside ``torch.compile``, which does not see what ``matvec`` closes over (``jit`` does).

    Source: ``jax.lax.custom_linear_solve``; Giles 2008, Collected matrix derivative results, section 2.3.1.

    >>> from functorch_gen.transforms import grad
    >>> def solve(a, b):
    ...     return custom_linear_solve(lambda x: a * x, b, lambda matvec, b: b / matvec(torch.ones(2)), symmetric=True)
    >>> grad(lambda a: solve(a, torch.ones(2)).sum())(torch.tensor([2.0, 4.0]))
    tensor([-0.2500, -0.0625])
    """
    b = tree.map_with_path(lambda path, x: _as_tensor("custom_linear_solve: b", path, x), b)
    if torch.compiler.is_dynamo_compiling():
        x, aux = _split_aux("custom_linear_solve", solve(matvec, b), has_aux)
        x = _values_alone("custom_linear_solve", x, (matvec(x), b))
        return (x, aux) if has_aux else x
    like = tree.map(lambda x: Like(x.shape, x.dtype, x.device), b)
    if symmetric:
        system = _System(matvec, matvec, solve, solve, has_aux)
    else:
        system = _System(matvec, _Transposed(matvec, like), solve, transpose_solve, has_aux)
    return _solve(system, b)


class _Values(torch.autograd.Function):
    """The first tensors, without a derivative with respect to any."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, count: int, *xs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in xs[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise TypeError(f"{ctx.name}: expected jit around a derivative, got torch.compile, which does not see closures")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Values.backward(ctx)


@torch.compiler.allow_in_graph
def _values(name: str, count: int, *xs: Tensor) -> tuple[Tensor, ...]:
    return _Values.apply(name, count, *xs)


def _values_alone(name: str, solution: Tree, related: Tree) -> Tree:
    """``solution``; a derivative is an error, also one that reaches only the tensors of its equation, ``related``."""
    leaves, treedef = tree.flatten(solution)
    return tree.unflatten(treedef, _values(name, len(leaves), *leaves, *tree.leaves(related)))


def _as_tensor(who: str, path: str, x: Any) -> Tensor:
    found: Any = torch.tensor(float(x)) if isinstance(x, int | float) else x
    found = found.to_tensor() if hasattr(found, "to_tensor") else found  # jit's stand-in for a number
    if not is_differentiable(found):
        got = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{who}: expected floating tensors, got {got} at {path!r}")
    return found


def _check_like(who: str, like: Sequence[Like | None], treedef: TreeDef, given: Tree) -> list[Tensor]:
    leaves, structure = tree.flatten(given)
    if structure != treedef:
        raise ValueError(f"{who}: expected the structure {treedef}, got {structure}")
    for path, x, found in zip(tree.paths(given), like, leaves, strict=True):
        if not isinstance(found, Tensor):
            raise TypeError(f"{who}: expected tensors, got {type(found).__name__} at {path!r}")
        if x and (x.shape != found.shape or x.dtype != found.dtype):
            want, got = f"{tuple(x.shape)} {x.dtype}", f"{tuple(found.shape)} {found.dtype}"
            raise ValueError(f"{who}: expected {want} at {path!r}, got {got}")
    return leaves


def _split_aux(who: str, result: Any, has_aux: bool) -> tuple[Any, Any]:
    if has_aux and not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"{who}: expected solve to return (solution, aux), got {type(result).__name__}")
    return result if has_aux else (result, None)


def _solution(rule: Any, inputs: list[Tensor]) -> Any:
    followed = any(is_followed(x) for x in inputs)
    outputs = call(rule, inputs) if followed else rule.run(inputs)
    count = len(rule.like)
    solution = tree.unflatten(rule.treedef, outputs[:count])
    return (solution, rule.aux.get(outputs[count:])) if rule.has_aux else solution


def _within(what: Any, use: Callable[[Any], Any]) -> Any:
    """``use(what)``: a function, so that the closure's axes and dtypes hold while it is used."""
    return use(what)


@dataclass(frozen=True)
class _Equation:
    """f(x) = 0: what is searched for tensors, and rebuilt."""

    f: Callable[..., Any]
    solve: Callable[..., Any]
    tangent_solve: Callable[..., Any]

    def __call__(self, guess: Tree) -> Any:
        return self.solve(self.f, guess)


@dataclass(frozen=True)
class _Root:
    """Inputs: what the equation closes over, then the guess. Outputs: the root, then the tensors of aux."""

    rebuild: Callable[[Sequence[Tensor]], Any]  # the tensors it closes over -> what uses the _Equation
    closed: int
    like: list[Like | None]
    treedef: TreeDef
    has_aux: bool
    aux: Outputs = field(default_factory=Outputs)
    name: str = "custom_root"

    def run(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        guess = tree.unflatten(self.treedef, xs[self.closed :])
        found = self.rebuild(xs[: self.closed])(lambda equation: equation(guess))
        root, aux = _split_aux(self.name, found, self.has_aux)
        return *_check_like("custom_root: the root", self.like, self.treedef, root), *self.aux.put(aux)

    def kept(self) -> Kept:
        return Kept(range(self.closed), range(len(self.like)))

    def constants(self) -> range:
        return range(0)

    def flat(self, *both: Tensor) -> tuple[Tensor, ...]:
        """f of (what it closes over, x)."""
        x = tree.unflatten(self.treedef, both[self.closed :])
        value = self.rebuild(both[: self.closed])(lambda equation: equation.f(x))
        return tuple(_check_like("custom_root: f of the root", self.like, self.treedef, value))

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        """dx = -(∂f/∂x)⁻¹ ∂f/∂θ dθ."""
        moved = _directional(self.flat, saved, tangents[: self.closed])
        if moved is None:  # the guess alone moves
            return [None] * (len(self.like) + _size(self.aux))
        root, right = (tree.unflatten(self.treedef, leaves) for leaves in (saved[self.closed :], moved))

        def tangent(equation: _Equation) -> Tree:
            return equation.tangent_solve(lambda v: jvp(equation.f, (root,), (v,))[1], right)

        x = self.rebuild(saved[: self.closed])(tangent)
        leaves = _check_like("custom_root: tangent_solve's result", self.like, self.treedef, x)
        return [*[-x for x in leaves], *[None] * _size(self.aux)]

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[int]) -> Vectors:
        parameters = likes(saved[: self.closed])
        domain = [like if i in wanted else None for i, like in enumerate(parameters)]
        count = len(self.like)
        given = [*cotangents[:count], *[None] * _size(self.aux)]
        return [*transpose(self.push, saved, domain, given), *[None] * count]

    def check_push(self, level: int) -> None:
        """There is forward mode at every level."""


def _size(aux: Outputs) -> int:
    return sum(x is None for x in aux.others)


def _directional(flat: Flat, primals: Sequence[Tensor], tangents: Vectors) -> tuple[Tensor, ...] | None:
    """The derivative of ``flat`` along the tangents of its first arguments; None if none moves."""
    at = [i for i, t in enumerate(tangents) if t is not None]
    if not at:
        return None
    given: Any = (*primals, *[tangents[i] for i in at])
    return push_forward(flat, at, len(primals))(*given)[1]


@dataclass(frozen=True)
class _Transposed:
    """x -> Aᵀ x for the linear function x -> A x: its reverse mode."""

    matvec: Callable[..., Any]
    like: Tree  # of x

    def __call__(self, x: Tree) -> Tree:
        zeros, treedef = tree.flatten(tree.map(lambda like: like.zeros(), self.like))

        def flat(*leaves: Tensor) -> tuple[Tensor, ...]:
            return tuple(tree.leaves(self.matvec(tree.unflatten(treedef, leaves))))

        pulled: Any = torch.func.vjp(flat, *zeros)[1](tuple(tree.leaves(x)))
        return tree.unflatten(treedef, pulled)


@dataclass(frozen=True)
class _System:
    """A x = b: what is searched for tensors, and rebuilt."""

    matvec: Callable[..., Any]
    vecmat: Callable[..., Any]
    solve: Callable[..., Any] | None
    transpose_solve: Callable[..., Any] | None
    has_aux: bool

    def __call__(self, b: Tree) -> tuple[Any, Any]:
        if self.solve is None:
            raise TypeError("custom_linear_solve: expected transpose_solve, or symmetric=True, for reverse mode")
        return _split_aux("custom_linear_solve", self.solve(self.matvec, b), self.has_aux)

    def transposed(self) -> "_System":
        """Aᵀ x = b."""
        return _System(self.vecmat, self.matvec, self.transpose_solve, self.solve, self.has_aux)


def _solve(system: _System, b: Tree) -> Any:
    leaves, treedef = tree.flatten(b)
    closed_over, rebuild = convert_closure(functools.partial(_within, system))
    return _solution(_Solve(rebuild, len(closed_over), likes(leaves), treedef, system.has_aux), [*closed_over, *leaves])


@dataclass(frozen=True)
class _Solve:
    """Inputs: what the system closes over, then b. Outputs: x, then the tensors of aux."""

    rebuild: Callable[[Sequence[Tensor]], Any]  # the tensors it closes over -> what uses the _System
    closed: int
    like: list[Like | None]
    treedef: TreeDef
    has_aux: bool
    aux: Outputs = field(default_factory=Outputs)
    name: str = "custom_linear_solve"

    def run(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        b = tree.unflatten(self.treedef, xs[self.closed :])
        x, aux = self.rebuild(xs[: self.closed])(lambda system: system(b))
        return *_check_like("custom_linear_solve: x", self.like, self.treedef, x), *self.aux.put(aux)

    def kept(self) -> Kept:
        return Kept(range(self.closed), range(len(self.like)))

    def constants(self) -> range:
        return range(0)

    def flat(self, *both: Tensor) -> tuple[Tensor, ...]:
        """A x of (what the system closes over, x)."""
        x = tree.unflatten(self.treedef, both[self.closed :])
        product = self.rebuild(both[: self.closed])(lambda system: system.matvec(x))
        return tuple(_check_like("custom_linear_solve: A x", self.like, self.treedef, product))

    def again(self, system: _System, b: Sequence[Tensor | None]) -> list[Tensor]:
        """The leaves of the solution of another system of this kind."""
        found = _solve(system, tree.unflatten(self.treedef, materialize(b, self.like)))
        return tree.leaves(found[0] if self.has_aux else found)

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        """dx = A⁻¹ (db - dA x)."""
        right = list(tangents[self.closed :])
        moved = _directional(self.flat, saved, tangents[: self.closed])
        if moved is not None:
            right = [-m if t is None else t - m for t, m in zip(right, moved, strict=True)]
        solution = self.rebuild(saved[: self.closed])(lambda system: self.again(system, right))
        return [*solution, *[None] * _size(self.aux)]

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[int]) -> Vectors:
        """b̄ = A⁻ᵀ x̄; Ā pulls -b̄ back through A x."""
        right = cotangents[: len(self.like)]
        of_b = self.rebuild(saved[: self.closed])(lambda system: self.again(system.transposed(), right))
        at = [i for i in wanted if i < self.closed and is_differentiable(saved[i])]
        pulled = pull_back(self.flat, at, len(saved))(*saved, *[-g for g in of_b])
        grads: list[Tensor | None] = [None] * self.closed
        for i, g in zip(at, pulled, strict=True):
            grads[i] = g
        return [*grads, *of_b]

    def check_push(self, level: int) -> None:
        """There is forward mode at every level."""
