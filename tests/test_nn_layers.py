"""What single layers do beyond ``torch.nn``: features, dropout, sequences, and their answer to bad input."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from zoo_case import Draw

from functorch_gen import nn, random, tree

# Features.


def test_sinusoidal_features_equal_the_formula() -> None:
    t = [0.0, 0.1, 0.75, 1.0]
    y = nn.SinusoidalFeatures(6, max_period=100.0, scale=10.0)({}, torch.tensor(t, dtype=torch.float64))
    angles = [[10 * ti * 100.0 ** (-i / 3) for i in range(3)] for ti in t]
    expected = [[math.cos(a) for a in row] + [math.sin(a) for a in row] for row in angles]
    torch.testing.assert_close(y, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_sinusoidal_features_take_integer_positions() -> None:
    positions = torch.arange(5)
    y = nn.SinusoidalFeatures(4)({}, positions)
    torch.testing.assert_close(y, nn.SinusoidalFeatures(4)({}, positions.float()), rtol=0, atol=0)


def test_fourier_features_have_the_gaussian_kernel_as_inner_product() -> None:
    """E of the mean of cos cos + sin sin is exp(-2 pi^2 std^2 |x - y|^2) (Bochner; Rahimi and Recht 2007).

    The mean of 20,000 cosines has a standard error below 1 / sqrt(20,000) = 0.007.
    """
    layer = nn.FourierFeatures(2, 40_000, std=0.3)
    x, y = torch.tensor([0.2, -0.1], dtype=torch.float64), torch.tensor([0.5, 0.3], dtype=torch.float64)
    kernel = (layer({}, x) * layer({}, y)).sum() / 20_000
    expected = math.exp(-2 * math.pi**2 * 0.3**2 * (0.3**2 + 0.4**2))
    assert abs(kernel.item() - expected) < 0.03


def test_fourier_features_have_the_same_frequencies_in_every_precision() -> None:
    layer, x = nn.FourierFeatures(1, 8, std=4.0), torch.linspace(0, 1, 5)[:, None]
    torch.testing.assert_close(layer({}, x.double()).float(), layer({}, x), rtol=0, atol=1e-5)


def test_fourier_features_differ_by_seed() -> None:
    x = torch.ones(1)
    assert not torch.equal(nn.FourierFeatures(1, 4)({}, x), nn.FourierFeatures(1, 4, seed=1)({}, x))


def test_embedding_padding_row_has_no_gradient_in_either_mode() -> None:
    layer, x = nn.Embedding(4, 2, padding_idx=1), torch.tensor([0, 1, 1, 3])
    weight = random.normal(random.key(0), (4, 2), torch.float64)

    def fun(weight: Tensor) -> Tensor:
        return layer({"weight": weight}, x)

    gradient = grad(lambda w: fun(w).sum())(weight)
    tangent = jvp(fun, (weight,), (torch.ones_like(weight),))[1]
    assert gradient.tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]
    assert tangent.tolist() == [[1, 1], [0, 0], [0, 0], [1, 1]]


# Dropout.


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_elements_with_probability_one_minus_p(p: float) -> None:
    """100,000 elements: five standard errors of the fraction; those kept are scaled by 1 / (1 - p)."""
    n = 100_000
    y = nn.Dropout(p)({}, torch.full((n,), 3.0), key=random.key(0))
    kept = y != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 3 / (1 - p)))


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_dropout_without_key_is_the_identity(p: float) -> None:
    x = torch.tensor([1.0, math.nan])
    assert nn.Dropout(p)({}, x) is x


def test_dropout_at_its_ends_keeps_all_or_nothing() -> None:
    x, key = torch.ones(5), random.key(0)
    assert torch.equal(nn.Dropout(0.0)({}, x, key=key), x)
    assert torch.equal(nn.Dropout(1.0)({}, x, key=key), torch.zeros(5))


def test_dropout_under_vmap_over_keys_equals_a_loop() -> None:
    keys, x = random.split(random.key(0), 4), torch.ones(4, 6)
    batched = vmap(lambda x, key: nn.Dropout(0.5)({}, x, key=key))(x, keys)
    assert torch.equal(batched, torch.stack([nn.Dropout(0.5)({}, *xk[:1], key=xk[1]) for xk in zip(x, keys)]))


def test_dropout_gradient_is_the_mask_that_was_drawn() -> None:
    x, key = torch.ones(50), random.key(1)
    gradient = grad(lambda x: nn.Dropout(0.4)({}, x, key=key).sum())(x)
    assert torch.equal(gradient, nn.Dropout(0.4)({}, x, key=key))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dropout_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert nn.Dropout(0.5)({}, torch.ones(3, dtype=dtype), key=random.key(0)).dtype == dtype


# Sequences.


def test_sequential_equals_torch_by_state_dict() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), torch.tanh, nn.GroupNorm(1, 2), nn.Sequential(nn.Conv2d(2, 1, 1), F.relu))
    params = tree.cast(net.init(random.key(0)), torch.float64)
    inner = torch.nn.Sequential(torch.nn.Conv2d(2, 1, 1), torch.nn.ReLU())
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.GroupNorm(1, 2), inner).double()
    module.load_state_dict(tree.names(params))
    x = random.normal(random.key(1), (2, 1, 5, 5), torch.float64)
    torch.testing.assert_close(net(params, x), module(x).detach(), rtol=1e-12, atol=1e-12)


def test_mlp_equals_torch_by_state_dict() -> None:
    net = nn.MLP(3, [5, 4], 2, activation=F.gelu)
    params = tree.cast(net.init(random.key(0)), torch.float64)
    linears = [torch.nn.Linear(3, 5), torch.nn.GELU(), torch.nn.Linear(5, 4), torch.nn.GELU(), torch.nn.Linear(4, 2)]
    module = torch.nn.Sequential(*linears).double()
    module.load_state_dict(tree.names(params))
    x = random.normal(random.key(1), (6, 3), torch.float64)
    torch.testing.assert_close(net(params, x), module(x).detach(), rtol=1e-12, atol=1e-12)


def test_mlp_without_hidden_layers_is_linear() -> None:
    net, x = nn.MLP(3, (), 2), random.normal(random.key(1), (6, 3))
    params = net.init(random.key(0))
    assert torch.equal(net(params, x), F.linear(x, **params["0"]))


def test_sequential_draws_a_new_mask_for_each_dropout() -> None:
    net, x, key = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)), torch.ones(4000), random.key(0)
    y = net({}, x, key=key)
    assert set(y.tolist()) == {0.0, 4.0}
    assert abs((y != 0).double().mean().item() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4000)


def test_mlp_draws_a_new_mask_after_each_activation() -> None:
    """Identity weights: two dropouts of one half leave a quarter of the units."""
    net = nn.MLP(4000, (4000, 4000), 4000, activation=lambda x: x, bias=False, dropout=0.5)
    params = {name: {"weight": torch.eye(4000)} for name in ("0", "2", "4")}
    y = net(params, torch.ones(4000), key=random.key(0))
    assert set(y.tolist()) == {0.0, 4.0}
    assert torch.equal(net(params, torch.ones(4000)), torch.ones(4000))


def test_sequential_draws_only_when_a_member_does() -> None:
    members = [nn.Linear(2, 2), F.relu]
    assert not nn.draws(nn.Sequential(*members))
    assert nn.draws(nn.Sequential(*members, nn.Sequential(nn.Dropout(0.1))))


# Bad input.


BAD_SIZES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.Linear(0, 2), ValueError, "Linear: expected in_features >= 1, got 0"),
    (lambda: nn.Linear(2, 2.5), TypeError, "Linear: expected out_features to be an int"),
    (lambda: nn.Linear(2, 2, gain=-1.0), ValueError, "Linear: expected gain >= 0, got -1.0"),
    (lambda: nn.Conv2d(3, 4, 3, groups=2), ValueError, "Conv2d: expected in_channels divisible by groups=2, got 3"),
    (lambda: nn.Conv1d(4, 3, 3, groups=2), ValueError, "Conv1d: expected out_channels divisible by groups=2, got 3"),
    (lambda: nn.Conv2d(3, 4, (3, 3, 3)), ValueError, "Conv2d: expected kernel_size with 2 sizes, got (3, 3, 3)"),
    (lambda: nn.Conv2d(3, 4, 3, stride=0), ValueError, "Conv2d: expected stride >= 1, got 0"),
    (lambda: nn.Conv2d(3, 4, 3, padding=-1), ValueError, "Conv2d: expected padding >= 0, got -1"),
    (lambda: nn.Conv2d(3, 4, 3, padding="full"), ValueError, "Conv2d: expected padding to be one of 'same', 'valid'"),
    (lambda: nn.Conv2d(3, 4, 3, 2, "same"), ValueError, "Conv2d: expected stride=1 with padding='same', got 2"),
    (lambda: nn.Conv3d(3, 4, 3, padding_mode="mirror"), ValueError, "Conv3d: expected padding_mode to be one of"),
    (
        lambda: nn.ConvTranspose2d(3, 4, 3, 2, output_padding=2),
        ValueError,
        "ConvTranspose2d: expected output_padding < max(stride, dilation) = 2, got 2",
    ),
    (lambda: nn.ConvTranspose1d(3, 4, 3, padding_mode="reflect"), ValueError, "expected padding_mode to be one of 'ze"),
    (lambda: nn.GroupNorm(3, 4), ValueError, "GroupNorm: expected num_channels divisible by num_groups=3, got 4"),
    (lambda: nn.GroupNorm(2, 4, eps=-1.0), ValueError, "GroupNorm: expected eps >= 0, got -1.0"),
    (lambda: nn.LayerNorm(()), ValueError, "LayerNorm: expected normalized_shape with at least 1 sizes, got ()"),
    (lambda: nn.RMSNorm(0), ValueError, "RMSNorm: expected normalized_shape >= 1, got 0"),
    (lambda: nn.Embedding(4, 2, 4), ValueError, "Embedding: expected -4 <= padding_idx < 4, got 4"),
    (lambda: nn.SinusoidalFeatures(5), ValueError, "SinusoidalFeatures: expected features to be even, got 5"),
    (lambda: nn.FourierFeatures(1, 4, std=0.0), ValueError, "FourierFeatures: expected std > 0, got 0.0"),
    (lambda: nn.Dropout(1.5), ValueError, "Dropout: expected 0 <= p <= 1, got 1.5"),
    (lambda: nn.MultiHeadAttention(6, 4), ValueError, "expected embed_dim divisible by num_heads=4, got 6"),
    (lambda: nn.MultiHeadAttention(6, 3, -0.1), ValueError, "expected 0 <= dropout <= 1, got -0.1"),
    (lambda: nn.MLP(3, 4, 2), TypeError, "MLP: expected hidden_features to be a tuple of ints, got 4"),
    (lambda: nn.MLP(3, (4, 0), 2), ValueError, "MLP: expected hidden_features >= 1, got (4, 0)"),
    (lambda: nn.MLP(3, (4,), 2, activation="relu"), TypeError, "MLP: expected activation to be a function, got 'relu'"),
    (lambda: nn.MLP(3, (4,), 2, dropout=2.0), ValueError, "MLP: expected 0 <= dropout <= 1, got 2.0"),
    (
        lambda: nn.Sequential(nn.Identity(), 3),
        TypeError,
        "expected a layer of this package or a function at 1, got 3",
    ),
    (lambda: nn.Sequential(nn.Linear), TypeError, "Sequential: expected a layer of this package or a function at 0"),
    (lambda: nn.Sequential(torch.nn.ReLU()), TypeError, "Sequential: expected a layer of this package or a function"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD_SIZES, ids=[message for *_, message in BAD_SIZES])
def test_layer_refuses_bad_sizes(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


BAD_INPUTS: list[tuple[Any, Tensor, type[Exception], str]] = [
    (nn.Linear(3, 2), torch.ones(2, 4), ValueError, "Linear: x: expected shape (..., in_features=3), got (2, 4)"),
    (nn.Conv2d(3, 2, 1), torch.ones(2, 1, 4, 4), ValueError, "Conv2d: x: expected shape (..., c=3, h, w), got (2, 1"),
    (nn.Conv2d(3, 2, 1), torch.ones(3, 4), ValueError, "Conv2d: x: expected shape (..., c=3, h, w), got (3, 4)"),
    (nn.ConvTranspose1d(3, 2, 1), torch.ones(2, 4), ValueError, "ConvTranspose1d: x: expected shape (..., c=3, l)"),
    (nn.GroupNorm(1, 3), torch.ones(2, 4, 5), ValueError, "GroupNorm: x: expected shape (b, c=3, n2), got (2, 4, 5)"),
    (nn.GroupNorm(1, 3), torch.ones(3), ValueError, "GroupNorm: x: expected shape (b, c=3), got (3,)"),
    (nn.LayerNorm((2, 3)), torch.ones(3, 3), ValueError, "LayerNorm: x: expected shape (..., 2, 3), got (3, 3)"),
    (nn.RMSNorm(3), torch.ones(2, 4), ValueError, "RMSNorm: x: expected shape (..., 3), got (2, 4)"),
    (
        nn.Embedding(3, 2),
        torch.ones(2),
        TypeError,
        "Embedding: x: expected an int64 or int32 tensor, got",
    ),
    (nn.FourierFeatures(2, 4), torch.ones(3), ValueError, "FourierFeatures: x: expected shape (..., in_features=2)"),
    (nn.MultiHeadAttention(4, 2), torch.ones(5, 3), ValueError, "MultiHeadAttention: x: expected shape (..., n, e=4)"),
    (
        nn.LayerNorm(2),
        torch.ones(2).long(),
        TypeError,
        "LayerNorm: x: expected a floating-point tensor, got torch.int64",
    ),
    (nn.RMSNorm(2), torch.ones(2).long(), TypeError, "RMSNorm: x: expected a floating-point tensor, got torch.int64"),
    (nn.GroupNorm(1, 2), torch.ones(1, 2).long(), TypeError, "GroupNorm: x: expected a floating-point tensor, got"),
    (nn.ChannelShuffle(2), torch.ones(1, 3), ValueError, "ChannelShuffle: x: expected channels divisible by 2, got 3"),
    (nn.MLP(3, (4,), 2), torch.ones(2, 4), ValueError, "Linear: x: expected shape (..., in_features=3), got (2, 4)"),
]


@pytest.mark.parametrize(("layer", "x", "error", "message"), BAD_INPUTS, ids=[message for *_, message in BAD_INPUTS])
def test_layer_refuses_bad_input(layer: Any, x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        layer(layer.init(random.key(0)), x)
    assert message in str(caught.value)


WITH_PARAMETERS: list[tuple[Any, tuple[Any, ...]]] = [
    (nn.Linear(2, 2), (torch.ones(1, 2),)),
    (nn.Bilinear(2, 2, 1), (torch.ones(1, 2), torch.ones(1, 2))),
    (nn.Conv1d(2, 2, 1), (torch.ones(1, 2, 3),)),
    (nn.ConvTranspose2d(2, 2, 1), (torch.ones(1, 2, 3, 3),)),
    (nn.GroupNorm(1, 2), (torch.ones(1, 2, 3),)),
    (nn.LayerNorm(2), (torch.ones(1, 2),)),
    (nn.RMSNorm(2), (torch.ones(1, 2),)),
    (nn.InstanceNorm1d(2, affine=True), (torch.ones(1, 2, 3),)),
    (nn.PReLU(), (torch.ones(2),)),
    (nn.Swish(trainable=True), (torch.ones(2),)),
]


@pytest.mark.parametrize(("layer", "inputs"), WITH_PARAMETERS, ids=lambda value: type(value).__name__)
def test_layer_names_the_missing_parameter_and_its_path(layer: Any, inputs: tuple[Any, ...]) -> None:
    params = layer.init(random.key(0))
    for missing in params:
        rest = {"other": torch.ones(1), **{name: p for name, p in params.items() if name != missing}}
        found = re.escape(str(sorted(rest)))
        with pytest.raises(
            KeyError, match=f"{type(layer).__name__}: expected a parameter '{missing}', got only {found}"
        ):
            layer(rest, *inputs)
        with pytest.raises(KeyError, match=f"expected a parameter 'block.layer.{missing}', got only {found}"):
            nn.Bound({"block": nn.Residual(layer)}, {"block": {"layer": rest}}).block(*inputs)


def test_multi_head_attention_names_the_argument_of_the_wrong_size() -> None:
    layer = nn.MultiHeadAttention(4, 2, kdim=3, vdim=2)
    params = layer.init(random.key(0))
    with pytest.raises(ValueError, match=r"context: expected shape \(\.\.\., n, e=3\), got \(5, 4\)"):
        layer(params, torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"value: expected shape \(\.\.\., n, e=2\), got \(5, 3\)"):
        layer(params, torch.ones(5, 4), torch.ones(5, 3))


def test_lists_of_sizes_become_tuples() -> None:
    assert nn.Conv2d(1, 1, [3, 3]) == nn.Conv2d(1, 1, (3, 3))
    assert hash(nn.LayerNorm([2, 3])) == hash(nn.LayerNorm((2, 3)))


def test_layer_norm_has_the_right_second_derivatives() -> None:
    """torch's own has not: its forward rule takes mean and variance for constants."""
    layer, draw = nn.LayerNorm(4), Draw(0)
    params, x, v, weights = {"weight": draw(4), "bias": draw(4)}, draw(2, 4), draw(2, 4), draw(2, 4)

    def f(x):
        return (weights * layer(params, x)).sin().sum()

    h = 1e-5
    slope = (grad(f)(x + h * v) - grad(f)(x - h * v)) / (2 * h)
    for found in (grad(lambda x: jvp(f, (x,), (v,))[1])(x), (hessian(f)(x) * v).sum((-2, -1))):
        torch.testing.assert_close(found, slope, rtol=1e-7, atol=1e-8)  # h^2 f'''' / 6 and 1e-16 / h
