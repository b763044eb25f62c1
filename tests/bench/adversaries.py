"""One step of a GAN with gradient penalties in every form: the discriminator's turn, then the generator's."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functorch_gen as fg
from functorch_gen import gan
from functorch_gen.typing import Key, Params
from tests.bench.families_modules import (
    DiscriminatorModule,
    GeneratorModule,
    LabelledMLPModule,
    d_loss,
    functional_d_loss,
    g_loss,
)
from tests.bench.programs import Batch, initial
from tests.bench.steps import time_forms
from tests.bench.table import Options, Table
from tests.bench.variants import DECAY

__all__ = [
    "Adversaries",
    "FunctionalTurns",
    "LabelledMLP",
    "ModuleTurns",
    "convolutional",
    "gan_makers",
    "gan_times",
    "perceptrons",
]

RATE, B1, B2, EPS, WEIGHT_DECAY, GAMMA = 1e-3, 0.0, 0.99, 1e-8, 0.01, 0.3
CLASSES = 10


@dataclass(frozen=True)
class LabelledMLP:
    """A perceptron of images or latents and their labels: (b, ...), (b,) -> (b, *shape)."""

    net: fg.nn.MLP
    shape: tuple[int, ...] = ()

    def init(self, key: Key) -> Params:
        """Draws the parameters."""
        return self.net.init(key)

    def __call__(self, params: Params, x: Tensor, label: Tensor) -> Tensor:
        one_hot = (label[:, None] == torch.arange(CLASSES)).to(x.dtype)
        return self.net(params, torch.cat([x.flatten(1), one_hot], dim=1)).reshape(len(x), *self.shape)


@dataclass(frozen=True)
class Adversaries:
    """A class-conditional GAN of images (1, 8, 8), trained as in R3GAN.

    Args:
        d, g: ``d(params, x, label) -> logits (b,)`` and ``g(params, z, label) -> images``.
        d_module, g_module: the same networks.
        images: whether channels-last means anything.
    """

    d: Any
    g: Any
    d_module: Callable[[], nn.Module]
    g_module: Callable[[], nn.Module]
    latent: int
    batch_size: int
    images: bool = False

    def modules(self) -> tuple[nn.Module, nn.Module]:
        """Both, with the same weights as the functional form."""
        d, g = self.d_module(), self.g_module()
        d.load_state_dict(fg.tree.names(initial(self.d)), strict=True)
        g.load_state_dict(fg.tree.names(initial(self.g)), strict=True)
        return d, g

    def batch(self) -> Batch:
        """Images, labels, and the latents of both turns."""
        image, label, d_noise, g_noise = fg.random.split(fg.random.key(1), 4)
        return {
            "image": fg.random.normal(image, (self.batch_size, 1, 8, 8)).clamp(-1, 1),
            "label": fg.random.randint(label, (self.batch_size,), 0, CLASSES).long(),
            "d_noise": fg.random.normal(d_noise, (self.batch_size, self.latent)),
            "g_noise": fg.random.normal(g_noise, (self.batch_size, self.latent)),
        }

    def d_loss(self, d_params: Params, g_params: Params, key: Key, batch: Batch) -> Tensor:
        """Relativistic pairing, R1 and R2."""
        label = batch["label"]
        critic = partial(self.d, d_params)
        real, real_slope = gan.value_and_input_gradient(critic, batch["image"], label)
        fake, fake_slope = gan.value_and_input_gradient(critic, self.g(g_params, batch["d_noise"], label), label)
        penalty = (real_slope.square() + fake_slope.square()).sum((1, 2, 3))
        return (gan.d_relativistic(real, fake) + 0.5 * GAMMA * penalty).mean()

    def g_loss(self, g_params: Params, d_params: Params, key: Key, batch: Batch) -> Tensor:
        """The generator's side of it."""
        image, label = batch["image"], batch["label"]
        fake = self.g(g_params, batch["g_noise"], label)
        return gan.g_relativistic(self.d(d_params, image, label), self.d(d_params, fake, label)).mean()


def convolutional(batch_size: int = 64, channels: tuple[int, ...] = (32, 64), latent: int = 32) -> Adversaries:
    """The networks of examples/gan_digits.py."""
    sizes: Any = {"channels": channels, "num_blocks": 1, "num_classes": CLASSES}
    return Adversaries(
        fg.models.DCGANDiscriminator(1, 8, **sizes),
        fg.models.DCGANGenerator(1, 8, latent_dim=latent, **sizes),
        lambda: DiscriminatorModule(8, channels, CLASSES),
        lambda: GeneratorModule(8, channels, CLASSES, latent),
        latent,
        batch_size,
        images=True,
    )


