"""A GPT that learns the bytes of Python's standard library in the time it is given.

python examples/gpt_stdlib.py           # ten minutes of training on two cores, then about two to judge it
python examples/gpt_stdlib.py --long    # an hour of a larger model

Every held-out byte is predicted once: in windows of ``length`` bytes that overlap by half, from the half window before
it or more. Compressors and counts of contexts have the same bytes.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import command_line
import stdlib_text
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import lm


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/gpt_stdlib"  # folder for the picture, the sample and metrics
    minutes: float = 10.0  # of training, the time to compile included
    long: bool = False  # 60 minutes, 8 layers of width 384, sequences of 1024 bytes, 4 a step
    num_layers: int = 6  # blocks
    num_heads: int = 4  # of attention
    embed_dim: int = 256  # width
    length: int = 512  # bytes of a sequence
    batch_size: int = 8  # sequences a step
    learning_rate: float = 0.02  # highest, of the blocks' matrices, by Muon
    adam_learning_rate: float = 3e-3  # highest, of the rest
    warmup: float = 0.05  # share of the time in which the rate rises
    decay: float = 0.5  # share of the time, at the end, in which it falls
    bfloat16: str = "auto"  # products in 16 bits: "yes", "no", or "auto", if this processor is faster so
    orders: int = 5  # longest context that is counted
    prompt: str = "class Tree:\n    def __init__("  # of the sample
    held_out: int = 0  # bytes that are judged, from the beginning; 0: all
    seed: int = 0  # of everything but the split
    backend: str = "inductor"  # or aten: no code generation
    progress: bool = True  # print the loss from time to time

    def __post_init__(self) -> None:
        fg.check.check_positive("Config", minutes=self.minutes, length=self.length, orders=self.orders)
        fg.check.check_choice("Config", "bfloat16", self.bfloat16, ("yes", "no", "auto"))


LONG: Any = {"minutes": 60.0, "num_layers": 8, "num_heads": 6, "embed_dim": 384, "length": 1024, "batch_size": 4}


def resolve(config: Config) -> Config:
    """The settings of a long run, if it is one, and whether products are in 16 bits: where that takes half the time."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, times = torch.ones(1024, 512, dtype=dtype), []
        for _ in range(10):
            begin = time.perf_counter()
            torch.mm(x, x.mT)
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    faster = "yes" if 2 * seconds[torch.bfloat16] < seconds[torch.float32] else "no"
    config = replace(config, bfloat16=faster) if config.bfloat16 == "auto" else config
    return replace(config, **LONG) if config.long else config


def make_model(config: Config) -> fg.models.GPT:
    """RoPE, RMSNorm, SwiGLU of 8/3 the width, normalised queries and keys, a tied head."""
    return fg.models.GPT(
        256,
        config.length,
        config.num_layers,
        config.num_heads,
        config.embed_dim,
        hidden_features=round(8 / 3 * config.embed_dim / 32) * 32,
        norm=fg.nn.RMSNorm,
        gated=True,
        qk_norm=True,
        rotary_base=1e4,
    )


def make_optimizer(config: Config, scale: Tensor) -> fg.optim.GradientTransformation:
    """Muon for the matrices of the blocks, Adam for the rest, at ``scale`` of the highest rate."""

    def of_blocks(params: Any) -> Any:
        return fg.tree.map_with_path(lambda path, x: x.ndim == 2 and path.startswith("block"), params)

    rate, rest = config.learning_rate * scale, config.adam_learning_rate * scale
    muon = fg.optim.muon(rate, output_axis=0, mask=of_blocks, adam_learning_rate=rest, adam_b2=0.95)
    return fg.optim.chain(fg.optim.clip_by_global_norm(1.0), muon)


def make_step(config: Config, gpt: fg.models.GPT) -> Callable[..., Any]:
    """step(train_state, tokens, scale) -> (train_state, metrics)."""

    def loss_fn(params: Any, key: Tensor, tokens: Tensor) -> Tensor:
        return lm.loss(lambda tokens: gpt(params, tokens), tokens).mean()

    def step(state: fg.step.TrainState, tokens: Tensor, scale: Tensor) -> Any:
        return fg.step.make_step(loss_fn, make_optimizer(config, scale))(state, tokens)

    return fg.autocast(step) if config.bfloat16 == "yes" else step


