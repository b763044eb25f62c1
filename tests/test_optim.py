"""optim: torch.optim and optax trajectories in float64, closed forms, errors."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import EXACT, descend, gap, problem, trajectory

from functorch_gen import optim, tree
from functorch_gen.transforms import jit

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "optim.json").read_text())


def torch_trajectory(make, steps=100, prepare=lambda leaves: None):
    params, loss = problem()
    leaves = {name: x.clone().requires_grad_() for name, x in params.items()}
    optimizer, found = make(leaves), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss(leaves).backward()
        prepare(leaves.values())
        optimizer.step()
        found.append({name: x.detach().clone() for name, x in leaves.items()})
    return found


# torch.optim and optax.

TORCH = {
    "sgd": (optim.sgd(0.05), lambda p: torch.optim.SGD(p.values(), lr=0.05)),
    "momentum": (optim.sgd(0.05, 0.9), lambda p: torch.optim.SGD(p.values(), lr=0.05, momentum=0.9)),
    "nesterov": (
        optim.sgd(0.05, 0.9, nesterov=True),
        lambda p: torch.optim.SGD(p.values(), lr=0.05, momentum=0.9, nesterov=True),
    ),
    "adam": (optim.adam(0.03), lambda p: torch.optim.Adam(p.values(), lr=0.03)),
    "adam_betas": (
        optim.adam(0.003, b1=0.5, b2=0.9, eps=1e-3),
        lambda p: torch.optim.Adam(p.values(), lr=0.003, betas=(0.5, 0.9), eps=1e-3),
    ),
    "adam_l2": (
        optim.chain(optim.add_decayed_weights(0.1), optim.adam(0.03)),
        lambda p: torch.optim.Adam(p.values(), lr=0.03, weight_decay=0.1),
    ),
    "adamw": (
        optim.adamw(0.03, weight_decay=0.2),
        lambda p: torch.optim.AdamW(p.values(), lr=0.03, weight_decay=0.2),
    ),
    "adamw_mask": (
        optim.adamw(0.03, weight_decay=0.2, mask="weight"),
        lambda p: torch.optim.AdamW(
            [{"params": [p["weight"]]}, {"params": [p["bias"]], "weight_decay": 0.0}], lr=0.03, weight_decay=0.2
        ),
    ),
}


@pytest.mark.parametrize("name", TORCH)
def test_optimizer_equals_torch(name):
    tx, make = TORCH[name]
    assert gap(trajectory(tx), torch_trajectory(make)) < EXACT


def test_clip_equals_torch_clip_grad_value():
    reference = torch_trajectory(
        lambda p: torch.optim.SGD(p.values(), lr=0.05), prepare=lambda p: torch.nn.utils.clip_grad_value_(p, 0.1)
    )
    assert gap(trajectory(optim.chain(optim.clip(0.1), optim.sgd(0.05))), reference) < EXACT


def test_clip_by_global_norm_is_close_to_torch_clip_grad_norm():
    reference = torch_trajectory(
        lambda p: torch.optim.SGD(p.values(), lr=0.05), prepare=lambda p: torch.nn.utils.clip_grad_norm_(p, 0.5)
    )
    found = trajectory(optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.05)))
    assert gap(found, reference) < 1e-5  # torch divides by norm + 1e-6


WARMUP_COSINE = optim.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02)

OPTAX = {
    "adam_schedule": optim.adam(WARMUP_COSINE),
    "adamw_mask": optim.adamw(0.03, weight_decay=0.2, mask={"bias": False, "weight": True}),
    "clip_norm_adam": optim.chain(optim.clip_by_global_norm(0.5), optim.adam(0.03)),
    "clip_norm_sgd": optim.chain(optim.clip_by_global_norm(0.5), optim.sgd(0.05)),
    "clip_sgd": optim.chain(optim.clip(0.1), optim.sgd(0.05)),
    "l2_trace": optim.chain(optim.add_decayed_weights(0.1), optim.trace(0.5), optim.scale(-0.05)),
    "lars_mask": optim.lars(0.05, 0.1, "weight", trust_ratio_mask="weight"),
    "param_block_rms": optim.chain(optim.scale_by_param_block_rms(0.3), optim.sgd(0.05)),
    "trust_ratio_min_norm": optim.chain(optim.scale_by_trust_ratio(0.7, 0.1), optim.sgd(0.5)),
}


@pytest.mark.parametrize("name", GOLDENS["chains"])
def test_chain_equals_optax(name):
    found = trajectory(OPTAX[name], steps=max(GOLDENS["steps"]))
    for step, wanted in zip(GOLDENS["steps"], GOLDENS["chains"][name], strict=True):
        assert gap(found[step - 1], {path: torch.tensor(x, dtype=torch.float64) for path, x in wanted.items()}) < EXACT


# Learning rates.


@pytest.mark.parametrize(
    "learning_rate",
    [
        torch.tensor(0.03, dtype=torch.float64),
        lambda step: 0.03,
        optim.constant_schedule(0.03),
        optim.join_schedules([optim.constant_schedule(0.03)] * 2, [10]),
    ],
    ids=["tensor", "function", "constant", "joined"],
)
def test_learning_rate_may_be_tensor_or_schedule(learning_rate):
    assert gap(trajectory(optim.adam(learning_rate), 30), trajectory(optim.adam(0.03), 30)) < 1e-15


NUMBERS = (0.03, 0.8, 0.95, 1e-3, 1e-4, 0.1, 0.3, 0.5, 0.2)


def test_hyper_parameters_may_be_traced_by_jit():
    def step(params, state, numbers):
        rate, b1, b2, eps, eps_root, weight_decay, max_delta, max_norm, decay = numbers
        tx = optim.chain(
            optim.clip(max_delta),
            optim.clip_by_global_norm(max_norm),
            optim.trace(decay),
            optim.adamw(rate, b1, b2, eps, eps_root, weight_decay),
            optim.scale_by_schedule(optim.warmup_cosine_decay_schedule(rate, max_delta, 2, 5)),
        )
        return descend(tx, problem()[1], params, tx.init(params) if state is None else state)

    expected = found = step(problem()[0], None, NUMBERS)
    compiled = jit(step, backend="aten")
    for factor in (1.0, 0.9, 0.8):
        numbers = tuple(factor * x for x in NUMBERS)
        expected, found = step(*expected, numbers), compiled(*found, numbers)
    assert gap(found, expected) < EXACT


def test_scale_by_schedule_starts_at_step_zero():
    tx = optim.scale_by_schedule(lambda step: 10.0 + step)
    state, found = tx.init([torch.ones(())]), []
    for _ in range(3):
        (update,), state = tx.update([torch.ones(())], state)
        found.append(update.item())
    assert found == [10.0, 11.0, 12.0]
    assert state.count.dtype == torch.int64


# Clipping, decay, chains.

GRADS = st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6)


@given(GRADS, GRADS, st.floats(1e-3, 1e3))
def test_clip_by_global_norm_bounds_the_norm_and_keeps_the_direction(a, b, max_norm):
    grads = {"a": torch.tensor(a, dtype=torch.float64), "b": torch.tensor(b, dtype=torch.float64)}
    clipped, _ = optim.clip_by_global_norm(max_norm).update(grads, ())
    norm = math.sqrt(sum(x * x for x in a + b))
    factor = min(1.0, max_norm / norm) if norm > 0 else 1.0
    assert tree.allclose(clipped, tree.scale(grads, factor), rtol=1e-13, atol=0)


@given(GRADS, st.floats(1e-3, 1e3))
def test_clip_bounds_every_element(a, bound):
    (clipped,), _ = optim.clip(bound).update([torch.tensor(a, dtype=torch.float64)], ())
    assert clipped.tolist() == [max(-bound, min(bound, x)) for x in a]


def test_clip_by_global_norm_without_bound_changes_nothing():
    grads = {"a": torch.tensor([3.0, -4.0])}
    assert tree.equal(optim.clip_by_global_norm(math.inf).update(grads, ())[0], grads)


def test_clip_by_global_norm_spreads_nan():
    grads = {"a": torch.tensor([math.nan]), "b": torch.ones(2)}
    clipped, _ = optim.clip_by_global_norm(1.0).update(grads, ())
    assert clipped["b"].isnan().all()


@given(st.permutations(["clip", "norm", "trace", "decay", "adam"]), st.integers(0, 5), st.integers(0, 5))
def test_chain_is_associative(order, i, j):
    parts = {
        "clip": optim.clip(0.2),
        "norm": optim.clip_by_global_norm(0.5),
        "trace": optim.trace(0.5),
        "decay": optim.add_decayed_weights(0.1),
        "adam": optim.scale_by_adam(),
    }
    txs, (i, j) = [*(parts[name] for name in order), optim.scale(-0.1)], sorted((i, j))
    nested = optim.chain(optim.chain(*txs[:i]), optim.chain(*txs[i:j]), optim.chain(*txs[j:]))
    assert gap(trajectory(nested, 3), trajectory(optim.chain(*txs), 3)) == 0


def test_chain_of_nothing_is_identity():
    assert gap(trajectory(optim.chain(optim.chain(), optim.sgd(0.1)), 5), trajectory(optim.sgd(0.1), 5)) == 0


NESTED = {"blocks": [{"bias": torch.ones(2), "weight": torch.ones(2, 2)}] * 2, "norm": {"weight": torch.ones(2)}}


@pytest.mark.parametrize(
    "mask",
    [
        "blocks.*.weight",
        ["blocks.0.weight", "blocks.1.weight"],
        lambda params: tree.map_with_path(lambda path, x: x.ndim == 2, params),
        {"blocks": [{"bias": False, "weight": True}] * 2, "norm": {"weight": False}},
    ],
    ids=["glob", "globs", "function", "tree"],
)
@pytest.mark.parametrize("wrap", [lambda tx: tx, optim.flatten], ids=["leaves", "flat"])
def test_add_decayed_weights_decays_what_the_mask_selects(mask, wrap):
    tx = wrap(optim.add_decayed_weights(0.5, mask))
    updates, _ = tx.update(tree.zeros_like(NESTED), tx.init(NESTED), NESTED)
    for path, update in tree.names(updates).items():
        assert update.eq(0.5 if path.startswith("blocks") and path.endswith("weight") else 0.0).all(), path


def test_zero_gradients_leave_parameters_alone():
    params, _ = problem()
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adam(0.1))
    updates, _ = tx.update(tree.zeros_like(params), tx.init(params), params)
    assert tree.equal(optim.apply_updates(params, updates), params)


def test_empty_trees_are_allowed():
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.trace(0.5), optim.adamw(0.1))
    for wrapped in (tx, optim.flatten(tx)):
        assert wrapped.update({}, wrapped.init({}), {})[0] == {}


# Errors.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optim.sgd(-0.1), r"sgd: expected 0 <= learning_rate, got -0.1"),
        (lambda: optim.adam(math.nan), r"adam: expected 0 <= learning_rate, got nan"),
        (lambda: optim.adamw(torch.ones(2)), r"adamw: expected learning_rate .* 0-d tensor, got shape \(2,\)"),
        (lambda: optim.adam(0.1, b1=1.0), r"expected 0 <= b1 < 1, got 1.0"),
        (lambda: optim.adam(0.1, b2=-0.5), r"expected 0 <= b2 < 1, got -0.5"),
        (lambda: optim.adam(0.1, eps=-1.0), r"expected 0 <= eps, got -1.0"),
        (lambda: optim.adam(0.1, eps_root=-1.0), r"expected 0 <= eps_root, got -1.0"),
        (lambda: optim.adamw(0.1, weight_decay=-1.0), r"expected 0 <= weight_decay, got -1.0"),
        (lambda: optim.sgd(0.1, momentum=1.5), r"sgd: expected 0 <= momentum <= 1, got 1.5"),
        (lambda: optim.sgd(0.1, nesterov=True), r"sgd: expected momentum with nesterov=True"),
        (lambda: optim.clip(0.0), r"clip: expected max_delta > 0, got 0.0"),
        (lambda: optim.clip_by_global_norm(-1), r"clip_by_global_norm: expected max_norm > 0, got -1"),
    ],
)
def test_optimizer_rejects_numbers_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("value", ["0.1", None, True, [0.1]])
def test_optimizer_rejects_what_is_no_number(value):
    with pytest.raises(TypeError, match="adam: expected learning_rate to be a number or a 0-d tensor, got"):
        optim.adam(value)


@pytest.mark.parametrize("tx", [optim.sgd(0.1), optim.sgd(0.1, 0.9), optim.adamw(0.1), optim.flatten(optim.adam(0.1))])
def test_init_rejects_integer_parameters_by_path(tx):
    with pytest.raises(TypeError, match=r"params at 'embed.index': expected a floating-point tensor, got torch.int64"):
        tx.init({"embed": {"index": torch.arange(3), "weight": torch.ones(3)}})


@pytest.mark.parametrize("tx", [optim.adam(0.1), optim.sgd(0.1, 0.9), optim.flatten(optim.adamw(0.1))])
def test_update_names_the_path_of_a_missing_gradient(tx):
    params, _ = problem()
    with pytest.raises(ValueError, match="'weight'"):
        tx.update({"bias": params["bias"]}, tx.init(params), params)


@pytest.mark.parametrize("tx", [optim.adam(0.1), optim.sgd(0.1, 0.9), optim.flatten(optim.adamw(0.1))])
def test_update_names_the_path_of_a_gradient_of_other_shape(tx):
    params, _ = problem()
    grads = {**params, "bias": torch.zeros(1, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"expected shape .* at 'bias', got"):
        tx.update(grads, tx.init(params), params)


def test_apply_updates_broadcasts_nothing():
    with pytest.raises(ValueError, match=r"apply_updates: expected shape \(1,\) at 'a.b', got \(3,\)"):
        optim.apply_updates({"a": {"b": torch.ones(1)}}, {"a": {"b": torch.ones(3)}})


def test_adamw_asks_for_parameters():
    params, _ = problem()
    tx = optim.adamw(0.1)
    with pytest.raises(ValueError, match=r"expected update\(grads, state, params\), got params=None"):
        tx.update(params, tx.init(params))


def test_mask_rejects_a_glob_without_match():
    params, _ = problem()
    tx = optim.adamw(0.1, mask=["weight", "*.scale"])
    with pytest.raises(ValueError, match=r"expected mask to match a path, got '\*.scale' among bias, weight"):
        tx.update(params, tx.init(params), params)


def test_chain_rejects_the_state_of_another_chain():
    tx = optim.chain(optim.identity(), optim.sgd(0.1))
    with pytest.raises(ValueError, match="chain: expected the states of 2 transformations, got 1"):
        tx.update({}, (optim.EmptyState(),))
