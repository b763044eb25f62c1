"""What a decoder's output says of the data: p(x | z) as a log-density, a mean and a draw.

The likelihoods share one form, so that bounds and samplers take any of them. Outputs and data have the channels on
axis 1; grey levels are integers 0, 1, ..., levels - 1.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor

from functorch_gen import numerics, random
from functorch_gen.check import check_above_zero, check_floating
from functorch_gen.leaves import at_least_float32
from functorch_gen.losses import bernoulli_nll, categorical_nll, discretized_logistic_mixture_nll
from functorch_gen.losses.per_example import check_alike, check_broadcasts, in_float32, sum_per_example
from functorch_gen.nn.sizes import check_sizes
from functorch_gen.typing import Key, Number

__all__ = ["Bernoulli", "Categorical", "DiscretizedLogisticMixture", "Gaussian", "Likelihood", "optimal_std"]

_LOG_2PI = math.log(2 * math.pi)


class Likelihood(Protocol):
    """A distribution of data whose parameters are the output of a decoder."""

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x | output), summed over the axes of an example: -> (b,)."""
        ...

    def mean(self, output: Tensor) -> Tensor:
        """The mean of the data: -> (b, ...)."""
        ...

    def sample(self, key: Key, output: Tensor) -> Tensor:
        """Data drawn at random: -> (b, ...)."""
        ...


@dataclass(frozen=True)
class Bernoulli:
    """Independent bits; the output holds their logits: (b, ...).

    >>> Bernoulli().log_prob(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]))
    tensor([-1.3863])
    """

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x | output) of x in {0, 1}, or in between: -> (b,)."""
        return -bernoulli_nll(output, x)

    def mean(self, output: Tensor) -> Tensor:
        """The probabilities of 1: -> (b, ...)."""
        return torch.sigmoid(output)

    def sample(self, key: Key, output: Tensor) -> Tensor:
        """0 or 1, in the dtype of the output: -> (b, ...)."""
        return random.bernoulli(key, self.mean(at_least_float32(output))).to(output.dtype)


@dataclass(frozen=True)
class Gaussian:
    """Independent normal numbers; the output is their mean: (b, ...).

    Args:
        std: standard deviation: a number, or a tensor that broadcasts with the output (a parameter, say). None: the
            one that is best for the batch, :func:`optimal_std`, which balances the two terms of the bound without a
            weight to choose (sigma-VAE). That is an objective to train with; to measure, fix the one found.
    Raises:
        ValueError: if the number ``std`` is not positive; by ``log_prob``, if the tensor does not broadcast.
    Source: Rybkin et al. 2021, section 3, arXiv:2006.13202.

    >>> Gaussian(std=1.0).log_prob(torch.zeros(1, 2), torch.ones(1, 2))
    tensor([-2.8379])
    """

    std: Number | None = 1.0

    def __post_init__(self) -> None:
        if self.std is not None and not (isinstance(self.std, Tensor) and self.std.ndim):
            check_above_zero("Gaussian", std=self.std)

    @in_float32
    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log N(x; output, std^2): -> (b,)."""
        check_alike("Gaussian", output=output, x=x)
        check_broadcasts("Gaussian", output, std=self.std if isinstance(self.std, Tensor) else None)
        std = torch.zeros_like(output) + (optimal_std(output, x) if self.std is None else self.std)
        log_density = -0.5 * (((x - output) / std) ** 2 + _LOG_2PI) - std.log()
        return sum_per_example(log_density)

    def mean(self, output: Tensor) -> Tensor:
        """The output: -> (b, ...)."""
        return output

    def sample(self, key: Key, output: Tensor) -> Tensor:
        """output + std noise: -> (b, ...)."""
        if self.std is None:
            raise ValueError("Gaussian: expected a std to draw with, got None (optimal_std of the data gives one)")
        return output + self.std * random.normal(key, output.shape, output.dtype)


@in_float32
def optimal_std(mean: Tensor, x: Tensor) -> Tensor:
    """The standard deviation under which ``x`` is likeliest, one for all numbers: (b, ...), (b, ...) -> ().

    sigma^2 = mean of (x - mean)^2

    Raises:
        TypeError: if ``mean`` is not floating.
        ValueError: if the shapes differ.
    Source: Rybkin et al. 2021, section 3, arXiv:2006.13202.

    >>> optimal_std(torch.zeros(2, 1), torch.tensor([[3.0], [-3.0]]))
    tensor(3.)
    """
    check_alike("optimal_std", mean=mean, x=x)
    return numerics.sqrt((x - mean).square().mean())


