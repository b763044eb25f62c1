"""while_loop and fori_loop: Python's loops, forward mode and vmap of them, and a plain error in reverse mode."""

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms import jit

F64 = torch.float64


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def wrapped(backend):
    return (lambda f: f) if backend is None else lambda f: jit(f, backend=backend)


BOTH = pytest.mark.parametrize("wrap", [wrapped(None), wrapped("aten")], ids=["eager", "aten"])
W, TW, X, V = 0.4 * draw(0, 3, 3), draw(8, 3, 3), draw(2, 3), draw(3, 3)
XS, WS = 2 * draw(4, 4, 3), 0.4 * draw(7, 4, 3, 3)


def python_loop(cond_fun, body_fun, init):
    """The oracle: Python's own loop."""
    carry = tree.map(torch.as_tensor, init)
    while cond_fun(carry):
        carry = tree.map(torch.as_tensor, body_fun(carry))
    return carry


def grows(loop):
    """Runs 0 to 7 steps, as the values are; carries a counter; both functions close over tensors."""

    def f(w, x):
        limit = x.abs().sum().detach() + 3

        def body(c):
            return {"x": torch.tanh(c["x"] @ w) + 1.1 * c["x"], "n": c["n"] + 1}

        out = loop(lambda c: (c["x"].abs().sum() < limit) & (c["n"] < 7), body, {"x": x, "n": 0})
        return out["x"] * out["n"]

    return f


def one_by_one(fun):
    """The oracle of vmap."""
    return lambda xs: tree.stack([fun(x) for x in xs])


STACKS = {
    "value": lambda f, over: f(W, X),
    "jvp": lambda f, over: fg.jvp(f, (W, X), (TW, V)),
    "jvp of w": lambda f, over: fg.jvp(lambda w: f(w, X), (W,), (TW,)),
    "jvp of jvp": lambda f, over: fg.jvp(lambda x: fg.jvp(lambda x: f(W, x), (x,), (V,))[1], (X,), (X,)),
    "jacfwd of jacfwd": lambda f, over: fg.jacfwd(fg.jacfwd(f, 1), 1)(W, X),
    "vmap of x": lambda f, over: over(lambda x: f(W, x))(XS),
    "vmap of w": lambda f, over: over(lambda w: f(w, X))(WS),
    "vmap of vmap": lambda f, over: over(lambda w: over(lambda x: f(w, x))(XS))(WS),
    "vmap of jvp": lambda f, over: over(lambda x: fg.jvp(f, (W, x), (TW, V)))(XS),
    "jvp of vmap": lambda f, over: fg.jvp(lambda w, x: over(lambda x: f(w, x))(x), (W, XS), (TW, XS)),
    "grad of something else": lambda f, over: fg.grad(lambda y: (f(W, X) * y).sum())(V),
    "vmap of grad of something else": lambda f, over: over(lambda x: fg.grad(lambda y: (f(W, x) * y).sum())(V))(XS),
    "jvp of remat": lambda f, over: fg.jvp(fg.remat(f), (W, X), (TW, V)),
}


def assert_close(actual, expected):
    # products and sums of a few dozen numbers of order one, in another order
    assert tree.allclose(actual, expected, rtol=1e-10, atol=1e-11)


@BOTH
@pytest.mark.parametrize("stack", STACKS)
def test_while_loop_is_pythons_loop(stack, wrap):
    run = lambda: STACKS[stack](grows(fg.while_loop), fg.vmap)
    assert_close(wrap(run)(), STACKS[stack](grows(python_loop), one_by_one))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")  # of Inductor's own lowering of diagonal
@pytest.mark.parametrize("stack", ["value", "jvp of jvp", "jacfwd of jacfwd", "vmap of jvp"])
def test_while_loop_is_pythons_loop_under_inductor(stack):
    run = lambda: STACKS[stack](grows(fg.while_loop), fg.vmap)
    assert_close(jit(run)(), STACKS[stack](grows(python_loop), one_by_one))


