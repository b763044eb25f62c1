"""Guidance on mixtures whose classifier, denoiser and posterior are known in closed form."""

import math

import pytest
import torch

import functorch_gen as fg
from functorch_gen import random
from functorch_gen.diffusion import (
    guide,
    guide_by_classifier,
    guide_network,
    interval_scale,
    sample_heun,
)
from functorch_gen.exact import GaussianMixture, MultivariateGaussian
from functorch_gen.noise import EDM, FlowMatching, SubVP, VPCosine

F64 = torch.float64
KEY = random.key(0)
SCHEDULES = [VPCosine(), EDM(sigma_max=20.0), FlowMatching(), SubVP()]
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)


def two_classes() -> GaussianMixture:
    root = random.normal(random.key(7), (2, 3, 3), F64)
    return GaussianMixture(
        torch.tensor([0.3, 0.7], dtype=F64),
        random.normal(random.key(8), (2, 3), F64),
        root @ root.mT + 0.2 * torch.eye(3, dtype=F64),
    )


def component(data: GaussianMixture, k: int) -> MultivariateGaussian:
    return MultivariateGaussian(data.means[k], data.covs[k])


def exact(data, schedule):
    return lambda x_t, t: data.denoise(x_t, schedule.alpha(t), schedule.sigma(t))


def log_posterior(data, schedule, label):
    """log p(label | x_t)."""
    return lambda x_t, t: data.responsibilities(x_t, schedule.alpha(t), schedule.sigma(t))[:, label].log()


def inputs(schedule, n: int = 6):
    t = torch.linspace(0.15, 0.95, n, dtype=F64)
    return schedule.sigma(t)[:, None] * random.normal(KEY, (n, 3), F64), t


# Classifier guidance.


