"""Combinators and wrappers of optimizers: optax's trajectories, paper loops, and the laws every wrapper keeps."""

import json
from pathlib import Path

import pytest
import torch
from optim_cases import descend, gap, problem
from torch.func import grad, vmap

import functorch_gen as fg
from functorch_gen import optim, tree

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "combinators.json").read_text())
CLOSE = 1e-10  # the figure, measured below 3e-14
WARMUP, FALL = optim.linear_schedule(0.0, 0.1, 10), optim.linear_schedule(0.1, 0.01, 30)


def close(x):
    return torch.tensor(x, dtype=torch.float64)


def quadratic():
    curvature = {"bias": close([0.1, 1.0]), "weight": close([[0.5, 20.0], [3.0, 0.3], [7.0, 0.1]])}
    return tree.ones_like(curvature), lambda p: sum((curvature[name] * p[name] ** 2).sum() / 2 for name in p)


def rosenbrock():
    def loss(params):
        x = torch.cat([params["bias"], params["weight"].reshape(-1)])
        return ((1 - x[:-1]) ** 2 + 5 * (x[1:] - x[:-1] ** 2) ** 2).sum() / 10

    return {"bias": close([-0.5, 0.3]), "weight": torch.zeros(3, 2, dtype=torch.float64)}, loss


PROBLEMS = {"fit": problem, "quadratic": quadratic, "rosenbrock": rosenbrock}


def every_third(n):
    return 1 + n % 3


OPTAX = {
    "ema": optim.chain(optim.ema(0.8), optim.scale(-0.05)),
    "ema_biased": optim.chain(optim.ema(0.8, debias=False), optim.scale(-0.05)),
    "multi_steps": optim.multi_steps(optim.adam(0.05), 3),
    "multi_steps_schedule": optim.multi_steps(optim.sgd(0.05), every_third),
    "lookahead": optim.lookahead(optim.sgd(0.05, momentum=0.9), sync_period=5, slow_step_size=0.4),
    "schedule_free_sgd": optim.schedule_free(optim.sgd(0.1), 0.1, b1=0.9),
    "schedule_free_adam": optim.schedule_free(optim.adam(WARMUP, b1=0.0), WARMUP, b1=0.95),
    "schedule_free_fall": optim.schedule_free(optim.sgd(FALL), FALL, b1=0.5),
    "inject_hyperparams": optim.inject_hyperparams(optim.adamw)(WARMUP, b1=0.8, weight_decay=0.1),
    "partition": optim.partition({"a": optim.adam(0.05), "b": optim.sgd(0.02, 0.9)}, {"bias": "a", "*": "b"}),
    "masked": optim.chain(optim.masked(optim.trace(0.7), "weight"), optim.scale(-0.03)),
    "freeze": optim.chain(optim.adam(0.05), optim.freeze(["bias"])),
}


@pytest.mark.parametrize("at", PROBLEMS)
@pytest.mark.parametrize("name", OPTAX)
def test_trajectory_equals_optax(name, at):
    tx, (params, loss) = OPTAX[name], PROBLEMS[at]()
    golden = [{key: close(x) for key, x in point.items()} for point in GOLDENS["trajectories"][name][at]]
    state, found = tx.init(params), []
    for step in range(1, 51):
        params, state = descend(tx, loss, params, state)
        if step in GOLDENS["steps"]:
            found.append(params)
    if name.startswith("schedule_free"):
        found.append(optim.schedule_free_eval_params(state, params))
    assert gap(found, golden) < CLOSE


# partition, masked, freeze.


def nest():
    """Every kind of node, and one tensor under two paths."""
    tied = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    blocks = [{"weight": tied, "bias": close([0.5, -0.5])}, (close(2.0), None, torch.zeros(0, dtype=torch.float64))]
    return {"embed": {"weight": tied}, "blocks": blocks, "none": None, "head": {"bias": close([1.0])}}


