"""Likelihoods, latent-space functions and geometry, against torch.distributions, loops and linear maps."""

import math
from dataclasses import dataclass

import pytest
import torch

import functorch_gen as fg
from functorch_gen import vae
from functorch_gen.models import EncoderDecoder
from functorch_gen.nn import Linear, Sequential

F64 = torch.float64
KEY = fg.random.key(0)


def draw(seed, *shape):
    return fg.random.normal(fg.random.key(seed), shape, F64)


# Likelihoods.


def test_bernoulli_is_torchs():
    logits, x = draw(0, 4, 2, 3), (draw(1, 4, 2, 3) > 0).double()
    truth = torch.distributions.Bernoulli(logits=logits)
    torch.testing.assert_close(vae.Bernoulli().log_prob(logits, x), truth.log_prob(x).sum((1, 2)))
    torch.testing.assert_close(vae.Bernoulli().mean(logits), truth.mean)
    samples = fg.vmap(lambda key: vae.Bernoulli().sample(key, logits))(fg.random.split(KEY, 4000))
    error = (truth.mean * (1 - truth.mean) / 4000).sqrt()
    assert ((samples.mean(0) - truth.mean).abs() < 4.5 * error).all()  # 24 numbers: 4.5 is as rare as 4 for one


def test_gaussian_is_torchs():
    mean, x = draw(0, 4, 2, 3), draw(1, 4, 2, 3)
    for std in (0.7, torch.tensor(0.7, dtype=F64), 0.5 + draw(2, 3).abs()):
        truth = torch.distributions.Normal(mean, std)
        torch.testing.assert_close(vae.Gaussian(std).log_prob(mean, x), truth.log_prob(x).sum((1, 2)))
    noise = vae.Gaussian(0.7).sample(KEY, torch.zeros(10_000, dtype=F64))
    assert abs(float(noise.std()) - 0.7) < 4 * 0.7 / math.sqrt(2 * 10_000)


def test_optimal_std_is_the_likeliest():
    mean, x = draw(0, 4, 6), draw(1, 4, 6)
    best = vae.optimal_std(mean, x)
    total = lambda log_std: vae.Gaussian(log_std.exp()).log_prob(mean, x).sum()
    assert float(fg.grad(total)(best.log()).abs()) < 1e-12
    assert fg.hessian(total)(best.log()) < 0
    torch.testing.assert_close(vae.Gaussian(None).log_prob(mean, x), vae.Gaussian(best).log_prob(mean, x))


def test_optimal_std_scales_the_gradient_of_squared_error():
    """Rybkin et al., section 3.3: the loss is n/2 log of the mean squared error."""
    mean, x = draw(0, 4, 6), draw(1, 4, 6)
    found = fg.grad(lambda mean: -vae.Gaussian(None).log_prob(mean, x).sum())(mean)
    torch.testing.assert_close(found, fg.grad(lambda m: 24 / 2 * (x - m).square().mean().log())(mean))


def test_categorical_is_torchs():
    output, x = draw(0, 2, 6, 5), torch.tensor([[[0, 1, 2, 0, 1], [2, 2, 1, 0, 0]], [[1, 1, 1, 1, 2], [0, 2, 0, 2, 0]]])
    truth = torch.distributions.Categorical(logits=output.reshape(2, 2, 3, 5).movedim(2, -1))
    likelihood = vae.Categorical(3)
    torch.testing.assert_close(likelihood.log_prob(output, x), truth.log_prob(x).sum((1, 2)))
    torch.testing.assert_close(likelihood.mean(output), truth.probs @ torch.arange(3.0, dtype=F64))
    samples = fg.vmap(lambda key: likelihood.sample(key, output))(fg.random.split(KEY, 4000))
    for level in range(3):
        p = truth.probs[..., level]
        share = (samples == level).double().mean(0)
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt()).all()


def test_discretized_logistic_mixture_draws_what_it_says():
    """Every level of one pixel: frequencies against the probabilities, which sum to 1."""
    likelihood = vae.DiscretizedLogisticMixture(levels=6)
    output = torch.tensor([0.3, -0.5, -0.6, 0.8, -1.0, -1.5], dtype=F64)[None, :, None]  # two components
    levels = torch.arange(6).reshape(6, 1, 1)
    p = likelihood.log_prob(output.expand(6, -1, -1), levels).exp()
    assert float(p.sum()) == pytest.approx(1)
    samples = likelihood.sample(KEY, output.expand(20_000, -1, -1)).flatten()
    share = (samples == levels.reshape(6, 1)).double().mean(1)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt() + 2e-5).all()  # the tails are cut at 1e-5


