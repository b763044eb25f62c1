"""The four programs: sizes, batch, initial weights, and the loss in functional form and as a module."""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functorch_gen as fg
from functorch_gen.typing import Key, Params
from tests.bench.gpt import GPT
from tests.bench.modules import GPTModule, mlp_module
from tests.bench.unet_module import UNetModule

__all__ = ["PROGRAMS", "Batch", "Program", "gpt", "initial", "mlp", "unet"]

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Program:
    """One model, its loss and the batch of every step.

    Args:
        family: which loss the JAX form takes: "mlp", "unet" or "gpt"; None: there is no such form.
        sizes: what the JAX form needs beyond the weights.
        loss: of the functional form, ``loss(params, key, batch) -> ()``.
        module: builds the same model as an ``nn.Module``; its weights are then overwritten.
        module_loss: ``module_loss(module, batch) -> ()``.
        images: whether channels-last means anything.
        compiles: whether ``torch.compile`` takes ``module_loss``.
    """

    family: str | None
    sizes: dict[str, Any]
    params: Params
    batch: Batch
    loss: Callable[[Params, Key, Batch], Tensor]
    module: Callable[[], nn.Module]
    module_loss: Callable[[nn.Module, Batch], Tensor]
    images: bool = False
    compiles: bool = True


def initial(net: Any) -> Params:
    """Initial weights plus noise: what starts at zero would let whole gradients vanish."""

    def perturb(path: str, x: Tensor) -> Tensor:
        return x + 0.02 * fg.random.normal(fg.random.key(zlib.crc32(path.encode())), tuple(x.shape))

    return fg.tree.map_with_path(perturb, net.init(fg.random.key(0)))


def mlp(widths: tuple[int, ...], batch_size: int) -> Program:
    """Classification by an MLP with ReLU."""
    net = fg.nn.MLP(widths[0], widths[1:-1], widths[-1], activation=F.relu)
    k_x, k_label = fg.random.split(fg.random.key(1))
    label = fg.random.randint(k_label, (batch_size,), 0, widths[-1]).long()

    def loss(params: Params, key: Key, batch: Batch) -> Tensor:
        return F.cross_entropy(net(params, batch["x"]), batch["label"])

    return Program(
        family="mlp",
        sizes={"layers": len(widths) - 1},
        params=initial(net),
        batch={"x": fg.random.normal(k_x, (batch_size, widths[0])), "label": label},
        loss=loss,
        module=lambda: mlp_module(widths),
        module_loss=lambda module, batch: F.cross_entropy(module(batch["x"]), batch["label"]),
    )


def mix(batch: Batch) -> Tensor:
    """x_t = alpha x + sigma noise of the cosine schedule (Nichol and Dhariwal 2021, arXiv:2102.09672)."""
    angle = (0.5 * math.pi * batch["t"])[:, None, None, None]
    return angle.cos() * batch["image"] + angle.sin() * batch["noise"]


def unet(batch_size: int, side: int, base_channels: int = 32, num_groups: int = 8) -> Program:
    """Prediction of the noise by a U-Net; times and noise come with the batch, so that no draw enters the step."""
    net = fg.models.UNet(
        3, base_channels, channel_mults=(1, 2), num_blocks=1, attention_levels=(), num_classes=10,
        num_groups=num_groups, channels_last=True,
    )  # fmt: skip
    k_image, k_noise, k_t, k_label = fg.random.split(fg.random.key(1), 4)
    shape = (batch_size, 3, side, side)
    batch = {
        "image": fg.random.normal(k_image, shape),
        "noise": fg.random.normal(k_noise, shape),
        "t": fg.random.uniform(k_t, (batch_size,)),
        "label": fg.random.randint(k_label, (batch_size,), 0, 10).long(),
    }

    def loss(params: Params, key: Key, batch: Batch) -> Tensor:
        return (net(params, mix(batch), batch["t"], batch["label"]) - batch["noise"]).square().mean()

    def module() -> nn.Module:
        return UNetModule(3, base_channels, (1, 2), 1, (), num_classes=10, num_groups=num_groups)

    def module_loss(module: nn.Module, batch: Batch) -> Tensor:
        x_t = mix(batch)
        layout = torch.channels_last if batch["image"].is_contiguous(memory_format=torch.channels_last) else None
        x_t = x_t if layout is None else x_t.contiguous(memory_format=layout)
        return F.mse_loss(module(x_t, batch["t"], batch["label"]), batch["noise"])

    sizes = {"groups": num_groups, "levels": 2, "base_channels": base_channels}
    return Program("unet", sizes, initial(net), batch, loss, module, module_loss, images=True)


def gpt(batch_size: int, length: int, width: int, num_heads: int, num_layers: int, vocabulary: int = 256) -> Program:
    """Prediction of the next token."""
    sizes = {
        "vocabulary": vocabulary, "length": length, "width": width, "num_heads": num_heads, "num_layers": num_layers,
    }  # fmt: skip
    net = GPT(**sizes)

    def cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), batch["tokens"][:, 1:].flatten())

    def loss(params: Params, key: Key, batch: Batch) -> Tensor:
        return cross_entropy(net(params, batch["tokens"][:, :-1]), batch)

    tokens = fg.random.randint(fg.random.key(1), (batch_size, length + 1), 0, vocabulary).long()
    return Program(
        family="gpt",
        sizes=sizes,
        params=initial(net),
        batch={"tokens": tokens},
        loss=loss,
        module=lambda: GPTModule(**sizes),
        module_loss=lambda module, batch: cross_entropy(module(batch["tokens"][:, :-1]), batch),
    )


PROGRAMS: dict[str, Callable[[], Program]] = {
    "mlp": lambda: mlp((784, 512, 512, 10), batch_size=128),
    "tiny_mlp": lambda: mlp((64, 32, 32, 10), batch_size=32),
    "unet": lambda: unet(batch_size=32, side=16),
    "gpt": lambda: gpt(batch_size=8, length=128, width=192, num_heads=6, num_layers=4),
}
