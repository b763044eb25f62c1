"""The game of two players: the Dirac-GAN of Mescheder et al. 2018, bilinear games, loops by hand, one compiled step."""

import cmath
import math

import pytest
import torch
from torch.nn import functional as F

import functorch_gen as fg
from functorch_gen import ema, gan, nn, optim, random, tree
from functorch_gen.transforms import jacrev, jit, vmap

F64 = torch.float64
KEY = random.key(0)


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, F64)


def scalar(x):
    return torch.tensor(x, dtype=F64)


# The Dirac-GAN: data at 0, a generator at theta, a discriminator psi x.


def dirac_d_loss(loss=gan.d_logistic, gamma=0.0, sigma=0.0):
    """With R1 of weight gamma, or instance noise: -sigma or sigma with probability 1/2."""
    noise = torch.tensor([-sigma, sigma], dtype=F64)

    def d_loss(d, g, key, batch):
        critic = lambda x: x @ d["psi"]
        zero = torch.zeros(1, 1, dtype=F64)
        real, fake = (x + noise[:, None] for x in (zero, g["theta"][None]))
        return (loss(critic(real), critic(fake)) + gan.r1_penalty(critic, real, gamma=gamma)).mean()

    return d_loss


def dirac_g_loss(loss=gan.g_non_saturating):
    return lambda g, d, key, batch: loss(g["theta"][None] @ d["psi"]).mean()


def dirac(psi=0.0, theta=0.0):
    return {"psi": torch.full((1,), psi, dtype=F64)}, {"theta": torch.full((1,), theta, dtype=F64)}


def spectrum(d_loss, g_loss):
    return torch.linalg.eigvals(gan.game_jacobian(d_loss, g_loss, *dirac(), KEY, None))