@dataclass(frozen=True)
class Categorical:
    """Independent grey levels, each with its own probability: c levels channels of logits for c channels of data.

    Channel ``i`` of the data has the channels ``i levels, ..., (i + 1) levels - 1`` of the output.

    >>> Categorical(levels=4).log_prob(torch.zeros(1, 4, 2), torch.tensor([[[0, 3]]]))
    tensor([-2.7726])
    """

    levels: int

    def __post_init__(self) -> None:
        check_sizes("Categorical", levels=self.levels)

    def _logits(self, output: Tensor) -> Tensor:
        """(b, c levels, ...) -> (b, c, ..., levels)."""
        check_floating(output, "Categorical: output")
        if output.ndim < 2 or output.shape[1] % self.levels:
            got = tuple(output.shape)
            raise ValueError(f"Categorical: output: expected channels in multiples of {self.levels}, got {got}")
        return rearrange(output, "b (c l) ... -> b c ... l", l=self.levels)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x | output) of integer levels x (b, c, ...): -> (b,)."""
        return -categorical_nll(self._logits(output), x)

    def mean(self, output: Tensor) -> Tensor:
        """The mean level, no integer: -> (b, c, ...)."""
        logits = at_least_float32(self._logits(output))
        levels = torch.arange(self.levels, dtype=logits.dtype, device=output.device)
        return (logits.softmax(-1) @ levels).to(output.dtype)

    def sample(self, key: Key, output: Tensor) -> Tensor:
        """Integer levels: -> (b, c, ...)."""
        return random.categorical(key, at_least_float32(self._logits(output)))


@dataclass(frozen=True)
class DiscretizedLogisticMixture:
    """A mixture of logistics cut into grey levels: :func:`functorch_gen.losses.discretized_logistic_mixture_nll`.

    The output (b, k, ...) is ordered as described there, k = m (1 + 2 c + c (c - 1) / 2). Neighbouring levels have
    similar probabilities, which a :class:`Categorical` must learn.

    Args:
        levels: how many, at least 2; level y stands at 2 y / (levels - 1) - 1.
        channels: c.
    Source: Salimans et al. 2017, arXiv:1701.05517.

    >>> grey = DiscretizedLogisticMixture(levels=17)
    >>> output = torch.tensor([0.0, 0.5, -3.0])[None, :, None]  # one component at 0.5, which is level 12
    >>> grey.log_prob(output, torch.tensor([[[12]]])), grey.mean(output)
    (tensor([-0.5862]), tensor([[[12.]]]))
    """

    levels: int = 256
    channels: int = 1

    def __post_init__(self) -> None:
        check_sizes("DiscretizedLogisticMixture", minimum=2, levels=self.levels)
        check_sizes("DiscretizedLogisticMixture", channels=self.channels)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x | output) of integer levels x (b, c, ...): -> (b,)."""
        if x.ndim < 2 or x.shape[1] != self.channels:
            want = f"(b, c={self.channels}, ...)"
            raise ValueError(f"DiscretizedLogisticMixture: x: expected shape {want}, got {tuple(x.shape)}")
        return -discretized_logistic_mixture_nll(output, x, levels=self.levels)

    def mean(self, output: Tensor) -> Tensor:
        """The mean level if every component stood at its own mean, clipped to the levels: -> (b, c, ...)."""
        logits, means, log_scales, couplings = self._split(output)
        weights = rearrange(logits.softmax(1), "b m ... -> b m 1 ...")
        return (weights * self._levels(means, torch.zeros_like(log_scales), couplings)).sum(1).to(output.dtype)

    def sample(self, key: Key, output: Tensor) -> Tensor:
        """Integer levels, each channel of a pixel from the same component: -> (b, c, ...)."""
        key_component, key_noise = random.split(key)
        logits, means, log_scales, couplings = self._split(output)
        component = random.categorical(key_component, logits, axis=1)
        u = random.uniform(key_noise, means.shape, means.dtype, minval=1e-5, maxval=1 - 1e-5)
        noise = torch.exp(log_scales.clamp(min=-7.0)) * (u.log() - torch.log1p(-u))
        levels = self._levels(means, noise, couplings, rounded=True)
        chosen = rearrange(component, "b ... -> b 1 1 ...")
        drawn = torch.take_along_dim(levels, chosen.expand(-1, 1, self.channels, *[-1] * (chosen.ndim - 3)), 1)
        return drawn[:, 0].long()

    def _split(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Logits (b, m, ...), means, log-scales (b, m, c, ...) and couplings (b, m, c (c - 1) / 2, ...)."""
        check_floating(output, "DiscretizedLogisticMixture: output")
        output = at_least_float32(output)
        c = self.channels
        pairs = c * (c - 1) // 2
        m, rest = divmod(output.shape[1], 1 + 2 * c + pairs) if output.ndim > 1 else (0, 1)
        if rest or not m:
            got = tuple(output.shape)
            raise ValueError(
                f"DiscretizedLogisticMixture: output: expected a multiple of {1 + 2 * c + pairs} channels, got {got}"
            )
        logits, means, log_scales, couplings = output.split([m, c * m, c * m, pairs * m], 1)
        means, log_scales, couplings = (
            rearrange(x, "b (n m) ... -> b m n ...", m=m) for x in (means, log_scales, couplings)
        )
        return logits, means, log_scales, torch.tanh(couplings)

    def _levels(self, means: Tensor, noise: Tensor, couplings: Tensor, rounded: bool = False) -> Tensor:
        """mean_i + sum_{j < i} a_ij x_j + noise_i as levels, channel after channel: -> (b, m, c, ...)."""
        scale = (self.levels - 1) / 2
        drawn: list[Tensor] = []
        for i in range(self.channels):
            x = means[:, :, i] + noise[:, :, i]
            for j in range(i):
                x = x + couplings[:, :, i * (i - 1) // 2 + j] * (drawn[j] / scale - 1)
            level = ((x + 1) * scale).clamp(0, self.levels - 1)
            drawn.append(level.round() if rounded else level)
        return torch.stack(drawn, 2)
