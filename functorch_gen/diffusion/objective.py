"""Training: one loss for every schedule, prediction, weighting and distribution of times; and the trained denoiser.

``network(x_t, condition) -> output`` is the model with parameters, labels and keys already bound:
``lambda x_t, t: unet(params, x_t, t, label, key=key)``. Its condition is the time t of each example (b,), or c_noise
for the prediction ``"edm"``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from einops import reduce
from torch import Tensor

from functorch_gen import random
from functorch_gen.check import check_choice, check_floating, check_shape
from functorch_gen.diffusion.prediction import (
    Prediction,
    as_prediction,
    network_inputs,
    output_scale,
    target,
    to_x,
)
from functorch_gen.noise import NoiseSchedule, log_snr, mix
from functorch_gen.typing import Key

__all__ = [
    "EDMWeight",
    "LogNormalTime",
    "LogitNormalTime",
    "MinSNRWeight",
    "StratifiedTime",
    "TimeSampler",
    "UniformTime",
    "denoiser",
    "loss",
    "loss_at",
]

Network: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, condition) -> output: (b, ...), (b,) -> (b, ...)."""

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> estimate of x: (b, ...), (b,) -> (b, ...)."""

Weighting: TypeAlias = str | Callable[[Tensor], Tensor]
"""A name, or log-SNR -> weight of the squared error of x."""

_MAX_LOG_SNR = 20.0  # beyond it weights are held constant: they stay finite at t = 0


# Times.


class TimeSampler(Protocol):
    """Draws training times in [0, 1]."""

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32, /) -> Tensor:
        """Times of the given shape."""
        ...


@dataclass(frozen=True)
class UniformTime:
    """Independent times, uniform on [low, high).

    >>> UniformTime(0.5)(random.key(0), (3,)).min() >= 0.5
    tensor(True)
    """

    low: float = 0.0
    high: float = 1.0

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape."""
        return self.low + (self.high - self.low) * random.uniform(key, shape, dtype)


@dataclass(frozen=True)
class StratifiedTime:
    """Times uniform on [0, 1), one in each of b equal intervals of a batch: the loss has less variance.

    Source: Kingma et al. 2021, appendix I.1, arXiv:2107.00630.

    >>> (4 * StratifiedTime()(random.key(0), (4,))).floor().sort().values
    tensor([0., 1., 2., 3.])
    """

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape; the first axis is the batch."""
        b, *rest = shape
        offset = torch.arange(b, dtype=dtype, device=key.device).reshape(b, *[1] * len(rest)) / b
        return (random.uniform(key, (1, *rest), dtype) + offset) % 1


@dataclass(frozen=True)
class LogitNormalTime:
    """t = sigmoid(mean + std normal): most times in the middle.

    Source: Esser et al. 2024, section 3.1, arXiv:2403.03206.

    >>> LogitNormalTime(std=0.1)(random.key(0), (100,)).sub(0.5).abs().max() < 0.1
    tensor(True)
    """

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape."""
        return torch.sigmoid(self.mean + self.std * random.normal(key, shape, dtype))


