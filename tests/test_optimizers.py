"""Every optimizer: its reference on three problems, and the laws of the table in optim_cases.py."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from optim_cases import ALL, EXACT, PROBLEMS, descend, gap, names_of_all, nested, problem, trajectory
from torch.func import grad, hessian, vmap

from functorch_gen import optim, random, tree
from functorch_gen.transforms import jit

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "optim.json").read_text())


def test_the_table_and_the_goldens_hold_every_optimizer():
    assert {name.split()[0] for name in ALL} == names_of_all()
    assert {name.split()[0] for name in GOLDENS["optimizers"]} == names_of_all()


# References.


def as_tensors(golden):
    if isinstance(golden, dict):
        return {name: as_tensors(x) for name, x in golden.items()}
    if isinstance(golden, list) and golden and isinstance(golden[0], dict):
        return [as_tensors(x) for x in golden]
    return torch.tensor(golden, dtype=torch.float64)


@pytest.mark.parametrize("name", GOLDENS["optimizers"])
def test_optimizer_equals_optax(name):
    golden = GOLDENS["optimizers"][name]
    tx = getattr(optim, name.split()[0])(**golden["arguments"])
    for key, wanted in golden["trajectories"].items():
        found = trajectory(tx, max(GOLDENS["steps"]), start=PROBLEMS[key])
        assert gap([found[step - 1] for step in GOLDENS["steps"]], as_tensors(wanted)) < EXACT, key


RATE = {"lr": 3e-4}
TORCH = {
    "sgd": (optim.sgd(3e-4, 0.9, nesterov=True), partial(torch.optim.SGD, **RATE, momentum=0.9, nesterov=True)),
    "adam": (optim.adam(0.03), partial(torch.optim.Adam, lr=0.03)),
    "adamw": (optim.adamw(0.03, weight_decay=0.1), partial(torch.optim.AdamW, lr=0.03, weight_decay=0.1)),
    "adamax": (optim.adamax(0.03, eps=1e-3), partial(torch.optim.Adamax, lr=0.03, eps=1e-3)),
    "adadelta": (
        optim.adadelta(0.5, 0.8, 1e-4, weight_decay=0.1),
        partial(torch.optim.Adadelta, lr=0.5, rho=0.8, eps=1e-4, weight_decay=0.1),
    ),
    "adagrad without eps": (
        optim.adagrad(0.1, 0.2, eps=0.0),
        partial(torch.optim.Adagrad, lr=0.1, initial_accumulator_value=0.2, eps=0.0),
    ),
    "rmsprop": (
        optim.rmsprop(0.01, 0.99, 1e-3, eps_in_sqrt=False, momentum=0.5),
        partial(torch.optim.RMSprop, lr=0.01, eps=1e-3, momentum=0.5),
    ),
    "rmsprop centered": (
        optim.rmsprop(0.01, 0.99, 1e-3, eps_in_sqrt=False, centered=True),
        partial(torch.optim.RMSprop, lr=0.01, eps=1e-3, centered=True),
    ),
}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("start", PROBLEMS.values(), ids=PROBLEMS)
def test_optimizer_equals_torch(name, start):
    tx, make = TORCH[name]
    params, loss = start()
    leaves = tree.map(lambda x: x.clone().requires_grad_(), params)
    optimizer, reference = make(tree.leaves(leaves)), []
    for _ in range(50):
        optimizer.zero_grad()
        for x in tree.leaves(leaves):
            x.grad = torch.zeros_like(x)  # torch leaves out what has no gradient
        loss(leaves).backward()
        optimizer.step()
        reference.append(tree.map(lambda x: x.detach().clone(), leaves))
    assert gap(trajectory(tx, 50, start=start), reference) < EXACT


# The laws of the table.

each = pytest.mark.parametrize("name", ALL)


def numbers_of(row):
    return {"rate": 0.02, **row.numbers}


def train(row, numbers, start=problem, steps=3):
    numbers = dict(numbers)
    return trajectory(row(numbers.pop("rate"), numbers), steps, start=start)[-1]


@each
def test_numbers_are_traced_once_and_may_change(name):
    row, traced = ALL[name], []
    params, loss = problem()
    grads = grad(loss)(params)

    def update(state, params, numbers):
        traced.append(1)
        numbers = dict(numbers)
        return row(numbers.pop("rate"), numbers).update(grads, state, params, value=1.0)

    expected = found = row(0.02).init(params)
    compiled = jit(update, backend="aten")
    for factor in (1.0, 0.9, 0.8):
        numbers = {key: factor * x for key, x in numbers_of(row).items()}
        (wanted, expected), (updates, found) = update(expected, params, numbers), compiled(found, params, numbers)
        assert gap((updates, found), (wanted, expected)) < EXACT
    assert len(traced) == 3 + 1


@each
def test_training_batches_over_eight_settings(name):
    row = ALL[name]
    factors = torch.linspace(0.7, 1.0, 8, dtype=torch.float64)
    found = vmap(lambda numbers: train(row, numbers))({key: x * factors for key, x in numbers_of(row).items()})
    for i, factor in enumerate(factors.tolist()):
        expected = train(row, {key: x * factor for key, x in numbers_of(row).items()})
        assert gap(tree.map(lambda x, i=i: x[i], found), expected) < EXACT


@each
def test_gradient_by_every_number_equals_finite_difference(name):
    row = ALL[name]
    numbers = tree.map(lambda x: torch.tensor(x, dtype=torch.float64), numbers_of(row))
    final = lambda numbers: sum((x.sin().sum() for x in tree.leaves(train(row, numbers))), start=torch.zeros(()))
    slopes = grad(final)(numbers)
    for key, x in numbers.items():
        # errors of h^2 and of rounding / h, which is float32's for adafactor's decay
        h, rel = (1e-3, 1e-2) if key == "decay_rate" else (1e-6, 1e-5)
        difference = (final({**numbers, key: x + h}) - final({**numbers, key: x - h})) / (2 * h)
        assert slopes[key].item() == pytest.approx(difference.item(), rel=rel, abs=1e-8), key


@each
@pytest.mark.parametrize("numbers", [{}, None], ids=["defaults", "table"])
def test_derivatives_at_zero_gradients_are_finite(name, numbers):
    row = ALL[name]
    hyper = {"rate": 0.02, **(row.numbers if numbers is None else numbers)}
    start = {"bias": torch.zeros(2), "weight": torch.tensor([[0.5, -1.0], [0.2, 0.7]])}

    def total(numbers, params, grads):
        tx, moved = row(numbers["rate"], {key: x for key, x in numbers.items() if key != "rate"}), params
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, moved, value=torch.tensor(1.0, dtype=torch.float64))
            moved = optim.apply_updates(moved, updates)
        return sum((x.sum() + (x * x).sum() for x in tree.leaves(moved)), start=torch.zeros(()))

    args = tree.cast((tree.map(torch.tensor, hyper), start, tree.zeros_like(start)), torch.float64)
    assert tree.all_finite(grad(total, argnums=(0, 1, 2))(*args))
    assert tree.all_finite(hessian(total, argnums=(0, 1, 2))(*args))
    assert tree.all_finite(grad(total, argnums=(0, 1, 2))(*tree.cast(args, torch.float32)))


@each
def test_bfloat16_parameters_stay_bfloat16_and_memories_are_wide(name):
    params, loss = tree.cast(nested()[0], torch.bfloat16), nested()[1]
    wide = tree.cast(ALL[name].numbers, torch.float64)  # 0-d float64 numbers widen no state
    tx = ALL[name](torch.tensor(0.02, dtype=torch.float64), tree.map(lambda x: torch.tensor(x), wide))
    state = tx.init(params)
    for _ in range(2):
        grads = grad(lambda params: loss(tree.cast(params, torch.float64)))(params)
        assert {x.dtype for x in tree.leaves(grads)} == {torch.bfloat16}
        before = [x.dtype for x in tree.leaves(state)]
        updates, state = tx.update(grads, state, params, value=torch.tensor(1.0))
        params = optim.apply_updates(params, updates)
        assert {x.dtype for x in tree.leaves(params)} == {torch.bfloat16}
        assert [x.dtype for x in tree.leaves(state)] == before
    assert {x.dtype for x in tree.leaves(state)} <= {torch.float32, torch.int64}
    assert tree.all_finite(params)


@each
def test_flatten_equals_the_optimizer_itself(name):
    tx = ALL[name](0.02)
    found, expected = trajectory(optim.flatten(tx), 5, start=nested), trajectory(tx, 5, start=nested)
    assert gap(found, expected) <= (0 if ALL[name].by_element else EXACT)


@pytest.mark.parametrize("name", [name for name, row in ALL.items() if row.rate == "learning_rate"])
def test_learning_rate_may_be_a_schedule(name):
    row = ALL[name]
    schedule = lambda step: 0.02 - 0.01 * (step >= 2).double()
    params, loss = problem()
    found, expected = (params, row(schedule).init(params)), (params, row(0.02).init(params))
    for rate in (0.02, 0.02, 0.01):
        found = descend(row(schedule), loss, *found)
        expected = descend(row(rate), loss, *expected)
    assert gap(found[0], expected[0]) < EXACT


@each
def test_odd_trees_are_allowed(name):
    tx = ALL[name](0.02)
    for params in ({}, {"none": torch.zeros(0), "flat": torch.zeros(0, 3), "scalar": torch.ones(())}):
        for wrapped in (tx, optim.flatten(tx)):
            updates, _ = wrapped.update(params, wrapped.init(params), params, value=torch.ones(()))
            assert tree.map(lambda x: x.shape, updates) == tree.map(lambda x: x.shape, params)
            assert tree.all_finite(updates)


@each
def test_update_changes_no_input(name):
    params, loss = nested()
    tx = ALL[name](0.02)
    state, grads = tx.init(params), grad(loss)(params)
    before = tree.map(torch.clone, (params, state, grads))
    tx.update(grads, state, params, value=loss(params))
    assert tree.equal((params, state, grads), before)


@pytest.mark.slow
@each
def test_update_compiles_whole(name):
    row = ALL[name]
    params, loss = nested()

    def step(params, state, rate):
        return descend(row(rate), loss, params, state)

    torch._dynamo.reset()  # `step` is another function for each name, but one piece of code
    state, rate = row(0.02).init(params), torch.tensor(0.02, dtype=torch.float64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert gap(compiled(params, state, rate), step(params, state, rate)) < 1e-14


@each
def test_update_names_the_path_of_a_gradient_of_other_shape(name):
    params, _ = problem()
    tx = ALL[name](0.02)
    grads = {**params, "weight": torch.zeros(1, 2, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"expected shape .* at '?.*weight'?, got"):
        optim.apply_updates(params, tx.update(grads, tx.init(params), params, value=torch.ones(()))[0])


# What single optimizers are.


def test_radam_is_exact_in_float32_where_powers_cancel():
    low, high = optim.radam(1.0, b2=0.9999), optim.radam(1.0, b2=0.9999)
    states = low.init([torch.zeros(3)]), high.init([torch.zeros(3, dtype=torch.float64)])
    for step in range(1, 40):
        g = torch.tensor([1.0, -2.0, 0.5]) * step
        (found,), low_state = low.update([g], states[0])
        (wanted,), high_state = high.update([g.double()], states[1])
        states = low_state, high_state
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=0)  # 40 roundings, 6 are amplified


@pytest.mark.parametrize("b2", [0.0, 1 / 3, 0.6])
def test_radam_has_derivatives_where_it_never_rectifies(b2):
    slope = grad(lambda b2: trajectory(optim.radam(0.1, b2=b2), 3)[-1]["weight"].sum())
    assert slope(torch.tensor(b2, dtype=torch.float64)).isfinite()


@pytest.mark.parametrize("eps_in_sqrt", [True, False])
def test_centered_rmsprop_survives_a_variance_that_rounds_below_zero(eps_in_sqrt):
    tx = optim.rmsprop(0.1, 0.5, centered=True, eps_in_sqrt=eps_in_sqrt)
    state = tx.init([torch.zeros(50)])
    for _ in range(60):
        (update,), state = tx.update([torch.linspace(1e4, 1e6, 50)], state)
    assert update.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (2, 3, 5)])
def test_muon_orthogonalises(shape):
    x = random.normal(random.key(0), shape, torch.float64)
    tx = optim.scale_by_muon()
    (update,), _ = tx.update([x], tx.init([x]))
    assert ((torch.linalg.svdvals(update) - 0.95).abs() < 0.35).all()  # where five iterations take [0.01, 1]
    (transposed,), _ = tx.update([x.mT], tx.init([x.mT]))
    assert gap(transposed, update.mT) < EXACT
    if len(shape) > 2:
        singles = [tx.update([y], tx.init([y]))[0][0] for y in x]
        assert gap(update, torch.stack(singles)) < EXACT


def test_muon_rejects_vectors():
    tx = optim.muon(0.1, mask="*")
    params = {"bias": torch.ones(3)}
    with pytest.raises(ValueError, match=r"scale_by_muon: expected matrices, got shape \(3,\)"):
        tx.update(params, tx.init(params), params)


def test_muon_of_torch_layouts_is_that_of_the_transposed():
    def transposed(loss):
        return lambda params: loss({**params, "weight": params["weight"].T})

    params, loss = problem()
    found = params, optim.muon(0.1).init(params)
    params = {**params, "weight": params["weight"].T}
    other = params, optim.muon(0.1, output_axis=0).init(params)
    for _ in range(3):
        found = descend(optim.muon(0.1), loss, *found)
        other = descend(optim.muon(0.1, output_axis=0), transposed(loss), *other)
    assert gap(other[0]["weight"].T, found[0]["weight"]) < EXACT


def tied():
    """The same tensor under two paths."""
    numbers = torch.arange(6, dtype=torch.float64)
    shared = numbers.cos().reshape(2, 3)
    params = {"encoder": [{"weight": shared, "bias": numbers[:2]}], "decoder": {"weight": shared}}

    def loss(params):
        (first,), last = params["encoder"], params["decoder"]
        return (first["weight"] * last["weight"] ** 2).sum() + first["bias"].cos().sum()

    return params, loss


MASKS = {
    "default": None,
    "glob": "*.weight",
    "globs": ["encoder.0.weight", "decoder.*"],
    "function": lambda params: tree.map(lambda x: x.ndim == 2, params),
    "tree": {"encoder": [{"weight": True, "bias": False}], "decoder": {"weight": True}},
}


@pytest.mark.parametrize("wrap", [lambda tx: tx, optim.flatten], ids=["leaves", "flat"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_muon_takes_the_matrices_that_the_mask_selects(mask, wrap):
    found = trajectory(wrap(optim.muon(0.1, mask=mask)), 4, start=tied)
    copies = lambda: (tree.map(torch.clone, tied()[0]), tied()[1])
    assert gap(found, trajectory(optim.muon(0.1), 4, start=copies)) == 0


def test_muon_leaves_the_rest_to_nadamw():
    found = trajectory(optim.muon(0.1, mask="decoder.*", adam_weight_decay=0.1, adam_learning_rate=0.05), 1, start=tied)
    nadamw = optim.chain(optim.scale_by_adam(nesterov=True), optim.add_decayed_weights(0.1), optim.scale(-0.05))
    expected = trajectory(nadamw, 1, start=tied)
    assert gap(found[0]["encoder"], expected[0]["encoder"]) < EXACT
    assert gap(found[0]["decoder"], expected[0]["decoder"]) > 1e-2


@each
def test_frozen_parts_stay(name):
    tx = optim.chain(ALL[name](0.02), optim.freeze("encoder.*"))
    params, found = tied()[0], trajectory(tx, 2, start=tied)[-1]
    assert gap(found["encoder"], params["encoder"]) == 0
    assert gap(found["decoder"], params["decoder"]) > 0


def test_adafactor_keeps_a_row_and_a_column_of_large_matrices():
    params = {"kernel": torch.zeros(3, 2, 5), "small": torch.zeros(2, 1), "vector": torch.zeros(7)}
    state = optim.scale_by_factored_rms(min_dim_size_to_factor=3).init(params)
    shapes = tree.map(lambda *memories: [tuple(x.shape) for x in memories], state.v_row, state.v_col, state.v)
    assert shapes == {
        "kernel": [(3, 2, 1), (1, 2, 5), (1, 1, 1)],
        "small": [(1, 1), (1, 1), (2, 1)],
        "vector": [(1,), (1,), (7,)],
    }


# Errors.


@pytest.mark.parametrize("name", ["adamw", "adan", "lion", "lamb", "lars", "adafactor", "muon"])
def test_optimizers_that_decay_ask_for_parameters(name):
    params, _ = problem()
    tx = ALL[name](0.1)
    with pytest.raises(ValueError, match=r": expected update\(grads, state, params\), got params=None"):
        tx.update(params, tx.init(params))


def test_polyak_sgd_asks_for_the_loss():
    tx = optim.polyak_sgd()
    with pytest.raises(ValueError, match=r"scale_by_polyak: expected update\(.*value=loss\), got value=None"):
        tx.update([torch.ones(1)], tx.init([torch.ones(1)]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.adan(0.1, b3=1.0), "scale_by_adan: expected 0 <= b3 < 1, got 1.0"),
        (lambda: optim.adadelta(0.1, rho=1.0), "scale_by_adadelta: expected 0 <= rho < 1, got 1.0"),
        (lambda: optim.rmsprop(-0.1), "rmsprop: expected 0 <= learning_rate, got -0.1"),
        (lambda: optim.rmsprop(0.1, momentum=2.0), "rmsprop: expected 0 <= momentum <= 1, got 2.0"),
        (lambda: optim.muon(0.1, beta=-0.1), "scale_by_muon: expected 0 <= beta < 1, got -0.1"),
        (lambda: optim.adafactor(0.1, eps=-1.0), "scale_by_factored_rms: expected 0 <= epsilon, got -1.0"),
        (lambda: optim.adafactor(-0.1), "adafactor: expected 0 <= learning_rate, got -0.1"),
        (lambda: optim.polyak_sgd(variant="sps*"), "expected variant to be one of 'sps', 'sps[+]', got 'sps[*]'"),
    ],
)
def test_shelf_rejects_what_is_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