def grads_of(params, step):
    return tree.map(lambda x: torch.cos(3 * x + step), params)


def run(tx, params, steps=4, given=grads_of):
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(given(params, step), state, params)
        params = optim.apply_updates(params, updates)
    return params, state


ADAM, SGD = optim.adamw(0.1, weight_decay=0.2), optim.sgd(0.05, momentum=0.5)
LABELS = {"blocks.0.*": "sgd", "*weight": "adam", "*": "sgd"}


def label_of(path):
    return "adam" if path == "embed.weight" else "sgd"


@pytest.mark.parametrize("form", ["globs", "tree", "function"])
def test_partition_runs_each_part_as_if_alone(form):
    of_tree = lambda params: tree.map_with_path(lambda path, _: label_of(path), params)
    labels = {"globs": LABELS, "tree": of_tree(nest()), "function": of_tree}[form]
    found, _ = run(optim.partition({"adam": ADAM, "sgd": SGD}, labels), nest())
    alone = {name: tree.names(run(tx, nest())[0]) for name, tx in [("adam", ADAM), ("sgd", SGD)]}
    for path, x in tree.names(found).items():
        assert torch.equal(x, alone[label_of(path)][path]), path
    assert tree.structure(found) == tree.structure(nest())


def test_partition_keeps_state_for_its_own_leaves_alone():
    state = optim.partition({"adam": ADAM, "sgd": SGD}, LABELS).init(nest())
    mu = optim.get(state.inner_states["adam"], "mu")
    assert {path: tuple(x.shape) for path, x in tree.names(mu).items()} == {"embed.weight": (3, 2)}
    assert sorted(tree.names(optim.get(state, "trace"))) == sorted(set(tree.paths(nest())) - {"embed.weight"})


def test_partition_of_tied_leaves_updates_each_path_and_shares_no_memory():
    params = nest()
    tx = optim.partition({"adam": optim.master_weights(ADAM), "sgd": optim.lookahead(SGD, 2, 0.5)}, LABELS)
    addresses = [x.data_ptr() for x in tree.leaves(tx.init(params)) if x.numel()]
    assert len({*addresses, params["embed"]["weight"].data_ptr()}) == len(addresses) + 1
    found, _ = run(tx, params)
    assert not torch.equal(found["embed"]["weight"], found["blocks"][0]["weight"])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"*weight": "adam"}, "partition: expected the label of 'blocks.0.bias' to be one of 'adam', 'sgd', got None"),
        ({"*": "lion"}, "expected the label of 'blocks.0.bias' to be one of 'adam', 'sgd', got 'lion'"),
        ({"*.scale": "adam", "*": "sgd"}, r"partition: expected a glob of the labels to match a path, got '\*.scale'"),
        ({"embed": {"weight": "adam"}}, "'blocks.0.bias'"),
    ],
    ids=["unlabelled", "unknown", "glob", "structure"],
)
def test_partition_names_what_is_wrong_with_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        optim.partition({"adam": ADAM, "sgd": SGD}, labels).init(nest())


def test_partition_names_the_path_where_gradients_differ():
    tx = optim.partition({"all": SGD}, {"*": "all"})
    with pytest.raises(ValueError, match=r"head\.bias"):
        tx.update({**nest(), "head": {}}, tx.init(nest()), nest())


@pytest.mark.parametrize("mask", ["*weight", ["embed.*", "blocks.0.weight"], "function", "tree"])
def test_masked_leaves_the_others_as_they_are(mask):
    choose = lambda params: tree.map_with_path(lambda path, _: path.endswith("weight"), params)
    mask = {"function": choose, "tree": choose(nest())}.get(str(mask), mask)
    tx, params = optim.masked(optim.adam(0.1), mask), nest()
    updates, state = tx.update(params, tx.init(params), params)
    adam, _ = optim.adam(0.1).update(params, optim.adam(0.1).init(params))
    for path, u in tree.names(updates).items():
        assert torch.equal(u, tree.names(adam if path.endswith("weight") else params)[path]), path
    assert tree.size(optim.get(state, "mu")) == 12


