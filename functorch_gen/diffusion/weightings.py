"""Which noise levels count: functions of the log-SNR, weights of the squared error of x; and weights that are learned.

A weight w of the squared error of x is one of w / SNR of that of the noise.
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen.check import check_above_zero, check_number, check_positive
from functorch_gen.losses.per_example import check_alike
from functorch_gen.nn import Bound, FourierFeatures, Linear, init_parts
from functorch_gen.noise import NoiseSchedule, log_snr
from functorch_gen.transforms import jvp
from functorch_gen.typing import Key, Layer, Params

__all__ = ["EDMWeight", "MinSNRWeight", "P2Weight", "Uncertainty", "balance", "bounded_log_snr", "likelihood_weight"]


@dataclass(frozen=True)
class MinSNRWeight:
    """min(SNR, gamma).

    Source: Hang et al. 2023, arXiv:2303.09556.

    >>> MinSNRWeight(gamma=5.0)(torch.tensor([0.0, 10.0]))
    tensor([1., 5.])
    """

    gamma: float = 5.0

    def __post_init__(self):
        check_above_zero("MinSNRWeight", gamma=self.gamma)

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

    def __post_init__(self):
        check_above_zero("EDMWeight", sigma_data=self.sigma_data)

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Of the shape of ``log_snr``."""
        return log_snr.exp() + 1 / self.sigma_data**2


@dataclass(frozen=True)
class P2Weight:
    """SNR / (k + SNR)^gamma: less weight for the low noise levels, at which only imperceptible detail is learned.

    Source: Choi et al. 2022, eq. 8 with the weight of the noise 1, arXiv:2204.00227.

    >>> P2Weight()(torch.tensor([0.0]))
    tensor([0.5000])
    """

    gamma: float = 1.0
    k: float = 1.0

    def __post_init__(self):
        check_number("P2Weight", "gamma", self.gamma, low=0)
        check_number("P2Weight", "k", self.k, low=0)

    def __call__(self, log_snr: Tensor) -> Tensor:
        """Of the shape of ``log_snr``."""
        snr = log_snr.exp()
        return snr * (self.k + snr) ** -self.gamma


_MAX_LOG_SNR = 20.0


def bounded_log_snr(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """The log-SNR kept within -20 and 20: weights stay finite at both ends. Of the shape of ``t``.

    >>> from functorch_gen.noise import FlowMatching
    >>> bounded_log_snr(FlowMatching(), torch.tensor([0.0, 0.5, 1.0]))
    tensor([ 20.,   0., -20.])
    """
    return log_snr(schedule, t).clamp(-_MAX_LOG_SNR, _MAX_LOG_SNR)


def likelihood_weight(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """-(d SNR / dt) / 2: with it the loss at uniform times bounds the negative log-likelihood. Of the shape of ``t``.

    The mean of such a loss, in nats per element, is the variational bound in the limit of infinitely many steps, less
    the divergence of the noise and the reconstruction: see :func:`variational_bound`. Beyond a log-SNR of 20 it is 0.

    Source: Kingma et al. 2021, eq. 17, arXiv:2107.00630; of the score's error it is the rate of noising g^2 / 2 of
    Song et al. 2021, theorem 1, arXiv:2101.09258.

    >>> from functorch_gen.noise import FlowMatching
    >>> likelihood_weight(FlowMatching(), torch.tensor([0.5]))  # SNR = (1 / t - 1)^2
    tensor([4.])
    """
    return -0.5 * jvp(lambda t: bounded_log_snr(schedule, t).exp(), (t,), (torch.ones_like(t),))[1]


# Learned weights.


@dataclass(frozen=True)
class Uncertainty:
    """u(log-SNR), the logarithm of the loss to be expected at a noise level: (b,) -> (b,). It starts as 0.

    A linear layer on Fourier features of ln(sigma / alpha) / 4. Train it with the network, by :func:`balance`.

    Source: Karras et al. 2024, eq. 21, arXiv:2312.02696.

    >>> from functorch_gen import random
    >>> layer = Uncertainty()
    >>> layer(layer.init(random.key(0)), torch.tensor([-3.0, 0.0]))
    tensor([0., 0.])
    """

    features: int = 128

    def __post_init__(self):
        check_positive("Uncertainty", features=self.features)

    @property
    def parts(self) -> dict[str, Layer]:
        """The sublayers by name."""
        return {"fourier": FourierFeatures(1, self.features), "linear": Linear(self.features, 1, gain=0.0)}

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return init_parts(self.parts, key)

    def __call__(self, params: Params, log_snr: Tensor) -> Tensor:
        """(b,) -> (b,)."""
        f = Bound(self.parts, params)
        return rearrange(f.linear(f.fourier(rearrange(log_snr, "b -> b 1") / -8)), "b 1 -> b")


def balance(losses: Tensor, u: Tensor) -> Tensor:
    """losses / exp(u) + u, each noise level weighed by its own uncertainty: (b,), (b,) -> (b,).

    Its minimum over u is at u = log E[loss]: there every level contributes gradients of the same size.

    Raises:
        ValueError: if ``u`` has not the shape of ``losses``.
    Source: Karras et al. 2024, eq. 21, arXiv:2312.02696, after Kendall et al. 2018, eq. 7, arXiv:1705.07115.

    >>> balance(torch.tensor([2.0, 2.0]), torch.tensor([0.0, 2.0]).log1p())
    tensor([2.0000, 1.7653])
    """
    check_alike("balance", losses=losses, u=u)
    return losses * (-u).exp() + u
