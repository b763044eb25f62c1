"""docs/benchmarks.md, from what docs/benchmarks.json holds and nothing else."""

from collections.abc import Iterator
from typing import Any

from tests.bench.bars import BARS, FLAT, TREE, Bar, Results
from tests.bench.sections import SECTIONS

__all__ = ["page", "summary"]

HOW = """
Every table is measured in a process of its own, on a machine that is otherwise idle (a busy one is refused: more than
half a core in use by others). Rows of a table take turns, the order rotates from round to round, and the median counts.

- A training step is the gradient, clipping by global norm 1, AdamW (learning rate 1e-3, decay 0.01) and a moving
  average of 0.999, in float32, from the same weights in all forms. Its table is made only if the losses of all forms
  agree over their first five steps to a relative 1e-3.
- `fg.jit` is `jit(make_step(...))` with the state donated; "flat" is the same with `flat=True`. The `nn.Module` rows
  have fused AdamW and foreach clipping and averages, or all three under `torch.compile` ("compiled with its update").
  JAX is `jax.jit` with optax and the state donated, and is waited for.
- Torch's OpenMP threads spin for some milliseconds after their last work, and would take a core from JAX's pool. So
  each row runs untimed for 10 ms, at least once, before each timed call. The thread counts are the defaults of both.
- A cold start is a process with an empty `TORCHINDUCTOR_CACHE_DIR`. Imports, the probe of the vector instructions,
  initial weights and the start of JAX's backend come before its clock.
- Large float32 products go to oneDNN in `fg.jit` where the processor is not Intel's: there MKL, which torch calls for
  the `nn.Module` rows, keeps to 256-bit vectors. On an Intel processor the margin over the module is smaller.
- Memory is what torch's allocator has alive at once, by the profiler's record of every allocation.
""".strip()


def page(results: dict[str, Any]) -> str:
    """The whole page."""
    tables: Results = results["sections"]
    machine = ", ".join(f"{name} {value}" for name, value in results["machine"].items())
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench` on {machine}." if machine else "Nothing is measured yet: `make bench`.",
        "",
        HOW,
        "",
        "## Ratios",
        "",
        'Below the bar is better, but where it says "at least". Two figures are of the state as a tree and flat.',
        "",
        "| | figure | bar | aim | met |",
        "|---|---|---|---|---|",
        *[bar_row(bar, tables) for bar in BARS],
    ]
    for name, section in SECTIONS.items():
        lines += ["", f"## {section.title}", "", section.what, "", *table_lines(tables.get(name))]
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Any]) -> str:
    """The README's table: each ratio beside its bar."""
    rows = [bar_row(bar, results["sections"]).split("|")[1:4] for bar in BARS]
    return "\n".join(["| | measured | bar |", "|---|---|---|", *[f"|{'|'.join(row)}|" for row in rows]])


def bar_row(bar: Bar, tables: Results) -> str:
    """One line of the table of ratios."""
    limit = f"{'at least ' if bar.at_least else ''}{bar.bar:g}{bar.unit}"
    aim = "" if bar.aim is None else f"{bar.aim:g}{bar.unit}"
    try:
        figures = bar.figures(tables)
    except KeyError:
        return f"| {bar.name} | not measured | {limit} | {aim} | |"
    labels = {"": "", TREE: " tree", FLAT: " flat"}
    shown = ", ".join(f"{x:.2f}{bar.unit}{labels[form]}" for form, x in figures.items())
    return f"| {bar.name} | {shown} | {limit} | {aim} | {verdict(bar, figures)} |"


def verdict(bar: Bar, figures: dict[str, float]) -> str:
    """yes, no, or which form meets the bar."""
    met = [form for form, x in figures.items() if bar.met(x)]
    if len(met) == len(figures):
        return "yes"
    return "flat only" if FLAT in met else "tree only" if TREE in met else "no"


def table_lines(table: dict[str, Any] | None) -> Iterator[str]:
    """A section's rows, and why others are missing."""
    if table is None:
        yield "Not measured."
        return
    if table["note"]:
        yield from (table["note"], "")
    unit = table["unit"]
    yield from (f"| | median {unit} | minimum {unit} |", "|---|---|---|")
    for name, row in table["rows"].items():
        yield f"| {name} | {row['median']:.4g} | {row['minimum']:.4g} |"
    for name, message in table["failures"].items():
        yield f"| {name} | failed: `{message.replace('|', '/').replace('`', '')}` | |"