def test_frozen_parameters_stay_bit_for_bit():
    found, _ = run(optim.chain(ADAM, optim.freeze(["embed.*", "*bias"])), nest())
    for path, x in tree.names(found).items():
        stays = path.startswith("embed") or path.endswith("bias") or not x.numel()
        assert torch.equal(x, tree.names(nest())[path]) == stays, path


def test_mask_of_a_freeze_rejects_a_glob_without_match():
    with pytest.raises(
        ValueError, match=r"masked: expected mask to match a path, got 'encoder.\*' among blocks.0.bias"
    ):
        optim.freeze("encoder.*").init(nest())


PARTS = optim.chain(
    optim.partition({"adam": optim.adamw(0.1, mask="embed*"), "flat": optim.flatten(SGD)}, {"e*": "adam", "*": "flat"}),
    optim.freeze("head.*"),
)


@pytest.mark.parametrize("form", ["flatten", "flat step"])
def test_partition_within_flat_vectors_equals_that_of_the_tree(form):
    params = {"embed": {"weight": nest()["embed"]["weight"]}, "head": {"bias": close([1.0])}, "last": close([[2.0]])}
    expected, _ = run(PARTS, params)
    if form == "flatten":
        found, _ = run(optim.flatten(PARTS), params)
    else:
        layout = optim.Layout.of(params, aligned=True)
        in_tree = lambda flat, step: layout.ravel(grads_of(flat.tree(), step))
        found = run(PARTS, layout.ravel(params), given=in_tree)[0].tree()
    assert gap(found, expected) == 0


# named_chain, and entries by name.


def test_named_chain_equals_chain():
    params, loss = problem()
    links = {"clip": optim.clip(0.3), "adam": optim.adam(0.1)}
    named, plain = optim.named_chain(("clip", links["clip"]), adam=links["adam"]), optim.chain(*links.values())
    state, expected = named.init(params), plain.init(params)
    for _ in range(3):
        grads = grad(loss)(params)
        updates, state = named.update(grads, state, params)
        wanted, expected = plain.update(grads, expected, params)
        assert gap(updates, wanted) == 0
    assert list(state) == ["clip", "adam"]
    assert gap(state["adam"], expected[1]) == 0


def test_named_chain_rejects_two_links_of_one_name():
    with pytest.raises(ValueError, match="named_chain: expected names that differ, got a, a"):
        optim.named_chain(("a", SGD), a=ADAM)


def test_get_finds_entries_in_any_nest():
    inner = optim.named_chain(("clip", optim.clip(1.0)), ("adam", optim.adam(0.1)))
    tx = optim.dynamic_loss_scale(optim.multi_steps(optim.masked(inner, "mu"), 2))
    state = tx.init({"mu": torch.ones(2), "nu": torch.ones(3)})
    assert {path: tuple(x.shape) for path, x in optim.get(state, "ScaleByAdamState").mu.items()} == {"mu": (2,)}
    assert optim.get(state, "mu").keys() == {"mu"}  # of a field and keys, the field
    assert optim.get(state, "scale").item() == 2.0**15
    assert optim.get(state, "adam")[0].count.item() == 0
    assert optim.get(state, "adam.0.count").item() == 0


def test_get_lists_the_paths_of_several_entries():
    state = optim.partition({"a": ADAM, "b": ADAM}, {"w": "a", "v": "b"}).init({"w": torch.ones(1), "v": torch.ones(1)})
    with pytest.raises(KeyError, match=r"got those at inner_states.a.0.mu, inner_states.b.0.mu"):
        optim.get(state, "mu")
    assert list(optim.get(state, "b.0.mu")) == ["v"]
    with pytest.raises(KeyError, match="get: expected one entry 'slow' in the state, got none"):
        optim.get(state, "slow")


