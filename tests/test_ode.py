"""Solvers against closed solutions: their orders, their derivatives, their errors; divergences and densities."""

import itertools
import math

import pytest
import torch
from scipy.integrate import solve_ivp

from functorch_gen import exact, ode, random, tree
from functorch_gen.transforms import grad, hessian, jacfwd, jacrev, jit, vmap

F64 = torch.float64
ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "rk4": 4, "dopri5": 5}


def number(x: float) -> torch.Tensor:
    return torch.tensor(x, dtype=F64)


def growth(y, t):
    """y' = y cos(t), whose solution is y(0) exp(sin t)."""
    return tree.scale(y, t.cos())


def damped(y, t):
    """A pendulum with friction that grows: no symmetry hides an order."""
    angle, speed = y[..., 0], y[..., 1]
    return torch.stack([speed, -angle.sin() - 0.3 * t * speed], -1)


def slope(errors: list[float]) -> float:
    """log2 of the last quotient, for steps that were halved."""
    return math.log2(errors[-2] / errors[-1])


# Fixed steps.


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_solve_has_the_order_of_its_method(method, order):
    """On a nonlinear system, against an independent solver of order 8."""
    y = torch.tensor([1.0, 0.5], dtype=F64)
    flat = lambda t, y: damped(torch.from_numpy(y), torch.tensor(t)).numpy()
    end = torch.from_numpy(solve_ivp(flat, (0, 3), y.numpy(), method="DOP853", rtol=1e-13, atol=1e-13).y[:, -1])
    errors = []
    for n in (32, 64):
        found = ode.solve(damped, y, torch.linspace(0, 3, n + 1, dtype=F64), method=method)
        errors.append((found - end).norm().item())
    assert slope(errors) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize("method", ORDERS)
def test_a_step_is_the_polynomial_of_its_order(method):
    """On y' = y one step is exp(h) cut off after h^order / order!; only dopri5 has more stages than its order."""
    h, order = 0.3, ORDERS[method]
    found = ode.solve(lambda y, t: y, number(1.0), torch.tensor([0.0, h], dtype=F64), method=method).item()
    expected = sum(h**k / math.factorial(k) for k in range(order + 1))
    expected += h**6 / 600 if method == "dopri5" else 0  # Hairer, Norsett and Wanner 1993, section II.5
    assert found == pytest.approx(expected, rel=1e-14)


def test_solve_runs_backwards_and_along_uneven_times():
    times = torch.tensor([0.0, 0.1, 0.3, 0.35, 0.6, 0.8, 1.0], dtype=F64)
    y = torch.tensor([1.0, -2.0], dtype=F64)
    there = ode.solve(growth, y, times, method="dopri5")
    torch.testing.assert_close(there, y * math.exp(math.sin(1.0)), rtol=1e-7, atol=0)
    torch.testing.assert_close(ode.solve(growth, there, times.flip(0), method="dopri5"), y, rtol=1e-7, atol=0)


def test_solve_returns_the_path_of_a_tree():
    y = {"a": number(1.0), "b": (torch.ones(2, dtype=F64), torch.zeros(3))}
    times = torch.linspace(0, 1, 9, dtype=F64)
    path = ode.solve(growth, y, times, return_path=True)
    expected = times.sin().exp()
    torch.testing.assert_close(path["a"], expected, rtol=1e-5, atol=0)  # h^4 / 100
    torch.testing.assert_close(path["b"][0], expected[:, None].expand(9, 2), rtol=1e-5, atol=0)
    assert path["b"][1].shape == (9, 3)
    assert path["b"][1].dtype == torch.float32
    assert tree.equal(tree.map(lambda x: x[-1], path), ode.solve(growth, y, times))


def test_solve_of_one_time_is_the_identity():
    path = ode.solve(growth, torch.ones(2), torch.zeros(1), return_path=True)
    assert torch.equal(path, torch.ones(1, 2))


def test_solve_gives_f_times_in_the_dtype_of_y():
    seen = []

    def f(y, t):
        seen.append(t.dtype)
        return y

    assert ode.solve(f, torch.ones(2), torch.linspace(0, 1, 3, dtype=F64)).dtype == torch.float32
    assert set(seen) == {torch.float32}


