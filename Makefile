# Every target creates .venv with the pinned stack when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# two workers, one thread each: torch would otherwise start a thread per core in every worker
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-ci test-all long-run mutants lint format bench tables families coverage clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## train on the default corpus (at most 5 minutes on 2 cores), then a table, a sample and a report
	$(BIN)/localexit train

test: lint  ## lint, types and the fast tests
	$(PYTEST) -m "not slow and not long"

test-ci: $(STAMP)  ## the slow tests, and the kernels under Triton's interpreter
	$(PYTEST) -m slow
	TRITON_INTERPRET=1 $(PYTEST) -m "not long" tests/kernels

test-all: test test-ci long-run  ## everything, the tests that take minutes included
	$(PYTEST) -m long

long-run: $(STAMP)  ## 100,000 tiny steps: memory and step time; goes on where it was stopped
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m train.steps runs/long-run

mutants: $(STAMP)  ## random mistakes in three rooms: how many their tests notice; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py feedback 200 runs/mutants/feedback.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py exits 200 runs/mutants/exits.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py local 200 runs/mutants/local.jsonl

lint: $(STAMP)  ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the CPU benchmark table
	$(BIN)/localexit bench --cpu

families: $(STAMP)  ## write docs/families.md: which models of transformers can be trained locally
	PYTHONPATH=tests $(BIN)/python -m local.families

tables: $(STAMP)  ## the tables of docs/performance.md and docs/scaling.md, from benchmarks/results and formulas
	$(BIN)/python benchmarks/performance_page.py
	$(BIN)/python benchmarks/scaling_page.py

coverage: $(STAMP)  ## line and branch coverage of src
	$(PYTEST) -m "not long" --cov --cov-report= --cov-fail-under=0
	TRITON_INTERPRET=1 $(PYTEST) -m "not long" --cov --cov-append --cov-report=term-missing tests/kernels

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov dist build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
