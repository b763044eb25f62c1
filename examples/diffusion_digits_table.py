"""The README's tables: what EMA, guidance, the sampler and remat change. ``make table``, about ten minutes.

Trains the demo's model once, draws 1,000 samples in twelve ways, and times a step with and without remat.
"""

import dataclasses
import re
import time
from pathlib import Path
from statistics import median
from typing import Any

import diffusion_digits as demo
import digits
import torch
from torch.profiler import ProfilerActivity, profile

import functorch_gen as fg

README = Path(__file__).parents[1] / "README.md"


def sample_rows(config: demo.Config) -> list[str]:
    """One line for each of EMA or not, guidance and sampler."""
    data = demo.load_data(config)
    model = demo.make_model(config, data)
    key_train, key_sample = fg.random.split(fg.random.key(config.seed))
    state, _ = demo.train(key_train, config, model, data)
    sample = demo.make_sampler(model, (1, 8, 8))
    label = torch.arange(10).repeat_interleave(config.samples_per_class)
    rows = []
    for average, params in (("yes", state.ema.average), ("no", state.params)):
        for name, steps, ddim in (("Heun", 20, False), ("DDIM", 50, True)):
            for guidance in (1.0, 1.5, 2.0):
                begin = time.perf_counter()
                images = sample(key_sample, params, label, steps=steps, guidance=guidance, ddim=ddim)
                seconds = time.perf_counter() - begin
                m = digits.judge(images, label)
                cells = [average, f"{steps} {name}", f"{guidance}", f"{100 * m['svc_accuracy']:.1f} %"]
                cells += [f"{m['frechet_ratio']:.2f}", f"{m['nearest_ratio']:.2f}", f"{m['forest_accuracy']:.3f}"]
                rows.append(row([*cells, f"{seconds:.1f} s"]))
    real = digits.judge(data["image"], data["label"])["forest_accuracy"]
    return [*rows, row(["real digits", "", "", "", "1.00", "", f"{real:.3f}", ""])]


def row(cells: list[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def remat_rows(config: demo.Config, calls: int = 30) -> list[str]:
    """Time of a compiled step and the peak of the memory it allocates, with and without remat, in turns."""
    data = demo.load_data(config)
    batch = {name: x[: config.batch_size] for name, x in data.items()}
    runs: dict[bool, Any] = {
        remat: _step(dataclasses.replace(config, remat=remat), data, batch) for remat in (False, True)
    }
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(calls):
        for remat, run in runs.items():
            begin = time.perf_counter()
            run()
            seconds[remat].append(time.perf_counter() - begin)
    return [
        row(["yes" if remat else "no", f"{peak_bytes(run) / 1e6:.0f} MB", f"{1e3 * median(seconds[remat]):.0f} ms"])
        for remat, run in runs.items()
    ]


def _step(config: demo.Config, data: Any, batch: Any) -> Any:
    model, tx, average = demo.make_model(config, data), demo.make_optimizer(config), fg.ema.constant(config.ema_decay)
    held = [fg.step.init_state(model.net.init(fg.random.key(0)), tx, fg.random.key(1), ema=average)]
    step = fg.jit(
        fg.step.make_step(demo.make_loss(config, model), tx, average), donate_argnums=0, backend=config.backend
    )

    def run() -> None:
        held[0], _ = step(held[0], batch)

    run()
    return run


def peak_bytes(run: Any) -> int:
    """Most memory that ``run`` holds at once beyond what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def replace(text: str, name: str, lines: list[str]) -> str:
    """Puts ``lines`` between the page's markers of that name."""
    marked = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    return re.sub(marked, lambda m: m[1] + "\n".join(lines) + "\n" + m[2], text, flags=re.DOTALL)


def main(config: demo.Config) -> None:
    """Measures and writes both tables into README.md."""
    samples = [row(["EMA", "steps", "guidance", "SVC", "Frechet", "nearest", "forest", "time"]), "|---" * 8 + "|"]
    samples += sample_rows(config)
    remat = [row(["remat", "peak memory of a step", "median time"]), "|---" * 3 + "|", *remat_rows(config)]
    README.write_text(replace(replace(README.read_text(), "samples", samples), "remat", remat))


if __name__ == "__main__":
    main(demo.Config())