def assert_same_spectrum(found, *expected):
    """As sets. Where eigenvalues meet, their error is the square root of the matrix's."""
    order = lambda x: torch.stack(sorted(x, key=lambda z: (round(z.real.item(), 6), z.imag.item())))
    wanted = torch.stack([torch.as_tensor(z, dtype=torch.complex128) for z in expected])
    torch.testing.assert_close(order(found), order(wanted), rtol=0, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("g_loss", [gan.g_minimax, gan.g_non_saturating], ids=["minimax", "non_saturating"])
def test_eigenvalues_of_the_dirac_gan_with_r1(g_loss, gamma):
    """-gamma/2 +- sqrt(gamma^2/4 - 1/4): f'(0) = 1/2; imaginary without a penalty."""
    root = cmath.sqrt(gamma**2 / 4 - 1 / 4)
    found = spectrum(dirac_d_loss(gamma=gamma), dirac_g_loss(g_loss))
    assert_same_spectrum(found, -gamma / 2 + root, -gamma / 2 - root)


def test_eigenvalues_of_the_wasserstein_dirac_gan():
    """+-i: f' = 1."""
    assert_same_spectrum(spectrum(dirac_d_loss(gan.d_wasserstein), dirac_g_loss(gan.g_wasserstein)), 1j, -1j)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_eigenvalues_of_the_dirac_gan_with_instance_noise(sigma):
    """f''(0) sigma^2 +- sqrt(f''(0)^2 sigma^4 - f'(0)^2), f''(0) = -1/4; the generator's loss sees noise too."""
    noise = torch.tensor([-sigma, sigma], dtype=F64)
    g_loss = lambda g, d, key, batch: gan.g_minimax((g["theta"] + noise) * d["psi"]).mean()
    root = cmath.sqrt(sigma**4 / 16 - 1 / 4)
    found = spectrum(dirac_d_loss(sigma=sigma), g_loss)
    assert_same_spectrum(found, -(sigma**2) / 4 + root, -(sigma**2) / 4 - root)


def run_dirac(d_loss, g_loss, update, steps, rate=0.1):
    """The distance from the equilibrium after every step."""
    tx = optim.sgd(rate)
    step = jit(gan.make_step(d_loss, g_loss, tx, tx, update=update), backend="aten")
    state, path = gan.init_state(*dirac(0.5, 0.5), tx, tx, KEY), []
    for _ in range(steps):
        state, _ = step(state, None)
        path.append(math.hypot(float(state.d_params["psi"]), float(state.g_params["theta"])))
    return path


def test_the_dirac_gan_converges_with_r1_at_the_rate_of_its_eigenvalues():
    """|1 + eta eigenvalue| a step, once it is near: the nonlinear rest of 1e-4^2 is beyond the tolerance."""
    path = run_dirac(dirac_d_loss(gamma=0.5), dirac_g_loss(), gan.simultaneous, steps=600)
    eigenvalue = -0.25 + cmath.sqrt(0.25 / 4 - 1 / 4)
    assert path[-1] < 1e-5
    assert (path[-1] / path[-301]) ** (1 / 300) == pytest.approx(abs(1 + 0.1 * eigenvalue), rel=1e-3)


def test_the_wasserstein_dirac_gan_moves_away_and_with_extragradients_to_the_equilibrium():
    """It is bilinear: |1 + i eta| a simultaneous step (no rate converges), |1 + i eta - eta^2| with a look ahead."""
    losses = dirac_d_loss(gan.d_wasserstein), dirac_g_loss(gan.g_wasserstein)
    for update, rate in ((gan.simultaneous, abs(1 + 0.1j)), (gan.extragradient, abs(1 + 0.1j - 0.01))):
        path = run_dirac(*losses, update, steps=50)
        assert path == pytest.approx([0.5**0.5 * rate ** (n + 1) for n in range(50)], rel=1e-12)


@pytest.mark.parametrize(("n_critic", "rate"), [(1, 0.1), (1, 3.9), (5, 0.5), (1, 4.1), (3, 2.5)])
def test_alternating_steps_lie_on_the_unit_circle_up_to_a_rate(n_critic, rate):
    """1 - a^2/2 +- sqrt((1 - a^2/2)^2 - 1), a = sqrt(n_critic) rate / 2, of modulus 1 if a <= 2: section 2."""
    tx = optim.sgd(rate)
    step = gan.make_step(dirac_d_loss(), dirac_g_loss(gan.g_minimax), tx, tx, n_critic)
    start = gan.init_state(*dirac(), tx, tx, KEY)

    def move(point):
        after, _ = step(start._replace(d_params={"psi": point[:1]}, g_params={"theta": point[1:]}), None)
        return torch.cat([after.d_params["psi"], after.g_params["theta"]])

    found = torch.linalg.eigvals(jacrev(move)(torch.zeros(2, dtype=F64)))
    a = n_critic**0.5 * rate / 2
    root = cmath.sqrt((1 - a**2 / 2) ** 2 - 1)
    assert_same_spectrum(found, 1 - a**2 / 2 + root, 1 - a**2 / 2 - root)
    assert bool((found.abs() <= 1 + 1e-9).all()) == (a <= 2)


def test_consensus_damps_the_dirac_gan():
    """Eigenvalues -weight f'(0)^2 +- i f'(0) of the flow: Mescheder et al. 2018, section 3."""
    weight, rate = 2.0, 1e-3
    tx = optim.sgd(rate)
    step = gan.make_step(dirac_d_loss(), dirac_g_loss(), tx, tx, update=gan.consensus(weight))
    start = gan.init_state(*dirac(), tx, tx, KEY)

    def move(point):
        after, _ = step(start._replace(d_params={"psi": point[:1]}, g_params={"theta": point[1:]}), None)
        return torch.cat([after.d_params["psi"], after.g_params["theta"]])

    found = (torch.linalg.eigvals(jacrev(move)(torch.zeros(2, dtype=F64))) - 1) / rate
    assert_same_spectrum(found, -weight / 4 + 0.5j, -weight / 4 - 0.5j)


def test_losses_at_the_equilibrium():
    tx = optim.sgd(0.1)
    state, metrics = gan.make_step(dirac_d_loss(), dirac_g_loss(), tx, tx)(gan.init_state(*dirac(), tx, tx, KEY), None)
    assert float(metrics["d_loss"]) == pytest.approx(2 * math.log(2), rel=1e-15)
    assert float(metrics["g_loss"]) == pytest.approx(math.log(2), rel=1e-15)
    assert float(metrics["d_grad_norm"]) == float(metrics["g_grad_norm"]) == 0
    assert state.params == {"d": {"psi": torch.zeros(1)}, "g": {"theta": torch.zeros(1)}}


# A bilinear game: the discriminator minimises -x^T M y, the generator x^T M y + the rest of a quadratic.

M = normal(7, 2, 3)


def bilinear_d(d, g, key, batch):
    return d["x"] @ M @ g["y"]


def bilinear_g(g, d, key, batch):
    return -(d["x"] @ M @ g["y"])


def field_matrix():
    """A in F(w) = A w, the gradients of both."""
    a = torch.zeros(5, 5, dtype=F64)
    a[:2, 2:], a[2:, :2] = M, -M.mT
    return a


def one_step(update, rate=0.1, **options):
    tx = optim.sgd(rate)
    x, y = normal(8, 2), normal(9, 3)
    step = gan.make_step(bilinear_d, bilinear_g, tx, tx, update=update, **options)
    state, _ = step(gan.init_state({"x": x}, {"y": y}, tx, tx, KEY), None)
    return torch.cat([x, y]), torch.cat([state.d_params["x"], state.g_params["y"]])


def test_updates_of_a_bilinear_game_are_polynomials_of_its_matrix():
    a, eye, eta = field_matrix(), torch.eye(5, dtype=F64), 0.1
    mine = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=F64))
    d_turn, g_turn = eye - eta * mine @ a, eye - eta * (eye - mine) @ a
    for update, options, matrix in (
        (gan.simultaneous, {}, eye - eta * a),
        (gan.alternating, {}, g_turn @ d_turn),
        (gan.alternating, {"n_critic": 3}, g_turn @ d_turn @ d_turn @ d_turn),
        (gan.extragradient, {}, eye - eta * a + eta**2 * a @ a),
        (gan.extragradient, {"n_critic": 2}, (eye - eta * a + eta**2 * a @ a) @ d_turn),
        (gan.consensus(0.7), {}, eye - eta * (a + 0.7 * a.mT @ a)),
    ):
        start, end = one_step(update, **options)
        torch.testing.assert_close(end, matrix @ start, rtol=1e-13, atol=1e-14)


