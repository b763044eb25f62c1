"""MeanFlow on Gaussian data, whose average velocity is known exactly, and against the algorithm written out."""

import numpy as np
import pytest
import torch

import functorch_gen as fg
from functorch_gen import nn, random
from functorch_gen.diffusion import UniformTime
from functorch_gen.exact import Gaussian
from functorch_gen.flow_matching import (
    ConditionalOT,
    Trigonometric,
    average_velocity_target,
    guided_velocity,
    loss_at,
    mean_flow_loss,
    sample_mean_flow,
)
from functorch_gen.noise import FlowMatching, rates

F64 = torch.float64
KEY = random.key(0)
LINE = FlowMatching()
DATA = Gaussian(torch.tensor([0.3, -0.2], dtype=F64), torch.tensor([0.5, 1.5], dtype=F64))
PATHS = [LINE, ConditionalOT(0.1), Trigonometric()]
every_path = pytest.mark.parametrize("path", PATHS, ids=lambda s: type(s).__name__)
R = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.2], dtype=F64)
T = torch.tensor([1.0, 0.4, 0.9, 0.6, 0.3], dtype=F64)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return random.normal(random.key(seed), shape, F64)


def scales(path, t):
    return path.alpha(t), path.sigma(t)


def exact_velocity(path):
    return lambda x_t, t: DATA.velocity(x_t, *scales(path, t), *rates(path, t.contiguous()))


def exact_network(path):
    """u = (x_t - x_r) / (t - r) by the exact flow; r < t."""
    return lambda x_t, r, t: (x_t - DATA.flow(x_t, scales(path, t), scales(path, r))) / (t - r)[:, None]


def at(r, t):
    """A sampler of times that draws these."""
    return lambda key, shape, dtype: torch.stack([r, t], 1)


@every_path
def test_the_exact_average_velocity_obeys_the_identity(path):
    x_t = normal(1, 5, 2)
    u, target = average_velocity_target(exact_network(path), x_t, exact_velocity(path)(x_t, T), R, T)
    torch.testing.assert_close(target, u, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(u, exact_network(path)(x_t, R, T), rtol=1e-14, atol=1e-14)


def test_the_average_velocity_is_the_mean_of_the_velocity_along_the_flow():
    """Eq. 3, by Gauss-Legendre quadrature along the exact flow."""
    x_t, nodes = normal(1, 5, 2), np.polynomial.legendre.leggauss(40)
    mean = torch.zeros_like(x_t)
    for node, weight in zip(*nodes):
        s = R + (T - R) * (node + 1) / 2
        mean = mean + weight / 2 * exact_velocity(LINE)(DATA.flow(x_t, scales(LINE, T), scales(LINE, s)), s)
    torch.testing.assert_close(exact_network(LINE)(x_t, R, T), mean, rtol=1e-10, atol=1e-10)


def test_a_condition_is_cut_with_the_batch():
    """A tree of labels: each example's loss is that of its own label, on both sides of the cut."""
    x, label = normal(1, 5, 2), torch.arange(5.0, dtype=F64)
    condition = {"scale": {"first": label}, "other": normal(2, 5, 3)}
    conditioned = lambda x_t, r, t, c: c["scale"]["first"][:, None] * network(x_t, r, t) + c["other"].sum(1)[:, None]
    found = mean_flow_loss(conditioned, KEY, x, condition, time=at(R, T), ratio=0.4)
    for i in range(5):
        alone = lambda x_t, r, t, i=i: label[i] * network(x_t, r, t) + condition["other"][i].sum()
        wanted = mean_flow_loss(alone, KEY, x, time=at(R, T), ratio=0.4)[i]
        torch.testing.assert_close(found[i], wanted, rtol=1e-12, atol=0)


@every_path
def test_one_step_samples_are_exact(path):
    noise = path.sigma(torch.ones((), dtype=F64)) * random.normal(KEY, (6, 2), F64)
    wanted = DATA.flow(noise, scales(path, torch.ones(6, dtype=F64)), scales(path, torch.zeros(6, dtype=F64)))
    for options in ({}, {"steps": 3}, {"steps": 2, "times": torch.tensor([1.0, 0.2])}):
        found = sample_mean_flow(KEY, exact_network(path), (6, 2), schedule=path, dtype=F64, **options)
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-7)  # times given in float32


