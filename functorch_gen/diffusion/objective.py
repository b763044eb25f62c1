"""Training: one loss for every schedule, prediction, weighting and distribution of times; and the trained denoiser.

``network(x_t, condition) -> output`` is the model with parameters, labels and keys already bound:
``lambda x_t, t: unet(params, x_t, t, label, key=key)``. Its condition is the time t of each example (b,), or c_noise
for the prediction ``"edm"``.
"""

from collections.abc import Callable
from typing import TypeAlias

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
from functorch_gen.diffusion.times import TimeSampler, UniformTime
from functorch_gen.diffusion.weightings import (
    EDMWeight,
    MinSNRWeight,
    P2Weight,
    balance,
    bounded_log_snr,
    likelihood_weight,
)
from functorch_gen.losses.per_example import check_alike
from functorch_gen.noise import NoiseSchedule, mix
from functorch_gen.typing import Key

__all__ = ["denoiser", "loss", "loss_at"]

Network: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, condition) -> output: (b, ...), (b,) -> (b, ...)."""

Denoise: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""(x_t, t) -> estimate of x: (b, ...), (b,) -> (b, ...)."""

Weighting: TypeAlias = str | Callable[[Tensor], Tensor]
"""A name, or log-SNR -> weight of the squared error of x."""

Level: TypeAlias = Callable[[Tensor], Tensor]
"""log-SNR -> u, the logarithm of the loss to be expected there: (b,) -> (b,)."""

_UNIFORM = UniformTime()


def loss(
    network: Network,
    key: Key,
    x: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction: str | Prediction = "v",
    weighting: Weighting = "uniform",
    uncertainty: Level | None = None,
    time: TimeSampler = _UNIFORM,
) -> Tensor:
    """Denoising loss of each example at a random time: (b, ...) -> (b,).

    weight(t) mean_i (output_i - target_i)^2, x_t = alpha(t) x + sigma(t) noise

    Args:
        weighting: ``"uniform"``: 1 for the squared error of the prediction's own target, the usual loss of each.
            The others weigh the squared error of the estimate of x: ``"snr"``, ``"min_snr"`` (:class:`MinSNRWeight`),
            ``"p2"`` (:class:`P2Weight`), ``"edm"`` (:class:`EDMWeight`), ``"likelihood"`` (:func:`likelihood_weight`,
            for times uniform on [0, 1]), or a function of the log-SNR (b,).
        uncertainty: u(log-SNR), (b,) -> (b,), as :class:`Uncertainty` learns it: the loss becomes loss / exp(u) + u.
        time: draws t: (key, shape, dtype) -> (b,).
    Raises:
        TypeError: if ``x`` is not floating.
        ValueError: if a name is unknown, the network's output has not the shape of ``x``, or ``weighting`` or
            ``uncertainty`` does not return (b,).

    >>> from functorch_gen.noise import FlowMatching
    >>> x = random.normal(random.key(0), (4, 8))
    >>> loss(lambda x_t, t: x_t, random.key(1), x, schedule=FlowMatching(), prediction="flow").shape
    torch.Size([4])
    """
    check_alike("loss", x=x)
    key_time, key_noise = random.split(key)
    t = time(key_time, x.shape[:1], x.dtype)
    noise = random.normal(key_noise, x.shape, x.dtype)
    return loss_at(
        network, x, noise, t, schedule=schedule, prediction=prediction, weighting=weighting, uncertainty=uncertainty
    )


def loss_at(
    network: Network,
    x: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    schedule: NoiseSchedule,
    prediction: str | Prediction = "v",
    weighting: Weighting = "uniform",
    uncertainty: Level | None = None,
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
    losses = _weight_of_output(weighting, prediction, schedule, t) * reduce(error**2, "b ... -> b", "mean")
    return losses if uncertainty is None else balance(losses, uncertainty(bounded_log_snr(schedule, t)))


def _call(network: Network, prediction: Prediction, schedule: NoiseSchedule, x_t: Tensor, t: Tensor) -> Tensor:
    output = network(*network_inputs(prediction, x_t, t, schedule.alpha(t), schedule.sigma(t)))
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    if found != tuple(x_t.shape):
        raise ValueError(f"network: expected output of shape {tuple(x_t.shape)}, got {found}")
    return output


def _weight_of_output(weighting: Weighting, prediction: Prediction, schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Weight of the squared error of the output: (b,) -> (b,)."""
    if weighting == "uniform":
        return torch.ones_like(t)
    named: dict[str, Callable[[Tensor], Tensor]] = {
        "snr": torch.exp,
        "min_snr": MinSNRWeight(),
        "p2": P2Weight(),
        "edm": EDMWeight(prediction.sigma_data),
        "likelihood": lambda _: likelihood_weight(schedule, t),
    }
    if not callable(weighting):
        check_choice("loss", "weighting", weighting, ("uniform", *named))
        weighting = named[weighting]
    weight = weighting(bounded_log_snr(schedule, t))
    check_shape(weight, "b", "loss: weighting", b=t.shape[0])
    return weight * output_scale(prediction, schedule.alpha(t), schedule.sigma(t)) ** 2


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
