"""Three classifiers of scikit-learn's 8x8 digits: an MLP, a CNN with batch normalisation, an LSTM that reads rows.

python examples/digits_classifiers.py    # a minute on two cores; a table, confusion matrices, gradient norms

All are trained on images 0 to 1349 and tested on the rest, which other people wrote. Against that difference help
small random rotations, shifts and scalings, dropout, label smoothing, and an average of the parameters.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import digits
from einops import rearrange
from torch import Tensor

import functorch_gen as fg
from functorch_gen.losses import cross_entropy
from functorch_gen.nn import LSTM, MLP, Bound, Dropout, Linear, Sequential, init_parts


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/digits_classifiers"  # folder of the results
    models: str = "mlp,cnn,lstm"  # which to train
    steps: int = 1500  # training steps
    batch_size: int = 128  # examples a step
    learning_rate: float = 3e-3  # highest; warm-up, then cosine decay
    weight_decay: float = 0.05  # of the weights, not the biases
    smoothing: float = 0.1  # share of the label that is spread over all classes
    dropout: float = 0.2
    degrees: float = 6.0  # of random rotation and shear, at most
    shift: float = 0.05  # of an image's size, at most
    zoom: float = 0.1  # smaller or larger, at most
    validate: bool = False  # train on 0:1000 and test on 1000:1350, to choose the numbers above
    seed: int = 0
    backend: str = "inductor"  # or aten: no generated code

    def __post_init__(self) -> None:
        for name in self.models.split(","):
            fg.check.check_choice("Config", "models", name, ("mlp", "cnn", "lstm"))


@dataclass(frozen=True)
class RowLSTM:
    """Reads an image row by row, in both directions: (b, 1, h, w) -> logits (b, 10)."""

    width: int = 8
    hidden_size: int = 64
    dropout: float = 0.0

    @property
    def parts(self) -> dict[str, Any]:
        """The layers by name."""
        return {
            "lstm": LSTM(self.width, self.hidden_size, bidirectional=True),
            "dropout": Dropout(self.dropout),
            "head": Linear(2 * self.hidden_size, 10),
        }

    def init(self, key: Tensor) -> Any:
        """Parameters of each layer under its name."""
        return init_parts(self.parts, key)

    def __call__(self, params: Any, x: Tensor, *, key: Tensor | None = None) -> Tensor:
        """The head reads the last state of each direction."""
        f = Bound(self.parts, params, key=key)
        _, (h, _) = f.lstm(rearrange(x, "b 1 h w -> b h w"))
        return f.head(f.dropout(rearrange(h, "directions b d -> b (directions d)")))


class Classifier(NamedTuple):
    """``run(params, state, x, *, train, key) -> (logits, state)``, whether the network has state or not."""

    init: Callable[[Tensor], Any]
    state: Any
    run: Callable[..., tuple[Tensor, Any]]


def stateless(net: Any) -> Classifier:
    """A network without state."""

    def run(params: Any, state: Any, x: Tensor, *, train: bool, key: Tensor | None = None) -> tuple[Tensor, Any]:
        return net(params, x, key=key), state

    return Classifier(net.init, {}, run)


def make_classifiers(config: Config) -> dict[str, Classifier]:
    """The three, by name."""
    dropout = config.dropout
    cnn = fg.models.CNN(1, 10, channels=(32, 64), dropout=dropout)
    return {
        "mlp": stateless(Sequential(lambda x: x.flatten(1), MLP(64, (128, 128), 10, dropout=dropout))),
        "cnn": Classifier(cnn.init, cnn.init_state(), cnn),
        "lstm": stateless(RowLSTM(dropout=dropout)),
    }


def make_loss(config: Config, model: Classifier) -> Callable[..., tuple[Tensor, Any]]:
    """loss_fn(params, state, key, batch) -> (loss, state): cross entropy of images that are a little distorted."""
    scale = 1 - config.zoom, 1 + config.zoom
    options: Any = {"degrees": config.degrees, "shear": config.degrees, "translate": config.shift, "scale": scale}
    augment = partial(fg.data.random_affine, fill=-1.0, **options)

    def loss_fn(params: Any, state: Any, key: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        key_image, key_model = fg.random.split(key)
        x = augment(key_image, batch["image"])
        logits, state = model.run(params, state, x, train=True, key=key_model)
        return cross_entropy(logits, batch["label"], label_smoothing=config.smoothing).mean(), state

    return loss_fn


def train(config: Config, model: Classifier, data: dict[str, Tensor]) -> tuple[fg.step.TrainState, Any]:
    """-> (train_state, history)."""
    warmup = min(100, config.steps // 2)
    rate = fg.optim.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, config.steps)
    adamw = fg.optim.adamw(rate, weight_decay=config.weight_decay, mask="*.weight*")
    tx, average = fg.optim.chain(fg.optim.clip_by_global_norm(1.0), adamw), fg.ema.warmup(0.99)
    key_init, key_run, key_data = fg.random.split(fg.random.key(config.seed), 3)
    pure_step = fg.step.make_step(make_loss(config, model), tx, average, stateful=True)
    step = fg.jit(pure_step, donate_argnums=0, backend=config.backend)
    state = fg.step.init_state(model.init(key_init), tx, key_run, state=model.state, ema=average)
    batches = fg.data.batches(key_data, data, config.batch_size)
    return fg.train.fit(step, state, batches, steps=config.steps, progress=False)


def judge(config: Config, name: str, data: dict[str, Tensor], test: dict[str, Tensor]) -> dict[str, float]:
    """Trains one classifier, draws its confusions and gradients, and returns what the table says of it."""
    model, out = make_classifiers(config)[name], Path(config.out)
    trained, history = train(config, model, data)
    logits, _ = model.run(trained.ema.average, trained.state, test["image"], train=False)
    counts = fg.metrics.confusion_matrix(test["label"], logits.argmax(-1), 10)
    accuracy = fg.metrics.accuracy(logits, test["label"]).item()
    fg.plot.confusion(counts, out / f"confusion_{name}.png", title=f"{name}: {100 * accuracy:.1f} %")
    params = model.init(fg.random.split(fg.random.key(config.seed), 3)[0])
    grads, _ = fg.grad(make_loss(config, model), has_aux=True)(params, model.state, fg.random.key(0), data)
    fg.plot.gradient_flow(grads, out / f"gradient_flow_{name}.png", title=f"{name}: before the first step")
    return {
        "accuracy": accuracy,
        "parameters": fg.tree.size(params),
        "seconds of the first step": history["seconds"][0],
        "seconds of the others": history["seconds"][-1] - history["seconds"][0],
    }


def main(config: Config) -> dict[str, dict[str, float]]:
    """Trains the classifiers; writes pictures and metrics into ``config.out``; returns the table."""
    out = fg.train.check_writable(config.out)
    parts = (slice(0, 1000), slice(1000, 1350)) if config.validate else (digits.TRAIN, digits.TEST)
    data, test = (digits.load(part) for part in parts)
    table = {name: judge(config, name, data, test) for name in config.models.split(",")}
    (out / "metrics.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"confusion and gradient-flow pictures and metrics.json are in {settings.out}")
