"""Paths, the objective, couplings and sampling of flow matching, on data whose velocity and flow are known exactly."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.func import grad

import functorch_gen as fg
from functorch_gen import nn, random
from functorch_gen.diffusion import Prediction, StratifiedTime
from functorch_gen.exact import Gaussian, isotropic_mixture
from functorch_gen.flow_matching import (
    ConditionalOT,
    Trigonometric,
    conditional_velocity,
    convert,
    entropic_coupling,
    log_prob,
    loss,
    loss_at,
    reflow,
    sample,
    straightness,
)
from functorch_gen.noise import EDM, FlowMatching, VPCosine, VPLinear, mix, rates

F64 = torch.float64
KEY = random.key(0)
SCHEDULES = [FlowMatching(), ConditionalOT(0.1), Trigonometric(), VPLinear(), VPCosine(), EDM()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
TIMES = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9], dtype=F64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, F64)


def gaussian(mean: float, std: float, d: int = 2) -> Gaussian:
    return Gaussian(torch.full((d,), mean, dtype=F64), torch.tensor(std, dtype=F64))


def exact_velocity(data, schedule):
    return lambda x_t, t: data.velocity(x_t, schedule.alpha(t), schedule.sigma(t), *rates(schedule, t.contiguous()))


# Paths.


@every_schedule
def test_conditional_velocity_is_the_slope_of_the_path(schedule):
    x, noise, h = normal(1, 5, 2), normal(2, 5, 2), 1e-6
    slope = (mix(schedule, x, noise, TIMES + h) - mix(schedule, x, noise, TIMES - h)) / (2 * h)
    # rounding of x_t over h, and h^2 times a third derivative of the order of EDM's sigma, 80 * 7^3
    torch.testing.assert_close(conditional_velocity(schedule, x, noise, TIMES), slope, rtol=1e-7, atol=1e-7)


def test_conditional_ot_is_lipmans_path_with_time_reversed():
    """Eq. 22 and 23: psi = (1 - (1 - s) t') noise + t' x, velocity x - (1 - s) noise, at t' = 1 - t."""
    path, x, noise, s = ConditionalOT(0.1), normal(1, 5, 2), normal(2, 5, 2), 0.1
    reversed_time = (1 - TIMES)[:, None]
    wanted = (1 - (1 - s) * reversed_time) * noise + reversed_time * x
    torch.testing.assert_close(mix(path, x, noise, TIMES), wanted, rtol=1e-14, atol=1e-14)
    velocity = conditional_velocity(path, x, noise, TIMES)
    torch.testing.assert_close(velocity, -(x - (1 - s) * noise), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("path", [ConditionalOT(0.1), Trigonometric()], ids=lambda s: type(s).__name__)
def test_t_of_inverts_the_ratio_of_the_scales(path):
    ratio = path.sigma(TIMES) / path.alpha(TIMES)
    torch.testing.assert_close(path.t_of(ratio), TIMES, rtol=1e-14, atol=1e-14)
    ends = path.t_of(torch.tensor([0.0, torch.inf], dtype=F64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0], dtype=F64), rtol=1e-15, atol=0)
    assert torch.equal(path.times(4), torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=F64))


def test_the_trigonometric_path_runs_round_a_circle_at_constant_speed():
    path = Trigonometric()
    alpha, sigma, (dalpha, dsigma) = path.alpha(TIMES), path.sigma(TIMES), rates(path, TIMES)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(5, dtype=F64), rtol=1e-15, atol=0)
    torch.testing.assert_close(dalpha**2 + dsigma**2, torch.full((5,), math.pi**2 / 4, dtype=F64), rtol=1e-14, atol=0)


def test_conditional_ot_refuses_a_wrong_width():
    with pytest.raises(ValueError, match=r"ConditionalOT: expected 0 <= sigma_min < 1, got 1\.0"):
        ConditionalOT(1.0)


KINDS = ["velocity", "score", "eps", "x", "v", "flow", Prediction("edm", 0.7)]


@every_schedule
def test_convert_there_and_back_is_the_identity(schedule):
    output, x_t = normal(1, 5, 2, 3), normal(2, 5, 2, 3)
    for source, to in itertools.permutations(KINDS, 2):
        there = convert(output, x_t, TIMES, schedule=schedule, source=source, to=to)
        back = convert(there, x_t, TIMES, schedule=schedule, source=to, to=source)
        # rounding, times the largest ratio of the scales and rates of EDM, 1e4, and of one over the other
        torch.testing.assert_close(back, output, rtol=1e-6, atol=1e-6)


