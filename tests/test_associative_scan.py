"""associative_scan: the running results that a loop gives, in a logarithmic number of calls."""

import math

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms import jit

F64 = torch.float64


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def affine(first, second):
    """x -> a x + b, one after the other: associative, not commutative."""
    return {"a": second["a"] * first["a"], "b": second["a"] * first["b"] + second["b"]}


def running(fn, elems, reverse=False):
    """The oracle: a loop along axis 0."""
    rows = [tree.map(lambda x, i=i: x[i : i + 1], elems) for i in range(len(tree.leaves(elems)[0]))]
    rows = rows[::-1] if reverse else rows
    out = rows[:1]
    for row in rows[1:]:
        out.append(fn(out[-1], row))
    return tree.map(lambda *xs: torch.cat(xs[::-1] if reverse else xs), *out)


def assert_close(actual, expected):
    # products and sums of a dozen numbers of order one, in another order
    assert tree.allclose(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 13])
def test_associative_scan_is_the_loop(n, reverse):
    elems = {"a": draw(0, n, 2), "b": draw(1, n, 2)}
    assert_close(fg.associative_scan(affine, elems, reverse=reverse), running(affine, elems, reverse))


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_associative_scan_runs_along_any_axis(axis):
    x = draw(0, 3, 4, 5)
    assert_close(fg.associative_scan(torch.add, x, axis=axis), x.cumsum(axis))
    assert_close(fg.associative_scan(torch.add, x, reverse=True, axis=axis), x.flip(axis).cumsum(axis).flip(axis))


def test_associative_scan_of_nothing_is_nothing():
    assert fg.associative_scan(torch.add, torch.ones(0, 2)).shape == (0, 2)


def test_associative_scan_calls_fn_twice_for_each_halving():
    calls = []

    def add(x, y):
        calls.append(len(x))
        return x + y

    fg.associative_scan(add, torch.ones(1000))
    assert len(calls) <= 2 * math.ceil(math.log2(1000))
    assert sum(calls) < 2 * 1000


ELEMS = {"a": draw(0, 5, 2), "b": draw(1, 5, 2)}
T = {"a": draw(2, 5, 2), "b": draw(3, 5, 2)}
STACKS = {
    "grad": lambda f: fg.grad(f)(ELEMS),
    "jvp": lambda f: fg.jvp(f, (ELEMS,), (T,)),
    "hvp": lambda f: fg.hvp(f, (ELEMS,), (T,)),
    "vmap of grad": lambda f: fg.vmap(fg.grad(f))(tree.stack([ELEMS, T])),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_associative_scan_composes(stack, jitted):
    squares = lambda scan: lambda elems: tree.norm(scan(affine, elems))
    run = lambda: STACKS[stack](squares(fg.associative_scan))
    assert_close((jit(run, backend="aten") if jitted else run)(), STACKS[stack](squares(running)))


def test_associative_scan_traces_under_torch_compile():
    torch._dynamo.reset()
    f = lambda elems: fg.associative_scan(affine, elems)
    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(ELEMS), running(affine, ELEMS))


def test_associative_scan_refuses_wrong_elems_and_fns():
    for elems, axis, message in [
        ({"a": torch.ones(3), "b": torch.ones(2)}, 0, "got 3 at 'a' and 2 at 'b'"),
        ({"a": torch.ones(3)}, 1, "axis in range for 1 axes at 'a', got 1"),
        ({}, 0, "expected tensors in elems, got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            fg.associative_scan(tree.add, elems, axis=axis)
    with pytest.raises(TypeError, match="tensors in elems, got float at '1'"):
        fg.associative_scan(tree.add, (torch.ones(3), 1.0))
    with pytest.raises(ValueError, match=r"fn to keep the elements at 'a' \(2,\) torch.float32, got \(\)"):
        fg.associative_scan(lambda x, y: {"a": (x["a"] + y["a"]).sum()}, {"a": torch.ones(4)})
