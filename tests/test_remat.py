"""remat and optimization_barrier: the identity under every transform, and what they are for."""

import functools
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import functorch_gen as fg
from functorch_gen import tree
from functorch_gen.transforms.tracing.trace import trace

F64 = torch.float64
W = torch.linspace(-1, 1, 9, dtype=F64).reshape(3, 3)
X = torch.tensor([0.3, -0.7, 1.1], dtype=F64)
V = torch.tensor([1.0, 0.5, -2.0], dtype=F64)


def closing_over(w):
    def layer(p, x):
        return {"y": torch.tanh(w @ x) * p["s"], "n": torch.tensor(3)}

    return layer


def with_remat(p, x, w):
    out = fg.remat(closing_over(w))(p, x)
    return (out["y"] ** 2).sum() * out["n"]


def with_barrier(p, x, w):
    p, x = fg.optimization_barrier((p, x))
    return (fg.optimization_barrier(torch.tanh(w @ x) * p["s"]) ** 2).sum() * 3


def plain(p, x, w):
    return ((torch.tanh(w @ x) * p["s"]) ** 2).sum() * 3


P = {"s": torch.tensor([1.0, -2.0, 0.5], dtype=F64)}

STACKS = {
    "value": lambda f: f(P, X, W),
    "grad": lambda f: fg.grad(f, argnums=(0, 1, 2))(P, X, W),
    "grad of closed over": lambda f: fg.grad(lambda w: f(P, X, w))(W),
    "vjp": lambda f: fg.vjp(lambda x: f(P, x, W), X)[1](torch.tensor(2.0, dtype=F64)),
    "jvp": lambda f: fg.jvp(lambda p, x: f(p, x, W), (P, X), ({"s": V}, V)),
    "grad of grad": lambda f: fg.grad(lambda x: (fg.grad(f, argnums=1)(P, x, W) * V).sum())(X),
    "hvp": lambda f: fg.hvp(lambda x: f(P, x, W), (X,), (V,)),
    "hessian": lambda f: fg.hessian(lambda x: f(P, x, W))(X),
    "jacfwd of jacfwd": lambda f: fg.jacfwd(fg.jacfwd(lambda x: f(P, x, W)))(X),
    "jacrev of jacfwd": lambda f: fg.jacrev(fg.jacfwd(lambda x: f(P, x, W)))(X),
    "third order": lambda f: fg.jacfwd(fg.hessian(lambda x: f(P, x, W)))(X),
    "vmap": lambda f: fg.vmap(f, in_dims=(None, 0, None))(P, torch.stack([X, V]), W),
    "vmap of grad": lambda f: fg.vmap(fg.grad(f, argnums=2), in_dims=(None, 0, None))(P, torch.stack([X, V]), W),
    "grad of vmap": lambda f: fg.grad(lambda w: fg.vmap(f, in_dims=(None, 0, None))(P, torch.stack([X, V]), w).sum())(
        W
    ),
}


