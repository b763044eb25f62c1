"""Flow matching on digits: samples by a solver, and by MeanFlow in a single evaluation of the network.

A network u(x_t, r, t) learns the velocity first, which is u at r = t, and goes on from there to average velocities.

python examples/flow_digits.py
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import digits
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import flow_matching
from functorch_gen.diffusion import LogNormalTime, Prediction, network_inputs
from functorch_gen.models import UNet

PATH = fg.noise.FlowMatching()


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/flow_digits"  # folder for pictures, samples and metrics
    steps: int = 2000  # training steps of flow matching
    mean_flow_steps: int = 4000  # training steps of MeanFlow, which goes on from there
    teach: bool = True  # MeanFlow's velocity is that of the trained flow; else that of each pair of data and noise
    batch_size: int = 128  # examples a step
    learning_rate: float = 2e-3  # highest, of flow matching; warm-up, then cosine decay
    mean_flow_rate: float = 1.5e-3  # the same of MeanFlow
    ema_decay: float = 0.999  # of the averaged parameters, which draw the samples
    ratio: float = 0.5  # share of MeanFlow's batch with r < t; the rest holds u at r = t to the velocity
    to_data: float = 0.5  # share of these with r = 0, which one step needs
    power: float = 0.5  # of MeanFlow's weights; at 1 the small errors at r = t count as much as those of long jumps
    base_channels: int = 32  # width of the U-Net
    sample_steps: int = 20  # midpoint steps of flow matching
    samples_per_class: int = 100  # in samples.npz
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no code generation
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        positive = ("steps", "mean_flow_steps", "batch_size", "learning_rate", "mean_flow_rate", "samples_per_class")
        fg.check.check_positive("Config", **{name: getattr(self, name) for name in positive})


class Model(NamedTuple):
    """A network of the average velocity."""

    net: UNet
    prediction: Prediction

    def average_velocity(self, params: Any) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """u(x_t, r, t, label), with EDM's scales: input and output of the network have variance one at every t."""

        def u(x_t: Tensor, r: Tensor, t: Tensor, label: Tensor) -> Tensor:
            x, _ = network_inputs(self.prediction, x_t, t, PATH.alpha(t), PATH.sigma(t))
            output = self.net(params, x, torch.stack([t, t - r], 1), label)
            return flow_matching.convert(output, x_t, t, schedule=PATH, source=self.prediction, to="velocity")

        return u

    def velocity(self, params: Any, label: Tensor) -> flow_matching.Velocity:
        """v(x_t, t), the average over no time."""
        u = self.average_velocity(params)
        return lambda x_t, t: u(x_t, t, t, label)


def make_model(config: Config, data: dict[str, Tensor]) -> Model:
    """A U-Net of two times: t, and how far back to go."""
    sizes: dict[str, Any] = {"num_blocks": 1, "attention_levels": (), "num_classes": 10, "num_times": 2}
    net = UNet(1, config.base_channels, time_scale=10.0, channels_last=True, **sizes)
    return Model(net, Prediction("edm", sigma_data=float(data["image"].std())))


