"""Rows of layers: pooling, resampling, activations, more norms, and layers around layers."""

from typing import Any

import nn_cases
from rows.layers import keyed, title
from rows.state import from_stateful
from torch import Tensor
from zoo_case import ALIKE, Case, from_draw

from functorch_gen import nn
from functorch_gen.typing import Tree

TABLE = {
    nn.MaxPool2d((2, 3), 2, (0, 1), ceil_mode=True),
    nn.AvgPool3d(2, 1),
    nn.AdaptiveAvgPool2d((2, None)),
    nn.AdaptiveMaxPool2d((2, None)),
    nn.Upsample(scale_factor=1.7, mode="bilinear", align_corners=True),
    nn.PixelShuffle(2),
    nn.ReflectionPad2d((0, 1, 2, 1)),
    nn.Fold((3, 4), 2),
    nn.GELU(),
    nn.Mish(),
    nn.Hardsigmoid(),
    nn.GLU(),
    nn.InstanceNorm2d(2, affine=True),
    nn.LocalResponseNorm(3, 0.5),
    nn.MinibatchStdDev(2),
    nn.WeightNorm(nn.Linear(3, 2)),
    nn.LoRA(nn.Linear(3, 2), 2, 4.0),
    nn.Residual(nn.Linear(3, 3), 0.5),
}
"""Those that stand for the others of their kind in the table of compositions."""


def from_layer(case: nn_cases.Case) -> Case:
    def args(seed: int) -> tuple[Tree, ...]:
        return case.params(seed), *case.inputs(seed)

    skip = {} if case.layer in TABLE else {"table": ALIKE}
    return Case(f"nn.{title(case)}", lambda params, *inputs: case.layer(params, *inputs), args, skip)


def with_indices(x: Tensor) -> Any:
    y, indices = nn.MaxPool2d(2, 1, return_indices=True)({}, x)
    return y, indices


DROPS = [nn.Dropout2d(0.4), nn.AlphaDropout(0.4), nn.FeatureAlphaDropout(0.4), nn.DropPath(0.4), nn.RReLU()]

CASES = [
    *[from_layer(case) for case in [*nn_cases.MORE_TORCH_CASES, *nn_cases.MORE_OWN_CASES]],
    *[keyed(type(layer).__name__, layer, 2, 3, 1, 2) for layer in DROPS],
    from_stateful("nn.InstanceNorm1d train", nn.InstanceNorm1d(2, track_running_stats=True), 3, 2, 3),
    from_stateful("nn.InstanceNorm1d eval", nn.InstanceNorm1d(2, track_running_stats=True), 3, 2, 3, train=False),
    from_stateful("nn.Residual with state", nn.Residual(nn.BatchNorm1d(2)), 3, 2),
    from_draw("nn.swish", nn.swish, lambda d: (d(3, 4), d(4))),
    from_draw("nn.MaxPool2d with indices", with_indices, lambda d: (d(1, 2, 3, 3),), table=ALIKE),
]