@pytest.mark.parametrize("f", [with_remat, with_barrier])
@pytest.mark.parametrize("stack", STACKS)
def test_is_the_identity_eager_and_jitted(f, stack):
    run = STACKS[stack]
    expected = run(plain)
    assert tree.allclose(run(f), expected, rtol=1e-12, atol=1e-13)
    jitted = fg.jit(lambda: run(f), backend="aten")()
    assert tree.allclose(jitted, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("f", [with_remat, with_barrier])
@pytest.mark.parametrize("stack", ["grad", "hvp", "vmap of grad"])
def test_is_the_identity_under_torch_compile(f, stack):
    torch._dynamo.reset()
    run = STACKS[stack]
    compiled = torch.compile(lambda: run(f), fullgraph=True, backend="aot_eager")()
    assert tree.allclose(compiled, run(plain), rtol=1e-12, atol=1e-13)


def count(fun, args, operation):
    """How often an operation stands in the traced graph."""
    return sum(node.target is operation for node in trace(fun, args).graph.graph.nodes)


def test_remat_recomputes_in_a_traced_graph():
    def blocks(wrap):
        def loss(x):
            return wrap(lambda x: torch.tanh(torch.tanh(x)))(x).sum()

        return fg.jit(fg.grad(loss)).lower(X).text().count("aten.tanh(")

    assert blocks(lambda f: f) == 2
    assert blocks(fg.remat) == 4  # two forward, two again behind the barrier


def test_remat_replays_keys():
    key = fg.random.key(3)

    def noisy(key, x):
        return x * fg.random.normal(key, (3,), F64)

    grads = fg.grad(lambda x: fg.remat(noisy)(key, x).sum())(X)
    assert torch.equal(grads, fg.random.normal(key, (3,), F64))


def test_remat_under_plain_autograd():
    x = X.clone().requires_grad_()
    y = fg.remat(lambda x: torch.tanh(x) ** 2)(x).sum()
    (g,) = torch.autograd.grad(y, x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    expected = torch.autograd.functional.hessian(lambda x: (torch.tanh(x) ** 2).sum(), X).sum(0)
    assert torch.allclose(h, expected, rtol=1e-12)


class Layer:
    def __init__(self, w):
        self.parts = {"w": w}

    def apply(self, x):
        return torch.tanh(self.parts["w"] @ x)


def test_remat_differentiates_cells_defaults_partials_and_recursion():
    def by_default(x, w=W):
        return torch.tanh(w @ x)

    def recursive(w):
        def f(x, n=2):
            return f(torch.tanh(w @ x), n - 1) if n else x

        return f

    for make in (
        lambda w: functools.partial(lambda w, x: torch.tanh(w @ x), w),
        lambda w: lambda x, fs=(lambda x: torch.tanh(w @ x),): fs[0](x),
        recursive,
    ):
        expected = fg.grad(lambda w, make=make: make(w)(X).sum())(W)
        got = fg.grad(lambda w, make=make: fg.remat(make(w))(X).sum())(W)
        assert torch.allclose(got, expected, rtol=1e-13)
    assert torch.equal(fg.remat(by_default)(X), by_default(X))


def test_remat_output_may_be_an_expanded_input():
    out, moved = fg.jvp(fg.remat(lambda x: x.expand(4, 3)), (X,), (V,))
    assert torch.equal(out, X.expand(4, 3))
    assert torch.equal(moved, V.expand(4, 3))


def test_barrier_keeps_leaves_that_are_no_tensors():
    assert fg.optimization_barrier({"n": 3, "k": torch.tensor(2)}) == {"n": 3, "k": torch.tensor(2)}


def test_barrier_survives_common_subexpression_elimination():
    def f(x):
        return torch.exp(x) + torch.exp(fg.optimization_barrier(x))

    text = fg.jit(f).lower(X).text()
    assert text.count("aten.exp(") == 2
    assert text.count("functorch_gen.barrier") == 1
    assert torch.allclose(fg.jit(f)(X), 2 * torch.exp(X))


def test_remat_differentiates_tensors_inside_objects():
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)).double()
    expected = torch.autograd.grad(module(X).sum(), list(module.parameters()))
    for wrapped in (fg.remat(module), fg.remat(lambda x: module(x)), fg.remat(fg.jit(lambda x: module(x)))):
        assert tree.allclose(torch.autograd.grad(wrapped(X).sum(), list(module.parameters())), expected)
    for make in (lambda w: Layer(w).apply, lambda w: functools.partial(lambda f, x: f(x), Layer(w).apply)):
        got = fg.grad(lambda w, make=make: fg.remat(make(w))(X).sum())(W)
        assert torch.allclose(got, fg.grad(lambda w: torch.tanh(w @ X).sum())(W), rtol=1e-13)


def test_remat_output_may_be_an_input():
    assert torch.equal(fg.grad(lambda x: sum(y.sum() for y in fg.remat(lambda x: (x, 2 * x, x))(x)))(X), 0 * X + 4)


# Policies. An MLP block of two products: the first is named.

WS = {"a": torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4), "b": torch.linspace(1, -2, 12, dtype=F64).reshape(4, 3)}
POLICIES = {
    "names": fg.save_only_these_names("hidden", "unused"),
    "dots": fg.dots_saveable,
    "names and dots": fg.Policy(frozenset({"hidden"}), fg.dots_saveable.operations),
}


def block(ws, x):
    return torch.tanh(fg.checkpoint_name(x @ ws["a"], "hidden")) @ ws["b"] + x


def loss_of(wrap):
    def loss(ws, x):
        h = wrap(block)(ws, x[None])
        return wrap(block)(ws, h).square().sum()

    return loss


