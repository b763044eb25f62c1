"""Predictions, the objective and guidance, on Gaussian data whose optimal network is known."""

import math

import pytest
import torch
from scipy import stats
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import random
from functorch_gen.diffusion import (
    EDMWeight,
    LogitNormalTime,
    LogNormalTime,
    MinSNRWeight,
    Prediction,
    StratifiedTime,
    UniformTime,
    convert,
    denoiser,
    guide,
    guide_network,
    loss,
    loss_at,
    network_inputs,
    output_scale,
    target,
    to_noise,
    to_x,
)
from functorch_gen.exact import Gaussian
from functorch_gen.noise import EDM, FlowMatching, Shifted, SubVP, VPCosine, VPLinear, VPSigmoid, ZeroTerminalSNR, mix

F64 = torch.float64
PREDICTIONS = [Prediction(kind, 0.7) for kind in ("eps", "x", "v", "flow", "edm")]
SCHEDULES = [VPLinear(), VPCosine(), EDM(), FlowMatching()]
NEWER = [SubVP(), VPSigmoid(), ZeroTerminalSNR(VPLinear()), Shifted(VPCosine(), 4.0)]
NAMED = ["uniform", "snr", "min_snr", "p2", "edm", "likelihood"]
WEIGHTINGS = [*NAMED, MinSNRWeight(2.0), lambda log_snr: torch.sigmoid(log_snr)]
every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS, ids=lambda p: p.kind)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def draws(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return random.normal(random.key(1), shape, F64), random.normal(random.key(2), shape, F64)


def exact_network(prediction: Prediction, data: Gaussian, schedule):
    """The optimal raw output at time t; ``loss_at`` and ``denoiser`` hand over c_in x_t and c_noise for "edm"."""

    def network(x_in, condition):
        if prediction.kind != "edm":
            alpha, sigma = schedule.alpha(condition), schedule.sigma(condition)
            x_t = x_in
        else:
            ratio = (4 * condition).exp()
            t = schedule.t_of(ratio)
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            spread = ((alpha * prediction.sigma_data) ** 2 + sigma**2).sqrt()
            x_t = x_in * spread.reshape(-1, *[1] * (x_in.ndim - 1))
        return convert(data.denoise(x_t, alpha, sigma), x_t, alpha, sigma, source="x", to=prediction)

    return network


# Predictions.


@every_schedule
@every_prediction
def test_target_converts_back_to_data_and_noise(prediction, schedule):
    x, noise = draws(5, 2, 3)
    t = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98], dtype=F64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t, output = mix(schedule, x, noise, t), target(prediction, x, noise, schedule.alpha(t), schedule.sigma(t))
    # rounding of x_t, at most 1e-16 * 80, over the smallest scale, 0.002
    torch.testing.assert_close(to_x(prediction, output, x_t, alpha, sigma), x, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_noise(prediction, output, x_t, alpha, sigma), noise, rtol=1e-10, atol=1e-10)


@every_schedule
@pytest.mark.parametrize("to", PREDICTIONS, ids=lambda p: p.kind)
@every_prediction
def test_convert_round_trips(prediction, to, schedule):
    x_t, output = draws(4, 6)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=F64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    there = convert(output, x_t, alpha, sigma, source=prediction, to=to)
    back = convert(there, x_t, alpha, sigma, source=to, to=prediction)
    torch.testing.assert_close(back, output, rtol=1e-8, atol=1e-8)  # eps at alpha = 0.006 or x at sigma = 0.002


def test_edm_equals_the_papers_table():
    # Karras et al. 2022, eq. 7 and table 1
    x_t, output = draws(3, 4)
    sigma, sd = torch.tensor([0.01, 0.5, 40.0], dtype=F64), 0.7
    alpha, s = torch.ones_like(sigma), sigma[:, None]
    c_skip, c_out = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt()
    c_in, c_noise = 1 / (s**2 + sd**2).sqrt(), sigma.log() / 4
    edm = Prediction("edm", sd)
    torch.testing.assert_close(to_x(edm, output, x_t, alpha, sigma), c_skip * x_t + c_out * output, rtol=1e-13, atol=0)
    x_in, condition = network_inputs(edm, x_t, sigma, alpha, sigma)
    torch.testing.assert_close(x_in, c_in * x_t, rtol=1e-14, atol=0)
    torch.testing.assert_close(condition, c_noise, rtol=1e-14, atol=0)


