"""Four kinds of models of the plane, each a few functions: diffusion, flow matching, VAE, GAN.

``FAMILIES[name](width, ode_steps)`` is a :class:`Family`. The data should have mean 0 and variance 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import diffusion, flow_matching, gan, vae

LATENT, NOISE = 2, 8  # dimensions of the VAE's code, and of the noise that the GAN's generator is given
WAVES = fg.nn.FourierFeatures(2, 64, std=0.7)  # of points: with them networks draw sharp edges


@dataclass(frozen=True)
class Field:
    """A network of points and times, (b, 2), (b,) -> (b, 2), that is given waves in both."""

    width: int
    time_scale: float

    @property
    def mlp(self) -> fg.nn.MLP:
        """The layers."""
        return fg.nn.MLP(2 + 64 + 32, (self.width,) * 3, 2)

    def bind(self, params: Any) -> Callable[[Tensor, Tensor], Tensor]:
        """The network with these parameters."""
        times = fg.nn.SinusoidalFeatures(32, max_period=1000.0, scale=self.time_scale)
        return lambda x, t: self.mlp(params, torch.cat([x, WAVES({}, x), times({}, t)], 1))


class Family(NamedTuple):
    """A kind of model."""

    init: Callable[[Tensor], Any]  # (key) -> params
    loss: Callable[[Any, Tensor, Tensor], Any]  # (params, key, x) -> loss of each example (b,); GAN: of each player
    sample: Callable[[Any, Tensor, int], Tensor]  # (params, key, n) -> (n, 2)
    log_prob: Callable[[Any, Tensor, Tensor], Tensor] | None  # (params, key, x) -> (n,); VAE: a lower bound
    share: float = 1.0  # of the training steps
    rate: float = 1.0  # times the learning rate
    momentum: float = 0.9  # Adam's b1


def make_diffusion(width: int, ode_steps: int) -> Family:
    """Karras et al. 2022; the likelihood by the probability flow."""
    net, schedule = Field(width, time_scale=10.0), fg.noise.EDM()
    choices: Any = {"schedule": schedule, "prediction": diffusion.Prediction("edm", sigma_data=1.0)}

    def loss(params: Any, key: Tensor, x: Tensor) -> Tensor:
        time = diffusion.LogNormalTime(schedule)
        return diffusion.loss(net.bind(params), key, x, weighting="edm", time=time, **choices)

    def sample(params: Any, key: Tensor, n: int) -> Tensor:
        denoise = diffusion.denoiser(net.bind(params), **choices)
        return diffusion.sample_heun(key, denoise, (n, 2), schedule=schedule, steps=ode_steps)

    def log_prob(params: Any, key: Tensor, x: Tensor) -> Tensor:
        denoise = diffusion.denoiser(net.bind(params), **choices)
        return diffusion.log_prob(denoise, x, schedule=schedule, steps=ode_steps)

    return Family(net.mlp.init, loss, sample, log_prob)


def make_flow(width: int, ode_steps: int) -> Family:
    """Lipman et al. 2023."""
    net = Field(width, time_scale=40.0)
    return Family(
        net.mlp.init,
        lambda params, key, x: flow_matching.loss(net.bind(params), key, x),
        lambda params, key, n: flow_matching.sample(key, net.bind(params), (n, 2), steps=ode_steps),
        lambda params, key, x: flow_matching.log_prob(net.bind(params), x, steps=ode_steps),
    )


def make_vae(width: int, ode_steps: int) -> Family:
    """Kingma and Welling 2013, with one learned standard deviation; the bound of Burda et al. from 200 draws."""
    hidden = (width,) * 2
    net = fg.models.EncoderDecoder(fg.nn.MLP(2, hidden, 2 * LATENT), fg.nn.MLP(LATENT, hidden, 2))

    def likelihood(params: Any) -> vae.Gaussian:
        return vae.Gaussian(params["log_std"].exp())

    def sample(params: Any, key: Tensor, n: int) -> Tensor:
        return vae.sample(key, net, params["net"], (n, LATENT), likelihood=likelihood(params), noise=True)

    return Family(
        lambda key: {"net": net.init(key), "log_std": torch.tensor(-1.0)},
        lambda params, key, x: -vae.elbo(net, params["net"], key, x, likelihood=likelihood(params)),
        sample,
        lambda params, key, x: vae.log_prob(
            net, params["net"], key, x, likelihood=likelihood(params), k=200, batch_size=10
        ),
        share=0.5,
    )


def make_gan(width: int, ode_steps: int) -> Family:
    """R3GAN (Huang et al. 2024): relativistic pairs, gradient penalties on both sides. Its likelihood is not known.

    As there, Adam has no momentum: with b1 = 0.9, and the rate of the others, the samples are far worse.
    """
    hidden, gamma = (width,) * 3, 0.1
    generator, critic = fg.nn.MLP(NOISE, hidden, 2), fg.nn.MLP(2 + 64, hidden, 1)

    def init(key: Tensor) -> Any:
        key_d, key_g = fg.random.split(key)
        return {"d": critic.init(key_d), "g": generator.init(key_g)}

    def sample(g_params: Any, key: Tensor, n: int) -> Tensor:
        return generator(g_params, fg.random.normal(key, (n, NOISE)))

    def loss(params: Any, key: Tensor, x: Tensor) -> dict[str, Tensor]:
        def judge(x: Tensor) -> Tensor:
            return critic(params["d"], torch.cat([x, WAVES({}, x)], 1))[:, 0]

        real, real_slope = gan.value_and_input_gradient(judge, x)
        fake, fake_slope = gan.value_and_input_gradient(judge, sample(params["g"], key, len(x)))
        r1_and_r2 = 0.5 * gamma * (real_slope.square() + fake_slope.square()).sum(1)
        return {"d": gan.d_relativistic(real, fake) + r1_and_r2, "g": gan.g_relativistic(real, fake)}

    return Family(init, loss, sample, None, share=0.5, rate=1 / 3, momentum=0.0)


FAMILIES = {"diffusion": make_diffusion, "flow matching": make_flow, "VAE": make_vae, "GAN": make_gan}
