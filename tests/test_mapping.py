"""map: the values of a loop and of vmap."""

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms import jit

F64 = torch.float64


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


W, X = draw(0, 3), draw(1, 7, 3)
SIZES = [None, 1, 2, 3, 7, 10]


def f(x):
    return {"y": torch.tanh(x["x"] * W), "one": 1}


def assert_close(actual, expected):
    # a few products and sums of numbers of order one
    assert tree.allclose(actual, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("batch_size", SIZES)
def test_map_is_the_loop(batch_size, jitted):
    run = lambda x: fg.map(f, {"x": x}, batch_size=batch_size)
    expected = {"y": torch.stack([torch.tanh(x * W) for x in X]), "one": torch.ones(7, dtype=torch.int64)}
    assert_close((jit(run, backend="aten") if jitted else run)(X), expected)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_map_computes_so_many_examples_at_once(batch_size):
    text = jit(lambda x: fg.map(lambda x: torch.sin(x), x, batch_size=batch_size)).lower(X).text()
    lines = [line.strip() for line in text.splitlines() if "aten.sin" in line]
    shapes = {line.split(":")[1].split("=")[0].strip() for line in lines}
    assert shapes == ({"f64[3]"} if batch_size is None else {"f64[3, 3]", "f64[1, 3]"})


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("batch_size", [None, 3])
def test_map_composes(batch_size, jitted):
    loss = lambda over: lambda w, x: over(lambda x: (torch.tanh(x * w) ** 2).sum(), x).sum()
    mapped = loss(lambda g, x: fg.map(g, x, batch_size=batch_size))
    looped = loss(lambda g, x: torch.stack([g(row) for row in x]))
    for run in (
        lambda f: fg.grad(f, (0, 1))(W, X),
        lambda f: fg.hvp(lambda w: f(w, X), (W,), (X[0],)),
        lambda f: fg.jvp(f, (W, X), (X[0], X)),
    ):
        found = lambda run=run: run(mapped)
        assert_close((jit(found, backend="aten") if jitted else found)(), run(looped))
    per_w = lambda: fg.vmap(fg.grad(mapped), (0, None))(X[:2], X)
    expected = torch.stack([fg.grad(looped)(w, X) for w in X[:2]])
    assert_close((jit(per_w, backend="aten") if jitted else per_w)(), expected)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_map_of_nothing_is_empty(batch_size):
    assert fg.map(f, {"x": X[:0]}, batch_size=batch_size)["y"].shape == (0, 3)


def test_map_refuses_wrong_sizes_and_results():
    with pytest.raises(ValueError, match="got 7 in xs at 'a' and 2 at 'b'"):
        fg.map(f, {"a": X, "b": X[:2]}, batch_size=2)
    for size in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="batch_size to be an int >= 1"):
            fg.map(f, X, batch_size=size)
    with pytest.raises(TypeError, match="tensors in the result of f, got str"):
        fg.map(lambda x: "x", X)
