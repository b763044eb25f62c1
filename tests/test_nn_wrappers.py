"""Layers around layers: weight normalisation, low-rank adaptation, residual connections; and minibatch statistics."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations
from zoo_case import Draw

from functorch_gen import nn, numerics, optim, random, tree
from functorch_gen.transforms import grad, vmap


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# Weight normalisation.

NORMED = [
    (nn.Linear(3, 2), torch.nn.Linear(3, 2), (4, 3)),
    (nn.Conv2d(2, 4, 3, groups=2), torch.nn.Conv2d(2, 4, 3, groups=2), (2, 2, 4, 4)),
    (nn.ConvTranspose1d(2, 3, 3), torch.nn.ConvTranspose1d(2, 3, 3), (2, 2, 4)),
]


@pytest.mark.parametrize("dim", [0, 1, -1, None])
@pytest.mark.parametrize(("layer", "module", "shape"), NORMED, ids=[type(row[0]).__name__ for row in NORMED])
def test_weight_norm_equals_torch(layer: Any, module: Any, shape: tuple[int, ...], dim: int | None) -> None:
    ours, draw = nn.WeightNorm(layer, dim=dim), Draw(0)
    theirs = parametrizations.weight_norm(module.__class__(**sizes(module)).double(), dim=dim)
    params = draw.like(ours.init(random.key(0)))
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    theirs.load_state_dict({names.get(name, name): p for name, p in params.items()}, strict=True)
    x = draw(*shape)
    y = theirs(x)
    wanted = torch.autograd.grad(y.sin().sum(), list(theirs.parameters()))
    found = grad(lambda p: ours(p, x).sin().sum())(params)
    assert_close(ours(params, x), y.detach())
    assert_close(
        {names.get(name, name): g for name, g in found.items()}, dict(zip(dict(theirs.named_parameters()), wanted))
    )


def sizes(module: Any) -> dict[str, Any]:
    if isinstance(module, torch.nn.Linear):
        return {"in_features": 3, "out_features": 2}
    return {name: getattr(module, name) for name in ("in_channels", "out_channels", "kernel_size", "groups")}


def test_weight_norm_starts_as_its_layer_also_at_zero_weight() -> None:
    x = Draw(0)(4, 3)
    for gain in (1.0, 0.0):
        layer = nn.Linear(3, 2, gain=gain)
        normed = nn.WeightNorm(layer)
        params, plain = tree.cast((normed.init(random.key(0)), layer.init(random.key(0))), torch.float64)
        assert_close(normed(params, x), layer(plain, x), 1e-6)
        assert_close(normed.merge(params), plain, 1e-6)
        assert tree.all_finite(grad(lambda p, f=normed: f(p, x).sum())(params))


def test_weight_norm_names_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="WeightNorm: expected a layer without state, got BatchNorm1d"):
        nn.WeightNorm(nn.BatchNorm1d(2))
    with pytest.raises(KeyError, match="WeightNorm: expected a parameter 'kernel', got only"):
        nn.WeightNorm(nn.Linear(2, 2), "kernel").init(random.key(0))
    with pytest.raises(ValueError, match="WeightNorm: expected 0 <= dim < 2 or None, got 2"):
        nn.WeightNorm(nn.Linear(2, 2), dim=2).init(random.key(0))


# Low-rank adaptation.


def test_lora_of_a_linear_layer_is_the_formula() -> None:
    layer, draw = nn.LoRA(nn.Linear(5, 4), rank=2, alpha=3.0), Draw(0)
    params, x = draw.like(layer.init(random.key(0))), draw(6, 5)
    expected = F.linear(x, **params["base"]) + 1.5 * (x @ params["lora_a"].T) @ params["lora_b"].T
    assert_close(layer(params, x), expected)


def test_lora_of_a_convolution_is_a_convolution_and_one_of_kernel_one() -> None:
    layer, draw = nn.LoRA(nn.Conv2d(2, 4, 3, padding=1, bias=False), rank=2), Draw(0)
    params, x = draw.like(layer.init(random.key(0))), draw(2, 2, 4, 5)
    low = F.conv2d(x, params["lora_a"].reshape(2, 2, 3, 3), padding=1)
    expected = F.conv2d(x, params["base"]["weight"], padding=1) + F.conv2d(low, params["lora_b"][:, :, None, None]) / 2
    assert_close(layer(params, x), expected)


def test_lora_of_an_embedding_is_two_lookups() -> None:
    layer, draw, x = nn.LoRA(nn.Embedding(7, 4), rank=2), Draw(0), torch.tensor([[0, 3], [6, 3]])
    params = draw.like(layer.init(random.key(0)))
    assert_close(layer(params, x), params["base"]["weight"][x] + params["lora_b"][x] @ params["lora_a"] / 2)


def test_lora_starts_as_its_base_and_merges_into_it() -> None:
    base, draw = nn.Linear(5, 4), Draw(0)
    trained, layer, x = draw.like(base.init(random.key(0))), nn.LoRA(nn.Linear(5, 4), 2), draw(3, 5)
    params = layer.init(random.key(1), trained)
    assert torch.equal(layer(params, x), base(trained, x))
    params = {**params, "lora_b": draw(4, 2)}
    assert torch.equal(layer(params, x), base(layer.merge(params), x))


def test_lora_trains_only_the_adapter_of_a_network() -> None:
    """By ``tree.partition``: a target that differs from the base by a matrix of rank one is learnt; the base stays."""
    net = nn.Sequential(nn.LoRA(nn.Linear(4, 3), 1), nn.Tanh())
    draw = Draw(0)
    params = tree.cast(net.init(random.key(0)), torch.float64)
    weight = params["0"]["base"]["weight"] + torch.outer(draw(3), draw(4))
    x = draw(64, 4)
    y = torch.tanh(F.linear(x, weight, params["0"]["base"]["bias"]))
    adapter, frozen = tree.partition(params, "*lora_?")
    tx = optim.adam(0.05)
    state = tx.init(adapter)
    gradient = grad(lambda adapter: (net(tree.merge(adapter, frozen), x) - y).square().mean())
    for _ in range(300):
        updates, state = tx.update(gradient(adapter), state)
        adapter = optim.apply_updates(adapter, updates)
    assert sorted(tree.names(adapter)) == ["0.lora_a", "0.lora_b"]
    assert_close(net.layers[0].merge(tree.merge(adapter, frozen)["0"])["weight"], weight, 1e-2)  # 300 steps of Adam


def test_lora_names_what_is_wrong() -> None:
    with pytest.raises(TypeError, match="LoRA: expected a layer without state, got BatchNorm1d"):
        nn.LoRA(nn.BatchNorm1d(2), 1)
    with pytest.raises(ValueError, match="LoRA: expected rank >= 1, got 0"):
        nn.LoRA(nn.Linear(2, 2), 0)
    with pytest.raises(KeyError, match="LoRA: expected a parameter 'kernel', got only"):
        nn.LoRA(nn.Linear(2, 2), 1, name="kernel").init(random.key(0))
    with pytest.raises(ValueError, match=r"LoRA: expected 'bias' with at least two axes, got \(2,\)"):
        nn.LoRA(nn.Linear(2, 2), 1, name="bias").init(random.key(0))
    with pytest.raises(KeyError, match="LoRA: expected a parameter 'lora_a', got only"):
        nn.LoRA(nn.Linear(2, 2), 1)({"base": {}}, torch.ones(2))


# Residual connections.


def test_residual_is_the_scaled_sum() -> None:
    layer, shortcut, draw = nn.Conv1d(2, 3, 3, 2, 1), nn.Conv1d(2, 3, 1, 2), Draw(0)
    block = nn.Residual(layer, 0.5, shortcut)
    params, x = draw.like(block.init(random.key(0))), draw(2, 2, 5)
    assert_close(block(params, x), shortcut(params["shortcut"], x) + 0.5 * layer(params["layer"], x))
    assert_close(nn.Residual(nn.Tanh())({}, x), x + torch.tanh(x))


def test_residual_passes_state_keys_and_inputs_on() -> None:
    x = Draw(0)(4, 3)
    block = nn.Residual(nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)))
    params, state = block.init(random.key(0)), tree.cast(block.init_state(), torch.float64)
    plain, new = block(params, state, x, train=True)
    drawn, again = block(params, state, x, train=True, key=random.key(1))
    branch = plain - x
    assert set(((drawn - x) / branch).round(decimals=9).flatten().tolist()) == {0.0, 2.0}
    assert_close(new["layer"]["0"]["running_mean"], 0.1 * x.mean(0), 1e-7)
    assert tree.equal(new, again)
    attention = nn.MultiHeadAttention(4, 2)
    block, q, kv = nn.Residual(attention), Draw(1)(2, 5, 4), Draw(2)(2, 3, 4)
    params = tree.cast(block.init(random.key(0)), torch.float64)
    assert_close(block(params, q, kv), q + attention(params["layer"], q, kv))


def test_residual_nests_and_knows_whether_it_has_state_and_draws() -> None:
    assert not nn.is_stateful(nn.Residual(nn.Linear(2, 2)))
    assert nn.is_stateful(nn.Residual(nn.Residual(nn.BatchNorm1d(2))))
    assert nn.is_stateful(nn.Residual(nn.Linear(2, 2), shortcut=nn.BatchNorm1d(2)))
    assert nn.draws(nn.Residual(nn.DropPath(0.1)))
    assert not nn.draws(nn.Residual(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="Residual: expected layer to be a layer of this package, got 3"):
        nn.Residual(3)  # pyright: ignore[reportArgumentType]


# Minibatch standard deviation.


@pytest.mark.parametrize(("b", "group", "features"), [(8, 4, 1), (6, 2, 3), (4, None, 1), (3, 4, 2), (4, 1, 1)])
def test_minibatch_stddev_is_a_loop(b: int, group: int | None, features: int) -> None:
    x = Draw(0)(b, 6, 2, 3)
    y = nn.MinibatchStdDev(group, features)({}, x)
    g = b if group is None else min(group, b)
    share = 6 // features
    assert torch.equal(y[:, :6], x)
    for i in range(b):
        members = x[i % (b // g) :: b // g]
        for f in range(features):
            deviations = [
                math.sqrt(members[:, c, h, w].var(correction=0).item() + 1e-8)
                for c in range(f * share, (f + 1) * share)
                for h in range(2)
                for w in range(3)
            ]
            assert_close(y[i, 6 + f], torch.full((2, 3), sum(deviations) / len(deviations), dtype=torch.float64))


def test_minibatch_stddev_takes_no_examples_and_vectors() -> None:
    assert nn.MinibatchStdDev()({}, torch.ones(0, 3, 2, 2)).shape == (0, 4, 2, 2)
    assert nn.MinibatchStdDev(None, 3)({}, torch.ones(5, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_minibatch_stddev_of_equal_examples_has_a_finite_gradient() -> None:
    gradient = grad(lambda x: nn.MinibatchStdDev()({}, x).sum())(torch.ones(4, 2))
    assert torch.equal(gradient, torch.ones(4, 2))


def test_minibatch_stddev_refuses_uneven_groups() -> None:
    with pytest.raises(
        ValueError, match="MinibatchStdDev: x: expected batch divisible by 4, channels by 1, got 6 and 2"
    ):
        nn.MinibatchStdDev()({}, torch.ones(6, 2))


# Dropout of channels, paths, and to SELU's floor.


@pytest.mark.parametrize(
    ("layer", "shape", "dropped"),
    [
        (nn.Dropout1d(0.3), (50, 40, 3), (2,)),
        (nn.Dropout2d(0.3), (50, 40, 2, 2), (2, 3)),
        (nn.Dropout3d(0.3), (50, 40, 2, 1, 2), (2, 3, 4)),
        (nn.DropPath(0.3), (2000, 3, 2), (1, 2)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dropout_of_channels_and_paths_drops_them_whole(layer: Any, shape: tuple[int, ...], dropped: Any) -> None:
    """2,000 draws: five standard errors of the fraction."""
    x = torch.ones(shape, dtype=torch.float64)
    y = layer({}, x, key=random.key(0))
    low, high = y.amin(dropped), y.amax(dropped)
    assert torch.equal(low, high)
    assert set(low.flatten().tolist()) == {0.0, 1 / 0.7}
    assert abs((low != 0).double().mean().item() - 0.7) < 5 * math.sqrt(0.3 * 0.7 / 2000)
    assert layer({}, x) is x


def test_dropout_of_channels_checks_the_shape_without_a_key_too() -> None:
    with pytest.raises(ValueError, match=r"Dropout2d: x: expected shape \(\.\.\., c, h, w\), got \(2, 3\)"):
        nn.Dropout2d()({}, torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"DropPath: expected 0 <= p <= 1, got 1\.5"):
        nn.DropPath(1.5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_alpha_dropout_keeps_mean_and_variance(p: float) -> None:
    """Of 100,000 normals: five standard errors, of the variance with the fourth moment of the mixture below 4."""
    x = random.normal(random.key(0), (100_000,), torch.float64)
    y = nn.AlphaDropout(p)({}, x, key=random.key(1))
    assert abs(y.mean().item()) < 5 / math.sqrt(100_000)
    assert abs(y.var().item() - 1) < 5 * math.sqrt(3 / 100_000)
    assert torch.equal(nn.AlphaDropout(1.0)({}, x, key=random.key(1)), torch.zeros_like(x))


def test_alpha_dropout_equals_torch_on_the_same_mask() -> None:
    """torch's output tells its mask: what is dropped has one value."""
    x = Draw(0)(2000)
    torch.manual_seed(0)
    theirs = F.alpha_dropout(x, 0.3, training=True)
    dropped = theirs == theirs.mode().values
    layer = nn.AlphaDropout(0.3)
    ours = layer._drop(x, ~dropped)
    assert 400 < dropped.sum() < 800
    assert_close(ours, theirs)


