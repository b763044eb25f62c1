"""ema: the geometric sum, torch's multi-average function, the plain mean, precision, laws under transforms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import get_ema_multi_avg_fn

from functorch_gen import ema, tree


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


@pytest.mark.parametrize("tx", [ema.constant(0.9), ema.warmup(0.9)], ids=["constant", "warmup"])
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


@pytest.mark.parametrize("tx", [ema.constant(0.9), ema.warmup(0.9)], ids=["constant", "warmup"])
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


def test_update_traces_for_all_steps_at_once():
    values, tx = series(8), ema.warmup(0.5)
    state = tx.init(values[0])
    graph = make_fx(tx.update, tracing_mode="fake")(values[1], state)
    for params in values[1:]:
        found, state = graph(params, state)
    assert close(found, run(tx, values)[0])


def test_update_compiles_whole():
    values, tx = series(3), ema.warmup(0.5)
    compiled = torch.compile(tx.update, fullgraph=True, backend="aot_eager")
    state = tx.init(values[0])
    for params in values[1:]:
        found, state = compiled(params, state)
    assert close(found, run(tx, values)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ema.constant(1.5), "ema.constant: expected 0 <= decay <= 1, got 1.5"),
        (lambda: ema.warmup(-0.1), "ema.warmup: expected 0 <= decay <= 1, got -0.1"),
        (lambda: ema.warmup(0.9, offset=0.5), "ema.warmup: expected 1 <= offset, got 0.5"),
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
