"""Continuous-time consistency on Gaussian data, whose consistency function is known exactly."""

import math

import pytest
import torch

import functorch_gen as fg
from functorch_gen import nn, random
from functorch_gen.exact import Gaussian
from functorch_gen.flow_matching import (
    Trigonometric,
    conditional_velocity,
    consistency_function,
    consistency_loss,
    consistency_tangent,
    sample_consistency,
)
from functorch_gen.noise import mix, rates

F64 = torch.float64
KEY = random.key(0)
CIRCLE = Trigonometric()
SIGMA = 0.7
DATA = Gaussian(torch.zeros(2, dtype=F64), torch.tensor([0.5, 1.5], dtype=F64))
T = torch.tensor([0.05, 0.3, 0.5, 0.8, 1.0], dtype=F64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, F64)


def spread(t: torch.Tensor) -> torch.Tensor:
    """Standard deviation of x_t: (b,) -> (b, 2)."""
    a = 0.5 * math.pi * t[:, None]
    return ((a.cos() * DATA.std) ** 2 + (a.sin() * SIGMA) ** 2).sqrt()


def exact_velocity(x_t, t):
    """dx_t/dt, with noise as wide as SIGMA."""
    dalpha, dsigma = rates(CIRCLE, t)
    return DATA.velocity(x_t, CIRCLE.alpha(t), SIGMA * CIRCLE.sigma(t), dalpha, SIGMA * dsigma)


def exact_network(x, t):
    """F of f(x_t, t) = x_t s / spread(t): the flow keeps the quantiles."""
    a, x_t = 0.5 * math.pi * t[:, None], SIGMA * x
    return (a.cos() * x_t - x_t * DATA.std / spread(t)) / (a.sin() * SIGMA)


def network(x, t):
    """Some smooth function."""
    return torch.sin(x) * t[:, None] + torch.cos(2 * x.flip(1))


def test_the_exact_consistency_function_is_the_end_of_the_flow():
    x_t = normal(1, 5, 2)
    found = consistency_function(exact_network, sigma_data=SIGMA)(x_t, T)
    wanted = DATA.flow(x_t, (CIRCLE.alpha(T), SIGMA * CIRCLE.sigma(T)), (1.0, 0.0))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_consistency_function_of_data_is_the_data():
    x = normal(1, 3, 2)
    found = consistency_function(network, sigma_data=SIGMA)(x, torch.zeros(3, dtype=F64))
    assert torch.equal(found, x)


def test_the_tangent_of_the_exact_function_vanishes_along_the_flow():
    x_t = normal(1, 5, 2)
    _, tangent = consistency_tangent(exact_network, x_t, exact_velocity(x_t, T), T, sigma_data=SIGMA)
    torch.testing.assert_close(tangent, torch.zeros_like(tangent), rtol=0, atol=1e-10)


def test_the_tangent_is_the_slope_of_the_consistency_function():
    """cos(a) df/da by a central difference of f along the velocity."""
    x_t, velocity, h, t = normal(1, 5, 2), normal(2, 5, 2), 1e-5, T - 0.02
    f = consistency_function(network, sigma_data=SIGMA)
    slope = (f(x_t + h * velocity, t + h) - f(x_t - h * velocity, t - h)) / (2 * h)
    output, tangent = consistency_tangent(network, x_t, velocity, t, sigma_data=SIGMA)
    wanted = CIRCLE.alpha(t)[:, None] * slope * 2 / math.pi
    torch.testing.assert_close(tangent, wanted, rtol=1e-7, atol=1e-7)  # h^2, and rounding over h
    torch.testing.assert_close(output, network(x_t / SIGMA, t), rtol=1e-14, atol=0)


def test_before_the_warm_up_the_tangent_is_that_of_flow_matching():
    x_t, velocity = normal(1, 5, 2), normal(2, 5, 2)
    output, tangent = consistency_tangent(network, x_t, velocity, T, sigma_data=SIGMA, warmup=0.0)
    wanted = CIRCLE.alpha(T)[:, None] ** 2 * (velocity * 2 / math.pi - SIGMA * output)
    torch.testing.assert_close(tangent, wanted, rtol=1e-13, atol=1e-13)


