"""optim: flatten, precision, and the laws under tracing, vmap, grad and torch.compile."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from optim_cases import EXACT, descend, gap, problem, trajectory
from torch.func import grad, hessian, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from functorch_gen import optim, tree

# flatten.


def many_leaves(seed, shapes):
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=generator, dtype=dtype) for i, (shape, dtype) in enumerate(shapes)}


SHAPES = st.lists(
    st.tuples(st.sampled_from([(), (3,), (2, 2), (0,), (1, 2, 1)]), st.sampled_from([torch.float64, torch.float32])),
    min_size=1,
    max_size=5,
)


@given(SHAPES, st.integers(0, 100))
def test_flatten_equals_the_transformation_itself(shapes, seed):
    tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(0.1, weight_decay=0.1, mask="p[02]"))
    flat, params = optim.flatten(tx), many_leaves(seed, shapes)
    state, flat_state = tx.init(params), flat.init(params)
    for step in range(3):
        grads = many_leaves(seed + step + 1, shapes)
        updates, state = tx.update(grads, state, params)
        flat_updates, flat_state = flat.update(grads, flat_state, params)
        for x, y in zip(tree.leaves(updates), tree.leaves(flat_updates), strict=True):
            assert (x.shape, x.dtype) == (y.shape, y.dtype)
            # one norm: its sum is ordered differently, in float32 as soon as any leaf is
            exact = all(p.dtype == torch.float64 for p in params.values())
            torch.testing.assert_close(x, y, rtol=0, atol=EXACT if exact else 1e-6)


def test_flatten_keeps_one_vector_per_dtype():
    params = many_leaves(0, [((3,), torch.float32), ((2, 2), torch.float64), ((), torch.float32)])
    mu = optim.flatten(optim.scale_by_adam()).init(params).mu
    assert {name: (x.shape, x.dtype) for name, x in mu.vectors.items()} == {
        "float32": ((4,), torch.float32),
        "float64": ((4,), torch.float64),
    }


def test_flatten_within_flatten_equals_one():
    tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adamw(0.03, weight_decay=0.2))
    assert gap(trajectory(optim.flatten(optim.flatten(tx)), 10), trajectory(tx, 10)) < EXACT


def test_flatten_works_without_parameters():
    params = many_leaves(0, [((3,), torch.float64), ((2, 2), torch.float64)])
    flat = optim.flatten(optim.adam(0.1))
    updates, _ = flat.update(params, flat.init(params))
    assert gap(updates, tree.map(lambda g: -0.1 * g.sign(), params)) < 1e-8  # eps / |g|


# Precision.


def test_adam_keeps_moments_of_bfloat16_parameters_in_float32():
    params, _ = problem(torch.bfloat16)
    tx = optim.adam(1e-3)
    updates, (state, _) = tx.update(params, tx.init(params), params)
    moments = tree.leaves((state.mu, state.nu, state.mu_weight, state.nu_weight))
    assert {x.dtype for x in moments} == {torch.float32}
    assert {x.dtype for x in tree.leaves(optim.apply_updates(params, updates))} == {torch.bfloat16}


def test_adam_in_bfloat16_equals_float32_moments_of_the_same_gradients():
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(200, 5, generator=generator).bfloat16()
    tx = optim.scale_by_adam()
    low, high = tx.init([torch.zeros(5, dtype=torch.bfloat16)]), tx.init([torch.zeros(5, dtype=torch.float64)])
    for g in gradients:
        (u,), low = tx.update([g], low)
        (v,), high = tx.update([g.double()], high)
    torch.testing.assert_close(u.double(), v, rtol=1e-5, atol=1e-6)  # 200 roundings of float32


@pytest.mark.parametrize("b2", [0.9, 0.999, 0.9999])
def test_adam_bias_correction_is_exact_in_float32(b2):
    tx, grads = optim.scale_by_adam(b2=b2), [torch.ones(1)]
    state = tx.init(grads)
    for step in range(1, 200):
        _, state = tx.update(grads, state)
        exact = -math.expm1(step * math.log(b2))
        assert state.nu_weight.item() == pytest.approx(exact, rel=2e-5 if step > 50 else 2e-6)  # step * 2^-24


def test_first_adam_step_in_float32_is_the_sign():
    tx, grads = optim.adam(1.0, eps=0.0), [torch.tensor([3.0, -1e-3, 200.0])]
    (update,), _ = tx.update(grads, tx.init(grads))
    torch.testing.assert_close(update, torch.tensor([-1.0, 1.0, -1.0]), rtol=3e-7, atol=0)  # powers: 7e-6 off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wider_hyper_parameters_widen_no_state(dtype):
    number = lambda x: torch.tensor(x, dtype=torch.float64)
    tx = optim.chain(
        optim.clip(number(1.0)),
        optim.clip_by_global_norm(number(1.0)),
        optim.trace(number(0.5)),
        optim.adamw(number(0.1), number(0.9), number(0.99), weight_decay=number(0.1)),
    )
    params = {"scalar": torch.ones((), dtype=dtype), "vector": torch.ones(2, dtype=dtype)}
    state = tx.init(params)
    updates, new_state = tx.update(params, state, params)
    assert [x.dtype for x in tree.leaves(new_state)] == [x.dtype for x in tree.leaves(state)]
    assert {x.dtype for x in tree.leaves(optim.apply_updates(params, updates))} == {dtype}
    assert {x.dtype for x in tree.leaves(updates)} == {torch.float32}


def test_apply_updates_rounds_once():
    params, update = torch.ones(1, dtype=torch.bfloat16), torch.tensor([2.0**-8 + 2.0**-20])
    (new,) = optim.apply_updates([params], [update])  # 1 + 2^-8 is a tie: rounded first, the update would vanish
    assert new.item() == 1 + 2.0**-7


# Under transforms.

ALL = optim.chain(
    optim.clip(0.3),
    optim.clip_by_global_norm(0.5),
    optim.adamw(optim.warmup_cosine_decay_schedule(0.01, 0.2, 10, 40, 0.02), weight_decay=0.1, mask="weight"),
)


def test_update_changes_no_input():
    params, loss = problem()
    state, grads = ALL.init(params), grad(loss)(params)
    before = tree.map(torch.clone, (params, state, grads))
    ALL.update(grads, state, params)
    assert tree.equal((params, state, grads), before)


def test_update_traces_to_one_graph_without_powers():
    params, loss = problem()
    state = ALL.init(params)
    # closed-over data is real
    graph = make_fx(lambda *args: descend(ALL, loss, *args), tracing_mode="fake", _allow_non_fake_inputs=True)(
        params, state
    )
    assert not [node for node in graph.graph.nodes if node.op == "call_function" and "pow.Scalar" in str(node.target)]
    _, state = descend(ALL, loss, params, state)
    assert gap(graph(params, state), descend(ALL, loss, params, state)) == 0


@pytest.mark.parametrize("tx", [ALL, optim.flatten(ALL)], ids=["leaves", "flat"])
def test_update_compiles_whole(tx):
    params, loss = problem()
    compiled = torch.compile(lambda p, s: descend(tx, loss, p, s), fullgraph=True, backend="aot_eager")
    state = tx.init(params)
    found, expected = compiled(params, state), descend(tx, loss, params, state)
    assert gap(found, expected) < 1e-15


def test_update_batches_over_learning_rates():
    def final(learning_rate):
        params, loss = problem()
        tx = optim.chain(optim.clip_by_global_norm(0.5), optim.adam(learning_rate, eps=learning_rate / 10))
        state = tx.init(params)
        for _ in range(3):
            params, state = descend(tx, loss, params, state)
        return params

    rates = torch.tensor([0.01, 0.1], dtype=torch.float64)
    assert gap(vmap(final)(rates), tree.stack([final(rate) for rate in rates])) < EXACT


@pytest.mark.parametrize("tx", [ALL, optim.flatten(ALL)], ids=["leaves", "flat"])
def test_update_batches_over_an_ensemble(tx):
    params, loss = problem()
    members = [tree.scale(params, factor) for factor in (0.5, 1.0, 2.0)]
    ensemble = tree.stack(members)
    state = vmap(tx.init)(ensemble)
    found, state = vmap(lambda p, s: descend(tx, loss, p, s))(ensemble, state)
    expected = tree.stack([descend(tx, loss, p, tx.init(p))[0] for p in members])
    assert gap(found, expected) < EXACT
    assert all(x.is_contiguous() for x in tree.leaves(state))


def meta_loss(tx_of, steps=4):
    def final(hyper):
        params, loss = problem()
        tx = tx_of(hyper)
        state = tx.init(params)
        for _ in range(steps):
            params, state = descend(tx, loss, params, state)
        return loss(params)

    return final


@pytest.mark.parametrize(
    ("tx_of", "at"),
    [
        (lambda x: optim.adamw(x, weight_decay=0.1), 0.05),
        (lambda x: optim.adam(0.05, b1=x, b2=0.99), 0.7),
        (lambda x: optim.adam(0.05, b2=x), 0.9),
        (lambda x: optim.adamw(0.05, weight_decay=x), 0.2),
        (lambda x: optim.sgd(0.05, momentum=x, nesterov=True), 0.6),
        (lambda x: optim.chain(optim.clip_by_global_norm(x), optim.sgd(0.1)), 0.5),
        (lambda x: optim.adam(optim.warmup_cosine_decay_schedule(0.0, x, 2, 5)), 0.1),
    ],
    ids=["learning_rate", "b1", "b2", "weight_decay", "momentum", "max_norm", "peak"],
)
def test_gradient_through_training_equals_finite_difference(tx_of, at):
    final, x, h = meta_loss(tx_of), torch.tensor(at, dtype=torch.float64), 1e-5
    difference = (final(x + h) - final(x - h)) / (2 * h)
    assert grad(final)(x).item() == pytest.approx(difference.item(), rel=1e-6)  # h^2 and rounding / h


@pytest.mark.parametrize("tx", [optim.adam(0.1), optim.clip_by_global_norm(1.0)], ids=["adam", "clip"])
def test_derivatives_through_update_are_finite_at_zero_gradients(tx):
    def total(g):
        updates, _ = tx.update([g], tx.init([torch.zeros_like(g)]))
        return (updates[0] ** 2 + updates[0]).sum()

    zero = torch.zeros(3, dtype=torch.float64)
    assert grad(total)(zero).isfinite().all()
    assert hessian(total)(zero).isfinite().all()


def test_gradient_of_adam_at_zero_is_the_limit():
    def update(g):
        tx = optim.adam(1.0, eps=1e-2)
        return tx.update([g], tx.init([g]))[0][0]

    slope = grad(update)(torch.tensor(0.0, dtype=torch.float64))
    assert slope.item() == pytest.approx(-100.0, rel=1e-12)  # d/dg of -g / (|g| + eps)