def test_solve_is_differentiated_as_its_steps_are():
    """With respect to y, the times and a closed-over rate, against the same steps written out."""

    def loop(y, times, rate):
        for start, end in itertools.pairwise(times):
            h, middle = end - start, 0.5 * (start + end)
            y = y + h * rate * (y + 0.5 * h * rate * y * start.cos()) * middle.cos()
        return (y**2).sum()

    def solved(y, times, rate):
        return (ode.solve(lambda y, t: rate * y * t.cos(), y, times, method="midpoint") ** 2).sum()

    args = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([0.1, 0.5, 0.7, 1.5], dtype=F64), number(0.8)
    for i in range(3):
        torch.testing.assert_close(grad(solved, i)(*args), grad(loop, i)(*args), rtol=1e-12, atol=0)
        torch.testing.assert_close(jacfwd(solved, i)(*args), grad(loop, i)(*args), rtol=1e-12, atol=0)


def test_solve_is_one_program_whatever_the_number_of_steps():
    sizes = []
    for n in (5, 50):
        lowered = jit(lambda y, times: ode.solve(damped, y, times), backend="aten").lower(
            torch.ones(3, 2), torch.linspace(0, 1, n)
        )
        sizes.append(len(lowered.text().splitlines()))
    assert sizes[0] == sizes[1]


# Adaptive steps.


@pytest.mark.parametrize("rtol", [1e-3, 1e-5, 1e-8, 1e-11], ids=str)
def test_solve_adaptive_errs_by_less_than_its_tolerance(rtol):
    """Every step errs by rtol at most, and errors do not grow here: two units of tolerance for ten steps and more."""
    y, stats = ode.solve_adaptive(growth, torch.ones(2, dtype=F64), 0.0, 2.0, rtol=rtol, atol=1e-14, return_stats=True)
    assert stats.finished
    assert (y / math.exp(math.sin(2.0)) - 1).abs().max() < 2 * rtol


def test_solve_adaptive_takes_more_steps_for_a_smaller_tolerance():
    """With errors of h^5 a step, a tolerance of 1e-5 of the other needs ten times the steps."""
    counts = []
    for rtol in (1e-5, 1e-10):
        _, stats = ode.solve_adaptive(
            growth, torch.ones(1, dtype=F64), 0.0, 20.0, rtol=rtol, atol=1e-14, return_stats=True
        )
        counts.append(stats.accepted.item())
    assert 6 < counts[1] / counts[0] < 14


def test_solve_adaptive_rejects_steps_into_a_front():
    """y' = 1 / width near t = 1, else 0: found, though the steps before were large."""
    front = lambda y, t: torch.exp(-(((t - 1) / 1e-2) ** 2)) + 0 * y
    y, stats = ode.solve_adaptive(front, number(0.0), 0.0, 1.03, rtol=1e-6, atol=1e-8, return_stats=True)
    expected = 0.5e-2 * math.sqrt(math.pi) * (1 + math.erf(3.0))
    assert stats.rejected > 0
    assert y.item() == pytest.approx(expected, abs=1e-6)


def test_solve_adaptive_comes_back():
    y = torch.tensor([1.0, 0.5], dtype=F64)
    there = ode.solve_adaptive(damped, y, 0.0, 3.0, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        ode.solve_adaptive(damped, there, 3.0, 0.0, rtol=1e-10, atol=1e-12), y, rtol=1e-8, atol=1e-8
    )


def test_solve_adaptive_where_there_is_no_way_to_go():
    y, stats = ode.solve_adaptive(growth, torch.ones(2), 0.5, 0.5, return_stats=True)
    assert torch.equal(y, torch.ones(2))
    assert stats.finished
    assert stats.accepted == 0


@pytest.mark.parametrize(
    "f", [growth, lambda y, t: y / 0, lambda y, t: y**2 / y.new_full((), 0.5)], ids=["few", "nan", "pole"]
)
def test_solve_adaptive_is_nan_where_it_does_not_come_to_the_end(f):
    """Too few steps; a slope that is infinite; a solution that is, at t = 1/2."""
    y, stats = ode.solve_adaptive(f, torch.ones(2, dtype=F64), 0.0, 2.0, max_steps=5, return_stats=True)
    assert y.isnan().all()
    assert not stats.finished


def test_solve_adaptive_under_vmap_gives_every_example_its_own_steps():
    rates = torch.tensor([0.1, 1.0, 30.0], dtype=F64)

    def run(rate):
        return ode.solve_adaptive(lambda y, t: -rate * y, number(1.0), 0.0, 1.0, rtol=1e-6, return_stats=True)

    together = vmap(run)(rates)
    for i, rate in enumerate(rates):
        alone = run(rate)
        torch.testing.assert_close(together[0][i], alone[0], rtol=1e-12, atol=0)
        assert together[1].accepted[i] == alone[1].accepted
    assert together[1].accepted[2] > 2 * together[1].accepted[0]


TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def adaptive_loss(rate, y, start, end):
    """y exp(rate (end^2 - start^2) / 2), summed."""
    return ode.solve_adaptive(lambda y, t: rate * t * y, y, start, end, **TIGHT).sum()


