"""cond: the branch that Python's if would take, under every transform and in every trace."""

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms import jit

F64 = torch.float64


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


P, T = {"w": draw(0, 3, 3), "b": draw(1, 3)}, {"w": draw(5, 3, 3), "b": draw(6, 3)}
X, V, XS = draw(2, 3), draw(3, 3), draw(4, 4, 3)
PS = tree.stack([P, T])


def branch(pred, true_fun, false_fun, *operands):
    """The oracle: Python's own if."""
    return true_fun(*operands) if pred else false_fun(*operands)


def chooses(cond):
    """Two choices: with an operand and parameters closed over, an int among the results; inside, all closed over."""

    def f(p, x):
        a = cond(
            x.sum() > 0,
            lambda x: {"y": torch.tanh(x @ p["w"]), "n": 1},
            lambda x: {"y": (x * p["b"]).sin(), "n": 2},
            x,
        )
        b = cond(x[0] * x[1], lambda: a["y"].exp(), lambda: a["y"] * x)
        return (b * b).sum() + a["n"] * x.sum()

    return f


def one_by_one(fun, count):
    """The oracle of vmap over the first argument."""
    return lambda xs: tree.stack([fun(tree.map(lambda x, i=i: x[i], xs)) for i in range(count)])


def at_once(fun, count):
    return fg.vmap(fun)


STACKS = {
    "value": lambda f, over: f(P, X),
    "grad": lambda f, over: fg.grad(f, (0, 1))(P, X),
    "jvp": lambda f, over: fg.jvp(f, (P, X), (T, V)),
    "hvp": lambda f, over: fg.hvp(lambda p: f(p, X), (P,), (T,)),
    "grad of grad": lambda f, over: fg.grad(lambda x: tree.norm(fg.grad(f, (0, 1))(P, x)))(X),
    "jvp of jvp": lambda f, over: fg.jvp(lambda x: fg.jvp(lambda x: f(P, x), (x,), (V,))[1], (X,), (X,)),
    "grad of jvp": lambda f, over: fg.grad(lambda x: fg.jvp(f, (P, x), (T, V))[1])(X),
    "hessian": lambda f, over: fg.hessian(f, 1)(P, X),
    "jacrev": lambda f, over: fg.jacrev(fg.grad(f), 1)(P, X),
    "vmap of x": lambda f, over: over(lambda x: f(P, x), 4)(XS),
    "vmap of p": lambda f, over: over(lambda p: f(p, X), 2)(PS),
    "vmap of grad": lambda f, over: over(lambda x: fg.grad(f, (0, 1))(P, x), 4)(XS),
    "vmap of grad of p": lambda f, over: over(lambda p: fg.grad(f, (0, 1))(p, X), 2)(PS),
    "vmap of hessian": lambda f, over: over(lambda x: fg.hessian(f, 1)(P, x), 4)(XS),
    "grad of vmap": lambda f, over: fg.grad(lambda p: over(lambda x: f(p, x), 4)(XS).sum())(P),
    "remat of it": lambda f, over: fg.grad(fg.remat(f), (0, 1))(P, X),
}