def test_edm_of_a_scaled_sample_is_that_of_the_unscaled():
    x_t, output = draws(3, 4)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1], dtype=F64), torch.tensor([0.2, 0.5, 2.0], dtype=F64)
    y, one = x_t / alpha[:, None], torch.ones_like(alpha)
    torch.testing.assert_close(
        to_x("edm", output, x_t, alpha, sigma), to_x("edm", output, y, one, sigma / alpha), rtol=1e-13, atol=1e-14
    )
    for ours, unscaled in zip(
        network_inputs("edm", x_t, one, alpha, sigma), network_inputs("edm", y, one, one, sigma / alpha), strict=True
    ):
        torch.testing.assert_close(ours, unscaled, rtol=1e-13, atol=1e-14)


@every_prediction
def test_output_scale_is_the_derivative_of_the_estimate(prediction):
    alpha, sigma = torch.tensor([0.8, 0.3], dtype=F64), torch.tensor([0.1, 1.2], dtype=F64)
    x_t, output = draws(2, 1)
    slope = torch.func.grad(lambda out: to_x(prediction, out, x_t, alpha, sigma).sum())(output)
    torch.testing.assert_close(output_scale(prediction, alpha, sigma), slope[:, 0], rtol=1e-13, atol=0)


@every_prediction
def test_conversions_are_finite_at_both_ends(prediction):
    x_t, output = draws(2, 3)
    alpha, sigma = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)

    def all_of(output, x_t, alpha, sigma):
        x_in, condition = network_inputs(prediction, x_t, alpha, alpha, sigma)
        estimates = [f(prediction, output, x_t, alpha, sigma) for f in (to_x, to_noise, target)]
        return sum(y.sum() for y in (*estimates, x_in, condition, output_scale(prediction, alpha, sigma)))

    assert all_of(output, x_t, alpha, sigma).isfinite()
    for slope in torch.func.grad(all_of, argnums=(0, 1, 2, 3))(output, x_t, alpha, sigma):
        assert slope.isfinite().all()


@every_prediction
def test_scales_may_be_numbers(prediction):
    x_t, output = draws(2, 3)
    alpha, sigma = torch.full((2,), 0.6, dtype=F64), torch.full((2,), 0.8, dtype=F64)
    for f in (to_x, to_noise, target):
        wanted = f(prediction, output, x_t, alpha, sigma)
        torch.testing.assert_close(f(prediction, output, x_t, 0.6, 0.8), wanted, rtol=1e-15, atol=1e-15)


# The loss floors: the exact network leaves the posterior variance (ORACLES).

N = 4000  # examples of 4 elements each


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(len(values))


@pytest.mark.parametrize("sigma", [0.002, 0.1, 1.0, 80.0])
def test_edm_loss_of_the_exact_network_is_one_at_every_sigma(sigma):
    s, schedule, prediction = 0.7, EDM(), Prediction("edm", 0.7)
    data = Gaussian(torch.zeros(4, dtype=F64), torch.tensor(s, dtype=F64))
    x, noise = draws(N, 4)
    t = schedule.t_of(torch.full((N,), sigma, dtype=F64))
    found = loss_at(
        exact_network(prediction, data, schedule), s * x, noise, t, schedule=schedule, prediction=prediction
    )
    mean, error = mean_and_error(found)
    assert abs(mean - 1) < 4 * error


