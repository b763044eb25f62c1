"""Rows of adversarial networks: losses, penalties, updates of the game, augmentations, the two networks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from rows.layers import from_model
from torch import Tensor
from zoo_case import ALIKE, Case, Draw, from_draw

from functorch_gen import ema, gan, models, optim, random
from functorch_gen.typing import Tree


def pair(d: Draw) -> tuple[Tensor, Tensor]:
    return d(3), d(3)


def loss(name: str, **skip: str) -> Case:
    fun = getattr(gan, name)
    args = (lambda d: (d(3),)) if name.startswith("g_") and name != "g_relativistic" else pair
    return from_draw(f"gan.{name}", fun, args, **skip)


def critic_of(w: Tensor) -> Callable[..., Tensor]:
    return lambda x, *scale: torch.tanh(x @ w).sum(-1) * (scale[0] if scale else 1)


def r1(w: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    return gan.r1_penalty(critic_of(w), x, scale, gamma=0.5)


def r2(w: Tensor, x: Tensor) -> Tensor:
    return gan.r2_penalty(critic_of(w), x)


def input_gradient(w: Tensor, x: Tensor) -> Tensor:
    return gan.input_gradient(critic_of(w), x)


def gradient_penalty(w: Tensor, key: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    return gan.gradient_penalty(critic_of(w), key, real, fake)


def path_lengths(w: Tensor, key: Tensor, z: Tensor) -> Tensor:
    return gan.path_lengths(lambda z: torch.tanh(z @ w), key, z)


def path_length_penalty(w: Tensor, key: Tensor, z: Tensor, mean: Tensor) -> Tree:
    return gan.path_length_penalty(lambda z: torch.tanh(z @ w), key, z, mean)


PENALTIES = [
    from_draw("gan.r1_penalty", r1, lambda d: (d(3, 2), d(2, 3), d(2))),
    from_draw("gan.r2_penalty", r2, lambda d: (d(3, 2), d(2, 3)), table=ALIKE),
    from_draw(
        "gan.value_and_input_gradient",
        lambda w, x: gan.value_and_input_gradient(critic_of(w), x),
        lambda d: (d(3, 2), d(2, 3)),
        table=ALIKE,
    ),
    from_draw("gan.input_gradient", input_gradient, lambda d: (d(3, 2), d(2, 3)), table=ALIKE),
    from_draw("gan.gradient_penalty", gradient_penalty, lambda d: (d(3, 2), d.key(), d(2, 3), d(2, 3))),
    from_draw("gan.path_lengths", path_lengths, lambda d: (d(2, 3), d.key(), d(2, 2))),
    from_draw(
        "gan.path_length_penalty",
        path_length_penalty,
        lambda d: (d(2, 3), d.key(), d(2, 2), d()),
        derivatives="its running mean is a constant to the gradient, by definition",
    ),
]

# The game.


def d_loss(d: Tree, g: Tree, key: Tensor, batch: Tensor) -> Tensor:
    fake = random.normal(key, batch.shape, batch.dtype) @ g["w"]
    return gan.d_logistic(torch.tanh(batch) @ d["w"], torch.tanh(fake) @ d["w"]).mean()


def g_loss(g: Tree, d: Tree, key: Tensor, batch: Tensor) -> Tensor:
    return gan.g_non_saturating(torch.tanh(random.normal(key, batch.shape, batch.dtype) @ g["w"]) @ d["w"]).mean()


TX, AVERAGE = optim.adam(0.1), ema.constant(0.9)


def trained(update: gan.Update) -> Callable[..., Tree]:
    lazy = gan.Lazy(lambda d, g, key, batch: gan.r1_penalty(lambda x: torch.tanh(x) @ d["w"], batch).mean(), every=2)
    step = gan.make_step(d_loss, g_loss, TX, TX, update=update, ema=AVERAGE, d_lazy=lazy)

    def train(d: Tree, g: Tree, key: Tensor, batch: Tensor) -> Tree:
        state, metrics = step(gan.init_state(d, g, TX, TX, key, ema=AVERAGE), batch)
        return state.params, state.ema.average, metrics

    return train


def players(draw: Draw) -> tuple[Tree, ...]:
    return {"w": draw(2)}, {"w": draw(2, 2)}, draw.key(), draw(3, 2)


GAME = [
    from_draw("gan.make_step", trained(gan.alternating), players),
    from_draw("gan.simultaneous", trained(gan.simultaneous), players, table=ALIKE),
    from_draw("gan.extragradient", trained(gan.extragradient), players, table=ALIKE),
    from_draw("gan.consensus", trained(gan.consensus(0.5)), players, table=ALIKE),
    from_draw("gan.game_jacobian", partial(gan.game_jacobian, d_loss, g_loss), players, table=ALIKE),
]

# Augmentation, networks.


def alike(case: Case) -> Case:
    return replace(case, skip={"table": ALIKE})


def image(draw: Draw) -> tuple[Tensor, Tensor]:
    return draw.key(), draw(2, 3, 2, 2)


AUGMENTATIONS = [
    from_draw("gan.random_brightness", gan.random_brightness, image, table=ALIKE),
    from_draw("gan.random_saturation", gan.random_saturation, image, table=ALIKE),
    from_draw("gan.random_contrast", gan.random_contrast, image, table=ALIKE),
    from_draw(
        "gan.augment",
        lambda key, x: gan.augment(key, x, gan.random_brightness, gan.random_contrast),
        image,
        table=ALIKE,
    ),
]

NETWORKS = [
    alike(from_model("PlainResBlock", models.PlainResBlock(1), lambda d: (d(2, 1, 2, 2),))),
    alike(
        from_model(
            "DCGANGenerator",
            models.DCGANGenerator(1, 2, (1,), num_classes=2, latent_dim=1),
            lambda d: (d(2, 1), d.labels(2, 2)),
        )
    ),
    from_model(
        "DCGANDiscriminator",
        models.DCGANDiscriminator(1, 2, (1,), num_classes=2, group_size=2),
        lambda d: (d(2, 1, 2, 2), d.labels(2, 2)),
    ),
]

CASES = [
    loss("d_logistic"),
    loss("d_least_squares", table=ALIKE),
    loss("d_hinge", table=ALIKE),
    loss("d_wasserstein", table=ALIKE),
    loss("d_relativistic", table=ALIKE),
    loss("g_minimax", table=ALIKE),
    loss("g_non_saturating", table=ALIKE),
    loss("g_least_squares", table=ALIKE),
    loss("g_hinge", table=ALIKE),
    loss("g_wasserstein", table=ALIKE),
    loss("g_relativistic", table=ALIKE),
    *PENALTIES,
    *GAME,
    *AUGMENTATIONS,
    *NETWORKS,
]
