"""MeanFlow: a network of the average velocity, which crosses any stretch of the flow in one evaluation.

Along the flow dx_t/dt = v(x_t, t), the average velocity from t back to r <= t is

    u(x_t, r, t) = (x_t - x_r) / (t - r),    u(x_t, t, t) = v(x_t, t)

so that x_r = x_t - (t - r) u. Differentiating (t - r) u = x_t - x_r along the flow gives the MeanFlow identity

    u = v - (t - r) du/dt

whose total derivative du/dt, through x_t and t, is one ``jvp`` along (v, 0, 1). The paper's time is ours: 0 data, 1
noise.

Source: Geng et al. 2025, arXiv:2505.13447; equations and sections below are its.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias

import torch
from einops import reduce
from torch import Tensor

from functorch_gen import random, tree
from functorch_gen.check import check_floating, check_number, check_shape
from functorch_gen.diffusion import LogitNormalTime, TimeSampler
from functorch_gen.flow_matching.paths import check_times, check_velocity, conditional_velocity
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.noise import FlowMatching, NoiseSchedule, expand, mix, uniform_times
from functorch_gen.transforms import jvp, stop_gradient
from functorch_gen.typing import Key, Number, Tree

__all__ = [
    "AverageVelocity",
    "average_velocity_target",
    "guided_velocity",
    "mean_flow_loss",
    "sample_mean_flow",
]

_LINE = FlowMatching()
_LOGIT_NORMAL = LogitNormalTime(mean=-0.4)  # section 5.1 and table 1d

AverageVelocity: TypeAlias = Callable[..., Tensor]
"""(x_t, r, t) -> u, or (x_t, r, t, condition) -> u: (b, ...), (b,), (b,) -> (b, ...)."""


def average_velocity_target(
    network: AverageVelocity, x_t: Tensor, velocity: Tensor, r: Tensor, t: Tensor, condition: Tree = None
) -> tuple[Tensor, Tensor]:
    """u(x_t, r, t) and what it should be, v - (t - r) du/dt: (b, ...), (b, ...), (b,), (b,) -> two of (b, ...).

    Both come from one ``jvp``; the target is a constant to derivatives. It is linear in the velocity: in the mean over
    data and noise given x_t, the velocity of the pair does the same as that of the flow.

    Raises:
        ValueError: if ``r`` and ``t`` are not (b,), or velocity or output have not the shape of ``x_t``.
    Source: eq. 6 to 11.

    >>> network = lambda x_t, r, t: x_t * t[:, None]
    >>> x_t, velocity, r, t = torch.full((1, 1), 2.0), torch.ones(1, 1), torch.zeros(1), torch.full((1,), 0.5)
    >>> average_velocity_target(network, x_t, velocity, r, t)  # du/dt = 1 * 0.5 + 2
    (tensor([[1.]]), tensor([[-0.2500]]))
    """
    check_times(r, x_t, "average_velocity_target: r")
    check_times(t, x_t, "average_velocity_target: t")
    check_velocity(velocity, x_t, "average_velocity_target: velocity")
    tangents = velocity, torch.zeros_like(r), torch.ones_like(t)
    u, du_dt = jvp(lambda x_t, r, t: _call(network, x_t, r, t, condition), (x_t, r, t), tangents)
    return u, stop_gradient(velocity - expand(t - r, u) * du_dt)


def _call(network: AverageVelocity, x_t: Tensor, r: Tensor, t: Tensor, condition: Tree) -> Tensor:
    u = network(x_t, r, t) if condition is None else network(x_t, r, t, condition)
    check_velocity(u, x_t)
    return u


def guided_velocity(
    network: AverageVelocity,
    x_t: Tensor,
    velocity: Tensor,
    t: Tensor,
    condition: Tree,
    null_condition: Tree,
    *,
    omega: Number,
    kappa: Number = 0.0,
) -> Tensor:
    """omega v + kappa u(x_t, t, t, condition) + (1 - omega - kappa) u(x_t, t, t, null_condition): (b, ...) -> (b, ...).

    A network that averages this velocity has classifier-free guidance of scale omega / (1 - kappa) built in, at no cost
    to the sampler. Constant to derivatives.

    Args:
        velocity: of the pair behind ``x_t``.
        null_condition: the condition that says that there is none.
        omega, kappa: numbers, or one for each example (b,); omega = 1 and kappa = 0 do not guide it.
    Raises:
        ValueError: if omega or kappa is a tensor neither 0-d nor (b,), or the output has not the shape of ``x_t``.
    Source: section 4.2 and appendix B.1.

    >>> network = lambda x_t, r, t, label: x_t * label[:, None]
    >>> x_t, label, none = torch.ones(1, 2), torch.tensor([3]), torch.tensor([1])
    >>> guided_velocity(network, x_t, 5 * x_t, torch.ones(1), label, none, omega=2.0, kappa=0.5)
    tensor([[10., 10.]])
    """
    for name, scale in {"omega": omega, "kappa": kappa}.items():
        if isinstance(scale, Tensor) and scale.ndim:
            check_times(scale, x_t, f"guided_velocity: {name}")
    guided = expand(omega, x_t) * velocity
    guided = guided + expand(1 - omega - kappa, x_t) * _call(network, x_t, t, t, null_condition)
    if isinstance(kappa, Tensor) or kappa:
        guided = guided + expand(kappa, x_t) * _call(network, x_t, t, t, condition)
    return stop_gradient(guided)


def mean_flow_loss(
    network: AverageVelocity,
    key: Key,
    x: Tensor,
    condition: Tree = None,
    *,
    schedule: NoiseSchedule = _LINE,
    time: TimeSampler = _LOGIT_NORMAL,
    ratio: float = 0.25,
    guide: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None,
    power: Number = 1.0,
    eps: Number = 1e-3,
) -> Tensor:
    """MeanFlow loss of each example at two random times: (b, ...) -> (b,).

    error / (error + eps)^power with error = mean_i (u_i - target_i)^2, see :func:`average_velocity_target`, and the
    divisor constant to derivatives.

    Args:
        network: the model with its parameters bound: ``network(x_t, r, t) -> u``, or ``network(x_t, r, t, condition)``.
        condition: tree of tensors (b, ...), as labels; None: there is none.
        schedule: the path; by default the line.
        time: draws two times, (key, shape, dtype) -> (b, 2), of which r is the earlier and t the later; by default the
            paper's, logit-normal of mean -0.4.
        ratio: share of the batch with r < t, in [0, 1]. They are its first examples, and at least one unless it is 0;
            the rest have r = t, where the target is the velocity and needs no ``jvp``. Batches must be shuffled.
        guide: ``guide(x_t, velocity, t) -> velocity``, held constant: :func:`guided_velocity`, say; or a trained
            velocity, which is the mean of those of the pairs, and so has the same minimum with less noise.
        power: 0 is the squared error, 1 the same weight for all examples.
    Raises:
        TypeError: if ``x`` is not floating, or a leaf of ``condition`` is no tensor (names the path).
        ValueError: if ``ratio`` is not in [0, 1], the network's output or the guide's has not the shape of ``x``, the
            times are not (b, 2), or a leaf of ``condition`` is not (b, ...).
    Source: algorithm 1 and section 4.3.

    >>> x = random.normal(random.key(0), (4, 8))
    >>> mean_flow_loss(lambda x_t, r, t: x_t, random.key(1), x).shape
    torch.Size([4])
    """
    check_floating(x, "mean_flow_loss: x")
    check_number("mean_flow_loss", "ratio", ratio, low=0, high=1)
    check_number("mean_flow_loss", "eps", eps, low=0)
    b = _examples(x, condition)
    key_time, key_noise = random.split(key)
    times, noise = time(key_time, (b, 2), x.dtype), random.normal(key_noise, x.shape, x.dtype)
    check_shape(times, "b 2", "mean_flow_loss: times", b=b)
    r, t = times.amin(1), times.amax(1)
    x_t, velocity = mix(schedule, x, noise, t), conditional_velocity(schedule, x, noise, t)
    if guide is not None:
        velocity = stop_gradient(guide(x_t, velocity, t))
        check_velocity(velocity, x_t, "mean_flow_loss: guide")
    apart = max(1, round(ratio * b)) if ratio else 0
    u, target = _outputs_and_targets(network, apart, x_t, velocity, r, t, condition)
    error = reduce((u - target) ** 2, "b ... -> b", "mean")
    weighted = isinstance(power, Tensor) or power != 0
    return error / stop_gradient(error + eps) ** power if weighted else error


def _examples(x: Tensor, condition: Tree) -> int:
    """How many there are; all leaves of the condition have as many."""
    if not x.ndim:
        raise ValueError("mean_flow_loss: x: expected shape (b, ...), got ()")
    b = x.shape[0]
    for path, leaf in ({} if condition is None else tree.names(condition)).items():
        name = f"mean_flow_loss: condition{path and f' at {path!r}'}: expected a tensor of shape (b={b}, ...)"
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name}, got {type(leaf).__name__}")
        if leaf.shape[:1] != (b,):
            raise ValueError(f"{name}, got {tuple(leaf.shape)}")
    return b


def _outputs_and_targets(
    network: AverageVelocity, apart: int, x_t: Tensor, velocity: Tensor, r: Tensor, t: Tensor, condition: Tree
) -> tuple[Tensor, Tensor]:
    """What the network says and should say, with r = t for all but the first ``apart`` examples."""
    first, rest = (
        tree.map(lambda leaf, part=part: leaf[part], (x_t, velocity, r, t, condition))
        for part in (slice(None, apart), slice(apart, None))
    )
    pairs = [average_velocity_target(network, *first)] if apart else []
    if apart < len(x_t):
        x_t, velocity, _, t, condition = rest
        pairs.append((_call(network, x_t, t, t, condition), velocity))
    u, target = (torch.cat(parts) for parts in zip(*pairs))
    return u, target


def sample_mean_flow(
    key: Key,
    network: AverageVelocity,
    shape: Sequence[int],
    *,
    steps: int = 1,
    times: Tensor | None = None,
    schedule: NoiseSchedule = _LINE,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Samples in one evaluation of the network, or a few: -> (b, ...).

    From noise at t = 1, each step goes to x_r = x_t - (t - r) u(x_t, r, t); the last to r = 0.

    Args:
        network: ``network(x_t, r, t) -> u``.
        times: where the steps begin, (steps,) and falling from 1; by default equally spaced.
        schedule: of the training, whose sigma(1) is the scale of the noise; by default the line.
    Raises:
        TypeError: if ``steps`` is no int.
        ValueError: if ``steps`` is not positive, or shapes do not fit.
    Source: eq. 12 and algorithm 2.

    >>> to_three = lambda x_t, r, t: (x_t - 3) / t[:, None]
    >>> sample_mean_flow(random.key(0), to_three, (1, 2))
    tensor([[3., 3.]])
    """
    check_sizes("sample_mean_flow", steps=steps)
    times = uniform_times(schedule, steps) if times is None else times
    check_shape(times, "steps", "sample_mean_flow: times", steps=steps)
    times = torch.cat([times, times.new_zeros(1)]).to(key.device, dtype)
    x_t = schedule.sigma(times[0]) * random.normal(key, shape, dtype)
    for t, r in pairwise(times):
        x_t = x_t - (t - r) * _call(network, x_t, r.expand(len(x_t)), t.expand(len(x_t)), None)
    return x_t
