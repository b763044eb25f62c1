"""A class-conditional diffusion model of images: trains, samples, and draws what it learned.

python examples/diffusion_digits.py                    # scikit-learn's 8x8 digits, a few minutes on two cores
python examples/diffusion_digits.py --images mine.npz  # "images" (n, c, h, w) in [-1, 1], "labels" (n,)
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import command_line
import digits
import image_file
import numpy as np
import torch
from digits_bound import bound_nats
from torch import Tensor

import functorch_gen as fg
from functorch_gen import diffusion
from functorch_gen.diffusion import Prediction, denoiser, guide_network
from functorch_gen.models import UNet, check_labels, drop_labels


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/diffusion_digits"  # folder for pictures, samples and metrics
    images: str = ""  # .npz with images (n, c, h, w) in [-1, 1] and labels (n,); empty: scikit-learn's digits
    schedule: str = "EDM"  # or FlowMatching, SubVP, VPCosine, VPLinear, VPSigmoid
    prediction: str = "edm"  # or eps, x, v, flow: what the network's output stands for
    weighting: str = "edm"  # or uniform, snr, min_snr, p2: which noise levels count
    steps: int = 2000  # training steps
    batch_size: int = 128  # examples a step
    learning_rate: float = 2e-3  # highest; warm-up, then cosine decay
    ema_decay: float = 0.999  # of the averaged parameters, which draw the samples
    label_drop: float = 0.1  # share of examples trained without label, for guidance
    base_channels: int = 32  # width of the U-Net
    num_blocks: int = 1  # residual blocks a level
    attention: bool = False  # self-attention at the lower resolution
    remat: bool = False  # recompute activations in the backward pass
    sample_steps: int = 20  # Heun steps
    guidance: float = 1.0  # 1: none
    samples_per_class: int = 100  # in samples.npz
    sample_every: int = 1000  # steps between pictures while training
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no code generation
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "learning_rate", "sample_steps", "samples_per_class", "sample_every")
        fg.check.check_positive("Config", **{name: getattr(self, name) for name in positive})
        schedules = ("EDM", "FlowMatching", "SubVP", "VPCosine", "VPLinear", "VPSigmoid")
        fg.check.check_choice("Config", "schedule", self.schedule, schedules)


class Model(NamedTuple):
    """What the parameters belong to."""

    net: UNet
    schedule: fg.noise.NoiseSchedule
    prediction: Prediction


def make_model(config: Config, data: dict[str, Tensor]) -> Model:
    """A model for the shape and spread of the data."""
    net = UNet(
        data["image"].shape[1],
        config.base_channels,
        num_blocks=config.num_blocks,
        attention_levels=(1,) if config.attention else (),
        num_classes=int(data["label"].max()) + 1,
        time_scale=10.0 if config.prediction == "edm" else 1000.0,
        channels_last=True,
        remat=config.remat,
    )
    check_labels(data["label"], net.num_classes or 0)
    fg.eval_shape(net, net.init(fg.random.key(0)), data["image"][:1], torch.ones(1))  # refuses shapes that do not fit
    prediction = Prediction(config.prediction, sigma_data=float(data["image"].std()))
    return Model(net, getattr(fg.noise, config.schedule)(), prediction)


def load_data(config: Config) -> dict[str, Tensor]:
    """Images (n, c, h, w) and labels (n,), checked."""
    return image_file.load(config.images) if config.images else digits.load(digits.TRAIN)


def make_loss(config: Config, model: Model) -> Callable[..., Tensor]:
    """loss_fn(params, key, batch) -> (): by default that of Karras et al. 2022, with labels dropped at random."""

    def loss_fn(params: Any, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
        key_label, key_loss = fg.random.split(key)
        label = drop_labels(key_label, batch["label"], config.label_drop, model.net.num_classes or 0)
        return diffusion.loss(
            lambda x_t, condition: model.net(params, x_t, condition, label),
            key_loss,
            batch["image"],
            schedule=model.schedule,
            prediction=model.prediction,
            weighting=config.weighting,
            time=diffusion.LogNormalTime(model.schedule),
        ).mean()

    return loss_fn


def make_schedule(config: Config) -> Any:
    """The learning rate: up over the first steps, then down along a cosine."""
    peak, warmup = config.learning_rate, max(1, min(100, config.steps // 10))
    return fg.optim.warmup_cosine_decay_schedule(0.0, peak, warmup, max(config.steps, warmup + 1), 0.02 * peak)


def make_optimizer(config: Config) -> fg.optim.GradientTransformation:
    """AdamW on clipped gradients."""
    adamw = fg.optim.adamw(make_schedule(config), b2=0.99, weight_decay=1e-4)
    return fg.optim.chain(fg.optim.clip_by_global_norm(1.0), adamw)


def make_sampler(model: Model, shape: tuple[int, ...], chunk: int = 250) -> Callable[..., Any]:
    """sample(key, params, label, steps=, guidance=, ddim=, path=) -> images (n, ...), or with their path."""
    network = fg.jit(lambda params, x_t, condition, label: model.net(params, x_t, condition, label), backend="aten")

    def sample(
        key: Tensor, params: Any, label: Tensor, *, steps: int, guidance: float, ddim: bool = False, path: bool = False
    ) -> Any:
        def draw(key: Tensor, label: Tensor) -> Any:
            def conditional(x_t: Tensor, condition: Tensor, label: Tensor = label) -> Tensor:
                return network(params, x_t, condition, label)

            null = model.net.num_classes or 0
            guided = conditional if guidance == 1 else guide_network(conditional, label, null, guidance)
            denoise = denoiser(guided, schedule=model.schedule, prediction=model.prediction)
            options: Any = {"schedule": model.schedule, "steps": steps, "return_path": path}
            sampler = diffusion.sample_ddim if ddim else diffusion.sample_heun
            return sampler(key, denoise, (len(label), *shape), **options)

        parts = label.split(chunk)
        drawn = [draw(k, part) for k, part in zip(fg.random.split(key, len(parts)), parts, strict=True)]
        return drawn[0] if path else torch.cat(drawn)

    return sample


def train(key: Tensor, config: Config, model: Model, data: Any, hooks: Any = ()) -> tuple[fg.step.TrainState, Any]:
    """The whole training: -> (train_state, history)."""
    tx, average = make_optimizer(config), fg.ema.warmup(config.ema_decay)
    key_init, key_run, key_data = fg.random.split(key, 3)
    state = fg.step.init_state(model.net.init(key_init), tx, key_run, ema=average)
    pure_step = fg.step.make_step(make_loss(config, model), tx, ema=average)
    step = fg.jit(pure_step, donate_argnums=0, backend=config.backend)
    batches = fg.data.batches(key_data, data, config.batch_size)
    return fg.train.fit(step, state, batches, steps=config.steps, hooks=hooks, progress=config.progress)


def main(config: Config) -> dict[str, Any]:
    """Trains, writes pictures, samples and metrics into ``config.out``; returns the metrics."""
    out = fg.train.check_writable(config.out)
    data = load_data(config)
    model = make_model(config, data)
    classes = model.net.num_classes or 0
    sample = make_sampler(model, tuple(data["image"].shape[1:]))
    key_train, key = fg.random.split(fg.random.key(config.seed))
    options = {"steps": config.sample_steps, "guidance": config.guidance}

    def draw(state: fg.step.TrainState) -> None:
        grid = sample(key, state.ema.average, torch.arange(classes).repeat_interleave(10), **options).clamp(-1, 1)
        fg.plot.image_grid(grid, out / "samples.png", columns=10, row_labels=[str(i) for i in range(classes)])

    begin = time.perf_counter()
    state, history = train(key_train, config, model, data, hooks=[fg.train.Every(config.sample_every, draw)])
    trained = time.perf_counter()
    draw(state)
    label = torch.arange(classes).repeat_interleave(config.samples_per_class)
    images = sample(key, state.ema.average, label, **options).clamp(-1, 1)
    levels = images if config.images else digits.to_levels(images)
    np.savez_compressed(out / "samples.npz", images=levels.numpy(), labels=label.numpy())
    _, path = sample(key, state.ema.average, torch.arange(min(classes, 8)), path=True, **options)
    fg.plot.image_path(path.x_hat.clamp(-1, 1), out / "path.png", times=path.t, title="estimates as the noise falls")
    fg.plot.curve(history["loss"], out / "loss.png", steps=history["step"], title="training loss", y_label="loss")
    metrics = {
        "parameters": fg.tree.size(state.params),
        "seconds_first_step": history["seconds"][0],
        "seconds_training": trained - begin,
        "seconds_sampling": time.perf_counter() - trained,
        "loss": float(np.mean(history["loss"][-100:])),
    }
    if not config.images:
        metrics |= {**digits.judge(images, label), "bound_nats": bound_nats(key, state.ema.average, *model)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(*[f"{name:24} {value:.4g}" for name, value in main(settings).items()], sep="\n")
    print(f"samples.png, samples.npz, path.png, loss.png and metrics.json are in {settings.out}")
