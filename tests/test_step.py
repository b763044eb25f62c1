"""The training step against loops written by hand, with torch's own optimizers and gradients."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import ema, optim, random, tree
from functorch_gen.step import TrainState, init_state, make_step
from functorch_gen.transforms import jit

KEY = random.key(0)


def normal(seed, *shape):
    return random.normal(random.key(seed), shape, torch.float64)


def new_params():
    return {"hidden": {"weight": normal(1, 5, 3), "bias": normal(2, 5)}, "head": {"weight": normal(3, 1, 5)}}


def predict(params, x):
    h = torch.tanh(x @ params["hidden"]["weight"].T + params["hidden"]["bias"])
    return h @ params["head"]["weight"].T


def plain_loss(params, key, batch):
    noise = 0.1 * random.normal(key, batch["x"].shape, torch.float64)
    return (predict(params, batch["x"] + noise) - batch["y"]).square().mean()


def new_batch(n):
    return {"x": normal(100 + n, 8, 3), "y": normal(200 + n, 8, 1)}


def run(step, train_state, steps):
    states, metrics = [train_state], []
    for n in range(steps):
        train_state, values = step(train_state, new_batch(n))
        states.append(train_state)
        metrics.append(values)
    return states, metrics


def gradients(params, key, batch):
    """By torch's autograd on leaves."""
    leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
    loss = plain_loss(leaves, key, batch)
    return loss.detach(), tree.unflatten(tree.structure(params), torch.autograd.grad(loss, tree.leaves(leaves)))


def test_make_step_equals_a_torch_loop_with_adam_and_ema():
    """20 steps; rounding only. The average is d^n p_0 + the sum over k of (1 - d) d^(n - k) p_k."""
    decay, steps = 0.9, 20
    params, tx, mean = new_params(), optim.adam(0.05), ema.constant(decay)
    states, metrics = run(make_step(plain_loss, tx, ema=mean), init_state(params, tx, KEY, ema=mean), steps)

    leaves = tree.map(lambda p: p.clone().requires_grad_(), params)
    optimizer = torch.optim.Adam(tree.leaves(leaves), lr=0.05)
    history = [params]
    for n in range(steps):
        optimizer.zero_grad()
        loss = plain_loss(leaves, random.fold_in(KEY, n), new_batch(n))
        loss.backward()
        assert torch.allclose(metrics[n]["loss"], loss, rtol=1e-12)
        optimizer.step()
        history.append(tree.map(lambda p: p.detach().clone(), leaves))
    average = tree.scale(params, decay**steps)
    for k in range(1, steps + 1):
        average = tree.add_scaled(average, history[k], (1 - decay) * decay ** (steps - k))
    assert tree.allclose(states[-1].params, history[-1], rtol=1e-12, atol=1e-12)
    assert tree.allclose(states[-1].ema.average, average, rtol=1e-12, atol=1e-12)
    assert states[-1].step == steps


def test_step_draws_with_the_key_folded_with_the_step():
    tx = optim.sgd(0.1)
    states, metrics = run(make_step(plain_loss, tx), init_state(new_params(), tx, KEY), 3)
    for n in range(3):
        loss, _ = gradients(states[n].params, random.fold_in(KEY, n), new_batch(n))
        assert torch.equal(metrics[n]["loss"], loss)
        assert torch.equal(states[n].key, KEY)


def test_step_reports_the_norm_of_the_gradients():
    tx = optim.chain(optim.clip_by_global_norm(1e-3), optim.sgd(0.1))
    train_state = init_state(new_params(), tx, KEY)
    _, metrics = make_step(plain_loss, tx)(train_state, new_batch(0))
    _, grads = gradients(new_params(), random.fold_in(KEY, 0), new_batch(0))
    expected = torch.nn.utils.get_total_norm(tree.leaves(grads))
    assert torch.allclose(metrics["grad_norm"], expected, rtol=1e-13)


def test_step_is_pure():
    tx, mean = optim.adam(0.1), ema.constant(0.9)
    step, train_state = make_step(plain_loss, tx, ema=mean), init_state(new_params(), tx, KEY, ema=mean)
    before = tree.map(torch.clone, train_state)
    first, second = step(train_state, new_batch(0)), step(train_state, new_batch(0))
    assert tree.equal(train_state, before)
    assert tree.equal(first, second)


