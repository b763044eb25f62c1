"""Fine-tuning: a network that knows the digits 0 to 6 learns 7, 8 and 9 from ten examples of each.

python examples/fine_tuning.py    # a minute on two cores

What is trained is what is differentiated: ``tree.partition`` splits the parameters by name, the loss merges them again.
Each way is tried on many draws of the thirty examples, all of them side by side in one program (``vmap``).
"""

import json
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import command_line
import digits
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import optim

OLD, NEW = range(7), range(7, 10)


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/fine_tuning"  # folder of the results
    shots: int = 10  # examples of each new class
    draws: int = 20  # of these examples
    pretraining: int = 600  # steps on the old classes
    steps: int = 100  # on the new ones, each with all examples
    width: int = 32  # channels of the first of two blocks
    seed: int = 0
    backend: str = "inductor"  # of pretraining; or aten: no generated code


class Way(NamedTuple):
    """A way to learn the new classes."""

    train: str | list[str]  # globs: the parameters that are differentiated
    tx: optim.GradientTransformation
    pretrained: bool = True  # begins with what was learned of the old classes
    rank: int = 0  # of a low-rank update of each convolution (LoRA); 0: none


WAYS = {
    "head, by tree.partition": Way("head.*", optim.adam(3e-2)),
    "head, by optim.freeze": Way("*", optim.chain(optim.adam(3e-2), optim.freeze("block*"))),
    "head and norms": Way(["head.*", "*.norm.*"], optim.adam(1e-2)),
    "head and LoRA": Way(["head.*", "*.lora_?"], optim.adam(1e-2), rank=2),
    "everything": Way("*", optim.adam(3e-3)),
    "everything, from scratch": Way("*", optim.adam(1e-2), pretrained=False),
}


def choose(data: dict[str, Tensor], classes: range) -> dict[str, Tensor]:
    """The examples of some classes, with labels from 0."""
    chosen = (data["label"] >= classes.start) & (data["label"] < classes.stop)
    return {"image": data["image"][chosen], "label": data["label"][chosen] - classes.start}


def make_net(config: Config, classes: range) -> fg.models.CNN:
    """Two blocks, which extract, and a head."""
    return fg.models.CNN(1, len(classes), channels=(config.width, 2 * config.width))


def pretrain(config: Config) -> tuple[Any, Any, float]:
    """-> (parameters, running statistics, test accuracy) of a network of the old classes."""
    net, data, test = make_net(config, OLD), *(choose(digits.load(part), OLD) for part in (digits.TRAIN, digits.TEST))

    def loss_fn(params: Any, state: Any, key: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Any]:
        x = fg.data.random_affine(key, batch["image"], degrees=6, shear=6, translate=0.05, scale=(0.9, 1.1), fill=-1)
        logits, state = net(params, state, x, train=True)
        return fg.losses.cross_entropy(logits, batch["label"]).mean(), state

    key_init, key_run, key_data = fg.random.split(fg.random.key(config.seed), 3)
    tx = optim.adamw(optim.cosine_decay_schedule(3e-3, config.pretraining), weight_decay=0.05)
    step = fg.jit(fg.step.make_step(loss_fn, tx, stateful=True), donate_argnums=0, backend=config.backend)
    state = fg.step.init_state(net.init(key_init), tx, key_run, state=net.init_state())
    batches = fg.data.batches(key_data, data, 128)
    state, _ = fg.train.fit(step, state, batches, steps=config.pretraining, progress=False)
    return state.params, state.state, accuracy(net, state.params, state.state, test).item()


def accuracy(net: Any, params: Any, state: Any, data: dict[str, Tensor]) -> Tensor:
    """Share of right answers: ()."""
    logits, _ = net(params, state, data["image"], train=False)
    return fg.metrics.accuracy(logits, data["label"])


def draw_examples(key: Tensor, by_class: list[Tensor], shots: int) -> dict[str, Tensor]:
    """``shots`` examples of each class, from images (n, 1, 8, 8) of each."""
    keys = fg.random.split(key, len(by_class))
    drawn = [x[fg.random.permutation(k, len(x))[:shots]] for k, x in zip(keys, by_class, strict=True)]
    return {"image": torch.cat(drawn), "label": torch.arange(len(by_class)).repeat_interleave(shots)}


