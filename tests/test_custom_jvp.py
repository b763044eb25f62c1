"""custom_jvp: one linear rule, and its transposed, under every transform."""

import functools

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree

F64 = torch.float64
X = torch.tensor([0.3, -0.7, 1.1], dtype=F64)
V = torch.tensor([1.0, 0.5, -2.0], dtype=F64)
N = torch.tensor(3)
XV = torch.stack([X, V])
CLOSE = {"rtol": 1e-12, "atol": 1e-13}  # the same operations in another order


def plain(p, n, scale=1.0):
    return {"a": torch.sin(p["x"]) * p["y"] * scale, "n": n + 1}


@fg.custom_jvp
def custom(p, n, scale=1.0):
    return plain(p, n, scale)


@custom.defjvp
def custom_rule(primals, tangents):
    (p, n, scale), (t, of_n, of_scale) = primals, tangents
    if of_n is not None or of_scale != 0.0:
        raise AssertionError("expected no tangent of an integer, and zero for a number")
    moved = torch.cos(p["x"]) * t["x"] * p["y"] + torch.sin(p["x"]) * t["y"]
    return custom(p, n, scale), {"a": moved * scale, "n": None}


def both(f, x, y):
    return f({"x": x, "y": y}, N)["a"]


def loss(f, x, y):
    return (both(f, x, y) ** 2).sum()


STACKS = {
    "value": lambda f: f({"x": X, "y": V}, n=N),
    "grad": lambda f: fg.grad(lambda p: (f(p, N)["a"] ** 2).sum())({"x": X, "y": V}),
    "vjp": lambda f: fg.vjp(lambda x: both(f, x, V), X)[1](V),
    "jvp": lambda f: fg.jvp(lambda x, y: both(f, x, y), (X, V), (V, X)),
    "jvp of one": lambda f: fg.jvp(lambda y: both(f, X, y), (V,), (X,)),
    "linearize": lambda f: fg.linearize(lambda x: both(f, x, V), X)[1](V),
    "jacfwd": lambda f: fg.jacfwd(lambda x: both(f, x, V * x))(X),
    "jacrev": lambda f: fg.jacrev(lambda x: both(f, x, V * x))(X),
    "jvp of jvp": lambda f: fg.jvp(lambda x: fg.jvp(lambda x: both(f, x, V), (x,), (x * V,))[1], (X,), (V,)),
    "grad of jvp": lambda f: fg.grad(lambda x: fg.jvp(lambda x: both(f, x, V), (x,), (V,))[1].sum())(X),
    "grad of grad": lambda f: fg.grad(lambda x: (fg.grad(lambda x: loss(f, x, V * x))(x) * V).sum())(X),
    "jacfwd of jacfwd": lambda f: fg.jacfwd(fg.jacfwd(lambda x: both(f, x, V * x)))(X),
    "hessian": lambda f: fg.hessian(lambda x: loss(f, x, V * x))(X),
    "hvp of remat": lambda f: fg.hvp(lambda x: fg.remat(lambda x: loss(f, x, V * x))(x), (X,), (V,)),
    "third order": lambda f: fg.jacrev(fg.hessian(lambda x: loss(f, x, V * x)))(X),
    "vmap": lambda f: fg.vmap(lambda x: f({"x": x, "y": V}, N))(XV),
    "vmap of jvp": lambda f: fg.vmap(lambda t: fg.jvp(lambda x: both(f, x, V), (X,), (t,))[1])(XV),
    "jvp of vmap": lambda f: fg.jvp(
        lambda x, v: fg.vmap(lambda x, v: both(f, x, v), in_dims=(1, None))(x, v), (XV.T, V), (XV.T, X)
    ),
    "jvp of what vmap shares": lambda f: fg.jvp(
        lambda v: fg.vmap(lambda x, v: both(f, x, v), in_dims=(1, None))(XV.T, v), (V,), (X,)
    ),
    "vmap of grad": lambda f: fg.vmap(fg.grad(lambda x, v: loss(f, x, v), argnums=(0, 1)), in_dims=(0, None))(XV, V),
    "grad of vmap": lambda f: fg.grad(
        lambda x, v: (fg.vmap(lambda x, v: both(f, x, v), in_dims=(1, None))(x, v) ** 2).sum(), argnums=(0, 1)
    )(XV.T, V),
    "hvp of scan": lambda f: fg.hvp(lambda x: fg.scan(lambda c, v: (both(f, c, v), c), x, XV)[1].sum(), (X,), (V,)),
}


@pytest.mark.parametrize("stack", STACKS)
def test_custom_jvp_with_the_true_rule_changes_nothing(stack):
    expected = STACKS[stack](plain)
    assert tree.allclose(STACKS[stack](custom), expected, **CLOSE)
    assert tree.allclose(fg.jit(lambda: STACKS[stack](custom), backend="aten")(), expected, **CLOSE)


@pytest.mark.parametrize("stack", ["value", "grad", "jvp", "hvp of remat", "vmap of grad", "jvp of vmap"])
def test_custom_jvp_traces_under_torch_compile(stack):
    torch._dynamo.reset()
    compiled = torch.compile(lambda: STACKS[stack](custom), fullgraph=True, backend="aot_eager")()
    assert tree.allclose(compiled, STACKS[stack](plain), **CLOSE)


@fg.custom_jvp
def softplus(x):
    return torch.log1p(torch.exp(x))


softplus.defjvps(lambda t, out, x: (1 - torch.exp(-out)) * t)  # d/dx log(1 + e^x) = 1 - e^-out


