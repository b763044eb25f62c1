"""Collectives over the axis of a vmap: against the same function written over the whole batch, and against JAX."""

import threading

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree

X = torch.tensor([[1.0, 2.0, -0.5], [0.4, -1.2, 0.8], [-0.3, 0.9, 1.5], [0.7, 0.1, -1.1]], dtype=torch.float64)
V = X.flip(0).cos()
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}  # the order of float64 sums


def over(fun, **kwargs):
    return fg.vmap(fun, axis_name="batch", **kwargs)


def named(x):
    total, mean, rows = fg.psum(x * x, "batch"), fg.pmean(x.sin(), "batch"), fg.all_gather(x, "batch")
    return (total.sin() * x).sum() + (mean**2).sum() + ((rows - x) ** 3).sum() * (1 + fg.axis_index("batch"))


def whole(xs):
    """``named`` for all examples at once, without names: (n, d) -> (n,)."""
    total, mean, pairs = (xs * xs).sum(0), xs.sin().mean(0), xs[None, :] - xs[:, None]
    return (total.sin() * xs).sum(1) + (mean**2).sum() + (pairs**3).sum((1, 2)) * (1 + torch.arange(len(xs)))


def summed(xs):
    return whole(xs).sum()


# transform -> (of the function of one example inside the vmap, what it means for the whole)
TRANSFORMS = {
    "value": (named, whole),
    "grad": (fg.grad(named), fg.grad(summed)),
    "grad of grad": (
        fg.grad(lambda x: (fg.grad(named)(x) ** 2).sum()),
        fg.grad(lambda xs: (fg.grad(summed)(xs) ** 2).sum()),
    ),
    "vjp": (lambda x: fg.vjp(named, x)[1](x[0])[0], lambda xs: fg.vjp(whole, xs)[1](xs[:, 0])[0]),
    "jvp": (lambda x: fg.jvp(named, (x,), (x.cos(),))[1], lambda xs: fg.jvp(whole, (xs,), (xs.cos(),))[1]),
    "jvp of jvp": (
        lambda x: fg.jvp(lambda x: fg.jvp(named, (x,), (x.cos(),))[1], (x,), (x.sin(),))[1],
        lambda xs: fg.jvp(lambda xs: fg.jvp(whole, (xs,), (xs.cos(),))[1], (xs,), (xs.sin(),))[1],
    ),
    "linearize": (lambda x: fg.linearize(named, x)[1](x.cos()), lambda xs: fg.jvp(whole, (xs,), (xs.cos(),))[1]),
    "hvp": (lambda x: fg.hvp(named, (x,), (x.cos(),)), lambda xs: fg.hvp(summed, (xs,), (xs.cos(),))),
    "jacrev": (fg.jacrev(named), fg.grad(summed)),
    "jacfwd": (fg.jacfwd(named), lambda xs: fg.jacfwd(whole)(xs).sum(1)),
    "hessian": (fg.hessian(named), lambda xs: fg.hessian(summed)(xs).sum(2)),
    "remat": (fg.grad(fg.remat(named)), fg.grad(summed)),
    "jit": (fg.jit(fg.grad(named), backend="aten"), fg.grad(summed)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_transform_inside_equals_the_whole_batch(transform, compiled):
    inside, meaning = TRANSFORMS[transform]
    mapped = fg.jit(over(inside), backend="aten") if compiled else over(inside)
    for xs in (X, V):
        assert torch.allclose(mapped(xs), meaning(xs), **TOLERANCE)


@pytest.mark.parametrize("outer", [fg.grad, fg.hessian, fg.jacfwd])
def test_transform_outside_equals_the_whole_batch(outer):
    def total(xs):
        return over(named)(xs).sum()

    assert torch.allclose(outer(total)(X), outer(summed)(X), **TOLERANCE)


@pytest.mark.parametrize("transform", ["value", "grad", "grad of grad", "jvp"])
def test_torch_compile_captures_it_whole(transform):
    inside, meaning = TRANSFORMS[transform]
    torch._dynamo.reset()
    mapped = torch.compile(over(inside), fullgraph=True, backend="aot_eager")
    assert torch.allclose(mapped(X), meaning(X), **TOLERANCE)


def test_inductor_compiles_it():
    mapped = fg.jit(over(fg.value_and_grad(named)))
    value, gradient = mapped(X)
    assert torch.allclose(value, whole(X), **TOLERANCE)
    assert torch.allclose(gradient, fg.grad(summed)(X), **TOLERANCE)


def test_gradient_equals_jax():
    """jax 0.10.2, float64: vmap(grad(lambda x: (psum(x*x)*x).sum() + all_gather(x).prod()), axis_name="batch")."""

    def f(x):
        return (fg.psum(x * x, "b") * x).sum() + fg.all_gather(x, "b").prod()

    got = fg.vmap(fg.grad(f), axis_name="b")(X[:2])
    want = [[4.728, 9.024, -0.946], [4.2, 2.88, 2.33]]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.float64), **TOLERANCE)


