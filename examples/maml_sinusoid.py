"""Learning to learn: parameters from which a few gradient steps fit a new sine wave (MAML).

python examples/maml_sinusoid.py    # two minutes on two cores; writes metrics.json and curves.png

The whole meta-step is one compiled program: the gradient of a mean over tasks (``vmap``) of the loss after an inner
loop (``scan``) of gradient steps, each computed again in the backward pass (``remat``). Step sizes are learned too.
Finn et al. 2017, arXiv:1703.03400; Li et al. 2017, arXiv:1707.09835.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/maml_sinusoid"  # folder of the results
    steps: int = 5000  # meta-steps
    tasks: int = 25  # a meta-step
    shots: int = 10  # examples that the inner loop learns from, and as many that it is judged by
    inner_steps: int = 1  # in training
    hidden: int = 40
    backend: str = "inductor"  # or aten: no generated code


class Task(NamedTuple):
    """Points (n, 1) of a wave to learn from, and others of the same wave to be judged by."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def draw_task(key: Tensor, shots: int, tests: int) -> Task:
    """A wave of amplitude in [0.1, 5] and phase in [0, pi], at points in [-5, 5]."""
    key_wave, key_x = fg.random.split(key)
    amplitude, phase = (fg.random.uniform(k) for k in fg.random.split(key_wave))
    x = 10 * fg.random.uniform(key_x, (shots + tests, 1)) - 5
    y = (0.1 + 4.9 * amplitude) * torch.sin(x - torch.pi * phase)
    return Task(x[:shots], y[:shots], x[shots:], y[shots:])


def draw_tasks(key: Tensor, count: int, shots: int, tests: int) -> Task:
    """``count`` tasks along axis 0."""
    return fg.vmap(lambda key: draw_task(key, shots, tests))(fg.random.split(key, count))


class Learner:
    """A network, its inner loop, and the loss after it; parameters: those of the network, and a step size for each."""

    def __init__(self, config: Config):
        self.net = fg.nn.MLP(1, (config.hidden, config.hidden), 1, activation=F.relu)

    def init(self, key: Tensor) -> Any:
        """The network's parameters, and the logarithms of the inner step sizes."""
        params = self.net.init(key)
        return {"net": params, "log_rate": fg.tree.map(lambda _: torch.tensor(0.01).log(), params)}

    def error(self, params: Any, x: Tensor, y: Tensor) -> Tensor:
        """Mean squared error."""
        return (self.net(params, x) - y).square().mean()

    def adapt(self, params: Any, task: Task, steps: int) -> tuple[Any, Any]:
        """The network after ``steps`` steps on the task, and its test error before each."""
        rates = fg.tree.map(torch.exp, params["log_rate"])

        def step(net: Any, _: None) -> tuple[Any, Tensor]:
            gradient = fg.grad(self.error)(net, task.x, task.y)
            return fg.tree.sub(net, fg.tree.mul(rates, gradient)), self.error(net, task.x_test, task.y_test)

        return fg.scan(fg.remat(step), params["net"], length=steps)

    def meta_loss(self, params: Any, tasks: Task, steps: int) -> Tensor:
        """The test error after the inner loop, mean over tasks: eq. 1 of the paper."""

        def loss(task: Task) -> Tensor:
            return self.error(self.adapt(params, task, steps)[0], task.x_test, task.y_test)

        return fg.vmap(loss)(tasks).mean()

    def curve(self, params: Any, tasks: Task, steps: int) -> Tensor:
        """(steps + 1,): the test error before each step and at the end, mean over tasks."""
        return fg.vmap(lambda task: self.adapt(params, task, steps + 1)[1])(tasks).mean(0)


def train(config: Config, learner: Learner, inner_steps: int) -> tuple[Any, list[float]]:
    """Meta-training; with 0 inner steps, a network that is trained on all waves at once."""
    tx = fg.optim.chain(
        fg.optim.clip_by_global_norm(10.0), fg.optim.adam(fg.optim.cosine_decay_schedule(1e-3, config.steps))
    )

    def loss_fn(params: Any, _key: Tensor, key: Tensor) -> Tensor:
        return learner.meta_loss(params, draw_tasks(key, config.tasks, config.shots, config.shots), inner_steps)

    step = fg.jit(fg.step.make_step(loss_fn, tx), donate_argnums=0, backend=config.backend)
    state = fg.step.init_state(learner.init(fg.random.key(0)), tx, fg.random.key(1))
    keys = fg.random.split(fg.random.key(2), config.steps)
    state, history = fg.train.fit(step, state, iter(keys), steps=config.steps, progress=False)
    return state.params, history["loss"]


def main(config: Config) -> dict[str, Any]:
    """Trains with and without the inner loop, and compares them on new waves."""
    out, learner = Path(config.out), Learner(config)
    fg.train.check_writable(out)
    tasks = draw_tasks(fg.random.key(3), 1000, config.shots, 100)
    curve = fg.jit(lambda params: learner.curve(params, tasks, 10), backend=config.backend)
    curves = {
        name: curve(train(config, learner, steps)[0]).tolist()
        for name, steps in (("MAML", config.inner_steps), ("trained on all waves", 0))
    }
    metrics = {f"{name}: error after {i} steps": found[i] for name, found in curves.items() for i in (0, 1, 5, 10)}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    draw(curves, out / "curves.png")
    return metrics


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Test error by gradient steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, found in curves.items():
        axes.plot(found, marker="o", label=name)
    axes.set(xlabel="gradient steps on 10 points of a new wave", ylabel="mean squared error", ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    for name, value in main(command_line.parse(Config, __doc__)).items():
        print(f"{name:40} {value:.3f}")
