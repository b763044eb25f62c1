"""Convolutional classifiers with batch normalisation: layers with state."""

from dataclasses import dataclass
from itertools import pairwise

import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from functorch_gen.check import check_shape
from functorch_gen.nn import (
    BatchNorm2d,
    Bound,
    Conv2d,
    Dropout,
    Identity,
    Linear,
    Sequential,
    init_parts,
    init_state_parts,
)
from functorch_gen.nn.sizes import check_sizes, freeze
from functorch_gen.typing import Key, Layer, Params, State

__all__ = ["CNN", "BasicBlock", "ConvBlock"]


@dataclass(frozen=True)
class ConvBlock:
    """relu(norm(conv(x))), at the same size: (..., c_in, h, w) -> (..., c_out, h, w).

    >>> import torch
    >>> from functorch_gen import random
    >>> block = ConvBlock(3, 8)
    >>> y, state = block(block.init(random.key(0)), block.init_state(), torch.ones(2, 3, 4, 4), train=True)
    >>> y.shape, sorted(state)
    (torch.Size([2, 8, 4, 4]), ['norm'])
    """

    in_channels: int
    out_channels: int
    kernel_size: int = 3
    axis_name: str | tuple[str, ...] | None = None

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        return {
            "conv": Conv2d(self.in_channels, self.out_channels, self.kernel_size, padding="same", bias=False),
            "norm": BatchNorm2d(self.out_channels, axis_name=self.axis_name),
        }

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def init_state(self) -> State:
        """The running statistics."""
        return init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        """Applies the block."""
        f = Bound(self.parts, params, state=state, train=train)
        return F.relu(f.norm(f.conv(x))), f.state


@dataclass(frozen=True)
class BasicBlock:
    """Residual block, relu(skip(x) + bn2(conv2(relu(bn1(conv1(x)))))): (..., c_in, h, w) -> (..., c_out, h', w').

    The skip is x itself, or a convolution of kernel size 1 where the shape changes. Parameters and state are named as
    in torchvision's ``resnet.BasicBlock``.

    Source: He et al. 2016, figure 2 and section 3.3 (option B), arXiv:1512.03385.

    >>> import torch
    >>> from functorch_gen import random
    >>> block = BasicBlock(8, 16, stride=2)
    >>> y, state = block(block.init(random.key(0)), block.init_state(), torch.ones(2, 8, 4, 4), train=True)
    >>> y.shape, sorted(state)
    (torch.Size([2, 16, 2, 2]), ['bn1', 'bn2', 'downsample'])
    """

    in_channels: int
    out_channels: int
    stride: int = 1
    axis_name: str | tuple[str, ...] | None = None

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        c_in, c_out, stride = self.in_channels, self.out_channels, self.stride
        return {
            "conv1": Conv2d(c_in, c_out, 3, stride, padding=1, bias=False),
            "bn1": BatchNorm2d(c_out, axis_name=self.axis_name),
            "conv2": Conv2d(c_out, c_out, 3, padding=1, bias=False),
            "bn2": BatchNorm2d(c_out, axis_name=self.axis_name),
            "downsample": self._skip(),
        }

    def _skip(self) -> Layer:
        if self.in_channels == self.out_channels and self.stride == 1:
            return Identity()
        conv = Conv2d(self.in_channels, self.out_channels, 1, self.stride, bias=False)
        return Sequential(conv, BatchNorm2d(self.out_channels, axis_name=self.axis_name))

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def init_state(self) -> State:
        """The running statistics."""
        return init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        """Applies the block."""
        f = Bound(self.parts, params, state=state, train=train)
        h = F.relu(f.bn1(f.conv1(x)))
        return F.relu(f.downsample(x) + f.bn2(f.conv2(h))), f.state


@dataclass(frozen=True)
class CNN:
    """Image classifier: (..., in_channels, h, w) -> logits (..., num_classes).

    For each entry of ``channels`` a :class:`ConvBlock` and a halving of height and width by their maxima; then the mean
    over the pixels, dropout and a linear layer.

    Args:
        dropout: before the linear layer, when a key is given.
        axis_name: of the examples whose statistics are taken together; see :class:`functorch_gen.nn.BatchNorm1d`.
    Raises:
        ValueError: for sizes that are not positive; when called, for an image smaller than 2^len(channels).

    >>> import torch
    >>> from functorch_gen import random
    >>> net = CNN(1, 10)
    >>> params, state = net.init(random.key(0)), net.init_state()
    >>> logits, state = net(params, state, torch.ones(2, 1, 8, 8), train=True)
    >>> logits.shape, sorted(state)
    (torch.Size([2, 10]), ['block0', 'block1'])
    """

    in_channels: int
    num_classes: int
    channels: tuple[int, ...] = (32, 64)
    kernel_size: int = 3
    dropout: float = 0.0
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        freeze(self)
        check_sizes("CNN", in_channels=self.in_channels, num_classes=self.num_classes)
        check_sizes("CNN", channels=self.channels, kernel_size=self.kernel_size)
        if not isinstance(self.channels, tuple):
            raise TypeError(f"CNN: expected channels to be a tuple of ints, got {self.channels!r}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"CNN: expected 0 <= dropout <= 1, got {self.dropout}")

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name: ``block0``, ``block1``, ..., ``dropout``, ``head``."""
        widths = (self.in_channels, *self.channels)
        blocks = {
            f"block{i}": ConvBlock(c_in, c_out, self.kernel_size, self.axis_name)
            for i, (c_in, c_out) in enumerate(pairwise(widths))
        }
        return {**blocks, "dropout": Dropout(self.dropout), "head": Linear(widths[-1], self.num_classes)}

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def init_state(self) -> State:
        """The running statistics of each block."""
        return init_state_parts(self.parts)

    def __call__(
        self, params: Params, state: State, x: Tensor, *, train: bool, key: Key | None = None
    ) -> tuple[Tensor, State]:
        """The logits and the new state.

        Args:
            key: draws the dropout; None: no dropout.
        """
        self._check_image(x)
        f = Bound(self.parts, params, state=state, key=key, train=train)
        for i in range(len(self.channels)):
            x = _halve(f[f"block{i}"](x))
        return f.head(f.dropout(x.mean((-2, -1)))), f.state

    def _check_image(self, x: Tensor) -> None:
        sizes = check_shape(x, "... c h w", "CNN: x", c=self.in_channels)
        smallest = 2 ** len(self.channels)
        if min(sizes["h"], sizes["w"]) < smallest:
            raise ValueError(f"CNN: x: expected height and width >= {smallest}, got {tuple(x.shape)}")


def _halve(x: Tensor) -> Tensor:
    """The maxima of squares of 2 by 2 pixels; an odd row or column at the end is left out."""
    h, w = (size // 2 * 2 for size in x.shape[-2:])
    return reduce(x[..., :h, :w], "... (h dy) (w dx) -> ... h w", "max", dy=2, dx=2)
