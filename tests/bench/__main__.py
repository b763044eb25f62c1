"""Measures and writes docs/benchmarks.json and docs/benchmarks.md: ``make bench``, or ``python -m tests.bench``.

Each section runs in a process of its own: ``--only SECTION`` measures here, and merges its table into the file.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.bench.page import page, summary
from tests.bench.sections import SECTIONS
from tests.bench.table import Options, Table
from tests.bench.timing import busy_processors

__all__ = ["check_idle", "main", "merge"]

DOCS = Path(__file__).parents[2] / "docs"
README = DOCS.parent / "README.md"
BUSY = 0.5  # processors


def machine() -> dict[str, str]:
    """What the figures depend on: processor, threads, versions."""
    found = {
        "processor": f"{processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "Python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("jax", "jaxlib", "optax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def processor() -> str:
    """Its name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def check_idle() -> None:
    """Stops the program if others use the machine."""
    busy = busy_processors()
    if busy > BUSY:
        sys.exit(f"bench: expected an idle machine, got {busy:.1f} busy processors (--busy to measure all the same)")


def merge(folder: Path, name: str, table: Table) -> None:
    """Adds a table to the JSON file, and writes the page anew. Figures of another machine or versions are dropped."""
    file, here = folder / "benchmarks.json", machine()
    old: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    sections = old["sections"] if old.get("machine") == here else {}
    sections[name] = table.as_json()
    results = {"machine": here, "sections": {name: sections[name] for name in SECTIONS if name in sections}}
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    (folder / "benchmarks.md").write_text(page(results))
    if folder == DOCS:
        text = README.read_text()
        before, after = text.split("<!-- bench -->\n")[0], text.split("<!-- /bench -->")[1]
        README.write_text(f"{before}<!-- bench -->\n{summary(results)}\n<!-- /bench -->{after}")


def run_all(arguments: list[str]) -> int:
    """Every section in a process of its own; how many failed."""
    failed = 0
    for name in SECTIONS:
        sys.stderr.write(f"bench: {name}\n")
        command = [sys.executable, "-m", "tests.bench", "--only", name, *arguments]
        failed += subprocess.run(command, check=False).returncode != 0
    return failed


def main(arguments: list[str]) -> int:
    """Measures one section or all; 1 if a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="measure this section (default: all, one after the other)")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each row (default: 40)")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each cold row (default: 3)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of benchmarks.md and .json")
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    options = parser.parse_args(arguments)
    if options.only is None:
        return int(run_all(arguments) > 0)
    if not options.busy:
        check_idle()
    table = SECTIONS[options.only].measure(Options(options.rounds, options.repeats))
    merge(options.out, options.only, table)
    return int(bool(table.failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