def test_pairs_do_what_the_flow_does_in_the_mean():
    """Training from data (sCT) has the mean tangent of distillation (sCD): two pairs behind x_t with its moments."""
    x_t = normal(1, 5, 2)
    alpha, sigma = CIRCLE.alpha(T), SIGMA * CIRCLE.sigma(T)
    x, width = DATA.denoise(x_t, alpha, sigma), DATA.posterior_variance(x_t, alpha, sigma).sqrt()
    tangents = []
    for data in (x + width, x - width):
        noise = SIGMA * (x_t - alpha[:, None] * data) / sigma[:, None]
        velocity = conditional_velocity(CIRCLE, data, noise, T)
        tangents.append(consistency_tangent(network, x_t, velocity, T, sigma_data=SIGMA)[1])
    wanted = consistency_tangent(network, x_t, exact_velocity(x_t, T), T, sigma_data=SIGMA)[1]
    torch.testing.assert_close((tangents[0] + tangents[1]) / 2, wanted, rtol=1e-12, atol=1e-12)


def parts_of_loss(teacher=None, warmup=1.0):
    """Data, times, output and tangent as the loss draws them."""
    x, key_noise = normal(3, 5, 2), random.split(KEY)[1]
    noise = SIGMA * random.normal(key_noise, (5, 2), F64)
    x_t = mix(CIRCLE, x, noise, T)
    velocity = conditional_velocity(CIRCLE, x, noise, T) if teacher is None else teacher(x_t, T)
    return x, x_t, *consistency_tangent(network, x_t, velocity, T, sigma_data=SIGMA, warmup=warmup)


@pytest.mark.parametrize("teacher", [None, exact_velocity], ids=["training", "distillation"])
def test_the_gradient_moves_the_network_along_the_normalised_tangent(teacher):
    """dL/dtheta = -2 w mean_i g_i dF_i/dtheta with g = tangent / (|tangent| + 0.1), algorithm 1."""
    x, x_t, _, tangent = parts_of_loss(teacher, warmup=0.6)
    options = {"sigma_data": SIGMA, "teacher": teacher, "warmup": 0.6, "time": lambda *_: T}
    scaled = lambda theta: lambda x, t: theta * network(x, t)
    slope = fg.jacrev(lambda theta: consistency_loss(scaled(theta), KEY, x, **options))(torch.ones((), dtype=F64))
    g = tangent / (tangent.square().mean(1, keepdim=True).sqrt() + 0.1)
    torch.testing.assert_close(slope, -2 * (g * network(x_t / SIGMA, T)).mean(1), rtol=1e-12, atol=1e-12)


def test_a_log_weight_learns_the_size_of_the_loss():
    """exp(w) L - w is least at w = -ln L."""
    x = normal(3, 5, 2)
    options = {"sigma_data": SIGMA, "time": lambda *_: T}
    plain = consistency_loss(network, KEY, x, **options)
    weighted = lambda w: consistency_loss(network, KEY, x, **options, log_weight=lambda t: w)
    w = normal(4, 5)
    torch.testing.assert_close(weighted(w), w.exp() * plain - w, rtol=1e-13, atol=1e-13)
    least = fg.grad(lambda w: weighted(w).sum())(-plain.log())
    torch.testing.assert_close(least, torch.zeros(5, dtype=F64), rtol=0, atol=1e-12)


def test_times_have_the_papers_distribution():
    """ln tan(a) + ln sigma_data is normal with mean -1 and standard deviation 1.4."""
    seen, n = [], 20_000

    def spy(x_t, t):
        seen.append(t)
        return torch.zeros_like(x_t)

    consistency_loss(network, KEY, torch.zeros(n, 1, dtype=F64), sigma_data=SIGMA, teacher=spy)
    z = (0.5 * math.pi * seen[0]).tan().log() + math.log(SIGMA)
    assert abs(z.mean() + 1) < 4 * 1.4 / n**0.5  # four standard errors
    assert abs(z.std() - 1.4) < 4 * 1.4 / (2 * n) ** 0.5


def test_one_and_two_step_samples_have_the_distribution_of_the_data():
    f, n = consistency_function(exact_network, sigma_data=SIGMA), 20_000
    for times in ((1.0,), (1.0, 0.7)):
        x = sample_consistency(KEY, f, (n, 2), times=times, sigma_data=SIGMA, dtype=F64)
        assert ((x.mean(0)).abs() < 4 * DATA.std / n**0.5).all()  # four standard errors
        assert ((x.std(0) - DATA.std).abs() < 4 * DATA.std / (2 * n) ** 0.5).all()


