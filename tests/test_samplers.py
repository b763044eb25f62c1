"""Samplers on data whose denoiser is exact: order, ends, modes, and behaviour under transforms."""

import itertools
from functools import partial

import numpy as np
import pytest
import torch
from sampler_cases import (
    DETERMINISTIC,
    F64,
    KEY,
    NEWER,
    SAMPLERS,
    SCHEDULES,
    curved,
    every_sampler,
    every_schedule,
    exact,
    normal_data,
)
from torch.fx.experimental.proxy_tensor import make_fx

import functorch_gen as fg
from functorch_gen import random
from functorch_gen.diffusion import (
    sample_ddim,
    sample_ddpm,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s,
    sample_dpmpp_3m,
    sample_edm,
    sample_euler,
    sample_heun,
    sample_predictor_corrector,
    sample_unipc,
)
from functorch_gen.exact import isotropic_mixture
from functorch_gen.noise import (
    EDM,
    FlowMatching,
    VPCosine,
    VPLinear,
    angle_times,
    rho_times,
    uniform_times,
)


def slow_but(*quick):
    return [pytest.param(f, marks=[] if f in quick else pytest.mark.slow, id=f.__name__) for f in SAMPLERS]


def point(value: float):
    return lambda x_t, t: torch.full_like(x_t, value)


# Order (ORACLES): the probability flow of N(m, s^2) is known in closed form.

ORDERS = {
    sample_euler: (1, 0.1),
    sample_ddim: (1, 0.1),
    sample_heun: (2, 0.2),
    sample_dpmpp_2s: (2, 0.2),
    sample_dpmpp_2m: (2, 0.2),
}
STEPS = (10, 20, 40, 80, 160)


def measured_order(sampler, schedule, mean: float, std: float) -> float:
    data = normal_data(mean, std)
    start = torch.ones((), dtype=F64)
    scales = schedule.alpha(start), schedule.sigma(start)
    x_t = scales[1] * random.normal(KEY, (2, 3), F64)
    wanted = data.flow(x_t, scales, (1.0, 0.0))
    errors = [
        (sampler(KEY, exact(data, schedule), (2, 3), schedule=schedule, steps=n, x_t=x_t, dtype=F64) - wanted).norm()
        for n in STEPS
    ]
    return -np.polyfit(np.log(STEPS), np.log([error.item() for error in errors]), 1)[0]


@every_schedule
@pytest.mark.parametrize(
    "sampler", [sample_euler, sample_heun, sample_dpmpp_2s, sample_dpmpp_2m], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.7, 1.0)])
def test_samplers_have_their_order(sampler, schedule, mean, std):
    order, tolerance = ORDERS[sampler]
    assert abs(measured_order(sampler, schedule, mean, std) - order) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [*SCHEDULES, *NEWER], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("sampler", ORDERS, ids=lambda f: f.__name__)
def test_samplers_have_their_order_for_narrow_and_wide_data(sampler, schedule):
    order, tolerance = ORDERS[sampler]
    for mean, std in itertools.product((0.0, -1.5), (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)):
        assert abs(measured_order(sampler, schedule, mean, std) - order) < tolerance, (mean, std)


HIGHER = {
    "3M": (sample_dpmpp_3m, 3),
    "UniPC-1": (partial(sample_unipc, order=1), 2),
    "UniPC-2": (partial(sample_unipc, order=2), 3),
    "UniPC-3": (partial(sample_unipc, order=3), 4),
}


@pytest.mark.parametrize("method", HIGHER)
@pytest.mark.parametrize("schedule", [EDM(), VPCosine(), FlowMatching()], ids=lambda s: type(s).__name__)
def test_multistep_samplers_have_their_order_at_the_last_time(schedule, method):
    # there, because Euler's step from it to the data errs by the square of its noise, whatever the steps
    sampler, order = HIGHER[method]
    assert abs(order_at_the_last_time(sampler, schedule) - order) < 0.3