def test_the_jacobian_of_a_bilinear_game_is_minus_its_matrix():
    players = {"x": normal(8, 2)}, {"y": normal(9, 3)}
    found = gan.game_jacobian(bilinear_d, bilinear_g, *players, KEY, None)
    torch.testing.assert_close(found, -field_matrix(), rtol=1e-14, atol=0)


def test_the_game_jacobian_is_that_of_finite_differences():
    """Central differences of the two gradients by torch, with the draws of each player's key."""
    d_params, g_params = {"w": normal(0, 2), "b": scalar(0.3)}, {"v": normal(1, 2)}

    def d_loss(d, g, key, batch):
        fake = torch.tanh(random.normal(key, (4, 1), F64) * g["v"])
        return gan.d_logistic(batch @ d["w"] + d["b"], fake @ d["w"] ** 2 + d["b"]).mean()

    def g_loss(g, d, key, batch):
        fake = torch.tanh(random.normal(key, (4, 1), F64) * g["v"])
        return gan.g_non_saturating(fake @ d["w"] ** 2 + d["b"]).mean()

    batch = normal(2, 4, 2)
    start, unravel = tree.ravel((d_params, g_params))
    d_key, g_key = random.split(KEY)

    def velocity(point):
        d, g = unravel(point)
        slopes = torch.func.grad(d_loss)(d, g, d_key, batch), torch.func.grad(g_loss)(g, d, g_key, batch)
        return -tree.ravel(slopes)[0]

    h = 1e-5
    columns = [(velocity(start + h * e) - velocity(start - h * e)) / (2 * h) for e in torch.eye(5, dtype=F64)]
    found = gan.game_jacobian(d_loss, g_loss, d_params, g_params, KEY, batch)
    torch.testing.assert_close(found, torch.stack(columns, 1), rtol=1e-7, atol=1e-9)  # h^2 and rounding / h