def conditional_pairs(x_t: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pairs (x, noise) behind each x_t, whose means over functions linear in them are those given x_t."""
    x = DATA.denoise(x_t, 1 - t, t)
    spread = DATA.posterior_variance(x_t, 1 - t, t).sqrt()
    x = torch.cat([x + spread, x - spread])
    twice, t = torch.cat([x_t, x_t]), torch.cat([t, t])[:, None]
    return x, (twice - (1 - t) * x) / t


def test_the_gradient_is_zero_at_the_exact_average_velocity():
    """In the mean over the pairs behind x_t, though the velocity of each is not that of the flow."""
    x_t = normal(1, 5, 2)
    x, noise = conditional_pairs(x_t, T)
    r, t = torch.cat([R, R]), torch.cat([T, T])

    def expected(change, power):
        network = lambda x_t, r, t: exact_network(LINE)(x_t, r, t) + change[0] + change[1] * x_t
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random, "normal", lambda *_: noise)
            return mean_flow_loss(network, KEY, x, time=at(r, t), ratio=1.0, power=power).mean()

    slope = fg.grad(expected)(torch.zeros(2, dtype=F64), 0.0)
    torch.testing.assert_close(slope, torch.zeros(2, dtype=F64), rtol=0, atol=1e-10)
    assert fg.grad(expected)(torch.full((2,), 0.1, dtype=F64), 0.0).abs().min() > 1e-3


def network(x_t, r, t):
    """Some smooth function."""
    return torch.sin(x_t) * t[:, None] + torch.cos(2 * x_t.flip(1)) * (t * r)[:, None]


def written_out(x, noise, r, t, h=1e-5) -> torch.Tensor:
    """Algorithm 1, example by example, with a central difference for the derivative along (v, 0, 1)."""
    errors = []
    for i in range(len(x)):
        x_i, noise_i, r_i, t_i = (value[i : i + 1] for value in (x, noise, r, t))
        x_t, v = (1 - t_i) * x_i + t_i * noise_i, noise_i - x_i
        slope = (network(x_t + h * v, r_i, t_i + h) - network(x_t - h * v, r_i, t_i - h)) / (2 * h)
        errors.append((network(x_t, r_i, t_i) - (v - (t_i - r_i) * slope)).square().mean())
    return torch.stack(errors)


@pytest.mark.parametrize("ratio", [1.0, 0.4])
def test_the_loss_is_the_algorithm_written_out(ratio):
    x, noise = normal(1, 5, 2), random.normal(random.split(KEY)[1], (5, 2), F64)
    r = torch.where(torch.arange(5) < 5 * ratio, R, T)
    error = written_out(x, noise, r, T)
    for power in (0.0, 1.0, 0.5):
        found = mean_flow_loss(network, KEY, x, time=at(R, T), ratio=ratio, power=power, eps=0.01)
        torch.testing.assert_close(found, error / (error + 0.01) ** power, rtol=1e-8, atol=1e-8)  # h^2


def test_the_weight_is_constant_to_the_gradient():
    x = normal(1, 5, 2)

    def total(scale, power):
        return mean_flow_loss(
            lambda *args: scale * network(*args), KEY, x, time=at(R, T), ratio=1.0, power=power, eps=0.01
        )

    one = torch.ones((), dtype=F64)
    error, slopes = total(one, 0.0), fg.jacrev(total)(one, 0.0)
    torch.testing.assert_close(fg.jacrev(total)(one, 1.0), slopes / (error + 0.01), rtol=1e-12, atol=0)


def test_without_a_ratio_it_is_flow_matching():
    x, noise = normal(1, 5, 2), random.normal(random.split(KEY)[1], (5, 2), F64)
    found = mean_flow_loss(network, KEY, x, time=at(R, T), ratio=0.0, power=0.0)
    wanted = loss_at(lambda x_t, t: network(x_t, t, t), x, noise, T)
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("b", "ratio", "sizes"), [(8, 0.25, [2, 6]), (2, 0.25, [1, 1]), (4, 1.0, [4]), (4, 0.0, [4]), (1, 0.1, [1])]
)
def test_each_example_goes_through_the_network_once(b, ratio, sizes):
    seen = []

    def spy(x_t, r, t, label):
        seen.append(len(x_t))
        assert len(r) == len(t) == len(label) == len(x_t)
        return x_t

    mean_flow_loss(spy, KEY, normal(1, b, 2), torch.arange(b), ratio=ratio)
    assert seen == sizes


def test_the_later_time_is_t_and_is_r_where_they_are_one():
    seen = []

    def spy(x_t, r, t):
        seen.append((x_t[:, 0], t))
        return x_t

    times = lambda key, shape, dtype: torch.stack([T, R], 1)
    mean_flow_loss(spy, KEY, torch.zeros(5, 1, dtype=F64), time=times, ratio=0.4)
    noise = random.normal(random.split(KEY)[1], (5, 1), F64)[:, 0]
    (_, _), (x_t, t) = seen
    assert torch.equal(t, T[2:])
    torch.testing.assert_close(x_t, (T * noise)[2:], rtol=1e-15, atol=0)


# Guidance.


def test_the_guided_velocity_settles_at_the_guidance_it_promises():
    """Its fixed point for the condition is the velocity guided by omega / (1 - kappa)."""
    conditional, unconditional, omega, kappa = normal(1, 3, 2), normal(2, 3, 2), 1.5, 0.4
    scale = omega / (1 - kappa)
    guided = scale * conditional + (1 - scale) * unconditional
    network = lambda x_t, r, t, label: torch.where(label[:, None] == 1, guided, unconditional)
    label, none = torch.ones(3), torch.zeros(3)
    found = guided_velocity(network, guided, conditional, T[:3], label, none, omega=omega, kappa=kappa)
    torch.testing.assert_close(found, guided, rtol=1e-13, atol=1e-13)


def test_guidance_of_one_changes_nothing_and_may_differ_between_examples():
    x_t, velocity, label = normal(1, 3, 2), normal(2, 3, 2), torch.ones(3)
    network = lambda x_t, r, t, label: x_t
    found = guided_velocity(network, x_t, velocity, T[:3], label, label, omega=torch.tensor([1.0, 2.0, 1.0]).double())
    torch.testing.assert_close(found[::2], velocity[::2], rtol=0, atol=0)
    torch.testing.assert_close(found[1], 2 * velocity[1] - x_t[1], rtol=1e-14, atol=0)


def test_a_guide_replaces_the_velocity():
    x, noise = normal(1, 5, 2), random.normal(random.split(KEY)[1], (5, 2), F64)
    still = lambda x_t, r, t: torch.zeros_like(x_t)
    found = mean_flow_loss(still, KEY, x, guide=lambda x_t, v, t: 3 * v, power=0.0)
    torch.testing.assert_close(found, 9 * (noise - x).square().mean(1), rtol=1e-13, atol=0)


# The network.


def test_a_unet_of_two_times_depends_on_both_and_has_their_derivatives():
    """d output / dt along t by a central difference; with one time it is the network it was."""
    net = fg.models.UNet(1, 8, (1,), 1, attention_levels=(), embed_dim=4, time_scale=10.0, num_times=2)
    params = fg.tree.map(lambda x: x + 0.3 * normal(x.numel(), *x.shape), net.init(KEY))
    x, t, h = normal(1, 2, 1, 2, 2), torch.tensor([[0.3, 0.1], [0.8, 0.5]], dtype=F64), 1e-6
    for direction in torch.eye(2, dtype=F64):
        v = direction.expand(2, 2)
        _, slope = fg.jvp(lambda t: net(params, x, t), (t,), (v,))
        difference = (net(params, x, t + h * v) - net(params, x, t - h * v)) / (2 * h)
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-8)
        assert slope.abs().max() > 1e-4
    one = fg.models.UNet(1, 8, (1,), 1, attention_levels=(), embed_dim=4)
    shapes = {name: x.shape for name, x in fg.tree.names(one.init(KEY)).items()}
    assert shapes | {"time1.weight": (4, 16)} == {name: x.shape for name, x in fg.tree.names(params).items()}


def test_a_unet_refuses_another_number_of_times():
    net = fg.models.UNet(1, 8, num_times=2)
    params = net.init(KEY)
    for t in (torch.ones(2), torch.ones(2, 3)):
        with pytest.raises(ValueError, match=r"UNet: t: expected shape \(b=2, n=2\), got"):
            net(params, torch.ones(2, 1, 8, 8), t)
    with pytest.raises(ValueError, match="UNet: expected num_times >= 1, got 0"):
        fg.models.UNet(1, 8, num_times=0)


# Errors and programs.


def test_errors_name_the_argument():
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match=r"mean_flow_loss: expected 0 <= ratio <= 1, got 1\.5"):
        mean_flow_loss(network, KEY, x, ratio=1.5)
    with pytest.raises(ValueError, match=r"network: expected a velocity of shape \(1, 2\), got \(1, 1\)"):
        mean_flow_loss(lambda x_t, r, t: x_t[:, :1], KEY, x)
    with pytest.raises(TypeError, match=r"mean_flow_loss: x: expected a floating-point tensor, got torch.int64"):
        mean_flow_loss(network, KEY, x.long())
    for condition, error, message in (
        ({"label": x[:3]}, ValueError, r"condition at 'label': expected a tensor of shape \(b=4, ...\), got \(3, 2\)"),
        (torch.ones(()), ValueError, r"condition: expected a tensor of shape \(b=4, ...\), got \(\)"),
        ({"label": 3}, TypeError, r"condition at 'label': expected a tensor of shape \(b=4, ...\), got int"),
    ):
        with pytest.raises(error, match=f"mean_flow_loss: {message}"):
            mean_flow_loss(lambda x_t, r, t, c: x_t, KEY, x, condition)
    with pytest.raises(ValueError, match=r"mean_flow_loss: x: expected shape \(b, ...\), got \(\)"):
        mean_flow_loss(network, KEY, torch.ones(()))
    with pytest.raises(ValueError, match=r"mean_flow_loss: times: expected shape \(b=4, 2\), got \(4,\)"):
        mean_flow_loss(network, KEY, x, time=lambda key, shape, dtype: torch.ones(4))
    with pytest.raises(ValueError, match=r"mean_flow_loss: guide: expected a velocity of shape \(4, 2\), got \(4, 1\)"):
        mean_flow_loss(network, KEY, x, guide=lambda x_t, v, t: v[:, :1])
    label = torch.ones(4)
    with pytest.raises(ValueError, match=r"guided_velocity: kappa: expected shape \(b=4,\), got \(3,\)"):
        guided_velocity(lambda x_t, r, t, c: x_t, x, x, label, label, label, omega=label, kappa=torch.ones(3))
    with pytest.raises(ValueError, match=r"average_velocity_target: r: expected shape \(b=4,\), got \(3,\)"):
        average_velocity_target(network, x, x, torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match=r"sample_mean_flow: times: expected shape \(steps=2,\), got \(1,\)"):
        sample_mean_flow(KEY, network, (2, 2), steps=2, times=torch.ones(1))


def make_step(**options):
    net, tx = nn.MLP(4, (32, 32), 2), fg.optim.adam(fg.optim.cosine_decay_schedule(5e-3, 2000))

    def average_velocity(params):
        return lambda x_t, r, t: net(params, torch.cat([x_t, r[:, None], t[:, None]], 1))

    def loss_fn(params, key, x):
        return mean_flow_loss(average_velocity(params), key, x, ratio=0.5, **options).mean()

    return net, average_velocity, fg.step.make_step(loss_fn, tx), tx


def test_the_training_step_is_one_graph():
    net, _, pure_step, tx = make_step()
    step = fg.jit(pure_step, donate_argnums=0, backend="aten")
    state = fg.step.init_state(net.init(KEY), tx, KEY)
    eager, batch = pure_step(fg.step.init_state(net.init(KEY), tx, KEY), normal(1, 8, 2).float())
    for _ in range(2):
        state, metrics = step(state, normal(1, 8, 2).float())
        assert metrics["loss"].isfinite()
    assert step.traces == 1
    assert eager.step == 1
    assert batch["loss"].isfinite()


@pytest.mark.slow  # 2,000 steps of a small network
def test_a_network_learns_to_sample_in_one_step():
    """The mean and standard deviation of N(m, s^2) in one step; the network is off by some hundredths.

    Not with power = 1: the weighted mean over pairs is not the mean, and in two dimensions the difference is large.
    """
    net, average_velocity, pure_step, tx = make_step(power=0.0, time=UniformTime())
    step, n = fg.jit(pure_step, donate_argnums=0, backend="aten"), 4000
    state = fg.step.init_state(net.init(KEY), tx, KEY)
    for i in range(2000):
        state, _ = step(state, DATA.sample(random.key(i), 256).float())
    samples = sample_mean_flow(random.key(7), average_velocity(state.params), (n, 2)).double()
    torch.testing.assert_close(samples.mean(0), DATA.mean, rtol=0, atol=0.1)
    torch.testing.assert_close(samples.std(0), DATA.std, rtol=0, atol=0.1)
