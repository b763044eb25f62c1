"""custom_vjp: a rule that is the derivative changes nothing under any transform; one that is not is seen to be used."""

import functools
import weakref
from typing import Any, NamedTuple

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


def plain(p, n, y=None):
    return {"a": torch.sin(p["x"]) * p["y"], "n": n + 1}


@fg.custom_vjp
def custom(p, n, y=None):
    return plain(p, n)


def custom_fwd(p, n, y):
    return custom(p, n), (torch.cos(p["x"]), torch.sin(p["x"]), p["y"], "not a tensor", n)


def custom_bwd(residuals, cotangent):
    cos, sin, y, note, _ = residuals
    if note != "not a tensor" or cotangent["n"] is not None:
        raise AssertionError("expected residuals of any kind, and no cotangent of an integer")
    return {"x": cos * cotangent["a"] * y, "y": sin * cotangent["a"]}, None, None


custom.defvjp(custom_fwd, custom_bwd)


def both(f, x, y):
    return f({"x": x, "y": y}, N)["a"]


def loss(f, x, y):
    return (both(f, x, y) ** 2).sum()


STACKS = {
    "value": lambda f: f({"x": X, "y": V}, N),
    "keywords": lambda f: f({"x": X, "y": V}, y=None, n=N),
    "grad": lambda f: fg.grad(lambda p: (f(p, N)["a"] ** 2).sum())({"x": X, "y": V}),
    "vjp": lambda f: fg.vjp(lambda x: both(f, x, V), X)[1](V),
    "jacrev": lambda f: fg.jacrev(lambda x: both(f, x, V * x))(X),
    "grad of grad": lambda f: fg.grad(lambda x: (fg.grad(lambda x: loss(f, x, V * x))(x) * V).sum())(X),
    "jacrev of jacrev": lambda f: fg.jacrev(fg.jacrev(lambda x: both(f, x, V)))(X),
    "hessian": lambda f: fg.hessian(lambda x: loss(f, x, V * x))(X),
    "hvp": lambda f: fg.hvp(lambda x: loss(f, x, V * x), (X,), (V,)),
    "third order": lambda f: fg.jacrev(fg.hessian(lambda x: loss(f, x, V * x)))(X),
    "vmap": lambda f: fg.vmap(lambda x: f({"x": x, "y": V}, N))(XV),
    "vmap of vmap": lambda f: fg.vmap(fg.vmap(lambda x, v: both(f, x, v), in_dims=(0, None)), in_dims=(None, 0))(X, V),
    "vmap of grad": lambda f: fg.vmap(fg.grad(lambda x, v: loss(f, x, v), argnums=(0, 1)), in_dims=(0, None))(XV, V),
    "grad of vmap": lambda f: fg.grad(
        lambda x, v: (fg.vmap(lambda x, v: both(f, x, v), in_dims=(1, None))(x, v) ** 2).sum(), argnums=(0, 1)
    )(XV.T, V),
    "hessian of vmap": lambda f: fg.hessian(
        lambda v: (fg.vmap(lambda x, v: both(f, x * v, v), in_dims=(1, None))(XV.T, v) ** 2).sum()
    )(V),
    "grad of remat": lambda f: fg.grad(lambda x: fg.remat(lambda x: loss(f, x, V * x))(x))(X),
    "remat of grad": lambda f: fg.grad(lambda x: (fg.remat(fg.grad(lambda x: loss(f, x, V)))(x) * V).sum())(X),
    "grad of scan": lambda f: fg.grad(
        lambda x, v: fg.scan(lambda c, _: (both(f, c, v), c), x, length=3)[1].sum(), argnums=(0, 1)
    )(X, V),
}


@pytest.mark.parametrize("stack", STACKS)
def test_custom_vjp_with_the_true_rule_changes_nothing(stack):
    expected = STACKS[stack](plain)
    assert tree.allclose(STACKS[stack](custom), expected, **CLOSE)
    assert tree.allclose(fg.jit(lambda: STACKS[stack](custom), backend="aten")(), expected, **CLOSE)


@pytest.mark.parametrize("stack", ["value", "grad", "grad of grad", "hvp", "vmap of grad", "grad of vmap"])
def test_custom_vjp_traces_under_torch_compile(stack):
    torch._dynamo.reset()
    compiled = torch.compile(lambda: STACKS[stack](custom), fullgraph=True, backend="aot_eager")()
    assert tree.allclose(compiled, STACKS[stack](plain), **CLOSE)


def test_custom_vjp_that_closes_over_a_tensor_is_an_error_under_torch_compile():
    torch._dynamo.reset()
    f = fg.custom_vjp(lambda x: V * x)
    f.defvjp(lambda x, w=V: (w * x, None), lambda _, c: (c,))
    with pytest.raises(Exception, match=r"to close over no tensor under torch\.compile"):
        torch.compile(f, fullgraph=True, backend="aot_eager")(X)


