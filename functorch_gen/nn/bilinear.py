"""Layers of two inputs: a bilinear form, similarity, distance."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.nn.init import init_affine
from functorch_gen.nn.parts import weight_and_bias
from functorch_gen.nn.sizes import check_nonnegative, check_sizes
from functorch_gen.typing import Key, Params

__all__ = ["Bilinear", "CosineSimilarity", "PairwiseDistance"]


@dataclass(frozen=True)
class Bilinear:
    """y_o = x1^T W_o x2 + b_o: (..., in1_features), (..., in2_features) -> (..., out_features).

    Equals ``torch.nn.Bilinear``, initial distribution included.

    >>> from functorch_gen import random
    >>> layer = Bilinear(3, 4, 2)
    >>> layer(layer.init(random.key(0)), torch.ones(5, 3), torch.ones(5, 4)).shape
    torch.Size([5, 2])
    """

    in1_features: int
    in2_features: int
    out_features: int
    bias: bool = True

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        sizes = {"in1_features": self.in1_features, "in2_features": self.in2_features}
        check_sizes("Bilinear", **sizes, out_features=self.out_features)

    def init(self, key: Key) -> Params:
        """``weight`` (out, in1, in2) and ``bias`` (out,): U(-b, b), b = 1 / sqrt(in1)."""
        shape = (self.out_features, self.in1_features, self.in2_features)
        return init_affine(key, shape, fan_in=shape[1], bias_size=shape[0] if self.bias else None)

    def __call__(self, params: Params, x1: Tensor, x2: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., in1_features), (..., in2_features) -> (..., out_features)."""
        check_shape(x1, "... n", "Bilinear: x1", n=self.in1_features)
        check_shape(x2, "... n", "Bilinear: x2", n=self.in2_features)
        weight, bias = weight_and_bias("Bilinear", params, bias=self.bias)
        y = torch.einsum("...i,oij,...j->...o", x1, weight, x2)
        return y if bias is None else y + bias


@dataclass(frozen=True)
class CosineSimilarity:
    """x1.x2 / (max(|x1|, eps) max(|x2|, eps)) along ``dim``. Equals ``torch.nn.CosineSimilarity``.

    >>> CosineSimilarity()({}, torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    tensor([0.6000])
    """

    dim: int = 1
    eps: float = 1e-8

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_nonnegative("CosineSimilarity", eps=self.eps)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x1: Tensor, x2: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., n, ...), (..., n, ...) -> (..., ...)."""
        check_floating(x1, "CosineSimilarity: x1")
        check_floating(x2, "CosineSimilarity: x2")
        return F.cosine_similarity(x1, x2, self.dim, self.eps)


@dataclass(frozen=True)
class PairwiseDistance:
    """(sum |x1 - x2 + eps|^p)^(1/p) along the last axis: (..., n), (..., n) -> (...).

    Equals ``torch.nn.PairwiseDistance``.

    >>> PairwiseDistance()({}, torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    tensor([5.])
    """

    p: float = 2.0
    eps: float = 1e-6
    keepdim: bool = False

    draws: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number("PairwiseDistance", "p", self.p)
        check_nonnegative("PairwiseDistance", eps=self.eps)

    def init(self, key: Key) -> Params:
        """No parameters."""
        return {}

    def __call__(self, params: Params, x1: Tensor, x2: Tensor, *, key: Key | None = None) -> Tensor:
        """(..., n), (..., n) -> (...)."""
        check_floating(x1, "PairwiseDistance: x1")
        check_floating(x2, "PairwiseDistance: x2")
        return F.pairwise_distance(x1, x2, self.p, self.eps, self.keepdim)