# What is summed.


def test_psum_of_what_does_not_differ_counts_every_example():
    w = torch.tensor([2.0, 3.0])
    out = over(lambda x: [fg.psum(w, "batch"), fg.psum(1, "batch"), fg.psum(0.5, "batch")], out_dims=None)(X)
    assert tree.equal(out, [4 * w, 4, 2.0])


def test_pmean_of_what_does_not_differ_is_the_same():
    w = torch.tensor([2.0, 3.0])
    assert tree.equal(over(lambda x: fg.pmean([w, 3], "batch"), out_dims=None)(X), [w, 3.0])


def test_all_gather_of_what_does_not_differ_repeats_it():
    w = torch.tensor([2.0, 3.0])
    assert torch.equal(over(lambda x: fg.all_gather(w, "batch"), out_dims=None)(X), torch.stack([w] * 4))


def test_psum_counts_bools_and_keeps_dtypes():
    out = over(lambda x: fg.psum({"above": x > 0, "half": x.bfloat16()}, "batch"), out_dims=None)(X)
    assert torch.equal(out["above"], (X > 0).sum(0))
    assert out["half"].dtype == torch.bfloat16


def test_gradient_of_an_unmapped_argument_counts_every_example():
    got = over(fg.grad(lambda w, x: (fg.psum(w, "batch") * x).sum()), in_dims=(None, 0), out_dims=None)(X[0], X)
    assert torch.allclose(got, X.sum(0), **TOLERANCE)  # W = sum of n copies of w: each receives sum of x


@pytest.mark.parametrize(("collective", "reduce"), [(fg.pmax, torch.amax), (fg.pmin, torch.amin)])
def test_extremes_and_their_gradients_equal_the_whole_batch(collective, reduce):
    got = over(fg.value_and_grad(lambda x: (collective(x * x, "batch") * x).sum()))(X)
    want = (reduce(X * X, 0) * X).sum(1), fg.grad(lambda xs: (reduce(xs * xs, 0) * xs).sum())(X)
    assert tree.allclose(got, want, **TOLERANCE)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("tiled", [False, True])
def test_all_gather_places_the_axis(axis, tiled):
    xs = torch.arange(24.0).reshape(4, 2, 3)
    got = over(lambda x: fg.all_gather(x, "batch", axis=axis, tiled=tiled), out_dims=None)(xs)
    assert torch.equal(got, torch.cat(list(xs), axis) if tiled else torch.stack(list(xs), axis))


def test_all_gather_gradient_is_what_all_examples_give_to_it():
    weights = torch.arange(16.0, dtype=torch.float64).reshape(4, 4).cos()  # (example, copy)
    got = over(fg.grad(lambda x, w: (w * fg.all_gather(x, "batch")).sum()))(X[:, 0], weights)
    assert torch.allclose(got, weights.sum(0), **TOLERANCE)


