"""A class-conditional GAN of scikit-learn's 8x8 digits by R3GAN's recipe: trains, samples, draws what it learned.

python examples/gan_digits.py  # a few minutes on two cores
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import command_line
import digits
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import gan
from functorch_gen.models import DCGANDiscriminator, DCGANGenerator

CLASSES = 10


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/gan_digits"  # folder for pictures, samples and metrics
    steps: int = 2000  # training steps
    batch_size: int = 64  # examples a step
    d_learning_rate: float = 1e-3  # of the discriminator, highest; cosine decay
    g_learning_rate: float = 1e-3  # of the generator, highest; cosine decay
    max_norm: float = 10.0  # gradients of a player are clipped to this norm
    gamma: float = 0.3  # weight of R1 and R2
    ema_decay: float = 0.999  # of the averaged generator, which draws the samples
    width: int = 32  # channels at 8x8 pixels; twice as many at 4x4
    num_blocks: int = 1  # residual blocks at each resolution
    latent_dim: int = 32  # numbers that an image is made of
    samples_per_class: int = 100  # in samples.npz
    sample_every: int = 500  # steps between rows of progress.png
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no code generation
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "d_learning_rate", "g_learning_rate", "max_norm", "samples_per_class")
        fg.check.check_positive("Config", **{name: getattr(self, name) for name in (*positive, "sample_every")})


class Model(NamedTuple):
    """Both networks, and the size of a latent."""

    d: DCGANDiscriminator
    g: DCGANGenerator

    def draw(self, g_params: Any, key: Tensor, label: Tensor) -> Tensor:
        """Images of the labels: (b,) -> (b, 1, 8, 8)."""
        return self.g(g_params, fg.random.normal(key, (len(label), self.g.latent_dim)), label)


def make_model(config: Config) -> Model:
    """Networks of 8x8 pixels and ten classes; the generator's output is linear, as R3GAN's is."""
    sizes: Any = {"channels": (config.width, 2 * config.width), "num_blocks": config.num_blocks, "num_classes": CLASSES}
    generator = DCGANGenerator(1, 8, latent_dim=config.latent_dim, output=lambda x: x, **sizes)
    return Model(DCGANDiscriminator(1, 8, **sizes), generator)


def make_losses(config: Config, model: Model) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """d_loss(d_params, g_params, key, batch) -> () and g_loss(g_params, d_params, key, batch) -> (): R3GAN."""

    def d_loss(d_params: Any, g_params: Any, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
        critic = partial(model.d, d_params)
        real, label = batch["image"], batch["label"]
        real_logit, real_slope = gan.value_and_input_gradient(critic, real, label)
        fake_logit, fake_slope = gan.value_and_input_gradient(critic, model.draw(g_params, key, label), label)
        r1_and_r2 = 0.5 * config.gamma * (real_slope.square() + fake_slope.square()).sum((1, 2, 3))
        return (gan.d_relativistic(real_logit, fake_logit) + r1_and_r2).mean()

    def g_loss(g_params: Any, d_params: Any, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
        critic = partial(model.d, d_params)
        real, label = batch["image"], batch["label"]
        return gan.g_relativistic(critic(real, label), critic(model.draw(g_params, key, label), label)).mean()

    return d_loss, g_loss


def make_optimizer(config: Config, learning_rate: float) -> fg.optim.GradientTransformation:
    """Adam without momentum on clipped gradients, with a rate that falls along a cosine."""
    rate = fg.optim.cosine_decay_schedule(learning_rate, config.steps, 0.02)
    return fg.optim.chain(fg.optim.clip_by_global_norm(config.max_norm), fg.optim.adam(rate, b1=0.0, b2=0.99))


def train(key: Tensor, config: Config, model: Model, data: Any, hooks: Any = ()) -> tuple[Any, Any]:
    """The whole training: -> (state, history)."""
    d_tx, g_tx = make_optimizer(config, config.d_learning_rate), make_optimizer(config, config.g_learning_rate)
    average = fg.ema.warmup(config.ema_decay)
    key_d, key_g, key_run, key_data = fg.random.split(key, 4)
    state: Any = gan.init_state(model.d.init(key_d), model.g.init(key_g), d_tx, g_tx, key_run, ema=average)
    pure_step: Any = gan.make_step(*make_losses(config, model), d_tx, g_tx, ema=average)
    step = fg.jit(pure_step, donate_argnums=0, backend=config.backend)
    batches = fg.data.batches(key_data, data, config.batch_size)
    return fg.train.fit(step, state, batches, steps=config.steps, hooks=hooks, progress=config.progress)


def recognised_of_worst_class(images: Tensor, label: Tensor) -> float:
    """The least share, over the classes, of samples that a classifier of real digits takes for their label."""
    from sklearn.svm import SVC

    real = digits.load(digits.TRAIN)
    classifier = SVC().fit(digits.to_levels(real["image"]).flatten(1).numpy(), real["label"].numpy())
    found = torch.from_numpy(classifier.predict(digits.to_levels(images).flatten(1).numpy()))
    return min(float((found[label == c] == c).float().mean()) for c in range(CLASSES))


def main(config: Config) -> dict[str, Any]:
    """Trains, writes pictures, samples and metrics into ``config.out``; returns the metrics."""
    out = fg.train.check_writable(config.out)
    data, model = digits.load(digits.TRAIN), make_model(config)
    key_train, key_draw = fg.random.split(fg.random.key(config.seed))
    rows: dict[str, Tensor] = {}

    def look(state: Any) -> None:
        rows[f"step {int(state.step)}"] = model.draw(state.ema.average, key_draw, torch.arange(CLASSES))

    begin = time.perf_counter()
    state, history = train(key_train, config, model, data, hooks=[fg.train.Every(config.sample_every, look)])
    seconds = time.perf_counter() - begin
    look(state)
    label = torch.arange(CLASSES).repeat_interleave(config.samples_per_class)
    images = model.draw(state.ema.average, key_draw, label).clamp(-1, 1)
    digits.save(out / "samples.npz", images, label)
    shown = torch.cat([images[label == c][:10] for c in range(CLASSES)])
    fg.plot.image_grid(shown, out / "samples.png", columns=10, row_labels=[str(c) for c in range(CLASSES)])
    progress = torch.cat([*rows.values()]).clamp(-1, 1)
    fg.plot.image_grid(progress, out / "progress.png", columns=CLASSES, row_labels=[*rows])
    curves = {"discriminator": history["d_loss"], "generator": history["g_loss"]}
    fg.plot.curves(curves, out / "losses.png", steps=history["step"], log=False)
    metrics = {
        "parameters": fg.tree.size(state.params),
        "seconds_first_step": history["seconds"][0],
        "seconds_training": seconds,
        "d_loss": sum(history["d_loss"][-100:]) / len(history["d_loss"][-100:]),
        "g_loss": sum(history["g_loss"][-100:]) / len(history["g_loss"][-100:]),
        **digits.judge(images, label),
        "recognised_of_worst_class": recognised_of_worst_class(images, label),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(*[f"{name:26} {value:.4g}" for name, value in main(settings).items()], sep="\n")
    print(f"samples.png, progress.png, losses.png, samples.npz and metrics.json are in {settings.out}")