def test_discretized_logistic_mixture_couples_channels():
    """Two channels of three levels: frequencies of all nine pairs against their probabilities."""
    likelihood = vae.DiscretizedLogisticMixture(levels=3, channels=2)
    output = torch.tensor([0.2, -0.4, 0.3, -0.8, 0.1, 0.5, -0.7, -0.9, -0.6, -1.0, 1.5, -2.0], dtype=F64)[None, :, None]
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3)).unsqueeze(-1)
    p = likelihood.log_prob(output.expand(9, -1, -1), pairs).exp()
    assert float(p.sum()) == pytest.approx(1)
    samples = likelihood.sample(KEY, output.expand(20_000, -1, -1))
    share = (samples.unsqueeze(1) == pairs).all((2, 3)).double().mean(0)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 20_000).sqrt() + 2e-5).all()


def test_discretized_logistic_mixture_has_its_mean_where_no_level_is_at_the_end():
    likelihood = vae.DiscretizedLogisticMixture(levels=256, channels=2)
    output = torch.tensor([0.2, -0.4, 0.3, -0.3, 0.1, 0.2, -4.0, -4.0, -4.0, -4.0, 0.5, -0.5], dtype=F64)[None, :, None]
    samples = likelihood.sample(KEY, output.expand(20_000, -1, -1)).double()
    error = samples.std(0) / math.sqrt(20_000)
    assert ((samples.mean(0) - likelihood.mean(output)[0]).abs() < 4 * error).all()


@pytest.mark.parametrize("std", [0.1, None], ids=["std", "optimal"])
def test_gaussian_of_16_bits_is_computed_in_float32_and_rounded_once(std):
    """In float16 the squares of hundreds overflow."""
    for dtype, size in ((torch.bfloat16, 1.0), (torch.float16, 300.0 if std is None else 1.0)):
        mean, x = (size * draw(i, 3, 64).to(dtype) for i in range(2))
        found = vae.Gaussian(std).log_prob(mean, x)
        assert torch.equal(found, vae.Gaussian(std).log_prob(mean.float(), x.float()).to(dtype))
        assert bool(torch.isfinite(found).all())
        assert torch.equal(vae.optimal_std(mean, x), vae.optimal_std(mean.float(), x.float()).to(dtype))


def test_draws_of_16_bits_have_the_probabilities_of_the_output():
    """Uniform numbers of bfloat16 are multiples of 1/256: far too few for a pixel that is on once in a thousand."""
    n = 100_000

    def assert_shares(drawn, p):
        share = torch.stack([(drawn.flatten() == level).double().mean() for level in range(len(p))])
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / n).sqrt()).all()

    logit = torch.tensor(-7.0, dtype=torch.bfloat16)
    p = torch.sigmoid(logit.double())
    assert_shares(vae.Bernoulli().sample(KEY, logit.expand(n, 1)), torch.stack([1 - p, p]))
    logits = torch.tensor([0.0, -5.0, -7.0], dtype=torch.bfloat16)
    drawn = vae.Categorical(3).sample(KEY, logits.expand(n, 3)[..., None])
    assert_shares(drawn, logits.double().softmax(0))
    likelihood, output = vae.DiscretizedLogisticMixture(16), torch.tensor([0.0, 0.1, -2.5], dtype=torch.bfloat16)
    levels = torch.arange(16).reshape(16, 1, 1)
    p = likelihood.log_prob(output.double().expand(16, 3)[..., None], levels).exp()
    assert_shares(likelihood.sample(KEY, output.expand(n, 3)[..., None]), p)


# The latent space.


@dataclass(frozen=True)
class Affine:
    """q(z | x) = N(2 x + 1, e^-1); the mean of x given z is 3 z."""

    def encode(self, params, x):
        return torch.cat([2 * x + 1, -torch.ones_like(x)], 1)

    def decode(self, params, code):
        return 3 * code


def test_reconstruction_is_decoded_from_the_mean_or_a_draw():
    x = draw(0, 4, 2)
    torch.testing.assert_close(vae.reconstruct(Affine(), {}, x, likelihood=vae.Gaussian()), 3 * (2 * x + 1))
    many = x[:1].expand(20_000, -1)
    drawn = vae.reconstruct(Affine(), {}, many, likelihood=vae.Gaussian(), key=KEY)
    std = 3 * math.exp(-0.5)
    assert ((drawn.mean(0) - 3 * (2 * x[0] + 1)).abs() < 4 * std / math.sqrt(20_000)).all()
    assert ((drawn.std(0) - std).abs() < 4 * std / math.sqrt(2 * 20_000)).all()


@pytest.mark.parametrize(("noise", "variance"), [(False, 9.0), (True, 9.25)])
def test_samples_have_the_moments_of_the_model(noise, variance):
    x = vae.sample(KEY, Affine(), {}, (20_000, 1), likelihood=vae.Gaussian(0.5), noise=noise, dtype=F64)
    assert abs(float(x.mean())) < 4 * math.sqrt(variance / 20_000)
    assert abs(float(x.var()) - variance) < 4 * variance * math.sqrt(2 / 20_000)


