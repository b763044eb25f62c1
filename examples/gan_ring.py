"""Eight Gaussians on a ring by a small GAN, with and without gradient clipping and a falling learning rate.

python examples/gan_ring.py    # two minutes on two cores

Four settings times some seeds are one program: ``jit(vmap(step))``, whose optimizers take the largest norm and the last
rate as tensors. Nothing else keeps this GAN from collapsing: no penalty, no average, one step of each player in turn.
"""

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import command_line
import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg
from functorch_gen import gan

RADIUS, WIDTH, MODES = 2.0, 0.05, 8


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/gan_ring"  # folder for pictures and metrics
    steps: int = 5000  # training steps
    batch_size: int = 128  # examples a step
    learning_rate: float = 1e-3  # of both players, highest
    warmup: int = 100  # steps up to it, with the schedule
    clip: float = 0.5  # largest norm of a player's gradient, with clipping
    hidden: int = 64  # width of both networks
    latent: int = 16  # size of the latent
    seeds: int = 3  # runs of each setting
    samples: int = 1000  # of each run, to count modes
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no code generation

    def __post_init__(self) -> None:
        positive = ("steps", "batch_size", "learning_rate", "clip", "hidden", "latent", "seeds", "samples")
        fg.check.check_positive("Config", **{name: getattr(self, name) for name in positive})


SETTINGS = {  # name -> (clipping, schedule)
    "neither": (False, False),
    "clipping": (True, False),
    "schedule": (False, True),
    "both": (True, True),
}


def centres() -> Tensor:
    """The middle of each mode: (8, 2)."""
    angle = torch.arange(MODES) * (2 * math.pi / MODES)
    return RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)


def ring() -> fg.exact.GaussianMixture:
    """The data."""
    return fg.exact.isotropic_mixture(torch.ones(MODES), centres(), torch.full((MODES,), WIDTH))


def coverage(samples: Tensor) -> dict[str, float]:
    """Of samples (n, 2): how many modes have at least one in a hundred of them within 3 widths, and the share within.

    Source: Srivastava et al. 2017 (VEEGAN), section 4.1, arXiv:1705.07761, who ask for one sample.
    """
    distance, nearest = torch.cdist(samples, centres()).min(dim=1)
    near = nearest[distance < 3 * WIDTH]
    counts = torch.bincount(near, minlength=MODES)
    return {"modes": float((counts >= len(samples) / 100).sum()), "share near": len(near) / len(samples)}


class Players:
    """Both networks, their losses and what trains them."""

    def __init__(self, config: Config):
        self.config, widths = config, (config.hidden,) * 2
        self.d = fg.nn.MLP(2, widths, 1, activation=lambda x: F.leaky_relu(x, 0.2))
        self.g = fg.nn.MLP(config.latent, widths, 2, activation=F.relu)

    def draw(self, g_params: Any, key: Tensor, n: int) -> Tensor:
        """Points (n, 2) of the generator."""
        return self.g(g_params, fg.random.normal(key, (n, self.config.latent)))

    def d_loss(self, d_params: Any, g_params: Any, key: Tensor, batch: Tensor) -> Tensor:
        """What the discriminator minimises."""
        fake = self.draw(g_params, key, len(batch))
        return gan.d_logistic(self.d(d_params, batch)[:, 0], self.d(d_params, fake)[:, 0]).mean()

    def g_loss(self, g_params: Any, d_params: Any, key: Tensor, batch: Tensor) -> Tensor:
        """What the generator minimises."""
        return gan.g_non_saturating(self.d(d_params, self.draw(g_params, key, len(batch)))[:, 0]).mean()

    def rate(self, final: Any) -> Any:
        """The learning rate as a function of the step: up from 0, then along a cosine to the share ``final``."""
        c = self.config
        rise = fg.optim.linear_schedule(0.0, 1.0, c.warmup)
        fall = fg.optim.cosine_decay_schedule(1.0, c.steps)
        return lambda step: c.learning_rate * (final + (1 - final) * rise(step) * fall(step))

    def optimizer(self, max_norm: Any, final: Any) -> fg.optim.GradientTransformation:
        """Adam on clipped gradients."""
        adam = fg.optim.adam(self.rate(final), b1=0.5)
        return fg.optim.chain(fg.optim.clip_by_global_norm(max_norm), adam)

    def init(self, key: Tensor, max_norm: Tensor, final: Tensor) -> gan.GANState:
        """The state before the first step."""
        key_d, key_g, key_run = fg.random.split(key, 3)
        tx = self.optimizer(max_norm, final)
        return gan.init_state(self.d.init(key_d), self.g.init(key_g), tx, tx, key_run)

    def step(self, state: gan.GANState, max_norm: Tensor, final: Tensor) -> tuple[gan.GANState, dict[str, Tensor]]:
        """One step of both players on a fresh batch."""
        tx = self.optimizer(max_norm, final)
        batch = ring().sample(fg.random.fold_in(state.key, -1 - state.step), self.config.batch_size)
        state, metrics = gan.make_step(self.d_loss, self.g_loss, tx, tx)(state, batch)
        return state, {**metrics, "rate": self.rate(final)(state.step - 1)}