def test_set_replaces_entries_in_their_dtype():
    params = {"w": torch.ones(2)}
    state = optim.set(ADAM.init(params), mu={"w": torch.full((2,), 3.0, dtype=torch.float64)}, count=7.0)
    assert torch.equal(optim.get(state, "mu")["w"], torch.full((2,), 3.0))
    assert (optim.get(state, "count").item(), optim.get(state, "count").dtype) == (7, torch.int64)
    assert optim.get(ADAM.init(params), "mu")["w"].sum() == 0
    with pytest.raises(ValueError, match=r"set: expected shape \(2,\) at 'w', got \(3,\)"):
        optim.set(state, mu={"w": torch.ones(3)})


# multi_steps.


def test_multi_steps_of_a_mean_loss_equals_one_big_batch():
    params, _ = problem()
    x, y = (
        torch.linspace(-1, 1, 36, dtype=torch.float64).reshape(12, 3),
        torch.linspace(0, 2, 24).double().reshape(12, 2),
    )
    loss = lambda p, x, y: ((torch.tanh(x @ p["weight"] + p["bias"]) - y) ** 2).mean()
    whole, (parts, state) = params, (params, optim.multi_steps(ADAM, 4).init(params))
    whole_state = ADAM.init(params)
    for _ in range(5):
        updates, whole_state = ADAM.update(grad(loss)(whole, x, y), whole_state, whole)
        whole = optim.apply_updates(whole, updates)
        for i in range(4):
            grads = grad(loss)(parts, x[3 * i : 3 * i + 3], y[3 * i : 3 * i + 3])
            updates, state = optim.multi_steps(ADAM, 4).update(grads, state, parts)
            assert bool(tree.norm(updates) == 0) == (i < 3)
            parts = optim.apply_updates(parts, updates)
    assert gap(whole, parts) < 1e-13  # sums in another order, 5 steps
    assert state.gradient_step == 5


def test_a_bad_gradient_stays_in_its_own_accumulation():
    tx, nan, one = optim.multi_steps(optim.sgd(1.0), 2), [torch.tensor(float("nan"))], [torch.tensor(1.0)]
    state, found = tx.init(one), []
    for grads in (one, nan, one, one):
        updates, state = tx.update(grads, state)
        found.append(updates[0])
    assert torch.equal(torch.stack(found).nan_to_num(7.0), torch.tensor([0.0, 7.0, 0.0, -1.0]))


