"""Initial distributions: samples of ``torch.nn``'s own, Kolmogorov-Smirnov."""

import math
from typing import Any

import pytest
import torch
from nn_cases import reference
from scipy.stats import ks_2samp, kstest, norm, uniform
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