def test_while_loop_is_pythons_loop_under_torch_compile():
    torch._dynamo.reset()
    compiled = torch.compile(lambda w, x: grows(fg.while_loop)(w, x), fullgraph=True, backend="aot_eager")
    assert_close(compiled(W, X), grows(python_loop)(W, X))


def test_while_loop_under_torch_compile_refuses_transforms():
    torch._dynamo.reset()
    mapped = torch.compile(fg.vmap(lambda x: grows(fg.while_loop)(W, x)), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="no transform around it under torch"):
        mapped(XS)


def test_while_loop_jitted_once_takes_as_many_steps_as_values_ask():
    program = jit(
        lambda n: fg.while_loop(lambda c: c[1] < n, lambda c: (c[0] * 2, c[1] + 1), (1, 0))[0], backend="aten"
    )
    assert [program(torch.tensor(n)).item() for n in (0, 1, 10)] == [1, 2, 1024]
    assert program.traces == 1
    assert "higher_order.while_loop" in program.lower(torch.tensor(3)).text()


def test_while_loop_costs_what_one_step_costs():
    step = lambda x: torch.sin(x) * 2
    f = lambda x: fg.while_loop(lambda x: x.sum() < 9, step, x)
    of_loop, of_step = [jit(g, backend="aten").lower(X).cost() for g in (f, step)]
    assert of_loop.flops == of_step.flops + 1 + 1  # the sum and the comparison


@pytest.mark.slow
def test_while_loop_of_no_steps_returns_memory_of_its_own():
    """Also in the compiled program, which may write over inputs that it is given."""
    f = lambda x, n: fg.while_loop(lambda c: c[1] < n, lambda c: (c[0] + 1, c[1] + 1), (x, 0))[0]
    program = jit(f)
    for n in (0, 2):
        out = program(X, torch.tensor(n))
        assert_close(out, X + n)
        assert out.data_ptr() != X.data_ptr()


@BOTH
def test_while_loop_of_finished_examples_spreads_no_nan(wrap):
    """The first example does no step: there the square root of a negative number would be taken."""

    def f(x):
        n = torch.zeros_like(x) + (x > 3)
        return fg.while_loop(lambda c: c[1] < n, lambda c: (torch.sqrt(c[0] - 1), c[1] + 1), (x, n * 0))[0]

    x, one = torch.tensor([0.5, 5.0], dtype=F64), torch.ones(2, dtype=F64)
    expected = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([1.0, 0.25], dtype=F64)
    assert_close(wrap(lambda x: fg.jvp(fg.vmap(f), (x,), (one,)))(x), expected)
    assert_close(wrap(fg.vmap(lambda x: fg.jvp(f, (x,), (torch.ones_like(x),))))(x), expected)


REVERSE = {
    "grad": lambda f: fg.grad(lambda x: f(W, x).sum())(X),
    "grad of what is closed over": lambda f: fg.grad(lambda w: f(w, X).sum())(W),
    "jacrev": lambda f: fg.jacrev(f)(W, X),
    "vmap of grad": lambda f: fg.vmap(fg.grad(lambda x: f(W, x).sum()))(XS),
    "grad of jvp": lambda f: fg.grad(lambda x: fg.jvp(lambda w: f(w, x), (W,), (TW,))[1].sum())(X),
    "grad of remat": lambda f: fg.grad(lambda x: fg.remat(f)(W, x).sum())(X),
}


@BOTH
@pytest.mark.parametrize("name", REVERSE)
def test_while_loop_refuses_reverse_mode(name, wrap):
    with pytest.raises(ValueError, match=r"no gradient in reverse mode.*use scan, fori_loop with int bounds"):
        wrap(lambda: REVERSE[name](grows(fg.while_loop)))()


def test_while_loop_refuses_reverse_mode_of_torch():
    out = grows(fg.while_loop)(W.clone().requires_grad_(), X)
    with pytest.raises(ValueError, match="no gradient in reverse mode"):
        out.sum().backward()


def test_while_loop_refuses_no_gradient_that_does_not_flow_through_it():
    loss = lambda x: fg.stop_gradient(grows(fg.while_loop)(W, x)).sum() + x.square().sum()
    assert_close(fg.grad(loss)(X), 2 * X)


