"""Weights of noise levels, fixed and learned, against the formulas of their papers and integrals in closed form."""

import math

import pytest
import torch

from functorch_gen import ema, grad, jit, optim, random
from functorch_gen.diffusion import (
    EDMWeight,
    LogitNormalTime,
    LogNormalTime,
    MinSNRWeight,
    P2Weight,
    Prediction,
    StratifiedTime,
    Uncertainty,
    UniformTime,
    balance,
    likelihood_weight,
    loss,
    loss_at,
)
from functorch_gen.exact import Gaussian
from functorch_gen.noise import EDM, FlowMatching, VPCosine, VPLinear, VPSigmoid, log_snr
from functorch_gen.step import init_state, make_step

F64 = torch.float64
TIMES = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=F64)


def silent(x_t, condition):
    return torch.zeros_like(x_t)


# Fixed.


@pytest.mark.parametrize(("gamma", "k"), [(1.0, 1.0), (0.5, 2.0)])
def test_p2_weight_of_the_noise_is_that_of_the_paper(gamma, k):
    # Choi et al. 2022, eq. 8: the error of the noise is divided by (k + SNR)^gamma
    x, noise = (random.normal(random.key(i), (4, 3), F64) for i in (0, 1))
    found = loss_at(silent, x, noise, TIMES, schedule=VPLinear(), prediction="eps", weighting=P2Weight(gamma, k))
    snr = VPLinear().alpha(TIMES) ** 2 / VPLinear().sigma(TIMES) ** 2
    torch.testing.assert_close(found, (noise**2).mean(1) / (k + snr) ** gamma, rtol=1e-12, atol=0)


@pytest.mark.slow
def test_p2_weight_without_an_exponent_compiles():
    # x ** 0 within a loop that Inductor generates, and its derivative
    def total(level, prediction):
        return (P2Weight(gamma=0.0)(level) * (level - prediction) ** 2).sum()

    level, prediction = (random.normal(random.key(i), (5,)) for i in (0, 1))
    gradients = grad(total, argnums=(0, 1))
    torch.testing.assert_close(jit(gradients)(level, prediction), gradients(level, prediction))


def test_likelihood_weight_of_the_score_is_half_the_rate_of_noising():
    # Song et al. 2021, theorem 1: g^2 / 2 of the score's error, which is that of the noise over sigma^2; g^2 = beta
    x, noise = (random.normal(random.key(i), (4, 3), F64) for i in (0, 1))
    found = loss_at(silent, x, noise, TIMES, schedule=VPLinear(), prediction="eps", weighting="likelihood")
    beta = 0.1 + 19.9 * TIMES
    wanted = 0.5 * beta * (noise**2).mean(1) / VPLinear().sigma(TIMES) ** 2
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=0)


@pytest.mark.parametrize("schedule", [VPLinear(), VPCosine(), VPSigmoid(), EDM(), FlowMatching()], ids=str)
def test_likelihood_weight_integrates_to_half_the_fall_of_the_snr(schedule):
    # Simpson's rule on 2000 intervals: the rest is of fourth order
    t = torch.linspace(0.2, 0.9, 2001, dtype=F64)
    weight = likelihood_weight(schedule, t)
    simpson = (weight[0] + weight[-1] + 4 * weight[1::2].sum() + 2 * weight[2:-1:2].sum()) * (0.7 / 2000 / 3)
    start, end = log_snr(schedule, t[[0, -1]]).exp()
    torch.testing.assert_close(simpson, 0.5 * (start - end), rtol=1e-7, atol=0)


def test_likelihood_weight_is_zero_beyond_its_range():
    found = likelihood_weight(FlowMatching(), torch.tensor([0.0, 1e-6, 1.0]))  # log-SNR 20 is at t = 5e-5
    assert torch.equal(found, torch.zeros(3))


def test_likelihood_loss_is_the_information_in_the_noisy_data():
    # E of the exact network: the integral of -SNR' / 2 s^2 / (1 + s^2 SNR), which is the mutual information of x and
    # x_t at t = 0 (Guo et al. 2005), log(1 + s^2 SNR) / 2 for each element
    s, n = 0.7, 8000
    data = Gaussian(torch.zeros(4, dtype=F64), torch.tensor(s, dtype=F64))
    network = lambda x_t, t: data.denoise(x_t, EDM().alpha(t), EDM().sigma(t))
    x, options = data.sample(random.key(0), n), {"schedule": EDM(), "prediction": "x", "weighting": "likelihood"}
    found = loss(network, random.key(1), x, time=StratifiedTime(), **options)
    low, high = (s / EDM().sigma(torch.tensor([1.0, 0.0], dtype=F64))).square()
    wanted = 0.5 * ((1 + high) / (1 + low)).log()
    assert abs(found.mean() - wanted) < 4 * found.std() / math.sqrt(n)


# Learned.


