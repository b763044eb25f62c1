"""jit against eager torch on random programs: all kinds of operation, view, write in place, dtype and donation.

A program is a list of steps that are run eagerly once while they are drawn, so that each fits the shapes before it.
Tolerances are a thousand roundings of the dtype, relative to the largest element: the programs keep values below 100
and do not branch on what was rounded to less than float64.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import tree

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.06}
FLOATS = tuple(TOLERANCE)
SHAPES = [(4, 6), (6, 4), (6,), (4, 1), (), (3, 4, 6), (40, 33), (33,), (0, 6), (1, 1)]

Step = tuple[Callable[..., Any], list[int]]


class Draw:
    """Chooses values of the program so far, by index, and parameters."""

    def __init__(self, seed: int):
        self.chance = random.Random(seed)
        self.values: list[Tensor] = []
        self.tolerance: list[float] = []  # of the coarsest dtype that a value was computed in
        self.inputs: list[Tensor] = []

    def add(self, results: Sequence[Tensor], sources: Sequence[int], written: bool) -> None:
        """Appends values computed from others; if one was written to, all that share memory with it have changed."""
        coarsest = max((self.tolerance[i] for i in sources), default=0.0)
        if written:
            memory = self.values[sources[0]].untyped_storage().data_ptr()
            for i, x in enumerate(self.values):
                if x.untyped_storage().data_ptr() == memory:
                    self.tolerance[i] = max(self.tolerance[i], coarsest)
        self.values += results
        self.tolerance += [max(coarsest, TOLERANCE.get(x.dtype, 0.0)) for x in results]

    def __call__(self, *wanted: Callable[[Tensor], bool]) -> list[int]:
        """An index for each condition, later values being likelier; ``IndexError`` if there is none."""
        found = []
        for accepts in wanted:
            fitting = [i for i, x in enumerate(self.values) if accepts(x)]
            found.append(fitting[int(len(fitting) * self.chance.random() ** 0.6)])
        return found

    def alike(self, accepts: Callable[[Tensor], bool], count: int = 2) -> list[int]:
        """Indices of values that have one shape, after the first; the first may be anything that is accepted."""
        (first,) = self(accepts)
        shape = self.values[first].shape
        return [first, *self(*[lambda x: x.shape == shape and accepts(x)] * (count - 1))]

    def exact(self, accepts: Callable[[Tensor], bool]) -> Callable[[Tensor], bool]:
        """Accepts only values whose comparisons come out the same in every order of operations."""
        rough = {id(x) for x, tolerance in zip(self.values, self.tolerance, strict=True) if tolerance > 1e-9}
        return lambda x: id(x) not in rough and accepts(x)

    def of(self, *choices: Any) -> Any:
        return self.chance.choice(choices)

    def axis(self, i: int) -> int:
        return self.chance.randrange(self.values[i].ndim)


def is_float(x: Tensor) -> bool:
    return x.is_floating_point()


def has_axes(x: Tensor) -> bool:
    return x.ndim > 0 and x.numel() > 0


def unary(draw: Draw) -> Step:
    f = draw.of(
        torch.sin, torch.tanh, torch.neg, torch.abs, torch.sigmoid, torch.relu, torch.square, torch.cos,
        lambda x: (x.abs() + 0.5).sqrt(), lambda x: (x.abs() + 0.5).rsqrt(), lambda x: 1 / (x.abs() + 1),
        lambda x: (-x.abs()).exp(), lambda x: (x.abs() + 1).log(), lambda x: (x.abs() + 1) ** 1.5,
        lambda x: 0.5 * x + 0.25, lambda x: 1.5 - x, lambda x: x.clamp(-0.5, 0.7), torch.nn.functional.silu,
        torch.nn.functional.gelu, lambda x: x.mul(2).sub(1, alpha=0.5), lambda x: x.pow(2), lambda x: x.pow(1),
    )  # fmt: skip
    return f, draw(is_float)


def binary(draw: Draw) -> Step:
    f = draw.of(
        torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, lambda a, b: a / (b.abs() + 1),
        lambda a, b: torch.lerp(a, b.to(a.dtype), 0.3), lambda a, b: a.add(b, alpha=0.1), torch.hypot,
        lambda a, b: torch.addcmul(a, b.to(a.dtype), a, value=0.2),
    )  # fmt: skip
    return f, draw.alike(is_float)


def broadcast(draw: Draw) -> Step:
    (a,) = draw(is_float)
    shape = draw.values[a].shape
    small = [s for s in (shape[1:], (*shape[:-1], 1), (1,) * len(shape), ()) if s is not None]
    (b,) = draw(lambda x: is_float(x) and tuple(x.shape) in [tuple(s) for s in small])
    return draw.of(torch.add, torch.mul, torch.sub, lambda a, b: a / (b.abs() + 1)), [a, b]


def integers(draw: Draw) -> Step:
    f = draw.of(
        lambda x: x + 1, lambda x: x * 2 % 7, lambda x: x // 2, lambda x: -x, lambda x: x & 3, lambda x: x.float() / 4,
        lambda x: x * 0.125, lambda x: x == 2, lambda x: x.bool(), lambda x: x.clamp(0, 3), lambda x: x.double(),
    )  # fmt: skip
    return f, draw(lambda x: x.dtype == torch.int64)


def logic(draw: Draw) -> Step:
    if draw.of(True, False):
        return draw.of(torch.lt, torch.eq, torch.ge, torch.ne), draw.alike(draw.exact(lambda x: True))
    f = draw.of(torch.logical_and, torch.logical_xor, lambda a, b: a | b, lambda a, b: ~a & b, lambda a, b: a.sum() + b)
    return f, draw.alike(lambda x: x.dtype == torch.bool)


def choice(draw: Draw) -> Step:
    condition, a = draw.alike(lambda x: x.dtype == torch.bool or is_float(x))
    (condition,) = draw(lambda x: x.dtype == torch.bool)
    shape = draw.values[condition].shape
    a, b = draw(*[lambda x: x.shape == shape and is_float(x)] * 2)
    return draw.of(torch.where, lambda c, a, b: a.masked_fill(c, 0.5) + b), [condition, a, b]


def cast(draw: Draw) -> Step:
    kind = draw.of(torch.float32, torch.float64, torch.bfloat16, torch.float64)
    return lambda x: x.to(kind), draw(lambda x: True)


def truncate(draw: Draw) -> Step:
    return draw.of(lambda x: (4 * x).to(torch.int64), lambda x: x > 0.1, lambda x: x.floor()), draw(
        draw.exact(is_float)
    )


def reduce(draw: Draw) -> Step:
    (i,) = draw(lambda x: is_float(x) and has_axes(x))
    axis, keep = draw.axis(i), draw.of(True, False)
    f = draw.of(
        lambda x: x.sum(axis, keepdim=keep), lambda x: x.mean(axis, keepdim=keep), lambda x: x.amax(axis, keepdim=keep),
        lambda x: x.var(axis, keepdim=keep, correction=0), lambda x: x.logsumexp(axis, keepdim=keep), lambda x: x.sum(),
        lambda x: x.mean(), lambda x: torch.linalg.vector_norm(x), lambda x: (x * x).sum().sqrt(), lambda x: x.amin(),
        lambda x: x.prod(axis).clamp(-9, 9), lambda x: x.square().mean(axis, keepdim=True),
    )  # fmt: skip
    return f, [i]


def along(draw: Draw) -> Step:
    (i,) = draw(lambda x: is_float(x) and has_axes(x))
    axis = draw.axis(i)
    f = draw.of(
        lambda x: x.softmax(axis), lambda x: x.log_softmax(axis), lambda x: x.cumsum(axis) / x.shape[axis],
        lambda x: x - x.mean(axis, keepdim=True), lambda x: torch.nn.functional.layer_norm(x, x.shape[-1:]),
        lambda x: torch.nn.functional.normalize(x, dim=axis, eps=0.1), lambda x: x.diff(dim=axis),
    )  # fmt: skip
    return f, [i]


def order(draw: Draw) -> Step:
    (i,) = draw(draw.exact(lambda x: x.dtype != torch.bool and has_axes(x)))
    axis = draw.axis(i)
    f = draw.of(
        lambda x: x.sort(axis).values, lambda x: list(x.sort(axis, stable=True)), lambda x: x.argmax(axis),
        lambda x: x.argsort(axis, stable=True), lambda x: list(x.topk(1, axis)), lambda x: x.amax(axis),
        lambda x: list(x.max(axis)), lambda x: x.flip(axis),
    )  # fmt: skip
    return f, [i]


def view(draw: Draw) -> Step:
    (i,) = draw(lambda x: x.ndim > 0)
    x = draw.values[i]
    a, b = draw.axis(i), draw.axis(i)
    n = x.shape[a]
    start, step = draw.of(0, 1, n // 2), draw.of(1, 1, 2)
    f = draw.of(
        lambda x: x.transpose(a, b), lambda x: x.flip(a), lambda x: x.roll(1, a), lambda x: x.reshape(-1),
        lambda x: x.narrow(a, min(start, n), n - min(start, n)), lambda x: x.unsqueeze(a), lambda x: x.squeeze(),
        lambda x: x.transpose(0, a)[start::step], lambda x: x[None].expand(2, *x.shape), lambda x: list(x.chunk(2, a)),
        lambda x: list(x.split([n // 2, n - n // 2], a)), lambda x: x.movedim(0, -1), lambda x: x.contiguous(),
        lambda x: x.transpose(a, b).reshape(x.shape), lambda x: x.reshape(*x.shape[::-1]), torch.detach,
        lambda x: x.select(a, 0) if n else x, lambda x: x.diagonal() if x.ndim > 1 else x,
        lambda x: x.unfold(a, 2, 1).clone() if n > 1 and x.numel() < 200 else x,
        lambda x: x[..., None].expand(*x.shape, 3)[..., 1],
    )  # fmt: skip
    return f, [i]


def product(draw: Draw) -> Step:
    (i,) = draw(lambda x: is_float(x) and x.ndim == 2)
    columns = draw.values[i].shape[1]
    dtype = draw.values[i].dtype
    f = draw.of(lambda a, b: a @ b / (1 + columns), lambda a, b: torch.addmm(b[:1], a, b) / (1 + columns))
    (j,) = draw(lambda x: x.dtype == dtype and x.ndim == 2 and columns in x.shape)
    first = draw.values[j].shape[0] == columns
    return (f if first else lambda a, b: f(a, b.t())), [i, j]


def other_product(draw: Draw) -> Step:
    (i,) = draw(lambda x: x.dtype in (torch.float64, torch.float32) and x.ndim >= 2 and x.numel() < 2000)
    f = draw.of(
        lambda x: x @ x.mT / (1 + x.shape[-1]), lambda x: torch.einsum("...ij,...kj->...ik", x, x) / (1 + x.shape[-1]),
        lambda x: x @ x.reshape(-1)[: x.shape[-1]] / (1 + x.shape[-1]),
        lambda x: torch.outer(x[..., 0].reshape(-1), x[0].reshape(-1)),
    )  # fmt: skip
    return f, [i]


def join(draw: Draw) -> Step:
    count = draw.of(2, 3, 10)
    at = draw.alike(lambda x: x.ndim > 0, count)
    axis = draw.axis(at[0])
    return draw.of(lambda *xs: torch.cat(xs, axis), lambda *xs: torch.stack(xs, axis)), at


def pick(draw: Draw) -> Step:
    (i,) = draw(lambda x: has_axes(x))
    n, axis = draw.values[i].shape[0], draw.axis(i)
    (j,) = draw(lambda x: x.dtype == torch.int64 and x.numel() < 300)
    f = draw.of(
        lambda x, i: x[i.reshape(-1) % n], lambda x, i: x.index_select(0, i.reshape(-1) % n),
        lambda x, i: x.gather(axis, torch.zeros_like(x, dtype=torch.int64) + i.sum() % x.shape[axis]),
        lambda x, i: torch.nn.functional.embedding(i % n, x.reshape(n, -1)),
        lambda x, i: torch.zeros_like(x).index_add(0, i.reshape(-1) % n, x[i.reshape(-1) % n]) if is_float(x) else x,
        lambda x, i: x.scatter(0, torch.zeros_like(x[:1], dtype=torch.int64), x[-1:]),
        lambda x, i: x[..., i.reshape(-1)[:3] % x.shape[-1]],
    )  # fmt: skip
    return f, [i, j]


def write(draw: Draw) -> Step:
    """In place: to a copy, or to a value of the program that others may have views of."""
    taken = {x.untyped_storage().data_ptr() for x in draw.inputs}
    own = lambda x: is_float(x) and has_axes(x) and x.untyped_storage().data_ptr() not in taken and 0 not in x.stride()
    (i,) = draw(own)
    shape, axis = draw.values[i].shape, draw.axis(i)
    (j,) = draw(lambda x: is_float(x) and x.shape == shape)
    if draw.values[i].untyped_storage().data_ptr() == draw.values[j].untyped_storage().data_ptr():
        return lambda x: x.tanh_(), [i]
    f = draw.of(
        lambda x, y: x.mul_(0.5).add_(y), lambda x, y: x.copy_(y), lambda x, y: x.transpose(0, axis).neg_(),
        lambda x, y: x.select(axis, 0).add_(1), lambda x, y: x.fill_(0.5) + y, lambda x, y: x.clamp_(-0.5, 0.5),
        lambda x, y: x.narrow(axis, 0, 1).copy_(y.narrow(axis, -1 % shape[axis], 1)),
        lambda x, y: x.diagonal().zero_() if x.ndim > 1 else x.sin_(),
        lambda x, y: x.clone().view(-1).add_(y.reshape(-1)), lambda x, y: x.masked_fill_(y.double() > 100, 0.0),
    )  # fmt: skip
    return f, [i, j]


def special(draw: Draw) -> Step:
    (i,) = draw(lambda x: x.dtype in (torch.float32, torch.float64) and has_axes(x))
    f = draw.of(
        lambda x: fg.optimization_barrier(x),
        lambda x: list(fg.optimization_barrier((x * 2, x))),
        lambda x: fg.grad(lambda x: torch.tanh(x).square().sum())(x),
        lambda x: fg.grad(fg.remat(lambda x: (x.sin() * x.cos().tanh()).sum()))(x),
        lambda x: list(fg.scan(lambda c, y: (0.5 * c + y, c.sum()), torch.zeros_like(x[0]), x)),
        lambda x: fg.scan(lambda c, y: (c, y * c.sum()), x[0], x)[1] / x[0].numel(),
        lambda x: fg.vmap(lambda y: y.softmax(-1) if y.ndim else y)(x),
        lambda x: fg.jvp(torch.sin, (x,), (x,))[1],
        lambda x: x * fg.random.uniform(fg.random.key(3), tuple(x.shape), torch.float32).to(x.dtype),
    )  # fmt: skip
    return f, [i]


KINDS = [unary, binary, broadcast, integers, logic, choice, cast, truncate, reduce, along, order, view, product,
         other_product, join, pick, write, special]  # fmt: skip
WEIGHTS = [6, 6, 4, 2, 2, 2, 2, 1, 4, 2, 1, 7, 2, 1, 2, 2, 4, 2]


@dataclass
class Program:
    """``program(state, batch) -> (state, others)``: steps on a growing list of values, and which of them come out."""

    steps: list[Step]
    state: list[int]
    others: list[int]
    closed: list[Tensor]
    tolerances: list[float]  # of the results, state first

    def values(self, state: Sequence[Tensor], batch: Sequence[Tensor]) -> list[Tensor]:
        values = [*state, *batch, *self.closed]
        for f, at in self.steps:
            result = f(*[values[i] for i in at])
            values += result if isinstance(result, list) else [result]
        return values

    def __call__(self, state: list[Tensor], batch: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        values = self.values(state, batch)
        return [values[i] for i in self.state], [values[i] for i in self.others]


def sample(shape: Sequence[int], dtype: torch.dtype, chance: random.Random) -> Tensor:
    generator = torch.Generator().manual_seed(chance.randrange(1 << 30))
    x = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    x = (4 * x).to(dtype) if dtype in (torch.int64, torch.bool) else x.to(dtype)
    return x.mT.contiguous().mT if x.ndim > 1 and chance.random() < 0.2 else x


def drawn(seed: int, length: int) -> tuple[Program, list[Tensor], list[Tensor]]:
    """A program, and a state and a batch for it."""
    draw = Draw(seed)
    kinds = [torch.float32, torch.float64] * 2 + [torch.bfloat16, torch.int64, torch.bool]
    state, batch, closed = (
        [sample(draw.of(*SHAPES), draw.of(*kinds), draw.chance) for _ in range(n)] for n in (5, 5, 1)
    )
    batch += [sample((4, 6), torch.float64, draw.chance), sample((5,), torch.int64, draw.chance)]
    draw.inputs = [*state, *batch, *closed]
    draw.add(draw.inputs, [], written=False)
    steps: list[Step] = []
    while len(steps) < length:
        try:
            kind = draw.chance.choices(KINDS, WEIGHTS)[0]
            step = kind(draw)
            saved = [x.untyped_storage().clone() for x in draw.values]
            result = step[0](*[draw.values[i] for i in step[1]])
        except (IndexError, RuntimeError, TypeError, ValueError):
            continue  # nothing to draw from, or torch has no such operation for these dtypes and shapes
        results = result if isinstance(result, list) else [result]
        if not all(is_tame(x) for x in (*results, *draw.values)):
            for x, old in zip(draw.values, saved, strict=True):
                x.untyped_storage().copy_(old)
            continue
        steps.append(step)
        draw.add(results, step[1], written=kind is write)
    state_at = []
    for i, x in enumerate(state):
        alike = [j for j, y in enumerate(draw.values) if y.shape == x.shape and y.dtype == x.dtype]
        state_at.append(draw.of(*alike[-4:], i))
    others = [draw.chance.randrange(len(draw.values)) for _ in range(12)]
    tolerances = [draw.tolerance[i] for i in (*state_at, *others)]
    return Program(steps, state_at, others, closed, tolerances), state, batch


def is_tame(x: Tensor) -> bool:
    return (
        x.numel() < 20_000
        and bool(x.isfinite().all())
        and (x.numel() == 0 or bool(x.abs().max() < 100 if x.dtype != torch.bool else True))
    )


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def compare(got: Any, expected: Any, tolerances: Sequence[float], what: str) -> None:
    for i, (x, y) in enumerate(zip(tree.leaves(got), tree.leaves(expected), strict=True)):
        assert (x.shape, x.dtype) == (y.shape, y.dtype), (what, i)
        scale = 1 + (y.double().abs().max().item() if y.numel() else 0)
        error = (x.double() - y.double()).abs().max().item() if y.numel() else 0.0
        assert error <= tolerances[i] * scale, (what, i, error, tolerances[i])


def check(seed: int, length: int, backend: str = "inductor") -> None:
    program, state, batch = drawn(seed, length)
    expected = program(copies(state), copies(batch))
    pure = fg.jit(program, backend=backend)
    given = [copies(state), copies(batch)]
    got = pure(*given)
    compare(got, expected, program.tolerances, f"seed {seed}")
    compare(given, [state, batch], [0.0] * 99, f"seed {seed}: inputs")
    storages = [x.untyped_storage().data_ptr() for x in tree.leaves((got, given, program.closed)) if x.numel()]
    assert len(set(storages)) == len(storages), (seed, "shared memory")
    donated = fg.jit(program, donate_argnums=0, backend=backend)
    for _ in range(2):
        given = copies(state)
        new, others = donated(given, copies(batch))
        compare((new, others), expected, program.tolerances, f"seed {seed}, donated")
        assert all(x.shape == (0,) for x in given), seed
        storages = [x.untyped_storage().data_ptr() for x in tree.leaves((new, others)) if x.numel()]
        assert len(set(storages)) == len(storages), (seed, "shared memory, donated")
    assert pure.traces == donated.traces == 1


@pytest.mark.parametrize("seed", range(24))
def test_random_programs_equal_eager_torch_as_they_are(seed):
    check(seed, length=40, backend="aten")


@pytest.mark.parametrize("seed", range(3))
def test_random_programs_equal_eager_torch_compiled(seed):
    check(seed, length=40)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 130))
def test_many_random_programs_equal_eager_torch_compiled(seed):
    check(seed, length=40)