def train(config: Config, gpt: fg.models.GPT, text: Tensor) -> tuple[Any, list[float]]:
    """Steps until the time is over; the rate depends on the share of it that is gone: -> (parameters, losses)."""
    begin = time.perf_counter()
    key_init, key_run, key_data = fg.random.split(fg.random.key(config.seed), 3)
    zero = torch.zeros(())
    state = fg.step.init_state(gpt.init(key_init), make_optimizer(config, zero), key_run)
    step = fg.jit(make_step(config, gpt), donate_argnums=0, backend=config.backend)
    sequences = text.unfold(0, config.length + 1, 1)  # every one there is: a view

    def batch(n: int) -> Tensor:
        at = fg.random.randint(fg.random.fold_in(key_data, n), (config.batch_size,), 0, len(sequences))
        return sequences[at].long()

    state, _ = step(state, batch(0), zero)  # compiles; the parameters stay, for the rate is 0
    compiled, end = time.perf_counter(), begin + 60 * config.minutes
    losses: list[float] = []
    while (now := time.perf_counter()) < end or not losses:
        gone = min((now - compiled) / max(end - compiled, 1e-9), 1.0)
        scale = min(gone / config.warmup, 1.0, (1 - gone) / config.decay)
        state, metrics = step(state, batch(len(losses) + 1), torch.tensor(scale))
        losses.append(float(metrics["loss"]))
        if config.progress and len(losses) % 50 == 0:
            print(f"{gone:4.0%} of the time, step {len(losses)}: {losses[-1] / math.log(2):.3f} bits per byte")
    return state.params, losses


def judge(config: Config, gpt: fg.models.GPT, params: Any, text: Tensor) -> float:
    """Bits per byte of a text."""
    narrow = fg.autocast(gpt, output_dtype=torch.float32) if config.bfloat16 == "yes" else gpt
    network = fg.jit(lambda params, tokens: narrow(params, tokens), backend=config.backend)
    nll = lm.text_nll(lambda x: network(params, x), text, window=config.length, start=ord("\n"))
    return float(lm.bits_per_byte(nll.double().mean()))


def draw(config: Config, gpt: fg.models.GPT, params: Any) -> str:
    """A text that begins with the prompt."""
    tokenizer = fg.data.ByteTokenizer()
    prompt = tokenizer.encode(config.prompt)
    generate = fg.jit(
        lambda key, params, prompt: lm.generate(
            key, gpt, params, prompt, config.length - len(prompt), temperature=0.8, top_p=0.95
        ),
        backend="aten",
    )
    return config.prompt + tokenizer.decode(generate(fg.random.key(config.seed), params, prompt))


def main(config: Config) -> dict[str, Any]:
    """Trains and judges; writes the loss, a sample and metrics into ``config.out``; returns the metrics."""
    config = resolve(config)
    out = fg.train.check_writable(config.out)
    text, held_out = stdlib_text.load()
    held_out = held_out[: config.held_out or None]
    gpt = make_model(config)
    begin = time.perf_counter()
    params, losses = train(config, gpt, text)
    trained = time.perf_counter()
    bits = judge(config, gpt, params, held_out)
    judged = time.perf_counter()
    (out / "sample.txt").write_text(draw(config, gpt, params))
    fg.plot.curve(
        lm.bits_per_byte(torch.tensor(losses)),
        out / "loss.png",
        log=False,
        title="training loss",
        y_label="bits per byte",
    )
    counted = stdlib_text.ngram_bits(text, held_out, config.orders)
    metrics = {
        "parameters": fg.tree.size(params),
        "steps": len(losses),
        "seconds of training": trained - begin,
        "seconds of judging": judged - trained,
        "bfloat16": config.bfloat16 == "yes",
        "held-out bytes": len(held_out),
        **{f"order {n}, Witten-Bell": counted[n] for n in range(1, config.orders + 1)},
        **stdlib_text.compressed(held_out),
        "GPT": bits,
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(*[f"{name:24} {value:.6g}" for name, value in main(settings).items()], sep="\n")
    print(f"loss.png, sample.txt and metrics.json are in {settings.out}; the models are judged in bits per byte")
