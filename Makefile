# Two commands do everything on a fresh machine: `make bench` and `make test`.
# Each sets up .venv by itself; neither needs the other.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: help setup bench gpu test lint types docs claims wheel clean
.DEFAULT_GOAL := help

help:  ## what can be made
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

setup: $(READY)  ## create .venv and install everything into it

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"mlsys needs Python 3.11 or newer, this is {v.major}.{v.minor}: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench,text,test,dev]'
	@touch $(READY)

bench: $(READY)  ## run the benchmarks in their quick size; writes report/index.html
	@$(BIN)/mlsys bench --quick --report report

gpu: $(READY)  ## check, time and draw the Triton kernels on a GPU, in 8 minutes
	@$(BIN)/python benchmarks/gpu.py --results results --report report

test: $(READY) lint types  ## everything that must hold: tests, lint, types, layout
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

lint: $(READY)  ## ruff: style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)  ## fill the tables and pictures in README and docs from results/
	$(BIN)/mlsys docs

claims: $(READY)  ## recompute the published numbers; writes docs/claims.md
	$(BIN)/mlsys claims --write docs/claims.md

wheel: $(READY)  ## build dist/*.whl
	$(BIN)/python -m build --wheel

clean:  ## remove what was built, not what was measured
	rm -rf $(VENV) build dist report .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
