"""optim.clipping: optax in float64, bounds met exactly, derivatives at zero, precision, flat states, errors."""

import json
from pathlib import Path

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

from functorch_gen import jit, optim, random, tree

GOLDENS = json.loads((Path(__file__).parent / "goldens" / "schedules.json").read_text())
F64 = torch.float64


def leaves():
    """The leaves of goldens/make_schedules.py."""
    count = torch.arange(36, dtype=F64)
    rows = torch.tensor([[1.0], [0.01], [3.0]], dtype=F64)
    return {
        "bias": 0.7 * count[:3].cos(),
        "scalar": torch.tensor(1.3, dtype=F64),
        "column": count[:4].sin().reshape(4, 1),
        "matrix": (1.7 * count[:12]).cos().reshape(3, 4) * rows,
        "kernel": (2.3 * count).sin().reshape(3, 2, 3, 2),
        "zero": torch.zeros(2, 3, dtype=F64),
    }


def of_goldens(values):
    return {name: torch.tensor(x, dtype=F64) for name, x in values.items()}


def assert_close(found, expected, atol=1e-14):  # float64 rounding
    for path, x in tree.names(expected).items():
        torch.testing.assert_close(
            tree.names(found)[path], x, rtol=0, atol=atol, msg=lambda m, path=path: f"{path}: {m}"
        )


TRANSFORMS = {
    "clip_by_block_rms": optim.clip_by_block_rms(0.4),
    "adaptive_grad_clip": optim.adaptive_grad_clip(0.3, 0.01),
    "centralize": optim.centralize(),
}
every_transform = pytest.mark.parametrize("name", TRANSFORMS)


def apply(tx, grads, params=None):
    params = tree.map(lambda x: torch.cos(3 * x) - 0.9, leaves()) if params is None else params
    return tx.update(grads, tx.init(params), params)[0]


@every_transform
def test_transform_equals_optax(name):
    assert_close(apply(TRANSFORMS[name], leaves()), of_goldens(GOLDENS[name]))


def test_clip_by_block_rms_bounds_each_leaf_alone():
    found = apply(optim.clip_by_block_rms(0.4), leaves())
    for path, g in leaves().items():
        rms = g.square().mean().sqrt()
        torch.testing.assert_close(found[path].square().mean().sqrt(), rms.clamp(max=0.4))
        torch.testing.assert_close(found[path] * rms, g * rms.clamp(max=0.4))  # one direction


def test_adaptive_grad_clip_takes_norms_over_the_axes_it_is_given():
    g, p = leaves()["kernel"], leaves()["kernel"].cos()
    norms = [x.square().sum((2, 3), keepdim=True).sqrt() for x in (g, p)]
    expected = g * (0.3 * norms[1] / norms[0]).clamp(max=1)
    assert_close(apply(optim.adaptive_grad_clip(0.3, axis=(2, 3)), {"w": g}, {"w": p}), {"w": expected})


def test_adaptive_grad_clip_moves_a_unit_of_zeros_by_eps():
    g, p = torch.ones(2, 4, dtype=F64), torch.zeros(2, 4, dtype=F64)
    norm = apply(optim.adaptive_grad_clip(0.1, eps=0.5), [g], [p])[0].square().sum(1).sqrt()
    torch.testing.assert_close(norm, torch.full((2,), 0.05, dtype=F64))


def test_centralize_leaves_no_mean():
    found = apply(optim.centralize(), leaves())
    assert max(found[name].flatten(1).mean(1).abs().max() for name in ("matrix", "kernel", "column")) < 1e-16
    assert_close(found["bias"], leaves()["bias"])


@every_transform
def test_transform_has_derivatives_at_zero(name):
    tx, params = TRANSFORMS[name], {"w": torch.full((2, 3), 0.5, dtype=F64)}

    def total(g):
        return apply(tx, {"w": g}, params)["w"].sin().sum()

    zero = torch.zeros(2, 3, dtype=F64)
    assert grad(total)(zero).isfinite().all()
    assert hessian(total)(zero).isfinite().all()
    assert jvp(total, (zero,), (zero + 1,))[1].isfinite()


@pytest.mark.parametrize("name", ["clip_by_block_rms", "adaptive_grad_clip"])
def test_bound_has_the_slope_of_the_clipped_length(name):
    make = {"clip_by_block_rms": optim.clip_by_block_rms, "adaptive_grad_clip": optim.adaptive_grad_clip}[name]
    g, p = torch.tensor([[3.0, 4.0]], dtype=F64), torch.tensor([[0.6, 0.8]], dtype=F64)

    def length(bound):
        return apply(make(bound), [g], [p])[0].square().sum().sqrt()

    slope = grad(length)(torch.tensor(0.1, dtype=F64))
    assert slope.item() == pytest.approx(2**0.5 if name == "clip_by_block_rms" else 1.0, rel=1e-14)
    bounds = torch.tensor([0.1, 0.2], dtype=F64)
    torch.testing.assert_close(vmap(length)(bounds), slope * bounds)


@every_transform
def test_transform_keeps_dtypes_and_equals_float32_rounded(name):
    wide = tree.cast(leaves(), torch.float32)
    narrow = tree.cast(wide, torch.bfloat16)
    found = apply(TRANSFORMS[name], narrow, narrow)
    again = apply(TRANSFORMS[name], tree.cast(narrow, torch.float32), tree.cast(narrow, torch.float32))
    assert {x.dtype for x in tree.leaves(found)} == {torch.bfloat16}
    assert {x.dtype for x in tree.leaves(again)} == {torch.float32}
    for x, y in zip(tree.leaves(found), tree.leaves(again), strict=True):
        torch.testing.assert_close(x.float(), y, rtol=2**-7, atol=2**-7)  # roundings to 8 bits