@every_schedule
@pytest.mark.parametrize("label", [0, 1])
def test_the_true_classifier_gives_the_conditional_denoiser(schedule, label):
    # Bayes: grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)
    data = two_classes()
    x_t, t = inputs(schedule)
    guided = guide_by_classifier(exact(data, schedule), log_posterior(data, schedule, label), schedule=schedule)
    wanted = exact(component(data, label), schedule)(x_t, t)
    torch.testing.assert_close(guided(x_t, t), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
def test_classifier_guidance_with_the_true_classifier_is_classifier_free_guidance(scale):
    data, schedule = two_classes(), VPCosine()
    x_t, t = inputs(schedule)
    denoise, log_prob = exact(data, schedule), log_posterior(data, schedule, 1)
    by_classifier = guide_by_classifier(denoise, log_prob, schedule=schedule, scale=scale)(x_t, t)
    free = guide(exact(component(data, 1), schedule), denoise, scale)(x_t, t)
    torch.testing.assert_close(by_classifier, free, rtol=1e-9, atol=1e-9)


def test_classifier_guidance_samples_the_class():
    data, schedule, n = two_classes(), EDM(sigma_max=20.0), 4000
    guided = guide_by_classifier(exact(data, schedule), log_posterior(data, schedule, 0), schedule=schedule)
    x = sample_heun(KEY, guided, (n, 3), schedule=schedule, steps=30, dtype=F64)
    # 4 standard errors, and Heun's own error at 30 steps, 1e-2 of the standard deviation
    std = data.covs[0].diagonal().sqrt()
    assert bool(((x.mean(0) - data.means[0]).abs() < (4 / math.sqrt(n) + 0.01) * std).all())
    assert bool((x.std(0) / std - 1).abs().max() < 4 * math.sqrt(0.5 / n) + 0.02)


def test_where_there_is_no_signal_the_classifier_adds_nothing():
    guided = guide_by_classifier(lambda x_t, t: x_t, lambda x_t, t: x_t.sum(1), schedule=FlowMatching())
    assert torch.equal(guided(torch.ones(2, 3), torch.ones(2)), torch.ones(2, 3))


# Guidance in an interval, rescaled.


def test_interval_scale_is_one_outside_its_interval():
    t = torch.tensor([0.0, 0.2, 0.21, 0.8, 0.81, 1.0])
    assert interval_scale(4.0, 0.2, 0.8)(t).tolist() == [1, 1, 4, 4, 1, 1]
    assert interval_scale(torch.tensor(4.0), 0.2, 0.8)(t).dtype == torch.float32
    assert interval_scale(4.0, 0.2, 0.8)(t.double()).dtype == F64


def test_guidance_in_an_interval_is_conditional_outside_of_it():
    data, schedule = two_classes(), VPCosine()
    x_t, t = inputs(schedule)
    conditional, unconditional = exact(component(data, 1), schedule), exact(data, schedule)
    found = guide(conditional, unconditional, interval_scale(3.0, 0.3, 0.7))(x_t, t)
    everywhere, inside = guide(conditional, unconditional, 3.0)(x_t, t), ((t > 0.3) & (t <= 0.7))[:, None]
    torch.testing.assert_close(found, torch.where(inside, everywhere, conditional(x_t, t)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_equals_the_papers_formula(rescale):
    # Lin et al. 2024, section 3.4, on images
    x_t, t = random.normal(KEY, (4, 2, 3, 3), F64), torch.full((4,), 0.5, dtype=F64)
    positive, negative = torch.sin(2 * x_t), torch.cos(x_t)
    guided = negative + 2.5 * (positive - negative)
    std = [x.flatten(1).std(1)[:, None, None, None] for x in (positive, guided)]
    wanted = rescale * guided * std[0] / std[1] + (1 - rescale) * guided
    found = guide(lambda x_t, t: torch.sin(2 * x_t), lambda x_t, t: torch.cos(x_t), 2.5, rescale=rescale)(x_t, t)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_guide_network_rescales_its_output():
    def network(x_t, t, label):
        return torch.sin(x_t + label[:, None])

    x_t, t, label = random.normal(KEY, (3, 5), F64), torch.full((3,), 0.5, dtype=F64), torch.tensor([0, 1, 2])
    found = guide_network(network, label, 3, 2.5, rescale=0.6)(x_t, t)
    alone = [lambda x_t, t, given=given: network(x_t, t, given) for given in (label, torch.full((3,), 3))]
    torch.testing.assert_close(found, guide(alone[0], alone[1], 2.5, rescale=0.6)(x_t, t), rtol=1e-12, atol=1e-12)


def test_rescaled_guidance_of_a_constant_is_finite():
    flat = lambda x_t, t: torch.full_like(x_t, 2.0) + 0 * x_t
    guided = guide(flat, flat, 3.0, rescale=0.5)
    gradient = torch.func.grad(lambda x: guided(x, torch.ones(1)).sum())(torch.ones(1, 4))
    assert bool(gradient.isfinite().all())


# Autoguidance is guide.


def test_autoguidance_with_a_wider_model_narrows_the_data():
    # Gaussians of one mean: D = (s^2 / (s^2 + sigma^2)) x_t; guiding s = 1 by s = 2 at scale w
    schedule, w = EDM(sigma_max=20.0), 2.0
    x_t, t = inputs(schedule)
    good, bad = (MultivariateGaussian(torch.zeros(3, dtype=F64), v * torch.eye(3, dtype=F64)) for v in (1.0, 4.0))
    found = guide(exact(good, schedule), exact(bad, schedule), w)(x_t, t)
    variance = schedule.sigma(t)[:, None] ** 2
    wanted = (w / (1 + variance) + (1 - w) * 4 / (4 + variance)) * x_t
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


# Behaviour.


def test_guided_samplers_are_one_program():
    data, schedule = two_classes(), VPCosine()

    def draw(key, scale):
        denoise, log_prob = exact(data, schedule), log_posterior(data, schedule, 1)
        guided = guide_by_classifier(denoise, log_prob, schedule=schedule, scale=scale)
        return sample_heun(key, guided, (2, 3), schedule=schedule, steps=3, dtype=F64)

    scale = torch.tensor(1.5, dtype=F64)
    compiled = fg.jit(draw, backend="aten")
    torch.testing.assert_close(compiled(KEY, scale), draw(KEY, scale), rtol=1e-9, atol=1e-9)
    assert compiled.traces == 1


def test_rescaled_guidance_of_single_numbers_keeps_them_apart():
    # an example of one number has no deviation, whatever the others are
    guided = guide(lambda x_t, t: x_t, lambda x_t, t: x_t.cos(), 3.0, rescale=0.7)
    x_t, t = random.normal(KEY, (4,), F64), torch.full((4,), 0.5, dtype=F64)
    wanted = torch.cat([guided(x_t[i : i + 1], t[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(guided(x_t, t), wanted)
    torch.testing.assert_close(guided(x_t[:, None], t)[:, 0], wanted)


def test_guidance_names_the_bad_shape():
    x_t, t = torch.ones(2, 3), torch.ones(2)
    nothing, column = lambda x_t, t: x_t, lambda x_t, t: x_t[:, :1]
    with pytest.raises(ValueError, match=r"guide: denoise_unconditional: expected shape \(2, 3\), as denoise has, got"):
        guide(nothing, column, 2.0)(x_t, t)
    with pytest.raises(ValueError, match=r"guide_by_classifier: log_prob: expected shape \(b=2,\), got \(2, 1\)"):
        guide_by_classifier(nothing, column, schedule=EDM())(x_t, t)


@pytest.mark.parametrize("rescale", [-0.1, 1.5])
def test_guidance_refuses_a_rescale_out_of_range(rescale):
    nothing = lambda x_t, t: x_t
    with pytest.raises(ValueError, match=f"guide: expected 0 <= rescale <= 1, got {rescale}"):
        guide(nothing, nothing, 1.0, rescale=rescale)
    with pytest.raises(ValueError, match=f"guide_network: expected 0 <= rescale <= 1, got {rescale}"):
        guide_network(lambda x_t, t, label: x_t, torch.zeros(1), 0, 1.0, rescale=rescale)
