"""A race of optimizers: over two banana-shaped valleys, and of a network on scikit-learn's digits.

python examples/optimizer_race.py    # a few minutes on two cores, most of it compilation

Every optimizer runs at ten learning rates side by side. All ten runs, from the first step to the last, are one compiled
program: ``jit`` of ``vmap`` over the learning rate of ``scan`` over the steps. The best rate counts.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import command_line
import digits
import surfaces
import torch
from torch import Tensor

import functorch_gen as fg
from functorch_gen import optim


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/optimizer_race"  # folder of the results
    optimizers: str = ""  # which, separated by commas; empty: all
    drawn: str = "sgd,nesterov,adagrad,rmsprop,adam,adabelief,lion,muon,polyak_sgd,schedule-free adam"  # of these
    surface_steps: int = 300  # on the valleys
    digits_steps: int = 300  # on the digits
    rates: int = 10  # between the two below, evenly in their logarithm
    lowest: float = 1e-4  # learning rate
    highest: float = 3.0  # learning rate
    hidden: int = 64  # width of the network
    batch_size: int = 64  # digits a step
    seed: int = 0
    backend: str = "aten"  # or inductor: faster steps, longer compilation


PLAIN = (
    "adabelief adadelta adafactor adagrad adam adamax adamw adan amsgrad lamb lars lion nadam polyak_sgd radam rmsprop "
    "sgd sign_sgd"
)
RACERS: dict[str, Callable[[Tensor], optim.GradientTransformation]] = {
    **{name: getattr(optim, name) for name in PLAIN.split()},
    "momentum": lambda rate: optim.sgd(rate, momentum=0.9),
    "nesterov": lambda rate: optim.sgd(rate, momentum=0.9, nesterov=True),
    "muon": lambda rate: optim.muon(rate, output_axis=0),
    "lookahead adam": lambda rate: optim.lookahead(optim.adam(rate), sync_period=5, slow_step_size=0.5),
    "schedule-free adam": lambda rate: optim.schedule_free(optim.adam(rate, b1=0.0), rate),
}


class Problem(NamedTuple):
    """What to minimise from where."""

    loss_fn: Callable[[Any, Any], Tensor]  # (params, batch) -> ()
    params: Any
    batches: Any  # leaves (steps, ...)


def digits_problem(config: Config, net: fg.nn.MLP) -> Problem:
    """Cross entropy of a batch; all batches of the run are drawn before it."""
    data = digits.load(digits.TRAIN)
    key_init, key_data = fg.random.split(fg.random.key(config.seed))
    batches = list(fg.data.batches(key_data, data, config.batch_size, steps=config.digits_steps))

    def loss_fn(params: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = net(params, batch["image"].flatten(1))
        return fg.losses.cross_entropy(logits, batch["label"]).mean()

    return Problem(loss_fn, net.init(key_init), fg.tree.stack(batches))


class Runs(NamedTuple):
    """A run at each learning rate."""

    loss: Tensor  # (rates, steps), before each step
    path: Tensor  # (rates, steps, 2) on a surface, (rates, steps, 0) of a network
    params: Any  # leaves (rates, ...), at the end


def sweep(
    make: Callable[[Tensor], optim.GradientTransformation], problem: Problem, rates: Tensor, backend: str
) -> Runs:
    """Runs one optimizer at all learning rates (r,) at once."""

    def run(rate: Tensor, params: Any, batches: Any) -> Runs:
        tx = make(rate)

        def step(carry: Any, batch: Any) -> tuple[Any, Any]:
            params, state = carry
            loss, grads = fg.value_and_grad(problem.loss_fn)(params, batch)
            updates, state = tx.update(grads, state, params, value=loss)  # polyak_sgd reads the value
            watched = params["p"] if "p" in params else torch.zeros(0)
            return (optim.apply_updates(params, updates), state), (loss, watched)

        (params, _), (loss, path) = fg.scan(step, (params, tx.init(params)), batches)
        return Runs(loss, path, params)

    program = fg.jit(fg.vmap(run, in_dims=(0, None, None)), backend=backend)
    return program(rates, problem.params, problem.batches)


def best_run(runs: Runs) -> int:
    """The learning rate whose last tenth has the lowest mean loss; runs that diverged come last."""
    last = runs.loss[:, -max(1, runs.loss.shape[1] // 10) :].mean(-1)
    return int(last.nan_to_num(torch.inf, torch.inf).argmin())


def race(problem: Problem, rates: Tensor, config: Config) -> dict[str, tuple[float, Runs]]:
    """Each optimizer's best learning rate and its run at that rate."""
    chosen = config.optimizers.split(",") if config.optimizers else RACERS
    found = {}
    for name in chosen:
        fg.check.check_choice("Config", "optimizers", name, RACERS)
        runs = sweep(RACERS[name], problem, rates, config.backend)
        best = best_run(runs)
        found[name] = rates[best].item(), fg.tree.map(lambda x, best=best: x[best], runs)
    return found