@pytest.mark.parametrize("stateful", [False, True])
@pytest.mark.parametrize("has_aux", [False, True])
def test_make_step_takes_the_four_forms_of_loss(stateful, has_aux):
    """The state counts and sums what it sees; the update is that of the plain loss, whatever else is returned."""

    def loss_fn(params, *rest):
        (state,) = rest[:-2] if stateful else (None,)
        key, batch = rest[-2:]
        loss = plain_loss(params, key, batch)
        if stateful:
            state = {"calls": state["calls"] + 1, "total": state["total"] + batch["x"].sum()}
        aux = {"first": batch["y"][0, 0], "name": "aux"}
        if stateful:
            return loss, ((state, aux) if has_aux else state)
        return (loss, aux) if has_aux else loss

    tx = optim.sgd(0.1)
    state = {"calls": torch.tensor(0), "total": torch.tensor(0.0, dtype=torch.float64)} if stateful else None
    train_state = init_state(new_params(), tx, KEY, state)
    states, metrics = run(make_step(loss_fn, tx, stateful=stateful, has_aux=has_aux), train_state, 3)

    plain, _ = run(make_step(plain_loss, tx), init_state(new_params(), tx, KEY), 3)
    assert tree.equal(states[-1].params, plain[-1].params)
    if stateful:
        total = sum(new_batch(n)["x"].sum() for n in range(3))
        assert states[-1].state["calls"] == 3
        assert torch.allclose(states[-1].state["total"], total, rtol=1e-13)
    else:
        assert states[-1].state == {}
    if has_aux:
        assert [values["aux"]["first"].item() for values in metrics] == [new_batch(n)["y"][0, 0] for n in range(3)]
    else:
        assert set(metrics[0]) == {"loss", "grad_norm"}


def test_step_vmaps_over_an_ensemble():
    """init_state and step over a batch of keys equal the loop over members."""
    tx, mean = optim.adam(0.1), ema.constant(0.9)
    step = make_step(plain_loss, tx, ema=mean)

    def train(key):
        params = {"hidden": {"weight": random.normal(key, (5, 3), torch.float64), "bias": normal(2, 5)}}
        params["head"] = {"weight": normal(3, 1, 5)}
        return run(step, init_state(params, tx, key, ema=mean), 2)[0][-1]

    keys = random.split(KEY, 3)
    together = torch.vmap(train)(keys)
    for i in range(3):
        assert tree.allclose(tree.map(lambda x, i=i: x[i], together), train(keys[i]), rtol=1e-12)


def test_step_traces_to_one_graph():
    tx, mean = optim.adam(0.1), ema.constant(0.9)
    step, train_state = make_step(plain_loss, tx, ema=mean), init_state(new_params(), tx, KEY, ema=mean)
    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(train_state, new_batch(0))
    later, _ = step(train_state, new_batch(0))
    assert tree.allclose(tuple(traced(later, new_batch(1))[0]), tuple(step(later, new_batch(1))[0]), rtol=1e-12)


def test_step_compiles_whole():
    tx, mean = optim.adam(0.1), ema.constant(0.9)
    step, train_state = make_step(plain_loss, tx, ema=mean), init_state(new_params(), tx, KEY, ema=mean)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert tree.allclose(compiled(train_state, new_batch(0))[0], step(train_state, new_batch(0))[0], rtol=1e-12)


def test_jitted_step_with_donated_state_equals_eager():
    tx, mean = optim.adam(0.1), ema.constant(0.9)
    params, key = new_params(), random.key(0)
    step, train_state = make_step(plain_loss, tx, ema=mean), init_state(params, tx, key, ema=mean)
    eager = run(step, init_state(params, tx, key, ema=mean), 3)[0][-1]
    jitted = jit(step, donate_argnums=0, backend="aten")
    for n in range(3):
        train_state, _ = jitted(train_state, new_batch(n))
    assert tree.allclose(train_state, eager, rtol=1e-12)
    assert tree.equal(params, new_params())  # the donated state held copies
    assert torch.equal(key, random.key(0))


# The first state.


def test_init_state_holds_what_it_was_given():
    tx, mean = optim.adam(0.1), ema.constant(0.9)
    params, state = new_params(), {"mean": normal(4, 2)}
    train_state = init_state(params, tx, KEY, state, ema=mean)
    expected = TrainState(params, state, tx.init(params), mean.init(params), KEY, torch.tensor(0))
    assert tree.equal(train_state, expected)
    assert isinstance(train_state, TrainState)


def test_make_step_refuses_a_state_of_another_average():
    tx, mean = optim.sgd(0.1), ema.constant(0.9)
    for given, kept in ((mean, None), (None, mean)):
        with pytest.raises(ValueError, match="make_step: expected init_state to be given the same ema, got one with"):
            make_step(plain_loss, tx, ema=given)(init_state(new_params(), tx, KEY, ema=kept), None)


def test_init_state_without_ema_and_state_holds_empty_trees():
    train_state = init_state(new_params(), optim.sgd(0.1), KEY)
    assert train_state.ema is None
    assert train_state.state == {}