@BOTH
def test_while_loop_may_close_over_what_it_only_asks_for_its_dtype(wrap):
    def loss(scale):
        def body(c):
            one = torch.ones_like(scale)  # reads the shape and dtype, no value
            return c[0] + one, c[1] + 1

        total, _ = fg.while_loop(lambda c: c[1] < 3, body, (torch.zeros(3, dtype=scale.dtype), 0))
        return (total * scale).sin().sum()

    assert_close(wrap(fg.grad(loss))(X), 3 * torch.cos(3 * X))
    assert_close(wrap(fg.vmap(fg.grad(loss)))(XS), 3 * torch.cos(3 * XS))
    assert_close(wrap(fg.hessian(loss))(X), torch.diag(-9 * torch.sin(3 * X)))


def sampler(key):
    """Draws until a number is greater than 1."""

    def body(carry):
        key, now = fg.random.split(carry[0])
        return key, fg.random.normal(now, (), F64)

    return fg.while_loop(lambda c: c[1] < 1, body, (key, torch.tensor(0.0, dtype=F64)))[1]


def rejected(key):
    value = torch.zeros(())
    while value < 1:
        key, now = fg.random.split(key)
        value = fg.random.normal(now, (), F64)
    return value


KEYS = fg.random.split(fg.random.key(0), 5)


@BOTH
def test_while_loop_samples_under_vmap(wrap):
    expected = torch.stack([rejected(key) for key in KEYS])
    assert_close(wrap(fg.vmap(sampler))(KEYS), expected)
    scaled = fg.vmap(fg.grad(lambda scale, key: (scale * sampler(key)).square()))
    assert_close(wrap(scaled)(expected, KEYS), 2 * expected**3)
    assert_close(wrap(lambda keys: fg.map(sampler, keys, batch_size=2))(KEYS), expected)