def test_ppermute_sends_values_and_returns_cotangents():
    perm = [(0, 2), (2, 1), (3, 0)]
    sent = over(lambda x: fg.ppermute(x, "batch", perm))(X)
    assert torch.equal(sent, torch.stack([X[3], X[2], X[0], torch.zeros_like(X[0])]))
    back = over(fg.grad(lambda x, v: (fg.ppermute(x, "batch", perm) * v).sum()))(X, V)
    assert torch.equal(back, torch.stack([V[2], torch.zeros_like(V[0]), V[1], V[0]]))


# Which axis a name means.


def test_names_of_two_axes_and_their_tuple():
    def f(x):
        return {
            "rows": fg.psum(x, "row"),
            "columns": fg.psum(x, "column"),
            "both": fg.psum(x, ("row", "column")),
            "gathered": fg.all_gather(x, ("row", "column")),
            "index": fg.axis_index(("row", "column")),
            "size": fg.axis_size(("row", "column")),
        }

    out = fg.vmap(fg.vmap(f, axis_name="column"), axis_name="row")(X)
    assert torch.equal(out["rows"], X.sum(0).expand(4, 3))
    assert torch.equal(out["columns"], X.sum(1, keepdim=True).expand(4, 3))
    assert torch.allclose(out["both"], X.sum().expand(4, 3), **TOLERANCE)
    assert torch.equal(out["gathered"], X.flatten().expand(4, 3, 12))
    assert torch.equal(out["index"], torch.arange(12).reshape(4, 3))
    assert out["size"] == 12


def test_gradient_between_two_named_axes():
    def f(x):
        return fg.psum(x**2, "row") * fg.psum(x, ("row", "column")) * x

    def row_sum(x):
        return fg.vmap(f, axis_name="column")(x).sum()

    got = fg.vmap(fg.grad(row_sum), axis_name="row")(X)
    want = fg.grad(lambda xs: ((xs**2).sum(0) * xs.sum() * xs).sum())(X)
    assert torch.allclose(got, want, **TOLERANCE)


def test_inner_vmap_of_what_the_named_axis_does_not_differ_in():
    inner = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    out = over(lambda x: fg.vmap(lambda z: fg.psum(z * x[0], "batch") + fg.psum(z, "batch"))(inner))(X)
    assert torch.allclose(out, (inner * X[:, 0].sum() + 4 * inner).expand(4, 3), **TOLERANCE)


def test_innermost_axis_of_a_name_is_meant():
    out = over(over(lambda x: fg.psum(x, "batch"), out_dims=None))(X)
    assert torch.equal(out, X.sum(1))


# Bodies that are run anew under other transforms: their axes go with them.


def with_rules(f):
    g = fg.custom_vjp(f)
    g.defvjp(lambda z: (f(z), z), lambda z, cotangent: (2 * z * cotangent,))
    return g


BODIES = {
    "remat": fg.remat,
    "custom_vjp": with_rules,
    "jit": lambda f: fg.jit(f, backend="aten"),
    "cond": lambda f: lambda z: fg.cond(z >= 0, f, f, z),
    "scan": lambda f: lambda z: fg.scan(lambda c, _: (f(c), None), z, None, length=1)[0],
    "while_loop": lambda f: lambda z: fg.while_loop(lambda s: s[0] < 1, lambda s: (s[0] + 1, f(s[1])), (0, z))[1],
}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
def test_body_below_an_unrelated_vmap_keeps_its_axis(body, compiled):
    inner = torch.arange(4.0, dtype=torch.float64)  # as many as the named axis has: levels alone would not tell
    squares = BODIES[body](lambda z: fg.psum(z * z, "batch"))
    f = over(lambda x: fg.vmap(squares)(inner) + x.sum())
    f = fg.jit(f, backend="aten") if compiled else f
    assert torch.allclose(f(X), 4 * inner**2 + X.sum(1, keepdim=True), **TOLERANCE)


