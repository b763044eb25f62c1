"""Initial distributions as functions of a key: ``f(key, shape, dtype)``, with the names and laws of ``torch.nn.init``.

Layers draw from those that ``torch.nn`` draws from; :func:`initialize` draws chosen parameters from others.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_choice
from functorch_gen.nn.parts import name_key
from functorch_gen.typing import Key, Params

__all__ = [
    "Initializer",
    "calculate_gain",
    "constant",
    "dirac",
    "fan_in_uniform",
    "fans",
    "init_affine",
    "initialize",
    "kaiming_normal",
    "kaiming_uniform",
    "lecun_normal",
    "normal",
    "ones",
    "orthogonal",
    "scaled_residual",
    "trunc_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]

_Shape = Sequence[int]
Initializer = Callable[[Key, _Shape, torch.dtype], Tensor]
"""``f(key, shape, dtype) -> tensor``: any function of this module, its options bound by ``functools.partial``."""

_TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of the standard normal law within (-2, 2)."""


def initialize(params: Params, initializers: Mapping[str, Initializer], key: Key) -> Params:
    """``params`` with the leaves that globs choose drawn anew; shapes, dtypes and the other leaves stay.

    The leaf ``path`` draws from ``fold_in(key, crc32(path))``, so what else is chosen does not matter to it.

    Args:
        initializers: by glob on the path (``"*.weight"``); of several that match a path, the last holds.
    Raises:
        ValueError: if a glob matches no path; if a law has no meaning for a leaf's shape (names its path).

    >>> from functorch_gen import nn
    >>> params = nn.MLP(3, (4,), 2).init(random.key(0))
    >>> params = initialize(params, {"*.weight": kaiming_normal, "2.*": zeros, "*.bias": zeros}, random.key(1))
    >>> {path: bool(x.any()) for path, x in tree.names(params).items()}
    {'0.bias': False, '0.weight': True, '2.bias': False, '2.weight': False}
    """
    chosen: dict[str, Initializer] = {}
    for glob, initializer in initializers.items():
        chosen.update(dict.fromkeys(tree.paths(tree.partition(params, glob)[0]), initializer))

    def draw(path: str, x: Tensor) -> Tensor:
        if path not in chosen:
            return x
        try:
            return chosen[path](name_key(key, path), tuple(x.shape), x.dtype)
        except ValueError as error:
            raise ValueError(f"initialize: {path!r}: {error}") from error

    return tree.map_with_path(draw, params)


# Constants, and laws that do not look at the shape.


def constant(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, value: float) -> Tensor:
    """``value`` everywhere.

    >>> constant(random.key(0), (2,), value=0.5)
    tensor([0.5000, 0.5000])
    """
    return torch.full(tuple(shape), value, dtype=dtype, device=key.device)