def test_multi_steps_of_one_is_the_optimizer_itself():
    assert optim.multi_steps(ADAM, 1) is ADAM


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.multi_steps(ADAM, 0), "multi_steps: expected every_k_schedule > 0, got 0"),
        (lambda: optim.lookahead(ADAM, 0, 0.5), "lookahead: expected sync_period > 0, got 0"),
        (lambda: optim.lookahead(ADAM, 5, 1.5), "lookahead: expected 0 <= slow_step_size <= 1, got 1.5"),
        (lambda: optim.schedule_free(ADAM, 0.1, b1=1.5), "schedule_free: expected 0 <= b1 <= 1, got 1.5"),
        (lambda: optim.schedule_free(ADAM, 0.1, b1=0.0), "schedule_free: expected b1 > 0, got 0.0"),
        (lambda: optim.ema(1.0), "ema: expected 0 <= decay < 1(.0)?, got 1.0"),
        (lambda: optim.inject_hyperparams(optim.adam)(0.1, b1=2.0), "expected 0 <= b1 < 1(.0)?, got 2.0"),
        (
            lambda: optim.lookahead(SGD, 2, 0.5).update({}, (), None),
            r"lookahead: expected update\(grads, state, params\)",
        ),
        (
            lambda: optim.schedule_free(SGD, 0.1).update({}, optim.schedule_free(SGD, 0.1).init({})),
            "schedule_free: exp",
        ),
    ],
    ids=["every_k", "sync_period", "slow_step_size", "b1", "b1 = 0", "decay", "injected", "lookahead", "schedule_free"],
)
def test_wrapper_rejects_what_it_cannot_do(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# lookahead, schedule_free.


def test_lookahead_equals_the_loops_of_the_paper():
    slow, loss = problem()
    tx, (params, k, a) = optim.lookahead(optim.adam(0.1), 5, 0.5), (slow, 5, 0.5)
    state, fast_state = tx.init(params), optim.adam(0.1).init(params)
    for _ in range(4):  # arXiv:1907.08610, algorithm 1
        fast = slow
        for _ in range(k):
            fast, fast_state = descend(optim.adam(0.1), loss, fast, fast_state)
            params, state = descend(tx, loss, params, state)
        slow = tree.map(lambda s, f: s + a * (f - s), slow, fast)
        assert gap(params, slow) < 1e-13
        assert gap(state.slow_params, slow) < 1e-13


def test_schedule_free_evaluates_at_the_mean_of_the_iterates():
    params, loss = problem()
    tx = optim.schedule_free(optim.sgd(0.1), 0.1, b1=0.9)
    state, iterates = tx.init(params), []
    for _ in range(20):
        params, state = descend(tx, loss, params, state)
        iterates.append(state.z)
        x = tree.map(lambda *z: torch.stack(z).mean(0), *iterates)
        assert gap(optim.schedule_free_eval_params((state,), params), x) < 1e-13
        assert gap(params, tree.lerp(state.z, x, 0.9)) < 1e-13  # arXiv:2405.15682, eq. 2


def test_schedule_free_without_a_step_stays():
    params, loss = problem()
    found, state = descend(
        optim.schedule_free(optim.sgd(0.0), 0.0), loss, params, optim.schedule_free(SGD, 0.0).init(params)
    )
    assert gap(found, params) < 1e-15
    assert gap(optim.schedule_free_eval_params(state, found), params) < 1e-15


# inject_hyperparams.


def test_injected_hyperparameters_change_between_steps_without_a_new_trace():
    params, loss = problem()
    tx = optim.inject_hyperparams(optim.adam)(learning_rate=0.1)
    step = fg.jit(lambda params, state: descend(tx, loss, params, state), backend="aten")
    state, expected, plain_state = tx.init(params), params, optim.adam(0.1).init(params)
    for rate in (0.1, 0.02, 0.3):
        state = optim.set(state, learning_rate=rate)
        params, state = step(params, state)
        expected, plain_state = descend(optim.adam(rate), loss, expected, plain_state)
        assert gap(params, expected) < 1e-14
    assert step.traces == 1
    assert {name: x.item() for name, x in state.hyperparams.items()} == {
        "learning_rate": 0.3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0
    }  # fmt: skip


def test_injected_schedules_show_the_value_of_the_last_step():
    tx = optim.inject_hyperparams(optim.sgd)(WARMUP)
    state = tx.init([torch.ones(1)])
    for step in range(4):
        updates, state = tx.update([torch.ones(1)], state)
        assert state.hyperparams["learning_rate"].item() == pytest.approx(0.01 * step, rel=1e-6)
        assert updates[0].item() == pytest.approx(-0.01 * step, rel=1e-6)


def test_static_arguments_are_not_injected():
    choose = lambda params: {"bias": False, "weight": True}
    tx = optim.inject_hyperparams(optim.adamw, static_args=("mask", "b2"))(0.1, mask=choose)
    params, _ = problem()
    state = tx.init(params)
    assert sorted(state.hyperparams) == ["b1", "eps", "eps_root", "learning_rate", "weight_decay"]
    updates, _ = tx.update(tree.zeros_like(params), state, params)
    assert updates["bias"].abs().max() == 0 < updates["weight"].abs().max()


# zero_nans, apply_if_finite.


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}