ORDERS = {
    "grad": lambda f: fg.grad(f, (0, 1))(WS, X),
    "grad of grad": lambda f: fg.grad(lambda ws: tree.norm(fg.grad(f)(ws, X)))(WS),
    "jvp": lambda f: fg.jvp(lambda x: f(WS, x), (X,), (V,)),
    "hvp": lambda f: fg.hvp(lambda x: f(WS, x), (X,), (V,)),
    "hessian": lambda f: fg.hessian(f, 1)(WS, X),
    "third order": lambda f: fg.jacfwd(fg.hessian(f, 1), 1)(WS, X),
    "vmap of grad": lambda f: fg.vmap(fg.grad(f), (None, 0))(WS, torch.stack([X, V])),
    "grad of vmap": lambda f: fg.grad(lambda ws: fg.vmap(f, (None, 0))(ws, torch.stack([X, V])).sum())(WS),
    "vmap of hvp": lambda f: fg.vmap(lambda v: fg.hvp(lambda x: f(WS, x), (X,), (v,)))(torch.stack([X, V])),
    "jacrev": lambda f: fg.jacrev(fg.grad(f, 1), 1)(WS, X),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("stack", ORDERS)
def test_remat_with_a_policy_changes_no_value(stack, policy, jitted):
    remat = functools.partial(fg.remat, policy=POLICIES[policy])
    run = lambda: ORDERS[stack](loss_of(remat))
    result = fg.jit(run, backend="aten")() if jitted else run()
    assert tree.allclose(result, ORDERS[stack](loss_of(lambda f: f)), rtol=1e-12, atol=1e-13)


class Count(TorchDispatchMode):
    """Counts the operations that run, under every transform."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def calls_of(run):
    with Count() as count:
        run()
    return {name: count.calls.get(name, 0) for name in ("mm", "bmm", "tanh")}


COUNTED = {
    # of one block: 2 products forward, 4 in the backward pass, and those that are computed again
    "nothing": (None, {"mm": 8, "bmm": 0, "tanh": 2}),
    "names": (POLICIES["names"], {"mm": 7, "bmm": 0, "tanh": 2}),
    "dots": (POLICIES["dots"], {"mm": 6, "bmm": 0, "tanh": 2}),
}


@pytest.mark.parametrize("name", COUNTED)
def test_remat_computes_again_what_the_policy_does_not_save(name):
    policy, expected = COUNTED[name]
    run = lambda: fg.grad(lambda ws, x: fg.remat(block, policy)(ws, x[None]).sum(), (0, 1))(WS, X)
    assert calls_of(run) == expected


@pytest.mark.parametrize("batched", ["ws", "x"])
def test_remat_replays_under_vmap(batched):
    def run(policy):
        grad = fg.grad(lambda ws, x: fg.remat(block, policy)(ws, x[None]).sum(), (0, 1))
        if batched == "ws":
            return fg.vmap(grad, (0, None))(tree.stack([WS, WS]), X)
        return fg.vmap(grad, (None, 0))(WS, torch.stack([X, V]))

    products = [
        sum(calls_of(lambda p=p: run(p)).get(name, 0) for name in ("mm", "bmm")) for p in (None, POLICIES["dots"])
    ]
    assert products == [8, 6]


def test_remat_policy_shows_in_the_traced_graph():
    def products(policy):
        def grad(a, b, x):
            loss = lambda ws: fg.remat(block, policy)(ws, x[None]).square().sum()
            return fg.grad(loss)({"a": a, "b": b}), x

        return count(grad, [WS["a"], WS["b"], X], torch.ops.aten.mm.default)

    # the second product is needed for the value only, so the first alone is computed again without a policy
    assert [products(p) for p in (None, POLICIES["names"], POLICIES["dots"])] == [6, 5, 5]


def test_checkpoint_name_of_a_view_saves_what_it_looks_at():
    policy = fg.save_only_these_names("view")

    def f(x):
        return torch.tanh(fg.checkpoint_name((x @ W).reshape(3, 1).mT, "view")).sum()

    counted = [calls_of(lambda p=p: fg.grad(fg.remat(f, p))(X[None]))["mm"] for p in (None, policy)]
    assert counted == [3, 2]
    assert torch.equal(fg.grad(fg.remat(f, policy))(X[None]), fg.grad(f)(X[None]))


def test_checkpoint_name_of_what_is_written_to_is_computed_again():
    policy = fg.Policy(frozenset({"y"}), fg.dots_saveable.operations)

    def f(x):
        y = x @ W
        y = fg.checkpoint_name(y, "y")
        y.add_(1.0)
        return torch.tanh(fg.checkpoint_name(y, "y")).square().sum()

    assert torch.equal(fg.grad(fg.remat(f, policy))(X[None]), fg.grad(f)(X[None]))


def test_checkpoint_name_is_the_identity():
    x = {"a": X, "n": 3}
    assert fg.checkpoint_name(x, "any") is x
    assert torch.equal(fg.grad(lambda x: fg.checkpoint_name(x, "any").sin().sum())(X), X.cos())


def test_remat_refuses_what_is_no_policy():
    policy: Any = "dots"
    with pytest.raises(TypeError, match="remat: expected policy to be a Policy or None, got str"):
        fg.remat(block, policy)
    names: Any = ["a"]
    with pytest.raises(TypeError, match="save_only_these_names: expected strings, got list"):
        fg.save_only_these_names(names)


@pytest.mark.parametrize("policy", [None, fg.dots_saveable], ids=["whole", "dots"])
def test_vjp_under_no_grad_is_that_with_gradients(policy):
    """The pull-back runs after its transform has ended, and jit traces it so."""
    w, x, c = (fg.random.normal(fg.random.key(i), (3, 3), torch.float64) for i in range(3))
    lean = fg.remat(lambda x, w: torch.tanh(x @ w), policy)
    expected = fg.vjp(lambda x, w: torch.tanh(x @ w), x, w)[1](c)
    with torch.no_grad():
        torch.testing.assert_close(fg.vjp(lean, x, w)[1](c), expected)
    torch.testing.assert_close(fg.jit(lambda x, w, c: fg.vjp(lean, x, w)[1](c), backend="aten")(x, w, c), expected)