def test_one_step_is_the_flow_of_the_noise():
    f = consistency_function(exact_network, sigma_data=SIGMA)
    found = sample_consistency(KEY, f, (4, 2), sigma_data=SIGMA, dtype=F64)
    noise = random.normal(random.fold_in(KEY, 0), (4, 2), F64)
    torch.testing.assert_close(found, noise * DATA.std, rtol=1e-12, atol=1e-12)


def test_errors_name_the_argument():
    x = torch.ones(3, 2)
    for call in (consistency_function, lambda f, **options: consistency_loss(f, KEY, x, **options)):
        with pytest.raises(ValueError, match=r"expected sigma_data > 0, got 0"):
            call(network, sigma_data=0)
    with pytest.raises(ValueError, match=r"network: expected a velocity of shape \(3, 2\), got \(3, 1\)"):
        consistency_loss(lambda x, t: x[:, :1], KEY, x)
    with pytest.raises(TypeError, match=r"consistency_loss: x: expected a floating-point tensor, got torch.int64"):
        consistency_loss(network, KEY, x.long())
    with pytest.raises(ValueError, match="sample_consistency: expected times, got none"):
        sample_consistency(KEY, network, (3, 2), times=())
    for times in ((2.0,), (0.5, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match=r"sample_consistency: expected times that fall within \(0, 1\], got"):
            sample_consistency(KEY, network, (3, 2), times=times)
    with pytest.raises(ValueError, match=r"sample_consistency: consistency: expected a velocity of shape \(3, 2\)"):
        sample_consistency(KEY, lambda x, t: x[:, :1], (3, 2))
    with pytest.raises(ValueError, match=r"consistency_tangent: velocity: expected a velocity .* got \(3, 1\)"):
        consistency_loss(network, KEY, x, teacher=lambda x, t: x[:, :1])
    with pytest.raises(ValueError, match=r"consistency_loss: log_weight\(t\): expected shape \(b=3,\), got \(3, 1\)"):
        consistency_loss(network, KEY, x, log_weight=lambda t: t[:, None])
    with pytest.raises(ValueError, match=r"consistency_function: t: expected shape \(b=3,\), got \(2,\)"):
        consistency_function(network)(x, torch.ones(2))


def make_step(**options):
    net, tx = nn.MLP(3, (32, 32), 2), fg.optim.adam(fg.optim.cosine_decay_schedule(5e-3, 2000))
    bind = lambda params: lambda x, t: net(params, torch.cat([x, t[:, None]], 1))

    def loss_fn(params, key, x):
        return consistency_loss(bind(params), key, x, **options).mean()

    return net, bind, fg.step.make_step(loss_fn, tx), tx


def test_the_training_step_is_one_graph():
    net, _, pure_step, tx = make_step()
    step = fg.jit(pure_step, donate_argnums=0, backend="aten")
    state = fg.step.init_state(net.init(KEY), tx, KEY)
    for _ in range(2):
        state, metrics = step(state, normal(1, 8, 2).float())
    assert step.traces == 1
    assert metrics["loss"].isfinite()


@pytest.mark.slow  # 2,000 steps of a small network
def test_a_network_learns_to_sample_in_one_step_from_a_teacher():
    """The standard deviation of the data; the network is off by some hundredths."""
    data = Gaussian(torch.zeros(2), torch.tensor([0.5, 1.5]))
    net, bind, pure_step, tx = make_step(sigma_data=SIGMA, teacher=lambda x_t, t: exact_velocity(x_t, t).float())
    step, n = fg.jit(pure_step, donate_argnums=0, backend="aten"), 4000
    state = fg.step.init_state(net.init(KEY), tx, KEY)
    for i in range(2000):
        state, _ = step(state, data.sample(random.key(i), 256))
    f = consistency_function(bind(state.params), sigma_data=SIGMA)
    samples = sample_consistency(KEY, f, (n, 2), sigma_data=SIGMA)
    torch.testing.assert_close(samples.mean(0), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(samples.std(0), data.std, rtol=0, atol=0.1)
