"""The table of layers that the tests of ``functorch_gen.nn`` run over, and their counterparts in ``torch.nn``."""

import warnings
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import nn, random, tree


@dataclass(frozen=True)
class Case:
    """A layer and the shapes of its inputs, whose first axis is a batch; ``high`` makes integers below it."""

    layer: Any
    shapes: tuple[tuple[int, ...], ...]
    high: int | None = None

    def __str__(self) -> str:
        """The layer with the fields that are not at their defaults; functions by name."""
        if isinstance(self.layer, nn.Sequential):
            return "Sequential"
        values = {field: getattr(self.layer, field.name) for field in fields(self.layer)}
        shown = [
            f"{field.name}={getattr(value, '__name__', value)}"
            for field, value in values.items()
            if value != field.default
        ]
        return f"{type(self.layer).__name__}({','.join(shown)})".replace(" ", "")

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """float64 normals, or integers."""
        generator = torch.Generator().manual_seed(seed)
        if self.high is not None:
            return tuple(torch.randint(self.high, shape, generator=generator) for shape in self.shapes)
        return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes)

    def params(self, seed: int = 0) -> dict[str, Any]:
        """float64 parameters in general position: no weight is one, no bias zero."""
        generator = torch.Generator().manual_seed(seed + 100)
        init = self.layer.init(random.key(seed))
        return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=torch.float64), init)


def _image(*sizes: int) -> tuple[tuple[int, ...], ...]:
    return (sizes,)


CONVS = [
    Case(nn.Conv1d(2, 3, 3), _image(2, 2, 7)),
    Case(nn.Conv1d(4, 6, 4, padding="same", dilation=3, groups=2), _image(2, 4, 9)),
    Case(nn.Conv1d(2, 3, 3, padding=2, padding_mode="circular"), _image(2, 2, 6)),
    Case(nn.Conv2d(2, 3, 3), _image(2, 2, 5, 6)),
    Case(nn.Conv2d(2, 4, (3, 1), (2, 1), (1, 0), groups=2, bias=False), _image(2, 2, 5, 6)),
    Case(nn.Conv2d(2, 3, 3, padding="valid", dilation=2), _image(2, 2, 6, 6)),
    Case(nn.Conv2d(2, 3, (2, 3), padding="same"), _image(2, 2, 5, 4)),
    Case(nn.Conv2d(2, 3, (2, 3), padding="same", padding_mode="reflect"), _image(2, 2, 5, 4)),
    Case(nn.Conv2d(2, 3, 3, 2, (1, 2), padding_mode="replicate"), _image(2, 2, 5, 4)),
    Case(nn.Conv2d(2, 3, 3, padding=(2, 1), padding_mode="circular"), _image(2, 2, 4, 4)),
    Case(nn.Conv3d(2, 2, (1, 3, 2), padding=(0, 1, 0)), _image(2, 2, 3, 4, 4)),
    Case(nn.Conv3d(1, 2, 3, padding=1, padding_mode="reflect"), _image(2, 1, 3, 3, 3)),
    Case(nn.ConvTranspose1d(2, 3, 4, stride=2, padding=1), _image(2, 2, 5)),
    Case(nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2), _image(2, 4, 3, 4)),
    Case(nn.ConvTranspose2d(2, 3, (2, 3), bias=False, dilation=2), _image(2, 2, 3, 4)),
    Case(nn.ConvTranspose3d(2, 1, 2, stride=2), _image(2, 2, 2, 3, 2)),
]