# The step against loops by hand.


D_NET, G_NET = nn.MLP(2, (5,), 1, activation=torch.tanh), nn.MLP(3, (4,), 2, activation=torch.tanh)


def noisy_d_loss(d, g, key, batch):
    fake = G_NET(g, random.normal(key, (len(batch), 3), F64))
    return gan.d_logistic(D_NET(d, batch)[:, 0], D_NET(d, fake)[:, 0]).mean()


def noisy_g_loss(g, d, key, batch):
    return gan.g_non_saturating(D_NET(d, G_NET(g, random.normal(key, (len(batch), 3), F64)))[:, 0]).mean()


def new_players():
    return tuple(tree.cast(net.init(random.key(i)), F64) for i, net in enumerate((D_NET, G_NET)))


def new_batch(n):
    return normal(100 + n, 6, 2)


def run(step, state, steps):
    states, metrics = [state], []
    for n in range(steps):
        state, values = step(state, new_batch(n))
        states.append(state)
        metrics.append(values)
    return states, metrics


def test_make_step_equals_a_torch_loop_with_two_optimizers():
    """Three turns of the discriminator, one of the generator; other learning rates; the generator's average."""
    d_params, g_params = new_players()
    d_tx, g_tx, mean = optim.adam(0.02, b1=0.5), optim.sgd(0.05, momentum=0.9), ema.constant(0.8)
    step = gan.make_step(noisy_d_loss, noisy_g_loss, d_tx, g_tx, 3, ema=mean)
    states, metrics = run(step, gan.init_state(d_params, g_params, d_tx, g_tx, KEY, ema=mean), 5)

    d, g = (tree.map(lambda p: p.clone().requires_grad_(), p) for p in (d_params, g_params))
    d_opt, g_opt = torch.optim.Adam(tree.leaves(d), 0.02, (0.5, 0.999)), torch.optim.SGD(tree.leaves(g), 0.05, 0.9)
    average = g_params

    def turn(optimizer, loss, params):
        optimizer.zero_grad()
        loss.backward(inputs=tree.leaves(params))
        optimizer.step()
        return loss

    for n in range(5):
        *early, last = random.split(random.fold_in(KEY, n), 3)
        d_key, g_key = random.split(last)
        for key in (*early, d_key):
            d_value = turn(d_opt, noisy_d_loss(d, g, key, new_batch(n)), d)
        g_value = turn(g_opt, noisy_g_loss(g, d, g_key, new_batch(n)), g)
        average = tree.lerp(g, average, 0.8)
        assert float(metrics[n]["d_loss"]) == pytest.approx(d_value.item(), rel=1e-10)
        assert float(metrics[n]["g_loss"]) == pytest.approx(g_value.item(), rel=1e-10)
    for found, expected in ((states[-1].d_params, d), (states[-1].g_params, g), (states[-1].ema.average, average)):
        assert tree.allclose(found, expected, rtol=1e-10, atol=1e-12)
    assert states[-1].step == 5


