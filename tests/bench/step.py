"""The demo's training step against the same U-Net as an ``nn.Module``, each in its best form. ``make bench``.

A step draws times, noise and dropped labels, takes the gradient, clips it, and updates AdamW and the moving average.
Equal work is asserted: with the same draws the losses of both agree over five steps. Writes docs/benchmarks.md and
.json.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusion_digits as demo
import digits
import torch
from torch import Tensor, nn

import functorch_gen as fg
from functorch_gen.diffusion import LogNormalTime
from functorch_gen.models import drop_labels
from tests.bench.timing import busy_processors, interleave
from tests.bench.unet_module import UNetModule

DOCS = Path(__file__).parents[2] / "docs"
DECAY, LABEL_DROP = 0.999, 0.1


def functional_step(config: demo.Config) -> tuple[Callable[[Any], Tensor], Any]:
    """The demo's step, jitted, with its state held here; and the initial parameters."""
    model = demo.make_model(config, digits.load(digits.TRAIN))
    params = model.net.init(fg.random.key(0))
    tx, average = demo.make_optimizer(config), fg.ema.constant(DECAY)
    state = [fg.step.init_state(params, tx, fg.random.key(1), ema=average)]
    step = fg.jit(
        fg.step.make_step(demo.make_loss(config, model), tx, ema=average), donate_argnums=0, backend=config.backend
    )

    def run(batch: Any) -> Tensor:
        state[0], metrics = step(state[0], batch)
        return metrics["loss"]

    return run, params