@pytest.mark.parametrize("schedule", [*SCHEDULES[:2], FlowMatching(), *NEWER], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_eps_loss_of_the_exact_network_is_the_closed_form(schedule, t):
    s, prediction = 0.7, Prediction("eps")
    data = Gaussian(torch.full((4,), 0.3, dtype=F64), torch.tensor(s, dtype=F64))
    x, noise = draws(N, 4)
    t = torch.full((N,), t, dtype=F64)
    network = exact_network(prediction, data, schedule)
    found = loss_at(network, 0.3 + s * x, noise, t, schedule=schedule, prediction=prediction)
    a, b = schedule.alpha(t[0]) * s, schedule.sigma(t[0])
    mean, error = mean_and_error(found)
    assert abs(mean - a**2 / (a**2 + b**2)) < 4 * error


def test_flow_loss_of_the_exact_network_is_s_pi_half():
    s, schedule, prediction = 0.7, FlowMatching(), Prediction("flow")
    data = Gaussian(torch.zeros(4, dtype=F64), torch.tensor(s, dtype=F64))
    x, _ = draws(N, 4)
    found = loss(
        exact_network(prediction, data, schedule), random.key(3), s * x, schedule=schedule, prediction=prediction
    )
    mean, error = mean_and_error(found)
    assert abs(mean - s * math.pi / 2) < 4 * error


# Weightings.


@every_schedule
@pytest.mark.parametrize("weighting", WEIGHTINGS[1:], ids=[*NAMED[1:], "MinSNRWeight", "sigmoid"])
def test_weightings_of_the_data_do_not_depend_on_the_prediction(weighting, schedule):
    # networks that say the same in other words have the same weighted loss; sigma_data is that of the edm prediction
    data = Gaussian(torch.zeros(3, dtype=F64), torch.tensor(1.3, dtype=F64))
    x, noise = draws(6, 3)
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    found = [
        loss_at(exact_network(p, data, schedule), x, noise, t, schedule=schedule, prediction=p, weighting=weighting)
        for p in PREDICTIONS
    ]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("weighting", "weight"),
    [
        ("snr", lambda snr: snr),
        ("min_snr", lambda snr: snr.clamp(max=5)),
        ("p2", lambda snr: snr / (1 + snr)),
        ("edm", lambda snr: (1 / snr + 0.7**2) / (0.7**2 / snr)),  # (s^2 + sd^2) / (s sd)^2, s^2 = 1 / SNR
        (lambda log_snr: torch.sigmoid(log_snr), lambda snr: snr / (1 + snr)),
    ],
)
def test_weightings_equal_their_formulas(weighting, weight):
    x, noise = draws(4, 3)
    t, schedule, zero = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=F64), VPLinear(), torch.zeros_like
    options = {"schedule": schedule, "prediction": Prediction("x", 0.7)}
    found = loss_at(lambda x_t, t: zero(x_t), x, noise, t, weighting=weighting, **options)
    snr = schedule.alpha(t) ** 2 / schedule.sigma(t) ** 2
    torch.testing.assert_close(found, weight(snr) * (x**2).mean(1), rtol=1e-12, atol=0)


def test_edm_weight_is_that_of_the_paper():
    s = torch.tensor([0.01, 1.0, 50.0], dtype=F64)
    torch.testing.assert_close(EDMWeight(0.5)(-2 * s.log()), (s**2 + 0.25) / (0.5 * s) ** 2, rtol=1e-13, atol=0)


def test_uniform_equals_the_weighting_that_each_prediction_implies():
    x, noise = draws(4, 3)
    t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=F64)
    implied = {"eps": "snr", "x": torch.ones_like, "v": lambda log_snr: 1 + log_snr.exp(), "edm": "edm"}
    for kind, weighting in implied.items():
        options = {"schedule": VPLinear(), "prediction": Prediction(kind, 0.7)}
        uniform = loss_at(lambda x_t, c: x_t.tanh(), x, noise, t, **options)
        weighted = loss_at(lambda x_t, c: x_t.tanh(), x, noise, t, weighting=weighting, **options)
        torch.testing.assert_close(weighted, uniform, rtol=1e-11, atol=0)


@every_schedule
@every_prediction
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=[*NAMED, "MinSNRWeight", "sigmoid"])
def test_loss_and_gradient_are_finite_at_both_ends(weighting, prediction, schedule):
    x, noise = torch.ones(2, 3), torch.ones(2, 3)

    def total(scale, t):
        options = {"schedule": schedule, "prediction": prediction, "weighting": weighting}
        return loss_at(lambda x_t, condition: scale * x_t + condition[:, None], x, noise, t, **options).sum()

    value, t = total(torch.ones(()), torch.tensor([0.0, 1.0])), torch.tensor([0.0, 1.0])
    assert value.isfinite()
    assert all(slope.isfinite().all() for slope in torch.func.grad(total, argnums=(0, 1))(torch.ones(()), t))


# The loss as a function.


def test_loss_is_the_mean_square_at_drawn_times():
    x, _ = draws(5, 2, 3)
    key_time, key_noise = random.split(random.key(4))
    noise, t = random.normal(key_noise, x.shape, F64), random.uniform(key_time, (5,), F64)
    alpha, sigma = VPCosine().alpha(t)[:, None, None], VPCosine().sigma(t)[:, None, None]
    x_t, v = alpha * x + sigma * noise, alpha * noise - sigma * x
    wanted = ((torch.sin(x_t) - v) ** 2).flatten(1).mean(1)
    found = loss(lambda x_t, t: torch.sin(x_t), random.key(4), x, schedule=VPCosine())
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=0)