def test_extragradient_moves_from_the_start_by_what_adam_makes_of_the_second_gradient():
    """ExtraAdam, algorithm 4 of Gidel et al. 2019, written out."""
    d_params, g_params = new_players()
    tx = optim.adam(0.02)
    step = gan.make_step(noisy_d_loss, noisy_g_loss, tx, tx, update=gan.extragradient)
    state, _ = step(gan.init_state(d_params, g_params, tx, tx, KEY), new_batch(0))

    (key,) = random.split(random.fold_in(KEY, 0), 1)
    ahead_key, d_key, g_key = random.split(key, 3)
    d_ahead, g_ahead = random.split(ahead_key)
    batch = new_batch(0)
    d_up, d_opt = tx.update(torch.func.grad(noisy_d_loss)(d_params, g_params, d_ahead, batch), tx.init(d_params))
    g_up, g_opt = tx.update(torch.func.grad(noisy_g_loss)(g_params, d_params, g_ahead, batch), tx.init(g_params))
    d_look, g_look = optim.apply_updates(d_params, d_up), optim.apply_updates(g_params, g_up)
    d_up, _ = tx.update(torch.func.grad(noisy_d_loss)(d_look, g_look, d_key, batch), d_opt)
    g_up, _ = tx.update(torch.func.grad(noisy_g_loss)(g_look, d_look, g_key, batch), g_opt)
    expected = {"d": optim.apply_updates(d_params, d_up), "g": optim.apply_updates(g_params, g_up)}
    assert tree.allclose(state.params, expected, rtol=1e-10, atol=1e-12)


def test_every_turn_draws_with_a_key_of_its_own():
    d_seen, g_seen = [], []

    def seen_by(keys):
        def loss(params, others, key, batch):
            keys.append(tuple(key.tolist()))
            return params["w"].sum() * 0

        return loss

    tx = optim.sgd(0.1)
    step = gan.make_step(seen_by(d_seen), seen_by(g_seen), tx, tx, 3)
    state = gan.init_state({"w": torch.ones(1)}, {"w": torch.ones(1)}, tx, tx, KEY)
    for _ in range(2):
        state, _ = step(state, None)
    assert len(d_seen) == 6
    assert len(g_seen) == 2
    assert len({*d_seen, *g_seen}) == 8
    again = gan.make_step(seen_by(d_seen), seen_by(g_seen), tx, tx, 3)
    again(gan.init_state({"w": torch.ones(1)}, {"w": torch.ones(1)}, tx, tx, KEY), None)
    assert d_seen[6:] == d_seen[:3]


@pytest.mark.parametrize(
    "update",
    [
        gan.alternating,
        pytest.param(gan.extragradient, marks=pytest.mark.slow),
        pytest.param(gan.consensus(0.1), marks=pytest.mark.slow),
    ],
    ids=["alternating", "extragradient", "consensus"],
)
def test_the_step_is_one_graph_compiled_once_and_donated(update):
    d_params, g_params = new_players()
    tx, mean = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.01)), ema.constant(0.9)
    lazy = gan.Lazy(lambda d, g, key, batch: gan.r1_penalty(lambda x: D_NET(d, x)[:, 0], batch).mean(), every=2)
    pure = gan.make_step(noisy_d_loss, noisy_g_loss, tx, tx, 2, update=update, ema=mean, d_lazy=lazy)
    step = jit(pure, donate_argnums=0, backend="aten")
    start = gan.init_state(d_params, g_params, tx, tx, KEY, ema=mean)
    expected, _ = run(pure, gan.init_state(d_params, g_params, tx, tx, KEY, ema=mean), 3)
    states, _ = run(step, start, 3)
    assert step.traces == 1
    assert tree.allclose(states[-1], expected[-1], rtol=1e-10, atol=1e-12)
    assert not start.d_params["0"]["weight"].numel()  # its memory was given away
    assert d_params["0"]["weight"].numel()


def test_runs_of_many_seeds_are_a_vmap():
    tx = optim.sgd(0.1)
    step = gan.make_step(noisy_d_loss, noisy_g_loss, tx, tx, ema=ema.constant(0.9))
    states = [gan.init_state(*new_players(), tx, tx, random.key(i), ema=ema.constant(0.9)) for i in range(3)]
    together, _ = vmap(step, in_dims=(0, None))(tree.stack(states), new_batch(0))
    alone = tree.stack([step(state, new_batch(0))[0] for state in states])
    assert tree.allclose(together, alone, rtol=1e-10, atol=1e-12)


