"""`make check-machine`, the first step of `make setup`: it says what a machine lacks, and how to get it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture
def machine(tmp_path):
    """A PATH with nothing but the shell's tools, and a way to add programs to it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in ("sh", "make", "awk", "env"):
        found = shutil.which(tool)
        assert found, tool
        (folder / tool).symlink_to(found)
    return folder


def add(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!{shutil.which('sh')}\n{script}\n")
    (folder / name).chmod(0o755)


def check(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "make"), "--no-print-directory", "check-machine", *options]
    env = {"PATH": str(folder), "LC_ALL": "C"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


PYTHON = f'exec "{sys.executable}" "$@"'


def test_setup_says_that_python_is_missing(machine):
    result = check(machine)
    assert result.returncode != 0
    assert "python3 not found. Install Python >= 3.11" in result.stderr


def test_setup_says_that_python_is_too_old(machine):
    add(machine, "python3", 'case "$*" in *version_info*) exit 1;; *--version*) echo Python 3.9.2;; esac')
    result = check(machine)
    assert result.returncode != 0
    assert "needs Python >= 3.11, but python3 is Python 3.9.2" in result.stderr


def test_setup_says_that_the_venv_module_is_missing(machine):
    add(machine, "python3", f'case "$*" in *ensurepip*) exit 1;; esac; {PYTHON}')
    result = check(machine)
    assert result.returncode != 0
    assert "python3 lacks the venv module" in result.stderr
    assert "apt install python3-venv" in result.stderr


def test_setup_says_that_the_compiler_is_missing(machine):
    add(machine, "python3", PYTHON)
    result = check(machine)
    assert result.returncode != 0
    assert "no C++ compiler" in result.stderr
    assert "apt install g++" in result.stderr


def test_setup_says_that_the_headers_are_missing(machine):
    add(machine, "python3", f'case "$*" in *Python.h*) exit 1;; esac; {PYTHON}')
    add(machine, "g++", "exit 0")
    result = check(machine)
    assert result.returncode != 0
    assert "python3 lacks its C headers (Python.h)" in result.stderr


@pytest.mark.parametrize("compiler", ["g++", "c++", "clang++"])
def test_setup_accepts_any_compiler(machine, compiler):
    add(machine, "python3", PYTHON)
    add(machine, compiler, "exit 0")
    result = check(machine)
    assert result.returncode == 0, result.stderr


def test_setup_takes_another_python(machine):
    add(machine, "python3.99", PYTHON)
    add(machine, "g++", "exit 0")
    assert check(machine, "PYTHON=python3.99").returncode == 0


def test_constraints_pin_every_dependency():
    pins = (ROOT / "constraints.txt").read_text().lower()
    pinned = set(re.findall(r"^([a-z0-9_.-]+)==\S+$", pins, re.MULTILINE))
    wanted = re.findall(r'"([A-Za-z0-9_-]+)>=', (ROOT / "pyproject.toml").read_text())
    assert {name.lower() for name in wanted} <= pinned
    assert "torch==2.13.0\n" in pins
    assert not re.search(r"^(nvidia|triton)|\+|^-e|file:", pins, re.MULTILINE)


def test_ci_runs_what_contributing_says():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert re.findall(r"^make \w+$", script.read_text(), re.MULTILINE) == ["make setup", "make lint", "make test"]
