# Everything runs in .venv, which `make setup` builds once and rebuilds when pyproject.toml or constraints.txt change.
PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
BENCH_STAMP := $(VENV)/.stamp-bench
# torch.compile calls $CXX, or g++ when it is not set.
export CXX := $(or $(shell for c in "$$CXX" g++ c++ clang++; do command -v "$$c" && break; done 2>/dev/null),g++)

# One thread for each worker: the workers share the cores, and the results do not depend on their number.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 $(BIN)/python -m pytest
PARALLEL := -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup check-machine demo test test-all coverage lint format bench composition docs table clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory check-machine
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt hatchling editables
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@touch $(STAMP)

check-machine: ## says what this machine lacks: Python >= 3.11, its venv module and headers, a C++ compiler
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "make setup: $(PYTHON) not found. Install Python >= 3.11 (Debian/Ubuntu: apt install python3 python3-venv python3-dev)" \
	    "or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make setup: needs Python >= 3.11, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1)." \
	    "Name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "make setup: $(PYTHON) lacks the venv module (venv, ensurepip)." \
	    "Install it (Debian/Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@command -v "$(CXX)" >/dev/null || { \
	  echo "make setup: no C++ compiler (looked for \$$CXX, g++, c++, clang++); fg.jit compiles with it." \
	    "Install one (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import os, sys, sysconfig; \
	  sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' || { \
	  echo "make setup: $(PYTHON) lacks its C headers (Python.h); fg.jit compiles against them." \
	    "Install them (Debian/Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)" >&2; exit 1; }

demo: setup ## trains a diffusion model on 8x8 digits and draws samples: runs/diffusion_digits
	$(BIN)/python examples/diffusion_digits.py

test: setup ## the tests, doctests and documentation pages, without the slow ones
	$(PYTEST) $(PARALLEL) -m "not slow"

test-all: setup ## every test, slow ones included, and line coverage of the package >= 95 %
	$(PYTEST) $(PARALLEL) --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

coverage: setup ## line coverage of the package by the quick tests >= 95 %
	$(PYTEST) $(PARALLEL) -m "not slow" --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

lint: setup ## ruff (rules and format) and basedpyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

format: setup ## rewrites the files as `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BENCH_STAMP): $(STAMP)
	$(BIN)/python -m pip install --constraint constraints.txt --no-build-isolation --editable ".[bench]"
	@touch $(BENCH_STAMP)

bench: setup $(BENCH_STAMP) ## steps, compile times, memory beside nn.Module and JAX: docs/benchmarks.md (half an hour)
	$(BIN)/python -m tests.bench $(BENCH)

composition: setup ## every transform of every function: docs/composition.md (20 minutes); some rows: ROWS="'scan' 'nn.LSTM'"
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m composition $(ROWS)

docs: setup ## writes docs/api from the docstrings, and runs the code of README.md and docs/*.md
	PYTHONPATH=tests $(BIN)/python -m api_pages
	$(PYTEST) tests/test_docs.py

table: setup ## the README's table: metrics with and without EMA, guidance, samplers, remat (long)
	$(BIN)/python examples/diffusion_digits_table.py

clean: ## removes .venv, caches and runs
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov runs
