"""Rows of attention: its masks, the layer around it, and the transformer built on both."""

from typing import Any

from torch import Tensor
from zoo_case import Case, Draw, from_draw

from functorch_gen import models, nn, random
from functorch_gen.typing import Tree


def inputs(draw: Draw) -> tuple[Tensor, ...]:
    """q, k and v of two heads, with more keys than queries."""
    return draw(2, 3, 2), draw(2, 4, 2), draw(2, 4, 2)


def keep(draw: Draw) -> Tensor:
    """Where queries attend; the first query of the first head to nothing."""
    mask = draw(2, 3, 4) > -0.5
    mask[0, 0] = False
    return mask


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return nn.attention(q, k, v, mask)


def from_layer(name: str, layer: Any, *shapes: tuple[int, ...], **options: Any) -> Case:
    params = layer.init(random.key(0))

    def args(draw: Draw) -> tuple[Tree, ...]:
        return draw.like(params), *[draw(*shape) for shape in shapes]

    return from_draw(name, lambda params, *inputs: layer(params, *inputs, **options), args)


GPT = models.GPT(vocab_size=5, context=3, num_layers=1, num_heads=2, embed_dim=4)
GPT_PARAMS = GPT.init(random.key(0))

CASES = [
    from_draw("nn.attention, causal", lambda q, k, v: nn.attention(q, k, v, is_causal=True), inputs),
    from_draw("nn.attention, bool mask", masked, lambda d: (*inputs(d), keep(d))),
    from_draw("nn.attention, additive mask", masked, lambda d: (*inputs(d), d(3, 4))),
    from_draw("nn.attention, grouped queries", nn.attention, lambda d: (d(4, 3, 2), d(2, 4, 2), d(2, 4, 2))),
    from_draw("nn.attention, values of another width", nn.attention, lambda d: (d(2, 3, 2), d(2, 3, 2), d(2, 3, 1))),
    from_layer("nn.MultiHeadAttention, causal", nn.MultiHeadAttention(4, 2), (3, 4), is_causal=True),
    from_layer("nn.MultiHeadAttention, cross", nn.MultiHeadAttention(4, 2, kdim=3, vdim=2), (2, 4), (3, 3), (3, 2)),
    from_layer("nn.MultiHeadAttention, grouped queries", nn.MultiHeadAttention(4, 2, num_kv_heads=1), (3, 4)),
    from_layer("models.GPTBlock", models.GPTBlock(4, 2), (3, 4)),
    from_draw(
        "models.GPT",
        lambda params, tokens: GPT(params, tokens),
        lambda d: (d.like(GPT_PARAMS), d.labels(5, 2, 3)),
    ),
]
