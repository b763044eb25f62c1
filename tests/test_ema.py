"""ema: the geometric sum, torch's averages, closed forms of weights, post-hoc synthesis, precision, transforms."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, hessian, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from functorch_gen import ema, jit, optim, random, tree
from functorch_gen.step import init_state, make_step


def run(tx, values):
    """The average after starting at ``values[0]`` and seeing the others."""
    state = tx.init(values[0])
    found = values[0]
    for params in values[1:]:
        found, state = tx.update(params, state)
    return found, state


def series(n):
    numbers = torch.randn(n, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [{"bias": row[:2], "weight": row[2:].reshape(3, 2)} for row in numbers]


def close(a, b, atol=1e-14):  # float64 rounding
    return bool(tree.allclose(a, b, rtol=1e-12, atol=atol))


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
def test_constant_is_the_geometric_sum(decay):
    values = series(20)
    n = len(values) - 1
    weights = [decay**n] + [(1 - decay) * decay ** (n - k) for k in range(1, n + 1)]
    expected = tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)), *values)
    assert close(run(ema.constant(decay), values)[0], expected)


def test_constant_equals_torch_multi_average():
    values = series(20)
    averages = [x.clone() for x in tree.leaves(values[0])]
    for params in values[1:]:
        get_ema_multi_avg_fn(0.97)(averages, tree.leaves(params), 0)
    assert close(run(ema.constant(0.97), values)[0], tree.unflatten(tree.structure(values[0]), averages))


@given(st.floats(0, 1), st.integers(1, 20))
def test_warmup_follows_its_formula(decay, offset):
    values = [torch.tensor(float(x * x % 7), dtype=torch.float64) for x in range(12)]
    expected = values[0].item()
    for t, x in enumerate(values[1:]):
        d = min(decay, (1 + t) / (offset + t))
        expected = d * expected + (1 - d) * x.item()
    assert run(ema.warmup(decay, offset), values)[0].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_warmup_with_offset_two_is_the_plain_mean():
    values = series(30)
    expected = tree.map(lambda *xs: torch.stack(xs).mean(0), *values)
    assert close(run(ema.warmup(1.0, offset=2), values)[0], expected)


def test_warmup_with_offset_one_is_constant():
    values = series(10)
    assert close(run(ema.warmup(0.9, offset=1), values)[0], run(ema.constant(0.9), values)[0])


def weights(tx, n):
    """The weight of each of n + 1 parameters in the average: those at init come first."""
    return run(tx, list(torch.eye(n + 1, dtype=torch.float64)))[0]


# Half-life.


def test_half_life_halves_the_weight_of_the_start():
    assert weights(ema.half_life(7), 21)[0].item() == pytest.approx(1 / 8, rel=1e-14)
    assert weights(ema.half_life(1000, batch_size=250), 8)[0].item() == pytest.approx(1 / 4, rel=1e-14)


def test_half_life_equals_constant():
    values = series(12)
    assert close(run(ema.half_life(7.0), values)[0], run(ema.constant(0.5 ** (1 / 7)), values)[0])


@pytest.mark.parametrize("ramp_up", [0.05, 0.5, 3.0])
def test_half_life_ramps_up_as_in_edm(ramp_up):
    values = [float(x * x % 7) for x in range(40)]
    expected, nimg, batch_size, half_life = values[0], 0, 32, 500.0
    for x in values[1:]:  # training_loop.py of NVlabs/edm
        beta = 0.5 ** (batch_size / max(min(half_life, nimg * ramp_up), 1e-8))
        expected = x + beta * (expected - x)
        nimg += batch_size
    tx = ema.half_life(half_life, batch_size, ramp_up)
    found = run(tx, [torch.tensor(x, dtype=torch.float64) for x in values])[0]
    assert found.item() == pytest.approx(expected, rel=1e-13)


def test_half_life_has_full_precision_in_long_runs():
    share = 1 - weights(ema.half_life(1e12), 1)[0]
    assert share.item() == pytest.approx(math.log(2) / 1e12, rel=1e-4)  # 1 - 2^-1e-12 by subtraction has 4 digits


# Power functions.


def exponent(std):
    """gamma >= 0 with (gamma + 1) (gamma + 2)^-2 (gamma + 3)^-1 = std^2, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        too_wide = (middle + 1) / ((middle + 2) ** 2 * (middle + 3)) > std**2
        low, high = (middle, high) if too_wide else (low, middle)
    return low