class Adapted(NamedTuple):
    """A network whose convolutions are reached through :class:`functorch_gen.nn.LoRA`."""

    net: fg.models.CNN
    rank: int  # 0: it is as it was

    @property
    def adapters(self) -> dict[str, fg.nn.LoRA]:
        """By the name of the block."""
        blocks = {name: block for name, block in self.net.parts.items() if isinstance(block, fg.models.ConvBlock)}
        return {name: fg.nn.LoRA(block.parts["conv"], self.rank) for name, block in blocks.items() if self.rank}

    def extend(self, key: Tensor, params: Any) -> Any:
        """The network's parameters, and those of the adapters."""
        new = {name: {"conv": a.init(key, params[name]["conv"])} for name, a in self.adapters.items()}
        return {**params, **{name: {**params[name], **part} for name, part in new.items()}}

    def __call__(self, params: Any, state: Any, x: Tensor, *, train: bool) -> tuple[Tensor, Any]:
        """The logits and the new state."""
        plain = {name: {**params[name], "conv": a.merge(params[name]["conv"])} for name, a in self.adapters.items()}
        return self.net({**params, **plain}, state, x, train=train)


def tune(way: Way, net: Adapted, params: Any, state: Any, data: dict[str, Tensor], steps: int) -> Any:
    """The parameters and statistics after ``steps`` steps on all of the data."""
    trained, frozen = fg.tree.partition(params, way.train)

    def loss_fn(trained: Any, state: Any) -> tuple[Tensor, Any]:
        logits, new = net(fg.tree.merge(trained, frozen), state, data["image"], train=not way.pretrained)
        return fg.losses.cross_entropy(logits, data["label"]).mean(), new

    def step(carry: Any, _: None) -> tuple[Any, None]:
        trained, state, opt_state = carry
        grads, state = fg.grad(loss_fn, has_aux=True)(trained, state)
        updates, opt_state = way.tx.update(grads, opt_state, trained)
        return (optim.apply_updates(trained, updates), state, opt_state), None

    (trained, state, _), _ = fg.scan(step, (trained, state, way.tx.init(trained)), length=steps)
    return fg.tree.merge(trained, frozen), state


def try_way(way: Way, config: Config, pretrained: Any, statistics: Any) -> dict[str, float]:
    """Test accuracy on the new classes over many draws of the examples."""
    plain, data, test = make_net(config, NEW), digits.load(digits.TRAIN), choose(digits.load(digits.TEST), NEW)
    by_class = [choose(data, range(i, i + 1))["image"] for i in NEW]
    net = Adapted(plain, way.rank)

    def begin(key: Tensor) -> Any:
        fresh = plain.init(key)
        return net.extend(key, {**pretrained, "head": fresh["head"]} if way.pretrained else fresh)

    def one(key: Tensor) -> Tensor:
        key_init, key_data = fg.random.split(key)
        state = statistics if way.pretrained else plain.init_state()
        examples = draw_examples(key_data, by_class, config.shots)
        params, state = tune(way, net, begin(key_init), state, examples, config.steps)
        return accuracy(net, params, state, test)

    keys, started = fg.random.split(fg.random.key(config.seed + 1), config.draws), time.perf_counter()
    found = fg.jit(fg.vmap(one), backend="aten")(keys)
    return {
        "parameters": fg.tree.size(fg.tree.partition(begin(keys[0]), way.train)[0]),
        "test accuracy": found.mean().item(),
        "worst draw": found.min().item(),
        "seconds": time.perf_counter() - started,
    }


def main(config: Config) -> dict[str, dict[str, float]]:
    """Pretrains, then tries each way; returns the table."""
    out = fg.train.check_writable(config.out)
    params, state, old = pretrain(config)
    table = {"pretraining, old classes": {"parameters": fg.tree.size(params), "test accuracy": old}}
    table |= {name: try_way(way, config, params, state) for name, way in WAYS.items()}
    (out / "metrics.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"metrics.json is in {settings.out}")
