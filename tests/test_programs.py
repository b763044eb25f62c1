"""Whole research programs that stack many transforms, each against the plain way to the same numbers."""

import functools

import pytest
import torch

import functorch_gen as fg
from functorch_gen import models, nn, optim, random, tree

F64 = torch.float64
aten = functools.partial(fg.jit, backend="aten")


def draw(seed, *shape):
    return random.normal(random.key(seed), shape, F64)


def weights(layer, seed=0):
    """In general position: no parameter is exactly zero or one."""
    shapes = layer.init(random.key(seed))
    return tree.map_with_path(lambda path, x: 0.3 * draw(hash_of(path), *x.shape) + 0.7 * x.to(F64), shapes)


def hash_of(path):
    return sum(ord(c) * 31**i for i, c in enumerate(path)) % 2**31


def assert_close(found, expected, rtol=1e-10):
    assert tree.allclose(found, expected, rtol=rtol, atol=1e-12)


# MeanFlow: the gradient of a derivative along a path, through attention and dropout.

UNET = models.UNet(1, base_channels=4, num_blocks=1, num_heads=2, embed_dim=4, num_groups=2, dropout=0.3)


def mean_flow_loss(params, key, x):
    """u = v - (t - r) du/dt, eq. 10 of Geng et al. 2025, arXiv:2505.13447, of a network whose r is 0."""
    key_noise, key_time, key_drop = random.split(key, 3)
    noise = random.normal(key_noise, x.shape, x.dtype)
    t = random.uniform(key_time, (x.shape[0],), x.dtype)
    s = t[:, None, None, None]
    velocity = noise - x

    def u(x_t, t):
        return UNET(params, x_t, t, key=key_drop)

    value, moved = fg.jvp(u, ((1 - s) * x + s * noise, t), (velocity, torch.ones_like(t)))
    return (value - fg.stop_gradient(velocity - s * moved)).square().mean(), moved


def test_jit_of_a_mean_flow_gradient_equals_eager():
    params, x = weights(UNET), draw(1, 2, 1, 4, 4)
    step = aten(fg.value_and_grad(mean_flow_loss, has_aux=True))
    for key in random.split(random.key(3)):
        assert_close(step(params, key, x), fg.value_and_grad(mean_flow_loss, has_aux=True)(params, key, x))
    assert step.traces == 1


