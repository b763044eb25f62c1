"""The networks and losses of the generative families as idiomatic PyTorch; the plain U-Net is in unet_module.py.

They share no code with the package. Their ``state_dict``s have the names of ``tree.names(params)``; losses take a
module and a batch that holds every draw.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.bench.unet_module import UNetModule

__all__ = [
    "DiscriminatorModule",
    "GeneratorModule",
    "LabelledMLPModule",
    "TwoTimeUNetModule",
    "VAEModule",
    "d_loss",
    "edm_loss",
    "elbo_loss",
    "flow_loss",
    "functional_d_loss",
    "g_loss",
    "mean_flow_loss",
]

Batch = dict[str, Tensor]


def per_image(x: Tensor) -> Tensor:
    """(b,) -> (b, 1, 1, 1)."""
    return x[:, None, None, None]


# Variational autoencoder.


class VAEModule(nn.Module):
    """Perceptrons with ReLU: an encoder to mean and log-variance, a decoder to the logits of the pixels."""

    def __init__(self, features: int, hidden: tuple[int, ...], latent: int):
        super().__init__()
        self.encoder = self.perceptron(features, *hidden, 2 * latent)
        self.decoder = self.perceptron(latent, *hidden[::-1], features)

    @staticmethod
    def perceptron(*widths: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean + torch.exp(0.5 * log_var) * noise), mean, log_var


def elbo_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of the pixels and the divergence from the prior, as in PyTorch's example of a VAE."""
    logits, mean, log_var = module(batch["x"], batch["noise"])
    reconstruction = F.binary_cross_entropy_with_logits(logits, batch["x"], reduction="sum")
    divergence = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp())
    return (reconstruction + divergence) / len(logits)


# Diffusion and flows.


def edm_loss(module: nn.Module, batch: Batch, sigma_data: float) -> Tensor:
    """As in the authors' training code (Karras et al. 2022)."""
    sigma = per_image(batch["sigma"])
    x_t = batch["image"] + sigma * batch["noise"]
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma_data**2 + sigma**2).sqrt()
    c_noise = batch["sigma"].log() / 4
    denoised = c_skip * x_t + c_out * module(c_in * x_t, c_noise, batch["label"])
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight * (denoised - batch["image"]) ** 2).mean()


def flow_loss(module: nn.Module, batch: Batch) -> Tensor:
    """Squared error of the velocity noise - x on the straight line between them."""
    t = per_image(batch["t"])
    x_t = (1 - t) * batch["image"] + t * batch["noise"]
    return F.mse_loss(module(x_t, batch["t"], batch["label"]), batch["noise"] - batch["image"])


class TwoTimeUNetModule(UNetModule):
    """The U-Net for times (b, 2), each with features of its own."""

    def __init__(self, in_channels: int, base_channels: int, num_classes: int, time_scale: float):
        super().__init__(in_channels, base_channels, (1, 2), 1, (), num_classes=num_classes, time_scale=time_scale)
        self.time1 = nn.Linear(2 * base_channels, 4 * base_channels)

    def features(self, t: Tensor) -> Tensor:
        return torch.cat([super(TwoTimeUNetModule, self).features(part) for part in t.unbind(1)], dim=1)


