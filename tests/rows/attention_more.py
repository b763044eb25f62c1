"""Rows of attention's extras, of positions, gated perceptrons, initialisers, captured activations and their models."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import models, nn, random, tree
from functorch_gen.nn import KVCache
from functorch_gen.typing import Tree

DTYPE_IS_AN_ARGUMENT = "the dtype is an argument"


def from_layer(name: str, layer: Any, *shapes: tuple[int, ...], **skip: str) -> Case:
    params = layer.init(random.key(0))

    def args(draw: Draw) -> tuple[Tree, ...]:
        return tree.scale(draw.like(params), 0.5), *[draw(*shape) for shape in shapes]

    return from_draw(name, lambda params, *inputs: layer(params, *inputs), args, None, **skip)


CACHED = nn.MultiHeadAttention(4, 2, num_kv_heads=1, qk_norm=True, rotary_base=100.0)
CACHED_PARAMS = CACHED.init(random.key(0))
NET = nn.Sequential(nn.Linear(2, 2), torch.tanh, nn.Linear(2, 2))
NET_PARAMS = NET.init(random.key(0))


def cache_of(draw: Draw) -> KVCache:
    """Of two sequences, one and two positions of four filled."""
    return KVCache(draw(2, 1, 4, 2), draw(2, 1, 4, 2), torch.tensor([1, 2]))


def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return nn.attention(q, k, v, nn.alibi_bias(2, torch.arange(2), torch.arange(3)))


def initializer(name: str, draw: Callable[..., Tensor]) -> Case:
    return from_draw(
        f"nn.{name}", lambda key: draw(key, (3, 2, 3)), lambda d: (d.key(),), dtype=DTYPE_IS_AN_ARGUMENT, table=ALIKE
    )


CASES = [
    from_draw("nn.apply_rotary", lambda x: nn.apply_rotary(x, torch.arange(3)), lambda d: (d(2, 3, 4),)),
    from_draw("nn.alibi_bias", biased, lambda d: (d(2, 2, 2), d(2, 3, 2), d(2, 3, 2)), table=ALIKE),
    from_layer("nn.MultiHeadAttention, norms, rotary", CACHED, (3, 4)),
    from_layer("nn.MultiHeadAttention, alibi", nn.MultiHeadAttention(4, 2, alibi=True), (3, 4), table=ALIKE),
    from_draw(
        "nn.MultiHeadAttention, cache",
        lambda params, x, cache: CACHED(params, x, cache=cache),
        lambda d: (d.like(CACHED_PARAMS), d(2, 2, 4), cache_of(d)),
    ),
    from_draw("nn.extend_cache", nn.extend_cache, lambda d: (cache_of(d), d(2, 1, 2, 2), d(2, 1, 2, 2)), table=ALIKE),
    from_layer("nn.LearnedPositions", nn.LearnedPositions(4, 2), (3, 2), table=ALIKE),
    from_layer("nn.SinusoidalPositions", nn.SinusoidalPositions(4), (3, 4), table=ALIKE),
    from_layer("nn.GatedMLP", nn.GatedMLP(2, 3, 2), (2, 2), table=ALIKE),
    from_layer("nn.MLP, norm", nn.MLP(2, (3, 3), 2, norm=nn.LayerNorm), (2, 2), table=ALIKE),
    from_draw(
        "nn.capture",
        lambda params, x: nn.capture(NET, ["0", "1"])(params, x),
        lambda d: (d.like(NET_PARAMS), d(2, 2)),
    ),
    initializer("variance_scaling", nn.variance_scaling),
    initializer("xavier_normal", nn.xavier_normal),
    initializer("kaiming_uniform", nn.kaiming_uniform),
    initializer("trunc_normal", nn.trunc_normal),
    initializer("orthogonal", nn.orthogonal),
    from_draw(
        "nn.initialize",
        lambda params, key: nn.initialize(params, {"*.weight": nn.kaiming_normal}, key),
        lambda d: (d.like(NET_PARAMS), d.key()),
        table=ALIKE,
    ),
    from_layer(
        "models.TransformerBlock",
        models.TransformerBlock(2, 1, hidden_features=2, norm=nn.RMSNorm, gated=True),
        (3, 2),
        table=ALIKE,
    ),
    from_layer(
        "models.ViT",
        models.ViT(1, 2, image_size=2, patch_size=1, num_layers=1, num_heads=1, embed_dim=2),
        (2, 1, 2, 2),
        table=ALIKE,
    ),
]
