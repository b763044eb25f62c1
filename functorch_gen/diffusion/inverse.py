"""Inverse problems: samples of the data given y = A x + noise, by a denoiser that knows nothing of A.

With r = y - A D, s the standard deviation of the noise in y, J = dD/dx_t, and C a guess of Cov[x | x_t],

    D' = D + C A^T (A C A^T + s^2)^-1 r

is E[x | x_t, y] for Gaussian data. What the methods take for C, on the left of A^T and within the inverse:

===============  ======================  ================================
method           C on the left           C within the inverse
===============  ======================  ================================
:func:`project`  r_t^2                   r_t^2
:func:`pigdm`    (sigma^2 / alpha) J^T   r_t^2
:func:`mmps`     (sigma^2 / alpha) J^T   (sigma^2 / alpha) J^T
:func:`dps`      (sigma^2 / alpha) J^T   none: A C A^T + s^2 is a number
===============  ======================  ================================

(sigma^2 / alpha) J is Cov[x | x_t] itself, by Tweedie's formula of second order; r_t^2 = sigma^2 sigma_data^2 /
(alpha^2 sigma_data^2 + sigma^2) is that of independent Gaussian data. Each function takes a denoiser and returns one,
so that every sampler serves. Arguments they share:

    operator: A, x -> A x, (b, ...) -> (b, ...), of each example by itself; linear, and transposed by ``vjp``.
    y: what was measured, of the shape of ``operator(x)``: (b, ...), or one number of each example, (b,). Without
        noise some x must have it: of a mask, y is 0 where nothing is known.
    schedule: of the denoiser.
    noise_std: s, >= 0.
    sigma_data: standard deviation of the data, for r_t.
    iterations: of conjugate gradients in the space of y. One is exact where A A^T is a multiple of a projection, as of
        masks, and of means of patches.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen import numerics
from functorch_gen.check import check_above_zero, check_number, check_positive
from functorch_gen.diffusion.guidance import Denoise, shift_of_score
from functorch_gen.losses.per_example import sum_per_example
from functorch_gen.noise import NoiseSchedule, expand
from functorch_gen.transforms import grad, jvp, vjp
from functorch_gen.typing import Number

__all__ = ["dps", "mmps", "pigdm", "project"]

Linear: TypeAlias = Callable[[Tensor], Tensor]
"""x -> A x: (b, ...) -> (b, ...)."""


def _conjugate_gradients(matrix: Linear, b: Tensor, iterations: int) -> Tensor:
    """x with matrix(x) = b for a positive semi-definite matrix of each example: (b, ...) -> (b, ...).

    An example stands still once its residual is rounding: there is nothing to gain, and derivatives would overflow.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    squared = sum_per_example(residual**2)
    rounding = squared * torch.finfo(b.dtype).eps ** 2
    for _ in range(iterations):
        image, goes_on = matrix(direction), squared > rounding
        step = numerics.divide_no_nan(squared, torch.where(goes_on, sum_per_example(direction * image), 0))
        x, residual = x + expand(step, b) * direction, residual - expand(step, b) * image
        before, squared = torch.where(goes_on, squared, 0), sum_per_example(residual**2)
        direction = residual + expand(numerics.divide_no_nan(squared, before), b) * direction
    return x


def _correction(
    name: str, operator: Linear, y: Tensor, x_hat: Tensor, inner: Linear, noise_std: Number, iterations: int
) -> Tensor:
    """A^T (A C A^T + s^2)^-1 (y - A D), with C = ``inner``: (b, ...) -> (b, ...)."""
    y_hat, pull = vjp(operator, x_hat)
    if y.shape != y_hat.shape:
        raise ValueError(f"{name}: y: expected shape {tuple(y_hat.shape)} as operator gives, got {tuple(y.shape)}")

    def matrix(v: Tensor) -> Tensor:
        return jvp(operator, (x_hat,), (inner(pull(v)[0]),))[1] + noise_std**2 * v

    return pull(_conjugate_gradients(matrix, y - y_hat, iterations))[0]


