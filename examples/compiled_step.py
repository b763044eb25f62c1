"""A training step compiled once: what it costs, and how a second process takes it from a file.

python examples/compiled_step.py    # traces, compiles and trains a small GPT on the text of this file; saves the step
python examples/compiled_step.py    # again: takes the step from the file, without tracing or a C++ compiler
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
import torch
import torch.nn.functional as F
from torch import Tensor

import functorch_gen as fg
from functorch_gen.nn import MLP, Bound, Embedding, LayerNorm, Linear, MultiHeadAttention, Sequential, init_parts


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    file: str = "runs/compiled_step/step.bin"  # where the compiled step lies; delete it when the model changes
    steps: int = 200  # training steps
    width: int = 64  # of the embeddings
    depth: int = 4  # blocks: alike, so they are compiled once
    length: int = 64  # bytes an example
    batch_size: int = 16  # examples a step
    backend: str = "inductor"  # or aten: no generated code, and nothing to save


@dataclass(frozen=True)
class Block:
    """x + attention(norm1(x)), then x + mlp(norm2(x)): (b, n, width) -> (b, n, width)."""

    width: int

    @property
    def parts(self) -> dict[str, Any]:
        """The layers by name."""
        return {
            "norm1": LayerNorm(self.width),
            "attention": MultiHeadAttention(self.width, num_heads=4),
            "norm2": LayerNorm(self.width),
            "mlp": MLP(self.width, (4 * self.width,), self.width, activation=F.gelu),
        }

    def init(self, key: Tensor) -> Any:
        """Parameters of each layer under its name."""
        return init_parts(self.parts, key)

    def __call__(self, params: Any, x: Tensor, *, key: Tensor | None = None) -> Tensor:
        """The formula above."""
        f = Bound(self.parts, params, key=key)
        x = x + f.attention(f.norm1(x), is_causal=True)
        return x + f.mlp(f.norm2(x))


def make_net(config: Config) -> Sequential:
    """Logits of the next byte: (b, n) integers -> (b, n, 256)."""
    blocks = [Block(config.width) for _ in range(config.depth)]
    return Sequential(Embedding(256, config.width), *blocks, LayerNorm(config.width), Linear(config.width, 256))


def main(config: Config) -> dict[str, Any]:
    """Trains with the step of the file, or compiles and saves it; returns losses and the seconds of the first step."""
    net, average = make_net(config), fg.ema.constant(0.99)
    tx = fg.optim.chain(fg.optim.clip_by_global_norm(1.0), fg.optim.adamw(3e-3))

    def loss_fn(params: Any, key: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(net(params, batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    pure_step = fg.step.make_step(loss_fn, tx, average, flat=True)
    step = fg.jit(pure_step, donate_argnums=0, backend=config.backend)
    key_init, key_run, key_data = fg.random.split(fg.random.key(0), 3)
    state = fg.step.init_state(net.init(key_init), tx, key_run, ema=average, flat=True)
    text = torch.tensor(list(Path(__file__).read_bytes())).unfold(0, config.length + 1, 1).contiguous()

    file = Path(config.file)
    saved = file.exists()
    if saved:
        step.load(file)  # refused if it was made with another width or depth, or by another torch
    else:
        print(step.lower(state, text[: config.batch_size]).cost())
    batches = fg.data.batches(key_data, text, config.batch_size)
    state, history = fg.train.fit(step, state, batches, steps=config.steps, progress=False)
    if not saved and config.backend != "aten":
        fg.train.check_writable(file.parent)
        step.save(file)
    losses = history["loss"]
    return {"first loss": losses[0], "last loss": losses[-1], "seconds of the first step": history["seconds"][0]}


if __name__ == "__main__":
    for name, value in main(command_line.parse(Config, __doc__)).items():
        print(f"{name:26} {value:.3f}")