@every_prediction
def test_loss_vmaps_over_examples_and_keys(prediction):
    x, _ = draws(4, 3)
    keys, weight = random.split(random.key(0), 4), torch.ones(3, dtype=F64)

    def one(weight, key, x):
        network = lambda x_t, condition: weight * x_t + condition[:, None]
        return loss(network, key, x[None], schedule=VPLinear(), prediction=prediction, weighting="min_snr")[0]

    found = torch.func.vmap(torch.func.grad(one), in_dims=(None, 0, 0))(weight, keys, x)
    wanted = torch.stack([torch.func.grad(one)(weight, keys[i], x[i]) for i in range(4)])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_loss_traces_to_one_graph():
    x = torch.ones(4, 3)

    def total(weight, key):
        time = LogNormalTime(EDM())
        return loss(lambda x_t, c: weight * x_t, key, x, schedule=EDM(), prediction="edm", time=time).mean()

    step = torch.func.grad_and_value(total)
    graph = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(torch.ones(3), random.key(0))
    for ours, traced in zip(step(torch.ones(3), random.key(5)), graph(torch.ones(3), random.key(5)), strict=True):
        torch.testing.assert_close(traced, ours)


def test_loss_keeps_the_dtype():
    for dtype in (torch.float32, F64):
        found = loss(lambda x_t, t: x_t, random.key(0), torch.ones(2, 3, dtype=dtype), schedule=EDM(), prediction="edm")
        assert found.dtype == dtype


# Times.


@pytest.mark.parametrize(
    ("time", "law"),
    [
        (UniformTime(), stats.uniform()),
        (UniformTime(0.2, 0.7), stats.uniform(0.2, 0.5)),
        (StratifiedTime(), stats.uniform()),
    ],
)
def test_times_follow_their_law(time, law):
    assert stats.kstest(time(random.key(0), (4000,), F64).numpy(), law.cdf).pvalue > 1e-3


def test_logit_normal_times_follow_their_law():
    t = LogitNormalTime(0.5, 1.5)(random.key(0), (4000,), F64)
    assert stats.kstest(torch.logit(t).numpy(), stats.norm(0.5, 1.5).cdf).pvalue > 1e-3


@every_schedule
def test_log_normal_times_follow_their_law(schedule):
    t = LogNormalTime(schedule, -0.5, 0.8)(random.key(0), (4000,), F64)
    ratio = schedule.sigma(t) / schedule.alpha(t)
    assert stats.kstest(ratio.log().numpy(), stats.norm(-0.5, 0.8).cdf).pvalue > 1e-3


def test_stratified_times_fill_every_interval():
    t = StratifiedTime()(random.key(0), (50, 3), F64)
    for column in t.T:
        assert torch.equal((50 * column).floor().sort().values, torch.arange(50, dtype=F64))
    assert t[:, 0].sub(t[:, 1]).abs().max() > 1e-3


# The denoiser.


@pytest.mark.parametrize("schedule", [*SCHEDULES, *NEWER], ids=lambda s: type(s).__name__)
@every_prediction
def test_denoiser_of_the_exact_network_is_exact(prediction, schedule):
    data = Gaussian(torch.full((3,), 0.4, dtype=F64), torch.tensor(0.6, dtype=F64))
    denoise = denoiser(exact_network(prediction, data, schedule), schedule=schedule, prediction=prediction)
    t = torch.tensor([0.05, 0.3, 0.6, 0.95], dtype=F64)
    x_t = mix(schedule, *draws(4, 3), t)
    wanted = data.denoise(x_t, schedule.alpha(t), schedule.sigma(t))
    torch.testing.assert_close(denoise(x_t, t), wanted, rtol=1e-9, atol=1e-9)


def test_denoiser_clips_to_the_range_of_the_data():
    denoise = denoiser(lambda x_t, t: 10 * x_t, schedule=EDM(), prediction="x", clip=(-1.0, 2.0))
    assert torch.equal(denoise(torch.tensor([[-1.0, 0.1, 1.0]]), torch.ones(1)), torch.tensor([[-1.0, 1.0, 2.0]]))


# Guidance.


def test_guide_is_the_identity_at_scale_one_and_drops_the_label_at_zero():
    x_t, t = draws(2, 3)[0], torch.ones(2)
    conditional, unconditional = (lambda x_t, t: x_t.sin()), (lambda x_t, t: x_t.cos())
    torch.testing.assert_close(guide(conditional, unconditional, 1.0)(x_t, t), x_t.sin(), rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(guide(conditional, unconditional, 0.0)(x_t, t), x_t.cos(), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.5, 1.5, 3.0])