@BOTH
def test_while_loop_holds_a_cond(wrap):
    """Collatz: how many steps to 1."""

    def steps(n):
        halved = lambda n: fg.cond(n % 2 == 0, lambda: n // 2, lambda: 3 * n + 1)
        return fg.while_loop(lambda c: c[0] != 1, lambda c: (halved(c[0]), c[1] + 1), (n, 0))[1]

    numbers = torch.arange(1, 9)
    assert wrap(fg.vmap(steps))(numbers).tolist() == [0, 1, 7, 2, 5, 8, 16, 3]
    assert wrap(lambda ns: fg.map(steps, ns))(numbers).tolist() == [0, 1, 7, 2, 5, 8, 16, 3]


@BOTH
def test_while_loop_holds_a_gradient(wrap):
    """Newton's method for the minimum of x^4 / 4 - x: x = 1."""
    slope = fg.grad(lambda x: x**4 / 4 - x)

    def minimum(x):
        return fg.while_loop(lambda x: slope(x).abs() > 1e-12, lambda x: x - slope(x) / fg.grad(slope)(x), x)

    x = torch.tensor([2.0, 3.0, 0.9], dtype=F64)
    assert_close(wrap(fg.vmap(minimum))(x), torch.ones_like(x))


def test_while_loop_has_a_shape_without_values():
    out = fg.eval_shape(lambda x: fg.while_loop(lambda x: x.sum() < 3, lambda x: x + 1, x), X)
    assert out == fg.ShapeDtypeStruct((3,), F64, torch.device("cpu"))


ERRORS = {
    "structure": (lambda c: c["a"].sum() < 9, lambda c: {"b": c["a"]}, ValueError, "keep the carry's structure, .*'a'"),
    "shape": (lambda c: c["a"].sum() < 9, lambda c: {"a": c["a"][:2]}, ValueError, r"carry at 'a' \(3,\) .* \(2,\)"),
    "dtype": (lambda c: c["a"].sum() < 9, lambda c: {"a": c["a"].float()}, ValueError, "at 'a' .* torch.float32"),
    "leaf": (lambda c: c["a"].sum() < 9, lambda c: {"a": "x"}, TypeError, "the result of body_fun, got str at 'a'"),
    "predicate": (lambda c: c["a"] < 9, lambda c: c, ValueError, r"the result of cond_fun to be a scalar, got shape"),
    "no predicate": (lambda c: "x", lambda c: c, TypeError, "cond_fun to be a tensor or a number, got str"),
}


@BOTH
@pytest.mark.parametrize("name", ERRORS)
def test_while_loop_refuses_another_carry(name, wrap):
    cond_fun, body_fun, kind, message = ERRORS[name]
    with pytest.raises(kind, match=message):
        wrap(lambda x: fg.while_loop(cond_fun, body_fun, {"a": x}))(X * 0)


def test_while_loop_refuses_writes_in_place_under_jit():
    with pytest.raises(ValueError, match="writes in place"):
        jit(lambda x: fg.while_loop(lambda c: c.sum() < 9, lambda c: c.add_(1), x), backend="aten")(X)


def horner(x, upper):
    """The oracle: ((x x + 2) x + 3) x + ..."""
    total = x
    for i in range(2, upper):
        total = total * x + i
    return total


def looped(x, upper):
    return fg.fori_loop(2, upper, lambda i, total: total * x + i, x)


@BOTH
def test_fori_loop_with_int_bounds_has_all_derivatives(wrap):
    x = torch.tensor(0.7, dtype=F64)
    for order in (lambda f: f, fg.grad, lambda f: fg.grad(fg.grad(f)), lambda f: fg.jacfwd(fg.grad(f))):
        assert_close(wrap(order(lambda x: looped(x, 6)))(x), order(lambda x: horner(x, 6))(x))


@BOTH
def test_fori_loop_with_a_tensor_bound_has_those_of_forward_mode(wrap):
    x, n = torch.tensor(0.7, dtype=F64), torch.tensor(6)
    assert_close(wrap(fg.jacfwd(looped))(x, n), fg.jacfwd(horner)(x, 6))
    uppers = torch.tensor([1, 2, 4, 7])
    expected = torch.stack([horner(x, int(n)) for n in uppers])
    assert_close(wrap(fg.vmap(looped, (None, 0)))(x, uppers), expected)
    with pytest.raises(ValueError, match="no gradient in reverse mode"):
        wrap(fg.grad(looped))(x, n)


@BOTH
def test_fori_loop_of_no_steps_returns_init(wrap):
    assert_close(wrap(lambda x: fg.fori_loop(5, 2, lambda i, x: x * 2, x))(X), X)


def test_fori_loop_refuses_other_bounds_and_carries():
    same = lambda i, x: x
    with pytest.raises(TypeError, match="upper to be an int or an integer tensor, got float"):
        fg.fori_loop(0, 2.5, same, X)
    with pytest.raises(TypeError, match=r"lower to be an integer, got torch.float64"):
        fg.fori_loop(X[0], 2, same, X)
    with pytest.raises(ValueError, match=r"upper to be a scalar, got shape \(2,\)"):
        fg.fori_loop(0, torch.tensor([1, 2]), same, X)
    with pytest.raises(ValueError, match=r"fori_loop: expected body_fun to keep the carry at 'x' \(3,\)"):
        fg.fori_loop(0, 2, lambda i, c: {"x": c["x"].sum()}, {"x": X})


@BOTH
def test_fori_loop_indexes_by_its_counter(wrap):
    table = draw(9, 2, 3, 4)

    def f(table, upper):
        return fg.fori_loop(
            0, upper, lambda i, c: c + table[i] * table[1, i % 3, -1] - table[..., i - 3].sum(), X.new_zeros(3, 4)
        )

    expected = sum(table[i] * table[1, i % 3, -1] - table[..., i - 3].sum() for i in range(2))
    assert_close(wrap(lambda table: f(table, 2))(table), expected)
    assert_close(wrap(f)(table, torch.tensor(2)), expected)
    assert_close(wrap(fg.vmap(f, (None, 0)))(table, torch.tensor([2, 0])), torch.stack([expected, expected * 0]))
