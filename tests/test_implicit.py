"""custom_root and custom_linear_solve against closed forms, with solvers that have no derivatives of their own."""

import pytest
import torch

import functorch_gen as fg
from functorch_gen import tree

F64 = torch.float64
A = torch.tensor([[3.0, 0.5, 0.2], [0.1, 2.0, 0.3], [-0.4, 0.2, 4.0]], dtype=F64)
B = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
V = torch.tensor([0.3, 0.2, -0.7], dtype=F64)
CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # the solvers stop at rounding; matrices of condition 3


def richardson(matvec, b):
    """x <- x + (b - A x) / 4, for eigenvalues between 0 and 8; cut off from every derivative."""

    def step(x, _):
        return tree.map(lambda x, b, ax: fg.stop_gradient(x + (b - ax) / 4), x, b, matvec(x)), None

    return fg.scan(step, tree.zeros_like(b), length=60)[0]


def newton(f, x):
    """On a function of each coordinate alone; cut off from every derivative."""

    def step(x, _):
        value, slope = fg.jvp(f, (x,), (torch.ones_like(x),))
        return fg.stop_gradient(x - value / slope), None

    return fg.scan(step, x, length=30)[0]


def linear(a, b):
    return fg.custom_linear_solve(lambda x: {"x": a @ x["x"]}, {"x": b}, richardson, richardson)["x"]


def symmetric(a, b):
    gram = (a + a.mT) / 2
    return fg.custom_linear_solve(lambda x: gram @ x, b, richardson, symmetric=True)


def root(a, b):
    """x^3 + x = A b."""
    return fg.custom_root(
        lambda x: x**3 + x - a @ b, torch.zeros_like(b), newton, lambda g, y: y / g(torch.ones_like(y))
    )


def root_by_solve(a, b):
    return fg.custom_root(
        lambda x: x**3 + x - a @ b,
        torch.zeros_like(b),
        newton,
        lambda g, y: fg.custom_linear_solve(g, y, lambda g, y: y / g(torch.ones_like(y)), symmetric=True),
    )


def cardano(a, b):
    half = (a @ b) / 2
    rest = torch.sqrt(half**2 + 1 / 27)
    return sum(torch.sign(z) * z.abs() ** (1 / 3) for z in (half + rest, half - rest))


# The inverse, as derivatives of torch.linalg.solve's forward mode lack a term (pytorch#192540).
CASES = {
    "linear": (linear, lambda a, b: torch.linalg.inv(a) @ b),
    "symmetric": (symmetric, lambda a, b: torch.linalg.inv((a + a.mT) / 2) @ b),
    "root": (root, cardano),
    "root by solve": (root_by_solve, cardano),
}


def loss(f, a, b):
    return (f(a, b) ** 2).sum()