def order_at_the_last_time(sampler, schedule, steps=(40, 80, 160)):
    data, start = normal_data(0.7, 1.0), torch.ones((), dtype=F64)
    x_t = schedule.sigma(start) * random.normal(KEY, (2, 3), F64)
    errors = []
    for n in steps:
        options = {"schedule": schedule, "steps": n, "x_t": x_t, "dtype": F64, "return_path": True}
        _, path = sampler(KEY, exact(data, schedule), (2, 3), **options)
        scales = [(schedule.alpha(t), schedule.sigma(t)) for t in (start, path.t[-1])]
        errors.append((path.x_t[-1] - data.flow(x_t, *scales)).norm().item())
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


@every_sampler
@every_schedule
@pytest.mark.parametrize("steps", [1, 3])
def test_samplers_are_exact_on_a_point(sampler, schedule, steps):
    x = sampler(KEY, point(3.0), (2, 2), schedule=schedule, steps=steps)
    assert torch.equal(x, torch.full((2, 2), 3.0))


@every_sampler
@every_schedule
def test_one_step_is_the_denoised_estimate(sampler, schedule):
    t = torch.ones(2, dtype=F64)
    x_t = schedule.sigma(t)[:, None] * random.normal(KEY, (2, 3), F64)
    denoise = exact(normal_data(0.3, 0.5), schedule)
    x = sampler(KEY, denoise, (2, 3), schedule=schedule, steps=1, x_t=x_t, dtype=F64)
    torch.testing.assert_close(x, denoise(x_t, t), rtol=1e-14, atol=0)


@pytest.mark.parametrize("sampler", slow_but(sample_ddpm, sample_heun, sample_unipc, sample_edm))
def test_samplers_find_the_modes_by_weight(sampler):
    schedule, n = FlowMatching(), 2000
    means = torch.tensor([[-2.0, 0.0], [1.0, 1.0], [2.0, -2.0]])
    data = isotropic_mixture(torch.tensor([1.0, 2.0, 5.0]), means, torch.full((3,), 0.2))
    x = sampler(KEY, exact(data, schedule), (n, 2), schedule=schedule, steps=40)
    part = torch.nn.functional.one_hot(torch.cdist(x, means).argmin(1), 3).double().mean(0)
    # 4 standard errors and the discretisation, for which the measured gap at 100,000 samples is below 0.01
    assert bool(((part - data.weights).abs() < 4 * (data.weights * (1 - data.weights) / n).sqrt() + 0.01).all())


# Behaviour.


@pytest.mark.parametrize(
    ("sampler", "calls"),
    [
        (sample_ddpm, 7),
        (sample_ddim, 7),
        (sample_euler, 7),
        (sample_heun, 13),
        (sample_dpmpp_2s, 13),
        (sample_dpmpp_2m, 7),
        (sample_dpmpp_3m, 7),
        (sample_unipc, 7),
        (sample_dpmpp_2m_sde, 7),
        (sample_edm, 13),
        (sample_predictor_corrector, 13),
    ],
)
def test_samplers_evaluate_as_often_as_they_say(sampler, calls):
    seen = []

    def denoise(x_t, t):
        seen.append(t)
        assert t.shape == (2,)
        return x_t / 2

    sampler(KEY, denoise, (2, 3), schedule=VPLinear(), steps=7)
    assert len(seen) == calls


@every_sampler
@pytest.mark.parametrize("steps", [1, 4])
def test_path_holds_what_the_sampler_went_through(sampler, steps):
    options = {"schedule": FlowMatching(), "steps": steps, "dtype": F64}
    x, path = sampler(KEY, curved, (2, 3), return_path=True, **options)
    assert path.x_t.shape == path.x_hat.shape == (steps, 2, 3)
    assert torch.equal(x, path.x_hat[-1])
    assert torch.equal(x, sampler(KEY, curved, (2, 3), **options))
    for t, x_t, x_hat in zip(*path, strict=True):
        assert torch.equal(curved(x_t, t.expand(2)), x_hat)


