"""Perceptrons: torch.nn's modules in a row, with norms and gates."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import nn, random, tree
from functorch_gen.typing import Params


def draw(*shape: int, seed: int = 0) -> Tensor:
    return random.normal(random.key(seed), shape, torch.float64)


def drawn(layer: Any) -> Params:
    named = tree.names(layer.init(random.key(0)))
    return tree.from_names({name: draw(*x.shape, seed=i) for i, (name, x) in enumerate(named.items())})


def linear(params: Params, x: Tensor) -> Tensor:
    return x @ params["weight"].T + params.get("bias", 0.0)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("norm", "module"),
    [(nn.LayerNorm, torch.nn.LayerNorm), (nn.RMSNorm, torch.nn.RMSNorm)],
    ids=["LayerNorm", "RMSNorm"],
)
def test_mlp_normalises_before_each_activation(norm: Any, module: Any) -> None:
    net = nn.MLP(3, (5, 4), 2, activation=torch.tanh, norm=norm)
    params = drawn(net)
    layers = [torch.nn.Linear(3, 5), module(5), torch.nn.Tanh(), torch.nn.Linear(5, 4), module(4), torch.nn.Tanh()]
    torchs = torch.nn.Sequential(*layers, torch.nn.Linear(4, 2)).double()
    places = {"0": "0", "norm0": "1", "2": "3", "norm2": "4", "4": "6"}
    torchs.load_state_dict(tree.names({places[name]: part for name, part in params.items()}))
    x = draw(7, 3)
    assert_close(net(params, x), torchs(x).detach())


def test_mlp_with_a_norm_draws_its_linear_layers_as_without() -> None:
    plain, normed = (nn.MLP(3, (4,), 2, norm=norm).init(random.key(0)) for norm in (None, nn.LayerNorm))
    assert list(plain) == ["0", "2"]
    assert sorted(normed) == ["0", "2", "norm0"]
    assert tree.equal({name: normed[name] for name in plain}, plain)


def test_mlp_of_any_depth_is_hashable_and_drops_only_with_a_key() -> None:
    net = nn.MLP(3, (4,) * 6, 2, dropout=0.5, norm=nn.RMSNorm)
    assert hash(net) == hash(nn.MLP(3, [4] * 6, 2, dropout=0.5, norm=nn.RMSNorm))
    params, x = drawn(net), draw(5, 3)
    assert torch.equal(net(params, x), nn.MLP(3, (4,) * 6, 2, norm=nn.RMSNorm)(params, x))
    assert not torch.equal(net(params, x, key=random.key(0)), net(params, x))


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, 3], ids=["stateful", "number"])
def test_mlp_refuses_a_norm_with_state(norm: Any) -> None:
    with pytest.raises(TypeError, match=r"MLP: expected norm to make a layer without state, got .*; use Sequential"):
        nn.MLP(3, (4,), 2, norm=norm)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, F.relu, torch.sigmoid], ids=["swiglu", "geglu", "reglu", "glu"])
def test_gated_mlp_is_the_formula(activation: Any, bias: bool) -> None:
    """Shazeer 2020, eq. 6, with the biases of eq. 5 where there are any."""
    layer = nn.GatedMLP(3, 5, 2, activation=activation, bias=bias)
    params, x = drawn(layer), draw(2, 4, 3)
    hidden = activation(linear(params["gate"], x)) * linear(params["up"], x)
    assert_close(layer(params, x), linear(params["down"], hidden))
    assert ("bias" in params["gate"]) is bias


def test_gated_mlp_of_sigmoid_is_torchs_glu() -> None:
    """F.glu takes both halves from one product, the gate second."""
    layer = nn.GatedMLP(3, 5, 5, activation=torch.sigmoid)
    params, x = drawn(layer), draw(4, 3)
    both = torch.cat([linear(params["up"], x), linear(params["gate"], x)], -1)
    assert_close(layer(params, x), linear(params["down"], F.glu(both)))


def test_gated_mlp_starts_as_the_zero_map_with_zero_gain_and_drops_only_with_a_key() -> None:
    x = draw(5, 3).float()
    zero = nn.GatedMLP(3, 8, 2, gain=0.0)
    assert torch.equal(zero(zero.init(random.key(0)), x), torch.zeros(5, 2))
    layer = nn.GatedMLP(3, 8, 2, dropout=0.5)
    params = layer.init(random.key(0))
    assert torch.equal(layer(params, x), nn.GatedMLP(3, 8, 2)(params, x))
    assert not torch.equal(layer(params, x, key=random.key(0)), layer(params, x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden_features": 0}, ValueError, "expected hidden_features >= 1, got 0"),
        ({"hidden_features": 2, "dropout": 1.5}, ValueError, "expected 0 <= dropout <= 1, got 1.5"),
        ({"hidden_features": 2, "activation": "silu"}, TypeError, "expected activation to be a function, got 'silu'"),
    ],
    ids=["width", "dropout", "activation"],
)
def test_gated_mlp_names_what_it_expects(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"GatedMLP: {message}"):
        nn.GatedMLP(in_features=3, out_features=2, **options)
