"""Rows of layers: those of ``functorch_gen.nn``, with and without a key, and the blocks of the networks."""

import re
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import nn_cases
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import models, nn, random, tree
from functorch_gen.typing import Tree

PADDING = "the row of padding_idx has gradient zero by definition"


def title(case: nn_cases.Case) -> str:
    """The layer as it is written, arguments that have no default without their names."""
    required = {field.name for field in fields(case.layer) if field.default is MISSING}
    return re.sub(r"(\w+)=", lambda name: "" if name[1] in required else name[0], str(case)).replace(",", ", ")


LIKE_OTHERS = {
    nn.Conv1d(4, 6, 4, padding="same", dilation=3, groups=2),
    nn.Conv2d(2, 3, 3, padding="valid", dilation=2),
    nn.Conv2d(2, 3, (2, 3), padding="same"),
    nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"),
    nn.Conv3d(1, 2, 3, padding=1, padding_mode="reflect"),
    nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1),
    nn.ConvTranspose2d(2, 3, (2, 3), bias=False, dilation=2),
    nn.Linear(3, 4, bias=False),
    nn.GroupNorm(1, 4, eps=1e-3, affine=False),
    nn.LayerNorm((3, 4), 1e-2, bias=False),
    nn.LayerNorm(4, elementwise_affine=False),
    nn.RMSNorm((3, 4), 1e-2, elementwise_affine=False),
    nn.Dropout(0.3),
    nn.MultiHeadAttention(4, 2, bias=False),
    nn.MultiHeadAttention(6, 3, kdim=5),
}


def from_layer(case: nn_cases.Case) -> Case:
    def args(seed: int) -> tuple[Tree, ...]:
        return case.params(seed), *case.inputs(seed)

    skip = {"table": ALIKE} if case.layer in LIKE_OTHERS else {}
    if getattr(case.layer, "padding_idx", None) is not None:
        skip = {"derivatives": PADDING}
    return Case(f"nn.{title(case)}", lambda params, *inputs: case.layer(params, *inputs), args, skip)


def from_model(name: str, layer: Any, inputs: Callable[[Draw], tuple[Tensor, ...]]) -> Case:
    shapes = layer.init(random.key(0))

    def args(draw: Draw) -> tuple[Tree, ...]:
        return tree.scale(draw.like(shapes), 0.5), *inputs(draw)

    return from_draw(f"models.{name}", lambda params, *inputs: layer(params, *inputs), args)


def keyed(name: str, layer: Any, *shape: int) -> Case:
    shapes = layer.init(random.key(0))
    return from_draw(
        f"nn.{name} with a key",
        lambda params, key, x: layer(params, x, key=key),
        lambda d: (d.like(shapes), d.key(), d(*shape)),
    )


UNET = models.UNet(
    2,
    base_channels=4,
    num_blocks=1,
    num_heads=2,
    num_classes=3,
    embed_dim=4,
    num_groups=2,
    time_scale=3.0,  # of 1000, finite differences in t would need steps of 1e-8
)

LAYERS = [
    *[from_layer(case) for case in nn_cases.CASES],
    keyed("Dropout", nn.Dropout(0.4), 2, 3),
    keyed("Sequential", nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.4), nn.Linear(4, 2)), 2, 3),
]
MODELS = [
    from_model("SpatialAttention", models.SpatialAttention(4, 2, num_groups=2), lambda d: (d(2, 4, 2, 3),)),
    from_model("ResBlock", models.ResBlock(2, 4, 3, num_groups=2), lambda d: (d(2, 2, 4, 4), d(2, 3))),
    from_model(
        "Remat", models.Remat(models.ResBlock(2, 4, 3, num_heads=2, num_groups=2)), lambda d: (d(2, 2, 2, 2), d(2, 3))
    ),
    from_model("UNet", UNET, lambda d: (d(2, 2, 4, 4), d.times(2), d.labels(4, 2))),
]

CASES = [*LAYERS, *MODELS]