def drawn(config: Config, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the optimizers that are to be drawn: more than ten lines are hard to tell apart."""
    return {name: values[name] for name in config.drawn.split(",") if name in values}


def race_on_surface(name: str, config: Config, rates: Tensor, out: Path) -> dict[str, dict[str, float]]:
    """Draws the paths; returns best rates and last losses."""
    surface = surfaces.SURFACES[name]
    params, nothing = {"p": torch.tensor(surface.start)}, torch.zeros(config.surface_steps)
    found = race(Problem(lambda params, batch: surface.fun(params["p"]), params, nothing), rates, config)
    fg.plot.landscape(
        surface.fun,
        out / f"{name}.png",
        x_range=surface.x_range,
        y_range=surface.y_range,
        paths=drawn(config, {optimizer: runs.path for optimizer, (_, runs) in found.items()}),
        minimum=surface.minimum,
        title=f"{name}, {config.surface_steps} steps",
    )
    return {
        optimizer: {f"{name} rate": rate, f"{name} loss": runs.loss[-1].item()}
        for optimizer, (rate, runs) in found.items()
    }


def race_on_digits(config: Config, rates: Tensor, out: Path) -> dict[str, dict[str, float]]:
    """Draws the losses; returns best rates, last losses and test accuracies."""
    net, test = fg.nn.MLP(64, (config.hidden,), 10), digits.load(digits.TEST)
    found = race(digits_problem(config, net), rates, config)
    window = max(1, config.digits_steps // 20)
    smooth = {name: runs.loss.unfold(0, window, 1).mean(-1) for name, (_, runs) in found.items()}
    shown = drawn(config, smooth)
    fg.plot.curves(shown, out / "digits.png", title="digits", y_label=f"training loss, mean of {window} steps")
    table = {}
    for name, (rate, runs) in found.items():
        logits = net(runs.params, test["image"].flatten(1))
        table[name] = {
            "digits rate": rate,
            "digits loss": smooth[name][-1].item(),
            "digits accuracy": fg.metrics.accuracy(logits, test["label"]).item(),
        }
    return table


def put_side_by_side(files: list[Path], path: Path) -> None:
    """One picture of several, at half their size."""
    from PIL import Image

    images = [Image.open(file).convert("RGB").reduce(2) for file in files]
    sheet = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    sheet.quantize(256, dither=Image.Dither.NONE).save(path)


def main(config: Config) -> dict[str, dict[str, float]]:
    """Runs all races; writes pictures and metrics into ``config.out``; returns the table."""
    out = fg.train.check_writable(config.out)
    rates = torch.logspace(math.log10(config.lowest), math.log10(config.highest), config.rates)
    tables = [race_on_surface(name, config, rates, out) for name in surfaces.SURFACES]
    tables.append(race_on_digits(config, rates, out))
    put_side_by_side([out / f"{name}.png" for name in (*surfaces.SURFACES, "digits")], out / "race.png")
    table = {name: {key: value for part in tables for key, value in part[name].items()} for name in tables[0]}
    (out / "metrics.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"race.png, the pictures it is made of and metrics.json are in {settings.out}")