def test_the_derivative_along_the_path_is_the_difference():
    params, x, key, h = weights(UNET), draw(1, 2, 1, 4, 4), random.key(3), 1e-5
    key_noise, key_time, key_drop = random.split(key, 3)
    noise, t = random.normal(key_noise, x.shape, F64), random.uniform(key_time, (2,), F64)

    def at(t):
        s = t[:, None, None, None]
        return UNET(params, (1 - s) * x + s * noise, t, key=key_drop)

    moved = aten(mean_flow_loss)(params, key, x)[1]
    # x_t moves by the velocity and t by one. Truncation and rounding, with time features of up to 1,000 radians.
    torch.testing.assert_close(moved, (at(t + h * 1e-2) - at(t - h * 1e-2)) / (2e-2 * h), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_derivative_is_the_difference_and_batches():
    """Without the stop: the loss is differentiated through the tangent."""
    net = models.UNet(1, base_channels=4, num_blocks=1, num_heads=2, embed_dim=4, num_groups=2, time_scale=3.0)
    params, x, v = weights(net), draw(1, 3, 1, 4, 4), draw(2, 3, 1, 4, 4)

    def loss(params, x, v):
        value, moved = fg.jvp(lambda x: net(params, x, x.new_full((1,), 0.4)), (x[None],), (v[None],))
        return (value * moved).square().mean()

    gradient, h, along = fg.grad(loss)(params, x[0], v[0]), 1e-5, weights(net, 5)
    above, below = (loss(tree.add_scaled(params, along, e), x[0], v[0]) for e in (h, -h))
    torch.testing.assert_close(tree.vdot(gradient, along), (above - below) / (2 * h), rtol=1e-6, atol=1e-8)
    batched = aten(fg.vmap(fg.grad(loss), in_dims=(None, 0, 0)))
    assert_close(batched(params, x, v), tree.stack([fg.grad(loss)(params, *pair) for pair in zip(x, v, strict=True)]))


# MAML: gradients through Adam steps, looped and rematerialised.

MLP = nn.MLP(3, (4,), 1, activation=torch.tanh)
ADAM = optim.adam(0.1)


def task_loss(params, batch):
    return (MLP(params, batch["x"]) - batch["y"]).square().mean()


def adapt(carry, batch):
    params, state = carry
    updates, state = ADAM.update(fg.grad(task_loss)(params, batch), state, params)
    return (optim.apply_updates(params, updates), state), None


def outer_loss(params, batches, test):
    (params, _), _ = fg.scan(fg.remat(adapt), (params, ADAM.init(params)), batches)
    return task_loss(params, test)


def unrolled_loss(params, batches, test):
    carry = params, ADAM.init(params)
    for batch in tree.unstack(batches):
        carry, _ = adapt(carry, batch)
    return task_loss(carry[0], test)


BATCHES = {"x": draw(1, 3, 5, 3), "y": draw(2, 3, 5, 1)}
TEST = {"x": draw(3, 4, 3), "y": draw(4, 4, 1)}


@pytest.mark.parametrize("backend", ["aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_jit_of_a_meta_gradient_equals_the_unrolled_one(backend):
    params = weights(MLP)
    expected = torch.func.grad(unrolled_loss)(params, BATCHES, TEST)
    assert_close(fg.jit(fg.grad(outer_loss), backend=backend)(params, BATCHES, TEST), expected)


def test_meta_gradients_of_many_tasks_and_curvature_equal_loops():
    params, tasks = weights(MLP), tree.stack([BATCHES, tree.scale(BATCHES, 1.5)])
    tests = tree.stack([TEST, tree.scale(TEST, 0.5)])
    pairs = list(zip(tree.unstack(tasks), tree.unstack(tests), strict=True))
    expected = tree.stack([fg.grad(unrolled_loss)(params, *pair) for pair in pairs])
    assert_close(aten(fg.vmap(fg.grad(outer_loss), in_dims=(None, 0, 0)))(params, tasks, tests), expected)
    v = weights(MLP, 7)
    product = aten(lambda p, v: fg.hvp(lambda p: outer_loss(p, BATCHES, TEST), (p,), (v,)))(params, v)
    assert_close(product, fg.hvp(lambda p: unrolled_loss(p, BATCHES, TEST), (params,), (v,)))


# A decoder's Jacobian, in chunks.


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 5])
def test_jit_of_the_jacobian_of_a_decoder_in_chunks(chunk_size):
    decoder = nn.MLP(5, (6,), 8, activation=torch.tanh)
    params, codes = weights(decoder), draw(1, 3, 5)

    def by_hand(params, codes):
        hidden = torch.tanh(codes @ params["0"]["weight"].mT + params["0"]["bias"])
        return params["2"]["weight"] @ ((1 - hidden**2)[:, :, None] * params["0"]["weight"])  # tanh' = 1 - tanh^2

    def volume_by_hand(params):
        return torch.logdet(by_hand(params, codes).mT @ by_hand(params, codes)).sum()

    def jacobian(params, code):
        return fg.jacfwd(lambda z: decoder(params, z), chunk_size=chunk_size)(code)

    assert_close(aten(fg.vmap(jacobian, in_dims=(None, 0)))(params, codes), by_hand(params, codes))
    volume = fg.vmap(lambda p, z: torch.logdet(jacobian(p, z).mT @ jacobian(p, z)), in_dims=(None, 0))
    slope = aten(fg.grad(lambda p, z: volume(p, z).sum()))(params, codes)
    assert_close(slope, fg.grad(volume_by_hand)(params))


# Curvature of a transformer block, per example.

BLOCK = models.GPTBlock(4, 2)


def test_hessian_traces_of_a_block_per_example_equal_double_backward():
    params, xs, mix = weights(BLOCK), draw(1, 2, 3, 4), draw(2, 3, 4)
    basis = torch.eye(12, dtype=F64).reshape(12, 3, 4)

    def loss(x):
        return (mix * BLOCK(params, x)).sin().sum()

    def by_matrix(x):
        return fg.hessian(loss)(x).reshape(12, 12).diagonal().sum()

    def by_products(x):
        return fg.vmap(lambda e: (e * fg.hvp(loss, (x,), (e,))).sum())(basis).sum()

    expected = torch.stack([sum((torch.autograd.functional.vhp(loss, x, e)[1] * e).sum() for e in basis) for x in xs])
    for trace in (by_matrix, by_products):
        assert_close(fg.vmap(trace)(xs), expected)
        assert_close(aten(fg.vmap(trace))(xs), expected)


# Many models, many examples, state.


def test_gradients_of_examples_of_models_with_batch_statistics_equal_loops():
    """Each example, a small batch of images, has statistics of its own."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), torch.tanh, nn.Conv2d(2, 1, 2))
    params = tree.stack([weights(net, seed) for seed in range(8)])
    state = tree.stack([tree.cast(net.init_state(), F64)] * 8)
    xs = draw(3, 3, 2, 1, 5, 5)

    def loss(params, state, x):
        y, state = net(params, state, x, train=True)
        return y.square().mean(), state

    gradient = fg.grad(loss, has_aux=True)
    both = fg.vmap(fg.vmap(gradient, in_dims=(None, None, 0)), in_dims=(0, 0, None))
    pairs = zip(tree.unstack(params), tree.unstack(state), strict=True)
    expected = tree.stack([tree.stack([gradient(p, s, x) for x in xs]) for p, s in pairs])
    assert_close(both(params, state, xs), expected)
    assert_close(aten(both)(params, state, xs), expected)


# A sampler that rejects, each example until it is done.


def test_a_rejection_sampler_under_vmap_draws_what_each_key_draws():
    def sample(key):
        def again(carry):
            key, _, tries = carry
            key, now = random.split(key)
            return key, random.uniform(now, (), F64), tries + 1

        start = key, torch.zeros((), dtype=F64), torch.zeros((), dtype=torch.int64)
        return fg.while_loop(lambda carry: carry[1] < 0.7, again, start)

    keys = random.split(random.key(5), 6)
    expected = tree.stack([sample(key) for key in keys])
    assert len(set(expected[2].tolist())) > 1
    assert tree.equal(fg.vmap(sample)(keys), expected)
    assert tree.equal(aten(fg.vmap(sample))(keys), expected)
