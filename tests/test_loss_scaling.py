"""Training in 16 bits: loss scaling against GradScaler's rule, float32 masters, and fp16 runs against float32 ones."""

import pytest
import torch
import torch.nn.functional as F

import functorch_gen as fg
from functorch_gen import optim, random, tree

INF = float("inf")


# dynamic_loss_scale.


def grad_scaler(scale, streak, finite, *, growth_interval, growth_factor, backoff_factor):
    """torch._amp_update_scale_, the rule of torch.amp.GradScaler.update, in Python."""
    if not finite:
        return scale * backoff_factor, 0
    if streak + 1 < growth_interval:
        return scale, streak + 1
    grown = torch.tensor(scale * growth_factor, dtype=torch.float32)
    return (grown.item() if grown.isfinite() else scale), 0


@pytest.mark.parametrize("init_scale", [2.0**15, 2.0**127, 1000.0])
@pytest.mark.parametrize("factors", [(2.0, 0.5), (1.5, 0.25)])
def test_scale_follows_the_rule_of_grad_scaler(init_scale, factors):
    rule = {"growth_interval": 3, "growth_factor": factors[0], "backoff_factor": factors[1]}
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), init_scale, min_scale=2.0**-100, **rule)
    draws = random.bernoulli(random.key(1), 0.8, (60,)).tolist()
    state, scale, streak = tx.init([torch.zeros(2)]), init_scale, 0
    for step, finite in enumerate(draws, 1):
        _, state = tx.update([torch.tensor([1.0, 1.0 if finite else INF])], state)
        scale, streak = grad_scaler(scale, streak, finite, **rule)
        assert state.scale.item() == pytest.approx(scale, rel=1e-6)
        assert (state.good_steps.item(), state.skipped.item()) == (streak, step - sum(draws[:step]))
    assert 0 < sum(draws) < 60


def test_scale_agrees_with_torch_itself():
    """torch's own kernel runs on the CPU."""
    rule = {"growth_interval": 2, "growth_factor": 2.0, "backoff_factor": 0.5}
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), 2.0**10, **rule)
    state, scale, tracker = tx.init([torch.zeros(1)]), torch.tensor(2.0**10), torch.tensor(0, dtype=torch.int32)
    for finite in (True, True, False, True, False, True, True, True, True):
        _, state = tx.update([torch.tensor([1.0 if finite else INF])], state)
        torch._amp_update_scale_(scale, tracker, torch.tensor(float(not finite)), 2.0, 0.5, 2)
        assert (state.scale.item(), state.good_steps.item()) == (scale.item(), tracker.item())


def test_scale_stops_at_its_minimum():
    tx = optim.dynamic_loss_scale(optim.sgd(0.1), 4.0, min_scale=1.5)
    state, seen = tx.init([torch.zeros(1)]), []
    for _ in range(3):
        _, state = tx.update([torch.tensor([INF])], state)
        seen.append(state.scale.item())
    assert seen == [2.0, 1.5, 1.5]


def test_inner_optimizer_sees_unscaled_gradients_in_float32():
    params = [torch.zeros(3, dtype=torch.float16)]
    grads = [torch.tensor([6e4, 2.0**-20, -3.0], dtype=torch.float16)]
    tx = optim.dynamic_loss_scale(optim.identity(), 2.0**12)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert torch.equal(updates[0], grads[0].float() / 2.0**12)  # 2^-32 is no float16