def swish(x):
    return x * torch.sigmoid(x)


@fg.custom_vjp
def lean_swish(x):
    return swish(x)


def lean_swish_bwd(x, cotangent):
    s = torch.sigmoid(x)
    return (cotangent * s * (1 + x * (1 - s)),)


lean_swish.defvjp(lambda x: (swish(x), x), lean_swish_bwd)


def test_custom_vjp_under_inductor():
    step = fg.vmap(fg.grad(lambda x: lean_swish(x).sum()))
    assert tree.allclose(fg.jit(step)(XV), fg.vmap(fg.grad(lambda x: swish(x).sum()))(XV), **CLOSE)


def test_custom_vjp_rule_is_the_one_used_at_every_order():
    @fg.custom_vjp
    def twice(x):
        return x.sin()

    twice.defvjp(lambda x: (x.sin(), x.cos()), lambda cos, g: (2 * g * cos,))
    x = torch.tensor(0.3, dtype=F64)
    assert tree.allclose(fg.grad(twice)(x), 2 * x.cos(), **CLOSE)
    assert tree.allclose(fg.grad(fg.grad(twice))(x), -2 * x.sin(), **CLOSE)  # the derivative of what bwd computes
    square = fg.grad(lambda x: fg.grad(lambda x: twice(x) ** 2)(x))  # d/dx 4 sin cos, with d sin = 2 cos by the rule
    assert tree.allclose(square(x), 8 * x.cos() ** 2 - 4 * x.sin() ** 2, **CLOSE)
    forward = fg.jvp(fg.grad(lambda x: twice(x) ** 2), (x,), (torch.ones((), dtype=F64),))[1]
    assert tree.allclose(forward, square(x), **CLOSE)