# Regularisers, projections, state, aux.


def test_a_lazy_penalty_comes_every_k_steps_k_times_as_strong():
    tx = optim.sgd(0.1)
    flat = lambda params, others, key, batch: 0 * params["w"].sum()
    lazy = gan.Lazy(lambda d, g, key, batch: 2 * d["w"].sum() + 0 * g["w"].sum(), every=3)
    step = jit(gan.make_step(flat, flat, tx, tx, d_lazy=lazy), backend="aten")
    state, path = gan.init_state({"w": scalar(0.0)}, {"w": scalar(0.0)}, tx, tx, KEY), []
    for _ in range(7):
        state, metrics = step(state, None)
        path.append(float(state.d_params["w"]))
        assert metrics["d_loss"] == 0
    assert step.traces == 1
    assert path == pytest.approx([-0.6, -0.6, -0.6, -1.2, -1.2, -1.2, -1.8], rel=1e-12)
    assert state.g_params["w"] == 0


def test_lazy_path_lengths_keep_their_mean_as_state():
    """In the steps 0 and 2, and of the generator alone."""
    a = normal(3, 4, 3)

    def g_penalty(g, d, state, key, batch):
        penalty, mean = gan.path_length_penalty(lambda z: z @ (g["scale"] * a).mT, key, batch, state["mean"], decay=0.5)
        return penalty.mean(), {"mean": mean}

    stay = lambda params, others, state, key, batch: (0 * tree.sum(params), state)
    tx = optim.sgd(1e-3)
    step = gan.make_step(stay, stay, tx, tx, stateful=True, g_lazy=gan.Lazy(g_penalty, every=2))
    start = {"w": scalar(0.0)}, {"scale": scalar(1.0)}
    state = gan.init_state(*start, tx, tx, KEY, {"mean": scalar(0.0)})
    z, means, scale = torch.zeros(5, 3, dtype=F64), [0.0], [1.0]
    for _ in range(3):
        state, _ = step(state, z)
        means.append(float(state.state["mean"]))
        scale.append(float(state.g_params["scale"]))
    assert means[1] == means[2] != means[3]
    assert scale[1] == scale[2] != scale[3]
    (last,) = random.split(random.fold_in(KEY, 0), 1)
    key = random.split(random.split(last)[1])[1]
    lengths = gan.path_lengths(lambda z: z @ a.mT, key, z)
    assert means[1] == pytest.approx(float(lengths.mean()) / 2, rel=1e-13)
    slope = float((2 * (lengths - means[1]) * lengths).mean())
    assert scale[1] == pytest.approx(1 - 1e-3 * 2 * slope, rel=1e-13)


def test_weight_clipping_holds_exactly():
    tx = optim.sgd(10.0)
    clip = lambda params: tree.clip(params, -0.01, 0.01)
    step = gan.make_step(noisy_d_loss, noisy_g_loss, tx, tx, 2, d_project=clip)
    state, _ = step(gan.init_state(*new_players(), tx, tx, KEY), new_batch(0))
    largest = max(float(x.abs().max()) for x in tree.leaves(state.d_params))
    assert largest == 0.01
    assert max(float(x.abs().max()) for x in tree.leaves(state.g_params)) > 0.02


