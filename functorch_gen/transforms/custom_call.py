"""A flat function with derivative rules of its own, as one operation that every transform knows.

A :class:`Rule` says how the function runs, how it pulls cotangents back and how it pushes tangents forward. The rules
are ordinary operations at the level that differentiates, so every order and every stack of transforms holds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled, unpack_dual

from functorch_gen.transforms.arguments import Outputs
from functorch_gen.transforms.context import functorch, is_differentiable
from functorch_gen.transforms.derivatives import dense_output, pull_back

__all__ = [
    "Kept",
    "Like",
    "Rule",
    "Vectors",
    "call",
    "is_followed",
    "likes",
    "materialize",
    "reverse_level",
    "transpose",
]

Vectors = Sequence[Tensor | None]
"""Tangents or cotangents; None stands for zero, and for what has no derivative."""


class Kept(NamedTuple):
    """Which inputs and outputs the derivatives read: their indices."""

    inputs: Sequence[int]
    outputs: Sequence[int]


@dataclass(frozen=True)
class Like:
    """What a zero needs to know."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    def zeros(self) -> Tensor:
        """A zero of this shape."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


class Rule(Protocol):
    """What :func:`call` runs and how it is differentiated. ``saved`` are the inputs, then the outputs, of ``kept``."""

    @property
    def name(self) -> str:
        """Who it is, in messages."""
        ...

    def run(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs; runs before the other methods."""
        ...

    def kept(self) -> Kept:
        """What is saved."""
        ...

    def constants(self) -> range:
        """The inputs of which no derivative is known: asking for one is an error."""
        ...

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[int]) -> Vectors:
        """Cotangents of the outputs to cotangents of the inputs, of those that are ``wanted`` at least."""
        ...

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        """Tangents of the inputs to tangents of the outputs."""
        ...

    def check_push(self, level: int) -> None:
        """Raises ``TypeError`` if there is no forward mode at this functorch level."""
        ...


def is_followed(x: Tensor) -> bool:
    """Whether a derivative of what is computed from ``x`` may be taken, at some level."""
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_gradtrackingtensor(x) and functorch.maybe_get_level(x) > 0:  # else it has ended
            return True
        x = functorch.get_unwrapped(x)
    moves = torch._C._is_fwd_grad_enabled() and is_differentiable(x) and unpack_dual(x).tangent is not None
    return moves or reverse_level(x) >= 0


def reverse_level(x: Tensor) -> int:
    """The innermost level of reverse mode that follows ``x``: 0 is torch.autograd's, -1 none."""
    while functorch.is_functorch_wrapped_tensor(x):
        level = functorch.maybe_get_level(x)
        if functorch.is_gradtrackingtensor(x) and level > 0 and x.requires_grad:
            return level
        x = functorch.get_unwrapped(x)
    return 0 if x.requires_grad and torch.is_grad_enabled() else -1


