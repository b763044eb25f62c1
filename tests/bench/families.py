"""The generative families at the sizes of their examples, with all draws in the batch; their GAN is in adversaries.py.

The library's objectives draw times and noise themselves. Here they are given, so that no form of the step differs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg
from functorch_gen import diffusion, flow_matching, vae
from functorch_gen.typing import Key, Params
from tests.bench.families_modules import (
    TwoTimeUNetModule,
    VAEModule,
    edm_loss,
    elbo_loss,
    flow_loss,
    mean_flow_loss,
)
from tests.bench.programs import Batch, Program, initial
from tests.bench.unet_module import UNetModule

__all__ = ["FAMILIES", "diffusion_program", "digits_batch", "flow_program", "mean_flow_program", "vae_program"]

SIGMA_DATA = 0.6  # of the digits, about


def digits_batch(batch_size: int) -> Batch:
    """Images, labels and draws in the shape of the digits: (b, 1, 8, 8)."""
    image, noise, t, r, label = fg.random.split(fg.random.key(1), 5)
    times = fg.random.uniform(t, (batch_size,))
    return {
        "image": fg.random.normal(image, (batch_size, 1, 8, 8)),
        "noise": fg.random.normal(noise, (batch_size, 1, 8, 8)),
        "t": times,
        "r": times * fg.random.uniform(r, (batch_size,)),
        "label": fg.random.randint(label, (batch_size,), 0, 10).long(),
    }


def digits_unet(base_channels: int, num_times: int = 1) -> fg.models.UNet:
    """The network of examples/diffusion_digits.py."""
    return fg.models.UNet(
        1, base_channels, num_blocks=1, attention_levels=(), num_classes=10, time_scale=10.0, channels_last=True,
        num_times=num_times,
    )  # fmt: skip


def digits_module(base_channels: int) -> UNetModule:
    return UNetModule(1, base_channels, (1, 2), 1, (), num_classes=10, time_scale=10.0)


def vae_program(batch_size: int = 128, hidden: tuple[int, ...] = (256, 256), latent: int = 16) -> Program:
    """A VAE of perceptrons over 64 pixels in [0, 1]: the negative ELBO, the divergence in closed form."""
    relu = {"activation": F.relu}
    net = fg.models.EncoderDecoder(
        fg.nn.MLP(64, hidden, 2 * latent, **relu), fg.nn.MLP(latent, hidden[::-1], 64, **relu)
    )
    key_x, key_noise = fg.random.split(fg.random.key(1))
    x, noise = fg.random.uniform(key_x, (batch_size, 64)), fg.random.normal(key_noise, (batch_size, latent))

    def loss(params: Params, key: Key, batch: Batch) -> Tensor:
        q = vae.posterior(net, params, batch["x"])
        z = q.mean + torch.exp(0.5 * q.log_var) * batch["noise"]
        log_likelihood = vae.Bernoulli().log_prob(net.decode(params, z), batch["x"])
        return (q.kl().sum(1) - log_likelihood).mean()

    module = lambda: VAEModule(64, hidden, latent)
    return Program(None, {}, initial(net), {"x": x, "noise": noise}, loss, module, elbo_loss)


def diffusion_program(batch_size: int = 128, base_channels: int = 32) -> Program:
    """The step of examples/diffusion_digits.py: EDM's loss of its U-Net."""
    net, schedule = digits_unet(base_channels), fg.noise.EDM()
    batch = digits_batch(batch_size)
    batch["t"] = diffusion.LogNormalTime(schedule)(fg.random.key(2), (batch_size,))
    batch["sigma"] = schedule.sigma(batch["t"])
    prediction = diffusion.Prediction("edm", sigma_data=SIGMA_DATA)

    def loss(params: Params, key: Key, batch: Batch) -> Tensor:
        network = lambda x_t, c_noise: net(params, x_t, c_noise, batch["label"])
        choices = {"schedule": schedule, "prediction": prediction, "weighting": "edm"}
        return diffusion.loss_at(network, batch["image"], batch["noise"], batch["t"], **choices).mean()

    module_loss = lambda module, batch: edm_loss(module, batch, SIGMA_DATA)
    module = lambda: digits_module(base_channels)
    return Program(None, {}, initial(net), batch, loss, module, module_loss, images=True)


def flow_program(batch_size: int = 128, base_channels: int = 32) -> Program:
    """Flow matching on straight lines, with the same U-Net."""
    net = digits_unet(base_channels)

    def loss(params: Params, key: Key, batch: Batch) -> Tensor:
        velocity = lambda x_t, t: net(params, x_t, t, batch["label"])
        return flow_matching.loss_at(velocity, batch["image"], batch["noise"], batch["t"]).mean()

    module = lambda: digits_module(base_channels)
    return Program(None, {}, initial(net), digits_batch(batch_size), loss, module, flow_loss, images=True)


def mean_flow_program(batch_size: int = 128, base_channels: int = 32, ratio: float = 0.5) -> Program:
    """MeanFlow with the same U-Net for two times; a share of the batch has r < t, and alone needs the ``jvp``.

    The squared error without the adaptive weight, which would make any loss of these sizes 1 to a thousandth.
    """
    net, apart = digits_unet(base_channels, num_times=2), round(ratio * batch_size)

    def loss(params: Params, key: Key, batch: Batch) -> Tensor:
        def u(x_t: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
            return net(params, x_t, torch.stack([t, t - r], dim=1), label)

        image, noise, t, r, label = (batch[name] for name in ("image", "noise", "t", "r", "label"))
        x_t, velocity = fg.noise.mix(fg.noise.FlowMatching(), image, noise, t), noise - image
        first = (x[:apart] for x in (x_t, velocity, r, t, label))
        output, target = flow_matching.average_velocity_target(u, *first)
        x_t, velocity, t, label = (x[apart:] for x in (x_t, velocity, t, label))
        return torch.cat([output - target, u(x_t, t, t, label) - velocity]).square().mean()

    module = lambda: TwoTimeUNetModule(1, base_channels, num_classes=10, time_scale=10.0)
    module_loss = lambda module, batch: mean_flow_loss(module, batch, apart)
    return Program(None, {}, initial(net), digits_batch(batch_size), loss, module, module_loss, compiles=False)


FAMILIES: dict[str, Callable[[], Program]] = {
    "vae": vae_program,
    "diffusion": diffusion_program,
    "flow": flow_program,
    "mean_flow": mean_flow_program,
}