def test_a_wasserstein_critic_with_gradient_penalty_finds_the_distance():
    """For data moved by s, a linear critic of least -w s + 10 (|w| - 1)^2 is w = (1 + |s| / 20) s / |s|."""
    fake, shift = normal(0, 8, 2), torch.tensor([0.6, 0.8], dtype=F64)

    def d_loss(d, g, key, batch):
        critic = lambda x: x @ d["w"]
        penalty = 10 * gan.gradient_penalty(critic, key, batch, fake)
        return (gan.d_wasserstein(critic(batch), critic(fake)) + penalty).mean()

    tx = optim.sgd(0.04)
    step = gan.make_step(d_loss, lambda g, d, key, batch: 0 * g["w"], tx, tx)
    state = gan.init_state({"w": torch.tensor([0.5, 0.7], dtype=F64)}, {"w": scalar(0.0)}, tx, tx, KEY)
    for _ in range(200):
        state, metrics = step(state, fake + shift)
    torch.testing.assert_close(state.d_params["w"], 1.05 * shift, rtol=1e-4, atol=0)
    assert float(metrics["d_loss"]) == pytest.approx(-1.05 + 10 * 0.05**2, rel=1e-6)


SPECTRAL = nn.Sequential(
    nn.SpectralNorm(nn.Linear(2, 8)), F.relu, nn.SpectralNorm(nn.Linear(8, 8)), F.relu, nn.SpectralNorm(nn.Linear(8, 1))
)


def test_a_discriminator_with_spectral_norm_trains_and_stays_lipschitz():
    """Its u and v are state, which both players hand on; the loss falls; |D(x) - D(y)| <= |x - y|."""

    def d_loss(d, g, state, key, batch):
        fake = G_NET(g, random.normal(key, (len(batch), 3), F64))
        real_logits, u = SPECTRAL(d, state["d"], batch, train=True)
        fake_logits, _ = SPECTRAL(d, state["d"], fake, train=True)
        loss = gan.d_hinge(real_logits[:, 0], fake_logits[:, 0]).mean()
        return loss, {**state, "d": u, "turns": state["turns"] + 1}

    def g_loss(g, d, state, key, batch):
        fake = G_NET(g, random.normal(key, (len(batch), 3), F64))
        return gan.g_hinge(SPECTRAL(d, state["d"], fake, train=False)[0][:, 0]).mean(), state

    d_tx, g_tx = optim.adam(0.01), optim.sgd(0.0)
    params = tree.cast(SPECTRAL.init(random.key(0)), F64)
    layers = tree.cast(SPECTRAL.init_state(), F64)
    step = jit(gan.make_step(d_loss, g_loss, d_tx, g_tx, stateful=True), donate_argnums=0, backend="aten")
    state = gan.init_state(params, new_players()[1], d_tx, g_tx, KEY, {"d": layers, "turns": torch.tensor(0)})
    losses = []
    for n in range(60):
        state, metrics = step(state, new_batch(n) + 3)
        losses.append(float(metrics["d_loss"]))
    assert step.traces == 1
    assert int(state.state["turns"]) == 60
    assert sum(losses[-10:]) / 10 < 0.5 < 1.5 < losses[0]
    x, y = normal(1, 500, 2), normal(2, 500, 2)
    gap = SPECTRAL(state.d_params, state.state["d"], x, train=False)[0]
    gap = (gap - SPECTRAL(state.d_params, state.state["d"], y, train=False)[0])[:, 0].abs()
    assert bool((gap <= 1.01 * (x - y).norm(dim=1)).all())  # one power iteration a call lags a little behind


def test_aux_and_state_come_back_in_all_four_forms():
    tx = optim.sgd(0.1)

    def loss(stateful, has_aux, name):
        def fun(params, others, *rest):
            state = rest[0] if stateful else None
            value, aux = params["w"].sum(), {"twice": 2 * params["w"].sum()}
            new = {**state, name: state[name] + 1} if stateful else None
            extra = (new, aux) if stateful and has_aux else new if stateful else aux
            return (value, extra) if stateful or has_aux else value

        return fun

    for stateful in (False, True):
        for has_aux in (False, True):
            losses = [loss(stateful, has_aux, name) for name in "dg"]
            step = gan.make_step(*losses, tx, tx, stateful=stateful, has_aux=has_aux)
            held = {"d": torch.tensor(0), "g": torch.tensor(0)} if stateful else None
            state = gan.init_state({"w": scalar(1.0)}, {"w": scalar(2.0)}, tx, tx, KEY, held)
            state, metrics = step(state, None)
            assert float(metrics["g_loss"]) == 2
            assert metrics.keys() == {"d_loss", "g_loss", "d_grad_norm", "g_grad_norm"} | (
                {"d_aux", "g_aux"} if has_aux else set()
            )
            if has_aux:
                assert float(metrics["g_aux"]["twice"]) == 4
            assert {name: int(n) for name, n in state.state.items()} == ({"d": 1, "g": 1} if stateful else {})