def zeros(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """0 everywhere.

    >>> zeros(random.key(0), (2,))
    tensor([0., 0.])
    """
    return constant(key, shape, dtype, value=0.0)


def ones(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """1 everywhere.

    >>> ones(random.key(0), (2,))
    tensor([1., 1.])
    """
    return constant(key, shape, dtype, value=1.0)


def uniform(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, a: float = 0.0, b: float = 1.0) -> Tensor:
    """U(a, b).

    >>> bool(uniform(random.key(0), (9,), a=2.0, b=3.0).min() >= 2)
    True
    """
    return random.uniform(key, tuple(shape), dtype, a, b)


def normal(
    key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """N(mean, std^2).

    >>> normal(random.key(0), (2,), mean=3.0, std=0.0)
    tensor([3., 3.])
    """
    return mean + std * random.normal(key, tuple(shape), dtype)


def trunc_normal(
    key: Key,
    shape: _Shape,
    dtype: torch.dtype = torch.float32,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    a: float = -2.0,
    b: float = 2.0,
) -> Tensor:
    """N(mean, std^2) given that it lies in (a, b), which are values, not multiples of std; as ``torch.nn.init``'s.

    >>> bool(trunc_normal(random.key(0), (99,), std=0.02, a=-0.04, b=0.04).abs().max() < 0.04)
    True
    """
    return mean + std * random.truncated_normal(key, (a - mean) / std, (b - mean) / std, tuple(shape), dtype)


def scaled_residual(
    key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, num_layers: int, std: float = 0.02
) -> Tensor:
    """N(0, std^2 / (2 num_layers)): for what ends a residual branch, two for each layer, whose sum then has scale std.

    Source: Radford et al. 2019, section 2.3, "Language models are unsupervised multitask learners".

    >>> scaled_residual(random.key(0), (2, 3), num_layers=12).shape
    torch.Size([2, 3])
    """
    return normal(key, shape, dtype, std=std / math.sqrt(2 * num_layers))


# Laws whose variance follows from the shape.


def fans(shape: _Shape) -> tuple[int, int]:
    """How many inputs an output has and how many outputs an input has, for a weight (out, in, *kernel).

    Raises:
        ValueError: if the shape has fewer than two axes.

    >>> fans((8, 4, 3, 3))
    (36, 72)
    """
    if len(shape) < 2:
        raise ValueError(f"fans: expected a shape (out, in, ...), got {tuple(shape)}")
    kernel = math.prod(shape[2:])
    return shape[1] * kernel, shape[0] * kernel


def variance_scaling(
    key: Key,
    shape: _Shape,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
    mode: str = "fan_in",
    distribution: str = "truncated_normal",
) -> Tensor:
    """Mean 0, variance ``scale / fan``: the laws of Glorot, He and LeCun are instances.

    Equals ``jax.nn.initializers.variance_scaling(..., in_axis=1, out_axis=0)`` up to rounding.

    Args:
        mode: "fan_in", "fan_out", or "fan_avg", their mean; see :func:`fans`.
        distribution: "normal", "uniform", or "truncated_normal", whose draws are within two standard deviations of the
            normal law that is cut.
    Raises:
        ValueError: for another mode or distribution; if the shape has fewer than two axes.

    >>> bool(variance_scaling(random.key(0), (4, 3), distribution="uniform").abs().max() <= 1)
    True
    """
    check_choice("variance_scaling", "mode", mode, ("fan_in", "fan_out", "fan_avg"))
    check_choice("variance_scaling", "distribution", distribution, ("truncated_normal", "normal", "uniform"))
    fan_in, fan_out = fans(shape)
    fan = {"fan_in": fan_in, "fan_out": fan_out, "fan_avg": (fan_in + fan_out) / 2}[mode]
    std = math.sqrt(scale / max(fan, 1))
    if distribution == "uniform":
        bound = math.sqrt(3) * std
        return uniform(key, shape, dtype, a=-bound, b=bound)
    if distribution == "normal":
        return normal(key, shape, dtype, std=std)
    return std / _TRUNCATED_STD * random.truncated_normal(key, -2.0, 2.0, tuple(shape), dtype)


def xavier_uniform(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, gain: float = 1.0) -> Tensor:
    """U(-b, b) with b = gain sqrt(6 / (fan_in + fan_out)).

    Source: Glorot and Bengio 2010, eq. 16.

    >>> bool(xavier_uniform(random.key(0), (4, 2)).abs().max() <= 1.0)
    True
    """
    return variance_scaling(key, shape, dtype, scale=gain**2, mode="fan_avg", distribution="uniform")


def xavier_normal(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, gain: float = 1.0) -> Tensor:
    """N(0, s^2) with s = gain sqrt(2 / (fan_in + fan_out)).

    Source: Glorot and Bengio 2010, eq. 12.

    >>> xavier_normal(random.key(0), (4, 2)).shape
    torch.Size([4, 2])
    """
    return variance_scaling(key, shape, dtype, scale=gain**2, mode="fan_avg", distribution="normal")


def kaiming_uniform(
    key: Key,
    shape: _Shape,
    dtype: torch.dtype = torch.float32,
    *,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
) -> Tensor:
    """U(-b, b) with b = gain sqrt(3 / fan).

    Args:
        a: slope of the leaky ReLU that follows; 0: ReLU.
        mode: "fan_in" keeps the variance of the outputs, "fan_out" that of the gradients.
        nonlinearity: see :func:`calculate_gain`.
    Source: He et al. 2015, eq. 15, arXiv:1502.01852.

    >>> bool(kaiming_uniform(random.key(0), (4, 6)).abs().max() <= 1)
    True
    """
    scale = calculate_gain(nonlinearity, a) ** 2
    return variance_scaling(key, shape, dtype, scale=scale, mode=mode, distribution="uniform")


def kaiming_normal(
    key: Key,
    shape: _Shape,
    dtype: torch.dtype = torch.float32,
    *,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
) -> Tensor:
    """N(0, s^2) with s = gain / sqrt(fan); the arguments are those of :func:`kaiming_uniform`.

    Source: He et al. 2015, eq. 15, arXiv:1502.01852.

    >>> kaiming_normal(random.key(0), (4, 6), mode="fan_out", nonlinearity="relu").shape
    torch.Size([4, 6])
    """
    scale = calculate_gain(nonlinearity, a) ** 2
    return variance_scaling(key, shape, dtype, scale=scale, mode=mode, distribution="normal")


def lecun_normal(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32) -> Tensor:
    """The normal law of variance 1 / fan_in, cut at two standard deviations; as ``jax.nn.initializers.lecun_normal``.

    Source: Klambauer et al. 2017, appendix C, arXiv:1706.02515.

    >>> lecun_normal(random.key(0), (4, 6)).shape
    torch.Size([4, 6])
    """
    return variance_scaling(key, shape, dtype)


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """What a layer's weights are multiplied by so that the nonlinearity after it keeps the scale; torch's numbers.

    Args:
        param: slope of "leaky_relu"; 0.01 when None.
    Raises:
        ValueError: for a name that torch does not have.

    >>> calculate_gain("relu") ** 2
    2.0000000000000004
    """
    slope = 0.01 if param is None else param
    gains = {
        **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "sigmoid"), 1.0),
        **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1.0),
        "tanh": 5 / 3,
        "relu": math.sqrt(2),
        "leaky_relu": math.sqrt(2 / (1 + slope**2)),
        "selu": 3 / 4,
    }
    check_choice("calculate_gain", "nonlinearity", nonlinearity, gains)
    return gains[nonlinearity]