def closed_loss(rate, y, start, end):
    return (y * (rate * (end**2 - start**2) / 2).exp()).sum()


ARGUMENTS = number(0.7), torch.tensor([1.0, -0.3], dtype=F64), number(0.2), number(1.3)


@pytest.mark.parametrize("argument", range(4), ids=["rate", "y", "start", "end"])
def test_adjoint_and_variational_derivatives_are_those_of_the_solution(argument):
    """To the solver's tolerance, times the few units that the values are."""
    expected = grad(closed_loss, argument)(*ARGUMENTS)
    torch.testing.assert_close(grad(adaptive_loss, argument)(*ARGUMENTS), expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(jacfwd(adaptive_loss, argument)(*ARGUMENTS), expected, rtol=1e-8, atol=1e-9)


def test_second_derivatives_of_the_adaptive_solution():
    """Forward and reverse mode over the adjoint; the tolerance is the solver's, 1e-6 a step."""
    loss = lambda rate: ode.solve_adaptive(
        lambda y, t: rate * t * y, ARGUMENTS[1], 0.2, 1.3, rtol=1e-6, atol=1e-8
    ).sum()
    expected = hessian(closed_loss)(*ARGUMENTS)
    torch.testing.assert_close(hessian(loss)(ARGUMENTS[0]), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(jacrev(grad(loss))(ARGUMENTS[0]), expected, rtol=1e-5, atol=0)


def test_adjoint_gradient_is_that_of_many_fixed_steps():
    """A nonlinear field with a matrix: discretise, then differentiate."""
    w = 0.8 * random.normal(random.key(0), (2, 2), F64)
    y = random.normal(random.key(1), (3, 2), F64)
    field = lambda w: lambda y, t: torch.tanh(y @ w) - 0.1 * t * y
    adjoint = grad(lambda w, y: (ode.solve_adaptive(field(w), y, 0.0, 1.5, **TIGHT) ** 2).sum(), (0, 1))(w, y)
    times = torch.linspace(0, 1.5, 61, dtype=F64)
    steps = grad(lambda w, y: (ode.solve(field(w), y, times, method="dopri5") ** 2).sum(), (0, 1))(w, y)
    torch.testing.assert_close(adjoint, steps, rtol=1e-8, atol=1e-8)


def test_adaptive_derivatives_under_jit_and_vmap():
    compiled = jit(vmap(grad(adaptive_loss), in_dims=(0, None, None, None)), backend="aten")
    rates = torch.tensor([0.7, 1.4], dtype=F64)
    expected = torch.stack([grad(closed_loss)(rate, *ARGUMENTS[1:]) for rate in rates])
    torch.testing.assert_close(compiled(rates, *ARGUMENTS[1:]), expected, rtol=1e-8, atol=0)


def test_solve_adaptive_takes_numbers_that_jit_traces():
    program = jit(lambda y, end: ode.solve_adaptive(growth, y, 0.0, end, rtol=1e-9), backend="aten")
    for end in (1.0, 2.0):
        expected = torch.full((2,), math.exp(math.sin(end)), dtype=F64)
        torch.testing.assert_close(program(torch.ones(2, dtype=F64), end), expected, rtol=1e-8, atol=0)
    assert program.traces == 1


def test_adaptive_fields_may_close_over_integers():
    index = torch.tensor([1, 0])
    field = lambda w: lambda y, t: w[index] * y
    found = grad(lambda w: ode.solve_adaptive(field(w), torch.ones(2, dtype=F64), 0.0, 1.0, **TIGHT)[0])(
        torch.tensor([0.1, 0.2], dtype=F64)
    )
    torch.testing.assert_close(found, torch.tensor([0.0, math.exp(0.2)], dtype=F64), rtol=1e-9, atol=1e-12)


# Divergences.


def swirl(x: torch.Tensor) -> torch.Tensor:
    """A field without symmetry: (b, 3) -> (b, 3)."""
    w = torch.tensor([[0.5, -1.0, 0.3], [0.7, 0.2, 0.9], [-0.4, 0.6, -0.8]], dtype=x.dtype)
    return torch.tanh(x @ w) * x.flip(1)


def jacobians(x: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.autograd.functional.jacobian(lambda one: swirl(one[None])[0], row) for row in x])


def test_divergence_is_the_trace_of_the_jacobian():
    x = random.normal(random.key(0), (4, 3), F64)
    expected = jacobians(x).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(ode.divergence(swirl, x), expected, rtol=1e-12, atol=1e-12)


def test_divergence_of_images():
    x = random.normal(random.key(0), (2, 1, 3, 2), F64)
    scale = torch.arange(6, dtype=F64).reshape(1, 3, 2)
    found = ode.divergence(lambda x: scale * x**2 + x.sum((1, 2, 3), keepdim=True), x)
    torch.testing.assert_close(found, (2 * scale * x).sum((1, 2, 3)) + 6, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_hutchinson_has_the_mean_and_the_variance_of_its_probes(probe):
    """2 (|S|^2 - sum S_ii^2) and 2 |S|^2, to four standard errors of the mean and of the variance."""
    x, n = random.normal(random.key(1), (1, 3), F64), 20_000
    symmetric = 0.5 * (jacobians(x) + jacobians(x).mT)[0]
    norm, diagonal = (symmetric**2).sum(), (symmetric.diagonal() ** 2).sum()
    variance = 2 * (norm - diagonal) if probe == "rademacher" else 2 * norm
    keys = random.split(random.key(2), n)
    draws = vmap(lambda key: ode.hutchinson_divergence(key, swirl, x, probe=probe)[0])(keys)
    assert abs(draws.mean() - ode.divergence(swirl, x)[0]) < 4 * draws.std() / n**0.5
    squares = (draws - draws.mean()) ** 2
    assert abs(draws.var() - variance) < 4 * squares.std() / n**0.5


def test_hutchinson_averages_its_probes():
    x, n = random.normal(random.key(1), (1, 3), F64), 4000
    spread = [
        vmap(lambda key, m=m: ode.hutchinson_divergence(key, swirl, x, num_probes=m)[0])(
            random.split(random.key(3), n)
        ).var()
        for m in (1, 8)
    ]
    assert (spread[0] / spread[1]).item() == pytest.approx(8, rel=0.15)  # four standard errors, sqrt(2 kurtosis / n)


# Densities.


MEANS, STD = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]], dtype=F64), 0.3
MIXTURE = exact.isotropic_mixture(torch.ones(3, dtype=F64), MEANS, torch.full((3,), STD, dtype=F64))


