"""Activations along an axis, with parameters or with a key: softmax, gated, trained and random slopes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.nn.parts import entry
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.transforms import custom_jvp
from functorch_gen.typing import Key, Number, Params

__all__ = ["GLU", "LogSoftmax", "PReLU", "RReLU", "Softmax", "Softmax2d", "Softmin", "Swish", "swish"]


@dataclass(frozen=True)
class _AlongAxis:
    """An activation along the axis ``dim``, without parameters."""

    dim: int

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.dim, bool) or not isinstance(self.dim, int):
            raise TypeError(f"{type(self).__name__}: expected dim to be an int, got {self.dim!r}")

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}


@dataclass(frozen=True)
class Softmax(_AlongAxis):
    """exp(x) / sum(exp(x)) along ``dim``. Equals ``torch.nn.Softmax``, without its implicit choice of an axis.

    >>> Softmax(-1)({}, torch.tensor([0.0, 1000.0, 1000.0]))
    tensor([0.0000, 0.5000, 0.5000])
    """

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        check_floating(x, "Softmax: x")
        return F.softmax(x, self.dim)


@dataclass(frozen=True)
class Softmin(_AlongAxis):
    """exp(-x) / sum(exp(-x)) along ``dim``. Equals ``torch.nn.Softmin``.

    >>> Softmin(-1)({}, torch.tensor([0.0, 1000.0, 0.0]))
    tensor([0.5000, 0.0000, 0.5000])
    """

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        check_floating(x, "Softmin: x")
        return F.softmax(-x, self.dim)


@dataclass(frozen=True)
class LogSoftmax(_AlongAxis):
    """x - log(sum(exp(x))) along ``dim``. Equals ``torch.nn.LogSoftmax``.

    >>> LogSoftmax(-1)({}, torch.tensor([0.0, 1000.0]))
    tensor([-1000.,     0.])
    """

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        check_floating(x, "LogSoftmax: x")
        return F.log_softmax(x, self.dim)


@dataclass(frozen=True)
class Softmax2d:
    """Softmax over the channels of images: (..., c, h, w) -> the same. Equals ``torch.nn.Softmax2d``.

    >>> Softmax2d()({}, torch.zeros(2, 1, 1)).flatten()
    tensor([0.5000, 0.5000])
    """

    draws: ClassVar[bool] = False

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., c, h, w) -> (..., c, h, w)."""
        check_shape(x, "... c h w", "Softmax2d: x")
        check_floating(x, "Softmax2d: x")
        return F.softmax(x, -3)


@dataclass(frozen=True)
class GLU(_AlongAxis):
    """a sigmoid(b), where a and b are the halves of x along ``dim``. Equals ``torch.nn.GLU``.

    Source: Dauphin et al. 2016, arXiv:1612.08083.

    >>> GLU()({}, torch.tensor([3.0, 4.0, 0.0, 1000.0]))
    tensor([1.5000, 4.0000])
    """

    dim: int = -1

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., 2 n, ...) -> (..., n, ...)."""
        check_floating(x, "GLU: x")
        if x.shape[self.dim] % 2:
            raise ValueError(f"GLU: x: expected an even size of axis {self.dim}, got {tuple(x.shape)}")
        a, b = x.chunk(2, self.dim)  # F.glu has no derivative of its forward rule
        return a * torch.sigmoid(b)


@dataclass(frozen=True)
class PReLU:
    """x where x > 0, else weight x, with one weight or one for each channel: (b, c, ...) -> the same.

    Equals ``torch.nn.PReLU``, whose field ``init`` is ``initial`` here. Source: He et al. 2015, eq. 1,
    arXiv:1502.01852.

    >>> layer = PReLU()
    >>> layer(layer.init(random.key(0)), torch.tensor([-1.0, 2.0]))
    tensor([-0.2500,  2.0000])
    """

    num_parameters: int = 1
    initial: float = 0.25

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes("PReLU", num_parameters=self.num_parameters)
        check_number("PReLU", "initial", self.initial)

    def init(self, key: Key) -> Params:
        """``weight`` (num_parameters,), all ``initial``."""
        return {"weight": torch.full((self.num_parameters,), float(self.initial), device=key.device)}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(b, c, ...) -> (b, c, ...); with one parameter any shape."""
        check_floating(x, "PReLU: x")
        n = self.num_parameters
        if n > 1 and (x.ndim < 2 or x.shape[1] != n):
            raise ValueError(f"PReLU: x: expected shape (b, c={n}, ...), got {tuple(x.shape)}")
        weight = entry("PReLU", params, "weight")
        weight = weight.reshape(n, *(1,) * (x.ndim - 2)) if n > 1 else weight.squeeze(0)
        return torch.where(x > 0, x, weight * x)  # vmap does not know the derivatives of F.prelu in both modes