def scanned(x):
    return fg.scan(lambda c, _: ((c + fg.psum(c * x, "batch")).sin(), c), x, None, length=3)[0].sum()


def looped(xs):
    carry = xs
    for _ in range(3):
        carry = (carry + (carry * xs).sum(0)).sin()
    return carry.sum(1)


def looped_sum(xs):
    return looped(xs).sum()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_scan_body_reduces_over_the_axis(compiled, order):
    inside, meaning = {
        0: (scanned, looped),
        1: (fg.grad(scanned), fg.grad(looped_sum)),
        2: (lambda x: fg.hvp(scanned, (x,), (x.cos(),)), lambda xs: fg.hvp(looped_sum, (xs,), (xs.cos(),))),
    }[order]
    mapped = fg.jit(over(inside), backend="aten") if compiled else over(inside)
    assert torch.allclose(mapped(X), meaning(X), **TOLERANCE)


def test_gradient_of_a_scan_outside_its_vmap_in_jit():
    got = fg.jit(fg.grad(lambda xs: over(scanned)(xs).sum()), backend="aten")(X)
    assert torch.allclose(got, fg.grad(looped_sum)(X), **TOLERANCE)


class Squares(torch.autograd.Function):
    """psum in a function of torch's own, without a rule for vmap."""

    generate_vmap_rule = False

    @staticmethod
    def forward(x):
        return fg.psum(x * x, "batch")

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def vmap(info, in_dims, x):
        return Squares.apply(x), 0


def test_rule_of_an_own_function_is_an_error():
    with pytest.raises(RuntimeError, match=r"psum: expected the vmap that names 'batch' to be active.*custom_vjp"):
        over(Squares.apply)(X)


# Errors.


def test_unbound_name_lists_those_that_are_bound():
    with pytest.raises(NameError, match=r"psum: expected a name .* \('row', 'column'\), got 'model'"):
        fg.vmap(fg.vmap(lambda x: fg.psum(x, "model"), axis_name="column"), axis_name="row")(X)
    with pytest.raises(NameError, match=r"binds here \(none\), got 'batch'"):
        named(X[0])


def test_name_is_unbound_after_an_error_and_in_other_threads():
    seen = []

    def look():
        with pytest.raises(NameError):
            fg.axis_size("batch")
        seen.append("unbound")

    def f(x):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        over(f)(X)
    look()
    assert seen == ["unbound", "unbound"]


@pytest.mark.parametrize(
    ("fun", "error", "message"),
    [
        (
            lambda x: fg.psum({"a": [x, "b"]}, "batch"),
            TypeError,
            "psum: expected tensors and numbers, got str at 'a.1'",
        ),
        (lambda x: fg.psum(x, ()), ValueError, r"psum: expected at least one axis name, got \(\)"),
        (lambda x: fg.psum(x, 0), TypeError, "psum: expected axis_name to be a string, got int"),
        (
            lambda x: fg.all_gather({"a": x}, "batch", axis=2),
            ValueError,
            r"axis in \[-2, 2\) for the leaf at 'a', got 2",
        ),
        (lambda x: fg.ppermute(x, "batch", [(0, 1), (2, 1)]), ValueError, r"distinct destinations in \[0, 4\)"),
        (lambda x: fg.ppermute(x, "batch", [(4, 1)]), ValueError, r"distinct sources in \[0, 4\), got \[4\]"),
    ],
    ids=["leaf", "none", "name", "axis", "twice", "range"],
)
def test_mistake_is_named(fun, error, message):
    with pytest.raises(error, match=message):
        over(fun)(X)


def test_vmap_refuses_chunks_of_a_named_axis():
    with pytest.raises(ValueError, match="vmap: expected no chunk_size where the axis has a name, got 2"):
        over(named, chunk_size=2)
    with pytest.raises(TypeError, match="vmap: expected axis_name to be a string, got tuple"):
        fg.vmap(named, axis_name=("a", "b"))