def test_interpolation_is_a_line_or_an_arc():
    start, end = draw(0, 3, 5), draw(1, 3, 5)
    f = torch.linspace(0, 1, 7, dtype=F64)
    line = vae.interpolate(start, end, f)
    torch.testing.assert_close(line, torch.stack([torch.lerp(start, end, w) for w in f]))
    unit = start / start.norm(dim=1, keepdim=True), end / end.norm(dim=1, keepdim=True)
    arc = vae.interpolate(*unit, f, kind="spherical")
    torch.testing.assert_close(arc.norm(dim=-1), torch.ones(7, 3, dtype=F64))
    whole = torch.acos((unit[0] * unit[1]).sum(1))
    torch.testing.assert_close(torch.acos((arc * unit[0]).sum(-1).clamp(-1, 1))[1:], f[1:, None] * whole)
    for kind in ("linear", "spherical"):
        way = vae.interpolate(start, end, f, kind=kind)
        torch.testing.assert_close(way[0], start)
        torch.testing.assert_close(way[-1], end)


def test_interpolation_between_equal_codes_is_finite_and_so_is_its_derivative():
    z = draw(0, 2, 3)
    f = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    torch.testing.assert_close(vae.interpolate(z, z, f, kind="spherical"), z.expand(3, 2, 3))
    slope = fg.grad(lambda z: vae.interpolate(z, 2 * z, f, kind="spherical").sum())(z)
    torch.testing.assert_close(slope, torch.full((2, 3), 4.3, dtype=F64))  # sum of (1 - f) + 2 f


def test_an_arc_between_almost_equal_codes_has_the_right_second_derivative():
    """On the unit circle it is (cos f a, sin f a), whose second derivative at a = 0 is -f^2; also nearby."""
    f, one = torch.linspace(0, 1, 5, dtype=F64), torch.tensor([[1.0, 0.0]], dtype=F64)
    arc = lambda a: vae.interpolate(one, torch.stack([a.cos(), a.sin()])[None], f, kind="spherical")[:, 0]
    curvature = fg.hessian(lambda a: arc(a)[:, 0])(torch.zeros((), dtype=F64))
    torch.testing.assert_close(curvature, -(f**2), rtol=0, atol=1e-14)
    for a in (1e-4, 9e-4, 1.1e-3):
        expected = torch.stack([torch.cos(f * a), torch.sin(f * a)], 1)
        torch.testing.assert_close(arc(torch.tensor(a, dtype=F64)), expected, rtol=0, atol=1e-13)


def test_interpolation_takes_codes_with_axes_as_one_vector_each_and_keeps_their_dtype():
    start, end, f = draw(0, 2, 3, 4, 4), draw(1, 2, 3, 4, 4), torch.tensor([0.2, 0.7])
    for kind in ("linear", "spherical"):
        flat = vae.interpolate(start.flatten(1), end.flatten(1), f, kind=kind)
        found = vae.interpolate(start, end, f, kind=kind)
        torch.testing.assert_close(found, flat.reshape(2, *start.shape), rtol=0, atol=0)
        short = vae.interpolate(start.bfloat16(), end.bfloat16(), f, kind=kind)
        assert short.dtype == torch.bfloat16


# Geometry.


def test_pullback_metric_of_a_linear_decoder_is_its_gram_matrix():
    weight, z = draw(0, 7, 3), draw(1, 4, 3)
    decode = lambda z: (z @ weight.T).reshape(-1, 7, 1)
    torch.testing.assert_close(vae.pullback_metric(decode, z), (weight.T @ weight).expand(4, 3, 3))
    torch.testing.assert_close(vae.jacobian_spectrum(decode, z), torch.linalg.svdvals(weight).expand(4, 3))


def test_pullback_metric_measures_small_steps():
    """|decode(z + h v) - decode(z)|^2 / h^2 by central differences, and the spectrum by the metric's eigenvalues."""
    net = Sequential(Linear(3, 8), torch.tanh, Linear(8, 6))
    params = fg.tree.cast(net.init(KEY), F64)
    decode, z, v, h = (lambda z: net(params, z)), draw(1, 4, 3), draw(2, 4, 3), 1e-5
    metric = vae.pullback_metric(decode, z)
    step = (decode(z + h * v) - decode(z - h * v)) / (2 * h)
    torch.testing.assert_close(
        torch.einsum("bi,bij,bj->b", v, metric, v), step.square().sum(1), rtol=1e-8, atol=0
    )  # h^2
    torch.testing.assert_close(
        vae.jacobian_spectrum(decode, z), torch.linalg.eigvalsh(metric).flip(1).clamp(min=0).sqrt()
    )