def test_overflow_changes_neither_parameters_nor_moments():
    tx, params = optim.dynamic_loss_scale(optim.adam(0.1)), {"w": torch.tensor([1.0, 2.0])}
    updates, state = tx.update({"w": torch.tensor([3.0, 4.0])}, tx.init(params), params)
    params = optim.apply_updates(params, updates)
    for bad in (INF, -INF, float("nan")):
        updates, after = tx.update({"w": torch.tensor([1.0, bad])}, state, params)
        assert tree.equal(optim.apply_updates(params, updates), params)
        assert tree.equal(after.inner_state, state.inner_state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scale_loss_widens_before_it_multiplies(dtype):
    state = (optim.EmptyState(), optim.dynamic_loss_scale(optim.sgd(0.1)).init([torch.zeros(1)]))
    scaled = optim.scale_loss(torch.tensor(7.0, dtype=dtype), state)
    assert scaled.item() == 7.0 * 2**15  # infinite in float16
    assert optim.scale_loss(torch.full((2,), 7.0, dtype=dtype), state).tolist() == [7.0 * 2**15] * 2
    assert scaled.dtype == torch.promote_types(dtype, torch.float32)


def test_scale_loss_without_a_scale_is_an_error():
    with pytest.raises(KeyError, match="get: expected one entry 'LossScaleState' in the state, got none"):
        optim.scale_loss(torch.tensor(1.0), optim.sgd(0.1).init([torch.zeros(1)]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_scale": 0.0}, "dynamic_loss_scale: expected init_scale > 0, got 0.0"),
        ({"growth_interval": 0}, "expected growth_interval > 0, got 0"),
        ({"growth_factor": 0.5}, "expected 1 <= growth_factor, got 0.5"),
        ({"backoff_factor": 2.0}, "expected 0 <= backoff_factor <= 1, got 2.0"),
    ],
)
def test_dynamic_loss_scale_rejects_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        optim.dynamic_loss_scale(optim.sgd(0.1), **options)


# master_weights.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", [None, "aten", pytest.param("inductor", marks=pytest.mark.slow)])
def test_parameters_equal_the_rounded_master_exactly(dtype, backend):
    """Also where a step crosses zero, or is far larger or smaller than the parameter."""
    key, steps = random.key(0), 12
    magnitudes = 10.0 ** torch.linspace(-6, 3, 4096)
    start = random.normal(key, (4096,)) * magnitudes.flip(0)
    params = {"vector": start.to(dtype), "scalar": torch.tensor(1.25, dtype=dtype)}
    tx = optim.master_weights(optim.sgd(1.0, momentum=0.5))

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optim.apply_updates(params, updates), state

    step = step if backend is None else fg.jit(step, backend=backend)
    state = tx.init(params)
    for i in range(steps):
        exact_zero = state.master["vector"] * (i == 3)
        grads = {"vector": magnitudes * random.normal(random.fold_in(key, i), (4096,)) * (i != 3) + exact_zero}
        params, state = step(params, state, {**grads, "scalar": torch.tensor(0.3)})
        for name, p in params.items():
            assert p.dtype == dtype
            assert torch.equal(p, state.master[name].to(dtype))


def test_parameter_equals_the_rounded_master_next_to_a_tie():
    """In float32, p + (master - p) would fall onto the tie and be rounded down."""
    p = torch.tensor([2.0**-24], dtype=torch.bfloat16)
    tx = optim.master_weights(optim.sgd(1.0))
    state = tx.init([p])._replace(master=[torch.tensor([2.0**-24 - 2.0**-34])])
    updates, state = tx.update([torch.tensor([-(1 + 2.0**-8 + 2.0**-23)])], state, [p])
    assert state.master[0].item() == 1 + 2.0**-8 + 2.0**-23
    assert optim.apply_updates([p], updates)[0].item() == 1 + 2.0**-7


def test_master_equals_training_in_float32_of_the_same_gradients():
    params = {"w": torch.linspace(-1, 1, 50)}
    tx, plain = optim.master_weights(optim.adamw(1e-4, weight_decay=0.1)), optim.adamw(1e-4, weight_decay=0.1)
    low = tree.cast(params, torch.bfloat16)
    wide = tree.cast(low, torch.float32)
    state, plain_state, old = tx.init(low), plain.init(wide), low
    for step in range(50):
        grads = {"w": torch.cos(torch.arange(50.0) + step)}
        updates, state = tx.update(grads, state, low)
        low = optim.apply_updates(low, updates)
        updates, plain_state = plain.update(grads, plain_state, wide)
        wide = optim.apply_updates(wide, updates)
        assert tree.equal(state.master, wide)
    assert not tree.equal(low, old)  # steps of 1e-4 vanish in bfloat16, but add up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_parameters_train_as_without_masters(dtype):
    params = {"w": torch.linspace(-1, 1, 50, dtype=dtype)}
    tx, plain = optim.master_weights(optim.adam(0.1)), optim.adam(0.1)
    state, (expected, plain_state) = tx.init(params), (params, plain.init(params))
    for _ in range(5):
        grads = tree.map(torch.cos, params)
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        updates, plain_state = plain.update(grads, plain_state, expected)
        expected = optim.apply_updates(expected, updates)
        assert tree.equal(params, expected)
        assert tree.equal(state.master, params)


def test_master_weights_asks_for_parameters():
    tx, params = optim.master_weights(optim.sgd(0.1)), [torch.ones(1)]
    with pytest.raises(ValueError, match=r"master_weights: expected update\(grads, state, params\), got params=None"):
        tx.update(params, tx.init(params))


# Training.

NET = fg.nn.MLP(4, (32, 32), 3)
DRAW = random.normal(random.key(1), (64, 4))
TARGET = torch.stack([DRAW[:, 0].sin(), (DRAW[:, 1] * DRAW[:, 2]).tanh(), DRAW.square().mean(1)], 1)


def loss_of(params, x, y):
    return F.mse_loss(NET(params, x).float(), y)


def autocast_loss(params, x, y):
    with torch.autocast("cpu", dtype=torch.float16):
        return loss_of(params, x, y)


def train(tx, loss, params, spoil=lambda n, x: x, steps=150, scaled=True):
    """The loss of the last step, measured in float32, and all states of the optimizer."""

    def step(params, state, x):
        objective = lambda p: optim.scale_loss(loss(p, x, TARGET), state) if scaled else loss(p, x, TARGET)
        updates, state = tx.update(fg.grad(objective)(params), state, params)
        return optim.apply_updates(params, updates), state

    state, states = tx.init(params), []
    for n in range(steps):
        params, state = step(params, state, spoil(n, DRAW))
        states.append(state)
    return loss_of(tree.cast(params, torch.float32), DRAW, TARGET).item(), states


def overflow_at(*steps):
    return lambda n, x: x * (1e30 if n in steps else 1.0)


@pytest.fixture(scope="module")
def in_float32():
    return train(optim.adam(3e-3), loss_of, NET.init(random.key(0)), scaled=False)[0]


def test_autocast_training_reaches_the_float32_loss_and_survives_overflows(in_float32):
    tx = optim.dynamic_loss_scale(optim.adam(3e-3), growth_interval=40)
    found, states = train(tx, autocast_loss, NET.init(random.key(0)), overflow_at(20, 21), steps=152)
    assert found == pytest.approx(in_float32, rel=0.01)
    scales = [state.scale.item() for state in states]
    assert scales[18:23] == [2.0**15, 2.0**15, 2.0**14, 2.0**13, 2.0**13]  # backs off twice
    assert max(scales[23:]) >= 2.0**15  # and recovers
    assert states[-1].skipped >= 2
    assert tree.equal(states[21].inner_state, states[19].inner_state)


def test_half_precision_parameters_with_masters_reach_the_float32_loss(in_float32):
    tx = optim.dynamic_loss_scale(optim.master_weights(optim.adam(3e-3)), 2.0**10)
    params = tree.cast(NET.init(random.key(0)), torch.float16)
    found, states = train(tx, lambda p, x, y: loss_of(p, x.half(), y), params)
    master = loss_of(states[-1].inner_state.master, DRAW, TARGET).item()
    assert master == pytest.approx(in_float32, rel=0.02)
    assert found == pytest.approx(master, rel=0.02)