def assert_close(actual, expected):
    # products and sums of a few dozen numbers of order one, in another order
    assert tree.allclose(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_cond_is_pythons_if(stack, jitted):
    run = lambda: STACKS[stack](chooses(fg.cond), at_once)
    expected = STACKS[stack](chooses(branch), one_by_one)
    assert_close((jit(run, backend="aten") if jitted else run)(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["value", "grad", "hvp", "grad of grad", "vmap of grad"])
def test_cond_is_pythons_if_under_inductor(stack):
    run = lambda: STACKS[stack](chooses(fg.cond), at_once)
    assert_close(jit(run)(), STACKS[stack](chooses(branch), one_by_one))


@pytest.mark.parametrize("stack", ["value", "grad", "jvp", "vmap of x", "vmap of grad"])
def test_cond_is_pythons_if_under_torch_compile(stack):
    torch._dynamo.reset()
    run = lambda: STACKS[stack](chooses(fg.cond), at_once)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert_close(compiled(), STACKS[stack](chooses(branch), one_by_one))


def test_cond_is_linearized_at_the_branch_taken():
    out, push = fg.linearize(lambda x: chooses(fg.cond)(P, x), X)
    expected = fg.jvp(lambda x: chooses(branch)(P, x), (X,), (V,))
    assert_close((out, push(V)), expected)


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_cond_jitted_once_takes_either_branch_and_runs_no_other(backend):
    taken = []

    def named(name, f):
        def run(x):
            fg.debug.callback(lambda _: taken.append(name), x)
            return f(x)

        return run

    f = lambda x: fg.cond(x.sum() > 0, named("sin", torch.sin), named("cos", torch.cos), x)
    program = jit(f, backend=backend)
    for x in (X.abs(), -X.abs()):
        assert_close(program(x), x.sin() if x.sum() > 0 else x.cos())
    assert (taken, program.traces) == (["sin", "cos"], 1)


def test_cond_runs_one_branch_eagerly():
    def never(x):
        raise AssertionError("the branch not taken runs")

    f = lambda x: fg.cond(x.sum() > -99, torch.sum, never, x)
    assert_close((f(X), fg.grad(f)(X)), (X.sum(), torch.ones_like(X)))
    assert_close(fg.vmap(lambda x: fg.cond(X.sum() > -99, torch.sum, never, x))(XS), XS.sum(1))


def test_cond_takes_numbers_and_integers_as_predicates():
    f = lambda n: fg.cond(n, lambda: X, lambda: -X)
    for n in (True, 3, 0.5, torch.tensor(2), torch.tensor(True)):
        assert_close((f(n), jit(f, backend="aten")(n)), (X, X))
    for n in (False, 0, 0.0, torch.tensor(0), torch.tensor(False)):
        assert_close((f(n), jit(f, backend="aten")(n)), (-X, -X))


def test_cond_selects_without_nan_from_the_branch_not_taken():
    """log is NaN or infinite at the first two; its second derivative too."""
    f = lambda x: fg.cond(x > 0, torch.log, torch.square, x)
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=F64)
    first, second = torch.tensor([-2, 0, 0.5], dtype=F64), torch.tensor([2, 2, -0.25], dtype=F64)
    total = lambda x: fg.vmap(f)(x).sum()
    for wrap in (lambda g: g, lambda g: jit(g, backend="aten")):
        assert_close(wrap(fg.vmap(fg.grad(f)))(x), first)
        assert_close(wrap(fg.grad(total))(x), first)
        assert_close(wrap(fg.vmap(fg.grad(fg.grad(f))))(x), second)
        assert_close(wrap(fg.grad(lambda x: fg.grad(total)(x).sum()))(x), second)
        assert_close(wrap(lambda x: fg.jvp(fg.vmap(fg.grad(f)), (x,), (torch.ones_like(x),)))(x), (first, second))


def test_cond_selects_without_nan_in_what_each_example_closes_over():
    f = lambda w, x: fg.cond(x > 0, lambda: w * x.log(), lambda: w * x)
    x, w = torch.tensor([-1.0, 0.0, 2.0], dtype=F64), torch.tensor(3.0, dtype=F64)
    expected = torch.where(x > 0, x.clamp(min=0.1).log(), x)
    assert_close(fg.vmap(fg.grad(f), (None, 0))(w, x), expected)


def test_cond_selects_without_nan_under_torch_compile():
    torch._dynamo.reset()
    f = lambda x: fg.cond(x > 0, torch.log, torch.square, x)
    compiled = torch.compile(fg.grad(f), fullgraph=True, backend="aot_eager")
    assert_close(compiled(torch.tensor(-1.0, dtype=F64)), torch.tensor(-2.0, dtype=F64))


def test_cond_keeps_no_copy_of_shared_weights_for_each_example():
    f = lambda x: fg.cond(x.sum() > 0, lambda x: x @ P["w"], torch.sin, x)
    assert "f64[4, 3, 3]" not in jit(fg.vmap(f), backend="aten").lower(XS).text()


def test_cond_costs_what_the_dearer_branch_costs():
    dear = lambda x: x @ P["w"] @ P["w"]
    f = lambda x: fg.cond(x[0] > 0, torch.sin, dear, x)
    of_choice, of_branch = [jit(g, backend="aten").lower(X).cost() for g in (f, dear)]
    assert of_choice.flops == of_branch.flops + 1  # the comparison


def test_cond_saves_and_loads(tmp_path):
    f = lambda x: fg.cond(x.sum() > 0, lambda x: fg.scan(lambda c, x: (c * x, c), x[0], x)[1], torch.cos, x)
    program, restored = jit(f), jit(f)
    program(X)
    program.save(tmp_path / "program")
    restored.load(tmp_path / "program")
    for x in (X.abs(), -X.abs()):
        assert_close(restored(x), f(x))


def test_cond_reads_tensors_from_outside_anew_at_each_call():
    class Holder:
        offset = torch.ones(3, dtype=F64)

    program = jit(lambda x: fg.cond(x.sum() > -99, lambda: x + Holder.offset, lambda: x), backend="aten")
    assert_close(program(X), X + 1)
    Holder.offset.fill_(2)
    assert_close(program(X), X + 2)


def test_cond_branches_may_return_arguments_and_constants():
    f = lambda x: fg.cond(x.sum() > 0, lambda x: (x, x, 1.0), lambda x: (x * 0, P["b"], 2.0), x)
    for x in (X.abs(), -X.abs()):
        out = jit(f, backend="aten")(x)
        assert_close(out, f(x))
        assert len({y.data_ptr() for y in (*out, x, P["b"])}) == 5


def test_cond_passes_layers_and_none_through():
    net = fg.nn.Linear(3, 2)
    params = net.init(fg.random.key(0))
    f = lambda p, x: fg.cond(
        x.sum() > 0, lambda net, p, x, _: net(p, x), lambda net, p, x, _: -net(p, x), net, p, x, None
    )
    x = X.float()
    assert_close(jit(f, backend="aten")(params, x), net(params, x) * x.sum().sign())


ERRORS = {
    "structure": (lambda x: {"a": x}, lambda x: {"b": x}, ValueError, "like true_fun's structure, but .*'a'"),
    "shape": (lambda x: {"a": x}, lambda x: {"a": x.sum()}, ValueError, r"at 'a' \(3,\) torch.float64, got \(\)"),
    "dtype": (lambda x: {"a": x}, lambda x: {"a": x.float()}, ValueError, r"at 'a' .* got \(3,\) torch.float32"),
    "leaf": (lambda x: {"a": "x"}, lambda x: {"a": x}, TypeError, "the result of true_fun, got str at 'a'"),
    "write": (lambda x: x.add_(1), lambda x: x, ValueError, "writes in place to arguments"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_cond_refuses_unequal_branches(name):
    true_fun, false_fun, kind, message = ERRORS[name]
    f = lambda x: fg.cond(x.sum() > 0, true_fun, false_fun, x)
    with pytest.raises(kind, match=message):
        jit(f, backend="aten")(X)
    if name != "write":
        with pytest.raises(kind, match=message):
            fg.vmap(f)(XS)


def test_cond_refuses_predicates_that_are_no_scalars():
    same = lambda: X
    for wrap in (lambda f: f, lambda f: jit(f, backend="aten")):
        with pytest.raises(ValueError, match=r"pred to be a scalar, got shape \(3,\)"):
            wrap(lambda x: fg.cond(x > 0, same, same))(X)
        with pytest.raises(TypeError, match="pred to be a tensor or a number, got NoneType"):
            wrap(lambda: fg.cond(None, same, same))()


def test_cond_has_a_shape_without_values():
    f = lambda x: fg.cond(x.sum() > 0, lambda: {"y": x}, lambda: {"y": -x})
    assert fg.eval_shape(f, X) == {"y": fg.ShapeDtypeStruct((3,), F64, torch.device("cpu"))}


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_cond_and_loops_stand_among_writes_in_place(backend):
    """Writes to intermediate tensors become new tensors; the operations between them stay what they are."""

    def f(x):
        y = x.clone()
        y[0] = 3
        z = fg.cond(y.sum() > 0, torch.sin, torch.cos, y).mul_(2)
        z = fg.while_loop(lambda c: c[1] < 3, lambda c: (c[0] * 1.1, c[1] + 1), (z, 0))[0]

        def step(c, x):
            c = c.clone()
            c[0] = x
            return fg.cond(x > 0, lambda: c * 2, lambda: c), c.sum()

        return fg.scan(step, z.add_(1), x)

    program = jit(f, backend=backend)
    for x in (X, -X):
        assert_close(program(x), f(x))
