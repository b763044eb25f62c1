"""Continuous-time consistency models: a network that maps any point of the flow to its data at once.

On the circle x_t = cos(a) x + sin(a) sigma_data noise, a = pi t / 2 (:class:`Trigonometric`, with noise as wide as the
data), the consistency function and its derivative along the flow are

    f(x_t, t) = cos(a) x_t - sin(a) sigma_data F(x_t / sigma_data, t)
    df/da = cos(a) (dx_t/da - sigma_data F) - sin(a) (x_t + sigma_data dF/da)

f is the data at a = 0, and right where df/da = 0. Training moves F along the tangent cos(a) df/da, which one ``jvp``
gives. The paper's time is the angle a: 0 at the data, as ours.

Source: Lu and Song 2024, arXiv:2410.11081; equations and sections below are its.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from einops import reduce
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating, check_positive
from functorch_gen.diffusion import LogNormalTime, TimeSampler
from functorch_gen.flow_matching.paths import Trigonometric, Velocity, check_times, check_velocity, conditional_velocity
from functorch_gen.noise import expand, mix
from functorch_gen.numerics import sqrt
from functorch_gen.transforms import jvp, stop_gradient
from functorch_gen.typing import Key, Number

__all__ = ["consistency_function", "consistency_loss", "consistency_tangent", "sample_consistency"]

_CIRCLE = Trigonometric()


def _scales(name: str, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """cos(a) and sin(a), shaped to multiply x: (b,), (b, ...) -> two of (b, 1, ...)."""
    check_times(t, x, f"{name}: t")
    cos, sin = (expand(scale, x) for scale in (_CIRCLE.alpha(t), _CIRCLE.sigma(t)))
    return torch.as_tensor(cos), torch.as_tensor(sin)


def consistency_function(network: Velocity, *, sigma_data: float = 1.0) -> Velocity:
    """f(x_t, t) = cos(a) x_t - sin(a) sigma_data F(x_t / sigma_data, t): the data at the end of the flow through x_t.

    Args:
        network: F, ``network(x_t / sigma_data, t)``: (b, ...), (b,) -> (b, ...).
        sigma_data: standard deviation of the data, and of the noise.
    Source: section 3 (TrigFlow).

    >>> f = consistency_function(lambda x, t: torch.zeros_like(x))
    >>> f(torch.ones(2, 1), torch.tensor([0.0, 1.0])).abs() < 1e-6
    tensor([[False],
            [ True]])
    """
    check_positive("consistency_function", sigma_data=sigma_data)

    def consistency(x_t: Tensor, t: Tensor) -> Tensor:
        cos, sin = _scales("consistency_function", t, x_t)
        output = network(x_t / sigma_data, t)
        check_velocity(output, x_t)
        return cos * x_t - sin * sigma_data * output

    return consistency


def consistency_tangent(
    network: Velocity, x_t: Tensor, velocity: Tensor, t: Tensor, *, sigma_data: float = 1.0, warmup: Number = 1.0
) -> tuple[Tensor, Tensor]:
    """F and the tangent along which it moves, cos(a) df/da: (b, ...), (b, ...), (b,) -> two of (b, ...).

    -cos(a)^2 (sigma_data F - dx_t/da) - warmup cos(a) sin(a) (x_t + sigma_data dF/da)

    Both come from one ``jvp``, whose direction is scaled by cos(a) sin(a), so that nothing is large; the tangent is a
    constant to derivatives. It is linear in the velocity.

    Args:
        velocity: dx_t/dt = (pi / 2) dx_t/da.
        warmup: 1, or less at first: without the second term it is flow matching.
    Raises:
        ValueError: if ``t`` is not (b,), or velocity or output have not the shape of ``x_t``.
    Source: section 4 (JVP rearrangement, tangent warm-up), eq. 8.

    >>> x_t, t = torch.ones(1, 1), torch.zeros(1)
    >>> consistency_tangent(lambda x, t: 2 * x, x_t, math.pi * x_t, t)  # at the data: dx_t/da - F
    (tensor([[2.]]), tensor([[0.]]))
    """
    cos, sin = _scales("consistency_tangent", t, x_t)
    check_velocity(velocity, x_t, "consistency_tangent: velocity")
    per_angle = 2 / math.pi
    along = cos * sin * per_angle * velocity / sigma_data
    of_time = _CIRCLE.alpha(t) * _CIRCLE.sigma(t) * per_angle
    output, moved = jvp(network, (x_t / sigma_data, t), (along, of_time))
    check_velocity(output, x_t)
    kept = cos**2 * (per_angle * velocity - sigma_data * output)
    return output, stop_gradient(kept - warmup * (cos * sin * x_t + sigma_data * moved))


def consistency_loss(
    network: Velocity,
    key: Key,
    x: Tensor,
    *,
    sigma_data: float = 1.0,
    teacher: Velocity | None = None,
    warmup: Number = 1.0,
    time: TimeSampler | None = None,
    log_weight: Callable[[Tensor], Tensor] | None = None,
    eps: Number = 0.1,
) -> Tensor:
    """Consistency loss of each example at a random time: (b, ...) -> (b,).

    exp(w(t)) mean_i (F_i - constant_i - g_i)^2 - w(t), where the constant is F itself and g = tangent / (|tangent| +
    eps): the value tells little, the gradient moves F along g. See :func:`consistency_tangent`.

    Args:
        network: F with its parameters bound: ``network(x_t / sigma_data, t)``.
        teacher: a trained velocity dx_t/dt of the same path, ``teacher(x_t, t)``: distillation (sCD). None: the
            velocity of the pair: training from data alone (sCT).
        warmup: see :func:`consistency_tangent`; the paper raises it from 0 to 1 over the first 10,000 steps.
        time: draws t; None: ln tan(a) = z - ln(sigma_data), with z normal of mean -1 and standard deviation 1.4.
        log_weight: w, learned: (b,) -> (b,); None: 0.
        eps: of the tangents' norm, the root of the mean square of an example.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if ``sigma_data`` is not positive, the output of the network or of the teacher has not the shape of
            ``x``, or times or log-weights are not (b,).
    Source: algorithm 1 and eq. 8; section 4.2 (tangent normalisation, adaptive weighting).

    >>> x = random.normal(random.key(0), (4, 8))
    >>> consistency_loss(lambda x, t: torch.zeros_like(x), random.key(1), x).shape
    torch.Size([4])
    """
    check_floating(x, "consistency_loss: x")
    check_positive("consistency_loss", sigma_data=sigma_data)
    time = LogNormalTime(_CIRCLE, -1.0 - math.log(sigma_data), 1.4) if time is None else time
    key_time, key_noise = random.split(key)
    t, noise = time(key_time, x.shape[:1], x.dtype), sigma_data * random.normal(key_noise, x.shape, x.dtype)
    x_t = mix(_CIRCLE, x, noise, t)
    velocity = conditional_velocity(_CIRCLE, x, noise, t) if teacher is None else stop_gradient(teacher(x_t, t))
    output, tangent = consistency_tangent(network, x_t, velocity, t, sigma_data=sigma_data, warmup=warmup)
    size = sqrt(reduce(tangent**2, "b ... -> b", "mean"))
    goal = stop_gradient(output) + tangent / expand(size + eps, tangent)
    error = reduce((output - goal) ** 2, "b ... -> b", "mean")
    if log_weight is None:
        return error
    w = log_weight(t)
    check_times(w, x, "consistency_loss: log_weight(t)")
    return w.exp() * error - w


def sample_consistency(
    key: Key,
    consistency: Velocity,
    shape: Sequence[int],
    *,
    times: Sequence[float] = (1.0,),
    sigma_data: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Samples in one evaluation for each of ``times``: -> (b, ...).

    The estimate of the data is noised anew to the next time, and estimated again.

    Args:
        consistency: f, of :func:`consistency_function`.
        times: falling from 1; ``(1.0, 0.7)`` is the paper's second step, at the angle 1.1.
    Raises:
        ValueError: if there is no time, they do not fall within (0, 1], or the estimate has not the given shape.
    Source: Song et al. 2023, algorithm 1, arXiv:2303.01469; section 5.2.

    >>> f = consistency_function(lambda x, t: x)
    >>> sample_consistency(random.key(0), f, (2, 3), times=(1.0, 0.7)).shape
    torch.Size([2, 3])
    """
    check_positive("sample_consistency", sigma_data=sigma_data)
    if not len(times):
        raise ValueError("sample_consistency: expected times, got none")
    if not all(1 >= time > after for time, after in pairwise((*times, 0.0))):
        raise ValueError(f"sample_consistency: expected times that fall within (0, 1], got {times}")
    x = torch.zeros(tuple(shape), dtype=dtype, device=key.device)
    for i, time in enumerate(times):
        noise = sigma_data * random.normal(random.fold_in(key, i), shape, dtype)
        t = x.new_full((len(x),), time)
        x_t = mix(_CIRCLE, x, noise, t)
        x = consistency(x_t, t)
        check_velocity(x, x_t, "sample_consistency: consistency")
    return x
