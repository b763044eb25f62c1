"""Element-wise regions as C loops: every operation against eager torch, bit for bit where IEEE says so."""

import math

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree

SPECIAL = [0.0, -0.0, 1.0, -1.5, 3.25, math.inf, -math.inf, math.nan, 1e-40, 1e30]


def compiled(fun, *args, **options):
    """The results, and the text of the program with its kernels."""
    jitted = fg.jit(fun, **options)
    executable = jitted.lower(*args).compile().lower(*args)._program.executable
    return jitted(*args), executable.code


def same(got, expected):
    """Bit for bit, NaN being equal to NaN."""
    for x, y in zip(tree.leaves(got), tree.leaves(expected), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert torch.equal(x.isnan(), y.isnan())
        assert torch.equal(x.nan_to_num(), y.nan_to_num()), (x, y)
        if x.is_floating_point():
            assert torch.equal(x.signbit()[~x.isnan()], y.signbit()[~y.isnan()])


def exact_operations(x, y, n, b):
    floats = [x + y, x - y, x * y, -x, x / y, x.reciprocal(), x.sqrt(), x.abs(), x.clone(), x.clamp(-1, 2),
              torch.minimum(x, y), torch.maximum(x, y), x + 0.1, 0.1 - x, x * 3, x / 3, x + n, n * x,
              torch.where(b, x, y), torch.where(x > y, x, 0.5), torch.where(b, math.inf, x),
              torch.where(b, -math.inf, math.nan * x), x * torch.full((), 0.1),
              x + torch.full((), 2.7, dtype=torch.int64), x * torch.full((), 5, dtype=torch.bool)]  # fmt: skip
    tests = [x < y, x <= y, x > y, x >= y, x == y, x != y, x < 1, n == 3, n > 2.5, b.eq(True)]
    whole = [n + n, n - 2, n * n, -n, n & 6, n | 8, n * True, b & (x < y), b | (x < y), b.logical_not(), ~b, b * 2,
             n.bool(), b.to(torch.int64), n.to(torch.int32) + 1,
             x.nan_to_num(0, 1, 1).clamp(-9, 9).to(torch.int64)]  # fmt: skip
    casts = [n.to(x.dtype), b.to(x.dtype), x.float(), x.double(), x.bool()]
    return floats + tests + whole + casts


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ieee_operations_are_exact(dtype):
    x = torch.tensor(SPECIAL, dtype=dtype)
    x, y = x.repeat(10), x.repeat_interleave(10)
    n, b = torch.arange(-50, 50), torch.arange(100) % 3 == 0
    got, _ = compiled(exact_operations, x, y, n, b)
    same(got, exact_operations(x, y, n, b))


def test_scalars_have_functions_of_their_own():
    def f(t, x):
        scale = t.exp() + t.log() + t.cos() * t.sin() + t.tanh() + t**1.5 + 0.9**t
        return x * scale, 1 - 0.9**t, t + 1

    t, x = torch.tensor(2.5, dtype=torch.float64), torch.linspace(0, 1, 7, dtype=torch.float64)
    got, code = compiled(f, t, x)
    assert tree.allclose(got, f(t, x), rtol=1e-14)  # transcendental functions differ by an ulp or two
    assert not code.regions


# Sizes and threads.

SIZES = [(0,), (1,), (4095,), (4096,), (4097,), (3, 5), (20_000,), (), (0, 3), (7, 1, 600)]
RATE = torch.tensor(0.1, dtype=torch.float64)


def adam(state, rate):
    def one(p, g, mu, nu):
        mu, nu = 0.9 * mu + 0.1 * g, 0.999 * nu + 0.001 * g * g
        return p - rate * mu / (nu.sqrt() + 1e-8), g, mu, nu

    return [one(*leaves) for leaves in state]


def state_of(dtype):
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
    return [tuple(draw(shape) for _ in range(4)) for shape in SIZES]


@pytest.mark.parametrize("threads", [1, 2])
def test_leaves_of_any_size_share_a_loop(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got, code = compiled(adam, state_of(torch.float64), RATE, donate_argnums=0)
    finally:
        torch.set_num_threads(before)
    assert tree.allclose(got, adam(state_of(torch.float64), RATE), rtol=1e-13)  # a few roundings
    assert not code.regions
    assert code.python.count("batch0(") == 1


@pytest.mark.filterwarnings("ignore:jit. no output has the shape")  # the gradients are donated too, and not returned
def test_leaves_of_two_dtypes_are_two_loops():
    state = [row for row in (*state_of(torch.float32), *state_of(torch.float64)) if row[0].ndim]
    got, code = compiled(adam, [tuple(x.clone() for x in row) for row in state], 0.1, donate_argnums=0)
    for new, old in zip(got, adam(state, 0.1), strict=True):
        single = new[0].dtype == torch.float32
        assert tree.allclose(new, old, rtol=1e-5 if single else 1e-13, atol=1e-6 if single else 0.0)
    assert not code.regions


def test_sums_are_computed_in_double_precision():
    x = torch.rand(300_000, generator=torch.Generator().manual_seed(0)) + 1e3
    (got, empty), _ = compiled(lambda x, y: ((2 * x).sum(), (2 * y).sum()), x, torch.zeros(0))
    assert abs(got.double() - (2 * x).double().sum()) <= torch.finfo(torch.float32).eps * got  # rounded once
    assert empty == 0


def test_layouts_that_differ_are_brought_together():
    def f(a, b, c):
        return a * b + c, (a * b).sum(), a + c

    a = torch.arange(24.0).reshape(2, 3, 2, 2)
    args = a, a.contiguous(memory_format=torch.channels_last), a.mT.contiguous().mT
    got, _ = compiled(f, *args)
    same(got, f(*args))
    assert [x.stride() for x in got] == [x.stride() for x in f(*args)]


def test_low_precision_is_left_to_inductor():
    def f(x, y):
        return x * 2 + y

    for dtype in (torch.bfloat16, torch.float16):
        x, y = torch.linspace(-1, 1, 50).to(dtype), torch.linspace(0, 3, 50).to(dtype)
        got, code = compiled(f, x, y)
        assert "batch" not in code.python
        # generated code rounds once, eager torch twice
        assert torch.allclose(got.float(), f(x, y).float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
