# The two commands of the README, and what continuous integration runs. Each makes its own environment.
#
#   make compare        the seed comparison: a table, comparison.png, comparison.json
#   make test           the tests (make test-slow: those that take longer)
#
# VENV=path uses (and if need be creates) an environment elsewhere; PYTHON=path chooses the interpreter.

VENV ?= .venv
WORKERS ?= 2
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Small models: more threads than cores make a step 60-100 times slower, and the thread count of the linear
# algebra decides the last bit of a sum, so also the path of a solver.
OMP_NUM_THREADS ?= 1
OPENBLAS_NUM_THREADS ?= 1
MKL_NUM_THREADS ?= 1
export OMP_NUM_THREADS OPENBLAS_NUM_THREADS MKL_NUM_THREADS

BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup compare test test-slow lint format notebooks docs-examples wheel clean

help:
	@echo "make compare | test | test-slow | lint | format | notebooks | docs-examples | wheel | setup | clean"

$(BIN)/pip:
	@test -n "$(PYTHON)" || { echo "needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install -c constraints.txt -e '.[test]'
	@touch $(VENV)/.installed $@

setup: $(VENV)/.installed-test

compare: $(VENV)/.installed
	$(BIN)/hybridopt compare --plot comparison.png --json comparison.json

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

notebooks: $(VENV)/.installed-test
	$(BIN)/python notebooks/execute.py

docs-examples: $(VENV)/.installed-test
	$(BIN)/python -m pytest --doctest-modules --doctest-glob='*.md' hybridopt adapters README.md $(wildcard docs)

wheel: $(VENV)/.installed-test
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf dist comparison.png comparison.json .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
