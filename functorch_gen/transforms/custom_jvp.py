"""custom_jvp: a function whose derivative is written by hand as a linear map of tangents."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from functorch_gen import tree
from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.closure import convert_closure
from functorch_gen.transforms.custom_call import Kept, Like, Vectors, call, is_followed, likes, materialize, transpose
from functorch_gen.transforms.custom_function import Arguments, CustomFunction, WithStatic, match_vectors

__all__ = ["custom_jvp"]


class custom_jvp(CustomFunction):
    """``fun``, whose derivative is written by hand. The rule is given by :meth:`defjvp`; use as a decorator.

    The rule is forward mode, linear in the tangents; reverse mode is its transposed. So one rule serves all transforms
    at all orders.

    Args:
        fun: trees in, a tree out.
        nondiff_argnums: positions of arguments that are no tensors (functions, sizes, rates): the rule receives them
            first.
    Raises:
        ValueError: when called without a rule; if the rule's tangent differs from the output in structure, shape or
            dtype (names the path); if the derivative with respect to a tensor that ``fun`` closes over is wanted.
        TypeError: if arguments are missing, or one of ``nondiff_argnums`` holds a tensor.

    Source: ``jax.custom_jvp``.

    >>> import torch
    >>> from functorch_gen.transforms import grad
    >>> @custom_jvp
    ... def softplus(x):
    ...     return torch.log1p(torch.exp(x))
    >>> softplus.defjvps(lambda tangent, out, x: torch.sigmoid(x) * tangent)
    >>> grad(softplus)(torch.tensor(1000.0))
    tensor(1.)
    """

    def __init__(self, fun: Callable[..., Any], nondiff_argnums: int | Sequence[int] = ()):
        super().__init__(fun, nondiff_argnums)
        self.rule: Callable[..., Any] | None = None

    def defjvp(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Defines the rule, and returns it.

        Args:
            rule: ``rule(*nondiff, primals, tangents) -> (out, tangent_out)``, linear in the tangents. ``primals`` is
                the tuple of the arguments that are not static; ``tangents`` has its structure, with zeros where
                nothing moves, 0.0 beside Python floats and None beside integers and others. ``tangent_out`` is shaped
                like ``out``; None stands for zero.
        """
        self.rule = rule
        self._look_into(rule)
        return rule

    def defjvps(self, *rules: Callable[..., Any] | None) -> None:
        """Defines the rule as a sum, with one part ``part(tangent, out, *primals) -> tangent_out`` for each argument.

        None: the output does not depend on that argument.

        Raises:
            TypeError: if there are ``nondiff_argnums``.
        """
        if self.signature.nondiff:
            raise TypeError("custom_jvp: expected defjvp where nondiff_argnums are given, got defjvps")

        def rule(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any]:
            out = self(*primals)
            pairs = zip(rules, tangents, strict=True)
            parts = [part(t, out, *primals) for part, t in pairs if part is not None]
            return out, functools.reduce(tree.add, parts) if parts else None

        self.defjvp(rule)

    def _run(self, args: tuple[Any, ...]) -> Any:
        if self.rule is None:
            raise ValueError(f"custom_jvp: expected a rule, given by {self.__name__}.defjvp(rule), got none")
        static, tensors, arguments = self.signature.split(args)
        read, fun = convert_closure(WithStatic(self.fun, static, self.signature.nondiff))
        of_rule, linear = convert_closure(WithStatic(self.rule, static, tuple(range(len(static)))))
        if not any(is_followed(x) for x in (*tensors, *read)):
            return self.fun(*args)
        rule = _Rule(arguments, fun, linear, own=len(tensors), read=len(read), of_rule=len(of_rule))
        outputs = call(rule, [*tensors, *read, *of_rule])  # fills rule.out
        return rule.out.get(outputs)


@dataclass(frozen=True)
class _Rule:
    """Inputs: the tensors among the arguments, those that ``fun`` closes over, those that the rule does."""

    arguments: Arguments
    fun: Callable[[Sequence[Tensor]], Any]  # the tensors that it closes over -> the function
    rule: Callable[[Sequence[Tensor]], Any]
    own: int  # how many tensors are arguments
    read: int  # how many fun closes over
    of_rule: int  # how many the rule closes over
    out: Outputs = field(default_factory=Outputs)  # filled by the first run, as are these:
    inputs: list[Like | None] = field(default_factory=list)
    outputs: list[Like | None] = field(default_factory=list)
    name: str = "custom_jvp"

    def run(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        fun = self.fun(xs[self.own : self.own + self.read])
        tensors = self.out.put(fun(*self.arguments.fill(xs[: self.own])))
        self.inputs[:], self.outputs[:] = likes(xs[: self.own]), likes(tensors)
        return tensors

    def kept(self) -> Kept:
        count = self.own + self.read
        return Kept([*range(self.own), *range(count, count + self.of_rule)], [])

    def constants(self) -> range:
        return range(self.own, self.own + self.read)

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        rule = self.rule(saved[self.own :])
        primals = self.arguments.fill(saved[: self.own])
        moving = self.arguments.tangents(materialize(tangents[: self.own], self.inputs))
        pair = rule(primals, moving)
        if not (isinstance(pair, tuple | list) and len(pair) == 2):
            raise TypeError(f"custom_jvp: expected the rule to return (out, tangent_out), got {type(pair).__name__}")
        rest = iter(self.outputs)
        like = [next(rest) if x is None else None for x in self.out.others]
        assert self.out.treedef is not None
        out = tree.unflatten(self.out.treedef, [x or "no derivative" for x in like])
        moved = match_vectors("custom_jvp: tangent_out", out, pair[1])
        return [t for t, x in zip(moved, self.out.others, strict=True) if x is None]

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[int]) -> Vectors:
        domain = [like if i in wanted else None for i, like in enumerate(self.inputs)]
        return [*transpose(self.push, saved, domain, cotangents), *[None] * (self.read + self.of_rule)]

    def check_push(self, level: int) -> None:
        """There is forward mode at every level."""
