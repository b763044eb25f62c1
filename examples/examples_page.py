"""Writes what the examples measured into the pages of docs/ that show it, and their pictures beside them.

python examples/examples_page.py    # after the examples: reads runs/*/metrics.json and the pictures there
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command_line
from diffusion_digits_table import replace, row

DOCS = Path(__file__).parents[1] / "docs"

PICTURES = {  # of each example: file in its folder -> file in docs
    "linear_regression": {"landscape": "linear_regression"},
    "optimizer_race": {"race": "optimizer_race"},
    "digits_classifiers": {"confusion_cnn": "digits_confusion", "gradient_flow_lstm": "gradient_flow"},
    "text_classifier": {"confusion": "text_confusion"},
    "fine_tuning": {},
    "your_own_optimizer": {},
    "gan_digits": {"samples": "gan_samples", "progress": "gan_progress"},
    "vae_digits": {"samples": "vae_samples", "interpolation": "vae_interpolation"},
    "vq_digits": {"samples": "vae_vq_samples"},
    "flow_digits": {"samples": "flow_samples", "mean_flow/samples": "flow_one_step"},
    "inpaint_digits": {"upper_half": "inpaint_upper_half", "2x2_means": "inpaint_means"},
    "densities_2d": {"densities": "densities_2d"},
    "gpt_stdlib": {"loss": "gpt_loss"},
    "gan_ring": {"samples": "exercise_ring_samples", "training": "exercise_ring_training"},
    "unet_memory": {"memory": "exercise_unet_memory"},
    "ema_quality": {"quality": "exercise_ema_quality"},
}


@dataclass(frozen=True)
class Config:
    """Every field is a flag of the command line."""

    runs: str = "runs"  # folder of the examples' results


def markdown(metrics: dict[str, Any]) -> list[str]:
    """The lines of a table: of rows by name, or of numbers by name; a table among them stands before."""
    tables = {
        name: x for name, x in metrics.items() if isinstance(x, dict) and isinstance(next(iter(x.values())), dict)
    }
    rows = {name: x if isinstance(x, dict) else {"value": x} for name, x in metrics.items() if name not in tables}
    head, *body = command_line.cells(rows)
    before = [line for table in tables.values() for line in [*markdown(table), ""]]
    return [*before, row(head), row(["---"] * len(head)), *map(row, body)]


def page_of(name: str) -> Path:
    """The page that shows an example: it has a line ``<!-- name -->``."""
    return next(page for page in sorted(DOCS.glob("*.md")) if f"<!-- {name} -->" in page.read_text())


def main(config: Config) -> None:
    """Fills the pages' tables and copies the pictures, of those examples that were run."""
    for name, pictures in PICTURES.items():
        folder = Path(config.runs) / name
        if (folder / "metrics.json").exists():
            metrics = json.loads((folder / "metrics.json").read_text())
            page = page_of(name)
            page.write_text(replace(page.read_text(), name, markdown(metrics)))
            for source, target in pictures.items():
                shutil.copy(folder / f"{source}.png", DOCS / f"{target}.png")


if __name__ == "__main__":
    main(command_line.parse(Config, __doc__))
