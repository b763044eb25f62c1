"""The chain of Gaussian transitions: Bayes' rule by hand, divergences of exact models, bounds whose limit is known."""

import itertools
import math

import pytest
import torch
from scipy import stats

from functorch_gen import ema, jit, nn, optim, random
from functorch_gen.diffusion import (
    decoder_nll,
    denoiser_and_variance,
    discretized_gaussian_nll,
    hybrid_loss,
    interpolate_variance,
    loss_at,
    posterior,
    sample_ddpm,
    transition_kl,
    variational_bound,
)
from functorch_gen.exact import Gaussian
from functorch_gen.noise import (
    EDM,
    FlowMatching,
    Shifted,
    SubVP,
    VPCosine,
    VPLinear,
    VPSigmoid,
    ZeroTerminalSNR,
    log_snr,
    mix,
    rho_times,
    uniform_times,
)
from functorch_gen.step import init_state, make_step

F64 = torch.float64
VARIANCE_PRESERVING = [VPLinear(), VPCosine(), VPSigmoid(), ZeroTerminalSNR(VPLinear()), Shifted(VPCosine(), 4.0)]
SCHEDULES = [*VARIANCE_PRESERVING, SubVP(), EDM(), FlowMatching()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
S, T = torch.tensor([0.1, 0.4, 0.7], dtype=F64), torch.tensor([0.2, 0.9, 0.75], dtype=F64)
NATS = math.log(2)  # in a bit


def draws(*shape: int) -> list[torch.Tensor]:
    return [random.normal(random.key(i), shape, F64) for i in range(3)]


def within_four_errors(values: torch.Tensor, wanted: torch.Tensor | float) -> None:
    assert abs(values.mean() - wanted) < 4 * values.std() / math.sqrt(len(values))


def exact(data: Gaussian, schedule):
    return lambda x_t, t: data.denoise(x_t, schedule.alpha(t), schedule.sigma(t))


# Transitions.


def chain(schedule, s, t):
    """Scales of one step from s to t: x_t = step x_s + noise of variance q."""
    step = schedule.alpha(t) / schedule.alpha(s)
    return step, schedule.sigma(t) ** 2 - step**2 * schedule.sigma(s) ** 2


@every_schedule
def test_posterior_is_bayes_rule(schedule):
    # q(x_s | x_t, x) ~ N(x_s; alpha_s x, sigma_s^2) N(x_t; step x_s, q): precisions add
    x, x_t, _ = draws(3, 2)
    (step, q), alpha, sigma = chain(schedule, S, T), schedule.alpha(S), schedule.sigma(S)
    precision = 1 / sigma**2 + step**2 / q
    mean = ((alpha / sigma**2)[:, None] * x + (step / q)[:, None] * x_t) / precision[:, None]
    found = posterior(schedule, x, x_t, S, T)
    torch.testing.assert_close(found.mean, mean, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.lower[:, 0], 1 / precision, rtol=1e-9, atol=0)


@every_schedule
def test_upper_variance_is_that_of_standard_normal_data(schedule):
    # x_s and x_t are jointly Gaussian: var(x_s) - cov(x_s, x_t)^2 / var(x_t)
    (step, q), var = chain(schedule, S, T), schedule.alpha(S) ** 2 + schedule.sigma(S) ** 2
    wanted = var - (step * var) ** 2 / (step**2 * var + q)
    found = posterior(schedule, torch.zeros(3, 1, dtype=F64), torch.zeros(3, 1, dtype=F64), S, T)
    torch.testing.assert_close(found.upper[:, 0], wanted, rtol=1e-8, atol=0)
    assert bool((found.lower < found.upper).all())


@pytest.mark.parametrize("schedule", VARIANCE_PRESERVING, ids=lambda s: type(s).__name__)
def test_variances_are_beta_and_beta_tilde_of_the_chain(schedule):
    # Ho et al. 2020, eq. 7: beta = 1 - alpha_bar_t / alpha_bar_s, beta-tilde = beta sigma_s^2 / sigma_t^2
    before, after = schedule.alpha(S) ** 2, schedule.alpha(T) ** 2
    beta = 1 - after / before
    x = torch.zeros(3, 1, dtype=F64)
    found = posterior(schedule, x, x, S, T)
    torch.testing.assert_close(found.upper[:, 0], beta, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.lower[:, 0], (1 - before) / (1 - after) * beta, rtol=1e-9, atol=0)


@every_schedule
def test_posterior_is_the_step_of_the_ancestral_sampler(schedule):
    x_t = random.normal(random.key(0), (4000, 1), F64)
    times = torch.tensor([0.9, 0.5], dtype=F64)
    guess = lambda x_t, t: 0.3 + 0.1 * x_t
    options = {"schedule": schedule, "steps": 2, "times": times, "dtype": F64, "return_path": True}
    _, path = sample_ddpm(random.key(1), guess, x_t.shape, x_t=x_t, **options)
    mean, variance, _ = posterior(schedule, guess(x_t, None), x_t, times[1], times[0])
    white = (path.x_t[1] - mean) / variance.sqrt()
    assert stats.kstest(white[:, 0].numpy(), "norm").pvalue > 1e-3


def test_interpolated_variance_runs_from_the_lower_to_the_upper():
    v = torch.tensor([0.0, 0.25, 1.0], dtype=F64)
    found = interpolate_variance(v, torch.tensor(0.01, dtype=F64), torch.tensor(16.0, dtype=F64))
    wanted = torch.tensor([0.01, 0.01**0.75 * 16.0**0.25, 16.0], dtype=F64)  # a geometric mean
    torch.testing.assert_close(found.exp(), wanted, rtol=1e-14, atol=0)


# Divergences.


@every_schedule
def test_transition_kl_is_the_fall_of_the_snr_times_the_error(schedule):
    # Kingma et al. 2021, eq. 13
    x, x_t, x_hat = draws(3, 4)
    fall = log_snr(schedule, S).exp() - log_snr(schedule, T).exp()
    found = transition_kl(schedule, x_hat, x, x_t, S, T)
    torch.testing.assert_close(found, 0.5 * fall * ((x - x_hat) ** 2).sum(1), rtol=1e-8, atol=0)


def test_transition_kl_with_a_variance_equals_torchs():
    x, x_t, x_hat = draws(3, 4)
    v = random.uniform(random.key(9), (3, 4), F64)
    q, p = (posterior(VPCosine(), estimate, x_t, S, T) for estimate in (x, x_hat))
    normals = [
        torch.distributions.Normal(q.mean, q.lower.sqrt().expand(3, 4)),
        torch.distributions.Normal(p.mean, (p.lower.log() * (1 - v) + p.upper.log() * v).mul(0.5).exp()),
    ]
    wanted = torch.distributions.kl_divergence(*normals).sum(1)
    torch.testing.assert_close(transition_kl(VPCosine(), (x_hat, v), x, x_t, S, T), wanted, rtol=1e-10, atol=0)


@every_schedule
def test_transition_kl_of_the_exact_model_is_the_posterior_variance(schedule):
    # E |x - E[x | x_t]|^2 = s^2 sigma^2 / (alpha^2 s^2 + sigma^2) for each element
    std, n = 0.6, 4000
    data = Gaussian(torch.full((3,), 0.2, dtype=F64), torch.tensor(std, dtype=F64))
    s, t = torch.full((n,), 0.3, dtype=F64), torch.full((n,), 0.35, dtype=F64)
    x = data.sample(random.key(0), n)
    x_t = mix(schedule, x, random.normal(random.key(1), x.shape, F64), t)
    found = transition_kl(schedule, exact(data, schedule)(x_t, t), x, x_t, s, t)
    alpha, sigma = schedule.alpha(t[0]) * std, schedule.sigma(t[0])
    fall = log_snr(schedule, s[0]).exp() - log_snr(schedule, t[0]).exp()
    within_four_errors(found, 0.5 * fall * 3 * (std * sigma) ** 2 / (alpha**2 + sigma**2))


# The last step.


@pytest.mark.parametrize("levels", [2, 5, 17, 256])
@pytest.mark.parametrize("log_std", [-6.0, -2.0, 1.0])
def test_masses_of_all_levels_sum_to_one(levels, log_std):
    x = torch.linspace(-1, 1, levels, dtype=F64)[:, None]
    for mean in (-3.0, -0.9, 0.13, 1.0):
        moved, log_var = torch.full_like(x, mean), torch.full_like(x, 2 * log_std)
        nll = discretized_gaussian_nll(moved, log_var, x, levels=levels)
        torch.testing.assert_close((-nll).exp().sum(), torch.ones((), dtype=F64), rtol=1e-12, atol=0)


def test_masses_equal_differences_of_scipys_distribution():
    x = torch.tensor([[-1.0], [-0.5], [0.0], [0.5], [1.0]], dtype=F64)
    edges = [-math.inf, -0.75, -0.25, 0.25, 0.75, math.inf]
    for mean, std in ((0.1, 0.4), (-2.0, 1.0), (0.7, 0.05)):
        wanted = torch.tensor(
            [
                stats.norm.cdf(b, mean, std) - stats.norm.cdf(a, mean, std)
                if b < mean
                else stats.norm.sf(a, mean, std) - stats.norm.sf(b, mean, std)
                for a, b in itertools.pairwise(edges)
            ]
        )
        full = torch.full_like(x, mean), torch.full_like(x, 2 * math.log(std))
        torch.testing.assert_close(
            (-discretized_gaussian_nll(*full, x, levels=5)).exp(), wanted, rtol=1e-9, atol=1e-300
        )


def test_masses_far_away_keep_their_logarithm():
    # the bin of 0, (-1/2, 1/2), under N(-20, 0.1^2): nearly the tail beyond its near end, 195 standard deviations away
    nll = discretized_gaussian_nll(
        torch.full((1, 1), -20.0), torch.full((1, 1), 2 * math.log(0.1)), torch.zeros(1, 1), levels=3
    )
    torch.testing.assert_close(nll.double(), torch.tensor([-stats.norm.logsf(195.0)], dtype=F64), rtol=1e-5, atol=0)


def test_decoder_of_real_data_is_a_gaussian():
    x, x_hat, _ = draws(3, 2)
    alpha, sigma = EDM().alpha(T), EDM().sigma(T)
    normal = torch.distributions.Normal(x_hat, (sigma / (alpha**2 + sigma**2).sqrt())[:, None])
    found = decoder_nll(EDM(), x_hat, x, T, levels=None)
    torch.testing.assert_close(found, -normal.log_prob(x).sum(1), rtol=1e-12, atol=0)


# The bound.


def kept(schedule, t, x, std: float):
    """KL(q(x_t | x) || q(x_t)) for data N(0, std^2) in bits per dimension, q(x_t) = N(0, alpha^2 std^2 + sigma^2)."""
    q = torch.distributions.Normal(schedule.alpha(t) * x, schedule.sigma(t))
    p = torch.distributions.Normal(0 * x, ((schedule.alpha(t) * std) ** 2 + schedule.sigma(t) ** 2).sqrt())
    return torch.distributions.kl_divergence(q, p).mean() / NATS


def right_variance(schedule, times, std: float):
    """The exact estimate (x_hat, v) of data N(0, std^2): p(x_s | x_t) is the true one, for s the time after t."""
    data = Gaussian(torch.zeros(2, dtype=F64), torch.tensor(std, dtype=F64))

    def denoise(x_t, t):
        i = (times - t[0]).abs().argmin()
        s, t = times[(i + 1).clamp(max=len(times) - 1)], times[i]
        (step, q), var = chain(schedule, s, t), (schedule.alpha(s) * std) ** 2 + schedule.sigma(s) ** 2
        _, lower, upper = posterior(schedule, x_t, x_t, s, t)
        right = var - (step * var) ** 2 / (step**2 * var + q)
        v = (right / lower).log() / (upper / lower).log()
        return exact(data, schedule)(x_t, t), v + torch.zeros_like(x_t)

    return denoise


@pytest.mark.parametrize("std", [1.0, 0.4])
@pytest.mark.parametrize("steps", [2, 12])
def test_bound_with_the_right_variance_is_exact_in_any_number_of_steps(std, steps):
    # the true p(x_s | x_t) of Gaussian data is Gaussian: with its variance the divergences of the steps add up to that
    # of the last x_t, by the chain rule
    schedule = ZeroTerminalSNR(VPLinear())
    x, times = torch.tensor([0.3, -1.1], dtype=F64), rho_times(schedule, steps)
    denoise, options = right_variance(schedule, times, std), {"schedule": schedule, "steps": steps, "levels": None}
    found = variational_bound(denoise, random.key(0), x.expand(4000, 2), **options)
    wanted = kept(schedule, times[-1], x, std)
    assert abs(found.diffusion.mean() - wanted) < 4 * found.diffusion.std() / math.sqrt(4000) + 1e-9  # rounding
    assert found.prior.max() < 1e-12
    torch.testing.assert_close(found.total, found.prior + found.diffusion + found.reconstruction)


@pytest.mark.parametrize("schedule", [ZeroTerminalSNR(VPLinear()), EDM()], ids=lambda s: type(s).__name__)
def test_bound_tends_to_the_likelihood_of_the_smoothed_data(schedule):
    # -log q(x_t) is the limit, less the entropy of the noise; with beta-tilde for variance the error falls as 1 / steps
    std, n = 0.5, 100
    data = Gaussian(torch.zeros(2, dtype=F64), torch.tensor(std, dtype=F64))
    x = torch.tensor([0.3, -0.7], dtype=F64)
    limit = kept(schedule, rho_times(schedule, 2)[-1], x, std)
    found = [
        variational_bound(
            exact(data, schedule), random.key(0), x.expand(n, 2), schedule=schedule, steps=steps
        ).diffusion
        for steps in (100, 200)
    ]
    errors, scatter = [part.mean() - limit for part in found], found[1].std() / math.sqrt(n)
    assert abs(errors[0] / errors[1] - 2) < 0.3 + 4 * scatter / errors[1]  # 1 / steps^2 adds its part


def test_bound_of_discrete_data_is_above_its_entropy_and_near_it():
    # pixels uniform on three levels, the exact denoiser: -log2 p(x) is log2(3) for each
    schedule, grid = VPCosine(), torch.tensor([-1.0, 0.0, 1.0], dtype=F64)

    def denoise(x_t, t):
        alpha, sigma = schedule.alpha(t)[:, None, None], schedule.sigma(t)[:, None, None]
        return (-0.5 * ((x_t[..., None] - alpha * grid) / sigma) ** 2).softmax(-1) @ grid

    x = grid[random.randint(random.key(0), (300, 4), 0, 3)]
    coarse, fine = (
        variational_bound(denoise, random.key(1), x, schedule=schedule, steps=steps, levels=3).total
        for steps in (50, 250)
    )
    error = 4 * fine.std() / math.sqrt(300)
    assert -error < fine.mean() - math.log2(3) < 0.08 + error
    assert coarse.mean() > fine.mean() + 0.1


def test_one_transition_stands_for_all():
    x = torch.tensor([[0.2, -0.4]], dtype=F64).expand(6000, 2)
    data = Gaussian(torch.zeros(2, dtype=F64), torch.tensor(0.5, dtype=F64))
    options = {"schedule": VPLinear(), "steps": 20, "levels": 2}
    whole = variational_bound(exact(data, VPLinear()), random.key(0), x, **options)
    parts = variational_bound(exact(data, VPLinear()), random.key(1), x, every_step=False, **options)
    within_four_errors(parts.diffusion, whole.diffusion.mean())


def test_bound_takes_other_times():
    x, key = draws(3, 2)[0], random.key(0)
    guess, options = (lambda x_t, t: 0.5 * x_t), {"schedule": VPLinear(), "steps": 6, "levels": None}
    found = variational_bound(guess, key, x, times=uniform_times, **options)
    given = variational_bound(guess, key, x, times=uniform_times(VPLinear(), 6), **options)
    assert torch.equal(found.total, given.total)
    assert (found.total - variational_bound(guess, key, x, **options).total).abs().min() > 0.1


@pytest.mark.parametrize("schedule", [VPCosine(), EDM(), FlowMatching()], ids=lambda s: type(s).__name__)
def test_bound_in_float32_equals_that_in_float64(schedule):
    x = draws(5, 3)[0]  # a guess without x_t: the bound does not depend on the noise, which the dtypes draw differently
    found, wanted = (
        variational_bound(lambda x_t, t, y=y: 0.5 * y, random.key(0), y, schedule=schedule, steps=100, levels=None)
        for y in (x.float(), x)
    )
    assert found.total.dtype == torch.float32
    torch.testing.assert_close(found.total.double(), wanted.total, rtol=1e-4, atol=0)  # of 1e6 differences of log-SNR


# The hybrid loss.


def network(params):
    """(b, 2) -> (b, 4): an estimate of the noise, and v."""
    return lambda x_t, t: torch.cat([x_t @ params["mean"], params["v"] + 0.1 * x_t * t[:, None]], 1)


PARAMS = {"mean": torch.tensor([[0.9, 0.1], [0.0, 0.7]], dtype=F64), "v": torch.full((1, 2), 0.4, dtype=F64)}


def test_hybrid_loss_equals_its_terms_in_a_loop():
    x, key, steps, schedule = 0.5 * draws(16, 2)[0], random.key(3), 4, VPCosine()
    times = uniform_times(schedule, steps)
    key_time, key_noise = random.split(key)
    i, noise = random.randint(key_time, (16,), 0, steps), random.normal(key_noise, x.shape, F64)
    assert set(i.tolist()) == {0, 1, 2, 3}
    wanted = []
    for n in range(16):
        t, draw, example = times[i[n]][None], noise[n : n + 1], x[n : n + 1]
        x_t = mix(schedule, example, draw, t)
        alone = lambda x_t, t: network(PARAMS)(x_t, t)[:, :2]
        simple = loss_at(alone, example, draw, t, schedule=schedule, prediction="eps")
        estimate = denoiser_and_variance(network(PARAMS), schedule=schedule)(x_t, t)
        if i[n] == steps - 1:
            term = decoder_nll(schedule, estimate, example, t, levels=None)
        else:
            term = transition_kl(schedule, estimate, example, x_t, times[i[n] + 1][None], t)
        wanted.append(simple + 0.01 * steps * term / (2 * NATS))
    options = {"schedule": schedule, "steps": steps, "levels": None, "vlb_weight": 0.01}
    found = hybrid_loss(network(PARAMS), key, x, **options)
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-12, atol=0)