def standard_normal(x: torch.Tensor) -> torch.Tensor:
    return -0.5 * (x**2 + math.log(2 * math.pi)).flatten(1).sum(1)


def mixture_velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[noise - x | x_t] on the straight path, with r_k the responsibilities and m = sum_k r_k m_k:

    (x_t - (1 - t) m) (t - (1 - t) std^2) / ((1 - t)^2 std^2 + t^2) - m
    """
    t = t[:, None]
    variance = ((1 - t) * STD) ** 2 + t**2
    squared = ((x[:, None] - (1 - t)[:, None] * MEANS) ** 2).sum(-1)
    mean = (-0.5 * squared / variance).softmax(1) @ MEANS
    return (x - (1 - t) * mean) * (t - (1 - t) * STD**2) / variance - mean


@pytest.mark.parametrize(("method", "order"), ORDERS.items())
def test_log_prob_of_a_mixture_errs_by_the_order_of_the_solver(method, order):
    """That of dopri5 falls faster at first: its fifth-order term is small by design."""
    x = MIXTURE.sample(random.key(0), 16)
    errors = []
    for n in (16, 32):
        times = torch.linspace(0, 1, n + 1, dtype=F64)
        found = ode.log_prob(mixture_velocity, x, times, standard_normal, method=method)
        errors.append((found - MIXTURE.log_prob(x)).abs().mean().item())
    assert order - 0.3 < slope(errors) < order + (1.5 if method == "dopri5" else 0.3)


def test_log_prob_by_hutchinson_is_exact_to_its_probes():
    """Unbiased: the mean over keys is the exact one, by four standard errors."""
    x, times = MIXTURE.sample(random.key(0), 3), torch.linspace(0, 1, 9, dtype=F64)
    expected = ode.log_prob(mixture_velocity, x, times, standard_normal)
    keys = random.split(random.key(1), 200)
    draws = vmap(lambda key: ode.log_prob(mixture_velocity, x, times, standard_normal, key=key))(keys)
    assert ((draws.mean(0) - expected).abs() < 4 * draws.std(0) / 200**0.5).all()


def test_log_prob_integrates_to_one():
    """Of a field that is no density's: by the midpoint rule on a grid that holds all of it."""
    velocity = lambda x, t: torch.stack([torch.sin(2 * x[:, 1]) + t * x[:, 0], torch.cos(x[:, 0]) - 0.5 * x[:, 1]], 1)
    axis = (torch.arange(160, dtype=F64) + 0.5) / 8 - 10
    x = torch.cartesian_prod(axis, axis)
    density = ode.log_prob(velocity, x, torch.linspace(0, 1, 21, dtype=F64), standard_normal).exp()
    assert density.sum().item() / 64 == pytest.approx(1, abs=1e-5)  # of the solver, h^4; the grid's is far below


