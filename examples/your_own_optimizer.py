"""An optimizer of your own in ten lines, and what the library then does with it.

python examples/your_own_optimizer.py    # half a minute

An optimizer is a pair of pure functions, ``init(params) -> state`` and ``update(grads, state, params) -> (updates,
state)``.
Nothing is registered and nothing inherited: written so, it works in ``chain``, ``make_step``, ``jit`` and ``vmap``.
"""

import json
from dataclasses import dataclass
from typing import Any

import command_line
import digits
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import optim


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/your_own_optimizer"  # folder of the results
    steps: int = 300  # of training
    hidden: int = 64  # width of the network
    batch_size: int = 128  # digits a step
    learning_rate: float = 3e-3
    seed: int = 0
    backend: str = "inductor"  # or aten: no generated code


def own_lion(b1: Any = 0.9, b2: Any = 0.99) -> optim.GradientTransformation:
    """Lion: the sign of a mean of gradients. Chen et al. 2023, algorithm 2, arXiv:2302.06675."""

    def init(params: Any) -> Any:
        return fg.tree.zeros_like(params)

    def update(grads: Any, mean: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates = fg.tree.map(lambda m, g: torch.sign(b1 * m + (1 - b1) * g), mean, grads)
        return updates, fg.tree.map(lambda m, g: b2 * m + (1 - b2) * g, mean, grads)

    return optim.GradientTransformation(init, update)


def make_optimizer(
    config: Config, lion: optim.GradientTransformation, rate: Any = None
) -> optim.GradientTransformation:
    """Yours between the library's: clipped gradients before it, decay and a schedule after it."""
    schedule = optim.cosine_decay_schedule(config.learning_rate if rate is None else rate, config.steps)
    decay = optim.add_decayed_weights(0.1, mask="*.weight")
    return optim.chain(optim.clip_by_global_norm(1.0), lion, decay, optim.scale_by_learning_rate(schedule))


class Task:
    """A network that learns the digits."""

    def __init__(self, config: Config):
        self.net = fg.nn.MLP(64, (config.hidden,), 10)
        self.data, self.test = digits.load(digits.TRAIN), digits.load(digits.TEST)
        self.key_init, self.key_run, self.key_data = fg.random.split(fg.random.key(config.seed), 3)

    def loss_fn(self, params: Any, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross entropy, mean of the batch."""
        logits = self.net(params, batch["image"].flatten(1))
        return fg.losses.cross_entropy(logits, batch["label"]).mean()

    def start(self, tx: optim.GradientTransformation) -> fg.step.TrainState:
        """The state before the first step."""
        return fg.step.init_state(self.net.init(self.key_init), tx, self.key_run)

    def batches(self, config: Config) -> Any:
        """The same for every run."""
        return fg.data.batches(self.key_data, self.data, config.batch_size, steps=config.steps)

    def accuracy(self, params: Any) -> Tensor:
        """On the test digits: ()."""
        return fg.metrics.accuracy(self.net(params, self.test["image"].flatten(1)), self.test["label"])


def train(config: Config, task: Task, lion: optim.GradientTransformation) -> fg.step.TrainState:
    """One run, compiled, its memory donated."""
    tx = make_optimizer(config, lion)
    step = fg.jit(fg.step.make_step(task.loss_fn, tx), donate_argnums=0, backend=config.backend)
    state = task.start(tx)
    return fg.train.fit(step, state, task.batches(config), steps=config.steps, progress=False)[0]


def train_at(config: Config, task: Task, rates: Tensor) -> Any:
    """A run at each learning rate (r,), side by side in one program: the parameters at the end, leaves (r, ...)."""

    def step(rate: Tensor, state: fg.step.TrainState, batch: Any) -> fg.step.TrainState:
        tx = make_optimizer(config, own_lion(), rate)
        return fg.step.make_step(task.loss_fn, tx)(state, batch)[0]

    many = fg.jit(fg.vmap(step, in_dims=(0, 0, None)), donate_argnums=1, backend=config.backend)
    begin = task.start(make_optimizer(config, own_lion()))
    states = fg.tree.stack([begin] * len(rates))
    for batch in task.batches(config):
        states = many(rates, states, batch)
    return states.params


def main(config: Config) -> dict[str, float]:
    """Trains with the optimizer above and with the library's; returns how far apart they end, and accuracies."""
    out, task = fg.train.check_writable(config.out), Task(config)
    own, librarys = train(config, task, own_lion()).params, train(config, task, optim.scale_by_lion()).params
    rates = config.learning_rate * torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0])
    accuracies = fg.vmap(task.accuracy)(train_at(config, task, rates)).tolist()
    metrics = {
        "distance from optim.scale_by_lion": fg.tree.norm(fg.tree.sub(own, librarys)).item(),
        "test accuracy": task.accuracy(own).item(),
        **{f"test accuracy at rate {r:.0e}": a for r, a in zip(rates.tolist(), accuracies, strict=True)},
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    for name, value in main(command_line.parse(Config, __doc__)).items():
        print(f"{name:46} {value:.4g}")