def train(config: Config, players: Players) -> tuple[gan.GANState, dict[str, Tensor]]:
    """All runs at once: -> (states, metrics), leading axes (settings x seeds) and (settings x seeds, steps)."""
    options = [(config.clip if clip else 1e9, 0.0 if falls else 1.0) for clip, falls in SETTINGS.values()]
    max_norm, final = torch.tensor(options).repeat_interleave(config.seeds, dim=0).unbind(1)
    keys = fg.random.split(fg.random.key(config.seed), config.seeds).repeat(len(SETTINGS), 1)
    states = fg.vmap(players.init)(keys, max_norm, final)
    step = fg.jit(fg.vmap(players.step), donate_argnums=0, backend=config.backend)
    rows = []
    for _ in range(config.steps):
        states, metrics = step(states, max_norm, final)
        rows.append(metrics)
    return states, {name: torch.stack([row[name] for row in rows], dim=1) for name in rows[0]}


def draw_samples(points: dict[str, Tensor], path: Any) -> None:
    """Writes the samples (n, 2) of each setting over circles around the modes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.6 * len(points), 2.9), dpi=100, layout="constrained")
    for axes, (name, x) in zip(figure.subplots(1, len(points), sharex=True, sharey=True), points.items(), strict=True):
        axes.scatter(*centres().T.numpy(), s=250, facecolors="none", edgecolors="0.7")
        axes.plot(*x.T.numpy(), ".", color="#1f4e79", markersize=2)
        axes.set(title=name, aspect="equal", xlim=(-2.8, 2.8), ylim=(-2.8, 2.8))
    figure.savefig(path)


def draw_training(run: dict[str, Tensor], clip: float, path: Any) -> None:
    """Writes both losses, both gradients' norms before and after clipping, and the rate of one run, each (steps,)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 2.9), dpi=100, layout="constrained")
    losses, norms, rate = figure.subplots(1, 3)
    for player, color in (("d", "#1f4e79"), ("g", "#d1495b")):
        norm = run[f"{player}_grad_norm"]
        losses.plot(run[f"{player}_loss"].numpy(), color=color, linewidth=0.6, label=player)
        norms.plot(norm.numpy(), color=color, linewidth=0.6, alpha=0.35, label=f"{player}, before")
        norms.plot(norm.clamp(max=clip).numpy(), color=color, linewidth=0.6, label=f"{player}, after")
    rate.plot(run["rate"].numpy(), color="#1f4e79")
    norms.set_yscale("log")
    for axes, title in ((losses, "loss"), (norms, "norm of the gradient"), (rate, "learning rate")):
        axes.set(title=title, xlabel="step")
    for axes in (losses, norms):
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path)


def main(config: Config) -> dict[str, dict[str, float]]:
    """Trains all runs, writes pictures and metrics into ``config.out``; returns the metrics, means over seeds."""
    out = fg.train.check_writable(config.out)
    players, begin = Players(config), time.perf_counter()
    states, history = train(config, players)
    seconds = time.perf_counter() - begin
    points = fg.vmap(lambda params: players.draw(params, fg.random.key(config.seed + 1), config.samples))(
        states.g_params
    )
    metrics: dict[str, dict[str, float]] = {}
    for i, name in enumerate(SETTINGS):
        runs = slice(i * config.seeds, (i + 1) * config.seeds)
        found = [coverage(x) for x in points[runs]]
        clipped = (history["d_grad_norm"][runs] > config.clip).double().mean()
        metrics[name] = {what: sum(f[what] for f in found) / config.seeds for what in found[0]}
        metrics[name] |= {"fewest modes": min(f["modes"] for f in found), "d norms above": float(clipped)}
    draw_samples(dict(zip(SETTINGS, points[:: config.seeds], strict=True)), out / "samples.png")
    last = {name: values[-config.seeds] for name, values in history.items()}  # first run of the last setting
    draw_training(last, config.clip, out / "training.png")
    metrics["all runs"] = {"seconds": seconds}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"samples.png, training.png and metrics.json are in {settings.out}")
