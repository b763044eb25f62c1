"""A training run that saves after every step: ``test_checkpoint.py`` kills it, and starts it again, many times."""

import sys

import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen.step import TrainState

STEPS = 126
NET = fg.nn.MLP(4, (128, 128), 2, dropout=0.1)
DATA = {"x": fg.random.normal(fg.random.key(1), (64, 4)), "y": fg.random.normal(fg.random.key(2), (64, 2))}
TX, AVERAGE = fg.optim.adamw(1e-3), fg.ema.constant(0.9)


def loss_fn(params: fg.typing.Params, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
    return (NET(params, batch["x"], key=key) - batch["y"]).square().mean()


def start() -> TrainState:
    return fg.step.init_state(NET.init(fg.random.key(0)), TX, fg.random.key(3), ema=AVERAGE, flat=True)


def run(folder: str | None, compiled: bool) -> TrainState:
    """The whole run, or what is left of it after the newest checkpoint in ``folder``."""
    torch.set_num_threads(1)
    step = fg.step.make_step(loss_fn, TX, AVERAGE, flat=True)
    step = fg.jit(step, donate_argnums=0, backend="aten") if compiled else step
    batches = fg.data.batches(fg.random.key(4), DATA, 8)
    return fg.train.fit(step, start(), batches, steps=STEPS, progress=False, checkpoints=folder, save_every=1)[0]


if __name__ == "__main__":
    run(sys.argv[1], compiled=True)