class ModuleStep:
    """The same step as it is written with ``torch.nn`` and ``torch.optim``: fused AdamW, foreach clipping and EMA."""

    def __init__(self, config: demo.Config, params: Any, *, compiled: bool, channels_last: bool):
        model = demo.make_model(config, digits.load(digits.TRAIN))
        net = model.net
        self.model, self.schedule = model, demo_schedule(config)
        self.module = UNetModule(
            net.in_channels, net.base_channels, net.channel_mults, net.num_blocks, net.attention_levels, net.num_heads,
            net.num_classes, time_scale=net.time_scale,
        )  # fmt: skip
        self.module.load_state_dict(fg.tree.names(params), strict=True)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.module.to(memory_format=self.layout)
        self.average = [p.detach().clone() for p in self.module.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.module.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4, fused=True
        )
        self.loss = torch.compile(self._loss, fullgraph=True) if compiled else self._loss
        self.count = 0

    def _loss(self, x: Tensor, label: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        """Karras et al. 2022, table 1 and eq. 8."""
        s, d = sigma[:, None, None, None], self.model.prediction.sigma_data
        norm = (s**2 + d**2) ** 0.5
        x_t = x + s * noise
        output = self.module((x_t / norm).contiguous(memory_format=self.layout), sigma.log() / 4, label)
        x_hat = d**2 / norm**2 * x_t + s * d / norm * output
        weight = (sigma**2 + d**2) / (sigma * d) ** 2
        return (weight * (x_hat - x).square().mean((1, 2, 3))).mean()

    def draw(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Labels, noise levels and noise by torch's generator."""
        b, null = len(batch["label"]), self.model.net.num_classes or 0
        label = torch.where(torch.rand(b) < LABEL_DROP, null, batch["label"])
        sigma = (-1.2 + 1.2 * torch.randn(b)).exp().clamp(0.002, 80)
        return label, sigma, torch.randn(batch["image"].shape)

    def __call__(self, batch: Any, drawn: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """One step."""
        for group in self.optimizer.param_groups:
            group["lr"] = float(self.schedule(self.count))
        self.count += 1
        label, sigma, noise = drawn or self.draw(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(batch["image"], label, sigma, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in self.module.parameters()], 1 - DECAY)
        return loss.detach()


def demo_schedule(config: demo.Config) -> Callable[[int], Tensor]:
    """The demo's learning rate."""
    rates = demo.make_schedule(config)
    return lambda step: rates(torch.tensor(step))


def same_draws(model: demo.Model, batch: Any, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the functional step draws in step ``step``."""
    key_label, key_loss = fg.random.split(fg.random.fold_in(fg.random.key(1), step))
    label = drop_labels(key_label, batch["label"], LABEL_DROP, model.net.num_classes or 0)
    key_time, key_noise = fg.random.split(key_loss)
    sigma = model.schedule.sigma(LogNormalTime(model.schedule)(key_time, (len(label),)))
    return label, sigma, fg.random.normal(key_noise, tuple(batch["image"].shape))


def assert_equal_work(run: Callable[[Any], Tensor], module: ModuleStep, batch: Any) -> list[float]:
    """Losses of both agree over five steps from the same state and draws."""
    gaps = []
    for i in range(5):
        ours, theirs = float(run(batch)), float(module(batch, same_draws(module.model, batch, i)))
        gaps.append(abs(ours - theirs) / theirs)
    if max(gaps) > 1e-3:
        raise RuntimeError(f"bench: expected equal losses, got relative differences {gaps}")
    return gaps


def measure(config: demo.Config, rounds: int) -> dict[str, Any]:
    """Milliseconds of every variant, first-call seconds, and the ratio to the best module."""
    torch.manual_seed(0)
    data = digits.load(digits.TRAIN)
    batch = {name: x[: config.batch_size] for name, x in data.items()}
    functional, params = functional_step(config)
    modules = {
        f"nn.Module {'compiled' if compiled else 'eager'}{' channels-last' if last else ''}": ModuleStep(
            config, params, compiled=compiled, channels_last=last
        )
        for compiled in ((False, True) if config.backend == "inductor" else (False,))
        for last in (False, True)
    }
    gaps = assert_equal_work(functional, modules["nn.Module eager"], batch)
    variants: dict[str, Callable[[], object]] = {"fg.jit": lambda: functional(batch)}
    variants |= {name: (lambda step=step: step(batch)) for name, step in modules.items()}
    first = {}
    for name, run in variants.items():
        begin = time.perf_counter()
        run()
        first[name] = time.perf_counter() - begin
    times = interleave(variants, rounds)
    best = min((name for name in times if name != "fg.jit"), key=lambda name: times[name].median)
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "loss_difference_over_5_steps": max(gaps),
        "milliseconds": {name: {"median": 1e3 * t.median, "minimum": 1e3 * t.minimum} for name, t in times.items()},
        "first_call_seconds": first,
        "best_module": best,
        "ratio_to_best_module": times["fg.jit"].median / times[best].median,
    }


def page(result: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    best = result["milliseconds"][result["best_module"]]["median"]
    rows = [
        f"| {name} | {t['median']:.1f} | {t['minimum']:.1f} | {t['median'] / best:.2f} |"
        for name, t in result["milliseconds"].items()
    ]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            f"Made by `make bench` ({result['machine']}, torch {result['torch']}).",
            "One training step of the demo: U-Net of 533k parameters, batch 128 of 1x8x8, gradient + clipping by",
            "global norm + AdamW + moving average. Variants take turns in one process; the module's rows have",
            "fused AdamW and foreach clipping and averages.",
            f"Losses agree to {result['loss_difference_over_5_steps']:.0e} over five steps from equal draws.",
            "",
            "| variant | median ms | minimum ms | ratio to the best module |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60, help="timed calls of each variant (default: 60)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json")
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args()
    busy = busy_processors()
    if busy > 0.5 and not options.busy:
        sys.exit(f"bench: expected an idle machine, got {busy:.1f} busy processors (--busy to measure all the same)")
    result = measure(demo.Config(steps=10_000), options.rounds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "benchmarks.json").write_text(json.dumps(result, indent=2) + "\n")
    (options.out / "benchmarks.md").write_text(page(result))
    sys.stdout.write(page(result))


if __name__ == "__main__":
    main()
