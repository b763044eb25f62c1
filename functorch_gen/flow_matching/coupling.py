"""Which noise belongs to which example: couplings of a batch by optimal transport, which make paths straighter.

Examples keep their places, and so their labels; the noise is chosen for them.
"""

import math

import torch
from einops import rearrange, reduce
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_above_zero, check_floating, check_positive, check_shape
from functorch_gen.losses.per_example import in_float32
from functorch_gen.numerics import logsumexp
from functorch_gen.transforms import fori_loop, stop_gradient
from functorch_gen.transforms.context import is_traced, is_transformed
from functorch_gen.typing import Key, Number

__all__ = ["entropic_coupling", "exact_coupling", "sinkhorn", "squared_distances"]


@in_float32
def squared_distances(x: Tensor, noise: Tensor) -> Tensor:
    """The cost |x_i - noise_j|^2 of each pair: (n, ...), (m, ...) -> (n, m).

    By |x_i|^2 + |noise_j|^2 - 2 x_i.noise_j, which takes no memory for the differences of all pairs.

    Raises:
        TypeError: if ``x`` is not floating, or the noise of another dtype.
        ValueError: if examples and noise differ in shape.

    >>> squared_distances(torch.zeros(1, 2, 2), torch.ones(3, 2, 2))
    tensor([[4., 4., 4.]])
    """
    check_floating(x, "squared_distances: x")
    if noise.dtype != x.dtype:
        raise TypeError(f"squared_distances: noise: expected {x.dtype}, as x has, got {noise.dtype}")
    if not x.ndim or not noise.ndim or noise.shape[1:] != x.shape[1:]:
        got = f"{tuple(x.shape)} and {tuple(noise.shape)}"
        raise ValueError(f"squared_distances: expected x and noise of shapes (n, ...) and (m, ...), got {got}")
    x, noise = rearrange(x, "n ... -> n (...)"), rearrange(noise, "m ... -> m (...)")
    squares = reduce(x * x, "n d -> n 1", "sum") + reduce(noise * noise, "m d -> 1 m", "sum")
    return (squares - 2 * x @ noise.mT).clamp(min=0)


@in_float32
def sinkhorn(cost: Tensor, *, reg: Number, steps: int = 100) -> Tensor:
    """Logarithm of the plan that moves uniform weights onto uniform weights most cheaply: (n, m) -> (n, m).

    The plan minimises sum P_ij C_ij + reg sum P_ij log P_ij. Sinkhorn's iteration on logarithms: P_ij = exp(f_i + g_j -
    C_ij / reg) / (n m), with f and g chosen in turn for the sums of rows and columns. The last step makes those of the
    rows exact, 1 / n; those of the columns are 1 / m in the limit of many steps.

    Raises:
        TypeError: if ``cost`` is not floating.
        ValueError: if ``cost`` is not (n, m) or empty, ``reg`` or ``steps`` not positive.
    Source: Cuturi 2013, arXiv:1306.0895; Peyre and Cuturi 2019, section 4.4 and eq. 4.43, arXiv:1803.00567.

    >>> sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reg=0.1).exp()
    tensor([[4.9998e-01, 2.2699e-05],
            [2.2699e-05, 4.9998e-01]])
    """
    sizes = check_shape(cost, "n m", "sinkhorn: cost")
    check_floating(cost, "sinkhorn: cost")
    check_positive("sinkhorn", **sizes)
    check_above_zero("sinkhorn", reg=reg)
    check_positive("sinkhorn", steps=steps)
    kernel = -cost / reg

    def rows(g: Tensor) -> Tensor:
        return math.log(sizes["m"]) - logsumexp(kernel + g, dim=1, keepdim=True)

    def columns(f: Tensor) -> Tensor:
        return math.log(sizes["n"]) - logsumexp(kernel + f, dim=0, keepdim=True)

    g = fori_loop(0, steps, lambda _, g: columns(rows(g)), torch.zeros_like(cost[:1]))
    return kernel + rows(g) + g - math.log(cost.numel())


def entropic_coupling(key: Key, x: Tensor, noise: Tensor, *, reg: Number = 0.05, steps: int = 100) -> Tensor:
    """Noise drawn for each example from the entropic plan of the batch: (n, ...), (m, ...) -> (n, ...).

    Traceable: ``loss(..., coupling=entropic_coupling)``. In the mean over the plan each draw of noise is used as often
    as any other; in one batch some are used twice. Constant to derivatives.

    Args:
        reg: regularisation of :func:`sinkhorn` in units of the mean cost; more of it is nearer to random pairs and
            needs fewer steps.
    Raises:
        TypeError, ValueError: as :func:`squared_distances` and :func:`sinkhorn`.
    Source: Tong et al. 2023, section 3.2 (minibatch OT-CFM and SB-CFM), arXiv:2302.00482.

    >>> x = torch.tensor([[0.0], [10.0]])
    >>> entropic_coupling(random.key(0), x, torch.tensor([[9.0], [1.0]]))
    tensor([[1.],
            [9.]])
    """
    cost = stop_gradient(squared_distances(x, noise))
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))  # a plan and draws of 16 bits are not the plan's
    plan = sinkhorn(cost, reg=reg * cost.mean(), steps=steps)
    return stop_gradient(noise)[random.categorical(key, plan)]


def exact_coupling(x: Tensor, noise: Tensor) -> Tensor:
    """The noise reordered so that the sum of squared distances is least: (n, ...), (n, ...) -> (n, ...).

    Runs on the host, by ``scipy.optimize.linear_sum_assignment``: pair a batch before the jitted step, and give the
    result to ``loss(..., noise=...)``. Cubic in n at worst: some milliseconds for 256 examples.

    Raises:
        ImportError: if scipy is not installed.
        TypeError: in a jitted function or another transform: there it has no values to look at.
        ValueError: if the shapes differ.
    Source: Tong et al. 2023, section 3.2 (minibatch OT-CFM), arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772.

    >>> exact_coupling(torch.tensor([[0.0], [10.0]]), torch.tensor([[9.0], [1.0]]))
    tensor([[1.],
            [9.]])
    """
    if is_traced() or is_transformed():
        raise TypeError(
            "exact_coupling: expected values, got a trace: pair batches before it, or use entropic_coupling"
        )
    check_shape(noise, " ".join(map(str, x.shape)), "exact_coupling: noise")
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("exact_coupling: needs scipy: pip install scipy") from error
    _, order = linear_sum_assignment(squared_distances(x, noise).detach().cpu().double().numpy())
    return noise[torch.from_numpy(order).to(noise.device)]
