"""Element-wise activations as layers, with torch.nn's names and fields.

Where torch's second derivatives are missing or NaN, the formula is written out. Two derivatives are finite wherever x
is.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_choice, check_floating, check_number, check_positive
from functorch_gen.nn.sizes import check_nonnegative
from functorch_gen.numerics import safe_where
from functorch_gen.transforms import custom_jvp
from functorch_gen.typing import Key, Params

__all__ = [
    "CELU",
    "ELU",
    "GELU",
    "SELU",
    "Hardshrink",
    "Hardsigmoid",
    "Hardswish",
    "Hardtanh",
    "LeakyReLU",
    "LogSigmoid",
    "Mish",
    "ReLU",
    "ReLU6",
    "SiLU",
    "Sigmoid",
    "Softplus",
    "Softshrink",
    "Softsign",
    "Tanh",
    "Tanhshrink",
    "Threshold",
]


class _Elementwise(ABC):
    """A function of each element, without parameters: (...) -> (...)."""

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(type(self).__name__, name, value)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x: Tensor, *, key: Key | None = None) -> Tensor:
        """(...) -> (...)."""
        check_floating(x, f"{type(self).__name__}: x")
        return self._of(x)

    @abstractmethod
    def _of(self, x: Tensor) -> Tensor:
        """The function."""


# Piecewise linear.


@dataclass(frozen=True)
class ReLU(_Elementwise):
    """max(x, 0). Equals ``torch.nn.ReLU``.

    >>> ReLU()({}, torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.relu(x)


@dataclass(frozen=True)
class ReLU6(_Elementwise):
    """min(max(x, 0), 6). Equals ``torch.nn.ReLU6``.

    >>> ReLU6()({}, torch.tensor([-1.0, 2.0, 8.0]))
    tensor([0., 2., 6.])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.relu6(x)


@dataclass(frozen=True)
class LeakyReLU(_Elementwise):
    """x where x > 0, else ``negative_slope`` x. Equals ``torch.nn.LeakyReLU``.

    >>> LeakyReLU(0.5)({}, torch.tensor([-1.0, 2.0]))
    tensor([-0.5000,  2.0000])
    """

    negative_slope: float = 0.01

    def _of(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x, self.negative_slope)


@dataclass(frozen=True)
class Hardtanh(_Elementwise):
    """min(max(x, min_val), max_val). Equals ``torch.nn.Hardtanh``.

    >>> Hardtanh()({}, torch.tensor([-2.0, 0.5, 3.0]))
    tensor([-1.0000,  0.5000,  1.0000])
    """

    min_val: float = -1.0
    max_val: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.min_val < self.max_val:
            raise ValueError(f"Hardtanh: expected min_val < max_val, got {self.min_val} and {self.max_val}")

    def _of(self, x: Tensor) -> Tensor:
        return F.hardtanh(x, self.min_val, self.max_val)


@custom_jvp
def _hardsigmoid(x: Tensor) -> Tensor:
    return F.hardsigmoid(x)  # torch has no derivative of its derivative


_SIXTH = 0.1666666716337204  # in float32, as in torch's derivative, whatever the dtype
_hardsigmoid.defjvps(lambda tangent, y, x: torch.where(x.abs() < 3, _SIXTH * tangent, 0.0))


@dataclass(frozen=True)
class Hardsigmoid(_Elementwise):
    """min(max(x + 3, 0), 6) / 6. Equals ``torch.nn.Hardsigmoid``, and its slope of 1 / 6 rounded to float32.

    >>> Hardsigmoid()({}, torch.tensor([-4.0, 0.0, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])
    """

    def _of(self, x: Tensor) -> Tensor:
        return _hardsigmoid(x)


@dataclass(frozen=True)
class Hardswish(_Elementwise):
    """x min(max(x + 3, 0), 6) / 6. Equals ``torch.nn.Hardswish``. Source: Howard et al. 2019, arXiv:1905.02244.

    >>> Hardswish()({}, torch.tensor([-4.0, 1.0, 4.0]))
    tensor([-0.0000,  0.6667,  4.0000])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.hardswish(x)


@dataclass(frozen=True)
class Hardshrink(_Elementwise):
    """x where |x| > ``lambd``, else 0. Equals ``torch.nn.Hardshrink``.

    >>> Hardshrink()({}, torch.tensor([-1.0, 0.2]))
    tensor([-1.,  0.])
    """

    lambd: float = 0.5

    def __post_init__(self) -> None:
        check_nonnegative("Hardshrink", lambd=self.lambd)

    def _of(self, x: Tensor) -> Tensor:
        return F.hardshrink(x, self.lambd)


@dataclass(frozen=True)
class Softshrink(_Elementwise):
    """sign(x) max(|x| - lambd, 0). Equals ``torch.nn.Softshrink``.

    >>> Softshrink()({}, torch.tensor([-1.0, 0.2]))
    tensor([-0.5000,  0.0000])
    """

    lambd: float = 0.5

    def __post_init__(self) -> None:
        check_nonnegative("Softshrink", lambd=self.lambd)

    def _of(self, x: Tensor) -> Tensor:
        return F.softshrink(x, self.lambd)


@dataclass(frozen=True)
class Threshold(_Elementwise):
    """x where x > ``threshold``, else ``value``. Equals ``torch.nn.Threshold``.

    >>> Threshold(0.5, 9.0)({}, torch.tensor([0.2, 1.0]))
    tensor([9., 1.])
    """

    threshold: float
    value: float

    def _of(self, x: Tensor) -> Tensor:
        return F.threshold(x, self.threshold, self.value)


# Exponential.


@dataclass(frozen=True)
class ELU(_Elementwise):
    """x where x > 0, else alpha (exp(x) - 1). Equals ``torch.nn.ELU``. Source: Clevert et al. 2015, arXiv:1511.07289.

    >>> ELU()({}, torch.tensor([-100.0, 2.0]))
    tensor([-1.,  2.])
    """

    alpha: float = 1.0

    def _of(self, x: Tensor) -> Tensor:
        return F.elu(x, self.alpha)


@dataclass(frozen=True)
class CELU(_Elementwise):
    """x where x > 0, else alpha (exp(x / alpha) - 1). Equals ``torch.nn.CELU``. Source: Barron 2017, arXiv:1704.07483.

    >>> CELU(2.0)({}, torch.tensor([-100.0, 2.0]))
    tensor([-2.,  2.])
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        check_positive("CELU", alpha=self.alpha)

    def _of(self, x: Tensor) -> Tensor:
        return F.celu(x, self.alpha)


@dataclass(frozen=True)
class SELU(_Elementwise):
    """1.0507 times :class:`ELU` with alpha = 1.6733: keeps mean 0 and variance 1. Equals ``torch.nn.SELU``.

    Source: Klambauer et al. 2017, eq. 2, arXiv:1706.02515.

    >>> SELU()({}, torch.tensor([-100.0, 1.0]))
    tensor([-1.7581,  1.0507])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.selu(x)


@dataclass(frozen=True)
class GELU(_Elementwise):
    """x Phi(x), Phi the normal distribution function. Equals ``torch.nn.GELU``.

    Args:
        approximate: "tanh": x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))).
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.

    >>> GELU()({}, torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8413])
    """

    approximate: str = "none"

    def __post_init__(self) -> None:
        check_choice("GELU", "approximate", self.approximate, ("none", "tanh"))

    def _of(self, x: Tensor) -> Tensor:
        near = x.abs() < 100  # beyond, it is max(x, 0) in every dtype, but the derivatives' powers of x overflow
        return safe_where(near, lambda x: F.gelu(x, approximate=self.approximate), x, otherwise=F.relu(x))


@dataclass(frozen=True)
class SiLU(_Elementwise):
    """x sigmoid(x). Equals ``torch.nn.SiLU``; with another slope, or a trained one: :class:`Swish`.

    >>> SiLU()({}, torch.tensor([-100.0, 1.0]))
    tensor([-0.0000, 0.7311])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.silu(x)


@dataclass(frozen=True)
class Mish(_Elementwise):
    """x tanh(log(1 + exp(x))). Equals ``torch.nn.Mish``, whose second derivatives are NaN for large x.

    Source: Misra 2019, arXiv:1908.08681.

    >>> Mish()({}, torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.8651])
    """

    def _of(self, x: Tensor) -> Tensor:
        near = x < 50  # beyond, it is x in every dtype, but the derivatives' products with x overflow
        return safe_where(near, lambda x: x * torch.tanh(F.softplus(x)), x, otherwise=x)


@dataclass(frozen=True)
class Softplus(_Elementwise):
    """log(1 + exp(beta x)) / beta, and x where beta x > ``threshold``. Equals ``torch.nn.Softplus``.

    >>> Softplus()({}, torch.tensor([-1000.0, 0.0, 1000.0]))
    tensor([0.0000e+00, 6.9315e-01, 1.0000e+03])
    """

    beta: float = 1.0
    threshold: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta == 0 or not math.isfinite(self.beta):
            raise ValueError(f"Softplus: expected beta to be finite and not 0, got {self.beta}")

    def _of(self, x: Tensor) -> Tensor:
        threshold = min(self.threshold, 50.0)  # from there log(1 + exp(x)) is x in float64; exp(x) may overflow
        return F.softplus(x, self.beta, threshold)


@dataclass(frozen=True)
class LogSigmoid(_Elementwise):
    """log(1 / (1 + exp(-x))). Equals ``torch.nn.LogSigmoid``.

    >>> LogSigmoid()({}, torch.tensor([-1000.0, 0.0]))
    tensor([-1.0000e+03, -6.9315e-01])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.logsigmoid(x)


# Squashing.


@dataclass(frozen=True)
class Sigmoid(_Elementwise):
    """1 / (1 + exp(-x)). Equals ``torch.nn.Sigmoid``.

    >>> Sigmoid()({}, torch.tensor([-1000.0, 0.0]))
    tensor([0.0000, 0.5000])
    """

    def _of(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


@dataclass(frozen=True)
class Tanh(_Elementwise):
    """tanh(x). Equals ``torch.nn.Tanh``.

    >>> Tanh()({}, torch.tensor([0.0, 1000.0]))
    tensor([0., 1.])
    """

    def _of(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


@dataclass(frozen=True)
class Tanhshrink(_Elementwise):
    """x - tanh(x). Equals ``torch.nn.Tanhshrink``.

    >>> Tanhshrink()({}, torch.tensor([0.0, 1000.0]))
    tensor([  0., 999.])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.tanhshrink(x)


@dataclass(frozen=True)
class Softsign(_Elementwise):
    """x / (1 + |x|). Equals ``torch.nn.Softsign``.

    >>> Softsign()({}, torch.tensor([-1.0, 3.0]))
    tensor([-0.5000,  0.7500])
    """

    def _of(self, x: Tensor) -> Tensor:
        return F.softsign(x)
