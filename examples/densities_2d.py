"""Diffusion, flow matching, VAE and GAN on six two-dimensional targets whose densities are known.

python examples/densities_2d.py        # a few minutes on two cores; densities.png, samples.npz, metrics.json

One compiled step trains a model of all six targets: parameters are stacked, and the loss is a ``vmap``. The likelihood
of a model, less the entropy of the target, is its Kullback-Leibler divergence: an absolute score, in nats.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import numpy as np
import targets_2d
import torch
from einops import rearrange
from families_2d import FAMILIES, Family
from torch import Tensor

import functorch_gen as fg
from functorch_gen import gan

EDGE = 2.75  # the picture shows so many standard deviations to each side
CELL = 112  # pixels of a side of its panels, or more: the names above them have room


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/densities_2d"  # folder for the picture, samples and metrics
    models: str = "diffusion,flow matching,VAE,GAN"  # which to train
    steps: int = 6000  # training steps; VAE and GAN take half of them
    batch_size: int = 512  # points of each target a step
    learning_rate: float = 3e-3  # highest; warm-up, then cosine decay
    ema_decay: float = 0.999  # of the averaged parameters
    width: int = 128  # of the hidden layers
    train_points: int = 100_000  # of each target
    test_points: int = 10_000  # of each target, for the divergence
    samples: int = 5000  # of each model, for the sliced Wasserstein distance
    ode_steps: int = 24  # of the solver
    cells: int = 64  # of the picture's densities, a side
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no code generation

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "learning_rate", "width", "train_points", "test_points", "samples")
        fg.check.check_positive("Config", **{name: getattr(self, name) for name in positive})
        for name in self.models.split(","):
            fg.check.check_choice("Config", "models", name, FAMILIES)


def train(key: Tensor, config: Config, family: Family, data: Tensor) -> Any:
    """Trains a model of each target (k, n, 2): -> their averaged parameters, stacked."""
    steps = max(1, int(family.share * config.steps))
    rate = family.rate * config.learning_rate
    schedule = fg.optim.warmup_cosine_decay_schedule(0.0, rate, 100, max(steps, 101))
    tx, average = fg.optim.adam(schedule, b1=family.momentum, b2=0.99), fg.ema.warmup(config.ema_decay)
    key_init, key_run = fg.random.split(key)
    params = fg.vmap(family.init)(fg.random.split(key_init, len(data)))

    def losses(params: Any, key: Tensor, data: Tensor) -> Any:
        key_batch, key_loss = fg.random.split(key)
        chosen = fg.random.randint(key_batch, (config.batch_size,), 0, data.shape[1])
        found = fg.vmap(family.loss)(params, fg.random.split(key_loss, len(data)), data[:, chosen])
        return fg.tree.map(lambda loss: loss.mean(1).sum(), found)  # no target shares parameters with another

    if family.log_prob is not None:
        step, state = fg.step.make_step(losses, tx, average), fg.step.init_state(params, tx, key_run, ema=average)
    else:

        def d_loss(d: Any, g: Any, key: Tensor, data: Tensor) -> Tensor:
            return losses({"d": d, "g": g}, key, data)["d"]

        def g_loss(g: Any, d: Any, key: Tensor, data: Tensor) -> Tensor:
            return losses({"d": d, "g": g}, key, data)["g"]

        step = gan.make_step(d_loss, g_loss, tx, tx, ema=average)
        state = gan.init_state(params["d"], params["g"], tx, tx, key_run, ema=average)
    step = fg.jit(step, donate_argnums=0, backend=config.backend)
    for _ in range(steps):
        state, _ = step(state, data)
    return state.ema.average


class Problem(NamedTuple):
    """The targets in units of their own, in which their mean is 0 and their variance 1."""

    targets: list[targets_2d.Target]
    mean: Tensor  # (k, 1, 2)
    std: Tensor  # (k, 1, 1)

    def draw(self, key: Tensor, n: int) -> Tensor:
        """n points of each: -> (k, n, 2)."""
        keys = fg.random.split(key, len(self.targets))
        return torch.stack([(t.sample(k, n) - m) / s for t, k, m, s in zip(self.targets, keys, self.mean, self.std)])

    def log_prob(self, z: Tensor) -> Tensor:
        """(k, n, 2) -> (k, n), in nats."""
        log_p = torch.stack([t.log_prob(x) for t, x in zip(self.targets, self.mean + self.std * z)])
        return log_p + 2 * self.std[:, 0].log()


def make_problem(key: Tensor) -> Problem:
    """All targets, their moments estimated from 100,000 points each."""
    found = [targets_2d.make_target(name) for name in targets_2d.TARGETS]
    x = torch.stack([target.sample(key, 100_000) for target in found])
    return Problem(found, x.mean(1, keepdim=True), (x - x.mean(1, keepdim=True)).std((1, 2), keepdim=True))


def evaluate(key: Tensor, config: Config, family: Family, params: Any, points: Tensor) -> tuple[Tensor, Tensor | None]:
    """Samples (k, m, 2), and log-densities at the points (k, n, 2) -> (k, n) if the family has them."""
    keys = fg.random.split(key, len(points))
    samples = fg.vmap(lambda params, key: family.sample(params, key, config.samples))(params, keys)
    if family.log_prob is None:
        return samples, None
    return samples, fg.jit(fg.vmap(family.log_prob), backend="aten")(params, keys, points)


def main(config: Config) -> dict[str, Any]:
    """Trains all models, writes a picture, samples and metrics into ``config.out``; returns the metrics."""
    out = fg.train.check_writable(config.out)
    key_problem, key_data, key_test, key_real, key_slices, key = fg.random.split(fg.random.key(config.seed), 6)
    problem = make_problem(key_problem)
    data, test = problem.draw(key_data, config.train_points), problem.draw(key_test, config.test_points)
    real = problem.draw(key_real, config.samples)
    points = torch.cat([test, targets_2d.grid(config.cells, EDGE).expand(len(test), -1, 2)], 1)
    log_p = problem.log_prob(points)
    pictures, drawn = {"truth": log_p[:, config.test_points :].exp()}, {"real": real}
    metrics = {
        name: {"entropy": targets_2d.entropy(target).item()}
        for name, target in zip(targets_2d.TARGETS, problem.targets)
    }
    for i, name in enumerate(config.models.split(",")):
        family, begin = FAMILIES[name](config.width, config.ode_steps), time.perf_counter()
        key_train, key_judge = fg.random.split(fg.random.fold_in(key, i))
        params = train(key_train, config, family, data)
        print(f"{name}: {time.perf_counter() - begin:.0f} s of training")
        samples, log_q = evaluate(key_judge, config, family, params, points)
        drawn[name] = samples
        if log_q is None:
            pictures[name] = torch.stack([targets_2d.histogram(x, config.cells, EDGE) for x in samples])
        else:
            pictures[name] = log_q[:, config.test_points :].exp()
            divergence = (log_p - log_q)[:, : config.test_points].mean(1)
            for row, value in zip(metrics.values(), divergence.tolist()):
                row[f"{name} KL"] = value
        for j, row in enumerate(metrics.values()):
            row[f"{name} distance"] = fg.metrics.sliced_wasserstein(key_slices, samples[j], real[j]).item()
    save(out, config, problem, pictures, drawn)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def save(out: Path, config: Config, problem: Problem, pictures: dict[str, Tensor], drawn: dict[str, Tensor]) -> None:
    """Densities side by side, a row for each target, as dark as the truth is there; samples in the targets' units."""
    peak = pictures["truth"].amax(1, keepdim=True)
    shades = torch.stack([1 - 2 * (density / peak).clamp(max=1) for density in pictures.values()], 1)
    images = rearrange(shades, "k m (h w) -> (k m) 1 h w", h=config.cells)
    labels: Any = {"row_labels": targets_2d.TARGETS, "column_labels": list(pictures)}
    scale = math.ceil(CELL / config.cells)
    fg.plot.image_grid(images, out / "densities.png", columns=len(pictures), scale=scale, **labels)
    arrays: Any = {name: (problem.mean + problem.std * z).numpy() for name, z in drawn.items()}
    np.savez_compressed(out / "samples.npz", **arrays)


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"densities.png, samples.npz and metrics.json are in {settings.out}")
