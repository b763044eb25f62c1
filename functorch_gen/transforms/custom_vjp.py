"""custom_vjp: a function whose reverse mode is written by hand."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.custom_call import (
    Kept,
    Like,
    Vectors,
    call,
    is_followed,
    likes,
    materialize,
    reverse_level,
    transpose,
)
from functorch_gen.transforms.custom_function import Arguments, CustomFunction, WithStatic, match_vectors
from functorch_gen.transforms.derivatives import pull_back
from functorch_gen.typing import Tree

__all__ = ["CustomVJPPrimal", "SymbolicZero", "custom_vjp"]


class CustomVJPPrimal(NamedTuple):
    """What ``fwd`` receives in place of a tensor if ``symbolic_zeros``."""

    value: Any
    perturbed: bool  # whether a derivative with respect to it is wanted


@dataclass(frozen=True)
class SymbolicZero:
    """A cotangent that is known to be zero: what ``bwd`` receives in its place if ``symbolic_zeros``.

    >>> SymbolicZero(torch.Size([2]), torch.float32)
    SymbolicZero(shape=torch.Size([2]), dtype=torch.float32)
    """

    shape: torch.Size
    dtype: torch.dtype


class custom_vjp(CustomFunction):
    """``fun``, whose reverse mode is written by hand. The rule is given by :meth:`defvjp`; use as a decorator.

    The rule holds under every transform and at every order: the derivative of the rule is the derivative of what
    ``bwd`` computes, through the residuals too. Forward mode of ``fun`` itself is an error, as the rule does not say
    how (:class:`custom_jvp` has both); forward mode over reverse mode, as in ``hessian``, is none.

    Args:
        fun: trees in, a tree out.
        nondiff_argnums: positions of arguments that are no tensors (functions, sizes, rates): ``bwd`` receives them
            first, and returns no cotangent for them.
    Raises:
        ValueError: when called without a rule; if ``bwd``'s cotangents differ from the arguments in structure, shape or
            dtype (names argument and path); if the derivative with respect to a tensor that ``fwd`` closes over is
            wanted.
        TypeError: if arguments are missing, or one of ``nondiff_argnums`` holds a tensor; if a residual is an object
            that hides a tensor, a function say; in forward mode.

    Source: ``jax.custom_vjp``.

    >>> from functorch_gen.transforms import grad
    >>> @custom_vjp
    ... def identity(x):
    ...     return x
    >>> identity.defvjp(lambda x: (x, None), lambda residuals, cotangent: (-cotangent,))
    >>> grad(lambda x: identity(x) ** 2)(torch.tensor(3.0))
    tensor(-6.)
    """

    def __init__(self, fun: Callable[..., Any], nondiff_argnums: int | Sequence[int] = ()):
        super().__init__(fun, nondiff_argnums)
        self.fwd: Callable[..., Any] | None = None
        self.bwd: Callable[..., Any] | None = None
        self.symbolic_zeros = False

    def defvjp(self, fwd: Callable[..., Any], bwd: Callable[..., Any], symbolic_zeros: bool = False) -> None:
        """Defines the rule.

        Args:
            fwd: ``fwd(*args) -> (out, residuals)``, with the arguments of ``fun``; ``residuals`` is any tree. One that
                is an argument or a part of ``out`` costs no memory of its own; other floating ones keep the arguments
                alive beside them, because they have derivatives too.
            bwd: ``bwd(*nondiff, residuals, cotangent) -> cotangents``, a tuple with one entry for each argument that is
                not static: a tree shaped like it, with None (also for a whole tree) where there is nothing to say.
                ``cotangent`` is shaped like ``out``, with None beside what has no derivative (integers).
            symbolic_zeros: ``fwd`` receives a :class:`CustomVJPPrimal` for each tensor, and ``bwd`` a
                :class:`SymbolicZero` for each cotangent that is known to be zero.
        """
        self.fwd, self.bwd, self.symbolic_zeros = fwd, bwd, symbolic_zeros
        self._look_into(fwd, bwd)

    def _run(self, args: tuple[Any, ...]) -> Any:
        if self.fwd is None or self.bwd is None:
            raise ValueError(f"custom_vjp: expected a rule, given by {self.__name__}.defvjp(fwd, bwd), got none")
        nondiff = self.signature.nondiff
        static, tensors, arguments = self.signature.split(args)
        forward, rebuild_forward = convert_closure(WithStatic(self.fwd, static, nondiff))
        backward, rebuild_backward = convert_closure(WithStatic(self.bwd, static, tuple(range(len(static)))))
        if not any(is_followed(x) for x in (*tensors, *forward)):
            return self.fun(*args)
        levels = [reverse_level(x) for x in tensors]
        rule = _Rule(
            function=self,
            arguments=arguments,
            forward=rebuild_forward,
            backward=rebuild_backward,
            own=len(tensors),
            read=len(forward),
            of_bwd=len(backward),
            level=max(levels, default=-1),
            perturbed=[level >= 0 for level in levels],
        )
        outputs = call(rule, [*tensors, *forward, *backward])  # fills the record
        return rule.record.out.get(outputs[: rule.record.results])


class _Record:
    """What ``fwd`` returned, tensors aside: filled by the first run."""

    def __init__(self) -> None:
        self.out = Outputs()
        self.results = 0  # how many outputs are of out; residuals that fwd computed follow
        self.inputs: list[Like | None] = []
        self.outputs: list[Like | None] = []
        self.residuals: list[tuple[str, Any]] = []  # the leaves: "input" i, "output" j, "object" x
        self.residual_treedef: Any = None

    def put(self, xs: Sequence[Tensor], out: Tree, residuals: Tree) -> tuple[Tensor, ...]:
        """Takes the pair apart; returns the tensors of out, and the residuals that are neither inputs nor of out."""
        found = list(self.out.put(out))
        self.results = len(found)
        places: dict[int, tuple[str, Any]] = {id(x): ("output", j) for j, x in enumerate(found)}
        places |= {id(x): ("input", i) for i, x in enumerate(xs)}
        leaves, self.residual_treedef = tree.flatten(residuals)
        for path, x in zip(tree.paths(residuals), leaves, strict=True):
            if not isinstance(x, Tensor):
                _check_holds_no_tensor(path, x)
            elif id(x) not in places:
                places[id(x)] = "output", len(found)
                found.append(x)
        self.residuals = [places[id(x)] if isinstance(x, Tensor) else ("object", x) for x in leaves]
        self.inputs, self.outputs = likes(xs), likes(found)
        return tuple(found)

    def cotangent(self, cotangents: Vectors, symbolic: bool) -> Tree:
        """The tree of cotangents of ``out``: None beside what has no derivative."""
        like = self.outputs[: self.results]
        given: list[Any] = list(cotangents) if symbolic else materialize(cotangents, like)
        given = [SymbolicZero(x.shape, x.dtype) if c is None and x else c for c, x in zip(given, like, strict=True)]
        rest = iter(given)
        assert self.out.treedef is not None
        return tree.unflatten(self.out.treedef, [next(rest) if x is None else None for x in self.out.others])


def _check_holds_no_tensor(path: str, x: Any) -> None:
    """A tensor that is out of sight would lose its history: second derivatives would be wrong without an error."""
    if not hasattr(x, "to_tensor") and convert_closure(x)[0]:  # jit's stand-in for a number is a constant
        raise TypeError(
            f"custom_vjp: expected the tensors among the residuals in a tree, got {type(x).__name__} at {path!r} that "
            "holds one; return the tensor itself, and build the object in bwd"
        )


@dataclass(frozen=True)
class _Rule:
    """Inputs: the tensors among the arguments, those that ``fwd`` closes over, those that ``bwd`` does."""

    function: custom_vjp
    arguments: Arguments
    forward: Callable[[Sequence[Tensor]], Any]  # the tensors that fwd closes over -> fwd
    backward: Callable[[Sequence[Tensor]], Any]
    own: int  # how many tensors are arguments
    read: int  # how many fwd closes over
    of_bwd: int  # how many bwd closes over
    level: int  # of the innermost reverse mode
    perturbed: list[bool]
    record: _Record = field(default_factory=_Record)
    name: str = "custom_vjp"

    def run(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        count = self.own + self.read
        fwd = self.forward(xs[self.own : count])
        values: Sequence[Any] = xs[: self.own]
        if self.function.symbolic_zeros:
            values = [CustomVJPPrimal(x, p) for x, p in zip(values, self.perturbed, strict=True)]
        pair = fwd(*self.arguments.fill(values))
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"custom_vjp: expected fwd to return (out, residuals), got {type(pair).__name__}")
        return self.record.put(xs[:count], *pair)

    def kept(self) -> Kept:
        record, count = self.record, self.own + self.read
        inputs = {i for kind, i in record.residuals if kind == "input"}
        if any(record.outputs[record.results :]):  # a residual that was computed has a derivative: fwd's
            inputs = set(range(count))
        inputs |= set(range(count, count + self.of_bwd))
        return Kept(sorted(inputs), sorted({j for kind, j in record.residuals if kind == "output"}))

    def constants(self) -> range:
        return range(self.own, self.own + self.read)

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[int]) -> Vectors:
        kept, results = self.kept(), self.record.results
        inputs = dict(zip(kept.inputs, saved, strict=False))
        outputs = dict(zip(kept.outputs, saved[len(kept.inputs) :], strict=True))
        grads: list[Tensor | None] = [None] * (self.own + self.read + self.of_bwd)
        if any(c is not None for c in cotangents[:results]):
            grads[: self.own] = self._by_rule(inputs, outputs, cotangents[:results])
        if any(c is not None for c in cotangents[results:]):
            for i, g in self._by_residuals(inputs, cotangents[results:], wanted).items():
                by_rule = grads[i]
                grads[i] = g if by_rule is None else by_rule + g
        return grads

    def _by_rule(self, inputs: dict[int, Tensor], outputs: dict[int, Tensor], cotangents: Vectors) -> Vectors:
        """``bwd`` of the cotangents of ``out``."""
        count = self.own + self.read
        bwd = self.backward([inputs[i] for i in range(count, count + self.of_bwd)])
        place = {"input": inputs.get, "output": outputs.get, "object": lambda x: x}
        leaves = [place[kind](x) for kind, x in self.record.residuals]
        residuals = tree.unflatten(self.record.residual_treedef, leaves)
        cotangent = self.record.cotangent(cotangents, self.function.symbolic_zeros)
        given = bwd(residuals, cotangent)
        numbers = self.arguments.numbers
        if not (isinstance(given, tuple | list) and len(given) == len(numbers)):
            got = len(given) if isinstance(given, tuple | list) else type(given).__name__
            raise ValueError(f"custom_vjp: expected bwd to return a tuple of {len(numbers)} cotangents, got {got}")
        grads: list[Tensor | None] = []
        for number, like, g in zip(numbers, self.arguments.fill(self._likes()), given, strict=True):
            grads += match_vectors(f"custom_vjp: bwd's cotangent of argument {number}", like, g)
        return [grads[i] for i in self.arguments.at]

    def _likes(self) -> list[Any]:
        return [like or "no derivative" for like in self.record.inputs[: self.own]]

    def _by_residuals(self, inputs: dict[int, Tensor], cotangents: Vectors, wanted: Sequence[int]) -> dict[int, Tensor]:
        """What comes through residuals that ``fwd`` computed: its derivative, for the inputs that are wanted."""
        count = self.own + self.read
        at = [i for i in wanted if i < self.own and self.record.inputs[i]]
        dense = materialize(cotangents, self.record.outputs[self.record.results :])
        again = dataclasses.replace(self, record=_Record())
        pull = pull_back(lambda *xs: again.run(xs)[self.record.results :], at, count)
        pulled = pull(*[inputs[i] for i in range(count)], *[c for c in dense if c is not None])
        return dict(zip(at, pulled, strict=True))

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        wanted = [i for i, t in enumerate(tangents) if t is not None]
        return transpose(lambda xs, vectors: self.pull(xs, vectors, wanted), saved, self.record.outputs, tangents)

    def check_push(self, level: int) -> None:
        """Forward mode may only follow reverse mode: there the tangents of ``out`` are ``bwd`` transposed."""
        if level > self.level:
            raise TypeError(
                f"custom_vjp: can't apply forward-mode differentiation (jvp) to {self.function.__name__}, which is a "
                "custom_vjp function: its rule has reverse mode only; use custom_jvp"
            )