def test_guidance_between_gaussians_is_the_gaussian_beyond(scale):
    # N(m_c, s) away from N(m_u, s): density^scale / density^(scale - 1) is N(m_u + scale (m_c - m_u), s)
    s = torch.tensor(0.5, dtype=F64)
    conditional, unconditional = Gaussian(torch.ones(3, dtype=F64), s), Gaussian(torch.zeros(3, dtype=F64), s)
    beyond = Gaussian(torch.full((3,), scale, dtype=F64), s)
    denoisers = [
        lambda x_t, t, d=d: d.denoise(x_t, FlowMatching().alpha(t), FlowMatching().sigma(t))
        for d in (conditional, unconditional, beyond)
    ]
    x_t, t = draws(4, 3)[0], torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=F64)
    found = guide(denoisers[0], denoisers[1], scale)(x_t, t)
    torch.testing.assert_close(found, denoisers[2](x_t, t), rtol=1e-13, atol=1e-13)


def test_guide_takes_a_scale_of_each_time():
    x_t, t = draws(3, 2)[0], torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    scale = lambda t: torch.where(t > 0.3, 2.0, 1.0)
    found = guide(lambda x_t, t: x_t, lambda x_t, t: 0 * x_t, scale)(x_t, t)
    torch.testing.assert_close(found, x_t * torch.tensor([[1.0], [2.0], [2.0]], dtype=F64))


@every_prediction
def test_guide_network_equals_guide(prediction):
    weights = random.normal(random.key(0), (4, 3), F64)  # of labels 0..2 and the null label 3

    def network(x_t, condition, label):
        return torch.sin(x_t * weights[label]) + condition[:, None]

    label, null = torch.tensor([0, 2, 1]), torch.tensor([3, 3, 3])
    options = {"schedule": VPLinear(), "prediction": prediction}
    alone = [denoiser(lambda x_t, c, k=k: network(x_t, c, k), **options) for k in (label, null)]
    both = denoiser(guide_network(network, label, 3, 2.5), **options)
    x_t, t = draws(3, 3)[0], torch.tensor([0.1, 0.5, 0.9], dtype=F64)
    torch.testing.assert_close(both(x_t, t), guide(alone[0], alone[1], 2.5)(x_t, t), rtol=1e-11, atol=1e-11)


# Bad input.


def test_bad_names_list_the_choices():
    with pytest.raises(ValueError, match="expected kind to be one of 'eps', 'x', 'v', 'flow', 'edm', got 'u'"):
        to_x("u", torch.ones(1), torch.ones(1), 1.0, 1.0)
    with pytest.raises(ValueError, match="Prediction: expected sigma_data > 0, got 0"):
        Prediction("edm", 0)
    wanted = "loss: expected weighting to be one of 'uniform', 'snr', 'min_snr', 'p2', 'edm', 'likelihood', got 'snrr'"
    with pytest.raises(ValueError, match=wanted):
        loss(lambda x_t, t: x_t, random.key(0), torch.ones(2, 3), schedule=EDM(), weighting="snrr")


def test_bad_shapes_and_dtypes_are_named():
    same = lambda x_t, t: x_t
    with pytest.raises(TypeError, match=r"loss: x: expected a floating-point tensor, got torch\.int64"):
        loss(same, random.key(0), torch.ones(2, 3, dtype=torch.int64), schedule=EDM())
    with pytest.raises(ValueError, match=r"network: expected output of shape \(2, 3\), got \(2,\)"):
        loss(lambda x_t, t: t, random.key(0), torch.ones(2, 3), schedule=EDM())
    with pytest.raises(ValueError, match=r"mix: t: expected shape \(b=2,\), got \(\)"):
        loss_at(same, torch.ones(2, 3), torch.ones(2, 3), torch.tensor(0.5), schedule=EDM())
    with pytest.raises(ValueError, match=r"denoise: t: expected shape \(b=2,\), got \(3,\)"):
        denoiser(same, schedule=EDM())(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match=r"denoise: x_t: expected a floating-point tensor, got torch\.int64"):
        denoiser(same, schedule=EDM())(torch.ones(2, 3, dtype=torch.int64), torch.ones(2))
    with pytest.raises(ValueError, match=r"guide_network: label: expected shape \(2,\), got \(3,\)"):
        guide_network(lambda x_t, t, label: x_t, torch.zeros(3), 0, 1.0)(torch.ones(2, 3), torch.ones(2))
