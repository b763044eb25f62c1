"""Flow matching: a network learns the velocity that carries noise into data.

``velocity(x_t, t)`` is the model with its parameters bound: ``lambda x_t, t: net(params, x_t, t, label)``.
"""

from collections.abc import Callable
from typing import TypeAlias

from einops import reduce
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_floating
from functorch_gen.diffusion import TimeSampler, UniformTime
from functorch_gen.flow_matching.paths import Velocity, check_times, check_velocity, conditional_velocity
from functorch_gen.noise import FlowMatching, NoiseSchedule, mix
from functorch_gen.typing import Key

__all__ = ["Coupling", "loss", "loss_at"]

_LINE = FlowMatching()
_UNIFORM = UniformTime()

Coupling: TypeAlias = Callable[[Key, Tensor, Tensor], Tensor]
"""(key, x, noise) -> the noise that each example of x is paired with: (b, ...), (b, ...) -> (b, ...)."""


def loss(
    velocity: Velocity,
    key: Key,
    x: Tensor,
    *,
    noise: Tensor | None = None,
    schedule: NoiseSchedule = _LINE,
    time: TimeSampler = _UNIFORM,
    coupling: Coupling | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Flow-matching loss of each example at a random time: (b, ...) -> (b,).

    weight(t) mean_i (velocity(x_t, t)_i - (dalpha/dt x + dsigma/dt noise)_i)^2, x_t = alpha(t) x + sigma(t) noise

    Args:
        noise: given, the noise that each example is paired with, as by :func:`exact_coupling` or :func:`reflow`.
        schedule: the path; by default the line.
        time: draws t, (key, shape, dtype) -> (b,); by default uniform.
        coupling: pairs examples with noise; None: at random.
        weighting: weight of each time, (b,) -> (b,); None: 1.
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if the network's output or the noise has not the shape of ``x``, or times or weights are not (b,).
    Source: Lipman et al. 2023, eq. 14 and 23, arXiv:2210.02747; Tong et al. 2023, algorithm 1, arXiv:2302.00482.

    >>> x = random.normal(random.key(0), (4, 8))
    >>> loss(lambda x_t, t: x_t, random.key(1), x).shape
    torch.Size([4])
    """
    check_floating(x, "loss: x")
    key_time, key_noise, key_coupling = random.split(key, 3)
    noise = random.normal(key_noise, x.shape, x.dtype) if noise is None else noise
    noise = noise if coupling is None else coupling(key_coupling, x, noise)
    t = time(key_time, x.shape[:1], x.dtype)
    return loss_at(velocity, x, noise, t, schedule=schedule, weighting=weighting)


def loss_at(
    velocity: Velocity,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    schedule: NoiseSchedule = _LINE,
    weighting: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """:func:`loss` at given times and noise: (b, ...), (b, ...), (b,) -> (b,).

    >>> x, noise, t = (random.normal(random.key(i), shape) for i, shape in enumerate(((2, 3), (2, 3), (2,))))
    >>> loss_at(lambda x_t, t: noise - x, x, noise, t)
    tensor([0., 0.])
    """
    x_t = mix(schedule, x, noise, t)
    output = velocity(x_t, t)
    check_velocity(output, x_t)
    error = reduce((output - conditional_velocity(schedule, x, noise, t)) ** 2, "b ... -> b", "mean")
    if weighting is None:
        return error
    weight = weighting(t)
    check_times(weight, x, "loss: weighting(t)")
    return weight * error
