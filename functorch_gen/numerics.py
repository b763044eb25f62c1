"""Functions whose textbook forms yield NaN: norms, logarithms of sums, quotients.

Values and first and second derivatives are finite (where mathematics has them so) at zero, at ties and at infinity, in
every mode and order of differentiation. Where a derivative does not exist, it is zero, the mean of the slopes around.
Elsewhere the formulas are exact to rounding. float16 and bfloat16 are computed in float32 and rounded once. A NaN that
goes in comes out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from functorch_gen import tree
from functorch_gen.check import check_choice, check_floating, check_shape
from functorch_gen.typing import Number

__all__ = [
    "clip_by_norm",
    "cosine_similarity",
    "distance",
    "divide_no_nan",
    "log1mexp",
    "log_ndtr",
    "log_sigmoid",
    "logaddexp",
    "logsumexp",
    "norm",
    "normalize",
    "pairwise_distances",
    "safe_where",
    "softplus",
    "sqrt",
    "xlog1py",
    "xlogy",
]

_P = ParamSpec("_P")
_Dim = int | tuple[int, ...] | None


def _in_float32(fun: Callable[_P, Tensor]) -> Callable[_P, Tensor]:
    """Checks the tensors, which come first; where all have 16 bits, computes in float32 and rounds the result once."""
    compute: Callable[..., Tensor] = fun
    names = [name for name, kind in fun.__annotations__.items() if kind is Tensor and name != "return"]

    @functools.wraps(fun)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> Tensor:
        tensors: dict[str, Any] = {**dict(zip(names, args)), **{name: kwargs[name] for name in names if name in kwargs}}
        for name, x in tensors.items():
            check_floating(x, f"{fun.__name__}: {name}")
        dtypes = [x.dtype for x in tensors.values()]
        if any(dtype.itemsize > 2 for dtype in dtypes):
            return fun(*args, **kwargs)
        wide: Any = tree.cast((args, kwargs), torch.float32)
        return compute(*wide[0], **wide[1]).to(functools.reduce(torch.promote_types, dtypes))

    return wrapped


def _axes(x: Tensor, dim: _Dim) -> tuple[int, ...]:
    return tuple(range(x.ndim)) if dim is None else (dim,) if isinstance(dim, int) else tuple(dim)


def _squeezed(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return x if keepdim else x.squeeze(axes)


# Selection.


def safe_where(
    mask: Tensor, fun: Callable[[Tensor], Tensor], x: Tensor, *, otherwise: Number = 0.0, fill: Number = 1.0
) -> Tensor:
    """``fun(x)`` where ``mask``, else ``otherwise``; of ``x`` outside the mask neither value nor derivative is used.

    where(mask, fun(where(mask, x, fill)), otherwise). With the outer ``where`` alone, the derivative of the branch not
    taken is multiplied by zero, and 0 * inf is NaN.

    Args:
        mask: bool, broadcasts with ``x``.
        fun: where it is defined, the mask is true; broadcasts like ``x``.
        otherwise: a number or a tensor.
        fill: a point at which ``fun`` and its derivatives are finite.

    >>> from functorch_gen.transforms import grad
    >>> x = torch.tensor([0.0, 4.0])
    >>> grad(lambda x: safe_where(x > 0, torch.log, x).sum())(x)
    tensor([0.0000, 0.2500])
    """
    return torch.where(mask, fun(torch.where(mask, x, fill)), otherwise)


@_in_float32
def divide_no_nan(x: Tensor, y: Tensor) -> Tensor:
    """x / y, and 0 with zero derivatives where y = 0. As ``tf.math.divide_no_nan``.

    >>> divide_no_nan(torch.tensor([1.0, 0.0]), torch.tensor([2.0, 0.0]))
    tensor([0.5000, 0.0000])
    """
    nonzero = y != 0
    return torch.where(nonzero, x / torch.where(nonzero, y, 1.0), 0.0)


# Norms.


@_in_float32
def sqrt(x: Tensor) -> Tensor:
    """Square root whose derivatives at 0 are 0, not infinite.

    >>> from functorch_gen.transforms import grad
    >>> grad(lambda x: sqrt(x).sum())(torch.tensor([0.0, 4.0]))
    tensor([0.0000, 0.2500])
    """
    return safe_where(x != 0, torch.sqrt, x)


def _scaled(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """x / scale in [-1, 1], the scale, and the largest modulus; of infinite vectors, the signs of the infinite parts.

    The scale is a constant to derivatives, which is exact for homogeneous functions of the quotient.
    """
    modulus = x.detach().abs()
    largest = modulus.amax(axes, keepdim=True) if x.numel() else modulus.sum(axes, keepdim=True)
    infinite = largest.isinf()
    scale = torch.where((largest == 0) | infinite, 1.0, largest)
    signs = torch.where(modulus.isinf(), x.detach().sign(), 0.0)
    return torch.where(infinite, signs, x / scale), scale, largest


@_in_float32
def norm(x: Tensor, dim: _Dim = None, keepdim: bool = False, ord: float = 2) -> Tensor:
    """Norm of the vectors along ``dim`` (None: of all elements): sqrt(sum x^2), sum |x| or max |x|.

    Squares neither overflow nor underflow. The derivatives at 0 are 0, those at infinite vectors too; at ties of max
    |x| the gradient is the mean of the tied ones.

    Args:
        ord: 2, 1 or infinity.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``ord`` is another.

    >>> from functorch_gen.transforms import grad
    >>> norm(torch.tensor([3e30, 4e30])), grad(norm)(torch.zeros(2))
    (tensor(5.0000e+30), tensor([0., 0.]))
    """
    check_choice("norm", "ord", ord, (1, 2, math.inf))
    axes = _axes(x, dim)
    if ord == 1:
        return x.abs().sum(axes, keepdim=keepdim)
    if ord != 2:
        return x.abs().amax(axes, keepdim=keepdim)
    scaled, scale, largest = _scaled(x, axes)
    euclidean = scale * sqrt((scaled * scaled).sum(axes, keepdim=True))
    return _squeezed(torch.where(largest.isinf(), largest, euclidean), axes, keepdim)


@_in_float32
def normalize(x: Tensor, dim: _Dim = -1) -> Tensor:
    """x / |x|, the unit vectors along ``dim``; 0 with zero derivatives where x = 0.

    An infinite vector has the direction of its infinite elements.

    >>> normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0], [torch.inf, 1.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 0.0000],
            [1.0000, 0.0000]])
    """
    axes = _axes(x, dim)
    scaled = _scaled(x, axes)[0]
    return divide_no_nan(scaled, sqrt((scaled * scaled).sum(axes, keepdim=True)))


@_in_float32
def clip_by_norm(x: Tensor, max_norm: Number, dim: _Dim = None) -> Tensor:
    """min(1, max_norm / |x|) x for the vectors along ``dim`` (None: for x as one vector).

    The derivative at |x| = max_norm is that of the identity.

    >>> clip_by_norm(torch.tensor([[3.0, 4.0], [0.3, 0.4]]), 1.0, dim=-1)
    tensor([[0.6000, 0.8000],
            [0.3000, 0.4000]])
    """
    too_long = ~(norm(x, dim, keepdim=True) <= max_norm)  # of NaN too
    return safe_where(too_long, lambda x: max_norm * normalize(x, dim), x, otherwise=x)


@_in_float32
def distance(x: Tensor, y: Tensor, dim: _Dim = -1, keepdim: bool = False) -> Tensor:
    """Euclidean distance |x - y| along ``dim``; its derivatives where x = y are 0.

    >>> distance(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]))
    tensor(5.)
    """
    return norm(x - y, dim, keepdim)


@_in_float32
def pairwise_distances(x: Tensor, y: Tensor, squared: bool = False) -> Tensor:
    """Euclidean distances of all pairs, or their squares: (..., n, d), (..., m, d) -> (..., n, m).

    Of the differences, (..., n, m, d) in memory: |x|^2 + |y|^2 - 2 x.y needs less, but cancels for close points. For
    many points, ``vmap`` over the rows of ``x`` with a ``chunk_size``. The derivatives where points coincide are 0.

    Raises:
        ValueError: if the points differ in their dimension.

    >>> pairwise_distances(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 4.0]]))
    tensor([[4.],
            [5.]])
    """
    d = check_shape(x, "... n d", "pairwise_distances: x")["d"]
    check_shape(y, "... m d", "pairwise_distances: y", d=d)
    difference = x.unsqueeze(-2) - y.unsqueeze(-3)
    return (difference * difference).sum(-1) if squared else norm(difference, -1)


@_in_float32
def cosine_similarity(x: Tensor, y: Tensor, dim: _Dim = -1) -> Tensor:
    """x.y / (|x| |y|) along ``dim``; 0 with zero derivatives where either is 0.

    >>> cosine_similarity(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 4.0]))
    tensor(0.6000)
    """
    products = normalize(x, dim) * normalize(y, dim)
    return products.sum(_axes(products, dim))


# Exponentials and logarithms.


@_in_float32
def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without the cut at 20 of ``F.softplus``.

    >>> softplus(torch.tensor([-1000.0, 0.0, 1000.0]))
    tensor([0.0000e+00, 6.9315e-01, 1.0000e+03])
    """
    positive = x > 0
    negated = torch.where(positive, -x, x)  # -|x|, but of slope 1 at 0
    return torch.where(positive, x, 0.0) + torch.log1p(negated.exp())


