"""scan: the unrolled loop under every transform, one node in every trace."""

import functools

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms import jit
from functorch_gen.transforms.graph_passes import prune, repair
from functorch_gen.transforms.tracing.trace import trace

F64 = torch.float64
LENGTH = 4


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


P = {"b": draw(0, 3), "w": draw(1, 3, 3)}
X, V, H = draw(2, LENGTH, 3), draw(3, LENGTH, 3), draw(4, 3)
T = {"b": draw(5, 3), "w": draw(6, 3, 3)}
XS, HS = draw(7, 2, LENGTH, 3), draw(8, 2, 3)
PS = tree.stack([P, T])


def unrolled(f, init, xs=None, length=None, reverse=False):
    """The oracle: Python's own loop, with nothing of the library's but trees."""
    steps = length if length is not None else len(tree.leaves(xs)[0])
    carry, ys = init, [None] * steps
    for i in reversed(range(steps)) if reverse else range(steps):
        carry, ys[i] = f(carry, tree.map(lambda x, i=i: x[i], xs))
    return carry, tree.stack(ys)


def cell_loss(loop, reverse=False, wrap=lambda f: f):
    """A recurrent cell with a counter in its carry, integers among its ys, and closed-over parameters."""

    def loss(p, x, h):
        def cell(carry, x):
            h, n = carry["h"], carry["n"]
            new = torch.tanh(h @ p["w"] + x * p["b"])
            return {"h": new, "n": n + 1}, (new * x, {"n": n, "old": h})

        start = {"h": h, "n": torch.tensor(2)}
        last, (y, extra) = loop(wrap(cell), start, x, reverse=reverse)
        return last["h"].square().sum() + y.sin().sum() + last["n"] + extra["n"].to(F64) @ extra["old"].sum(-1)

    return loss


STACKS = {
    "value": lambda f: f(P, X, H),
    "grad": lambda f: fg.grad(f, (0, 1, 2))(P, X, H),
    "vjp": lambda f: fg.vjp(f, P, X, H)[1](torch.tensor(2.0, dtype=F64)),
    "jvp": lambda f: fg.jvp(f, (P, X, H), (T, V, V[0])),
    "jvp of params": lambda f: fg.jvp(lambda p: f(p, X, H), (P,), (T,)),
    "grad of grad": lambda f: fg.grad(lambda p, x: tree.norm(fg.grad(f, (0, 1))(p, x, H)), (0, 1))(P, X),
    "jvp of jvp": lambda f: fg.jvp(lambda x: fg.jvp(lambda x: f(P, x, H), (x,), (V,))[1], (X,), (X,)),
    "hvp": lambda f: fg.hvp(lambda p: f(p, X, H), (P,), (T,)),
    "grad of jvp": lambda f: fg.grad(lambda p: fg.jvp(lambda x: f(p, x, H), (X,), (V,))[1])(P),
    "third order": lambda f: fg.grad(lambda h: tree.norm(fg.grad(lambda h: tree.norm(fg.grad(f, 2)(P, X, h)))(h)))(H),
    "jvp of grad of grad": lambda f: fg.jvp(fg.grad(lambda h: tree.norm(fg.grad(f, 2)(P, X, h))), (H,), (V[0],)),
    "hessian": lambda f: fg.hessian(f, 2)(P, X, H),
    "jacrev": lambda f: fg.jacrev(lambda h: fg.grad(f)(P, X, h))(H),
    "jacfwd of jacfwd": lambda f: fg.jacfwd(fg.jacfwd(f, 2), 2)(P, X, H),
    "vmap of xs": lambda f: fg.vmap(f, (None, 0, None))(P, XS, H),
    "vmap of carry": lambda f: fg.vmap(f, (None, None, 0))(P, X, HS),
    "vmap of params": lambda f: fg.vmap(f, (0, None, None))(PS, X, H),
    "vmap of grad": lambda f: fg.vmap(fg.grad(f, (0, 1, 2)), (0, 0, None))(PS, XS, H),
    "vmap of vmap of grad": lambda f: fg.vmap(fg.vmap(fg.grad(f), (None, 0, None)), (0, None, None))(PS, XS, H),
    "vmap of jacrev of grad": lambda f: fg.vmap(fg.jacrev(fg.grad(f, 2), 2), (None, None, 0))(P, X, HS),
    "grad of vmap": lambda f: fg.grad(lambda p: fg.vmap(f, (None, 0, None))(p, XS, H).sum())(P),
    "jacrev of vmap": lambda f: fg.jacrev(lambda h: fg.vmap(f, (None, 0, None))(P, XS, h))(H),
    "remat of it": lambda f: fg.grad(fg.remat(f), (0, 1, 2))(P, X, H),
}
FORMS = {
    "plain": {},
    "reverse": {"reverse": True},
    "remat": {"wrap": fg.remat},
    "dots saved": {"wrap": functools.partial(fg.remat, policy=fg.dots_saveable)},
}


