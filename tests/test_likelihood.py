"""Likelihoods by the probability flow, against densities of Gaussian mixtures; dequantisation, bits per dimension."""

import math
from functools import partial

import pytest
import torch

from functorch_gen import diffusion, exact, noise, ode, random
from functorch_gen.exact import Gaussian
from functorch_gen.transforms import grad, jit, vmap

F64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, -1.0]], dtype=F64)
STD = 0.3
MIXTURE = exact.isotropic_mixture(torch.ones(3, dtype=F64), MEANS, torch.full((3,), STD, dtype=F64))
SCHEDULES = [noise.VPLinear(), noise.VPCosine(), noise.SubVP(), noise.EDM(), noise.FlowMatching()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


def denoise_of(schedule, dtype=F64):
    """E[x | x_t] = m + alpha std^2 (x_t - alpha m) / (alpha^2 std^2 + sigma^2), m = sum_k r_k m_k: exact, and quick."""

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
        variance, means = (alpha * STD) ** 2 + sigma**2, MEANS.to(dtype)
        squared = ((x_t[:, None] - alpha[:, None] * means) ** 2).sum(-1)
        mean = (-0.5 * squared / variance).softmax(1) @ means
        return mean + alpha * STD**2 / variance * (x_t - alpha * mean)

    return denoise


def normal(x, std):
    return -(0.5 * (x / std) ** 2 + std.log() + 0.5 * math.log(2 * math.pi)).sum(1)


def at(schedule, t):
    t = torch.tensor(t, dtype=F64)
    return schedule.alpha(t), schedule.sigma(t)


def truth(schedule, x, latent):
    """log-density of x + 0.002 noise, were the noise at t = 1 what the mixture makes of it, not N(0, sigma^2)."""
    alpha, sigma = at(schedule, schedule.t_of(torch.tensor(0.002, dtype=F64)).item())
    end = at(schedule, 1.0)
    start = MIXTURE.log_prob(alpha * x, alpha, sigma) + 2 * alpha.log()
    return start + normal(latent, end[1]) - MIXTURE.log_prob(latent, *end)


@each_schedule
def test_log_prob_errs_by_the_order_of_the_solver(schedule):
    x, errors = MIXTURE.sample(random.key(0), 8), []
    for steps in (20, 40):
        options = {"schedule": schedule, "steps": steps, "method": "midpoint"}
        found, latent = diffusion.log_prob(denoise_of(schedule), x, return_latent=True, **options)
        errors.append((found - truth(schedule, x, latent)).abs().mean().item())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.4)


@each_schedule
def test_log_prob_is_the_density_of_the_data(schedule):
    """To the error of rk4 in 40 steps, and 0.002^2 / 0.3^2 of the noise that is left."""
    x = MIXTURE.sample(random.key(0), 8)
    found, latent = diffusion.log_prob(denoise_of(schedule), x, schedule=schedule, steps=40, return_latent=True)
    torch.testing.assert_close(found, truth(schedule, x, latent), rtol=0, atol=1e-4)
    ends = at(schedule, 1.0)
    mismatch = normal(latent, ends[1]) - MIXTURE.log_prob(latent, *ends)
    torch.testing.assert_close(found - mismatch, MIXTURE.log_prob(x), rtol=0, atol=5e-4)


def test_log_prob_is_that_of_the_flow_in_its_own_time():
    """dx_t/dt = (x_t - D) / t on the straight path, from the time where the ratio is 0.002."""
    schedule, x = noise.FlowMatching(), MIXTURE.sample(random.key(0), 4)
    found = diffusion.log_prob(denoise_of(schedule), x, schedule=schedule, steps=40)
    start = 0.002 / 1.002
    times = start ** torch.linspace(1, 0, 61, dtype=F64)
    velocity = lambda x_t, t: (x_t - denoise_of(schedule)(x_t, t)) / t[:, None]
    expected = ode.log_prob(velocity, (1 - start) * x, times, partial(normal, std=times[-1]))
    torch.testing.assert_close(found, expected + 2 * math.log(1 - start), rtol=0, atol=1e-4)


def test_samplers_lead_from_the_latent_back_to_x():
    schedule, x = noise.EDM(), MIXTURE.sample(random.key(0), 4)
    denoise = denoise_of(schedule)
    _, latent = diffusion.log_prob(denoise, x, schedule=schedule, steps=60, return_latent=True)
    back = diffusion.sample_heun(random.key(0), denoise, (4, 2), schedule=schedule, steps=60, x_t=latent, dtype=F64)
    assert (back - x).abs().max() < 5e-3  # the noise that is left, and h^2 of Heun's


def test_log_prob_by_probes_is_unbiased():
    schedule, x = noise.FlowMatching(), MIXTURE.sample(random.key(0), 3)
    options = {"schedule": schedule, "steps": 8, "method": "heun"}
    expected = diffusion.log_prob(denoise_of(schedule), x, **options)
    keys = random.split(random.key(1), 100)
    draws = vmap(lambda key: diffusion.log_prob(denoise_of(schedule), x, key=key, num_probes=2, **options))(keys)
    assert ((draws.mean(0) - expected).abs() < 4 * draws.std(0) / 10).all()


def test_log_prob_takes_other_times():
    schedule, x = noise.FlowMatching(), MIXTURE.sample(random.key(0), 3)
    options = {"schedule": schedule, "steps": 4}
    found = diffusion.log_prob(denoise_of(schedule), x, times=partial(noise.rho_times, ratio_min=0.1), **options)
    times = noise.rho_times(schedule, 5, ratio_min=0.1)
    assert torch.equal(found, diffusion.log_prob(denoise_of(schedule), x, times=times, **options))


