"""What an average of the parameters is worth: one diffusion model of digits, sampled from many averages of it.

python examples/ema_quality.py    # two minutes on two cores

The learning rate stays constant, so that the averages do the work a decay would do. Two power-function averages are
kept at every checkpoint; from those, averages of other widths are made after the training (Karras et al. 2024).
"""

import json
import time
from dataclasses import dataclass
from typing import Any

import command_line
import diffusion_digits as demo
import digits
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen.ema import EMA, EMAState


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/ema_quality"  # folder for pictures and metrics
    steps: int = 1500  # training steps
    batch_size: int = 64  # examples a step
    learning_rate: float = 2e-3  # after a warm-up of 50 steps
    base_channels: int = 16  # width of the U-Net
    checkpoints: int = 6  # how often all averages are judged
    widths: int = 6  # averages that are made after the training
    sample_steps: int = 10  # Heun steps
    samples_per_class: int = 50  # of each average
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no code generation
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "learning_rate", "checkpoints", "widths", "samples_per_class")
        fg.check.check_positive("Config", **{name: getattr(self, name) for name in positive})


AVERAGES: dict[str, EMA] = {
    "decay 0.9": fg.ema.constant(0.9),
    "decay 0.99": fg.ema.constant(0.99),
    "decay 0.999": fg.ema.constant(0.999),
    "decay 0.999, warm-up": fg.ema.warmup(0.999),
    "power 0.05": fg.ema.power(0.05),
    "power 0.1": fg.ema.power(0.1),
}
POWERS = {"power 0.05": 0.05, "power 0.1": 0.1}  # of which others are made


def side_by_side(averages: dict[str, EMA]) -> EMA:
    """Several averages as one, whose state is theirs by name."""

    def init(params: Any) -> Any:
        return {name: average.init(params) for name, average in averages.items()}

    def update(params: Any, state: Any) -> Any:
        return params, {name: average.update(params, state[name])[1] for name, average in averages.items()}

    return EMA(init, update)


class Judge:
    """The Frechet ratio of samples that parameters draw, always from the same noise."""

    def __init__(self, config: Config, model: demo.Model):
        self.config = config
        self.key = fg.random.key(config.seed + 1)
        self.label = torch.arange(10).repeat_interleave(config.samples_per_class)
        self.sampler = demo.make_sampler(model, (1, 8, 8))
        real, self.held_out = (digits.load(part)["image"].flatten(1) for part in (digits.TRAIN, digits.TEST))
        self.floor = fg.metrics.frechet_distance(real, self.held_out)

    def draw(self, params: Any, label: Tensor) -> Tensor:
        """Images of these classes, (n, 1, 8, 8)."""
        return self.sampler(self.key, params, label, steps=self.config.sample_steps, guidance=1.0)

    def __call__(self, params: Any) -> float:
        """Frechet distance to the test digits over that of the training digits."""
        samples = digits.to_levels(self.draw(params, self.label)).flatten(1) / 8 - 1
        return float(fg.metrics.frechet_distance(samples, self.held_out) / self.floor)


class Log:
    """What is measured while the model trains: the ratio of each average, and copies of the power averages."""

    def __init__(self, judge: Judge):
        self.judge = judge
        self.ratios: dict[str, dict[int, float]] = {"none": {}, **{name: {} for name in AVERAGES}}
        self.snapshots: list[tuple[float, EMAState]] = []

    def __call__(self, state: fg.step.TrainState) -> None:
        """Samples from every average as it is now."""
        step = int(state.step)
        self.ratios["none"][step] = self.judge(state.params)
        for name in AVERAGES:
            self.ratios[name][step] = self.judge(state.ema[name].average)
        for name, std in POWERS.items():  # copies: the next step writes over the state
            self.snapshots.append((std, fg.tree.map(torch.clone, state.ema[name])))


def train(config: Config, model: demo.Model, log: Log) -> fg.step.TrainState:
    """Trains with all averages side by side."""
    key_init, key_run, key_data = fg.random.split(fg.random.key(config.seed), 3)
    rate = fg.optim.linear_schedule(0.0, config.learning_rate, min(50, config.steps))
    tx = fg.optim.chain(fg.optim.clip_by_global_norm(1.0), fg.optim.adam(rate, b2=0.99))
    averages = side_by_side(AVERAGES)
    state = fg.step.init_state(model.net.init(key_init), tx, key_run, ema=averages)
    pure_step = fg.step.make_step(demo.make_loss(demo.Config(), model), tx, ema=averages)
    step = fg.jit(pure_step, donate_argnums=0, backend=config.backend)
    batches = fg.data.batches(key_data, digits.load(digits.TRAIN), config.batch_size)
    hooks = [fg.train.Every(max(1, config.steps // config.checkpoints), log)]
    state, _ = fg.train.fit(step, state, batches, steps=config.steps, hooks=hooks, progress=config.progress)
    return state


def draw_quality(ratios: dict[str, dict[int, float]], made: dict[float, float], path: Any) -> None:
    """Writes the ratio of each average over the steps, and of those made after the training over their width."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.8), dpi=100, layout="constrained")
    trained, widths = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, found in ratios.items():
        style = {"linestyle": "--", "color": "0.3"} if name == "none" else {}
        trained.plot(list(found), list(found.values()), marker=".", label=name, **style)
    widths.plot(list(made), list(made.values()), marker=".", color="#1f4e79")
    lowest = min(min(found.values()) for found in ratios.values())
    trained.set(title="averages of one run", xlabel="step", ylabel="Frechet ratio; real digits: 1")
    trained.set_ylim(0.95 * lowest, 1.5 * max(ratios["none"].values()))
    widths.set(title=f"averages made after step {max(ratios['none'])}", xlabel="width, as a share of the run")
    trained.legend(frameon=False, fontsize=7, ncols=2)
    figure.savefig(path)


def main(config: Config) -> dict[str, Any]:
    """Trains, writes pictures and metrics into ``config.out``; returns the metrics."""
    out = fg.train.check_writable(config.out)
    data = digits.load(digits.TRAIN)
    model = demo.make_model(demo.Config(base_channels=config.base_channels), data)
    begin = time.perf_counter()
    judge = Judge(config, model)
    log = Log(judge)
    state = train(config, model, log)
    widths = [0.03 * (0.2 / 0.03) ** (i / max(1, config.widths - 1)) for i in range(config.widths)]
    made = {std: judge(fg.ema.synthesize(log.snapshots, std)) for std in widths}
    draw_quality(log.ratios, made, out / "quality.png")
    last = {name: list(found.values())[-1] for name, found in log.ratios.items()}
    best = min(AVERAGES, key=lambda name: last[name])
    grid = [judge.draw(params, torch.arange(10)) for params in (state.params, state.ema[best].average)]
    fg.plot.image_grid(torch.cat(grid).clamp(-1, 1), out / "samples.png", columns=10, row_labels=["none", best])
    metrics = {
        "by steps": {name: {str(step): ratio for step, ratio in r.items()} for name, r in log.ratios.items()},
        "made": {f"width {std:.3f}": ratio for std, ratio in made.items()},
        "seconds": time.perf_counter() - begin,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    found = main(settings)
    print(command_line.table(found["by steps"]), command_line.table({"made": found["made"]}), sep="\n\n")
    print(f"quality.png, samples.png and metrics.json are in {settings.out}")
