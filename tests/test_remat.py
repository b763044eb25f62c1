"""remat and optimization_barrier: the identity under every transform, and what they are for."""

import functools

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree

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


def test_remat_recomputes_in_a_traced_graph():
    def blocks(wrap):
        def loss(x):
            return wrap(lambda x: torch.tanh(torch.tanh(x)))(x).sum()

        return fg.jit(fg.grad(loss)).lower(X).text().count("aten.tanh.default")

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
    assert text.count("aten.exp.default") == 2
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