@each_schedule
def test_log_prob_may_end_where_no_noise_is_left(schedule):
    # times to 0, where the velocity is 0 / 0 in all schedules but EDM: of fourth order, the path of one Gaussian
    data = Gaussian(torch.full((3,), 0.3, dtype=F64), torch.tensor(0.7, dtype=F64))
    denoise = lambda x_t, t: data.denoise(x_t, schedule.alpha(t), schedule.sigma(t))
    x, times = data.sample(random.key(0), 4), torch.linspace(1, 0, 41, dtype=F64)
    density = lambda x: diffusion.log_prob(denoise, x, schedule=schedule, steps=40, times=times)
    end = torch.ones((), dtype=F64)  # the samplers' noise has no mean, and not the variance of what is left of x
    left = (schedule.alpha(end) / schedule.sigma(end)).item()
    torch.testing.assert_close(density(x), data.log_prob(x), rtol=0, atol=1e-5 + 2 * left)
    score = grad(lambda x: density(x).sum())(x)
    torch.testing.assert_close(score, data.score(x, 1.0, 0.0), rtol=0, atol=1e-5 + 2 * left)


def test_log_prob_of_no_examples():
    empty, options = torch.zeros(0, 2, dtype=F64), {"schedule": noise.EDM(), "steps": 2}
    assert diffusion.log_prob(lambda x_t, t: x_t, empty, **options).shape == (0,)
    assert diffusion.log_prob(lambda x_t, t: x_t, empty, key=random.key(0), **options).shape == (0,)


@each_schedule
def test_log_prob_in_float32_is_that_in_float64(schedule):
    """To rounding: the velocity divides by sin(theta) >= 0.002, so 1e-7 / 0.002 for each of a few sums."""
    x = MIXTURE.sample(random.key(0), 4)
    found = diffusion.log_prob(denoise_of(schedule, torch.float32), x.float(), schedule=schedule, steps=10)
    expected = diffusion.log_prob(denoise_of(schedule), x, schedule=schedule, steps=10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-3)


def test_log_prob_is_one_program():
    schedule, x = noise.EDM(), MIXTURE.sample(random.key(0), 2)
    run = lambda x: diffusion.log_prob(denoise_of(schedule), x, schedule=schedule, steps=4, method="heun")
    program = jit(run, backend="aten")
    torch.testing.assert_close(program(x), run(x), rtol=1e-10, atol=0)
    assert program.traces == 1


# Discrete data.


def test_dequantize_draws_evenly_from_the_bin_of_each_level():
    levels, n = 4, 4000
    y = torch.arange(levels).repeat(n, 1)
    x = diffusion.dequantize(random.key(0), y, levels=levels, dtype=F64)
    place = (x + 1) * levels / 2
    assert torch.equal(place.floor().long(), y)
    inside = (place - y).sort(0).values  # Kolmogorov and Smirnov: a distance of 1.95 / sqrt(n) has probability 0.001
    steps = torch.arange(n, dtype=F64)[:, None] / n
    assert (inside - steps).abs().max() < 1.95 / n**0.5


def test_bits_of_a_density_that_is_even_in_every_bin_are_those_of_the_levels():
    levels = 4
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    y = torch.tensor([[0, 3, 1], [2, 2, 2]])
    x = diffusion.dequantize(random.key(0), y, levels=levels, dtype=F64)
    log_density = (probabilities[((x + 1) * 2).floor().long()] * levels / 2).log().sum(1)
    expected = -probabilities[y].log2().mean(1)
    found = diffusion.bits_per_dim(log_density, 3, levels=levels)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_bits_of_a_probability():
    assert diffusion.bits_per_dim(torch.tensor(math.log(1 / 8)), 3, levels=None).item() == pytest.approx(1)


# Errors.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "log_prob: expected steps > 0, got 0"),
        ({"times": torch.ones(3)}, r"log_prob: times: expected shape \(n=3,\), got \(4,\)|expected shape \(n=2,\)"),
        ({"probe": "even", "key": random.key(0)}, "log_prob: expected probe to be one of"),
        ({"method": "rk2"}, "solve: expected method to be one of"),
    ],
    ids=["steps", "times", "probe", "method"],
)
def test_log_prob_names_what_was_expected(options, message):
    arguments = {"schedule": noise.FlowMatching(), "steps": 1, **options}
    with pytest.raises(ValueError, match=message):
        diffusion.log_prob(lambda x_t, t: x_t, torch.ones(2, 3), **arguments)


def test_an_estimate_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"log_prob: denoise: expected shape \(2, 3\), as x has, got \(2, 1\)"):
        diffusion.log_prob(lambda x_t, t: x_t[:, :1], torch.ones(2, 3), schedule=noise.EDM(), steps=1)


def test_integers_are_refused():
    with pytest.raises(TypeError, match=r"log_prob: x: expected a floating-point tensor, got torch\.int64"):
        diffusion.log_prob(lambda x_t, t: x_t, torch.ones(2, 3).long(), schedule=noise.EDM(), steps=1)


def test_no_levels_are_refused():
    with pytest.raises(ValueError, match="dequantize: expected levels > 0, got 0"):
        diffusion.dequantize(random.key(0), torch.zeros(2), levels=0)
    with pytest.raises(ValueError, match="bits_per_dim: expected dim > 0, got 0"):
        diffusion.bits_per_dim(torch.zeros(2), 0)