OTHERS = [
    Case(nn.Identity(), ((2, 3),)),
    Case(nn.Linear(3, 4), ((2, 5, 3),)),
    Case(nn.Linear(3, 4, bias=False), ((2, 3),)),
    Case(nn.GroupNorm(2, 4), ((2, 4, 3, 3),)),
    Case(nn.GroupNorm(1, 4, eps=1e-3, affine=False), ((2, 4, 3),)),
    Case(nn.LayerNorm(4), ((2, 3, 4),)),
    Case(nn.LayerNorm((3, 4), 1e-2, bias=False), ((2, 3, 4),)),
    Case(nn.LayerNorm(4, elementwise_affine=False), ((2, 4),)),
    Case(nn.RMSNorm(4), ((2, 3, 4),)),
    Case(nn.RMSNorm((3, 4), 1e-2, elementwise_affine=False), ((2, 3, 4),)),
    Case(nn.Embedding(5, 3), ((2, 4),), high=5),
    Case(nn.Embedding(5, 3, padding_idx=-2), ((2, 4),), high=5),
    Case(nn.Dropout(0.3), ((2, 3),)),
    Case(nn.MultiHeadAttention(4, 2), ((2, 5, 4),)),
    Case(nn.MultiHeadAttention(4, 2, bias=False), ((2, 5, 4), (2, 3, 4))),
    Case(nn.MultiHeadAttention(6, 3, kdim=5), ((2, 4, 6), (2, 3, 5), (2, 3, 6))),
    Case(nn.MultiHeadAttention(4, 1, bias=False, kdim=3, vdim=2), ((2, 4, 4), (2, 3, 3), (2, 3, 2))),
]

TORCH_CASES = [*CONVS, *OTHERS]
"""Layers that ``torch.nn`` has too."""

OWN_CASES = [
    Case(nn.SinusoidalFeatures(6, scale=3.0), ((2,),)),
    Case(nn.FourierFeatures(3, 4, std=0.5), ((2, 3),)),
    Case(nn.Sequential(nn.Linear(3, 4), F.silu, nn.Dropout(0.1), nn.Linear(4, 2)), ((2, 3),)),
    Case(nn.MLP(3, (5, 4), 2, activation=torch.tanh), ((2, 3),)),
]

CASES = [*TORCH_CASES, *OWN_CASES]

POOLS = [
    Case(nn.MaxPool1d(3, 2, 1), _image(2, 2, 7)),
    Case(nn.MaxPool2d((2, 3), 2, (0, 1), ceil_mode=True), _image(1, 2, 3, 5)),
    Case(nn.MaxPool2d(2, 1, dilation=(1, 2)), _image(1, 2, 3, 5)),
    Case(nn.MaxPool3d(2, 1), _image(1, 1, 3, 3, 3)),
    Case(nn.AvgPool1d(2), _image(2, 2, 5)),
    Case(nn.AvgPool2d((2, 3), 2, (0, 1), True, False), _image(1, 2, 3, 5)),
    Case(nn.AvgPool2d(2, divisor_override=3), _image(1, 2, 3, 5)),
    Case(nn.AvgPool3d(2, 1), _image(1, 1, 3, 3, 3)),
    Case(nn.LPPool1d(2, 2), _image(2, 2, 5)),
    Case(nn.LPPool2d(4, (1, 2), 1), _image(1, 2, 3, 4)),
    Case(nn.LPPool3d(2, 2, ceil_mode=True), _image(1, 1, 2, 3, 4)),
    Case(nn.AdaptiveAvgPool1d(3), _image(2, 2, 5)),
    Case(nn.AdaptiveAvgPool2d((2, None)), _image(1, 2, 3, 5)),
    Case(nn.AdaptiveAvgPool3d((2, 1, 2)), _image(1, 1, 3, 2, 4)),
    Case(nn.AdaptiveMaxPool1d(3), _image(2, 2, 5)),
    Case(nn.AdaptiveMaxPool2d((2, None)), _image(1, 2, 3, 5)),
    Case(nn.AdaptiveMaxPool3d((2, 1, 2)), _image(1, 1, 3, 2, 4)),
]

