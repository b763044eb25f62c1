"""Tangents that are known to be zero, in traced graphs."""

import functools

import pytest
import torch
import torch.nn.functional as F

import functorch_gen as fg
from functorch_gen import tree

F64 = torch.float64
aten = functools.partial(fg.jit, backend="aten")


def draw(seed, *shape):
    return fg.random.normal(fg.random.key(seed), shape, F64)


def linear(params, x):
    return torch.tanh(F.linear(x, params["w"], params["b"])) @ params["v"]


def conv(params, x):
    return F.group_norm(F.conv2d(x, params["w"], params["b"], padding=1), 1, params["scale"], params["shift"])


PROGRAMS = {
    "linear": (linear, {"w": draw(0, 4, 3), "b": draw(1, 4), "v": draw(2, 4, 2)}, draw(3, 5, 3)),
    "conv": (
        conv,
        {"w": draw(0, 2, 1, 3, 3), "b": draw(1, 2), "scale": draw(2, 2), "shift": draw(3, 2)},
        draw(4, 3, 1, 4, 4),
    ),
}
programs = pytest.mark.parametrize("name", list(PROGRAMS))


@programs
def test_jit_of_a_derivative_along_the_input_equals_the_difference(name):
    f, params, x = PROGRAMS[name]
    v, h = draw(9, *x.shape), 1e-5
    value, moved = aten(lambda p, x, v: fg.jvp(lambda x: f(p, x), (x,), (v,)))(params, x, v)
    torch.testing.assert_close(value, f(params, x))
    slope = (f(params, x + h * v) - f(params, x - h * v)) / (2 * h)
    # Truncation h^2 f''' / 6 and rounding 1e-16 |f| / h: both about 1e-10 for values near one.
    torch.testing.assert_close(moved, slope, rtol=1e-7, atol=1e-8)


@programs
def test_jit_of_a_gradient_of_a_derivative_equals_eager(name):
    f, params, x = PROGRAMS[name]

    def loss(params, x, v):
        value, moved = fg.jvp(lambda x: f(params, x), (x,), (v,))
        return (value * moved).square().sum()

    v = draw(9, *x.shape)
    eager = fg.grad(loss)(params, x, v)
    assert tree.allclose(aten(fg.grad(loss))(params, x, v), eager, rtol=1e-12, atol=1e-12)
    batched = fg.vmap(fg.grad(loss), in_dims=(None, None, 0))
    vs = torch.stack([v, 2 * v])
    expected = tree.stack([fg.grad(loss)(params, x, v) for v in vs])
    assert tree.allclose(aten(batched)(params, x, vs), expected, rtol=1e-12, atol=1e-12)


def test_a_weight_that_does_not_move_is_multiplied_once_for_the_value_and_once_for_the_tangent():
    _, params, x = PROGRAMS["linear"]
    text = fg.jit(lambda p, x, v: fg.jvp(lambda x: linear(p, x), (x,), (v,))).lower(params, x, x).text()
    assert text.count("aten.addmm") + text.count("aten.mm") == 4
    assert "efficientzero" not in text
    _, params, x = PROGRAMS["conv"]
    text = fg.jit(lambda p, x, v: fg.jvp(lambda x: conv(p, x), (x,), (v,))).lower(params, x, x).text()
    assert text.count("aten.convolution") == 2


def test_a_zero_that_is_returned_or_stacked_is_there():
    def f(x, y):
        value, moved = fg.jvp(
            lambda x: {"x": x * y, "y": y * 2, "both": torch.cat([x, y])}, (x,), (torch.ones_like(x),)
        )
        return value, moved

    x, y = draw(0, 3), draw(1, 3)
    _, moved = aten(f)(x, y)
    expected = {"x": y, "y": torch.zeros(3, dtype=F64), "both": torch.cat([torch.ones(3), torch.zeros(3)]).to(F64)}
    torch.testing.assert_close(moved, expected)


@pytest.mark.parametrize("operation", ["add", "sub", "sub from"])
def test_sums_with_zeros_keep_shape_sign_and_layout(operation):
    forms = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "sub from": lambda a, b: b - a}

    def f(x, y):
        return fg.jvp(lambda x: forms[operation]((x * x).mT, torch.sin(y) * y), (x,), (torch.ones_like(x),))[1]

    x, y = draw(0, 2, 3), draw(1, 4, 3, 2)
    torch.testing.assert_close(aten(f)(x, y), f(x, y))
    torch.testing.assert_close(fg.jit(f)(x, y), f(x, y))


def test_what_is_written_to_is_no_known_zero():
    def f(x, y):
        def g(x):
            out = y.clone()
            out[0] = x.sum()  # the tangent of ``out`` begins as a zero
            return out * 3

        return fg.jvp(g, (x,), (torch.ones_like(x),))[1]

    x, y = draw(0, 3), draw(1, 2)
    torch.testing.assert_close(aten(f)(x, y), torch.tensor([9.0, 0.0], dtype=F64))


def test_a_tangent_begins_where_its_primal_does_in_every_trace():
    """The second trace in a process: torch keeps what it found out of the first."""

    def loss(z, x):
        t = z[4:5].reshape(())  # a view that begins within the memory
        value, moved = fg.jvp(lambda x, t: torch.tanh(x + t.expand(3, 1)), ((1 - t) * x, t), (x, torch.ones_like(t)))
        return (value + t * moved).square().mean()

    z, x = draw(0, 5), draw(1, 3, 2)
    aten(lambda z, x: fg.jvp(lambda z: loss(z, x), (z,), (z,)))(z, x)
    found = aten(lambda z, x: fg.vjp(lambda z: loss(z, x), z)[1](torch.ones((), dtype=F64)))(z, x)
    torch.testing.assert_close(found[0], fg.grad(loss)(z, x))
