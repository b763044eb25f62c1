"""A diffusion model as a chain of Gaussian transitions: its variances, learned or not, and its variational bound.

Between two times s < t of any schedule the chain of noising has the posterior (Kingma et al. 2021, appendix A)

    q(x_s | x_t, x) = N(alpha_t sigma_s^2 / (alpha_s sigma_t^2) x_t + alpha_s c x, sigma_s^2 c), c = 1 - SNR_t / SNR_s

and the model p(x_s | x_t) is that of its own estimate of x, with the same variance or a learned one. An estimate is
``x_hat`` (b, ...), as :func:`denoiser` gives it, or ``(x_hat, v)``, as :func:`denoiser_and_variance` does, where v
chooses the variance. Times s and t are (b,) or 0-d.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from einops import rearrange, repeat
from torch import Tensor

from functorch_gen import numerics, random
from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.diffusion.objective import Weighting, loss_at
from functorch_gen.diffusion.prediction import Prediction, as_prediction, network_inputs, to_x
from functorch_gen.diffusion.times import StratifiedTime
from functorch_gen.losses import gaussian_kl
from functorch_gen.losses.per_example import check_alike, in_float32, sum_per_example
from functorch_gen.noise import NoiseSchedule, log_snr, mix, rho_times, uniform_times
from functorch_gen.transforms import map as map_slices
from functorch_gen.transforms import stop_gradient
from functorch_gen.typing import Key

__all__ = [
    "Posterior",
    "VariationalBound",
    "decoder_nll",
    "denoiser_and_variance",
    "discretized_gaussian_nll",
    "hybrid_loss",
    "interpolate_variance",
    "posterior",
    "transition_kl",
    "variational_bound",
]

Estimate: TypeAlias = Tensor | tuple[Tensor, Tensor]
"""x_hat, or (x_hat, v): (b, ...) each."""

Denoise: TypeAlias = Callable[[Tensor, Tensor], Estimate]
"""(x_t, t) -> estimate: (b, ...), (b,) -> (b, ...), or a pair of them."""

Times: TypeAlias = Tensor | Callable[[NoiseSchedule, int], Tensor]
"""(steps,), falling; or a function (schedule, steps) -> (steps,)."""


# Transitions.


class Posterior(NamedTuple):
    """q(x_s | x_t, x), and between which variances one that does not know x must lie."""

    mean: Tensor  # (b, ...)
    lower: Tensor  # (b, 1, ...) or (), the posterior's own variance: data are one point
    upper: Tensor  # (b, 1, ...) or (), of x_s given x_t alone, for data N(0, 1)


def posterior(schedule: NoiseSchedule, x: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Posterior:
    """The transition back from t to s < t, x known or estimated: (b, ...), (b, ...), (b,), (b,).

    lower = sigma_s^2 c, upper = (alpha_s^2 + sigma_s^2) sigma_t^2 c / (alpha_t^2 + sigma_t^2), c = 1 - SNR_t / SNR_s

    For a variance-preserving schedule upper is the beta of the step from s to t, lower the beta-tilde.

    Raises:
        ValueError: if ``x`` has not the shape of ``x_t``.
    Source: Ho et al. 2020, eq. 7 and section 3.2, arXiv:2006.11239; Kingma et al. 2021, appendix A, arXiv:2107.00630.

    >>> from functorch_gen.noise import FlowMatching
    >>> x, x_t = torch.zeros(1, 2), torch.ones(1, 2)
    >>> posterior(FlowMatching(), x, x_t, torch.tensor(0.0), torch.tensor(0.5)).mean  # s = 0: x itself
    tensor([[0., 0.]])
    """
    check_alike("posterior", x_t=x_t, x=x)
    alpha_s, sigma_s, alpha_t, sigma_t = schedule.alpha(s), schedule.sigma(s), schedule.alpha(t), schedule.sigma(t)
    c = -torch.expm1(log_snr(schedule, t) - log_snr(schedule, s))
    of_x_t, of_x = alpha_t * sigma_s**2 / (alpha_s * sigma_t**2), alpha_s * c
    lower = sigma_s**2 * c
    upper = (alpha_s**2 + sigma_s**2) * sigma_t**2 * c / (alpha_t**2 + sigma_t**2)
    of_x_t, of_x, lower, upper = (_along(scale, x_t) for scale in (of_x_t, of_x, lower, upper))
    return Posterior(of_x_t * x_t + of_x * x, lower, upper)


def _along(scale: Tensor, x: Tensor) -> Tensor:
    """(b,) as (b, 1, ...), in the dtype of ``x``."""
    scale = scale.to(x.dtype)
    return rearrange(scale, f"b -> b {'1 ' * (x.ndim - 1)}") if scale.ndim else scale


def interpolate_variance(v: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Logarithm of the learned variance, v log upper + (1 - v) log lower: (b, ...) -> (b, ...).

    Where ``lower`` is 0 (a step to s = 0 of most schedules), it counts as the smallest number.

    Source: Nichol and Dhariwal 2021, eq. 15, arXiv:2102.09672.

    >>> interpolate_variance(torch.tensor([0.0, 0.5, 1.0]), torch.tensor(1.0), torch.tensor(4.0)).exp()
    tensor([1., 2., 4.])
    """
    tiny = torch.finfo(v.dtype).tiny
    return v * upper.clamp(min=tiny).log() + (1 - v) * lower.clamp(min=tiny).log()