SAMPLES = [
    Case(nn.Upsample(scale_factor=2), _image(1, 2, 3)),
    Case(nn.Upsample((3, 5)), _image(1, 2, 2, 3)),
    Case(nn.Upsample(5, mode="linear"), _image(1, 2, 3)),
    Case(nn.Upsample(scale_factor=1.7, mode="bilinear", align_corners=True), _image(1, 1, 3, 4)),
    Case(nn.Upsample((5, 3), mode="bicubic"), _image(1, 1, 3, 4)),
    Case(nn.Upsample(scale_factor=(1.5, 2.0, 1.0), mode="trilinear"), _image(1, 1, 2, 2, 3)),
    Case(nn.PixelShuffle(2), _image(1, 4, 2, 3)),
    Case(nn.PixelUnshuffle(2), _image(1, 1, 4, 6)),
    Case(nn.Flatten(), _image(2, 2, 3)),
    Case(nn.Unflatten(1, (2, -1)), _image(2, 6)),
    Case(nn.Unfold(2, 1, (1, 0), (1, 2)), _image(1, 1, 3, 4)),
    Case(nn.Fold((3, 4), 2), _image(1, 4, 6)),
    Case(nn.ConstantPad1d((1, -1), 2.5), _image(2, 2, 3)),
    Case(nn.ConstantPad2d(1, 2.5), _image(1, 2, 2, 3)),
    Case(nn.ConstantPad3d((1, 0, 0, 2, -1, 0), 2.5), _image(1, 1, 2, 2, 3)),
    Case(nn.ZeroPad1d(1), _image(2, 2, 3)),
    Case(nn.ZeroPad2d((0, 1, 2, -1)), _image(1, 2, 2, 3)),
    Case(nn.ZeroPad3d(1), _image(1, 1, 2, 2, 3)),
    Case(nn.ReflectionPad1d(2), _image(2, 2, 3)),
    Case(nn.ReflectionPad2d((0, 1, 2, 1)), _image(1, 2, 3, 3)),
    Case(nn.ReflectionPad3d(1), _image(1, 1, 2, 2, 3)),
    Case(nn.ReplicationPad1d(2), _image(2, 2, 3)),
    Case(nn.ReplicationPad2d((0, 1, 2, 1)), _image(1, 2, 3, 3)),
    Case(nn.ReplicationPad3d(1), _image(1, 1, 2, 2, 3)),
    Case(nn.CircularPad1d(2), _image(2, 2, 3)),
    Case(nn.CircularPad2d((0, 1, 2, 1)), _image(1, 2, 3, 3)),
    Case(nn.CircularPad3d(1), _image(1, 1, 2, 2, 3)),
]

ACTIVATIONS = [
    *[Case(layer, ((3, 4),)) for layer in (nn.ReLU(), nn.ReLU6(), nn.LeakyReLU(0.1), nn.Hardtanh(-0.5, 0.7))],
    *[Case(layer, ((3, 4),)) for layer in (nn.Hardsigmoid(), nn.Hardswish(), nn.Hardshrink(), nn.Softshrink(0.3))],
    *[Case(layer, ((3, 4),)) for layer in (nn.Threshold(0.1, 2.0), nn.ELU(1.3), nn.CELU(1.7), nn.SELU(), nn.GELU())],
    *[Case(layer, ((3, 4),)) for layer in (nn.GELU("tanh"), nn.SiLU(), nn.Mish(), nn.Softplus(2.0, 3.0))],
    *[Case(layer, ((3, 4),)) for layer in (nn.LogSigmoid(), nn.Sigmoid(), nn.Tanh(), nn.Tanhshrink(), nn.Softsign())],
    *[Case(layer, ((3, 4),)) for layer in (nn.Softmax(0), nn.Softmin(1), nn.LogSoftmax(-1), nn.GLU(), nn.PReLU())],
    Case(nn.Softmax2d(), _image(2, 3, 1, 2)),
    Case(nn.PReLU(3, 0.1), _image(2, 3, 2)),
    Case(nn.RReLU(0.1, 0.5), ((3, 4),)),
]

