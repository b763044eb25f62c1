"""Initial distributions: samples of ``torch.nn``'s own, jax's draws, formulas of the variance, Kolmogorov-Smirnov."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nn_cases import reference
from scipy.stats import ks_2samp, kstest, norm, truncnorm, uniform
from torch.func import vmap

from functorch_gen import nn, random, tree

LAYERS = [
    nn.Linear(7, 5),
    nn.Conv1d(4, 6, 3, groups=2),
    nn.Conv2d(3, 4, (3, 2)),
    nn.Conv3d(2, 2, 2),
    nn.ConvTranspose1d(4, 6, 3, groups=2),
    nn.ConvTranspose2d(2, 5, (3, 2)),
    nn.ConvTranspose3d(2, 2, 2),
    nn.Embedding(7, 4, padding_idx=3),
    nn.GroupNorm(2, 4),
    nn.LayerNorm((2, 3)),
    nn.RMSNorm(4),
    nn.MultiHeadAttention(6, 2),
    nn.MultiHeadAttention(6, 2, kdim=5, vdim=3),
]
DRAWS = 400


def draws_of(layer: Any) -> dict[str, torch.Tensor]:
    """Each leaf of many initialisations: (DRAWS, ...), by one vmap over keys."""
    return tree.names(vmap(layer.init)(random.split(random.key(0), DRAWS)))


def draws_of_torch(layer: Any) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tree.names(tree.stack([dict(reference(layer).float().state_dict()) for _ in range(DRAWS)]))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: repr(layer).replace(" ", ""))
def test_init_has_the_distribution_of_torch(layer: Any) -> None:
    """Two samples of each leaf; p < 1e-3 would be a one-in-a-thousand event, and the seeds are fixed."""
    theirs = draws_of_torch(layer)
    for name, ours in draws_of(layer).items():
        assert ks_2samp(ours.flatten(), theirs[name].flatten()).pvalue > 1e-3, name


BOUNDS = [
    (nn.Linear(7, 5), "weight", 1 / math.sqrt(7)),
    (nn.Linear(7, 5), "bias", 1 / math.sqrt(7)),
    (nn.Linear(7, 5, gain=0.1), "bias", 0.1 / math.sqrt(7)),
    (nn.Conv2d(4, 6, (3, 2), groups=2), "weight", 1 / math.sqrt(2 * 3 * 2)),
    (nn.Conv2d(4, 6, (3, 2), gain=2.0), "weight", 2 / math.sqrt(4 * 3 * 2)),
    (nn.ConvTranspose2d(4, 6, 3, groups=2), "bias", 1 / math.sqrt(3 * 9)),
    (nn.MultiHeadAttention(6, 2), "in_proj_weight", math.sqrt(6 / (6 + 18))),
    (nn.MultiHeadAttention(6, 2, kdim=5), "k_proj_weight", math.sqrt(6 / (6 + 5))),
    (nn.MultiHeadAttention(6, 2, gain=3.0), "out_proj.weight", 3 / math.sqrt(6)),
]


@pytest.mark.parametrize(("layer", "name", "bound"), BOUNDS)
def test_init_is_uniform_up_to_its_bound(layer: Any, name: str, bound: float) -> None:
    x = draws_of(layer)[name].flatten()
    assert bound * 0.99 < x.abs().max() <= bound * (1 + 1e-6)
    assert kstest(x, uniform(-bound, 2 * bound).cdf).pvalue > 1e-3


def test_embedding_starts_standard_normal_with_a_zero_padding_row() -> None:
    weight = draws_of(nn.Embedding(7, 4, padding_idx=-4))["weight"]
    rest = torch.cat([weight[:, :3], weight[:, 4:]], dim=1)
    assert torch.equal(weight[:, 3], torch.zeros(DRAWS, 4))
    assert kstest(rest.flatten(), norm.cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(3, 2, gain=0.0),
        nn.Conv2d(2, 3, 3, gain=0.0),
        nn.ConvTranspose1d(2, 3, 3, gain=0.0),
        nn.MultiHeadAttention(4, 2, gain=0.0),
        nn.MLP(3, (4,), 2, gain=0.0),
    ],
)
def test_layer_with_zero_gain_starts_as_the_zero_map(layer: Any) -> None:
    shape = {"Conv2d": (2, 2, 5, 5), "ConvTranspose1d": (2, 2, 5), "MultiHeadAttention": (2, 3, 4)}
    x = random.normal(random.key(1), shape.get(type(layer).__name__, (2, 3)))
    y = layer(layer.init(random.key(0)), x)
    assert torch.equal(y, torch.zeros_like(y))


def test_weight_and_bias_are_drawn_independently() -> None:
    """The correlation of 400 x 5 pairs; its standard error is 0.022."""
    draws = draws_of(nn.Linear(1, 5))
    pairs = torch.stack([draws["weight"].flatten(), draws["bias"].flatten()])
    assert torch.corrcoef(pairs)[0, 1].abs() < 0.09


def test_weight_is_the_same_with_and_without_bias() -> None:
    with_bias, without = (nn.Linear(3, 2, bias=bias).init(random.key(0)) for bias in (True, False))
    assert torch.equal(with_bias["weight"], without["weight"])


# Initialisers as functions of a key.

SHAPES = [(30, 20), (12, 10, 5), (8, 6, 3, 2), (5, 4, 2, 3, 2)]
KEY = random.key(5)


@pytest.mark.parametrize("shape", SHAPES)
def test_fans_are_those_of_torch(shape: tuple[int, ...]) -> None:
    assert nn.fans(shape) == torch.nn.init._calculate_fan_in_and_fan_out(torch.empty(shape))


@pytest.mark.parametrize("param", [None, 0.0, 0.3])
def test_calculate_gain_is_that_of_torch(param: float | None) -> None:
    plain = ["linear", "conv1d", "conv2d", "conv3d", "sigmoid", "tanh", "relu", "selu"]
    plain += ["conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
    names: list[Any] = [*plain, "leaky_relu"]
    for name in names:
        assert nn.calculate_gain(name, param) == pytest.approx(torch.nn.init.calculate_gain(name, param), rel=1e-15)


def fan(shape: tuple[int, ...], mode: str) -> float:
    fan_in, fan_out = (math.prod(shape[2:]) * shape[i] for i in (1, 0))
    return {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]


KAIMING: dict[str, Any] = {"a": 0.2, "mode": "fan_out", "nonlinearity": "leaky_relu"}
# the law and its standard deviation, by the papers' formulas
LAWS: list[tuple[str, Callable[..., torch.Tensor], Callable[[tuple[int, ...]], float]]] = [
    ("uniform", functools.partial(nn.xavier_uniform, gain=1.5), lambda s: 1.5 / math.sqrt(fan(s, "fan_avg"))),
    ("norm", functools.partial(nn.xavier_normal, gain=1.5), lambda s: 1.5 / math.sqrt(fan(s, "fan_avg"))),
    ("uniform", nn.kaiming_uniform, lambda s: math.sqrt(2 / fan(s, "fan_in"))),
    ("norm", functools.partial(nn.kaiming_normal, **KAIMING), lambda s: math.sqrt(2 / 1.04 / fan(s, "fan_out"))),
    ("norm", functools.partial(nn.scaled_residual, num_layers=8), lambda s: 0.005),
]


def cdf(law: str, std: float) -> Any:
    return norm(0, std).cdf if law == "norm" else uniform(-math.sqrt(3) * std, 2 * math.sqrt(3) * std).cdf


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("law", "draw", "std"), LAWS, ids=[str(i) for i in range(len(LAWS))])
def test_initializer_has_the_law_of_its_paper(law: str, draw: Any, std: Any, shape: tuple[int, ...]) -> None:
    """Kolmogorov-Smirnov, and the variance within five standard errors, sqrt(2 / n) of it for a normal law."""
    x = vmap(lambda key: draw(key, shape, torch.float64))(random.split(KEY, 2400 // math.prod(shape) + 1)).flatten()
    assert kstest(x, cdf(law, std(shape))).pvalue > 1e-3
    assert abs(float(x.square().mean()) / std(shape) ** 2 - 1) < 5 * math.sqrt(2 / len(x))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("xavier_uniform", {"gain": 2.0}),
        ("xavier_normal", {"gain": 2.0}),
        ("kaiming_uniform", {"a": 0.3, "mode": "fan_out"}),
        ("kaiming_uniform", {"nonlinearity": "tanh"}),
        ("kaiming_normal", {"nonlinearity": "relu"}),
        ("trunc_normal", {"mean": 0.3, "std": 0.5, "a": -0.1, "b": 0.6}),
        ("uniform", {"a": -1.0, "b": 3.0}),
        ("normal", {"mean": 1.0, "std": 0.1}),
    ],
)
def test_initializer_has_the_distribution_of_torchs(name: str, options: dict[str, Any]) -> None:
    shape = (40, 10, 5)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = getattr(torch.nn.init, f"{name}_")(torch.empty(shape), **options)
    both: Any = ks_2samp(getattr(nn, name)(KEY, shape, **options).flatten(), theirs.flatten())
    assert both.pvalue > 1e-3


def test_lecun_normal_is_cut_at_two_deviations_and_has_variance_one_over_fan_in() -> None:
    x = nn.lecun_normal(KEY, (60, 50), torch.float64).flatten()
    cut = 1 / math.sqrt(50) / truncnorm(-2, 2).std()
    assert kstest(x, truncnorm(-2, 2, scale=cut).cdf).pvalue > 1e-3
    assert abs(float(x.var()) * 50 - 1) < 5 * math.sqrt(2 / len(x))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 2, 3), (7, 2, 2)])
def test_orthogonal_has_orthonormal_rows_or_columns(shape: tuple[int, ...]) -> None:
    q = nn.orthogonal(KEY, shape, torch.float64, gain=2.0).flatten(1)
    gram = q @ q.mT if q.shape[0] <= q.shape[1] else q.mT @ q
    torch.testing.assert_close(gram, 4 * torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("shape", "groups"), [((4, 2, 3), 1), ((3, 5, 2, 3), 1), ((6, 2, 3, 3), 3), ((2, 2, 1, 2, 3), 1)]
)
def test_dirac_is_that_of_torch(shape: tuple[int, ...], groups: int) -> None:
    theirs = torch.nn.init.dirac_(torch.empty(shape), groups)
    assert torch.equal(nn.dirac(KEY, shape, groups=groups), theirs)


GOLDENS = json.loads((Path(__file__).parent / "goldens" / "initializers.json").read_text())


def test_variance_scaling_draws_what_jax_draws() -> None:
    """float32; the laws round at other places, and the inverse error functions differ by 3 ulp."""
    for golden in GOLDENS:
        options = {name: golden[name] for name in ("scale", "mode", "distribution")}
        x = nn.variance_scaling(random.key(7), golden["shape"], **options)
        torch.testing.assert_close(x.flatten(), torch.tensor(golden["values"]), rtol=1e-6, atol=2e-7)


INITIALIZERS: dict[str, Any] = {
    "zeros": nn.zeros,
    "ones": nn.ones,
    "constant": functools.partial(nn.constant, value=0.5),
    "uniform": nn.uniform,
    "normal": nn.normal,
    "trunc_normal": nn.trunc_normal,
    "xavier_uniform": nn.xavier_uniform,
    "xavier_normal": nn.xavier_normal,
    "kaiming_uniform": nn.kaiming_uniform,
    "kaiming_normal": nn.kaiming_normal,
    "lecun_normal": nn.lecun_normal,
    "scaled_residual": functools.partial(nn.scaled_residual, num_layers=2),
    "orthogonal": nn.orthogonal,
    "dirac": nn.dirac,
}


@pytest.mark.parametrize("name", INITIALIZERS)
def test_initializer_gives_the_shape_and_dtype_asked_for_and_batches_over_keys(name: str) -> None:
    """Batched draws: an ulp of float32 between vectorised and scalar code."""
    draw = INITIALIZERS[name]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = draw(KEY, (4, 3, 2), dtype)
        assert (x.shape, x.dtype) == ((4, 3, 2), dtype)
    keys = random.split(KEY, 2)
    expected = torch.stack([draw(key, (4, 3, 2), torch.float32) for key in keys])
    torch.testing.assert_close(
        vmap(lambda key: draw(key, (4, 3, 2), torch.float32))(keys).expand_as(expected), expected, rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: nn.xavier_normal(KEY, (3,)), "fans: expected a shape .out, in, ....*, got .3,."),
        (lambda: nn.orthogonal(KEY, (3,)), "fans: expected a shape"),
        (
            lambda: nn.kaiming_normal(KEY, (3, 2), mode="fan"),
            "mode to be one of 'fan_in', 'fan_out', 'fan_avg', got 'fan'",
        ),
        (lambda: nn.calculate_gain("gelu"), "calculate_gain: expected nonlinearity to be one of .*, got 'gelu'"),
        (lambda: nn.dirac(KEY, (3, 2)), "dirac: expected a shape .* of 3 to 5 axes, got .3, 2."),
        (
            lambda: nn.dirac(KEY, (3, 2, 1), groups=2),
            "dirac: expected a number of outputs divisible by groups=2, got 3",
        ),
        (lambda: nn.variance_scaling(KEY, (3, 2), distribution="x"), "expected distribution to be one of"),
    ],
)
def test_initializer_names_what_it_expects(draw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_initialize_redraws_what_the_globs_choose_from_the_key_of_the_path() -> None:
    params = tree.cast(nn.MLP(3, (4,), 2).init(random.key(0)), torch.float64)
    drawn = nn.initialize(params, {"*.weight": nn.kaiming_normal, "2.weight": nn.zeros}, KEY)
    expected = nn.kaiming_normal(nn.name_key(KEY, "0.weight"), (4, 3), torch.float64)
    assert torch.equal(drawn["0"]["weight"], expected)
    assert torch.equal(drawn["2"]["weight"], torch.zeros(2, 4, dtype=torch.float64))
    for name in ("0", "2"):
        assert torch.equal(drawn[name]["bias"], params[name]["bias"])
    assert list(drawn) == list(params)


def test_initialize_refuses_a_glob_that_matches_nothing() -> None:
    with pytest.raises(ValueError, match=r"expected a path that matches 'x.\*', got bias, weight"):
        nn.initialize(nn.Linear(3, 2).init(KEY), {"x.*": nn.zeros}, KEY)


def test_initialize_names_the_leaf_whose_shape_has_no_fans() -> None:
    with pytest.raises(ValueError, match=r"initialize: '0\.bias': fans: expected a shape"):
        nn.initialize(nn.MLP(3, (4,), 2).init(KEY), {"*": nn.xavier_normal}, KEY)