# What else is promised.


def test_fit_trains_the_game_and_names_parameters_that_are_not_finite():
    tx = optim.sgd(0.1)
    step = gan.make_step(noisy_d_loss, noisy_g_loss, tx, tx)
    state, history = fg.train.fit(step, gan.init_state(*new_players(), tx, tx, KEY), new_batch, steps=3, progress=False)
    assert int(state.step) == len(history["d_loss"]) == len(history["g_loss"]) == 3
    wild = gan.make_step(noisy_d_loss, lambda g, d, key, batch: noisy_g_loss(g, d, key, batch) / 0.0, tx, tx)
    with pytest.raises(FloatingPointError, match=r"g\.0\.bias"):
        fg.train.fit(wild, gan.init_state(*new_players(), tx, tx, KEY), new_batch, steps=3, progress=False)


def test_init_state_copies_and_names_what_is_wrong():
    d_params, g_params = new_players()
    tx = optim.adam(0.1)
    state = gan.init_state(d_params, g_params, tx, tx, KEY, ema=ema.constant(0.9))
    addresses = [x.data_ptr() for x in tree.leaves((state, d_params, g_params))]
    assert len({*addresses}) == len(addresses)
    assert tree.structure(state.ema.average) == tree.structure(g_params)
    with pytest.raises(TypeError, match=r"init_state: params: 'g\.n': expected a floating-point tensor"):
        gan.init_state(d_params, {"n": torch.arange(2)}, tx, tx, KEY)
    with pytest.raises(ValueError, match=r"init_state: params: expected finite values at 'd\.w', got NaN"):
        gan.init_state({"w": torch.tensor([torch.nan])}, g_params, tx, tx, KEY)


def test_wrong_losses_and_settings_are_refused():
    tx = optim.sgd(0.1)
    players = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    whole, each = (lambda p, *rest: p["w"].sum()), (lambda p, *rest: p["w"])

    def step(d_loss, g_loss, **options):
        return gan.make_step(d_loss, g_loss, tx, tx, **options)(gan.init_state(*players, tx, tx, KEY), None)

    with pytest.raises(ValueError, match=r"gan.make_step: expected n_critic >= 1, got 0"):
        step(whole, whole, n_critic=0)
    with pytest.raises(
        ValueError, match=r"gan.make_step: expected d_loss to return a 0-d loss \(take the mean\), got \(2,\)"
    ):
        step(each, whole)
    with pytest.raises(TypeError, match=r"gan.make_step: expected g_loss to return \(loss, aux\), got Tensor"):
        step(lambda p, *rest: (p["w"].sum(), None), whole, has_aux=True)
    with pytest.raises(TypeError, match=r"expected d_loss to return \(loss, \(state, aux\)\), got Tensor"):
        step(lambda p, *rest: (p["w"].sum(), p["w"]), whole, has_aux=True, stateful=True)
    with pytest.raises(TypeError, match=r"gan.make_step: expected d_lazy to be a gan.Lazy, got function"):
        step(whole, whole, d_lazy=whole)
    with pytest.raises(ValueError, match=r"gan\.make_step: expected init_state to be given the same ema"):
        step(whole, whole, ema=ema.constant(0.9))
    with pytest.raises(ValueError, match="Lazy: expected every >= 1, got 0"):
        gan.Lazy(whole, every=0)
    with pytest.raises(ValueError, match="consensus: expected 0 <= weight"):
        gan.consensus(-1.0)