def test_custom_jvp_under_inductor():
    found = fg.jit(fg.vmap(fg.grad(lambda x: softplus(x).sum())))(XV)
    assert tree.allclose(found, torch.sigmoid(XV), **CLOSE)


def test_custom_jvp_keeps_the_derivative_finite_where_plain_rules_do_not():
    x = torch.tensor(1000.0, dtype=F64)
    naive = torch.func.grad(lambda x: torch.log1p(torch.exp(x)))
    assert not naive(x).isfinite()
    assert (fg.grad(softplus)(x), fg.jvp(softplus, (x,), (torch.ones_like(x),))[1]) == (1, 1)


def test_custom_jvp_rule_is_the_one_used_in_both_modes_and_at_every_order():
    f = fg.custom_jvp(torch.sin)
    f.defjvps(lambda t, out, x: 2 * torch.cos(x) * t)
    x, one = torch.tensor(0.3, dtype=F64), torch.ones((), dtype=F64)
    assert tree.allclose(fg.jvp(f, (x,), (one,))[1], 2 * x.cos(), **CLOSE)
    assert tree.allclose(fg.grad(f)(x), 2 * x.cos(), **CLOSE)
    second = -2 * x.sin()  # the derivative of what the rule computes
    assert tree.allclose(fg.grad(fg.grad(f))(x), second, **CLOSE)
    assert tree.allclose(fg.jvp(lambda x: fg.jvp(f, (x,), (one,))[1], (x,), (one,))[1], second, **CLOSE)


def test_custom_jvp_plain_autograd_follows_the_rule_twice():
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(both(custom, x, V).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert tree.allclose((first, second), (V * X.cos(), -V * X.sin()), **CLOSE)


def test_custom_jvp_missing_tangents_are_zeros():
    seen = []

    @fg.custom_jvp
    def product(x, y):
        return x * y

    @product.defjvp
    def rule(primals, tangents):
        seen.append(tangents)
        (x, y), (tx, ty) = primals, tangents
        return x * y, tx * y + x * ty

    assert tree.allclose(fg.jvp(lambda x: product(x, V), (X,), (X,))[1], X * V, **CLOSE)
    assert all(isinstance(t, torch.Tensor) and t.shape == (3,) for t in seen[0])


def test_custom_jvp_defjvps_sums_over_arguments():
    f = fg.custom_jvp(lambda x, y, n: {"s": x * y, "d": x - y})
    f.defjvps(lambda t, out, x, y, n: {"s": t * y, "d": t}, lambda t, out, x, y, n: {"s": x * t, "d": -t}, None)
    found = fg.jvp(lambda x, y: f(x, y, 3), (X, V), (V, X))[1]
    assert tree.allclose(found, {"s": V * V + X * X, "d": V - X}, **CLOSE)


def test_custom_jvp_results_that_are_no_tensors_have_no_tangent():
    f = fg.custom_jvp(lambda x: {"y": 2 * x, "note": "text", "count": 3})
    f.defjvp(lambda p, t: (f(*p), {"y": 2 * t[0], "note": None, "count": 0}))
    out, moved, aux = fg.jvp(lambda x: (f(x)["y"], f(x)), (X,), (V,), has_aux=True)
    assert (aux["note"], aux["count"]) == ("text", 3)
    assert tree.allclose((out, moved), (2 * X, 2 * V), **CLOSE)


def test_custom_jvp_static_arguments_come_first_in_the_rule():
    @functools.partial(fg.custom_jvp, nondiff_argnums=(0, 2))
    def apply(g, x, n):
        return g(x) * n

    @apply.defjvp
    def rule(g, n, primals, tangents):
        return g(*primals) * n, 10 * n * tangents[0]

    assert tree.allclose(fg.grad(lambda x: apply(torch.sin, x, 3).sum())(X), torch.full((3,), 30.0, dtype=F64))
    with pytest.raises(TypeError, match="expected defjvp where nondiff_argnums are given"):
        apply.defjvps(None)


def test_custom_jvp_may_close_over_mapped_tensors():
    def f(w, x):
        product = fg.custom_jvp(lambda x: w * x)
        product.defjvps(lambda t, out, x: 3 * w * t)
        return product(x)

    assert tree.allclose(fg.vmap(lambda w: fg.grad(lambda x: f(w, x))(X[0]))(V), 3 * V, **CLOSE)
    for derivative in (lambda: fg.grad(lambda w: f(w, X[0]))(V[0]), lambda: fg.jvp(lambda w: f(w, X), (V,), (V,))):
        with pytest.raises(ValueError, match="a tensor that the function closes over"):
            derivative()


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        (lambda p, t: t[0], TypeError, r"the rule to return \(out, tangent_out\), got Tensor"),
        (lambda p, t: (p[0], t[0][:2]), ValueError, r"tangent_out: expected \(3,\) torch.float64, got \(2,\)"),
        (lambda p, t: (p[0], t[0].float()), ValueError, "tangent_out: expected .* got .* torch.float32"),
        (lambda p, t: (p[0], {"a": t[0]}), ValueError, "tangent_out: expected the structure .* a leaf at 'a'"),
    ],
    ids=["no pair", "shape", "dtype", "structure"],
)
def test_custom_jvp_wrong_rules_are_errors(rule, kind, message):
    f = fg.custom_jvp(lambda x: 1 * x)
    f.defjvp(rule)
    with pytest.raises(kind, match=message):
        fg.jvp(f, (X,), (V,))


def test_custom_jvp_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"given by plain.defjvp\(rule\), got none"):
        fg.custom_jvp(plain)({"x": X, "y": V}, N)