@every_schedule
def test_the_velocity_of_gaussian_data_tells_its_score_denoiser_and_noise(schedule):
    data, x_t = gaussian(0.3, 0.5), normal(2, 5, 2)
    alpha, sigma = schedule.alpha(TIMES), schedule.sigma(TIMES)
    velocity = exact_velocity(data, schedule)(x_t, TIMES)
    score = grad(lambda x: data.log_prob(x, alpha, sigma).sum())(x_t)
    known = {"score": score, "x": data.denoise(x_t, alpha, sigma), "eps": data.noise(x_t, alpha, sigma)}
    for kind, wanted in known.items():
        found = convert(velocity, x_t, TIMES, schedule=schedule, source="velocity", to=kind)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        again = convert(wanted, x_t, TIMES, schedule=schedule, source=kind, to="velocity")
        torch.testing.assert_close(again, velocity, rtol=1e-9, atol=1e-9)


def test_convert_names_what_does_not_fit():
    x_t, t, options = torch.ones(4, 2), torch.ones(4), {"schedule": FlowMatching(), "source": "velocity", "to": "x"}
    with pytest.raises(ValueError, match=r"convert: output: expected shape \(4, 2\), got \(4, 1\)"):
        convert(x_t[:, :1], x_t, t, **options)
    for source in ("velocity", "eps"):
        with pytest.raises(ValueError, match=r"convert: t: expected shape \(b=4,\), got \(\)"):
            convert(x_t, x_t, t[0], **options | {"source": source})
    with pytest.raises(ValueError, match=r"conditional_velocity: noise: expected shape \(4, 2\), got \(4, 1\)"):
        conditional_velocity(FlowMatching(), x_t, x_t[:, :1], t)
    with pytest.raises(ValueError, match=r"conditional_velocity: t: expected shape \(b=4,\), got \(3,\)"):
        conditional_velocity(FlowMatching(), x_t, x_t, t[:3])


def test_convert_is_finite_where_a_path_is_singular():
    x_t, t = torch.ones(2, 1), torch.tensor([0.0, 0.5])
    for schedule in (VPLinear(), FlowMatching()):
        for to in ("x", "score"):
            assert convert(x_t, x_t, t, schedule=schedule, source="velocity", to=to).isfinite().all()
    assert convert(x_t, x_t, t, schedule=VPLinear(), source="velocity", to="x")[0] == 1


# The objective.


def nodes(std: float) -> tuple[torch.Tensor, ...]:
    """Data, noise, times and weights of a rule that is exact for squares of linear functions of data and noise."""
    t, weight = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(60))
    grid = torch.cartesian_prod(torch.tensor([-1.0, 1.0], dtype=F64), torch.tensor([-1.0, 1.0], dtype=F64), t)
    return std * grid[:, :1], grid[:, 1:2], (grid[:, 2] + 1) / 2, weight.repeat(4) / 8


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_the_loss_of_the_exact_velocity_is_its_floor(std):
    """ORACLES: N(0, s^2) to N(0, 1) at uniform t: s pi / 2 per dimension."""
    x, noise, t, weight = nodes(std)
    velocity = exact_velocity(gaussian(0.0, std, 1), FlowMatching())
    floor = weight @ loss_at(velocity, x, noise, t)
    assert floor.item() == pytest.approx(std * math.pi / 2, rel=1e-9)  # the quadrature of 60 nodes


@every_schedule
def test_the_exact_velocity_is_the_minimiser(schedule):
    data = gaussian(0.0, 0.5, 1)
    x, noise, t, weight = nodes(0.5)

    def expected(change):
        output = lambda x_t, t: exact_velocity(data, schedule)(x_t, t) + change[0] + change[1] * x_t
        return weight @ (
            loss_at(output, x, noise, t, schedule=schedule)
            / (1 + conditional_velocity(schedule, x.abs(), noise.abs(), t).square().sum(1))
        )

    slope = grad(expected)(torch.zeros(2, dtype=F64))
    torch.testing.assert_close(slope, torch.zeros(2, dtype=F64), rtol=0, atol=1e-10)


def test_loss_draws_times_and_noise():
    data, n = gaussian(0.0, 0.5), 20_000
    drawn = loss(exact_velocity(data, FlowMatching()), KEY, data.sample(random.key(1), n), time=StratifiedTime())
    assert abs(drawn.mean() - 0.25 * math.pi) < 4 * drawn.std() / n**0.5  # four standard errors


def test_loss_takes_noise_coupling_and_weights():
    x, noise, seen = normal(1, 4, 2), normal(2, 4, 2), []
    standing = lambda x_t, t: torch.zeros_like(x_t)

    def coupling(key, x, noise):
        seen.append((x, noise))
        return noise.flip(0)

    weighting = lambda t: 3 * torch.ones_like(t)
    found = loss(standing, KEY, x, noise=noise, coupling=coupling, weighting=weighting)
    torch.testing.assert_close(found, 3 * (noise.flip(0) - x).square().mean(1), rtol=1e-14, atol=0)
    assert seen[0][0] is x
    assert seen[0][1] is noise