def test_hybrid_loss_trains_the_mean_by_the_simple_loss_alone():
    x, options = 0.5 * draws(64, 2)[0], {"schedule": VPCosine(), "steps": 10}
    slopes = [
        torch.func.grad(
            lambda params, weight: hybrid_loss(network(params), random.key(0), x, vlb_weight=weight, **options).mean()
        )(PARAMS, weight)
        for weight in (0.0, 1.0)
    ]
    torch.testing.assert_close(slopes[0]["mean"], slopes[1]["mean"], rtol=1e-13, atol=0)
    assert slopes[0]["v"].abs().max() == 0
    assert slopes[1]["v"].abs().min() > 1e-3


def test_learned_variance_of_normal_data_is_the_upper():
    # N(0, 1): p(x_s | x_t) has beta for its variance, v = 1 at every time
    schedule, x = VPLinear(), random.normal(random.key(0), (20_000, 1), F64)

    def total(v, key):
        exact_noise = lambda x_t, t: torch.cat([schedule.sigma(t)[:, None] * x_t, v.expand_as(x_t)], 1)
        return hybrid_loss(exact_noise, key, x, schedule=schedule, steps=20, levels=None, vlb_weight=1.0)

    slope = lambda v: torch.func.jvp(lambda v: total(v, random.key(1)), (v,), (torch.ones_like(v),))[1]
    within_four_errors(slope(torch.ones((), dtype=F64)), 0.0)
    for v, sign in ((0.6, -1), (1.4, 1)):
        found = slope(torch.tensor(v, dtype=F64))
        assert sign * found.mean() > 4 * found.std() / math.sqrt(len(x))


