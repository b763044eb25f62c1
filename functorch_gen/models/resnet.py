"""Residual networks: classifiers of images, and extractors of features."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_choice, check_shape
from functorch_gen.models.cnn import BasicBlock
from functorch_gen.nn import BatchNorm2d, Bound, Conv2d, Linear, MaxPool2d, Sequential, init_parts, init_state_parts
from functorch_gen.nn.sizes import check_sizes, freeze
from functorch_gen.typing import Key, Layer, Params, State

__all__ = ["ResNet"]


@dataclass(frozen=True)
class ResNet:
    """Residual classifier of :class:`BasicBlock`: (..., in_channels, h, w) -> logits (..., num_classes).

    The defaults are ResNet-18, parameters and state named as in ``torchvision.models.resnet18`` (``conv1``,
    ``layer1.0.bn1``, ``fc``), so that its weights load by :func:`functorch_gen.tree.from_names`. With ``blocks``
    (3, 4, 6, 3) it is ResNet-34. Each stage but the first halves height and width.

    Args:
        blocks: how many of each stage.
        channels: of each stage.
        stem: "imagenet" begins with a 7 by 7 convolution of stride 2 and a maximum of stride 2, for pictures of 200
            pixels; "cifar" with one 3 by 3 convolution of stride 1, for small ones.
        axis_name: of the examples whose statistics are taken together; see :class:`functorch_gen.nn.BatchNorm1d`.
    Raises:
        ValueError: for sizes that are not positive, or if there are not as many ``blocks`` as ``channels``.

    Source: He et al. 2016, table 1 and section 4.2, arXiv:1512.03385.

    >>> import torch
    >>> from functorch_gen import random
    >>> net = ResNet(3, 10, blocks=(1, 1), channels=(8, 16), stem="cifar")
    >>> params, state = net.init(random.key(0)), net.init_state()
    >>> logits, state = net(params, state, torch.ones(2, 3, 8, 8), train=True)
    >>> logits.shape, sorted(params)
    (torch.Size([2, 10]), ['bn1', 'conv1', 'fc', 'layer1', 'layer2'])
    """

    in_channels: int = 3
    num_classes: int = 1000
    blocks: Sequence[int] = (2, 2, 2, 2)
    channels: Sequence[int] = (64, 128, 256, 512)
    stem: str = "imagenet"
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("ResNet", in_channels=self.in_channels, num_classes=self.num_classes)
        check_sizes("ResNet", dims=len(self.channels), blocks=self.blocks, channels=self.channels)
        check_choice("ResNet", "stem", self.stem, ("imagenet", "cifar"))

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        first = self.channels[0]
        size, stride, padding = (7, 2, 3) if self.stem == "imagenet" else (3, 1, 1)
        parts: dict[str, Layer] = {
            "conv1": Conv2d(self.in_channels, first, size, stride, padding, bias=False),
            "bn1": BatchNorm2d(first, axis_name=self.axis_name),
            "maxpool": MaxPool2d(3, stride=2, padding=1),
        }
        for i, (c_in, c_out) in enumerate(pairwise((first, *self.channels))):
            strides = (2 if i else 1, *[1] * (self.blocks[i] - 1))
            inputs = (c_in, *[c_out] * (self.blocks[i] - 1))
            blocks = [BasicBlock(c, c_out, s, self.axis_name) for c, s in zip(inputs, strides, strict=True)]
            parts[f"layer{i + 1}"] = Sequential(*blocks)
        return {**parts, "fc": Linear(self.channels[-1], self.num_classes)}

    def init(self, key: Key) -> Params:
        """Draws the parameters, as torch.nn does."""
        return init_parts(self.parts, key)

    def init_state(self) -> State:
        """The running statistics."""
        return init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        """The logits and the new state."""
        f = Bound(self.parts, params, state=state, train=train)
        return f.fc(self._features(f, x)), f.state

    def features(self, params: Params, state: State, x: Tensor, *, train: bool) -> tuple[Tensor, State]:
        """What the last layer reads, and the new state: (..., in_channels, h, w) -> (..., channels[-1]).

        >>> import torch
        >>> from functorch_gen import random
        >>> net = ResNet(1, 10, blocks=(1,), channels=(4,), stem="cifar")
        >>> net.features(net.init(random.key(0)), net.init_state(), torch.ones(2, 1, 8, 8), train=False)[0].shape
        torch.Size([2, 4])
        """
        f = Bound(self.parts, params, state=state, train=train)
        return self._features(f, x), f.state

    def _features(self, f: Bound, x: Tensor) -> Tensor:
        check_shape(x, "... c h w", "ResNet: x", c=self.in_channels)
        h = F.relu(f.bn1(f.conv1(x)))
        h = f.maxpool(h) if self.stem == "imagenet" else h
        for i in range(len(self.channels)):
            h = f[f"layer{i + 1}"](h)
        return h.mean((-2, -1))
