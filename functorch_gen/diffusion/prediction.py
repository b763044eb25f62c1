"""What a network's output stands for, and the conversions between the choices.

Every choice is a linear combination of data and noise, target = a x + b noise, with a and b functions of alpha and
sigma. Together with x_t = alpha x + sigma noise it can be solved for both, so that any choice converts to any other.

``alpha`` and ``sigma`` are numbers, 0-d tensors or one value per example (b,). A prediction is given by its name or,
where the standard deviation of the data matters, as :class:`Prediction`.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from functorch_gen.check import check_choice, check_positive
from functorch_gen.noise import expand
from functorch_gen.typing import Number

__all__ = ["Prediction", "as_prediction", "convert", "network_inputs", "output_scale", "target", "to_noise", "to_x"]


@dataclass(frozen=True)
class Prediction:
    """What the output of a network estimates.

    ==========  ======================================================================================
    ``"eps"``   the noise (Ho et al. 2020); says nothing of the data where alpha = 0
    ``"x"``     the data
    ``"v"``     alpha noise - sigma x (Salimans and Ho 2022, appendix D)
    ``"flow"``  the velocity noise - x (Lipman et al. 2023; Liu et al. 2023)
    ``"edm"``   the data after preconditioning: D = c_skip x_t + c_out F(c_in x_t, c_noise)
                (Karras et al. 2022, eq. 7 and table 1, of x_t / alpha at noise level sigma / alpha)
    ==========  ======================================================================================

    Args:
        sigma_data: standard deviation of the data, for ``"edm"``.

    >>> Prediction("edm", sigma_data=1.0)
    Prediction(kind='edm', sigma_data=1.0)
    """

    kind: str
    sigma_data: float = 0.5

    def __post_init__(self):
        check_choice("Prediction", "kind", self.kind, ("eps", "x", "v", "flow", "edm"))
        check_positive("Prediction", sigma_data=self.sigma_data)


Choice: TypeAlias = str | Prediction
Scale: TypeAlias = Number


def as_prediction(prediction: Choice) -> Prediction:
    """The prediction of that name.

    >>> as_prediction("v").kind
    'v'
    """
    return prediction if isinstance(prediction, Prediction) else Prediction(prediction)


def _scales(alpha: Scale, sigma: Scale, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both scales as tensors that broadcast with ``x``."""
    alpha, sigma = expand(alpha, x), expand(sigma, x)
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return (
        alpha if isinstance(alpha, Tensor) else zero + alpha,
        sigma if isinstance(sigma, Tensor) else zero + sigma,
    )


def _spread(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Standard deviation of x_t for data of standard deviation sigma_data."""
    return ((alpha * prediction.sigma_data) ** 2 + sigma**2).sqrt()


def _coefficients(prediction: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of target = a x + b noise."""
    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    if prediction.kind == "edm":
        spread, sigma_data = _spread(prediction, alpha, sigma), prediction.sigma_data
        return sigma / (sigma_data * spread), -sigma_data * alpha / spread
    return {"eps": (zero, one), "x": (one, zero), "v": (-sigma, alpha), "flow": (-one, one)}[prediction.kind]


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and a where b is 0: finite wherever a is."""
    return a / torch.where(b == 0, 1, b)


def target(prediction: Choice, x: Tensor, noise: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """What the network should put out for data ``x`` and a draw ``noise``: (b, ...), (b, ...) -> (b, ...).

    >>> target("flow", torch.ones(1, 2), torch.zeros(1, 2), 0.5, 0.5)
    tensor([[-1., -1.]])
    """
    a, b = _coefficients(as_prediction(prediction), *_scales(alpha, sigma, x))
    return a * x + b * noise


def to_x(prediction: Choice, output: Tensor, x_t: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """The estimate of the data behind an output: (b, ...), (b, ...) -> (b, ...).

    For ``"edm"`` it equals c_skip y + c_out F with y = x_t / alpha, s = sigma / alpha (Karras et al. 2022, table 1).

    >>> to_x("eps", torch.ones(1, 2), torch.ones(1, 2), 0.5, 0.5)
    tensor([[1., 1.]])
    """
    prediction = as_prediction(prediction)
    if prediction.kind == "x":
        return output
    alpha, sigma = _scales(alpha, sigma, x_t)
    a, b = _coefficients(prediction, alpha, sigma)
    return _divide(b * x_t - sigma * output, alpha * b - sigma * a)


def to_noise(prediction: Choice, output: Tensor, x_t: Tensor, alpha: Scale, sigma: Scale) -> Tensor:
    """The estimate of the noise behind an output: (b, ...), (b, ...) -> (b, ...).

    >>> to_noise("x", torch.zeros(1, 2), torch.ones(1, 2), 0.5, 0.5)
    tensor([[2., 2.]])
    """
    prediction = as_prediction(prediction)
    if prediction.kind == "eps":
        return output
    alpha, sigma = _scales(alpha, sigma, x_t)
    a, b = _coefficients(prediction, alpha, sigma)
    return _divide(alpha * output - a * x_t, alpha * b - sigma * a)


def convert(output: Tensor, x_t: Tensor, alpha: Scale, sigma: Scale, *, source: Choice, to: Choice) -> Tensor:
    """The output of a network of prediction ``to`` that says the same as ``output`` of prediction ``source``.

    >>> convert(torch.ones(1, 2), torch.ones(1, 2), 0.5, 0.5, source="eps", to="flow")
    tensor([[0., 0.]])
    """
    x = to_x(source, output, x_t, alpha, sigma)
    return target(to, x, to_noise(source, output, x_t, alpha, sigma), alpha, sigma)


def output_scale(prediction: Choice, alpha: Tensor, sigma: Tensor) -> Tensor:
    """How far the estimate of the data moves when the output moves by one: of the shape of ``alpha``.

    The squared error of the data is the square of this times that of the output.

    >>> output_scale("v", torch.tensor([0.6]), torch.tensor([0.8]))
    tensor([-0.8000])
    """
    prediction = as_prediction(prediction)
    if prediction.kind == "x":
        return torch.ones_like(alpha)
    a, b = _coefficients(prediction, alpha, sigma)
    return _divide(-sigma, alpha * b - sigma * a)


def network_inputs(prediction: Choice, x_t: Tensor, t: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What the network is given: the noisy sample and the time, (b, ...) and (b,).

    For ``"edm"`` these are c_in x_t, of variance one, and c_noise = ln(sigma / alpha) / 4, kept finite at both ends;
    else x_t and t.

    >>> network_inputs(Prediction("edm", 1.0), torch.ones(1, 2), torch.ones(1), torch.ones(1), torch.ones(1))
    (tensor([[0.7071, 0.7071]]), tensor([0.]))
    """
    prediction = as_prediction(prediction)
    if prediction.kind != "edm":
        return x_t, t
    smallest = 1e-17
    c_noise = (sigma.clamp(min=smallest).log() - alpha.clamp(min=smallest).log()) / 4
    return x_t / _spread(prediction, *_scales(alpha, sigma, x_t)), c_noise