def perceptrons(batch_size: int = 64, hidden: tuple[int, ...] = (256, 256), latent: int = 32) -> Adversaries:
    """Perceptrons with leaky ReLU."""
    slope: Any = {"activation": lambda x: F.leaky_relu(x, 0.2)}
    return Adversaries(
        LabelledMLP(fg.nn.MLP(64 + CLASSES, hidden, 1, **slope)),
        LabelledMLP(fg.nn.MLP(latent + CLASSES, hidden, 64, **slope), (1, 8, 8)),
        lambda: LabelledMLPModule(64, hidden, (), CLASSES),
        lambda: LabelledMLPModule(latent, hidden, (1, 8, 8), CLASSES),
        latent,
        batch_size,
    )


class FunctionalTurns:
    """``fg.jit`` of ``gan.make_step`` with the old state donated.

    Args:
        channels_last: the layout of the weights, which the activations then follow.
    """

    def __init__(self, game: Adversaries, *, channels_last: bool = False, backend: str = "inductor"):
        tx, average = fg.optim.adamw(RATE, B1, B2, EPS, weight_decay=WEIGHT_DECAY), fg.ema.constant(DECAY)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        laid_out = lambda x: torch.empty_like(x, memory_format=layout).copy_(x) if x.ndim == 4 else x
        d_params, g_params = (fg.tree.map(laid_out, initial(net)) for net in (game.d, game.g))
        self.batch = game.batch()
        self.state = gan.init_state(d_params, g_params, tx, tx, fg.random.key(2), ema=average)
        step = gan.make_step(game.d_loss, game.g_loss, tx, tx, ema=average)
        self.step = fg.jit(step, donate_argnums=0, backend=backend)

    def __call__(self) -> Tensor:
        self.state, metrics = self.step(self.state, self.batch)
        return metrics["d_loss"] + metrics["g_loss"]


class ModuleTurns:
    """The same with two fused AdamW and a foreach average of the generator.

    Args:
        compiled: what ``torch.compile`` takes: the generator's turn. It has no derivative of a derivative.
        functional: the penalties by ``torch.func.grad``, which it takes, so that both turns are compiled.
    """

    def __init__(
        self, game: Adversaries, *, compiled: bool = False, functional: bool = False, channels_last: bool = False
    ):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.d, self.g = (module.to(memory_format=layout) for module in game.modules())
        self.batch = game.batch()
        self.average = [p.detach().clone() for p in self.g.parameters()]
        options: Any = {"lr": RATE, "betas": (B1, B2), "eps": EPS, "weight_decay": WEIGHT_DECAY, "fused": True}
        self.d_optimizer = torch.optim.AdamW(self.d.parameters(), **options)
        self.g_optimizer = torch.optim.AdamW(self.g.parameters(), **options)
        self.d_loss = torch.compile(functional_d_loss) if functional else d_loss
        self.g_loss = torch.compile(g_loss) if compiled else g_loss

    def turn(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def __call__(self) -> Tensor:
        first = self.turn(self.d_loss(self.d, self.g, self.batch, GAMMA), self.d_optimizer)
        self.d.requires_grad_(False)  # the generator's turn needs no gradient of them
        second = self.turn(self.g_loss(self.d, self.g, self.batch), self.g_optimizer)
        self.d.requires_grad_(True)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, list(self.g.parameters()), 1 - DECAY)
        return first + second


def gan_makers(game: Adversaries, backend: str = "inductor") -> dict[str, Callable[[], Callable[[], Any]]]:
    """How to build every variant, by name."""
    forms: dict[str, dict[str, bool]] = {"eager": {}}
    if game.images:
        forms["eager, channels-last"] = {"channels_last": True}
    if backend != "aten":
        forms["its generator's turn compiled"] = {"compiled": True}
        forms["compiled, penalties by torch.func"] = {"compiled": True, "functional": True}
    modules = {
        f"nn.Module {form}": lambda options=options: ModuleTurns(game, **options) for form, options in forms.items()
    }
    return {"fg.jit": lambda: FunctionalTurns(game, channels_last=game.images, backend=backend), **modules}


def gan_times(game: Callable[[], Adversaries]) -> Callable[[Options], Table]:
    """The section of a GAN: milliseconds of both turns in every form."""
    return lambda options: time_forms(gan_makers(game(), options.backend), options)
