"""An LSTM that reads a line, byte by byte, and tells whether it is prose or code.

python examples/text_classifier.py    # about a minute on two cores

Prose is the text of docstrings and comments in Python's standard library, code are its other lines. Training and test
lines come from different files, no line is in both, and both classes are equally frequent.
"""

import io
import json
import sysconfig
import tokenize
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
import torch
from torch import Tensor

import functorch_gen as fg


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/text_classifier"  # folder of the results
    steps: int = 500  # training steps
    batch_size: int = 256  # lines a step
    length: int = 64  # bytes of a line that are read; the rest is cut off
    hidden: int = 32  # size of the LSTM's state
    embed: int = 16  # size of a byte's embedding
    learning_rate: float = 1e-2  # highest; warm-up, then cosine decay
    files: int = 150  # of the standard library
    seed: int = 0
    backend: str = "inductor"  # or aten: no generated code


SKIPPED = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)


def prose_and_code(source: str) -> tuple[list[str], list[str]]:
    """The lines of docstrings and comments without their marks, and the lines of code without strings over lines.

    >>> prose_and_code('x = 1  # one\\ny = 2\\n# A comment\\ndef f():\\n    "A docstring."\\n')
    (['one', 'A comment', 'A docstring.'], ['y = 2', 'def f():'])
    """
    rows, prose, code, mixed = source.splitlines(), [], set(), set()
    begins = True  # a statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        (first, _), (last, _) = token.start, token.end
        docstring = token.type == tokenize.STRING and begins
        if docstring or token.type == tokenize.COMMENT:
            text = token.string.strip("rRuUbB").strip("\"'") if docstring else token.string.lstrip("#!:")
            prose += [line.strip() for line in text.splitlines() if ">>>" not in line]
        if docstring or token.type == tokenize.COMMENT or first != last:
            mixed |= set(range(first, last + 1))
        elif token.type not in SKIPPED:
            code.add(first)
        begins = token.type == tokenize.NEWLINE or (begins and token.type in SKIPPED)
    return prose, [rows[i - 1].strip() for i in sorted(code - mixed)]


def load_data(config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Training and test lines: every fifth file is for the test."""
    seen: set[str] = set()
    found: list[tuple[list[str], list[str]]] = [([], []), ([], [])]  # (prose, code) for training and test
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: zlib.crc32(file.name.encode()))
    for i, file in enumerate(files[: config.files]):
        for kind, lines in zip(found[i % 5 == 0], prose_and_code(file.read_text("utf-8")), strict=True):
            new = [line for line in dict.fromkeys(lines) if len(line) >= 8 and line not in seen]
            kind += new
            seen.update(new)
    (prose, code), (test_prose, test_code) = found
    return encode(prose, code, config.length), encode(test_prose, test_code, config.length)


def encode(prose: list[str], code: list[str], length: int) -> dict[str, Tensor]:
    """Bytes (n, length), how many of them count (n,), and labels (n,), as many 0 (prose) as 1 (code)."""
    n = min(len(prose), len(code))
    spread = [lines[i * len(lines) // n] for lines in (prose, code) for i in range(n)]
    cut = [line.encode()[:length] for line in spread]
    return {
        "bytes": torch.tensor([list(line.ljust(length, b"\0")) for line in cut]),
        "length": torch.tensor([len(line) for line in cut]),
        "label": torch.arange(2).repeat_interleave(n),
    }


def train(config: Config, net: fg.models.LSTMModel, data: dict[str, Tensor]) -> tuple[Any, Any]:
    """-> (parameters, history)."""
    warmup = min(20, config.steps // 2)
    rate = fg.optim.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    tx = fg.optim.chain(fg.optim.clip_by_global_norm(1.0), fg.optim.adamw(rate, weight_decay=1e-2))

    def loss_fn(params: Any, key: Tensor, batch: dict[str, Tensor]) -> Tensor:
        logits = net(params, batch["bytes"], lengths=batch["length"], key=key)
        return fg.losses.cross_entropy(logits, batch["label"]).mean()

    key_init, key_run, key_data = fg.random.split(fg.random.key(config.seed), 3)
    step = fg.jit(fg.step.make_step(loss_fn, tx), donate_argnums=0, backend=config.backend)
    state = fg.step.init_state(net.init(key_init), tx, key_run)
    batches = fg.data.batches(key_data, data, config.batch_size)
    state, history = fg.train.fit(step, state, batches, steps=config.steps, progress=False)
    return state.params, history


def main(config: Config) -> dict[str, Any]:
    """Trains and tests; writes a confusion matrix, the loss and metrics; returns the metrics."""
    out = fg.train.check_writable(config.out)
    data, test = load_data(config)
    net = fg.models.LSTMModel(256, 2, embed_dim=config.embed, hidden_size=config.hidden, dropout=0.1)
    params, history = train(config, net, data)
    logits = net(params, test["bytes"], lengths=test["length"])
    counts = fg.metrics.confusion_matrix(test["label"], logits.argmax(-1), 2)
    metrics = {
        "training lines": len(data["label"]),
        "test lines": len(test["label"]),
        "accuracy": fg.metrics.accuracy(logits, test["label"]).item(),
        "seconds of the first step": history["seconds"][0],
        "seconds of the others": history["seconds"][-1] - history["seconds"][0],
    }
    fg.plot.confusion(counts, out / "confusion.png", labels=["prose", "code"])
    fg.plot.curve(history["loss"], out / "loss.png")
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    for name, value in main(settings).items():
        print(f"{name:26} {value:.4g}")
    print(f"confusion.png, loss.png and metrics.json are in {settings.out}")
