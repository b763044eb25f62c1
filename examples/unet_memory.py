"""The memory of a U-Net's training step, with and without remat: predicted, measured, and as it rises and falls.

python examples/unet_memory.py    # two minutes on two cores

``lower(...).cost()`` predicts the peak without compiling; the profiler's record of every allocation tells what it is.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import command_line
import torch
from torch.profiler import ProfilerActivity, profile

import functorch_gen as fg


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    out: str = "runs/unet_memory"  # folder for pictures and metrics
    side: int = 32  # height and width of the images
    batch_sizes: str = "4,8,16"  # at the first width; compiled and measured
    widths: str = "32,64,96"  # base channels, at the first batch size; the others are predicted alone
    num_blocks: int = 2  # residual blocks a level
    calls: int = 5  # timed steps
    seed: int = 0  # of everything
    backend: str = "inductor"  # or aten: no code generation

    def __post_init__(self) -> None:
        fg.check.check_positive("Config", side=self.side, num_blocks=self.num_blocks, calls=self.calls)
        for name in ("batch_sizes", "widths"):
            fg.check.check_positive("Config", **{name: min(numbers(getattr(self, name)))})


def numbers(text: str) -> list[int]:
    """Those of a list with commas."""
    return [int(part) for part in text.split(",")]


class Problem(NamedTuple):
    """A compiled training step, the state before it and a batch."""

    step: Any
    state: fg.step.TrainState
    batch: dict[str, torch.Tensor]

    @property
    def predicted(self) -> int:
        """Bytes at the fullest moment of a step, arguments included."""
        return self.step.lower(self.state, self.batch).cost().peak


def problem(config: Config, batch_size: int, width: int, *, remat: bool) -> Problem:
    """Flow matching of noise by a U-Net of two levels, with Adam: what it learns does not matter here."""
    net = fg.models.UNet(3, width, (1, 2), config.num_blocks, attention_levels=(1,), channels_last=True, remat=remat)
    key_init, key_run, key_image, key_noise = fg.random.split(fg.random.key(config.seed), 4)
    shape = (batch_size, 3, config.side, config.side)
    batch = {
        "image": fg.random.normal(key_image, shape),
        "noise": fg.random.normal(key_noise, shape),
        "t": torch.linspace(0, 1, batch_size),
    }

    def loss_fn(params: Any, key: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x_t = fg.noise.mix(fg.noise.FlowMatching(), batch["image"], batch["noise"], batch["t"])
        return (net(params, x_t, batch["t"]) - (batch["noise"] - batch["image"])).square().mean()

    tx = fg.optim.adam(1e-3)
    step = fg.jit(fg.step.make_step(loss_fn, tx), donate_argnums=0, backend=config.backend)
    return Problem(step, fg.step.init_state(net.init(key_init), tx, key_run), batch)


def live_bytes(run: Callable[[], Any]) -> list[int]:
    """What ``run`` holds beyond what was there before, after each of its allocations and releases."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        run()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    return list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def measure(config: Config, batch_size: int, width: int) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """A row of the table, and the live bytes (arguments included) over a step with and without remat."""
    row, lives, runs = {}, {}, {}
    for name, remat in (("without", False), ("with", True)):
        made = problem(config, batch_size, width, remat=remat)
        held, arguments = [made.state], fg.tree.nbytes((made.state, made.batch))

        def run(made: Problem = made, held: list[Any] = held) -> None:
            held[0], _ = made.step(held[0], made.batch)

        row[f"predicted MB, {name}"] = made.predicted / 1e6
        run()  # compiles
        lives[name] = [arguments + n for n in live_bytes(run)]
        row[f"measured MB, {name}"] = max(lives[name]) / 1e6
        runs[name] = run
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.calls):  # in turns
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return row | {f"ms, {name}": 1e3 * statistics.median(s) for name, s in seconds.items()}, lives


def predict(config: Config, batch_size: int, width: int) -> dict[str, float]:
    """A row without what needs a compiler."""
    kinds = {"without": False, "with": True}
    made = {name: problem(config, batch_size, width, remat=remat) for name, remat in kinds.items()}
    return {f"predicted MB, {name}": one.predicted / 1e6 for name, one in made.items()}


def draw(rows: dict[str, dict[str, float]], lives: dict[str, list[int]], title: str, path: Any) -> None:
    """Writes the live memory over one step, and the peaks of all rows."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 3.6), dpi=100, layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    for name, color, shift in (("without", "#1f4e79", -0.2), ("with", "#d1495b", 0.2)):
        share = torch.linspace(0, 1, len(lives[name]))
        curve.plot(share.numpy(), [n / 1e6 for n in lives[name]], color=color, label=f"{name} remat")
        places = [i + shift for i in range(len(rows))]
        bars.bar(places, [row[f"predicted MB, {name}"] for row in rows.values()], 0.4, color=color, alpha=0.6)
        measured = [row.get(f"measured MB, {name}", float("nan")) for row in rows.values()]
        bars.plot(places, measured, "_", color="black", markersize=16, label="measured" if shift > 0 else None)
    curve.set(title=title, xlabel="share of the step's allocations", ylabel="live MB", ylim=(0, None))
    bars.set(title="peak of a step, predicted", ylabel="MB")
    bars.set_xticks(range(len(rows)), list(rows), rotation=30, ha="right")
    curve.legend(frameon=False)
    bars.legend(frameon=False)
    figure.savefig(path)


def main(config: Config) -> dict[str, dict[str, float]]:
    """Measures, writes a picture and metrics into ``config.out``; returns the metrics."""
    out = fg.train.check_writable(config.out)
    (first_batch, *_), (first_width, *other_widths) = batches, widths = (
        numbers(config.batch_sizes),
        numbers(config.widths),
    )
    rows, lives = {}, {}
    for batch_size in batches:
        rows[f"batch {batch_size}, width {first_width}"], lives = measure(config, batch_size, first_width)
    for width in other_widths:
        rows[f"batch {first_batch}, width {width}"] = predict(config, first_batch, width)
    title = f"one step, batch {batches[-1]}, width {widths[0]}"
    draw(rows, lives, title, out / "memory.png")
    (out / "metrics.json").write_text(json.dumps(rows, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    settings = command_line.parse(Config, __doc__)
    print(command_line.table(main(settings)))
    print(f"memory.png and metrics.json are in {settings.out}")