def test_log_prob_returns_the_latent():
    x, times = torch.ones(2, 1, dtype=F64), torch.linspace(0, 1, 11, dtype=F64)
    found, latent = ode.log_prob(lambda x, t: x, x, times, standard_normal, return_latent=True)
    torch.testing.assert_close(latent, math.e * x, rtol=1e-5, atol=0)  # h^4
    torch.testing.assert_close(found, standard_normal(math.e * x) + 1, rtol=1e-5, atol=0)


def test_log_prob_gradient_is_the_score():
    x, times = MIXTURE.sample(random.key(0), 4), torch.linspace(0, 1, 49, dtype=F64)
    found = grad(lambda x: ode.log_prob(mixture_velocity, x, times, standard_normal).sum())(x)
    torch.testing.assert_close(found, MIXTURE.score(x, 1.0, 0.0), rtol=1e-3, atol=1e-3)  # of the solver


def test_log_prob_is_one_program():
    program = jit(lambda x: ode.log_prob(mixture_velocity, x, torch.linspace(0, 1, 5), standard_normal), backend="aten")
    x = MIXTURE.sample(random.key(0), 2)
    expected = ode.log_prob(mixture_velocity, x, torch.linspace(0, 1, 5), standard_normal)
    torch.testing.assert_close(program(x), expected, rtol=1e-10, atol=0)
    assert program.traces == 1


# Errors.

FLAT, PAIRS, TIMES = torch.ones(2), torch.ones(2, 3), torch.linspace(0, 1, 3)
FLOATING = "expected a floating-point tensor, got torch.int64"
KEEP = r"expected f\(y, t\) to keep y"


def probing(**options):
    return ode.hutchinson_divergence(random.key(0), swirl, PAIRS, **options)


ERRORS = {
    "method": (
        lambda: ode.solve(growth, FLAT, TIMES, method="rk5"),
        r"solve: expected method to be one of .*, got 'rk5'",
    ),
    "no time": (
        lambda: ode.solve(growth, FLAT, TIMES[:0]),
        r"solve: times: expected shape \(n,\) with n >= 1, got \(0,\)",
    ),
    "integer times": (lambda: ode.solve(growth, FLAT, torch.arange(3)), f"solve: times: {FLOATING}"),
    "integer y": (lambda: ode.solve(growth, {"n": torch.arange(2)}, TIMES), f"solve: y at 'n': {FLOATING}"),
    "no leaf": (lambda: ode.solve(growth, {}, TIMES), "solve: expected y to have leaves, got none"),
    "shape": (
        lambda: ode.solve(lambda y, t: {"a": y["a"].sum()}, {"a": FLAT}, TIMES),
        rf"solve: {KEEP} at 'a' \(2,\) torch.float32, got \(\) torch.float32",
    ),
    "dtype": (lambda: ode.solve_adaptive(lambda y, t: y.double(), FLAT, 0.0, 1.0), f"solve_adaptive: {KEEP} at '' "),
    "tolerance": (
        lambda: ode.solve_adaptive(growth, FLAT, 0.0, 1.0, rtol=0.0),
        "solve_adaptive: expected rtol > 0, got 0",
    ),
    "end time": (
        lambda: ode.solve_adaptive(growth, FLAT, 0.0, FLAT),
        r"solve_adaptive: t_end: expected shape \(\), got \(2,\)",
    ),
    "field": (
        lambda: ode.divergence(lambda x: x.sum(1), PAIRS),
        r"divergence: f: expected f\(x\) of shape \(2, 3\), got \(2,\)",
    ),
    "integer x": (lambda: ode.divergence(growth, torch.arange(3)), f"divergence: x: {FLOATING}"),
    "0-d x": (lambda: ode.divergence(growth, torch.ones(())), r"divergence: x: expected shape \(b, ...\), got \(\)"),
    "probe": (
        lambda: probing(probe="uniform"),
        "hutchinson_divergence: expected probe to be one of 'rademacher', 'normal', got 'uniform'",
    ),
    "probes": (lambda: probing(num_probes=0), "hutchinson_divergence: expected num_probes > 0, got 0"),
    "end": (
        lambda: ode.log_prob(lambda x, t: x, PAIRS, TIMES, torch.sum),
        r"log_prob: log_prob_end: expected shape \(b=2,\), got \(\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_what_was_expected(name):
    call, message = ERRORS[name]
    with pytest.raises(TypeError if FLOATING in message else ValueError, match=message):
        call()