def _isotropic(schedule: NoiseSchedule, sigma_data: Number, x_t: Tensor, t: Tensor) -> Linear:
    """r_t^2."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    squared = (sigma * sigma_data) ** 2 / ((alpha * sigma_data) ** 2 + sigma**2)
    return lambda v: expand(squared, x_t) * v


def _tweedie(denoise: Denoise, schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> tuple[Tensor, Linear]:
    """D, and v -> (sigma^2 / alpha) J^T v."""
    x_hat, pull = vjp(lambda x_t: denoise(x_t, t), x_t)
    scale = shift_of_score(schedule, x_t, t)
    return x_hat, lambda v: scale * pull(v)[0]


def _check(name: str, noise_std: Number, iterations: int, sigma_data: Number = 1.0) -> None:
    check_number(name, "noise_std", noise_std, low=0)
    check_positive(name, iterations=iterations)
    check_above_zero(name, sigma_data=sigma_data)


def project(
    denoise: Denoise,
    operator: Linear,
    y: Tensor,
    *,
    schedule: NoiseSchedule,
    noise_std: Number = 0.0,
    sigma_data: Number = 1.0,
    iterations: int = 10,
) -> Denoise:
    """The estimate moved the least way to where A x is y: D + A^T (A A^T + (s / r_t)^2)^-1 (y - A D).

    Of a mask without noise it is replacement: known elements are y, and their x_t becomes alpha y + sigma noise by
    itself, with one noise along the probability flow and fresh noise in an ancestral sampler. It needs no gradient of
    the denoiser, and does not tell the other elements what the known ones mean; the denoiser has to.

    Arguments: see :mod:`functorch_gen.diffusion.inverse`.

    Raises:
        ValueError: if ``noise_std`` < 0 or ``iterations`` < 1; by the denoiser, if ``y`` has not the operator's shape.
    Source: Song et al. 2021, appendix I.2, arXiv:2011.13456 (masks); Lugmayr et al. 2022, eq. 8, arXiv:2201.09865;
    Wang et al. 2023 (DDNM), section 3, arXiv:2212.00490.

    >>> from functorch_gen.noise import EDM
    >>> mask, y = torch.tensor([1.0, 0.0]), torch.tensor([[3.0, 0.0]])
    >>> known = project(lambda x_t, t: x_t / 2, lambda x: mask * x, y, schedule=EDM())
    >>> known(torch.ones(1, 2), torch.ones(1))
    tensor([[3.0000, 0.5000]])
    """
    _check("project", noise_std, iterations, sigma_data)

    def conditional(x_t: Tensor, t: Tensor) -> Tensor:
        x_hat, spread = denoise(x_t, t), _isotropic(schedule, sigma_data, x_t, t)
        return x_hat + spread(_correction("project", operator, y, x_hat, spread, noise_std, iterations))

    return conditional


def pigdm(
    denoise: Denoise,
    operator: Linear,
    y: Tensor,
    *,
    schedule: NoiseSchedule,
    noise_std: Number = 0.0,
    sigma_data: Number = 1.0,
    iterations: int = 10,
) -> Denoise:
    """Pseudo-inverse guidance: D + (sigma^2 / alpha) J^T A^T (r_t^2 A A^T + s^2)^-1 (y - A D).

    Exact for data of independent elements N(m, sigma_data^2). One evaluation and one gradient of the denoiser.
    Arguments: see :mod:`functorch_gen.diffusion.inverse`.

    Raises:
        ValueError: if ``noise_std`` < 0 or ``iterations`` < 1; by the denoiser, if ``y`` has not the operator's shape.
    Source: Song et al. 2023, section 3, https://openreview.net/forum?id=9_gsMA8MRKQ.

    >>> from functorch_gen.noise import EDM
    >>> edm = EDM(sigma_max=1.0)
    >>> denoise = lambda x_t, t: x_t / (1 + edm.sigma(t)[:, None] ** 2)  # of N(0, 1)
    >>> mean = pigdm(denoise, lambda x: x.sum(1, keepdim=True), torch.tensor([[3.0]]), schedule=edm, noise_std=1.0)
    >>> mean(torch.ones(1, 2), torch.ones(1))  # 1/2 + (3 - 1) / (2 + 2)
    tensor([[1., 1.]])
    """
    _check("pigdm", noise_std, iterations, sigma_data)

    def conditional(x_t: Tensor, t: Tensor) -> Tensor:
        x_hat, covariance = _tweedie(denoise, schedule, x_t, t)
        spread = _isotropic(schedule, sigma_data, x_t, t)
        return x_hat + covariance(_correction("pigdm", operator, y, x_hat, spread, noise_std, iterations))

    return conditional


def mmps(
    denoise: Denoise, operator: Linear, y: Tensor, *, schedule: NoiseSchedule, noise_std: Number, iterations: int = 3
) -> Denoise:
    """Moment-matching guidance: D + C A^T (A C A^T + s^2)^-1 (y - A D) with C = (sigma^2 / alpha) J^T.

    Exact for all Gaussian data, with as many iterations as y has elements. One evaluation and ``iterations`` + 1
    gradients of the denoiser. Arguments: see :mod:`functorch_gen.diffusion.inverse`.

    Raises:
        ValueError: if ``noise_std`` < 0 or ``iterations`` < 1; by the denoiser, if ``y`` has not the operator's shape.
    Source: Rozet et al. 2024, section 4.2, arXiv:2405.13712.

    >>> from functorch_gen.noise import EDM
    >>> edm, spread = EDM(sigma_max=1.0), torch.tensor([1.0, 3.0])
    >>> denoise = lambda x_t, t: x_t * spread / (spread + edm.sigma(t)[:, None] ** 2)  # of N(0, spread)
    >>> mean = mmps(denoise, lambda x: x.sum(1, keepdim=True), torch.tensor([[3.0]]), schedule=edm, noise_std=1.0)
    >>> mean(torch.zeros(1, 2), torch.ones(1))  # (1/2, 3/4) 3 / (1/2 + 3/4 + 1)
    tensor([[0.6667, 1.0000]])
    """
    _check("mmps", noise_std, iterations)

    def conditional(x_t: Tensor, t: Tensor) -> Tensor:
        x_hat, covariance = _tweedie(denoise, schedule, x_t, t)
        return x_hat + covariance(_correction("mmps", operator, y, x_hat, covariance, noise_std, iterations))

    return conditional


def dps(
    denoise: Denoise,
    operator: Callable[[Tensor], Tensor],
    y: Tensor,
    *,
    schedule: NoiseSchedule,
    std: Number | None = None,
    scale: Number = 1.0,
) -> Denoise:
    """Diffusion posterior sampling: D + scale (sigma^2 / alpha) grad log p(y | x = D), through the denoiser.

    Args:
        operator: may be nonlinear here.
        std: of y given x = D: log p = -|y - A D|^2 / (2 std^2). None takes the one at which y is likeliest,
            |y - A D| / sqrt(m) of the m elements of each example: log p = -m log |y - A D|. The paper, which finds the
            first too stiff, moves x_t by a multiple of grad |y - A D| at each step; but that depends on the steps.
        denoise, y, schedule: see :mod:`functorch_gen.diffusion.inverse`.
    Raises:
        ValueError: if ``std`` <= 0; by the denoiser, if ``y`` has not the operator's shape.
    Source: Chung et al. 2023, theorem 1 and algorithm 1, arXiv:2209.14687.

    >>> from functorch_gen.noise import EDM
    >>> guided = dps(lambda x_t, t: x_t / 2, lambda x: x, torch.ones(1, 1), schedule=EDM(sigma_max=1.0), std=1.0)
    >>> guided(torch.zeros(1, 1), torch.ones(1))
    tensor([[0.5000]])
    """
    if std is not None:
        check_above_zero("dps", std=std)

    def log_prob(x_hat: Tensor) -> Tensor:
        y_hat = operator(x_hat)
        if y.shape != y_hat.shape:
            raise ValueError(f"dps: y: expected shape {tuple(y_hat.shape)} as operator gives, got {tuple(y.shape)}")
        squared = sum_per_example((y - y_hat) ** 2)
        if std is not None:
            return -squared / (2 * std**2)
        return -0.5 * math.prod(y.shape[1:]) * squared.clamp(min=torch.finfo(y.dtype).tiny).log()

    def conditional(x_t: Tensor, t: Tensor) -> Tensor:
        x_hat, covariance = _tweedie(denoise, schedule, x_t, t)
        return x_hat + scale * covariance(grad(lambda x: log_prob(x).sum())(x_hat))

    return conditional