def test_clipping_survives_extreme_gradients():
    huge = {"w": torch.full((2, 3), 1e30)}  # its square is no float32
    for tx in (optim.clip_by_block_rms(0.4), optim.adaptive_grad_clip(0.3)):
        found = apply(tx, huge, {"w": torch.ones(2, 3)})["w"]
        assert found.isfinite().all()
        assert (found > 0).all()
        assert apply(tx, {"w": torch.full((2, 3), torch.nan)}, {"w": torch.ones(2, 3)})["w"].isnan().all()
        assert apply(tx, {"w": torch.zeros(0, 3)}, {"w": torch.zeros(0, 3)})["w"].shape == (0, 3)


@every_transform
def test_transform_is_the_same_on_flat_gradients(name):
    tx, grads = TRANSFORMS[name], leaves()
    flat = optim.flatten(tx)
    expected, _ = tx.update(grads, tx.init(grads), grads)
    assert_close(flat.update(grads, flat.init(grads), grads)[0], expected)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="clip_by_block_rms: expected threshold > 0, got 0"):
        optim.clip_by_block_rms(0)
    with pytest.raises(ValueError, match="adaptive_grad_clip: expected clipping > 0, got -1"):
        optim.adaptive_grad_clip(-1)
    with pytest.raises(ValueError, match="adaptive_grad_clip: expected 0 <= eps, got -1"):
        optim.adaptive_grad_clip(0.1, -1)
    tx, grads = optim.adaptive_grad_clip(0.1), {"a": torch.ones(2)}
    with pytest.raises(ValueError, match=r"adaptive_grad_clip: expected update\(.*\), got params=None"):
        tx.update(grads, tx.init(grads))
    with pytest.raises(ValueError, match=r"adaptive_grad_clip: expected shape \(2,\) at 'a', got \(3,\)"):
        tx.update(grads, tx.init(grads), {"a": torch.ones(3)})


# Noise.


def noisy(tx, steps=3, grads=None, update=None):
    grads = leaves() if grads is None else grads
    state, found = tx.init(grads), []
    for _ in range(steps):
        updates, state = (update or tx.update)(grads, state)
        found.append(updates)
    return found


def test_add_noise_equals_optax():
    for found, expected in zip(noisy(optim.add_noise(0.3, 0.55, random.key(7))), GOLDENS["add_noise"], strict=True):
        assert_close(found, of_goldens(expected), atol=1e-12)  # jax's inverse error function


def test_add_noise_has_the_variance_that_it_is_told():
    grads = [torch.zeros(20_000, dtype=F64)]
    variances = [x[0].square().mean().item() for x in noisy(optim.add_noise(0.3, 1.5, random.key(0)), 4, grads)]
    assert variances == pytest.approx([0.3 / t**1.5 for t in (1, 2, 3, 4)], rel=0.05)  # 5 standard errors


def test_add_noise_is_the_same_in_a_flat_state_and_traced():
    tx = optim.add_noise(0.3, 0.55, random.key(7))
    expected = noisy(tx)
    assert_close(noisy(optim.flatten(tx)), expected)
    assert_close(noisy(tx, update=jit(tx.update, backend="aten")), expected)
    sums = [
        x.vectors["float64"].sum() for x in noisy(tx, grads=optim.Layout.of(leaves(), aligned=True).ravel(leaves()))
    ]
    torch.testing.assert_close(torch.stack(sums), torch.stack([tree.sum(x) for x in expected]))  # padding has none


def test_add_noise_batches_over_keys_and_has_derivatives():
    keys = random.split(random.key(3), 2)
    found = vmap(lambda key: noisy(optim.add_noise(0.3, 0.55, key)))(keys)
    assert_close(found, tree.stack([noisy(optim.add_noise(0.3, 0.55, key)) for key in keys]))

    def total(eta):
        return noisy(optim.add_noise(eta, 0.55, random.key(7)), 1, [torch.zeros(5, dtype=F64)])[0][0].sum()

    eta = torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(grad(total)(eta), total(eta) / (2 * eta))
    assert grad(total)(torch.zeros((), dtype=F64)).isfinite()


def test_add_noise_draws_in_float32_for_bfloat16():
    grads = {"w": torch.zeros(4000, dtype=torch.bfloat16)}
    updates = noisy(optim.add_noise(1.0, 0.5, random.key(0)), 1, grads)[0]["w"]
    assert updates.dtype == torch.bfloat16
    assert len(updates.unique()) > 500  # a bfloat16 draw has 128 values


def test_add_noise_keeps_its_own_key():
    key = random.key(7)
    state = optim.add_noise(0.3, 0.55, key).init(leaves())
    assert state.key.equal(key)
    assert state.key.data_ptr() != key.data_ptr()


def test_add_noise_rejects_bad_arguments():
    with pytest.raises(ValueError, match="add_noise: expected 0 <= eta, got -1"):
        optim.add_noise(-1, 0.5, random.key(0))
    with pytest.raises(ValueError, match=r"add_noise: key: expected shape \(two=2,\), got \(3,\)"):
        optim.add_noise(1, 0.5, torch.zeros(3, dtype=torch.int32))