def test_power_has_the_exponents_of_the_paper():
    assert [exponent(std) for std in (0.05, 0.1)] == pytest.approx([16.97, 6.94], abs=0.005)  # EDM2, section 3.1


@pytest.mark.parametrize("std", [0.005, 0.05, 0.1, 0.25, 12**-0.5])
def test_power_has_its_weights_in_closed_form(std):
    n = 40
    edges = (torch.arange(n + 1, dtype=torch.float64) / n) ** (exponent(std) + 1)
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), edges.diff()])
    torch.testing.assert_close(weights(ema.power(std), n), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("std", [0.05, 0.1, 0.2])
def test_power_has_the_width_that_it_is_told(std):
    n = 2000
    found = weights(ema.power(std), n)[1:]
    place = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    mean = (found * place).sum()
    assert ((found * (place - mean) ** 2).sum().sqrt()).item() == pytest.approx(std, rel=1e-4)  # steps of 1/n


def test_power_of_the_largest_width_is_the_plain_mean():
    values = series(20)
    expected = tree.map(lambda *xs: torch.stack(xs).mean(0), *values[1:])
    assert close(run(ema.power(12**-0.5), values)[0], expected)


# SWA.


@pytest.mark.parametrize(("start", "every"), [(0, 1), (3, 1), (0, 4), (5, 3)])
def test_swa_equals_torch(start, every):
    values = series(30)
    model = torch.nn.Linear(2, 3, dtype=torch.float64)
    averaged = AveragedModel(model)
    for i, params in enumerate(values[1:]):
        with torch.no_grad():
            model.bias.copy_(torch.cat([params["bias"], params["bias"][:1]]))
            model.weight.copy_(params["weight"])
        if i >= start and (i - start) % every == 0:
            averaged.update_parameters(model)
    found = run(ema.swa(start, every), values)[0]
    assert close(found["weight"], averaged.module.weight.detach())
    assert close(found["bias"], averaged.module.bias.detach()[:2])


def test_swa_is_the_parameters_before_it_starts():
    values = series(5)
    assert close(run(ema.swa(start=10), values)[0], values[-1])


# Parts.


def nested(i):
    values = series(6)[i]
    return {"layer": values, "scale": values["bias"][0]}


def test_masked_averages_what_it_includes_and_copies_the_rest():
    values = [nested(i) for i in range(6)]
    whole, tx = run(ema.constant(0.9), values)[0], ema.masked(ema.constant(0.9), exclude=["*.bias", "scale"])
    found, state = run(tx, values)
    assert found["layer"]["weight"].equal(whole["layer"]["weight"])
    assert found["layer"]["bias"].equal(values[-1]["layer"]["bias"])
    assert found["scale"].equal(values[-1]["scale"])
    assert tree.equal(ema.average(state), found)
    assert tree.equal(run(ema.masked(ema.constant(0.9), include="*.weight"), values)[0], found)
    both = run(ema.masked(ema.constant(0.9), include="layer.*", exclude="*.bias"), values)[0]
    assert tree.equal(both, found)
    assert tree.equal(run(ema.masked(ema.constant(0.9)), values)[0], whole)


def test_masked_works_on_flat_states():
    values = [nested(i) for i in range(6)]
    layout, tx = optim.Layout.of(values[0], aligned=True), ema.masked(ema.constant(0.9), exclude="*.bias")
    assert close(run(tx, [layout.ravel(x) for x in values])[0].tree(), run(tx, values)[0], atol=1e-16)


def test_masked_shares_no_memory_with_the_parameters():
    tx, params = ema.masked(ema.constant(0.9), include="weight"), series(1)[0]
    _, state = tx.update(params, tx.init(params))
    assert not {x.data_ptr() for x in tree.leaves(params)} & {x.data_ptr() for x in tree.leaves(state.average)}


def test_masked_names_a_glob_that_matches_nothing():
    tx, params = ema.masked(ema.constant(0.9), exclude="*.wieght"), series(1)[0]
    with pytest.raises(
        ValueError, match=r"ema.masked: expected mask to match a path, got '\*.wieght' among bias, weight"
    ):
        tx.update(params, tx.init(params))


# Switch.


def test_switch_sets_the_parameters_back_every_k_steps():
    values, tx = series(9), ema.constant(0.9)
    state = tx.init(values[0])
    for i, params in enumerate(values[1:], 1):
        mean, state = tx.update(params, state)
        assert tree.equal(ema.switch(params, state, every=3), mean if i % 3 == 0 else params)
    assert tree.equal(ema.switch(params, tx.init(values[0]), every=3), params)  # nothing averaged yet


@pytest.mark.parametrize("flat", [False, True], ids=["trees", "flat"])
def test_switch_ema_trains_as_a_loop_of_its_own(flat):
    tx, mean = optim.sgd(0.1), ema.constant(0.8)
    step = make_step(lambda params, key, batch: ((params["w"] - batch) ** 2).sum(), tx, mean, flat=flat)

    def switched(state, batch):
        state, _ = step(state, batch)
        return state._replace(params=ema.switch(state.params, state.ema, every=4))

    switched = jit(switched, backend="aten", donate_argnums=0)
    w = average = torch.tensor([1.0, -2.0], dtype=torch.float64)
    state = init_state({"w": w}, tx, random.key(0), ema=mean, flat=flat)
    for i in range(1, 11):
        batch = torch.tensor([math.sin(i), math.cos(i)], dtype=torch.float64)
        state = switched(state, batch)
        w = w - 0.2 * (w - batch)
        average = 0.8 * average + 0.2 * w
        w = average if i % 4 == 0 else w
    params = state.params.tree() if flat else state.params
    torch.testing.assert_close(params["w"], w, rtol=1e-13, atol=0)


# Post-hoc synthesis.


def snapshots(stds, n, every):
    """Averages of the rows of the identity, so that each is its own profile: pairs (std, state)."""
    values, found = torch.eye(n + 1, dtype=torch.float64), []
    for std in stds:
        tx = ema.power(std)
        state = tx.init(values[0])
        for i in range(1, n + 1):
            _, state = tx.update(values[i], state)
            if i % every == 0:
                found.append((std, state))
    return found


def test_synthesize_recovers_every_stored_snapshot():
    stored = snapshots([0.05, 0.1], 120, every=30)
    for std, state in stored:
        found = ema.synthesize(stored, std, step=int(state.count))
        torch.testing.assert_close(found, state.average, rtol=0, atol=1e-14)  # the system's condition is 117


@pytest.mark.parametrize(("std", "bound"), [(0.06, 0.02), (0.075, 0.02), (0.09, 0.01), (0.15, 0.04)])
def test_synthesize_reproduces_another_width(std, bound):
    stored, wanted = snapshots([0.05, 0.1], 256, every=32), weights(ema.power(std), 256)
    error = (ema.synthesize(stored, std) - wanted).norm() / wanted.norm()
    profiles = torch.stack([state.average for _, state in stored], 1)
    best = (profiles @ torch.linalg.lstsq(profiles, wanted[:, None]).solution)[:, 0]
    least = (best - wanted).norm() / wanted.norm()
    assert least <= error < least + 1e-3  # the fit is of continuous profiles
    assert error < bound  # outside of the stored widths the fit is worse


def test_synthesize_ends_at_the_step_that_it_is_given():
    stored, wanted = snapshots([0.05, 0.1], 256, every=32), weights(ema.power(0.075), 160)
    found = ema.synthesize(stored, 0.075, step=160)
    assert (found[:161] - wanted).norm() / wanted.norm() < 0.03
    assert found[161:].norm() < 0.03 * wanted.norm()


def test_synthesize_is_the_weighted_sum_of_any_parameters():
    stds, values, profiles = (0.05, 0.1), series(65), snapshots([0.05, 0.1], 64, every=16)
    stored = []
    for std in stds:
        tx = ema.power(std)
        state = tx.init(values[0])
        for i, params in enumerate(values[1:], 1):
            _, state = tx.update(params, state)
            if i % 16 == 0:
                stored.append((std, state))
    profile = ema.synthesize(profiles, 0.08)
    expected = tree.map(lambda *xs: torch.tensordot(profile, torch.stack(xs), 1), *values)
    assert close(ema.synthesize(stored, 0.08), expected, atol=1e-9)


def test_synthesize_traces_and_has_derivatives_and_takes_flat_states():
    stored = snapshots([0.05, 0.1], 16, every=4)
    std = torch.tensor(0.08, dtype=torch.float64)

    def total(std):
        return (ema.synthesize(stored, std) * torch.arange(17)).sum()

    slope = (total(std + 1e-5) - total(std - 1e-5)) / 2e-5
    torch.testing.assert_close(grad(total)(std), slope, rtol=1e-6, atol=0)
    torch.testing.assert_close(jit(total, backend="aten")(0.08), total(0.08))
    flat = [
        (std, state._replace(average=optim.Layout.of({"w": state.average}).ravel({"w": state.average})))
        for std, state in stored
    ]
    assert ema.synthesize(flat, 0.08).tree()["w"].equal(ema.synthesize(stored, 0.08))


def test_synthesize_names_what_is_wrong():
    stored = snapshots([0.1], 4, every=2)
    with pytest.raises(ValueError, match=r"ema.synthesize: expected at least one snapshot, got none"):
        ema.synthesize([], 0.1)
    with pytest.raises(ValueError, match=r"ema.synthesize: expected snapshots that differ in width or step"):
        ema.synthesize([*stored, stored[0]], 0.1)
    with pytest.raises(ValueError, match=r"ema.synthesize: expected snapshots after an update, got one with count 0"):
        ema.synthesize([(0.1, ema.power(0.1).init(torch.zeros(5)))], 0.1)
    with pytest.raises(ValueError, match=r"ema.synthesize: expected std <= 0.288\d+, got 0.4"):
        ema.synthesize(stored, 0.4)


# All.

AVERAGES = {
    "constant": ema.constant(0.9),
    "warmup": ema.warmup(0.9),
    "half_life": ema.half_life(100, 20, ramp_up=0.3),
    "power": ema.power(0.1),
    "swa": ema.swa(1, 2),
    "masked": ema.masked(ema.constant(0.9), exclude="bias"),
}
every_average = pytest.mark.parametrize("tx", AVERAGES.values(), ids=AVERAGES)


@every_average
def test_average_of_equal_parameters_is_them(tx):
    params = series(1)[0]
    found, state = run(tx, [params] * 5)
    assert tree.equal(found, params)
    assert tree.equal(ema.average(state), params)
    assert state.count == 4


def test_average_of_bfloat16_parameters_moves_in_float32():
    start, goal = {"w": torch.zeros(1, dtype=torch.bfloat16)}, {"w": torch.ones(1, dtype=torch.bfloat16)}
    found, state = run(ema.constant(0.999), [start] + [goal] * 1000)
    assert ema.average(state)["w"].item() == pytest.approx(1 - 0.999**1000, rel=1e-5)  # 1000 roundings of float32
    assert found["w"].dtype == torch.bfloat16


def test_float32_state_keeps_its_dtypes():
    params = {"scalar": torch.ones(()), "vector": torch.ones(2)}
    tx = ema.warmup(torch.tensor(0.9, dtype=torch.float64))
    state = tx.init(params)
    found, new = tx.update(params, state)
    assert [x.dtype for x in tree.leaves((found, new))] == [x.dtype for x in tree.leaves((params, state))]


def test_init_shares_no_memory_with_the_parameters():
    params = series(1)[0]
    state = ema.constant(0.9).init(params)
    assert not {x.data_ptr() for x in tree.leaves(params)} & {x.data_ptr() for x in tree.leaves(state.average)}


@every_average
def test_update_batches_over_an_ensemble(tx):
    members = [series(4), series(7)[3:]]
    ensemble = [tree.stack([member[i] for member in members]) for i in range(4)]
    state = vmap(tx.init)(ensemble[0])
    for params in ensemble[1:]:
        found, state = vmap(tx.update)(params, state)
    assert close(found, tree.stack([run(tx, member)[0] for member in members]))


def test_update_batches_over_decays():
    values, decays = series(5), torch.tensor([0.5, 0.9], dtype=torch.float64)
    found = vmap(lambda decay: run(ema.warmup(decay), values)[0])(decays)
    assert close(found, tree.stack([run(ema.warmup(decay), values)[0] for decay in (0.5, 0.9)]))


def test_update_has_derivatives():
    values = series(3)

    def total(decay):
        return tree.sum(run(ema.constant(decay), values)[0])

    (a, b, c), d = (tree.sum(x) for x in values), 0.8
    slope = grad(total)(torch.tensor(d, dtype=torch.float64))  # of d^2 a + (1 - d) d b + (1 - d) c
    torch.testing.assert_close(slope, 2 * d * a + (1 - 2 * d) * b - c)


@every_average
def test_update_traces_for_all_steps_at_once(tx):
    values = series(8)
    state = tx.init(values[0])
    graph = make_fx(tx.update, tracing_mode="fake")(values[1], state)
    for params in values[1:]:
        found, state = graph(params, state)
    assert close(found, run(tx, values)[0])


@every_average
def test_update_compiles_whole(tx):
    values = series(3)
    compiled = torch.compile(tx.update, fullgraph=True, backend="aot_eager")
    state = tx.init(values[0])
    for params in values[1:]:
        found, state = compiled(params, state)
    assert close(found, run(tx, values)[0])


@every_average
def test_update_keeps_bfloat16_parameters_and_a_float32_average(tx):
    values = tree.cast(series(6), torch.bfloat16)
    found, state = run(tx, values)
    assert {x.dtype for x in tree.leaves(found)} == {torch.bfloat16}
    assert {x.dtype for x in tree.leaves(state.average)} == {torch.float32}
    exact = run(tx, tree.cast(values, torch.float32))[0]
    assert close(state.average, exact, atol=1e-6)  # float32 rounding
    assert tree.equal(found, tree.cast(exact, torch.bfloat16))


@pytest.mark.parametrize("make", [ema.half_life, ema.power, ema.swa], ids=["half_life", "power", "swa"])
def test_hyper_parameters_may_be_traced_batched_and_differentiated(make):
    values, numbers = (
        [torch.tensor(float(x)).double() for x in (0, 1, 4, 2)],
        {"swa": (1, 2)}.get(make.__name__, (0.1, 0.2)),
    )

    def last(number):
        return run(make(number), values)[0]

    expected = torch.stack([last(number) for number in numbers])
    torch.testing.assert_close(vmap(last)(torch.tensor(numbers)), expected)
    torch.testing.assert_close(jit(last, backend="aten")(numbers[0]), expected[0])
    if make is not ema.swa:
        point = torch.tensor(numbers[0], dtype=torch.float64)
        slope = (last(point + 1e-6) - last(point - 1e-6)) / 2e-6
        torch.testing.assert_close(grad(last)(point), slope, rtol=1e-6, atol=1e-8)
        assert hessian(last)(point).isfinite()  # the first update has weight 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema.constant(1.5), "ema.constant: expected 0 <= decay <= 1, got 1.5"),
        (lambda: ema.warmup(-0.1), "ema.warmup: expected 0 <= decay <= 1, got -0.1"),
        (lambda: ema.warmup(0.9, offset=0.5), "ema.warmup: expected 1 <= offset, got 0.5"),
        (lambda: ema.half_life(-1), "ema.half_life: expected 0 <= half_life, got -1"),
        (lambda: ema.half_life(1, ramp_up=-1), "ema.half_life: expected 0 <= ramp_up, got -1"),
        (lambda: ema.power(0.0), "ema.power: expected std > 0, got 0.0"),
        (lambda: ema.power(0.3), r"ema.power: expected std <= 0.288\d+, got 0.3"),
        (lambda: ema.swa(-1), "ema.swa: expected 0 <= start, got -1"),
        (lambda: ema.swa(0, 0), "ema.swa: expected 1 <= every, got 0"),
        (lambda: ema.switch({}, ema.EMAState({}, torch.tensor(1)), 0), "ema.switch: expected 1 <= every, got 0"),
    ],
)
def test_ema_rejects_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_init_rejects_integers_by_path():
    with pytest.raises(TypeError, match=r"ema: params at 'a.0': expected a floating-point tensor, got torch.int64"):
        ema.constant(0.9).init({"a": [torch.arange(3)]})


def test_update_names_the_path_that_differs():
    tx = ema.constant(0.9)
    state = tx.init({"a": torch.ones(1), "b": torch.ones(1)})
    with pytest.raises(ValueError, match="'b'"):
        tx.update({"a": torch.ones(1)}, state)
    with pytest.raises(ValueError, match=r"ema: expected shape \(1,\) at 'b', got \(3,\)"):
        tx.update({"a": torch.ones(1), "b": torch.ones(3)}, state)