def test_geometry_at_a_posteriors_mean_compiles_and_keeps_bfloat16():
    """The mean is a slice of the encoder's output, on which torch 2.13's vmap(jvp) of F.linear does not compile."""
    net = Linear(2, 5)
    params, output = net.init(KEY), draw(0, 3, 4).float()
    decode = lambda z: net(params, z)
    compiled = torch.compile(lambda z: vae.pullback_metric(decode, z[:, :2]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(output), vae.pullback_metric(decode, output[:, :2]))
    z = torch.ones(1, 2, dtype=torch.bfloat16)
    torch.testing.assert_close(vae.jacobian_spectrum(lambda z: z * torch.tensor([2.0, 3.0]).bfloat16(), z),
                               torch.tensor([[3.0, 2.0]]).bfloat16())  # fmt: skip


def test_sphere_has_the_metric_of_angles():
    """Latitude a and longitude b: da^2 + cos(a)^2 db^2."""

    def sphere(z):
        a, b = z.unbind(1)
        return torch.stack([a.cos() * b.cos(), a.cos() * b.sin(), a.sin()], 1)

    z = draw(0, 5, 2)
    expected = torch.diag_embed(torch.stack([torch.ones(5, dtype=F64), z[:, 0].cos() ** 2], 1))
    torch.testing.assert_close(vae.pullback_metric(sphere, z), expected)


def test_errors_name_what_was_expected():
    with pytest.raises(ValueError, match="Gaussian: expected a std to draw with, got None"):
        vae.Gaussian(None).sample(KEY, torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"Gaussian: x: expected shape \(2, 3\), as output has, got \(2, 4\)"):
        vae.Gaussian().log_prob(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="Gaussian: expected std > 0, got 0"):
        vae.Gaussian(0.0)
    with pytest.raises(TypeError, match="Gaussian: expected std to be a number or a 0-d tensor, got str"):
        vae.Gaussian("1")
    with pytest.raises(
        ValueError, match=r"Gaussian: std: expected a shape that broadcasts to \(2, 3\), got \(5, 2, 3\)"
    ):
        vae.Gaussian(torch.ones(5, 2, 3)).log_prob(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(TypeError, match=r"Categorical: output: expected a floating-point tensor, got torch\.int64"):
        vae.Categorical(3).mean(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="DiscretizedLogisticMixture: expected levels >= 2, got 1"):
        vae.DiscretizedLogisticMixture(1)
    rgb, grey = vae.DiscretizedLogisticMixture(8, channels=3), torch.zeros(2, 1, 4, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"DiscretizedLogisticMixture: x: expected shape \(b, c=3, ...\), got \(2, 1, 4\)"
    ):
        rgb.log_prob(torch.zeros(2, 10, 4), grey)
    with pytest.raises(ValueError, match=r"Categorical: output: expected channels in multiples of 3, got \(2, 4\)"):
        vae.Categorical(3).log_prob(torch.zeros(2, 4), torch.zeros(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="output: expected a multiple of 3 channels, got"):
        vae.DiscretizedLogisticMixture(8).mean(torch.zeros(2, 4))
    with pytest.raises(ValueError, match="interpolate: expected kind to be one of 'linear', 'spherical', got 'arc'"):
        vae.interpolate(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1), kind="arc")
    with pytest.raises(ValueError, match=r"interpolate: end: expected shape \(1, 2\), as start has, got \(1, 3\)"):
        vae.interpolate(torch.ones(1, 2), torch.ones(1, 3), torch.ones(1))
    with pytest.raises(ValueError, match=r"interpolate: start: expected shape \(b, d, ...\), got \(2,\)"):
        vae.interpolate(torch.ones(2), torch.ones(2), torch.ones(1))
    with pytest.raises(ValueError, match=r"interpolate: fractions: expected shape \(n,\), got \(2, 3\)"):
        vae.interpolate(torch.ones(1, 2), torch.ones(1, 2), torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"interpolate: start: expected a floating-point tensor, got torch\.int64"):
        vae.interpolate(torch.arange(2)[None], torch.arange(2)[None], torch.ones(1))
    with pytest.raises(ValueError, match=r"pullback_metric: z: expected shape \(b, d\), got \(2,\)"):
        vae.pullback_metric(lambda z: z, torch.ones(2))
    with pytest.raises(ValueError, match="levels"):
        vae.Categorical(0)
    net = EncoderDecoder(Linear(2, 4), Linear(2, 2))
    with pytest.raises(ValueError, match="elbo: expected kl"):
        vae.elbo(net, net.init(KEY), KEY, torch.ones(1, 2), likelihood=vae.Gaussian(), kl="")