@pytest.mark.parametrize("bad", BAD)
def test_bad_gradients_never_reach_parameters_or_state(bad):
    params, loss = problem()
    tx, plain = optim.apply_if_finite(ADAM), ADAM
    state, (expected, expected_state) = tx.init(params), (params, plain.init(params))
    for step in range(8):
        grads = grad(loss)(params)
        if step in (0, 3, 4, 5):
            grads["bias"] = grads["bias"].index_fill(0, torch.tensor([1]), BAD[bad])
        else:
            expected, expected_state = descend(plain, loss, expected, expected_state)
        updates, state = tx.update(grads, state, params)
        params = optim.apply_updates(params, updates)
        assert gap((params, state.inner_state), (expected, expected_state)) == 0
        counts = state.notfinite_count.item(), state.total_notfinite.item(), state.last_finite.item()
        assert counts == [(1, 1, False), (0, 1, True), (0, 1, True), (1, 2, False), (2, 3, False), (3, 4, False),
                          (0, 4, True), (0, 4, True)][step]  # fmt: skip


def test_apply_if_finite_lets_through_after_so_many_as_optax_does():
    tx, nan = optim.apply_if_finite(SGD, max_consecutive_errors=2), [torch.tensor(float("nan"))]
    state, through = tx.init(nan), []
    for _ in range(4):
        updates, state = tx.update(nan, state)
        through.append(bool(updates[0].isnan()))
    assert through == [False, False, True, True]


def test_derivatives_through_a_skipped_update_are_finite():
    def moved(rate, grads):
        tx = optim.apply_if_finite(optim.adam(rate))
        updates, _ = tx.update([grads], tx.init([torch.zeros(2, dtype=torch.float64)]))
        return updates[0].sum()

    for bad in BAD.values():
        found = grad(moved, argnums=(0, 1))(close(0.1), close([1.0, bad]))
        assert [x.abs().max().item() for x in found] == [0.0, 0.0]


def test_zero_nans_leaves_all_else():
    grads = [torch.tensor([1.0, float("nan"), float("-inf")]), torch.zeros(0), torch.tensor(float("nan"))]
    updates, _ = optim.zero_nans().update(grads, optim.zero_nans().init(grads))
    assert [u.tolist() for u in updates] == [[1.0, 0.0, float("-inf")], [], 0.0]


# Laws of every wrapper.

WRAPPERS = {
    "named_chain": lambda rate: optim.named_chain(("clip", optim.clip(0.3)), ("adam", optim.adam(rate))),
    "partition": lambda rate: optim.partition({"a": optim.adam(rate), "b": optim.sgd(rate)}, {"bias": "a", "*": "b"}),
    "masked": lambda rate: optim.chain(optim.masked(optim.trace(0.9), "weight"), optim.sgd(rate)),
    "freeze": lambda rate: optim.chain(optim.adam(rate), optim.freeze("bias")),
    "multi_steps": lambda rate: optim.multi_steps(optim.adam(rate), 2),
    "ema": lambda rate: optim.chain(optim.ema(0.9), optim.sgd(rate)),
    "lookahead": lambda rate: optim.lookahead(optim.adam(rate), 2, 0.5),
    "schedule_free": lambda rate: optim.schedule_free(optim.adam(rate, b1=0.0), rate),
    "inject_hyperparams": lambda rate: optim.inject_hyperparams(optim.adamw)(rate, mask="weight"),
    "zero_nans": lambda rate: optim.chain(optim.zero_nans(), optim.adam(rate)),
    "apply_if_finite": lambda rate: optim.apply_if_finite(optim.adam(rate), 3),
    "master_weights": lambda rate: optim.master_weights(optim.adam(rate)),
    "dynamic_loss_scale": lambda rate: optim.dynamic_loss_scale(optim.adam(rate), 4.0, growth_interval=2),
}
every_wrapper = pytest.mark.parametrize("name", WRAPPERS)