def call(rule: Rule, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of ``rule``, differentiated by it."""
    return _Call.apply(rule, *xs)


def likes(xs: Sequence[Any]) -> list[Like | None]:
    """What zeros for ``xs`` need to know; None for what has no derivative."""
    return [Like(x.shape, x.dtype, x.device) if is_differentiable(x) else None for x in xs]


def materialize(vectors: Vectors, like: Sequence[Like | None]) -> list[Tensor | None]:
    """Zeros for those that are missing; None stays where nothing has a derivative."""
    return [x.zeros() if v is None and x else v for v, x in zip(vectors, like, strict=True)]


def transpose(
    linear: Callable[[Sequence[Tensor], list[Tensor | None]], Vectors],
    saved: Sequence[Tensor],
    domain: Sequence[Like | None],
    cotangents: Vectors,
) -> list[Tensor | None]:
    """The transposed of ``vectors -> linear(saved, vectors)`` applied to ``cotangents``.

    A linear function is its own derivative: this is its reverse mode at zero.
    """
    given = [j for j, c in enumerate(cotangents) if c is not None]
    at = [i for i, like in enumerate(domain) if like]
    count = len(saved)

    def flat(*both: Tensor) -> tuple[Tensor, ...]:
        vectors: list[Tensor | None] = [None] * len(domain)
        for i, v in zip(at, both[count:], strict=True):
            vectors[i] = v
        found = linear(both[:count], vectors)
        return tuple(_or_zero(found[j], cotangents[j]) for j in given)

    zeros = [like.zeros() for like in domain if like]
    end = count + len(zeros)
    pulled = iter(pull_back(flat, range(count, end), end)(*saved, *zeros, *[c for c in cotangents if c is not None]))
    return [next(pulled) if like else None for like in domain]


def _or_zero(x: Tensor | None, like: Any) -> Tensor:
    return torch.zeros_like(like) if x is None else x


class _Call(torch.autograd.Function):
    @staticmethod
    def forward(rule: Rule, *xs: Tensor) -> tuple[Tensor, ...]:
        taken = {id(x) for x in xs}  # torch wants a view where an input is returned as it is, or an output twice
        out: list[Tensor] = []
        for x in rule.run(xs):
            out.append(x.view_as(x) if id(x) in taken else dense_output(x))
            taken.add(id(x))
        return tuple(out)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        ctx.rule, *xs = inputs
        kept = ctx.rule.kept()
        saved = [*[xs[i] for i in kept.inputs], *[output[j] for j in kept.outputs]]
        ctx.save_for_backward(*saved)
        ctx.save_for_forward(*saved)
        ctx.likes = likes(output)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[x for x in output if not is_differentiable(x)])

    @staticmethod
    def vmap(info: Any, in_dims: Any, rule: Rule, *xs: Tensor) -> Any:
        out = _Call.apply(_Batched(rule, tuple(in_dims[1:]), info.batch_size, info.randomness), *xs)
        return out, (0,) * len(out)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed]
        _refuse(ctx.rule, wanted)
        given = [c if like else None for c, like in zip(cotangents, ctx.likes, strict=True)]
        if all(c is None for c in given):
            return (None,) * len(ctx.needs_input_grad)
        return (None, *ctx.rule.pull(ctx.saved_tensors, given, wanted))

    @staticmethod
    def jvp(ctx: Any, _rule: None, *tangents: Tensor | None) -> Any:
        ctx.rule.check_push(functorch.maybe_current_level() or 0)
        _refuse(ctx.rule, [i for i, t in enumerate(tangents) if t is not None])
        unpack = torch._VF._unpack_dual  # this level's tangent off
        saved = [unpack(x, level=0)[0] if is_differentiable(x) else x for x in ctx.saved_tensors]
        with _set_fwd_grad_enabled(True):  # torch leaves it off here, which would cut forward over forward mode
            moved = materialize(ctx.rule.push(saved, tangents), ctx.likes)
        return tuple(t if like else None for t, like in zip(moved, ctx.likes, strict=True))


def _refuse(rule: Rule, differentiated: Sequence[int]) -> None:
    if any(i in rule.constants() for i in differentiated):
        raise ValueError(
            f"{rule.name}: expected no derivative with respect to a tensor that the function closes over, got one; "
            "its rule knows explicit arguments only: pass the tensor as one"
        )


@dataclass(frozen=True)
class _Batched:
    """A rule under ``vmap``."""

    rule: Rule
    dims: tuple[int | None, ...]  # of the inputs; the outputs have the batch axis in front
    size: int
    randomness: str

    @property
    def name(self) -> str:
        return self.rule.name

    def run(self, xs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        def flat(*xs: Tensor) -> tuple[Tensor, ...]:
            return self.rule.run(xs)

        return torch.func.vmap(flat, self.dims, randomness=self.randomness)(*xs)

    def kept(self) -> Kept:
        return self.rule.kept()

    def constants(self) -> range:
        return self.rule.constants()

    def pull(self, saved: Sequence[Tensor], cotangents: Vectors, wanted: Sequence[int]) -> Vectors:
        pulled = self._map(lambda xs, vs: self.rule.pull(xs, vs, wanted), saved, cotangents, (0,) * len(cotangents))
        return [
            None if g is None else g.sum(0) if dim is None else g.movedim(0, dim)
            for g, dim in zip(pulled, self.dims, strict=True)
        ]

    def push(self, saved: Sequence[Tensor], tangents: Vectors) -> Vectors:
        return self._map(self.rule.push, saved, tangents, self.dims)

    def check_push(self, level: int) -> None:
        self.rule.check_push(level)

    def _map(
        self, fun: Callable[..., Vectors], saved: Sequence[Tensor], vectors: Vectors, vector_dims: Sequence[int | None]
    ) -> list[Tensor | None]:
        at = [i for i, v in enumerate(vectors) if v is not None]
        kept, outputs = self.kept(), Outputs()
        dims = [*[self.dims[i] for i in kept.inputs], *[0 for _ in kept.outputs], *[vector_dims[i] for i in at]]

        def flat(*both: Tensor) -> tuple[Tensor, ...]:
            full: list[Tensor | None] = [None] * len(vectors)
            for i, v in zip(at, both[len(saved) :], strict=True):
                full[i] = v
            return outputs.put(list(fun(both[: len(saved)], full)))

        given: Any = (*saved, *[vectors[i] for i in at])
        if all(dim is None for dim in dims):  # what is mapped matters to nothing here
            return outputs.get([x.expand(self.size, *x.shape) for x in flat(*given)])
        return outputs.get(torch.func.vmap(flat, tuple(dims), randomness=self.randomness)(*given))