def test_training_step_with_a_learned_variance_is_one_graph():
    net, tx, average = nn.MLP(3, (16,), 4), optim.adam(1e-2), ema.constant(0.9)

    def loss_fn(params, key, batch):
        bound = lambda x_t, t: net(params, torch.cat([x_t, t[:, None]], 1))
        return hybrid_loss(bound, key, batch, schedule=VPCosine(), steps=50, levels=17).mean()

    step = jit(make_step(loss_fn, tx, average), donate_argnums=0, backend="aten")
    state = init_state(net.init(random.key(0)), tx, random.key(1), ema=average)
    for i in range(3):
        state, metrics = step(state, random.normal(random.key(i), (5, 2)).round().clamp(-1, 1))
    assert step.traces == 1
    assert metrics["loss"].isfinite()


# Bad input.


def test_bad_input_is_named():
    x, options = torch.zeros(2, 3), {"schedule": VPCosine(), "steps": 4}
    same = lambda x_t, t: x_t
    with pytest.raises(TypeError, match=r"variational_bound: x: expected a floating-point tensor, got torch\.int64"):
        variational_bound(same, random.key(0), x.long(), **options)
    with pytest.raises(ValueError, match="variational_bound: expected 2 <= steps, got 1"):
        variational_bound(same, random.key(0), x, schedule=VPCosine(), steps=1)
    with pytest.raises(ValueError, match=r"variational_bound: times: expected shape \(steps=4,\), got \(3,\)"):
        variational_bound(same, random.key(0), x, times=torch.ones(3), **options)
    with pytest.raises(ValueError, match="discretized_gaussian_nll: expected 2 <= levels, got 1"):
        variational_bound(same, random.key(0), x, levels=1, **options)
    with pytest.raises(
        ValueError, match=r"network: expected output of shape \(2, 6\), for x and its variance, got \(2, 3\)"
    ):
        hybrid_loss(same, random.key(0), x, **options)
    with pytest.raises(TypeError, match=r"hybrid_loss: x: expected a floating-point tensor, got torch\.int64"):
        hybrid_loss(same, random.key(0), x.long(), **options)
    with pytest.raises(ValueError, match=r"posterior: x: expected shape \(2, 3\), as x_t has, got \(2, 1\)"):
        variational_bound(lambda x_t, t: x_t[:, :1], random.key(0), x, **options)
    with pytest.raises(ValueError, match=r"decoder_nll: estimate: expected shape \(2, 3\), as x has, got \(2, 1\)"):
        decoder_nll(VPCosine(), x[:, :1], x, torch.ones(2), levels=None)
    with pytest.raises(ValueError, match=r"denoiser_and_variance: x_t: expected shape \(b, c, \.\.\.\), got \(2,\)"):
        hybrid_loss(same, random.key(0), x[:, 0], **options)