@every_sampler
def test_samplers_are_functions_of_the_key(sampler):
    def draw(key):
        return sampler(key, curved, (2, 3), schedule=EDM(), steps=4)

    assert torch.equal(draw(KEY), draw(KEY))
    assert (draw(KEY) - draw(random.key(1))).abs().min() > 1e-6


@every_sampler
def test_samplers_vmap_over_keys(sampler):
    def draw(key):
        return sampler(key, curved, (2, 3), schedule=VPCosine(), steps=4, dtype=F64)

    keys = random.split(KEY, 3)
    wanted = torch.stack([draw(key) for key in keys])
    torch.testing.assert_close(torch.func.vmap(draw)(keys), wanted, rtol=1e-12, atol=1e-12)


@every_schedule
@every_sampler
def test_samplers_differentiate(sampler, schedule):
    def total(scale):
        denoise = lambda x_t, t: torch.tanh(scale * x_t)
        return sampler(KEY, denoise, (2, 3), schedule=schedule, steps=4, dtype=F64).sum()

    scale, h = torch.tensor(0.3, dtype=F64), 1e-5
    difference = (total(scale + h) - total(scale - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(total)(scale), difference, rtol=1e-6, atol=1e-7)


@every_sampler
def test_samplers_trace_to_one_graph(sampler):
    def draw(key, scale):
        denoise = lambda x_t, t: torch.tanh(scale * x_t)
        return sampler(key, denoise, (2, 3), schedule=FlowMatching(), steps=3)

    graph = make_fx(draw, tracing_mode="fake", _allow_non_fake_inputs=True)(KEY, torch.ones(()))
    other = random.key(4), torch.tensor(0.3)
    torch.testing.assert_close(graph(*other), draw(*other))


@pytest.mark.parametrize("sampler", slow_but(sample_unipc))
def test_samplers_trace_under_dynamo(sampler):
    torch._dynamo.reset()  # it counts the samplers as recompilations of one function

    def draw(key, scale):
        denoise = lambda x_t, t: torch.tanh(scale * x_t)
        return sampler(key, denoise, (2, 3), schedule=VPLinear(), steps=3)

    compiled = torch.compile(draw, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(KEY, torch.ones(())), draw(KEY, torch.ones(())))


@pytest.mark.parametrize("sampler", slow_but(sample_heun, sample_unipc))
def test_a_jitted_sampler_traces_its_network_once_a_loop(sampler):
    calls = []

    def draw(key, scale, steps):
        def denoise(x_t, t):
            calls.append(t)
            return torch.tanh(scale * x_t)

        return sampler(key, denoise, (2, 3), schedule=VPCosine(), steps=steps, dtype=F64)

    scale = torch.tensor(0.7, dtype=F64)
    wanted = draw(KEY, scale, 5)
    found, traced = [], []
    for steps in (3, 5):
        calls.clear()
        found.append(fg.jit(draw, static_argnums=2, backend="aten")(KEY, scale, steps))
        traced.append(len(calls))
    assert traced[0] == traced[1] < 5 + 2  # 1 after the loop, and in it once or twice, each perhaps looked at twice
    torch.testing.assert_close(found[1], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", slow_but(sample_unipc))
def test_jitted_samplers_differentiate_and_vmap(sampler):
    def total(scale, key):
        denoise = lambda x_t, t: torch.tanh(scale * x_t)
        return sampler(key, denoise, (2, 3), schedule=EDM(), steps=4, dtype=F64).sum()

    gradients = torch.func.vmap(torch.func.grad(total), in_dims=(None, 0))
    scale, keys = torch.tensor(0.3, dtype=F64), random.split(KEY, 2)
    found = fg.jit(fg.vmap(fg.grad(total), in_dims=(None, 0)), backend="aten")(scale, keys)
    torch.testing.assert_close(found, gradients(scale, keys), rtol=1e-9, atol=1e-9)


@every_sampler
@every_schedule
def test_float32_is_close_to_float64(sampler, schedule):
    denoise = exact(normal_data(0.5, 0.5), schedule)
    start = schedule.sigma(torch.ones(())) * random.normal(KEY, (2, 3))
    options = {"schedule": schedule, "steps": 20, "x_t": start}
    double = sampler(KEY, denoise, (2, 3), dtype=F64, **options)
    single = sampler(KEY, lambda x_t, t: denoise(x_t, t).float(), (2, 3), **options)
    assert single.dtype == torch.float32
    if sampler in DETERMINISTIC:  # the others draw other numbers in another dtype
        torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_times_may_be_a_tensor_or_a_function():
    def draw(times):
        return sample_heun(KEY, curved, (2, 3), schedule=VPLinear(), steps=5, times=times, dtype=F64)

    assert torch.equal(draw(angle_times), draw(None))
    assert torch.equal(draw(rho_times), draw(rho_times(VPLinear(), 5)))
    assert not torch.equal(draw(uniform_times), draw(None))


def test_sampling_from_the_middle_keeps_the_flow():
    schedule, data = FlowMatching(), normal_data(0.3, 0.5)
    x_t = random.normal(KEY, (2, 3), F64)
    times = torch.linspace(0.6, 0, 401, dtype=F64)[:-1]
    found = sample_heun(
        KEY, exact(data, schedule), (2, 3), schedule=schedule, steps=400, times=times, x_t=x_t, dtype=F64
    )
    # second order: 1e-5 at 400 steps
    torch.testing.assert_close(found, data.flow(x_t, (0.4, 0.6), (1.0, 0.0)), rtol=2e-5, atol=2e-5)


# Bad input.


@every_sampler
def test_samplers_name_the_bad_argument(sampler):
    name = sampler.__name__

    def draw(shape=(2, 3), denoise=curved, **options):
        return sampler(KEY, denoise, shape, **{"schedule": VPLinear(), "steps": 4, **options})

    for steps in (0, -3):
        with pytest.raises(ValueError, match=f"{name}: expected steps > 0, got {steps}"):
            draw(steps=steps)
    with pytest.raises(TypeError, match=f"{name}: expected steps to be an integer, got float"):
        draw(steps=2.5)
    with pytest.raises(TypeError, match=f"{name}: dtype: expected a floating-point dtype, got torch.int64"):
        draw(dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"{name}: shape: expected \(b, \.\.\.\), got \(\)"):
        draw(shape=())
    with pytest.raises(ValueError, match=rf"{name}: x_t: expected shape \(2, 3\), got \(2, 4\)"):
        draw(x_t=torch.ones(2, 4))
    with pytest.raises(TypeError, match=f"{name}: x_t: expected a floating-point tensor, got torch.int64"):
        draw(x_t=torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{name}: times: expected shape \(steps=4,\), got \(5,\)"):
        draw(times=torch.linspace(1, 0.1, 5))
    with pytest.raises(TypeError, match=rf"{name}: times: expected a floating-point tensor, got list"):
        draw(times=[1.0, 0.7, 0.4, 0.1])
    with pytest.raises(TypeError, match=r"expected key to be .* got int"):
        sampler(0, curved, (2, 3), schedule=VPLinear(), steps=4)
    with pytest.raises(ValueError, match=r"denoise: expected an estimate of shape \(2, 3\), got \(2,\)"):
        draw(denoise=lambda x_t, t: t)


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_ddim_refuses_eta_out_of_range(eta):
    with pytest.raises(ValueError, match=rf"sample_ddim: expected eta in \[0, 1\], got {eta}"):
        sample_ddim(KEY, curved, (2, 3), schedule=VPLinear(), steps=4, eta=eta)