NORMS = [
    Case(nn.InstanceNorm1d(2), _image(2, 2, 4)),
    Case(nn.InstanceNorm2d(2, affine=True), _image(2, 2, 2, 3)),
    Case(nn.InstanceNorm3d(1, 1e-2, affine=True, bias=False), _image(2, 1, 2, 2, 2)),
    Case(nn.LocalResponseNorm(3, 0.5), _image(2, 4, 3)),
    Case(nn.ChannelShuffle(3), _image(1, 6, 2, 1)),
    Case(nn.Dropout1d(0.3), _image(2, 2, 2)),
    Case(nn.Dropout2d(0.3), _image(2, 2, 1, 2)),
    Case(nn.Dropout3d(0.3), _image(2, 2, 1, 1, 2)),
    Case(nn.AlphaDropout(0.3), ((2, 3),)),
    Case(nn.FeatureAlphaDropout(0.3), _image(2, 3, 2)),
    Case(nn.Bilinear(2, 3, 2), ((2, 2), (2, 3))),
    Case(nn.CosineSimilarity(), ((2, 3), (2, 3))),
    Case(nn.PairwiseDistance(3.0, 1e-2), ((2, 3), (2, 3))),
]

MORE_TORCH_CASES = [*POOLS, *SAMPLES, *ACTIVATIONS, *NORMS]
"""Layers that ``torch.nn`` has too; what transforms make of them is asked of their rows in the table."""

MORE_OWN_CASES = [
    Case(nn.DropPath(0.3), ((2, 3),)),
    Case(nn.Swish(1.5), ((3, 4),)),
    Case(nn.Swish(trainable=True), ((3, 4),)),
    Case(nn.MinibatchStdDev(2), _image(4, 2, 2)),
    Case(nn.MinibatchStdDev(None, 2), _image(3, 4, 2)),
    Case(nn.Residual(nn.Linear(3, 3), 0.5), ((2, 3),)),
    Case(nn.Residual(nn.Conv1d(1, 2, 3, 2, 1), shortcut=nn.Conv1d(1, 2, 1, 2)), _image(2, 1, 4)),
    Case(nn.WeightNorm(nn.Linear(3, 2)), ((2, 3),)),
    Case(nn.WeightNorm(nn.Conv1d(2, 3, 2), dim=None), _image(2, 2, 3)),
    Case(nn.LoRA(nn.Linear(3, 2), 2, 4.0), ((2, 3),)),
    Case(nn.LoRA(nn.Conv2d(1, 2, 2), 1), _image(2, 1, 2, 3)),
]


OWN_FIELDS = {"gain", "num_kv_heads", "qk_norm", "rotary_base", "alibi", "axis_name"}
"""What the modules of torch have not."""


def reference(layer: Any) -> torch.nn.Module:
    """The module of ``torch.nn`` with the layer's fields, in float64."""
    name = getattr(layer, "name", type(layer).__name__)
    sizes = {field.name: getattr(layer, field.name) for field in fields(layer) if field.name not in OWN_FIELDS}
    if isinstance(layer, nn.PReLU):
        sizes["init"] = sizes.pop("initial")
    if isinstance(layer, nn.MultiHeadAttention):
        return torch.nn.MultiheadAttention(**sizes, batch_first=True, dtype=torch.float64)
    return getattr(torch.nn, name)(**sizes).double()


def call_reference(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output tensor, without dropout."""
    module.eval()
    if isinstance(module, torch.nn.MultiheadAttention):
        query, *rest = inputs
        key = rest[0] if rest else query
        value = rest[1] if len(rest) > 1 else key
        return module(query, key, value, need_weights=False)[0]
    with warnings.catch_warnings():  # torch pads a copy for even kernels with padding="same", and says so once
        warnings.simplefilter("ignore", UserWarning)
        return module(*inputs)