def make_loss(model: Model) -> Callable[..., Tensor]:
    """loss_fn(params, key, batch) -> (): flow matching."""

    def loss_fn(params: Any, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
        velocity = model.velocity(params, batch["label"])
        return flow_matching.loss(velocity, key, batch["image"], time=LogNormalTime(PATH)).mean()

    return loss_fn


def make_mean_flow_loss(config: Config, model: Model, flow: Any) -> Callable[..., Tensor]:
    """loss_fn(params, key, batch) -> (): MeanFlow, with parameters ``flow`` of a trained velocity.

    That is the mean over the pairs behind x_t, in which the target is linear: the same minimum, with less noise.
    """

    def times(key: Tensor, shape: Any, dtype: torch.dtype) -> Tensor:
        """Two times (b, 2), uniform, of which the earlier may be 0."""
        key_time, key_zero = fg.random.split(key)
        drawn = fg.random.uniform(key_time, shape, dtype)
        to_data = fg.random.bernoulli(key_zero, config.to_data, shape[:1])
        return torch.stack([torch.where(to_data, 0.0, drawn.amin(1)), drawn.amax(1)], 1)

    def loss_fn(params: Any, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
        u, velocity = model.average_velocity(params), model.velocity(flow, batch["label"])
        options: dict[str, Any] = {"guide": lambda x_t, v, t: velocity(x_t, t)} if config.teach else {}
        options |= {"time": times, "ratio": config.ratio, "power": config.power}
        return flow_matching.mean_flow_loss(u, key, batch["image"], batch["label"], **options).mean()

    return loss_fn


def train(
    key: Tensor, config: Config, params: Any, loss_fn: Any, data: Any, steps: int, peak: float
) -> tuple[fg.step.TrainState, Any]:
    """One training from given parameters: -> (train_state, history)."""
    warmup = min(100, steps // 2)
    rate = fg.optim.warmup_cosine_decay_schedule(0.0, peak, warmup, steps, 0.02 * peak)
    tx = fg.optim.chain(fg.optim.clip_by_global_norm(1.0), fg.optim.adamw(rate, b2=0.99, weight_decay=1e-4))
    average = fg.ema.warmup(config.ema_decay)
    key_run, key_data = fg.random.split(key)
    step = fg.jit(fg.step.make_step(loss_fn, tx, ema=average), donate_argnums=0, backend=config.backend)
    state = fg.step.init_state(params, tx, key_run, ema=average)
    batches = fg.data.batches(key_data, data, config.batch_size)
    return fg.train.fit(step, state, batches, steps=steps, progress=config.progress)


def samplers(config: Config, model: Model, params: Any, one_step: Any) -> dict[str, Callable[..., Tensor]]:
    """sample(key, label) -> images by name: of the velocity of ``params`` and the average velocity of ``one_step``."""

    def solve(method: str, steps: int) -> Callable[[Tensor, Tensor], Tensor]:
        def sample(key: Tensor, label: Tensor) -> Tensor:
            velocity = model.velocity(params, label)
            return flow_matching.sample(key, velocity, (len(label), 1, 8, 8), steps=steps, method=method)

        return sample

    def jump(steps: int) -> Callable[[Tensor, Tensor], Tensor]:
        def sample(key: Tensor, label: Tensor) -> Tensor:
            u, shape = model.average_velocity(one_step), (len(label), 1, 8, 8)
            return flow_matching.sample_mean_flow(key, lambda x_t, r, t: u(x_t, r, t, label), shape, steps=steps)

        return sample

    return {
        "flow matching": solve("midpoint", config.sample_steps),
        **{f"flow matching, Euler, {n}": solve("euler", n) for n in (1, 4)},
        **{f"MeanFlow, {n}": jump(n) for n in (1, 2)},
    }


def write(folder: Path, images: Tensor, label: Tensor, history: Any, title: str) -> None:
    """Samples, ten of each digit as a picture, and the loss."""
    folder.mkdir(exist_ok=True)
    digits.save(folder / "samples.npz", images, label)
    shown = torch.cat([images[label == digit][:10] for digit in range(10)])
    fg.plot.image_grid(shown, folder / "samples.png", columns=10, row_labels=[str(i) for i in range(10)], title=title)
    fg.plot.curve(history["loss"], folder / "loss.png", steps=history["step"], title=title, y_label="training loss")


def main(config: Config) -> dict[str, dict[str, float]]:
    """Trains twice; writes pictures, samples and metrics into ``config.out``; returns the table."""
    out = fg.train.check_writable(config.out)
    data = digits.load(digits.TRAIN)
    model = make_model(config, data)
    keys = fg.random.split(fg.random.key(config.seed), 4)
    params = model.net.init(keys[0])
    flow, history = train(keys[1], config, params, make_loss(model), data, config.steps, config.learning_rate)
    loss_fn = make_mean_flow_loss(config, model, flow.ema.average)
    steps, rate = config.mean_flow_steps, config.mean_flow_rate
    mean, mean_history = train(keys[2], config, flow.ema.average, loss_fn, data, steps, rate)
    label = torch.arange(10).repeat_interleave(config.samples_per_class)
    table = {}
    for name, sample in samplers(config, model, flow.ema.average, mean.ema.average).items():
        with torch.inference_mode():
            images = sample(keys[3], label).clamp(-1, 1)
        table[name] = digits.judge(images, label)
        if name == "flow matching":
            write(out, images, label, history, f"{config.sample_steps} midpoint steps")
            table[name] |= {"parameters": fg.tree.size(params), "seconds of training": history["seconds"][-1]}
        elif name == "MeanFlow, 1":
            write(out / "mean_flow", images, label, mean_history, "MeanFlow, one evaluation")
            digits.save(out / "samples_one_step.npz", images, label)
            table[name] |= {"parameters": fg.tree.size(params), "seconds of training": mean_history["seconds"][-1]}
    (out / "metrics.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"samples.png, samples.npz, loss.png and metrics.json are in {settings.out}; those of MeanFlow in mean_flow")