def test_balance_is_least_at_the_logarithm_of_the_mean_loss():
    losses = random.normal(random.key(0), (500,), F64).square()
    total = lambda u: balance(losses, u.expand(500)).mean()
    best = losses.mean().log()
    torch.testing.assert_close(torch.func.grad(total)(best), torch.zeros((), dtype=F64), rtol=0, atol=1e-13)
    torch.testing.assert_close(total(best), 1 + best, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.func.hessian(total)(best), torch.ones((), dtype=F64), rtol=1e-12, atol=0)  # convex


def test_balanced_levels_have_gradients_of_one_size():
    # at the optimum the weighted loss is 1 at every level, however different the losses are
    losses = torch.tensor([1e-4, 1.0, 50.0], dtype=F64)
    torch.testing.assert_close(balance(losses, losses.log()) - losses.log(), torch.ones(3, dtype=F64))


def test_loss_with_uncertainty_balances_the_weighted_loss():
    x, noise = (random.normal(random.key(i), (4, 3), F64) for i in (0, 1))
    options = {"schedule": VPCosine(), "weighting": "min_snr"}
    found = loss_at(silent, x, noise, TIMES, uncertainty=lambda level: 0.3 * level, **options)
    u = 0.3 * log_snr(VPCosine(), TIMES)
    torch.testing.assert_close(found, loss_at(silent, x, noise, TIMES, **options) / u.exp() + u, rtol=1e-13, atol=0)


def test_uncertainty_learns_the_logarithm_of_the_loss():
    # the loss of the exact network for the noise is alpha^2 s^2 / (alpha^2 s^2 + sigma^2), whatever is drawn: ORACLES
    s, layer, tx = 0.7, Uncertainty(), optim.adam(optim.cosine_decay_schedule(0.05, 400))
    levels = torch.linspace(-6, 6, 64)
    floor = s**2 * levels.exp() / (1 + s**2 * levels.exp())
    step = jit(make_step(lambda params, key, batch: balance(batch, layer(params, levels)).mean(), tx), backend="aten")
    state = init_state(layer.init(random.key(0)), tx, random.key(1))
    assert torch.equal(layer(state.params, levels), torch.zeros(64))
    for _ in range(400):
        state, _ = step(state, floor)
    assert (layer(state.params, levels) - floor.log()).abs().max() < 0.1  # a tenth of the loss; it spans a factor 800


def test_training_step_with_uncertainty_is_one_graph():
    layer, tx, average = Uncertainty(8), optim.adam(1e-2), ema.constant(0.9)

    def loss_fn(params, key, batch):
        network = lambda x_t, t: x_t @ params["net"]
        options = {"schedule": EDM(), "prediction": Prediction("edm", 1.0), "weighting": "edm"}
        return loss(network, key, batch, uncertainty=lambda level: layer(params["u"], level), **options).mean()

    params = {"net": torch.zeros(3, 3), "u": layer.init(random.key(0))}
    step = jit(make_step(loss_fn, tx, average), donate_argnums=0, backend="aten")
    state = init_state(params, tx, random.key(1), ema=average)
    for i in range(3):
        state, metrics = step(state, random.normal(random.key(i), (5, 3)))
    assert step.traces == 1
    assert metrics["loss"].isfinite()
    assert state.params["u"]["linear"]["weight"].abs().max() > 0


# Bad settings.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSNRWeight(0.0), "MinSNRWeight: expected gamma > 0, got 0.0"),
        (lambda: EDMWeight(0.0), "EDMWeight: expected sigma_data > 0, got 0.0"),
        (lambda: P2Weight(gamma=-1.0), "P2Weight: expected 0 <= gamma, got -1.0"),
        (lambda: P2Weight(k=-1.0), "P2Weight: expected 0 <= k, got -1.0"),
        (lambda: Uncertainty(0), "Uncertainty: expected features > 0, got 0"),
        (lambda: UniformTime(0.5, 0.2), "UniformTime: expected 0 <= low < high <= 1, got low=0.5, high=0.2"),
        (lambda: UniformTime(high=2.0), "UniformTime: expected 0 <= low < high <= 1, got low=0.0, high=2.0"),
        (lambda: LogitNormalTime(std=-1.0), "LogitNormalTime: expected 0 <= std, got -1.0"),
        (lambda: LogNormalTime(EDM(), std=-1.0), "LogNormalTime: expected 0 <= std, got -1.0"),
        (lambda: balance(torch.ones(4), torch.ones(4, 1)), r"balance: u: expected shape \(4,\), as losses has, got"),
        (lambda: weighed(lambda level: level[:, None]), r"loss: weighting: expected shape \(b=2,\), got \(2, 1\)"),
        (lambda: weighed("snr", torch.ones(())), r"loss: x: expected shape \(b, \.\.\.\), got \(\)"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def weighed(weighting, x=None):
    x = torch.ones(2, 3) if x is None else x
    return loss(silent, random.key(0), x, schedule=EDM(), weighting=weighting)