def assert_close(actual, expected):
    # products and sums of a few dozen numbers of order one, in another order
    assert tree.allclose(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stack", STACKS)
def test_scan_is_the_unrolled_loop(stack, form):
    run, reverse = STACKS[stack], FORMS[form].get("reverse", False)
    assert_close(run(cell_loss(fg.scan, **FORMS[form])), run(cell_loss(unrolled, reverse)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stack", STACKS)
def test_scan_is_the_unrolled_loop_jitted(stack, form):
    run, reverse = STACKS[stack], FORMS[form].get("reverse", False)
    jitted = jit(lambda: run(cell_loss(fg.scan, **FORMS[form])), backend="aten")
    assert_close(jitted(), run(cell_loss(unrolled, reverse)))
    assert "higher_order.scan" in jitted.lower().text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*_prims_common.check:FutureWarning")  # of Inductor's own lowering of diagonal
@pytest.mark.parametrize("stack", ["value", "grad", "hvp", "vmap of grad", "hessian", "jacfwd of jacfwd"])
def test_scan_is_the_unrolled_loop_under_inductor(stack):
    run = STACKS[stack]
    assert_close(jit(lambda: run(cell_loss(fg.scan)))(), run(cell_loss(unrolled)))


@pytest.mark.parametrize("stack", ["value", "grad", "vmap of grad"])
def test_scan_is_the_unrolled_loop_under_torch_compile(stack):
    torch._dynamo.reset()
    run = STACKS[stack]
    compiled = torch.compile(lambda: run(cell_loss(fg.scan)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(), run(cell_loss(unrolled)))


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_scan_carries_tangents_in_the_dtype_of_the_carry(backend):
    """torch gives 0.5 * c, where c is 0-d, a tangent of float64."""
    f = lambda x: fg.scan(lambda c, _: (0.5 * c * x, None), x, length=3)[0]
    x, one = torch.tensor(0.5), torch.tensor(1.0)
    jitted = jit(lambda x: fg.jvp(f, (x,), (one,)), backend=backend)
    assert tree.equal(jitted(x), (torch.tensor(0.5**7), torch.tensor(4 * 0.5**6)))


def nodes_of(graph):
    """How many nodes a traced graph has, those of its loops' bodies among them."""
    return sum(len(module.graph.nodes) for module in graph.modules() if isinstance(module, torch.fx.GraphModule))


@pytest.mark.parametrize("stack", ["value", "grad", "hvp", "vmap of grad", "third order"])
def test_scan_traces_to_a_program_whose_size_is_not_the_length(stack, monkeypatch):
    sizes = []
    for length in (4, 48):
        monkeypatch.setattr("test_scan.X", draw(0, length, 3))
        monkeypatch.setattr("test_scan.XS", draw(0, 2, length, 3))
        sizes.append(nodes_of(trace(lambda: STACKS[stack](cell_loss(fg.scan)), []).graph))
    assert sizes[0] == sizes[1]


def nested(loop):
    """A loop over rows whose step is a loop over columns; the inner body closes over the outer carry."""

    def f(p, x):
        def row(total, xs):
            def column(h, x):
                new = torch.sin(h * p["b"][0] + x * total)
                return new, new * h

            last, ys = loop(column, total * 0.5, xs, reverse=True)
            return last + total.cos(), ys

        last, ys = loop(row, p["w"][0, 0], x)
        return last + ys.square().sum()

    return f


NESTED = {
    "value": lambda f: f(P, X),
    "grad": lambda f: fg.grad(f, (0, 1))(P, X),
    "hvp": lambda f: fg.hvp(lambda p: f(p, X), (P,), (T,)),
    "grad of grad": lambda f: fg.grad(lambda x: tree.norm(fg.grad(f)(P, x)))(X),
    "vmap of grad": lambda f: fg.vmap(fg.grad(f), (0, None))(PS, X),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("stack", NESTED)
def test_scan_nests(stack, jitted):
    fun = lambda: NESTED[stack](nested(fg.scan))
    assert_close((jit(fun, backend="aten") if jitted else fun)(), NESTED[stack](nested(unrolled)))


def test_scan_takes_no_xs_a_length_and_no_ys():
    def count(carry, x):
        assert x is None
        return carry * 2 + 1, None

    for run in (lambda: fg.scan(count, 0, length=5), jit(lambda: fg.scan(count, 0, length=5), backend="aten")):
        assert tree.equal(run(), (torch.tensor(31), None))


def test_scan_of_no_steps_returns_init_and_empty_ys():
    def f(w):
        last, ys = fg.scan(lambda c, x: (c * w, {"y": c / x}), torch.ones(2), torch.ones(0, 2))
        return last.sum() + ys["y"].sum() + w * 3, ys

    for run in (f, jit(f, backend="aten"), lambda w: fg.scan(lambda c, x: (c, {"y": c}), torch.ones(2), length=0)):
        assert run(torch.tensor(2.0))[1]["y"].shape == (0, 2)
    assert fg.grad(f, has_aux=True)(torch.tensor(2.0))[0] == 3


def test_scan_reads_tensors_from_outside_anew_at_each_call():
    class Holder:
        offset = torch.ones(2)

    program = jit(lambda x: fg.scan(lambda c, x: (c + x * Holder.offset, c), torch.zeros(2), x)[0], backend="aten")
    assert torch.equal(program(torch.ones(3, 2)), torch.full((2,), 3.0))
    Holder.offset.fill_(2)
    assert torch.equal(program(torch.ones(3, 2)), torch.full((2,), 6.0))


def test_scan_carries_keys():
    def f(key, x):
        def step(key, x):
            key, now = fg.random.split(key)
            return key, x * fg.random.normal(now, (), F64)

        return fg.scan(step, key, x)[1]

    key, expected, x = fg.random.key(0), [], draw(0, 5)
    for _ in range(5):
        key, now = fg.random.split(key)
        expected.append(fg.random.normal(now, (), F64))
    for grads in (
        fg.grad(lambda x: f(fg.random.key(0), x).sum()),
        jit(fg.grad(lambda x: f(fg.random.key(0), x).sum()), backend="aten"),
    ):
        assert_close(grads(x), torch.stack(expected))


def test_scan_passes_inputs_through():
    """Carries swap, a y is the carry, the x, a closed-over tensor, twice the same: nothing shares memory."""
    w = draw(0, 2)

    def f(a, x):
        def step(c, x):
            return (c[1], c[0]), (c[0], x, w, x)

        return fg.scan(step, (a, a), x)

    a, x = draw(1, 2), draw(2, 3, 2)
    assert_close(jit(f, backend="aten")(a, x), f(a, x))
    assert_close(f(a, x), ((a, a), (a.expand(3, 2), x, w.expand(3, 2), x)))


ERRORS = {
    "structure": (lambda c, x: ({"h": c["h"]}, x), "keep the carry's structure"),
    "shape": (lambda c, x: ({"h": c["h"], "n": x[None]}, x), r"the carry at 'n' \(2,\) torch.float32, got \(1, 2\)"),
    "dtype": (lambda c, x: ({"h": c["h"], "n": c["n"].double()}, x), r"carry at 'n' .* got \(2,\) torch.float64"),
    "pair": (lambda c, x: c, r"f to return \(carry, y\), got dict"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_scan_refuses_another_carry(name):
    f, message = ERRORS[name]
    init = {"h": torch.zeros(2), "n": torch.zeros(2)}
    for run in (lambda: fg.scan(f, init, torch.ones(3, 2)), jit(lambda: fg.scan(f, init, torch.ones(3, 2)))):
        with pytest.raises(ValueError, match=message):
            run()


def test_scan_refuses_wrong_xs_and_lengths():
    same = lambda c, x: (c, None)
    for xs, length, message in [
        ({"a": torch.ones(3), "b": torch.ones(2)}, None, "got 3 in xs at 'a' and 2 at 'b'"),
        (torch.ones(3), 4, "got 4 in length and 3"),
        (None, None, "expected length where xs has no leaves"),
        (torch.ones(()), None, "an axis to loop over"),
        (None, -1, "int >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            fg.scan(same, torch.ones(()), xs, length)
    with pytest.raises(TypeError, match="tensors in xs, got float at '1'"):
        fg.scan(same, torch.ones(()), (torch.ones(2), 1.0))
    with pytest.raises(TypeError, match="tensors in the init, got str at 'name'"):
        fg.scan(same, {"name": "x"}, torch.ones(2))
    with pytest.raises(TypeError, match="tensors in the y of f, got str"):
        fg.scan(lambda c, x: (c, "y"), torch.ones(()), torch.ones(2))


def test_scan_refuses_writes_in_place_under_jit():
    with pytest.raises(ValueError, match="writes in place"):
        jit(lambda x: fg.scan(lambda c, x: (c.add_(x), c), torch.zeros(2), x))(torch.ones(3, 2))


def traced(fun, *args):
    graph = trace(fun, args).graph
    repair(graph)
    prune(graph)
    return graph


def test_prune_takes_out_what_no_output_needs():
    """Of the last carry, no ys; of the xs, no more than one for the length."""

    def f(a, xs):
        def step(c, x):
            return c * 2, (c + x["read"], x["unread"] * a)

        return fg.scan(step, a, xs)[0]

    a, xs = draw(0, 2), {"read": draw(1, 3, 2), "unread": draw(2, 3, 2)}
    graph = traced(lambda a, x, y: f(a, {"read": x, "unread": y}), a, xs["read"], xs["unread"])
    (node,) = [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.scan]
    assert [len(part) for part in node.args[1:]] == [1, 1, 0]
    assert len(node.meta["val"]) == 1
    assert_close(graph(a, xs["read"], xs["unread"])[0], 8 * a)


@pytest.mark.parametrize("stack", ["grad", "hvp", "vmap of grad", "jvp of jvp"])
def test_prune_and_repair_change_no_value(stack):
    run = STACKS[stack]
    found = trace(lambda: run(cell_loss(fg.scan)), [])
    repair(found.graph)
    prune(found.graph)
    result = found.outputs.get(found.graph(*found.constants))
    assert_close(result, run(cell_loss(unrolled)))


def test_repair_reads_an_input_wherever_it_starts():
    def tail(x):
        same = torch.as_strided(x, (3,), (1,), 0)
        return same[:2] + torch.as_strided(x, (2,), (1,), 1) + torch.as_strided(x, (2,), (2,), 0)

    x = draw(0, 9)
    assert torch.equal(traced(tail, x[:3].clone())(x[4:7])[0], tail(x[4:7].clone()))