@_in_float32
def log_sigmoid(x: Tensor) -> Tensor:
    """log(1 / (1 + exp(-x))).

    >>> log_sigmoid(torch.tensor([-1000.0, 0.0]))
    tensor([-1.0000e+03, -6.9315e-01])
    """
    return -softplus(-x)


@_in_float32
def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(-x)) for x >= 0, to full precision at both ends; NaN for x < 0. As ``jax.nn.log1mexp``.

    At 0 value and derivatives are infinite, as those of log are.

    Source: Mächler 2012, Accurately computing log(1 - exp(-|a|)), eq. 7.

    >>> log1mexp(torch.tensor([1e-10, 50.0]))
    tensor([-2.3026e+01, -1.9287e-22])
    """
    small = x < math.log(2)
    near = safe_where(small, lambda x: torch.log(-torch.expm1(-x)), x)
    return safe_where(~small, lambda x: torch.log1p(-torch.exp(-x)), x, otherwise=near)


@_in_float32
def log_ndtr(x: Tensor) -> Tensor:
    """Logarithm of the standard normal distribution function, to full precision in both tails.

    ``torch.special.log_ndtr`` has no batching rule.

    >>> log_ndtr(torch.tensor([-20.0, 0.0]))
    tensor([-203.9172,   -0.6931])
    """
    lower = x < 0
    left = safe_where(lower, lambda x: (0.5 * torch.special.erfcx(-math.sqrt(0.5) * x)).log() - 0.5 * x**2, x)
    return safe_where(~lower, lambda x: torch.log1p(-0.5 * torch.erfc(math.sqrt(0.5) * x)), x, otherwise=left)


@_in_float32
def logaddexp(x: Tensor, y: Tensor) -> Tensor:
    """log(exp(x) + exp(y)). Where both are the same infinity, the gradient is (1/2, 1/2).

    >>> from functorch_gen.transforms import hessian
    >>> hessian(lambda x: logaddexp(x[0], x[1]))(torch.zeros(2))  # zero by torch.logaddexp
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """
    same = (x == y) & x.isinf()
    larger = x > y
    high, low = torch.where(larger, x, y), torch.where(larger, y, x)
    added = torch.where(same, 0.0, high) + softplus(torch.where(same, 0.0, low) - torch.where(same, 0.0, high))
    return torch.where(same, 0.5 * x + 0.5 * y, added)


@_in_float32
def logsumexp(x: Tensor, dim: _Dim = None, keepdim: bool = False) -> Tensor:
    """log(sum(exp(x))) along ``dim`` (None: over all elements).

    Where all elements are -inf it is -inf, where one is inf it is inf, both with zero derivatives.

    >>> from functorch_gen.transforms import grad
    >>> grad(lambda x: logsumexp(x, 1).nan_to_num().sum())(torch.tensor([[0.0, 0.0], [-torch.inf, -torch.inf]]))
    tensor([[0.5000, 0.5000],
            [0.0000, 0.0000]])
    """
    axes = _axes(x, dim)
    largest = x.detach().amax(axes, keepdim=True) if x.numel() else x.new_full((), -math.inf)
    infinite = largest.isinf()
    shift = torch.where(infinite, 0.0, largest)
    total = (torch.where(infinite, 0.0, x) - shift).exp().sum(axes, keepdim=True)
    result = torch.where(infinite, largest, shift + safe_where(~infinite, torch.log, total))
    return _squeezed(result, axes, keepdim)


@_in_float32
def xlogy(x: Tensor, y: Tensor) -> Tensor:
    """x log(y), and 0 with zero derivatives where x = 0 and log(y) is infinite or undefined.

    >>> xlogy(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 1.0]))
    tensor([0., 0.])
    """
    return _times_log(x, y, torch.log, 0.0)


@_in_float32
def xlog1py(x: Tensor, y: Tensor) -> Tensor:
    """x log(1 + y), and 0 with zero derivatives where x = 0 and log(1 + y) is infinite or undefined.

    >>> xlog1py(torch.tensor([0.0, 2.0]), torch.tensor([-1.0, 0.0]))
    tensor([0., 0.])
    """
    return _times_log(x, y, torch.log1p, -1.0)


def _times_log(x: Tensor, y: Tensor, log: Callable[[Tensor], Tensor], pole: float) -> Tensor:
    vanishes = (x == 0) & ((y <= pole) | (y == math.inf))
    return torch.where(vanishes, 0.0, x * log(torch.where(vanishes, 1.0, y)))