def test_init_state_shares_no_memory():
    """Neither with the caller's tensors nor between leaves, even if the optimizer keeps the parameters themselves."""
    tied = normal(1, 3)
    params = {"a": tied, "b": tied, "c": tied[:2]}
    keeps = optim.GradientTransformation(lambda params: {"slow": params, "key": KEY}, lambda g, s, params=None: (g, s))
    aliases = ema.EMA(lambda params: params, lambda params, state: (params, state))
    state = {"seen": tied}
    train_state = init_state(params, keeps, KEY, state, ema=aliases)
    addresses = [x.untyped_storage().data_ptr() for x in tree.leaves((params["a"], KEY, train_state))]
    assert len(set(addresses)) == len(addresses)
    assert tree.equal(train_state.params, params)


def test_init_state_keeps_what_is_no_tensor():
    tx = optim.GradientTransformation(lambda params: {"name": "mine"}, lambda g, s, params=None: (g, s))
    assert init_state(new_params(), tx, KEY).opt_state == {"name": "mine"}


def test_init_state_keeps_the_memory_format():
    weight = normal(1, 4, 3, 3, 3).to(memory_format=torch.channels_last)
    train_state = init_state({"weight": weight}, optim.sgd(0.1), KEY)
    assert train_state.params["weight"].stride() == weight.stride()


@pytest.mark.parametrize(
    ("leaf", "error", "message"),
    [
        (torch.arange(3), TypeError, "params: 'layer.bad': expected a floating-point tensor, got torch.int64"),
        (1.0, TypeError, "params: 'layer.bad': expected a floating-point tensor, got float"),
        (torch.tensor([1.0, torch.nan]), ValueError, "params: expected finite values at 'layer.bad'"),
    ],
)
def test_init_state_of_bad_params_names_the_path(leaf, error, message):
    with pytest.raises(error, match=message):
        init_state({"layer": {"bad": leaf, "good": torch.ones(2)}}, optim.sgd(0.1), KEY)


def test_init_state_of_a_bad_key_is_an_error():
    with pytest.raises(ValueError, match=r"init_state: key: expected shape \(two=2,\), got \(3, 2\)"):
        init_state(new_params(), optim.sgd(0.1), random.split(KEY, 3))


# Bad losses.


def test_step_of_a_loss_per_example_is_an_error():
    tx = optim.sgd(0.1)
    step = make_step(lambda params, key, batch: predict(params, batch["x"])[:, 0], tx)
    with pytest.raises(ValueError, match=r"make_step: expected loss_fn to return a 0-d loss .*got \(8,\)"):
        step(init_state(new_params(), tx, KEY), new_batch(0))


@pytest.mark.parametrize(
    ("options", "result", "message"),
    [
        ({"has_aux": True}, 1, r"expected loss_fn to return \(loss, \.\.\.\), got int"),
        ({"stateful": True}, (1, 2, 3), r"expected loss_fn to return \(loss, \.\.\.\), got tuple of 3"),
        (
            {"stateful": True, "has_aux": True},
            (1, {}),
            r"expected loss_fn to return \(loss, \(state, aux\)\), got dict",
        ),
    ],
)
def test_step_of_a_loss_with_too_few_results_is_an_error(options, result, message):
    tx = optim.sgd(0.1)
    step = make_step(lambda *args: result, tx, **options)
    with pytest.raises(TypeError, match=message):
        step(init_state(new_params(), tx, KEY), new_batch(0))


def test_step_scales_the_loss_as_the_optimizer_asks():
    """A power of two changes no run: it is that of the optimizer inside; and an overflow is left out."""
    inner = optim.chain(optim.clip_by_global_norm(0.1), optim.adamw(0.1))
    tx = optim.dynamic_loss_scale(inner, init_scale=2.0**10)
    scaled, of_scaled = run(make_step(plain_loss, tx), init_state(new_params(), tx, KEY), 4)
    plain, of_plain = run(make_step(plain_loss, inner), init_state(new_params(), inner, KEY), 4)
    assert tree.allclose(scaled[-1].params, plain[-1].params, rtol=1e-12, atol=1e-12)
    for name in ("loss", "grad_norm"):
        assert torch.allclose(of_scaled[-1][name], of_plain[-1][name], rtol=1e-12)
    bad = tree.map(lambda x: x * torch.inf, new_batch(0))
    after, metrics = make_step(plain_loss, tx)(scaled[-1], bad)
    assert not metrics["loss"].isfinite()
    assert tree.equal(after.params, scaled[-1].params)
    assert optim.get(after.opt_state, "scale") == 2.0**9


def test_step_gives_the_loss_to_the_optimizer():
    """Polyak's step needs it: on w^2 / 2 it is half of the way to the minimum."""
    tx = optim.polyak_sgd(max_learning_rate=10.0)
    step = make_step(lambda params, key, batch: params["w"].square().sum() / 2, tx)
    train_state, _ = step(init_state({"w": torch.full((2,), 3.0)}, tx, KEY), None)
    assert torch.allclose(train_state.params["w"], torch.full((2,), 1.5))
