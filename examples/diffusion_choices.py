"""The table of docs/diffusion.md: the same U-Net, steps and sampler under other schedules, predictions and weightings.

python examples/diffusion_choices.py  # the demo, once for each row; about ten minutes on two cores
"""

from dataclasses import replace
from pathlib import Path

import diffusion_digits as demo
import diffusion_digits_table as table

PAGE = Path(__file__).parents[1] / "docs" / "diffusion.md"

CHOICES = [
    ("EDM", "edm", "edm"),
    ("FlowMatching", "flow", "uniform"),
    ("VPCosine", "eps", "uniform"),
    ("VPCosine", "v", "uniform"),
    ("VPSigmoid", "v", "min_snr"),
    ("SubVP", "x", "p2"),
]


def rows(config: demo.Config) -> list[str]:
    """One line of Markdown for each choice."""
    lines = []
    for schedule, prediction, weighting in CHOICES:
        out = f"{config.out}/{schedule}_{prediction}_{weighting}"
        m = demo.main(replace(config, schedule=schedule, prediction=prediction, weighting=weighting, out=out))
        cells = [f"`{name}`" for name in (schedule, prediction, weighting)]
        cells += [f"{100 * m['svc_accuracy']:.1f} %", f"{m['frechet_ratio']:.2f}", f"{m['nearest_ratio']:.2f}"]
        lines.append(table.row([*cells, f"{m['forest_accuracy']:.3f}", f"{m['bound_nats']:.1f}"]))
    return lines


def main(config: demo.Config) -> None:
    """Trains all, and writes the table into the page."""
    head = ["schedule", "prediction", "weighting", "SVC", "Frechet", "nearest", "forest", "bound (nats)"]
    lines = [table.row(head), "|---" * len(head) + "|", *rows(config)]
    PAGE.write_text(table.replace(PAGE.read_text(), "choices", lines))


if __name__ == "__main__":
    main(demo.Config(out="runs/diffusion_choices"))
