.PHONY: help setup demo check test test-all bench slurm-test
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
ARGS   ?=

help:        ## this list
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.installed  ## create .venv and install for development

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup  ## pretrain and evaluate on the embedded data: outputs/demo/report.html
	$(BIN)/unlabeled hydra.run.dir=outputs/demo $(ARGS)

check: setup ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright

test: check  ## lint, types and the fast tests
	$(BIN)/pytest -n auto --maxprocesses 8 --dist loadgroup -m 'not slow and not gpu' $(ARGS)

test-all: check  ## every test that this machine can run (hours)
	$(BIN)/pytest $(ARGS)

bench: setup ## ratios of speed in one run; make bench ARGS=--check fails below a bar
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python scripts/bench.py $(ARGS)

slurm-test: setup ## runs on a real SLURM of two nodes, which it starts on this machine
	$(BIN)/pytest -m slurm tests/slurm $(ARGS)