def test_loss_refuses_what_does_not_fit():
    x = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"network: expected a velocity of shape \(3, 2\), got \(3, 1\)"):
        loss(lambda x_t, t: x_t[:, :1], KEY, x)
    with pytest.raises(ValueError, match=r"mix: noise: expected shape \(3, 2\) as x has, got \(2, 2\)"):
        loss(lambda x_t, t: x_t, KEY, x, noise=x[:2])
    with pytest.raises(TypeError, match=r"loss: x: expected a floating-point tensor, got torch.int64"):
        loss(lambda x_t, t: x_t, KEY, torch.ones(3, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"network: expected a velocity of shape \(3, 2\), got tuple"):
        loss(lambda x_t, t: (x_t, t), KEY, x)
    with pytest.raises(ValueError, match=r"loss: weighting\(t\): expected shape \(b=3,\), got \(3, 1\)"):
        loss(lambda x_t, t: x_t, KEY, x, weighting=lambda t: t[:, None])


def test_the_training_step_is_one_graph():
    net, tx = nn.MLP(3, (8,), 2), fg.optim.sgd(0.1)

    def loss_fn(params, key, x):
        velocity = lambda x_t, t: net(params, torch.cat([x_t, t[:, None]], 1))
        return loss(velocity, key, x, coupling=entropic_coupling).mean()

    step = fg.jit(fg.step.make_step(loss_fn, tx), donate_argnums=0, backend="aten")
    state = fg.step.init_state(net.init(KEY), tx, KEY)
    for seed in range(3):
        state, metrics = step(state, random.normal(random.key(seed), (6, 2)))
    assert step.traces == 1
    assert metrics["loss"].isfinite()


# Along the flow.


def measured_order(method: str, steps: tuple[int, ...]) -> float:
    data = gaussian(0.3, 0.5)
    velocity = exact_velocity(data, FlowMatching())
    errors = []
    for n in steps:
        path = sample(KEY, velocity, (4, 2), steps=n, method=method, dtype=F64, return_path=True)
        errors.append((path[-1] - data.flow(path[0], (0.0, 1.0), (1.0, 0.0))).norm().item())
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("rk4", 4)])
def test_samples_reach_the_end_of_the_exact_flow_with_the_solvers_order(method, order):
    assert abs(measured_order(method, (32, 64, 128)) - order) < 0.3


@pytest.mark.parametrize("schedule", [ConditionalOT(0.1), Trigonometric(), EDM()], ids=lambda s: type(s).__name__)
def test_samples_follow_the_flow_of_other_paths(schedule):
    data, ends = gaussian(0.3, 0.5), torch.tensor([1.0, 0.0], dtype=F64)
    velocity = exact_velocity(data, schedule)
    path = sample(KEY, velocity, (4, 2), steps=100, method="rk4", schedule=schedule, dtype=F64, return_path=True)
    start, end = zip(schedule.alpha(ends), schedule.sigma(ends))
    torch.testing.assert_close(path[-1], data.flow(path[0], start, end), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(path[0], schedule.sigma(ends[0]) * random.normal(KEY, (4, 2), F64), rtol=1e-15, atol=0)


def test_the_midpoint_rule_is_the_more_exact_where_data_are_narrow():
    """Of width 0.01: the velocity x_t / t turns round within 0.01 of t = 0, where Heun's method asks for it."""
    data = Gaussian(torch.zeros(2, dtype=F64), torch.tensor([0.5, 0.01], dtype=F64))
    errors = {}
    for method in ("midpoint", "heun"):
        path = sample(
            KEY, exact_velocity(data, FlowMatching()), (50, 2), steps=20, method=method, dtype=F64, return_path=True
        )
        errors[method] = (path[-1] - data.flow(path[0], (0.0, 1.0), (1.0, 0.0))).norm()
    assert errors["midpoint"] < errors["heun"] / 3


def test_log_prob_of_a_mixture_converges_with_the_solvers_order():
    data = isotropic_mixture(
        torch.ones(2, dtype=F64),
        torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64),
        torch.tensor([0.4, 0.6], dtype=F64),
    )
    x, velocity = data.sample(KEY, 4), exact_velocity(data, FlowMatching())
    steps = (10, 20, 40)
    errors = [(log_prob(velocity, x, steps=n) - data.log_prob(x)).norm().item() for n in steps]
    slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert abs(slope - 4) < 0.5
    assert errors[-1] < 1e-4