@dataclass(frozen=True)
class RReLU:
    """x where x > 0, else a x, with a ~ U(lower, upper) for each element; (lower + upper) / 2 without a key.

    Equals ``torch.nn.RReLU`` in evaluation; in training torch draws from its global generator. Source: Xu et al. 2015,
    arXiv:1505.00853.

    >>> RReLU(0.2, 0.4)({}, torch.tensor([-1.0, 2.0]))
    tensor([-0.3000,  2.0000])
    """

    lower: float = 1 / 8
    upper: float = 1 / 3

    def __post_init__(self) -> None:
        check_number("RReLU", "lower", self.lower)
        check_number("RReLU", "upper", self.upper)
        if not self.lower <= self.upper:
            raise ValueError(f"RReLU: expected lower <= upper, got {self.lower} and {self.upper}")

    @property
    def draws(self) -> bool:
        """Whether a call with a key draws from it."""
        return self.lower < self.upper

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        check_floating(x, "RReLU: x")
        if key is None or not self.draws:
            return F.leaky_relu(x, (self.lower + self.upper) / 2)
        slope = random.uniform(key, tuple(x.shape), minval=self.lower, maxval=self.upper)
        return torch.where(x > 0, x, slope.to(x.dtype) * x)


# Swish.


@custom_jvp
def _swish(x: Tensor, beta: Number) -> Tensor:
    return x * torch.sigmoid(beta * x)


@_swish.defjvp
def _swish_jvp(primals: tuple[Tensor, Number], tangents: tuple[Tensor, Any]) -> tuple[Tensor, Tensor]:
    (x, beta), (along_x, along_beta) = primals, tangents
    s = torch.sigmoid(beta * x)
    curve = x * (s * torch.sigmoid(-(beta * x)))  # x s'(beta x); 1 - s would cancel
    moved = (s + beta * curve) * along_x
    moved = moved + x * curve * along_beta if isinstance(along_beta, Tensor) else moved  # beta may be a number
    return _swish(x, beta), moved


def swish(x: Tensor, beta: Number = 1.0) -> Tensor:
    """x sigmoid(beta x); for the backward pass only x (and beta) is kept: (...) -> (...).

    With beta = 1 it is ``F.silu``, with large beta it nears relu. Written out, three tensors of the size of x would be
    kept. Its derivatives of all orders come from one rule (:class:`functorch_gen.transforms.custom_jvp`).

    Args:
        beta: a number, or a tensor that broadcasts to x; it has derivatives too.
    Raises:
        TypeError: if x is not floating.
    Source: Ramachandran et al. 2017, arXiv:1710.05941.

    >>> from functorch_gen.transforms import grad
    >>> swish(torch.tensor([-1000.0, 1.0])), grad(swish)(torch.tensor(0.0))
    (tensor([-0.0000, 0.7311]), tensor(0.5000))
    """
    check_floating(x, "swish: x")
    return _swish(x, beta)


@dataclass(frozen=True)
class Swish:
    """:func:`swish` as a layer, with ``beta`` fixed or, when ``trainable``, its initial value: (...) -> (...).

    >>> layer = Swish(trainable=True)
    >>> layer.init(random.key(0)), layer(layer.init(random.key(0)), torch.tensor([0.0, 1.0]))
    ({'beta': tensor(1.)}, tensor([0.0000, 0.7311]))
    """

    beta: float = 1.0
    trainable: bool = False

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("Swish", "beta", self.beta)

    def init(self, key: Key) -> Params:
        """``beta`` () when ``trainable``, else nothing."""
        return {"beta": torch.full((), float(self.beta), device=key.device)} if self.trainable else {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        return swish(x, entry("Swish", params, "beta") if self.trainable else self.beta)