# Laws of whole matrices.


def orthogonal(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, gain: float = 1.0) -> Tensor:
    """gain Q with orthonormal rows or columns, whichever are fewer, of the weight as a matrix (out, in * kernel).

    Raises:
        ValueError: if the shape has fewer than two axes.
    Source: Saxe et al. 2014, arXiv:1312.6120.

    >>> q = orthogonal(random.key(0), (2, 3, 2))
    >>> torch.allclose(torch.einsum("oik,pik->op", q, q), torch.eye(2), atol=1e-6)
    True
    """
    fans(shape)  # has two axes
    drawn = torch.promote_types(dtype, torch.float32)
    q = random.orthogonal(key, shape[0], dtype=drawn, m=math.prod(shape[1:]))
    return gain * q.reshape(tuple(shape)).to(dtype)


def dirac(key: Key, shape: _Shape, dtype: torch.dtype = torch.float32, *, groups: int = 1) -> Tensor:
    """The convolution that hands its channels on: 1 at the centre of kernel (c, c) in each group, 0 elsewhere.

    Raises:
        ValueError: if the shape is not (out, in / groups, *kernel) with 1 to 3 axes of the kernel; if ``groups`` does
            not divide out.
    Source: ``torch.nn.init.dirac_``.

    >>> dirac(random.key(0), (2, 2, 3))
    tensor([[[0., 1., 0.],
             [0., 0., 0.]],
    <BLANKLINE>
            [[0., 0., 0.],
             [0., 1., 0.]]])
    """
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"dirac: expected a shape (out, in, *kernel) of 3 to 5 axes, got {tuple(shape)}")
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"dirac: expected a number of outputs divisible by groups={groups}, got {shape[0]}")
    hits = torch.eye(shape[0] // groups, shape[1], dtype=dtype, device=key.device).repeat(groups, 1)
    for size in shape[2:]:
        centre = torch.arange(size, device=key.device) == size // 2
        hits = hits.unsqueeze(-1) * centre.to(dtype)
    return hits


# What torch's linear and convolution layers start from.


def fan_in_uniform(key: Key, shape: _Shape, fan_in: int, gain: float = 1.0) -> Tensor:
    """U(-b, b) with b = gain / sqrt(fan_in): the weights and biases of torch's linear and convolution layers.

    It is He's uniform law with a = sqrt(5). Source: He et al. 2015, arXiv:1502.01852; ``torch.nn.Linear``.

    >>> bool(fan_in_uniform(random.key(0), (2, 16), fan_in=16).abs().max() <= 0.25)
    True
    """
    bound = gain / math.sqrt(fan_in)
    return uniform(key, shape, a=-bound, b=bound)


def init_affine(key: Key, shape: tuple[int, ...], *, fan_in: int, bias_size: int | None, gain: float = 1.0) -> Params:
    """``{"weight": shape, "bias": (bias_size,)}`` by :func:`fan_in_uniform`; no bias when ``bias_size`` is None.

    >>> sorted(init_affine(random.key(0), (2, 3), fan_in=3, bias_size=2))
    ['bias', 'weight']
    """
    params = {"weight": fan_in_uniform(name_key(key, "weight"), shape, fan_in, gain)}
    if bias_size is not None:
        params["bias"] = fan_in_uniform(name_key(key, "bias"), (bias_size,), fan_in, gain)
    return params