@every_wrapper
def test_update_is_traced_once_and_equals_the_eager_one(name):
    params, loss = problem()
    tx = WRAPPERS[name](0.1)
    step = fg.jit(lambda p, s: descend(tx, loss, p, s), donate_argnums=(0, 1), backend="aten")
    found = tree.map(torch.clone, params), tx.init(tree.map(torch.clone, params))
    expected = params, tx.init(params)
    for _ in range(4):
        found, expected = step(*found), descend(tx, loss, *expected)
    assert step.traces == 1
    assert tree.allclose(found, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.slow  # rows of the zoo, too
@every_wrapper
def test_update_compiles_whole(name):
    params, loss = problem()
    tx = WRAPPERS[name](0.1)
    state = tx.init(params)
    torch._dynamo.reset()  # one function of many types: over the limit of recompilations
    step = torch.compile(lambda p, s: descend(tx, loss, p, s), fullgraph=True, backend="aot_eager")
    assert tree.allclose(step(params, state), descend(tx, loss, params, state), rtol=1e-13, atol=1e-13)


@every_wrapper
def test_update_batches_over_learning_rates(name):
    def final(rate):
        params, loss = problem()
        tx = WRAPPERS[name](rate)
        state = tx.init(params)
        for _ in range(3):
            params, state = descend(tx, loss, params, state)
        return params

    rates = torch.linspace(0.01, 0.2, 8, dtype=torch.float64)
    assert gap(vmap(final)(rates), tree.stack([final(rate) for rate in rates])) < 1e-13


@every_wrapper
def test_gradient_through_training_equals_a_finite_difference(name):
    def final(rate):
        params, loss = problem()
        tx = WRAPPERS[name](rate)
        state = tx.init(params)
        for _ in range(4):
            params, state = descend(tx, loss, params, state)
        return loss(params)

    x, h = close(0.05), 1e-5
    difference = (final(x + h) - final(x - h)) / (2 * h)
    assert grad(final)(x).item() == pytest.approx(difference.item(), rel=1e-6)  # h^2 and rounding / h


@every_wrapper
def test_meta_gradient_is_finite_at_zero_gradients(name):
    def total(rate, grads):
        params, _ = problem()
        tx = WRAPPERS[name](rate)
        state = tx.init(params)
        for _ in range(2):
            updates, state = tx.update(grads, state, params)
            params = optim.apply_updates(params, updates)
        return sum(x.square().sum() for x in params.values())

    zero = tree.zeros_like(problem()[0])
    assert tree.all_finite(grad(total, argnums=(0, 1))(close(0.1), zero))


@every_wrapper
def test_bfloat16_parameters_stay_in_bfloat16_and_state_in_its_dtypes(name):
    params, loss = problem(torch.bfloat16)
    tx = WRAPPERS[name](0.1)
    state = tx.init(params)
    new, after = descend(tx, loss, params, state)
    assert {x.dtype for x in tree.leaves(new)} == {torch.bfloat16}
    assert [x.dtype for x in tree.leaves(after)] == [x.dtype for x in tree.leaves(state)]
    assert torch.bfloat16 not in {x.dtype for x in tree.leaves(state)}


@every_wrapper
def test_states_share_no_memory(name):
    params = {"bias": torch.ones(2), "weight": torch.ones(3, 2)}
    rate = torch.tensor(0.1)
    tx = WRAPPERS[name](rate)
    states = [state := tx.init(params), tx.update(params, state, params)[1]]
    for state in states:
        addresses = [x.data_ptr() for x in tree.leaves((params, rate, state))]
        assert len(set(addresses)) == len(addresses)


@every_wrapper
def test_update_changes_no_input(name):
    params, loss = problem()
    tx = WRAPPERS[name](0.1)
    given = grad(loss)(params), tx.init(params), params
    before = tree.map(torch.clone, given)
    tx.update(*given)
    assert tree.equal(given, before)
