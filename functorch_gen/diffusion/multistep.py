"""Samplers that remember: the mean of D over a step from the estimates of the steps before.

With u = log(alpha / sigma) counted from the step's start and h its length, the probability flow is exactly

    x' = alpha' D_mean + sigma' N_mean, D_mean = integral of e^u D(u) du / integral of e^u du, both over [0, h]

(Lu et al. 2022, proposition 4.1). A polynomial through the last estimates, integrated in D's place, makes D_mean a
weighted mean of them. The weights depend on the times alone and are computed for all steps at once. Arguments:
:mod:`functorch_gen.diffusion.sampling`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from functorch_gen.check import check_choice
from functorch_gen.diffusion.sampling import Denoise, Run, Samples, Step, Times, begin, euler, march
from functorch_gen.noise import NoiseSchedule, rho_times
from functorch_gen.typing import Key, Tree

__all__ = ["mean_weights", "sample_dpmpp_2m", "sample_dpmpp_3m", "sample_unipc", "weighted_mean"]


def _moments(h: Tensor, count: int) -> Tensor:
    """Means of r, r^2, ... over [0, 1], weighted by e^(h r): (n,) -> (n, count)."""
    end = -1 / torch.expm1(-h)
    moments = [torch.ones_like(h)]
    for power in range(1, count + 1):
        moments.append(end - power / h * moments[-1])  # integration by parts
    return torch.stack(moments[1:], 1)


def mean_weights(log_ratio: Tensor, offsets: Sequence[int]) -> Tensor:
    """Weights of the estimates at points i and i + offset in the mean of D over the step from i to i + 1.

    Where a point lies before the first, or where two coincide, those before it in ``offsets`` have to do. The weight
    of a single other point is that of its values' linear change to the middle of the step, as the authors have it:
    1/2 for the step's end, -h / (2 h_before) for the point before.

    Args:
        log_ratio: log(alpha / sigma), (n + 1,), rising.
    Returns:
        (n, 1 + len(offsets)); rows sum to 1.
    """
    start, h = log_ratio[:-1], log_ratio.diff()
    index = torch.arange(len(start), device=start.device)
    h = torch.where(h > 0, h, 1)
    others = torch.zeros(len(start), 0, dtype=start.dtype, device=start.device)
    for count in range(1, len(offsets) + 1):
        points = index[:, None] + torch.tensor(offsets[:count], device=start.device)
        r = (log_ratio[points.clamp(min=0)] - start[:, None]) / h[:, None]
        apart = (torch.cat([torch.zeros_like(r[:, :1]), r], 1).sort(1).values.diff(dim=1) > 0).all(1)
        powers = torch.stack([r**j for j in range(1, count + 1)], 1)  # sum_k w_k r_k^j = moment j
        safe = torch.where(apart[:, None, None], powers, torch.eye(count, dtype=r.dtype, device=r.device))
        wanted = _moments(h, count) if count > 1 else torch.full_like(r, 0.5)
        solved = torch.linalg.solve(safe, wanted[..., None])[..., 0]
        others = torch.where(apart[:, None], solved, torch.nn.functional.pad(others, (0, 1)))
    return torch.cat([1 - others.sum(1, keepdim=True), others], 1)


def weighted_mean(weights: Tensor, estimates: Sequence[Tensor]) -> Tensor:
    """sum_k weights[k] estimates[k]: (k,), k of (b, ...) -> (b, ...)."""
    first, *others = estimates
    mean = first
    for k, other in enumerate(others, 1):
        mean = mean + weights[k] * (other - first)
    return mean


def _multistep(run: Run, step: Step, x_t: Tensor, x_hat: Tensor, before: Tree) -> tuple[Tensor, Tree]:
    estimates = x_hat, *before
    return euler(step.at, step.to, x_t, weighted_mean(step.extra, estimates)), estimates[:-1]


def _sample_multistep(run: Run, order: int) -> Samples:
    weights = mean_weights(run.points.log_ratio, range(-1, -order, -1))
    return march(run, _multistep, (torch.zeros_like(run.x_t),) * (order - 1), weights)


def sample_dpmpp_2m(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by DPM-Solver++(2M): -> (b, ...). Second order; ``steps`` evaluations.

    The first step and the last, to the data, are of first order. By default it evaluates at ``noise.rho_times``: where
    a grid takes long steps in log-SNR, extrapolating in it goes wrong. Arguments: see
    :mod:`functorch_gen.diffusion.sampling`.

    Source: Lu et al. 2022, algorithm 2, arXiv:2211.01095.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPLinear()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_dpmpp_2m(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    times = rho_times if times is None else times
    run = begin("sample_dpmpp_2m", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    return _sample_multistep(run, 2)


def sample_dpmpp_3m(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by DPM-Solver++(3M): -> (b, ...). Third order; ``steps`` evaluations.

    The first step is of first order, the second of second: third order shows where little happens in the first two, as
    by default, at ``noise.rho_times``. The last step, to the data, is Euler's. Arguments: see
    :mod:`functorch_gen.diffusion.sampling`.

    The quadratic through three estimates is integrated exactly. The authors' code takes half its curvature, which
    leaves the order at two.

    Source: Lu et al. 2022, proposition 4.1 with three estimates, arXiv:2211.01095.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPLinear()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_dpmpp_3m(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    times = rho_times if times is None else times
    run = begin("sample_dpmpp_3m", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    return _sample_multistep(run, 3)


def _unipc_step(
    run: Run, step: Step, x_t: Tensor, x_hat: Tensor, memory: tuple[Tensor, tuple[Tensor, ...]]
) -> tuple[Tensor, tuple[Tensor, tuple[Tensor, ...]]]:
    """Corrects the step that led here, by the estimate found here; then predicts the next."""
    before_x, before = memory
    back, correct, predict = step.extra
    corrected = euler(back, step.at, before_x, weighted_mean(correct, (before[0], x_hat, *before[1:])))
    estimates = x_hat, *before[:-1]
    predicted = euler(step.at, step.to, corrected, weighted_mean(predict, estimates))
    return predicted, (corrected, estimates)


def sample_unipc(
    key: Key,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    schedule: NoiseSchedule,
    steps: int,
    order: int = 2,
    times: Times = None,
    x_t: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Samples:
    """Samples by UniPC: -> (b, ...). Order ``order`` + 1; ``steps`` evaluations.

    Every step is taken twice: ahead of its end's estimate, then again with it, by a polynomial of one degree more. The
    estimate is that of the first try, so it costs nothing.

    Args:
        order: of the predictor, 1, 2 or 3; that of the first steps is lower. 2 is :func:`sample_dpmpp_2m` with a
            corrector, 3 :func:`sample_dpmpp_3m`.
        schedule, steps, times, x_t, dtype, return_path: see :mod:`functorch_gen.diffusion.sampling`; by default the
            times are ``noise.rho_times``.
    Raises:
        ValueError: if ``order`` is another.
    Source: Zhao et al. 2023, algorithms 1 and 2 with B(h) = e^h - 1, of the data, arXiv:2302.04867.

    >>> from functorch_gen import noise, random
    >>> schedule = noise.VPLinear()
    >>> point = lambda x_t, t: torch.full_like(x_t, 3.0)
    >>> sample_unipc(random.key(0), point, (1, 2), schedule=schedule, steps=5)
    tensor([[3., 3.]])
    """
    check_choice("sample_unipc", "order", order, (1, 2, 3))
    times = rho_times if times is None else times
    run = begin("sample_unipc", key, denoise, shape, schedule, steps, times, x_t, dtype, return_path)
    predict = mean_weights(run.points.log_ratio, range(-1, -order, -1))
    correct = mean_weights(run.points.log_ratio, (1, *range(-1, -order, -1)))
    back = run.points.part(torch.arange(-1, steps - 2, device=key.device).clamp(min=0))
    extra = back, torch.cat([correct[:1], correct[:-1]]), predict
    return march(run, _unipc_step, (run.x_t, (torch.zeros_like(run.x_t),) * order), extra)