def test_custom_vjp_plain_autograd_follows_the_rule_twice():
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(both(custom, x, V).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert tree.allclose((first, second), (V * X.cos(), -V * X.sin()), **CLOSE)


def test_custom_vjp_outer_leaf_gets_its_mixed_derivative():
    w = V.clone().requires_grad_()
    fg.grad(lambda x: both(custom, x, w).sum())(X).sum().backward()  # cos(x) w
    assert tree.allclose(w.grad, X.cos(), **CLOSE)


def test_custom_vjp_runs_fun_where_nothing_is_differentiated():
    ran = []

    @fg.custom_vjp
    def f(x):
        ran.append("fun")
        return 2 * x

    def fwd(x):
        ran.append("fwd")
        return 2 * x, None

    f.defvjp(fwd, lambda _, g: (2 * g,))
    f(X)
    fg.vmap(f)(X)
    fg.grad(lambda x: f(x).sum())(X)
    assert ran == ["fun", "fun", "fwd"]


def test_custom_vjp_static_arguments_come_first_in_bwd_in_order():
    seen: list[Any] = []

    @functools.partial(fg.custom_vjp, nondiff_argnums=(2, 0))
    def f(g, x, n):
        return g(x) * n

    def bwd(g, n, x, cotangent):
        seen.append((g, n))
        return (cotangent * n * torch.cos(x),)

    f.defvjp(lambda g, x, n: (g(x) * n, x), bwd)
    assert tree.allclose(fg.grad(lambda x: f(torch.sin, x, n=3).sum())(X), 3 * X.cos(), **CLOSE)
    assert seen == [(torch.sin, 3)]


def test_custom_vjp_static_function_may_close_over_mapped_tensors():
    @functools.partial(fg.custom_vjp, nondiff_argnums=0)
    def apply(g, x):
        return g(x)

    apply.defvjp(lambda g, x: (g(x), None), lambda g, _, c: (10 * g(c),))
    found = fg.vmap(lambda w: fg.grad(lambda x: apply(lambda x: w * x, x))(X[0]))(V)
    assert tree.allclose(found, 10 * V, **CLOSE)


def test_custom_vjp_fwd_and_bwd_may_close_over_mapped_tensors():
    def f(w, x):
        @fg.custom_vjp
        def product(x):
            return w * x

        product.defvjp(lambda x: (w * x, None), lambda _, c: (3 * w * c,))
        return product(x)

    found = fg.vmap(lambda w: fg.grad(lambda x: f(w, x))(X[0]))(V)
    assert tree.allclose(found, 3 * V, **CLOSE)
    assert tree.allclose(fg.vmap(lambda w: f(w, X[0]))(V), V * X[0], **CLOSE)


def test_custom_vjp_derivative_of_bwd_reaches_what_it_closes_over():
    def f(w, x):
        @fg.custom_vjp
        def identity(x):
            return x

        identity.defvjp(lambda x: (x, None), lambda _, c: (w * c,))
        return identity(x)

    mixed = fg.grad(lambda w: fg.grad(lambda x: f(w, x) ** 2)(X[0]))(V[0])  # d/dw of 2 w x
    assert tree.allclose(mixed, 2 * X[0], **CLOSE)
    assert fg.grad(lambda w: f(w, X[0]))(V[0]) == 0  # the value does not depend on it


class Pair(NamedTuple):
    left: Any
    right: Any


def test_custom_vjp_takes_and_returns_any_tree():
    @fg.custom_vjp
    def swap(pair, rest):
        return {"pair": Pair(pair.right, pair.left), "rest": [None, rest["k"] * 2.0]}

    def bwd(residuals, g):
        return Pair(g["pair"].right, 5 * g["pair"].left), {"k": 7 * g["rest"][1], "none": None}

    swap.defvjp(lambda pair, rest: (swap(pair, rest), {}), bwd)

    def total(pair, k):
        out = swap(pair, {"k": k, "none": None})
        return (out["pair"].left * V).sum() + (out["pair"].right * X).sum() + out["rest"][1]

    found = fg.grad(total, argnums=(0, 1))(Pair(X, V), X[0])
    expected = Pair(X, 5 * V), torch.tensor(7.0, dtype=F64)
    assert tree.allclose(found, expected, **CLOSE)


@pytest.mark.parametrize("zero", [None, 0, torch.zeros(3, dtype=F64)], ids=["None", "0", "tensor"])
def test_custom_vjp_cotangent_may_be_none_or_zero(zero):
    @fg.custom_vjp
    def first(x, y):
        return x * y

    first.defvjp(lambda x, y: (x * y, y), lambda y, c: (c * y, zero))
    found = fg.grad(lambda x, y: first(x, y).sum(), argnums=(0, 1))(X, V)
    assert tree.allclose(found, (V, torch.zeros(3, dtype=F64)), **CLOSE)


def test_custom_vjp_output_returned_twice_keeps_both_cotangents():
    def fwd(x):
        y = 1 * x
        return (y, y, x), y

    copy = fg.custom_vjp(lambda x: fwd(x)[0])
    copy.defvjp(fwd, lambda _, c: (c[0] + 10 * c[1] + 100 * c[2],))
    found = fg.grad(lambda x: sum((a * b).sum() for a, b in zip(copy(x), (1.0, 2.0, 3.0), strict=True)))(X)
    assert tree.allclose(found, torch.full((3,), 321.0, dtype=F64), **CLOSE)


def test_custom_vjp_python_numbers_are_constants():
    @fg.custom_vjp
    def scale(x, factor):
        return x * factor

    scale.defvjp(lambda x, factor: (x * factor, factor), lambda factor, c: (factor * c, None))
    assert tree.allclose(fg.grad(lambda x: scale(x, 2.5).sum())(X), torch.full((3,), 2.5, dtype=F64), **CLOSE)
    jitted = fg.jit(fg.grad(lambda x, factor: scale(x, factor).sum()), backend="aten")
    assert tree.allclose(jitted(X, 2.5), torch.full((3,), 2.5, dtype=F64), **CLOSE)
    assert tree.allclose(jitted(X, 4.0), torch.full((3,), 4.0, dtype=F64), **CLOSE)  # traced, not baked in


def test_custom_vjp_symbolic_zeros_tell_what_is_differentiated():
    seen: list[Any] = []

    @fg.custom_vjp
    def f(x, y):
        return x * y, x + y

    def fwd(x, y):
        seen.append((x.perturbed, y.perturbed))
        return (x.value * y.value, x.value + y.value), (x.value, y.value)

    def bwd(residuals, cotangent):
        seen.append(isinstance(cotangent[1], fg.SymbolicZero) and cotangent[1].shape)
        x, y = residuals
        return cotangent[0] * y, cotangent[0] * x

    f.defvjp(fwd, bwd, symbolic_zeros=True)
    assert tree.allclose(fg.grad(lambda x: f(x, V)[0].sum())(X), V, **CLOSE)
    assert seen == [(True, False), (3,)]


def test_custom_vjp_keeps_no_copy_of_a_residual_that_is_an_argument():
    saved: list[torch.Tensor] = []
    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lean_swish(x)
    assert [t.data_ptr() for t in saved] == [x.data_ptr()]


def test_custom_vjp_keeps_no_argument_for_a_mask():
    @fg.custom_vjp
    def relu(x):
        return x.clamp(min=0)

    relu.defvjp(lambda x: (x.clamp(min=0), x > 0), lambda mask, c: (c * mask,))
    leaf = X.clone().requires_grad_()
    x = leaf + 0
    y = relu(x)
    alive = weakref.ref(x)
    del x
    assert alive() is None
    assert tree.allclose(torch.autograd.grad(y.sum(), leaf)[0], (X > 0).to(F64), **CLOSE)


@pytest.mark.parametrize(
    "program",
    [
        lambda: fg.jvp(lean_swish, (X,), (V,)),
        lambda: fg.jacfwd(lean_swish)(X),
        lambda: fg.grad(lambda x: fg.jvp(lean_swish, (x,), (V,))[1].sum())(X),
        lambda: fg.jvp(fg.vmap(lean_swish), (XV,), (XV,)),
        lambda: fg.jit(lambda x: fg.jvp(lean_swish, (x,), (V,)), backend="aten")(X),
    ],
    ids=["jvp", "jacfwd", "grad of jvp", "jvp of vmap", "jit of jvp"],
)
def test_custom_vjp_forward_mode_is_an_error_that_offers_custom_jvp(program):
    with pytest.raises(TypeError, match=r"forward-mode differentiation \(jvp\) to lean_swish.*use custom_jvp"):
        program()


def ruled(bwd, fwd=None):
    f = fg.custom_vjp(lambda p, y: (p["w"] * y).sum())
    f.defvjp(fwd or (lambda p, y: ((p["w"] * y).sum(), (p["w"], y))), bwd)
    return fg.grad(lambda p: f(p, V))({"w": X})


@pytest.mark.parametrize(
    ("bwd", "message"),
    [
        (lambda r, c: {"w": c * r[1]}, "a tuple of 2 cotangents, got dict"),
        (lambda r, c: ({"w": c * r[1]},), "a tuple of 2 cotangents, got 1"),
        (lambda r, c: ({"v": c * r[1]}, None), "argument 0: expected the structure .* got a leaf at 'v'"),
        (lambda r, c: ({}, None), "argument 0: expected a leaf, or None, at 'w'"),
        (lambda r, c: ({"w": c}, None), r"argument 0: expected \(3,\) torch.float64 at 'w', got \(\)"),
        (lambda r, c: ({"w": (c * r[1]).float()}, None), "argument 0: expected .* at 'w', got .* torch.float32"),
        (lambda r, c: (None, c), r"argument 1: expected \(3,\) torch.float64, got \(\)"),
    ],
    ids=["no tuple", "too few", "unknown", "missing", "shape", "dtype", "bare"],
)
def test_custom_vjp_wrong_cotangents_are_errors_that_name_argument_and_path(bwd, message):
    with pytest.raises(ValueError, match=message):
        ruled(bwd)


def test_custom_vjp_fwd_must_return_a_pair():
    with pytest.raises(TypeError, match=r"expected fwd to return \(out, residuals\), got Tensor"):
        ruled(lambda r, c: (None, None), fwd=lambda p, y: p["w"].sum())


def test_custom_vjp_residual_that_hides_a_tensor_is_an_error():
    f = fg.custom_vjp(torch.sin)
    f.defvjp(lambda x: (torch.sin(x), {"pull": fg.vjp(torch.sin, x)[1]}), lambda r, c: r["pull"](c))
    with pytest.raises(TypeError, match="residuals in a tree, got function at 'pull'"):
        fg.grad(f)(X[0])


def test_custom_vjp_without_a_rule_is_an_error():
    with pytest.raises(ValueError, match=r"given by plain.defvjp\(fwd, bwd\), got none"):
        fg.custom_vjp(plain)({"x": X, "y": V}, N)


def test_custom_vjp_arguments_are_checked():
    f = fg.custom_vjp(plain, nondiff_argnums=(1,))
    f.defvjp(custom_fwd, custom_bwd)
    with pytest.raises(TypeError, match=r"no tensors in argument 1 \(nondiff_argnums\)"):
        f({"x": X, "y": V}, N)
    with pytest.raises(TypeError, match="expected argument 'n', got none"):
        f({"x": X, "y": V})
    with pytest.raises(TypeError, match="got keyword 'z'"):
        f({"x": X, "y": V}, 1, z=2)
    with pytest.raises(ValueError, match=r"nondiff_argnums to be ints >= 0, got \(-1,\)"):
        fg.custom_vjp(plain, nondiff_argnums=(-1,))


def test_custom_vjp_derivative_of_a_closed_over_tensor_is_an_error():
    def f(w, x):
        product = fg.custom_vjp(lambda x: w * x)
        product.defvjp(lambda x: (w * x, w), lambda w, c: (w * c,))
        return product(x)

    assert tree.allclose(fg.grad(lambda x: f(V[0], x))(X[0]), V[0], **CLOSE)
    with pytest.raises(ValueError, match="a tensor that the function closes over"):
        fg.grad(lambda w: f(w, X[0]))(V[0])


def test_custom_vjp_keeps_the_name_and_the_docstring():
    @fg.custom_vjp
    def documented(x):
        """What it does."""
        return x

    assert (documented.__name__, documented.__doc__) == ("documented", "What it does.")