@dataclass(frozen=True)
class LogNormalTime:
    """The times of ``schedule`` at which ln(sigma / alpha) is mean + std normal, cut off at its ends.

    Source: Karras et al. 2022, table 1 (P_mean, P_std), arXiv:2206.00364.

    >>> from functorch_gen.noise import EDM
    >>> LogNormalTime(EDM(), std=0.0)(random.key(0), (1,)).allclose(EDM().t_of(torch.tensor([-1.2]).exp()))
    True
    """

    schedule: NoiseSchedule
    mean: float = -1.2
    std: float = 1.2

    def __call__(self, key: Key, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Times of the given shape."""
        return self.schedule.t_of((self.mean + self.std * random.normal(key, shape, dtype)).exp())


# Weightings: functions of the log-SNR, weights of the squared error of x.


@dataclass(frozen=True)
class MinSNRWeight:
    """min(SNR, gamma).

    Source: Hang et al. 2023, eq. 9, arXiv:2303.09556.

    >>> MinSNRWeight(gamma=5.0)(torch.tensor([0.0, 10.0]))
    tensor([1., 5.])
    """

    gamma: float = 5.0

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Of the shape of ``log_snr``."""
        return log_snr.exp().clamp(max=self.gamma)


@dataclass(frozen=True)
class EDMWeight:
    """(s^2 + sigma_data^2) / (s sigma_data)^2 with s = sigma / alpha: the loss of a fresh network is 1 at every s.

    Source: Karras et al. 2022, table 1, arXiv:2206.00364.

    >>> EDMWeight(sigma_data=0.5)(torch.tensor([0.0]))
    tensor([5.])
    """

    sigma_data: float = 0.5

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Of the shape of ``log_snr``."""
        return log_snr.exp() + 1 / self.sigma_data**2


def _weight_of_output(weighting: Weighting, prediction: Prediction, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Weight of the squared error of the output: (b,) -> (b,)."""
    if weighting == "uniform":
        return torch.ones_like(t)
    named: dict[str, Callable[[Tensor], Tensor]] = {
        "snr": torch.exp,
        "min_snr": MinSNRWeight(),
        "edm": EDMWeight(prediction.sigma_data),
    }
    if not callable(weighting):
        check_choice("loss", "weighting", weighting, ("uniform", *named))
        weighting = named[weighting]
    weight = weighting(log_snr(schedule, t).clamp(-_MAX_LOG_SNR, _MAX_LOG_SNR))
    return weight * output_scale(prediction, schedule.alpha(t), schedule.sigma(t)) ** 2


# The objective.


def loss(
    network: Network,
    key: Key,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction: str | Prediction = "v",
    weighting: Weighting = "uniform",
    time: TimeSampler = UniformTime(),
) -> Tensor:
    """Denoising loss of each example at a random time: (b, ...) -> (b,).

    weight(t) mean_i (output_i - target_i)^2, x_t = alpha(t) x + sigma(t) noise

    Args:
        weighting: ``"uniform"``: 1 for the squared error of the prediction's own target, the usual loss of each.
            The others weigh the squared error of the estimate of x: ``"snr"``, ``"min_snr"`` (:class:`MinSNRWeight`),
            ``"edm"`` (:class:`EDMWeight`), or a function of the log-SNR (b,).
        time: draws t: (key, shape, dtype) -> (b,).
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if a name is unknown, or the network's output has not the shape of ``x``.

    >>> from functorch_gen.noise import FlowMatching
    >>> x = random.normal(random.key(0), (4, 8))
    >>> loss(lambda x_t, t: x_t, random.key(1), x, schedule=FlowMatching(), prediction="flow").shape
    torch.Size([4])
    """
    check_floating(x, "loss: x")
    key_time, key_noise = random.split(key)
    t = time(key_time, x.shape[:1], x.dtype)
    noise = random.normal(key_noise, x.shape, x.dtype)
    return loss_at(network, x, noise, t, schedule=schedule, prediction=prediction, weighting=weighting)


def loss_at(
    network: Network,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction: str | Prediction = "v",
    weighting: Weighting = "uniform",
) -> Tensor:
    """:func:`loss` at given times and noise: (b, ...), (b, ...), (b,) -> (b,).

    >>> from functorch_gen.noise import FlowMatching
    >>> x, noise, t = torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0.2, 0.8])
    >>> loss_at(lambda x_t, t: torch.zeros_like(x_t), x, noise, t, schedule=FlowMatching(), prediction="flow")
    tensor([1., 1.])
    """
    prediction = as_prediction(prediction)
    x_t = mix(schedule, x, noise, t)
    output = _call(network, prediction, schedule, x_t, t)
    error = output - target(prediction, x, noise, schedule.alpha(t), schedule.sigma(t))
    weight = _weight_of_output(weighting, prediction, schedule, t)
    return weight * reduce(error**2, "b ... -> b", "mean")


def _call(network: Network, prediction: Prediction, schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Tensor:
    output = network(*network_inputs(prediction, x_t, t, schedule.alpha(t), schedule.sigma(t)))
    if output.shape != x_t.shape:
        raise ValueError(f"network: expected output of shape {tuple(x_t.shape)}, got {tuple(output.shape)}")
    return output


def denoiser(
    network: Network,
    *,
    schedule: NoiseSchedule,
    prediction: str | Prediction = "v",
    clip: tuple[float, float] | None = None,
) -> Denoise:
    """The denoiser of a network, as samplers take it: ``denoise(x_t, t)``, (b, ...), (b,) -> (b, ...).

    Args:
        clip: range of the data, to which the estimate is clipped.
    Raises:
        TypeError: by ``denoise`` if ``x_t`` is not floating.
        ValueError: by ``denoise`` if ``t`` is not (b,), or the network's output has not the shape of ``x_t``.

    >>> from functorch_gen.noise import FlowMatching
    >>> denoise = denoiser(lambda x_t, t: x_t, schedule=FlowMatching(), prediction="flow")
    >>> denoise(torch.ones(1, 2), torch.tensor([0.25]))
    tensor([[0.7500, 0.7500]])
    """
    prediction = as_prediction(prediction)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        check_floating(x_t, "denoise: x_t")
        check_shape(t, "b", "denoise: t", b=x_t.shape[0] if x_t.ndim else 1)
        output = _call(network, prediction, schedule, x_t, t)
        x_hat = to_x(prediction, output, x_t, schedule.alpha(t), schedule.sigma(t))
        return x_hat if clip is None else x_hat.clamp(*clip)

    return denoise