STACKS = {
    "value": lambda f: f(A, B),
    "grad": lambda f: fg.grad(lambda a, b: loss(f, a, b), argnums=(0, 1))(A, B),
    "jvp": lambda f: fg.jvp(f, (A, B), (A * A, V)),
    "jvp of b": lambda f: fg.jvp(lambda b: f(A, b), (B,), (V,)),
    "hessian": lambda f: fg.hessian(lambda a: loss(f, a, B))(A),
    "jacrev of jacrev": lambda f: fg.jacrev(fg.jacrev(lambda b: loss(f, A, b)))(B),
    "jacfwd of jacfwd": lambda f: fg.jacfwd(fg.jacfwd(lambda b: loss(f, A * (1 + b**2 / 10), b)))(B),
    "third order": lambda f: fg.jacrev(fg.hessian(lambda b: loss(f, A, b)))(B),
    "vmap of b": lambda f: fg.vmap(f, in_dims=(None, 0))(A, torch.stack([B, V])),
    "vmap of A": lambda f: fg.vmap(f, in_dims=(2, None))(torch.stack([A, 1.1 * A], 2), B),
    "vmap of grad": lambda f: fg.vmap(fg.grad(lambda a, b: loss(f, a, b), argnums=(0, 1)), in_dims=(None, 0))(
        A, torch.stack([B, V])
    ),
    "grad of vmap": lambda f: fg.grad(lambda a, b: (fg.vmap(f, in_dims=(None, 0))(a, b) ** 2).sum(), argnums=(0, 1))(
        A, torch.stack([B, V])
    ),
    "hvp of remat": lambda f: fg.hvp(lambda b: fg.remat(lambda b: loss(f, A, b))(b), (B,), (V,)),
    "grad of scan": lambda f: fg.grad(lambda b: fg.scan(lambda c, _: (f(A, c), c), b, length=3)[1].sum())(B),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stack", STACKS)
def test_implicit_derivatives_are_those_of_the_closed_form(case, stack):
    program, closed_form = CASES[case]
    assert tree.allclose(STACKS[stack](program), STACKS[stack](closed_form), **CLOSE)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stack", ["value", "grad", "jvp", "vmap of grad", "grad of scan"])
def test_implicit_under_jit(case, stack):
    program, closed_form = CASES[case]
    jitted = fg.jit(lambda: STACKS[stack](program), backend="aten")()
    assert tree.allclose(jitted, STACKS[stack](closed_form), **CLOSE)


def test_custom_root_hessian_under_jit():
    expected = fg.hessian(lambda b: loss(cardano, A, b))(B)
    assert tree.allclose(fg.jit(fg.hessian(lambda b: loss(root, A, b)), backend="aten")(B), expected, **CLOSE)


def test_custom_root_follows_plain_autograd():
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    expected = fg.grad(lambda a, b: loss(cardano, a, b), argnums=(0, 1))(A, B)
    assert tree.allclose(torch.autograd.grad(loss(root, a, b), (a, b)), expected, **CLOSE)


def test_custom_linear_solve_plain_autograd_twice():
    b = B.clone().requires_grad_()
    (first,) = torch.autograd.grad((linear(A, b) ** 3).sum(), b, create_graph=True)
    (second,) = torch.autograd.grad((first * V).sum(), b)
    expected = fg.hessian(lambda b: ((torch.linalg.inv(A) @ b) ** 3).sum())(B) @ V
    assert tree.allclose(second, expected, **CLOSE)


def test_custom_root_solver_may_loop_until_it_converges():
    """2 steps near the root, more from afar: no derivative passes through the loop."""

    def bisect(f, x):
        low, high = x, x + 4.0
        while (high - low).item() > 1e-13:
            middle = (low + high) / 2
            low, high = (middle, high) if f(middle).item() < 0 else (low, middle)
        return (low + high) / 2

    def square_root(a):
        return fg.custom_root(lambda x: x**2 - a, torch.tensor(0.0, dtype=F64), bisect, lambda g, y: y / g(y * 0 + 1))

    a = torch.tensor(3.0, dtype=F64)
    assert tree.allclose(fg.grad(square_root)(a), 0.5 / a.sqrt(), **CLOSE)
    assert tree.allclose(fg.grad(fg.grad(square_root))(a), -0.25 * a**-1.5, **CLOSE)


def test_custom_root_in_a_tree_with_aux():
    """x = (u, v) with u = a v and v^2 = a: u = a^(3/2)."""

    def solve(f, guess):
        return {"u": a * a.sqrt(), "v": a.sqrt()}, {"steps": 7, "residual": torch.zeros(2, dtype=F64)}

    def program(a):
        def f(x):
            return {"u": x["u"] - a * x["v"], "v": x["v"] ** 2 - a}

        def tangent_solve(g, y):  # forward substitution: g is lower triangular in (v, u)
            v = y["v"] / g({"u": y["u"], "v": torch.ones_like(y["v"])})["v"]
            return {"u": y["u"] - g({"u": 0 * v, "v": v})["u"], "v": v}

        return fg.custom_root(f, {"u": one, "v": one}, solve, tangent_solve, has_aux=True)

    a, one = torch.tensor(2.0, dtype=F64), torch.ones((), dtype=F64)
    (x, aux), (moved, of_aux) = fg.jvp(program, (a,), (one,))
    assert tree.allclose((x["u"], moved["u"], moved["v"]), (a**1.5, 1.5 * a**0.5, 0.5 * a**-0.5), **CLOSE)
    assert aux["steps"] == 7
    assert of_aux["residual"].abs().max() == 0


def test_custom_linear_solve_gives_torch_linalg_solve_the_derivatives_it_lacks():
    def solve(matvec, b):
        return torch.linalg.solve(fg.jacfwd(matvec)(torch.zeros_like(b)), b)

    def second(f):
        return fg.jacfwd(fg.jacfwd(lambda a: loss(f, a, B)))(A)

    expected = second(lambda a, b: torch.linalg.inv(a) @ b)
    assert not tree.allclose(second(torch.linalg.solve), expected, rtol=1e-3, atol=1e-3)  # else drop the advice in docs
    found = second(lambda a, b: fg.custom_linear_solve(lambda x: a @ x, b, solve, solve))
    assert tree.allclose(found, expected, **CLOSE)


def test_custom_linear_solve_aux_has_no_derivative():
    def program(b):
        return fg.custom_linear_solve(lambda x: 2 * x, b, lambda mv, b: (b / 2, b.sum()), symmetric=True, has_aux=True)

    (x, aux), (of_x, of_aux) = fg.jvp(program, (B,), (V,))
    assert tree.allclose((x, aux, of_x), (B / 2, B.sum(), V / 2), **CLOSE)
    assert of_aux == 0
    found = fg.grad(lambda b: program(b)[0].sum() + program(b)[1])(B)
    assert tree.allclose(found, torch.full((3,), 0.5, dtype=F64), **CLOSE)


def test_custom_linear_solve_reverse_mode_needs_the_transposed_solve():
    def program(a, b):
        return fg.custom_linear_solve(lambda x: a @ x, b, richardson)

    expected = torch.linalg.inv(A) @ V
    assert tree.allclose(fg.jvp(lambda b: program(A, b), (B,), (V,))[1], expected, **CLOSE)
    with pytest.raises(TypeError, match="expected transpose_solve, or symmetric=True, for reverse mode"):
        fg.grad(lambda b: program(A, b).sum())(B)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: fg.custom_linear_solve(lambda x: x, torch.arange(3), richardson), TypeError, "b: .* got torch.int64"),
        (lambda: fg.custom_linear_solve(lambda x: x, {"b": "?"}, richardson), TypeError, "b: .* got str at 'b'"),
        (lambda: fg.custom_linear_solve(lambda x: x, B, lambda mv, b: b[:2]), ValueError, r"x: expected \(3,\)"),
        (lambda: fg.custom_linear_solve(lambda x: x, B, lambda mv, b: {"x": b}), ValueError, "x: .* structure"),
        (lambda: fg.custom_root(lambda x: x, 1.0, lambda f, x: x.double(), newton), ValueError, "the root: .*float32"),
        (lambda: fg.custom_root(lambda x: x, B, lambda f, x: x, newton, has_aux=True), TypeError, "to return .* aux"),
    ],
    ids=["integer", "string", "shape", "structure", "dtype", "aux"],
)
def test_implicit_errors_name_the_argument(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def direct(a, b):
    def solve(matvec, b):
        return fg.stop_gradient(torch.linalg.inv(fg.jacfwd(matvec)(torch.zeros_like(b))) @ b)

    return fg.custom_linear_solve(lambda x: a @ x, b, solve, solve)


def square_root(a, b):
    def heron(f, x):
        for _ in range(8):
            x = (x + (x**2 - f(x)) / x) / 2
        return fg.stop_gradient(x)

    y = 1 + (a @ b) ** 2
    return fg.custom_root(lambda x: x**2 - y, torch.ones_like(b), heron, lambda g, y: y / g(torch.ones_like(y)))


SHORT = {
    "linear": (direct, lambda a, b: torch.linalg.inv(a) @ b),
    "root": (square_root, lambda a, b: torch.sqrt(1 + (a @ b) ** 2)),
}


@pytest.mark.parametrize("case", SHORT)
def test_implicit_values_under_torch_compile(case):
    torch._dynamo.reset()
    program, closed_form = SHORT[case]
    compiled = torch.compile(lambda a, b: program(a, b), fullgraph=True, backend="aot_eager")
    assert tree.allclose(compiled(A, B), closed_form(A, B), **CLOSE)
    mapped = torch.compile(fg.vmap(program, in_dims=(None, 0)), fullgraph=True, backend="aot_eager")
    assert tree.allclose(mapped(A, torch.stack([B, V]))[1], closed_form(A, V), **CLOSE)


@pytest.mark.parametrize("case", SHORT)
@pytest.mark.parametrize("mode", ["grad", "jvp", "autograd"])
def test_implicit_derivatives_under_torch_compile_are_an_error_that_offers_jit(case, mode):
    """With solvers that cut off every derivative: nothing but the error stands between the user and a zero."""
    torch._dynamo.reset()
    program = SHORT[case][0]
    derivative = {
        "grad": lambda a: fg.grad(lambda a: loss(program, a, B))(a),
        "jvp": lambda a: fg.jvp(lambda a: program(a, B), (a,), (a,)),
        "autograd": lambda a: loss(program, a, B),
    }[mode]
    compiled = torch.compile(derivative, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"expected jit around a derivative, got torch\.compile"):
        compiled(A.clone().requires_grad_(mode == "autograd"))


def test_derivative_of_a_root_finds_the_axis_its_equation_names():
    """Rebuilt in the backward pass, the equation runs where the axis had its name: x = 2 mean(a)."""
    a = torch.tensor([1.0, 3.0], dtype=torch.float64)

    def root(a):
        def f(x):
            return x - 2 * fg.pmean(a, "batch")

        return fg.custom_root(
            f, torch.zeros((), dtype=torch.float64), lambda f, x: x - f(x), lambda g, y: y / g(1 + 0 * y)
        )

    def total(a):
        return fg.vmap(root, axis_name="batch")(a).sum()

    assert total(a) == 8
    torch.testing.assert_close(fg.grad(total)(a), torch.full((2,), 2.0, dtype=torch.float64))


def test_solve_under_autocast_keeps_its_dtypes_in_the_backward_pass():
    a, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.ones(2)

    def solved(a):
        def solve(matvec, b):
            return torch.linalg.solve(a, b)

        return fg.custom_linear_solve(lambda x: (a @ x).float(), b, solve, symmetric=True).sum()

    exact = fg.grad(lambda a: torch.linalg.solve(a, b).sum())(a)
    torch.testing.assert_close(fg.grad(fg.autocast(solved))(a), exact, rtol=0.02, atol=0.01)
