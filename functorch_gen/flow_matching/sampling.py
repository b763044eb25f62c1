"""Along a velocity: samples, likelihoods, and pairs for the next round of rectified flow.

All solve dx_t/dt = velocity(x_t, t), from noise at t = 1 to data at t = 0 or back, by :func:`functorch_gen.ode.solve`.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import reduce
from torch import Tensor

from functorch_gen import ode, random
from functorch_gen.flow_matching.paths import Velocity, check_velocity
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.noise import FlowMatching, NoiseSchedule
from functorch_gen.typing import Key

__all__ = ["log_prob", "reflow", "sample", "straightness"]

_LINE = FlowMatching()
_LOG_2PI = math.log(2 * math.pi)


def _field(velocity: Velocity) -> Velocity:
    """The velocity at one time for all examples: (b, ...), () -> (b, ...)."""

    def field(x_t: Tensor, t: Tensor) -> Tensor:
        output = velocity(x_t, t.expand(len(x_t)))
        check_velocity(output, x_t)
        return output

    return field


def _times(name: str, start: float, end: float, steps: int, like: Tensor) -> Tensor:
    check_sizes(name, steps=steps)
    return torch.linspace(start, end, steps + 1, dtype=like.dtype, device=like.device)


def _sigma_end(schedule: NoiseSchedule, times: Tensor) -> Tensor:
    """Standard deviation of the noise at t = 1: -> ()."""
    return schedule.sigma(torch.ones_like(times[0]))


def sample(
    key: Key,
    velocity: Velocity,
    shape: Sequence[int],
    *,
    steps: int,
    method: str = "midpoint",
    schedule: NoiseSchedule = _LINE,
    dtype: torch.dtype = torch.float32,
    return_path: bool = False,
) -> Tensor:
    """Samples, by ``steps`` equal steps from noise to data: -> (b, ...), with ``return_path`` (steps + 1, b, ...).

    Args:
        method: of :func:`ode.solve`. The midpoint rule never asks for t = 0, where the velocity towards data that
            lie on a surface is singular: there it is ten times as exact as Heun's method of the same cost.
        schedule: of the training, whose sigma(1) is the scale of the noise; by default the line.
    Raises:
        TypeError: if ``steps`` is no int.
        ValueError: if ``steps`` is not positive, or the network's output has not the given shape.

    >>> to_three = lambda x_t, t: (x_t - 3) / t[:, None]  # straight to the point 3
    >>> sample(random.key(0), to_three, (2, 1), steps=1, method="euler")
    tensor([[3.],
            [3.]])
    """
    noise = random.normal(key, shape, dtype)
    times = _times("sample", 1.0, 0.0, steps, noise)
    noise = _sigma_end(schedule, times) * noise
    return ode.solve(_field(velocity), noise, times, method=method, return_path=return_path)


def log_prob(
    velocity: Velocity,
    x: Tensor,
    *,
    steps: int,
    key: Key | None = None,
    num_probes: int = 1,
    method: str = "rk4",
    schedule: NoiseSchedule = _LINE,
) -> Tensor:
    """Log-density of the data that ``velocity`` makes of normal noise: (b, ...) -> (b,), in nats.

    Args:
        key: None: with the exact divergence; else Hutchinson's estimate from ``num_probes`` probes.
        steps: of the solver, from x to its noise.
        schedule: of the training, whose sigma(1) is the scale of the noise; by default the line.
    Source: :func:`ode.log_prob`; Lipman et al. 2023, appendix C, arXiv:2210.02747.

    >>> standing = lambda x_t, t: torch.zeros_like(x_t)
    >>> log_prob(standing, torch.zeros(1, 2), steps=1)  # -log(2 pi)
    tensor([-1.8379])
    """
    times = _times("log_prob", 0.0, 1.0, steps, x)
    sigma = _sigma_end(schedule, times)

    def log_prob_noise(noise: Tensor) -> Tensor:
        return reduce(-0.5 * ((noise / sigma) ** 2 + _LOG_2PI) - sigma.log(), "b ... -> b", "sum")

    options: dict[str, Any] = {"key": key, "num_probes": num_probes, "method": method}
    return ode.log_prob(velocity, x, times, log_prob_noise, **options)


def reflow(
    key: Key,
    velocity: Velocity,
    shape: Sequence[int],
    *,
    steps: int,
    method: str = "midpoint",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Noise, and the sample that the flow makes of it: -> ``(x, noise)``, two of (b, ...).

    Training on such pairs, ``loss(velocity, key, x, noise=noise)``, is one more round of rectified flow: the density at
    t = 0 stays, the paths become straighter, and few steps suffice.

    Source: Liu et al. 2023, algorithm 1 (Reflow), arXiv:2209.03003.

    >>> to_three = lambda x_t, t: (x_t - 3) / t[:, None]
    >>> x, noise = reflow(random.key(0), to_three, (2, 1), steps=1, method="euler")
    >>> x.flatten()
    tensor([3., 3.])
    """
    path = sample(key, velocity, shape, steps=steps, method=method, dtype=dtype, return_path=True)
    return path[-1], path[0]


def straightness(
    key: Key,
    velocity: Velocity,
    shape: Sequence[int],
    *,
    steps: int,
    method: str = "midpoint",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """How far paths are from straight lines run through at constant speed: -> (b,); 0 if they are such.

    mean_i integral over [0, 1] of ((noise - x)_i - dx_t,i/dt)^2 dt, with the velocity in each of the ``steps`` taken
    for its mean: the error is of second order.

    Source: Liu et al. 2023, section 2.2 (S(Z)), arXiv:2209.03003.

    >>> to_three = lambda x_t, t: (x_t - 3) / t[:, None]
    >>> straightness(random.key(0), to_three, (2, 1), steps=4, method="euler") < 1e-9
    tensor([True, True])
    """
    path = sample(key, velocity, shape, steps=steps, method=method, dtype=dtype, return_path=True)
    speeds = (path[:-1] - path[1:]) * steps
    return reduce((path[0] - path[-1] - speeds) ** 2, "steps b ... -> b", "mean")