def test_hutchinsons_log_prob_is_exact_for_independent_elements():
    data = gaussian(0.3, 0.5)
    x = data.sample(KEY, 3)
    for key in (None, KEY):  # probes of +-1 see the diagonal alone
        found = log_prob(exact_velocity(data, FlowMatching()), x, steps=20, key=key)
        torch.testing.assert_close(found, data.log_prob(x), rtol=1e-4, atol=1e-4)  # of 20 steps of order 4


def test_log_prob_knows_the_scale_of_the_noise():
    data, schedule = gaussian(0.0, 0.5), EDM(sigma_max=10.0)
    x = data.sample(KEY, 3)
    found = log_prob(exact_velocity(data, schedule), x, steps=40, schedule=schedule)
    # it takes N(0, sigma_max^2) for the end, which is N(0, sigma_max^2 + 0.25), and N(0, sigma_min^2) for no noise
    torch.testing.assert_close(found, data.log_prob(x, 1.0, 0.002), rtol=0, atol=2 * 0.25 / 100)


def test_reflow_pairs_lie_on_the_exact_flow():
    data = gaussian(0.3, 0.5)
    x, noise = reflow(KEY, exact_velocity(data, FlowMatching()), (5, 2), steps=64, method="rk4", dtype=F64)
    assert torch.equal(noise, random.normal(KEY, (5, 2), F64))
    torch.testing.assert_close(x, data.flow(noise, (0.0, 1.0), (1.0, 0.0)), rtol=1e-6, atol=1e-6)


def test_a_reflowed_gaussian_has_a_straight_flow_without_loss():
    """x = m + s noise, hence x_t = (1 - t) m + (s + (1 - s) t) noise and the velocity noise - x is known at x_t."""
    m, s = 0.3, 0.5
    noise = normal(2, 5, 2)
    x = m + s * noise

    def velocity(x_t, t):
        t = t[:, None]
        return (x_t - (1 - t) * m) / (s + (1 - s) * t) * (1 - s) - m

    torch.testing.assert_close(loss(velocity, KEY, x, noise=noise), torch.zeros(5, dtype=F64), rtol=0, atol=1e-28)
    assert (straightness(KEY, velocity, (5, 2), steps=4, method="euler", dtype=F64) < 1e-28).all()
    (one, start), (many, _) = (reflow(KEY, velocity, (5, 2), steps=n, method="euler", dtype=F64) for n in (1, 50))
    torch.testing.assert_close(one, many, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(one, m + s * start, rtol=1e-13, atol=1e-13)


def test_the_flow_to_a_point_is_straight():
    velocity = exact_velocity(gaussian(0.7, 0.0), FlowMatching())
    assert (straightness(KEY, velocity, (5, 2), steps=8, method="euler", dtype=F64) < 1e-28).all()


def test_straightness_of_a_gaussian_is_its_integral():
    """x_t = noise w(t) with w = sqrt((1 - t)^2 s^2 + t^2): the integral of noise^2 (1 - s - w')^2."""
    s, data = 0.5, gaussian(0.0, 0.5)
    t = torch.linspace(0, 1, 20_001, dtype=F64)
    slope = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2).sqrt()
    wanted = random.normal(KEY, (5, 2), F64).square().mean(1) * torch.trapezoid((1 - s - slope) ** 2, t)
    velocity = exact_velocity(data, FlowMatching())
    errors = [
        (straightness(KEY, velocity, (5, 2), steps=n, method="rk4", dtype=F64) - wanted).norm() for n in (25, 50, 100)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert abs(math.log2(coarse / fine) - 2) < 0.2  # second order
    assert errors[-1] < 1e-3


def test_sampling_refuses_no_steps():
    for call in (
        lambda: sample(KEY, lambda x_t, t: x_t, (2, 1), steps=0),
        lambda: log_prob(lambda x_t, t: x_t, torch.ones(2, 1), steps=0),
    ):
        with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
            call()
    with pytest.raises(TypeError, match=r"sample: expected steps to be an int .*, got 2\.5"):
        sample(KEY, lambda x_t, t: x_t, (2, 1), steps=2.5)
    with pytest.raises(ValueError, match=r"network: expected a velocity of shape \(2, 1\), got \(2,\)"):
        sample(KEY, lambda x_t, t: x_t[:, 0], (2, 1), steps=1)


def test_a_sampler_is_one_program():
    data = gaussian(0.3, 0.5)
    draw = fg.jit(
        lambda key, mean: sample(
            key, exact_velocity(Gaussian(mean, data.std), FlowMatching()), (4, 2), steps=8, dtype=F64
        ),
        backend="aten",
    )
    eager = sample(KEY, exact_velocity(data, FlowMatching()), (4, 2), steps=8, dtype=F64)
    torch.testing.assert_close(draw(KEY, data.mean), eager, rtol=1e-12, atol=1e-12)
    assert draw.traces == 1