def mean_flow_loss(module: nn.Module, batch: Batch, apart: int) -> Tensor:
    """Algorithm 1 of Geng et al. 2025 by ``torch.func.jvp``; only the first ``apart`` examples have r < t."""

    def u(x_t: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return module(x_t, torch.stack([t, t - r], dim=1), label)

    label, t = batch["label"], batch["t"]
    r = torch.where(torch.arange(len(t)) < apart, batch["r"], t)
    velocity = batch["noise"] - batch["image"]
    x_t = (1 - per_image(t)) * batch["image"] + per_image(t) * batch["noise"]
    one, rest = slice(0, apart), slice(apart, None)
    tangents = velocity[one], torch.zeros_like(r[one]), torch.ones_like(t[one])
    first, du_dt = torch.func.jvp(lambda *xs: u(*xs, label[one]), (x_t[one], r[one], t[one]), tangents)
    target = (velocity[one] - per_image(t - r)[one] * du_dt).detach()
    errors = torch.cat([first - target, u(x_t[rest], r[rest], t[rest], label[rest]) - velocity[rest]])
    return errors.square().mean()


# Generative adversarial networks.


def act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class Block(nn.Module):
    """x + conv2(act(conv1(act(x))))."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(act(self.conv1(act(x))))


class GeneratorModule(nn.Module):
    """Latents and labels to images of one channel."""

    def __init__(self, side: int, channels: tuple[int, ...], num_classes: int, latent: int):
        super().__init__()
        self.lowest = channels[-1], side // 2 ** (len(channels) - 1), side // 2 ** (len(channels) - 1)
        self.embed = nn.Embedding(num_classes, latent)
        self.start = nn.Linear(2 * latent, math.prod(self.lowest))
        for level, c in enumerate(channels):
            self.add_module(f"block{level}_0", Block(c))
        for level, (c_out, c_in) in enumerate(pairwise(channels)):
            self.add_module(f"up{level}", nn.ConvTranspose2d(c_in, c_out, 4, stride=2, padding=1))
        self.head = nn.Conv2d(channels[0], 1, 3, padding=1)
        self.levels = len(channels)

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        h = self.start(torch.cat([z, self.embed(label)], dim=1)).view(-1, *self.lowest)
        for level in reversed(range(self.levels)):
            h = self.get_submodule(f"block{level}_0")(h)
            h = self.get_submodule(f"up{level - 1}")(act(h)) if level else h
        return torch.tanh(self.head(act(h)))


class DiscriminatorModule(nn.Module):
    """Images and labels to logits; the label enters by a projection."""

    def __init__(self, side: int, channels: tuple[int, ...], num_classes: int):
        super().__init__()
        lowest = side // 2 ** (len(channels) - 1)
        self.stem = nn.Conv2d(1, channels[0], 3, padding=1)
        for level, c in enumerate(channels):
            self.add_module(f"block{level}_0", Block(c))
        for level, (c_in, c_out) in enumerate(pairwise(channels)):
            self.add_module(f"down{level}", nn.Conv2d(c_in, c_out, 4, stride=2, padding=1))
        self.features = nn.Linear(channels[-1] * lowest**2, channels[-1])
        self.head = nn.Linear(channels[-1], 1)
        self.embed = nn.Embedding(num_classes, channels[-1])
        self.levels = len(channels)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        h = self.stem(x)
        for level in range(self.levels):
            h = self.get_submodule(f"down{level - 1}")(act(h)) if level else h
            h = self.get_submodule(f"block{level}_0")(h)
        phi = act(self.features(act(h).flatten(1)))
        return self.head(phi)[:, 0] + (self.embed(label) * phi).mean(1)


class LabelledMLPModule(nn.Sequential):
    """A perceptron of images or latents and their labels."""

    def __init__(self, features: int, hidden: tuple[int, ...], shape: tuple[int, ...], num_classes: int):
        layers: list[nn.Module] = []
        for n, m in pairwise((features + num_classes, *hidden, math.prod(shape))):
            layers += [nn.Linear(n, m), nn.LeakyReLU(0.2)]
        super().__init__(*layers[:-1])
        self.num_classes, self.shape = num_classes, shape

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        one_hot = F.one_hot(label, self.num_classes).to(x.dtype)
        return super().forward(torch.cat([x.flatten(1), one_hot], dim=1)).view(-1, *self.shape)


def d_loss(d: nn.Module, g: nn.Module, batch: Batch, gamma: float) -> Tensor:
    """R3GAN's discriminator (Huang et al. 2024): relativistic pairing, R1 and R2 from the same forward passes."""
    with torch.no_grad():
        fake = g(batch["d_noise"], batch["label"])
    real, fake = batch["image"].detach().requires_grad_(), fake.requires_grad_()
    real_logit, fake_logit = d(real, batch["label"]), d(fake, batch["label"])
    (r1,) = torch.autograd.grad(real_logit.sum(), real, create_graph=True)
    (r2,) = torch.autograd.grad(fake_logit.sum(), fake, create_graph=True)
    penalty = r1.square().sum((1, 2, 3)) + r2.square().sum((1, 2, 3))
    return (F.softplus(fake_logit - real_logit) + 0.5 * gamma * penalty).mean()


def functional_d_loss(d: nn.Module, g: nn.Module, batch: Batch, gamma: float) -> Tensor:
    """The same by ``torch.func``, for ``torch.compile``."""
    with torch.no_grad():
        fake = g(batch["d_noise"], batch["label"])
    params, label = dict(d.named_parameters()), batch["label"]

    def total(x: Tensor) -> tuple[Tensor, Tensor]:
        logit = torch.func.functional_call(d, params, (x, label))
        return logit.sum(), logit

    (r1, real_logit), (r2, fake_logit) = (torch.func.grad(total, has_aux=True)(x) for x in (batch["image"], fake))
    penalty = r1.square().sum((1, 2, 3)) + r2.square().sum((1, 2, 3))
    return (F.softplus(fake_logit - real_logit) + 0.5 * gamma * penalty).mean()


def g_loss(d: nn.Module, g: nn.Module, batch: Batch) -> Tensor:
    """Its generator."""
    real_logit = d(batch["image"], batch["label"])
    fake_logit = d(g(batch["g_noise"], batch["label"]), batch["label"])
    return F.softplus(real_logit - fake_logit).mean()