def test_feature_alpha_dropout_drops_whole_channels_as_torch_does() -> None:
    """torch's output tells its mask: what is dropped has one value."""
    x = Draw(0)(40, 50, 2)
    torch.manual_seed(0)
    theirs = F.feature_alpha_dropout(x, 0.3, training=True)
    dropped = theirs[..., :1] == theirs[..., 1:]
    layer = nn.FeatureAlphaDropout(0.3)
    assert 400 < dropped.sum() < 800
    assert_close(layer._drop(x, ~dropped), theirs)
    y = layer({}, x, key=random.key(0))
    changed = y[..., 0] == y[..., 1]
    assert 400 < changed.sum() < 800
    with pytest.raises(ValueError, match=r"FeatureAlphaDropout: x: expected shape \(b, c\), got \(3,\)"):
        layer({}, torch.ones(3))


# Others.


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_convolution_to_a_size_equals_torch(dims: int) -> None:
    draw, sizes = Draw(0), (2, 3, 3, 3, 1)
    layer, module = getattr(nn, f"ConvTranspose{dims}d")(*sizes), getattr(torch.nn, f"ConvTranspose{dims}d")(*sizes)
    params, x = draw.like(layer.init(random.key(0))), draw(2, 2, *(4, 3, 2)[:dims])
    module.double().load_state_dict(params)
    smallest = [(n - 1) * 3 + 1 for n in x.shape[2:]]
    for extra in range(3):
        size = tuple(n + (extra + i) % 3 for i, n in enumerate(smallest))
        y = layer(params, x, output_size=size)
        assert y.shape[2:] == size
        assert_close(y, module(x, output_size=size).detach())
    for wrong in ([n + 3 for n in smallest], [n - 1 for n in smallest], [*smallest, 1]):
        with pytest.raises(ValueError, match=f"ConvTranspose{dims}d: expected output_size from"):
            layer(params, x, output_size=wrong)


def test_bilinear_starts_as_torchs() -> None:
    params = nn.Bilinear(9, 3, 400).init(random.key(0))
    bound = 1 / 3
    assert all(0.95 * bound < p.abs().max() < 1.0001 * bound for p in params.values())
    assert abs(params["weight"].std().item() - bound / math.sqrt(3)) < 0.01


def test_weight_norm_members_of_an_ensemble() -> None:
    layer = nn.WeightNorm(nn.Linear(3, 2, bias=False))
    params = vmap(layer.init)(random.split(random.key(0), 4))
    assert_close(params["weight_g"], numerics.norm(params["weight_v"], -1, keepdim=True), 1e-6)