def _reverse(schedule: NoiseSchedule, estimate: Estimate, x_t: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of p(x_s | x_t): (b, ...) each."""
    x_hat, v = estimate if isinstance(estimate, tuple) else (estimate, torch.zeros_like(estimate))
    mean, lower, upper = posterior(schedule, x_hat, x_t, s, t)
    return mean, interpolate_variance(v, lower, upper)


def transition_kl(schedule: NoiseSchedule, estimate: Estimate, x: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x) || p(x_s | x_t)) in nats: (b, ...), (b, ...), (b, ...), (b,), (b,) -> (b,).

    With the posterior's own variance it is (SNR_s - SNR_t) |x - x_hat|^2 / 2.

    Source: Ho et al. 2020, eq. 5 (L_{t-1}), arXiv:2006.11239; Kingma et al. 2021, eq. 13, arXiv:2107.00630.

    >>> from functorch_gen.noise import FlowMatching
    >>> x, x_t, s, t = torch.ones(1, 2), torch.ones(1, 2), torch.tensor([0.5]), torch.tensor([0.8])
    >>> transition_kl(FlowMatching(), torch.zeros(1, 2), x, x_t, s, t)  # SNR 1 and 1 / 16
    tensor([0.9375])
    """
    mean, lower, _ = posterior(schedule, x, x_t, s, t)
    log_var = lower.clamp(min=torch.finfo(x_t.dtype).tiny).log()
    return gaussian_kl(mean, log_var + torch.zeros_like(mean), *_reverse(schedule, estimate, x_t, s, t))


# The last step, to the data.


@in_float32
def discretized_gaussian_nll(mean: Tensor, log_var: Tensor, x: Tensor, *, levels: int) -> Tensor:
    """-log of the mass that N(mean, exp(log_var)) has in the bin of x, summed: (b, ...), (b, ...), (b, ...) -> (b,).

    The grey levels stand evenly from -1 to 1. A bin reaches half way to its neighbours, the first and the last to
    infinity, so that the masses of all levels sum to 1.

    Args:
        x: data on the levels.
        levels: how many, >= 2.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``levels`` < 2.
    Source: Ho et al. 2020, eq. 13, arXiv:2006.11239.

    >>> black = torch.tensor([[-1.0]])
    >>> discretized_gaussian_nll(torch.zeros(1, 1), torch.zeros(1, 1), black, levels=2)  # the half below 0
    tensor([0.6931])
    """
    check_floating(x, "discretized_gaussian_nll: x")
    check_number("discretized_gaussian_nll", "levels", levels, low=2)
    half, gap, precision = 1 / (levels - 1), x - mean, (-0.5 * log_var).exp()
    upper, lower = (gap + half) * precision, (gap - half) * precision
    above = gap > 0  # there by symmetry: both ends in the lower tail
    a, b = torch.where(above, -lower, upper), torch.where(above, -upper, lower)
    inside = numerics.log_ndtr(a) + numerics.log1mexp(numerics.log_ndtr(a) - numerics.log_ndtr(b))
    first, last = x < -1 + half, x > 1 - half
    outer = torch.where(first, numerics.log_ndtr(upper), numerics.log_ndtr(-lower))
    return -sum_per_example(torch.where(first | last, outer, inside))


def decoder_nll(schedule: NoiseSchedule, estimate: Estimate, x: Tensor, t: Tensor, *, levels: int | None) -> Tensor:
    """-log p(x | x_t) in nats, p = N(x_hat, sigma^2 / (alpha^2 + sigma^2)) at t: (b, ...), (b, ...), (b,) -> (b,).

    Args:
        levels: data are these grey levels of [-1, 1]: :func:`discretized_gaussian_nll`. None: p is a density.
    Raises:
        ValueError: if the estimate has not the shape of ``x``.
    Source: Ho et al. 2020, section 3.3 (L_0), with beta of the step to t = 0, arXiv:2006.11239.

    >>> from functorch_gen.noise import FlowMatching
    >>> x = torch.tensor([[-1.0, 0.0, 1.0]])
    >>> decoder_nll(FlowMatching(), x, x, torch.tensor([0.2]), levels=3)
    tensor([0.0797])
    """
    x_hat = estimate[0] if isinstance(estimate, tuple) else estimate
    check_alike("decoder_nll", x=x, estimate=x_hat)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    variance = _along(sigma**2 / (alpha**2 + sigma**2), x) + torch.zeros_like(x)
    log_var = variance.log()
    if levels is not None:
        return discretized_gaussian_nll(x_hat, log_var, x, levels=levels)
    return 0.5 * sum_per_example((x - x_hat) ** 2 / variance + log_var + math.log(2 * math.pi))


# The bound.


class VariationalBound(NamedTuple):
    """A variational bound and its three parts, in bits per dimension."""

    total: Tensor  # (b,)
    prior: Tensor  # (b,) KL of what is left of x at t = 1
    diffusion: Tensor  # (b,) KL of the transitions
    reconstruction: Tensor  # (b,) of x from the last x_t


def _grid(name: str, schedule: NoiseSchedule, steps: int, times: Times) -> Tensor:
    """(steps,), falling."""
    check_number(name, "steps", steps, low=2)
    if not isinstance(times, Tensor):
        times = times(schedule, steps)
    check_floating(times, f"{name}: times")
    check_shape(times, "steps", f"{name}: times", steps=steps)
    return times


def variational_bound(
    denoise: Denoise,
    key: Key,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = rho_times,
    levels: int | None = 256,
    every_step: bool = True,
) -> VariationalBound:
    """Upper bound on -log2 p(x) per dimension, of the chain that samples in ``steps`` steps: (b, ...) -> (b,).

    KL(q(x_1 | x) || p(x_1)) + sum of KL(q(x_s | x_t, x) || p(x_s | x_t)) - log p(x | x_t of the last t)

    with one draw of x_t at each time: the bound is its expectation. p(x_1) is N(0, sigma(1)^2), from which samplers
    start; p(x_s | x_t) is the step of :func:`sample_ddpm`, of the learned variance where ``denoise`` gives one.

    Args:
        denoise: (x_t, t) -> x_hat, or (x_hat, v).
        steps: number of times, >= 2. The more, the tighter.
        times: the times, (steps,) and falling from 1, or a function (schedule, steps) -> (steps,). What is lost to
            finite steps falls as 1 / steps where they are even in log-SNR, as by default they nearly are; equal steps
            in t always lose a bit or two to the last of them. The right variance loses less.
        levels: data are these grey levels of [-1, 1]. None: they are real numbers, the bound is one on a density.
        every_step: False: one transition of each example, drawn as :class:`StratifiedTime` draws, stands for all: two
            evaluations, and the same expectation.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``steps`` < 2, ``times`` has another number, or the estimate another shape than ``x``.
    Source: Ho et al. 2020, eq. 5, arXiv:2006.11239; Kingma et al. 2021, eq. 11-14, for any schedule, arXiv:2107.00630.

    >>> from functorch_gen.noise import VPCosine
    >>> x = torch.tensor([[-1.0, 1.0, 1.0]])  # a model that knows the data
    >>> variational_bound(lambda x_t, t: x, random.key(0), x, schedule=VPCosine(), steps=10, levels=2).diffusion
    tensor([0.])
    """
    check_alike("variational_bound", x=x)
    grid = _grid("variational_bound", schedule, steps, times).to(device=x.device, dtype=x.dtype)
    key_steps, key_last = random.split(key)

    def kl(key: Key, s: Tensor, t: Tensor) -> Tensor:
        """Of the transition from t to s: (b,)."""
        x_t = mix(schedule, x, random.normal(key, x.shape, x.dtype), t)
        return transition_kl(schedule, denoise(x_t, t), x, x_t, s, t)

    def expand_time(t: Tensor) -> Tensor:
        return repeat(t, "-> b", b=x.shape[0])

    prior = 0.5 * log_snr(schedule, grid[0]).exp() * sum_per_example(x**2)
    if every_step:
        steps_back = random.split(key_steps, steps - 1), grid[1:], grid[:-1]
        diffusion = map_slices(lambda at: kl(at[0], expand_time(at[1]), expand_time(at[2])), steps_back).sum(0)
    else:
        key_choice, key_noise = random.split(key_steps)
        part = StratifiedTime()(key_choice, x.shape[:1], x.dtype)
        i = (part * (steps - 1)).long().clamp(max=steps - 2)
        diffusion = (steps - 1) * kl(key_noise, grid[i + 1], grid[i])
    t = expand_time(grid[-1])
    x_t = mix(schedule, x, random.normal(key_last, x.shape, x.dtype), t)
    reconstruction = decoder_nll(schedule, denoise(x_t, t), x, t, levels=levels)
    bits = 1 / (math.log(2) * math.prod(x.shape[1:]))
    parts = [bits * part for part in (prior, diffusion, reconstruction)]
    return VariationalBound(parts[0] + parts[1] + parts[2], *parts)


# Learned variance.


def _with_variance(
    network: Callable[[Tensor, Tensor], Tensor], x_in: Tensor, condition: Tensor
) -> tuple[Tensor, Tensor]:
    """Output and v of a network of twice the channels."""
    if x_in.ndim < 2:
        raise ValueError(f"denoiser_and_variance: x_t: expected shape (b, c, ...), got {tuple(x_in.shape)}")
    output = network(x_in, condition)
    wanted = (x_in.shape[0], 2 * x_in.shape[1], *x_in.shape[2:])
    if tuple(output.shape) != wanted:
        raise ValueError(
            f"network: expected output of shape {wanted}, for x and its variance, got {tuple(output.shape)}"
        )
    output, v = output.chunk(2, 1)
    return output, v


def denoiser_and_variance(
    network: Callable[[Tensor, Tensor], Tensor],
    *,
    schedule: NoiseSchedule,
    prediction: str | Prediction = "eps",
    clip: tuple[float, float] | None = None,
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The denoiser of a network of twice the channels: (x_t, t) -> (x_hat, v), (b, c, ...), (b,) -> (b, c, ...) twice.

    Args:
        network: (x_t, condition) -> (b, 2 c, ...): the prediction, then v, which :func:`interpolate_variance` reads.
        clip: range of the data, to which x_hat is clipped.
    Raises:
        ValueError: by the function returned, if the network's output has another shape.
    Source: Nichol and Dhariwal 2021, section 3.1, arXiv:2102.09672.

    >>> from functorch_gen.noise import VPCosine
    >>> network = lambda x_t, t: torch.cat([x_t, torch.ones_like(x_t)], 1)
    >>> x_hat, v = denoiser_and_variance(network, schedule=VPCosine(), prediction="x")(torch.zeros(1, 2), torch.ones(1))
    >>> x_hat, v
    (tensor([[0., 0.]]), tensor([[1., 1.]]))
    """
    prediction = as_prediction(prediction)

    def denoise(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        output, v = _with_variance(network, *network_inputs(prediction, x_t, t, alpha, sigma))
        x_hat = to_x(prediction, output, x_t, alpha, sigma)
        return (x_hat if clip is None else x_hat.clamp(*clip)), v

    return denoise


def hybrid_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    key: Key,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    steps: int,
    times: Times = uniform_times,
    prediction: str | Prediction = "eps",
    weighting: Weighting = "uniform",
    levels: int | None = 256,
    vlb_weight: float = 0.001,
) -> Tensor:
    """L_simple + vlb_weight L_vlb at a random one of ``steps`` times, for a network with variance: (b, c, ...) -> (b,).

    L_simple is :func:`loss`; L_vlb, ``steps`` times a term of :func:`variational_bound` in bits per dimension, trains
    the variance alone: its estimate of x is a constant.

    Args:
        network: (x_t, condition) -> (b, 2 c, ...), as for :func:`denoiser_and_variance`.
        steps, times, levels: of the chain, see :func:`variational_bound`; here the times are also those of L_simple.
        weighting: of L_simple, see :func:`loss`.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``steps`` < 2, a name is unknown, or the network's output has another shape.
    Source: Nichol and Dhariwal 2021, eq. 16, arXiv:2102.09672.

    >>> from functorch_gen.noise import VPCosine
    >>> network = lambda x_t, t: torch.cat([x_t, torch.zeros_like(x_t)], 1)
    >>> hybrid_loss(network, random.key(0), torch.zeros(4, 2), schedule=VPCosine(), steps=100).shape
    torch.Size([4])
    """
    check_alike("hybrid_loss", x=x)
    grid = _grid("hybrid_loss", schedule, steps, times).to(device=x.device, dtype=x.dtype)
    prediction = as_prediction(prediction)
    key_time, key_noise = random.split(key)
    i = random.randint(key_time, x.shape[:1], 0, steps)
    t, noise = grid[i], random.normal(key_noise, x.shape, x.dtype)
    x_t, alpha, sigma = mix(schedule, x, noise, t), schedule.alpha(t), schedule.sigma(t)
    output, v = _with_variance(network, *network_inputs(prediction, x_t, t, alpha, sigma))
    simple = loss_at(
        lambda x_t, condition: output, x, noise, t, schedule=schedule, prediction=prediction, weighting=weighting
    )
    estimate = stop_gradient(to_x(prediction, output, x_t, alpha, sigma)), v
    before = i.clamp(max=steps - 2)  # the last time has no transition, but a reconstruction
    kl = transition_kl(schedule, estimate, x, x_t, grid[before + 1], grid[before])
    term = torch.where(i == steps - 1, decoder_nll(schedule, estimate, x, t, levels=levels), kl)
    return simple + vlb_weight * steps * term / (math.log(2) * math.prod(x.shape[1:]))
