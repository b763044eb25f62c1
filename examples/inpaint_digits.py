"""Completes digits it has never seen from half their pixels, or from their means of 2x2, by a diffusion model.

python examples/inpaint_digits.py    # trains the model without labels, then solves three inverse problems
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import command_line
import diffusion_digits
import digits
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg
from functorch_gen.diffusion import denoiser, dps, mmps, pigdm, project, sample_ddpm


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/inpaint_digits"  # folder for pictures, samples and metrics
    steps: int = 1500  # training steps
    batch_size: int = 128  # examples a step
    base_channels: int = 32  # width of the U-Net
    digits: int = 100  # of the test split, at most 447, completed
    draws: int = 4  # completions of each
    sample_steps: int = 30  # of the ancestral sampler
    noise_std: float = 0.05  # of what is seen; images are in [-1, 1]
    seed: int = 0  # of everything
    backend: str = "inductor"  # of the training step; or aten: no code generation
    progress: bool = True  # show a progress bar

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "digits", "draws", "sample_steps", "noise_std")
        fg.check.check_positive("Config", **{name: getattr(self, name) for name in positive})


Operator = Callable[[Tensor], Tensor]


class Problem(NamedTuple):
    """What is seen of an image, and how to show it."""

    operator: Operator  # (n, 1, 8, 8) -> y
    shown: Operator  # y -> (n, 1, 8, 8)


def subset(kept: Tensor) -> Problem:
    """Sees the pixels of these indices (m,); the others are shown black."""
    black = torch.full((1, 64), -1.0)

    def shown(y: Tensor) -> Tensor:
        return black.expand(len(y), -1).index_copy(1, kept, y).reshape(-1, 1, 8, 8)

    return Problem(lambda x: x.flatten(1).index_select(1, kept), shown)


def problems(key: Tensor) -> dict[str, Problem]:
    """Half the pixels, in two ways, and a quarter of the resolution."""
    means = Problem(lambda x: F.avg_pool2d(x, 2), lambda y: F.interpolate(y, scale_factor=2))
    scattered = fg.random.permutation(key, 64)[:32].long()
    return {"upper half": subset(torch.arange(32)), "random half": subset(scattered), "2x2 means": means}


class Prior(NamedTuple):
    """What is known before anything is seen."""

    denoise: Callable[[Tensor, Tensor], Tensor]
    schedule: fg.noise.NoiseSchedule
    sigma_data: float


def train(key: Tensor, config: Config) -> Prior:
    """The model of examples/diffusion_digits.py without its labels."""
    shared = {name: getattr(config, name) for name in ("steps", "batch_size", "base_channels", "backend", "progress")}
    settings = diffusion_digits.Config(out=config.out, label_drop=1.0, **shared)
    data = diffusion_digits.load_data(settings)
    model = diffusion_digits.make_model(settings, data)
    no_label = model.net.num_classes or 0
    state, _ = diffusion_digits.train(key, settings, model, data)

    def network(x_t: Tensor, c_noise: Tensor) -> Tensor:
        return model.net(state.ema.average, x_t, c_noise, torch.full(x_t.shape[:1], no_label))

    denoise = denoiser(network, schedule=model.schedule, prediction=model.prediction)
    return Prior(denoise, model.schedule, model.prediction.sigma_data)


def methods(prior: Prior, noise_std: float) -> dict[str, Callable[[Operator, Tensor], Any]]:
    """Conditional denoisers, from an operator and what it gave."""
    options: Any = {"schedule": prior.schedule, "noise_std": noise_std}
    spread: Any = {**options, "sigma_data": prior.sigma_data}
    return {
        "project": lambda operator, y: project(prior.denoise, operator, y, **spread),
        "dps": lambda operator, y: dps(prior.denoise, operator, y, schedule=prior.schedule),
        "pigdm": lambda operator, y: pigdm(prior.denoise, operator, y, **spread),
        "mmps": lambda operator, y: mmps(prior.denoise, operator, y, **options, iterations=2),
    }


def complete(key: Tensor, denoise: Any, prior: Prior, config: Config) -> Tensor:
    """Samples of a conditional denoiser: -> (draws, n, 1, 8, 8) in [-1, 1]."""
    options: Any = {"schedule": prior.schedule, "steps": config.sample_steps}
    keys = fg.random.split(key, config.draws)
    return torch.stack([sample_ddpm(k, denoise, (config.digits, 1, 8, 8), **options) for k in keys]).clamp(-1, 1)


def gaussian_mean(problem: Problem, y: Tensor, noise_std: float) -> Tensor:
    """E[x | y] if digits were Gaussian, of the mean and covariance of the training split: (n, ...) -> (n, 1, 8, 8)."""
    real = digits.load(digits.TRAIN)["image"].flatten(1).double()
    mean, cov = real.mean(0), real.T.cov()
    a = problem.operator(torch.eye(64).reshape(64, 1, 8, 8)).flatten(1).T.double()  # (m, 64)
    seen = a @ cov @ a.T + noise_std**2 * torch.eye(len(a))
    gap = y.flatten(1).double() - mean @ a.T
    return (mean + torch.linalg.solve(seen, gap.T).T @ a @ cov).float().reshape(-1, 1, 8, 8)


def make_judge(test: dict[str, Tensor]) -> Callable[[Tensor], dict[str, float]]:
    """judge(images (draws, n, 1, 8, 8)): errors of one image and of their mean, and how many of them are recognised."""
    from sklearn.svm import SVC

    real = digits.load(digits.TRAIN)
    svc = SVC().fit(real["image"].flatten(1).numpy(), real["label"].numpy())

    def error(x: Tensor) -> float:
        return (x - test["image"]).square().mean().sqrt().item()

    def judge(images: Tensor) -> dict[str, float]:
        right = [svc.score(x.flatten(1).numpy(), test["label"].numpy()) for x in images]
        return {"error": error(images), "error of mean": error(images.mean(0)), "recognised": sum(right) / len(right)}

    return judge


def main(config: Config) -> dict[str, Any]:
    """Trains, completes, writes pictures and metrics into ``config.out``; returns the metrics."""
    out = fg.train.check_writable(config.out)
    key_train, key_problem, key_noise, key_draw = fg.random.split(fg.random.key(config.seed), 4)
    begin = time.perf_counter()
    prior = train(key_train, config)
    trained = time.perf_counter()
    test = {name: x[: config.digits] for name, x in digits.load(digits.TEST).items()}
    judge = make_judge(test)
    metrics: dict[str, Any] = {"truth": judge(test["image"][None])}
    average = digits.load(digits.TRAIN)["image"].mean(0)
    metrics["mean image"] = judge(average.expand_as(test["image"])[None])
    for title, problem in problems(key_problem).items():
        clean = problem.operator(test["image"])
        y = clean + config.noise_std * fg.random.normal(key_noise, clean.shape)
        found = {"seen": problem.shown(y)[None], "Gaussian": gaussian_mean(problem, y, config.noise_std)[None]}
        for name, method in methods(prior, config.noise_std).items():
            found[name] = complete(key_draw, method(problem.operator, y), prior, config)
        metrics |= {f"{title}: {name}": judge(images) for name, images in found.items()}
        file = title.replace(" ", "_")
        rows = {"truth": test["image"], **{name: images[0] for name, images in found.items()}}
        grid = torch.cat([images[:10] for images in rows.values()])
        fg.plot.image_grid(grid, out / f"{file}.png", columns=10, row_labels=list(rows), title=title)
        arrays: dict[str, Any] = {name: digits.to_levels(images).numpy() for name, images in found.items()}
        np.savez_compressed(out / f"{file}.npz", **arrays)
    metrics["seconds"] = {"training": trained - begin, "completing": time.perf_counter() - trained}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"pictures and metrics.json are in {settings.out}")
