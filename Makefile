# Every target creates .venv with the pinned stack when it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# two workers, one thread each: torch would otherwise start a thread per core in every worker
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2
# what says that numbers are right, and that a run is made, saved and continued
CORE_TESTS := tests/feedback tests/exits tests/local tests/train tests/test_checks.py tests/test_imports.py
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-ci test-all long-run test-min test-new test-package mutants lint format bench tables families coverage clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt hatchling editables
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(STAMP)  ## train on the default corpus (4 to 6 minutes on 2 cores), then a table, a sample and a report
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

test-min:  ## the tests that need no other package, with the lowest versions that are allowed (torch 2.11)
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --quiet -c constraints-min.txt ".[train]" pytest pytest-timeout hypothesis
	.venv-min/bin/python -m pip check
	OMP_NUM_THREADS=1 .venv-min/bin/python -m pytest -m "not slow and not long" $(CORE_TESTS)

test-new:  ## the same tests with the newest versions of everything that is installed, torch included
	$(PYTHON) -m venv .venv-new
	.venv-new/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager ".[train]" pytest pytest-timeout hypothesis
	.venv-new/bin/python -m pip check
	.venv-new/bin/python -m pip list
	OMP_NUM_THREADS=1 .venv-new/bin/python -m pytest -m "not slow and not long" $(CORE_TESTS)

test-package:  ## the wheel: built, installed into an empty environment without extras, imported
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet hatchling build
	.venv-package/bin/python -m build --wheel --no-isolation --outdir dist .
	rm -rf .venv-package
	$(PYTHON) -m venv .venv-package
	.venv-package/bin/python -m pip install --quiet -c constraints.txt dist/localexit-*.whl
	.venv-package/bin/python -m pip check
	cd / && $(CURDIR)/.venv-package/bin/python $(CURDIR)/tests/package.py

mutants: $(STAMP)  ## random mistakes in three rooms: how many their tests notice; goes on where it was stopped
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py feedback 200 runs/mutants/feedback-seed4.jsonl 4 2
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py exits 200 runs/mutants/exits-seed4.jsonl 4 2
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py local 200 runs/mutants/local-seed4.jsonl 4 2

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

tables: $(STAMP)  ## the tables of docs/performance.md, costs.md and scaling.md, from benchmarks/results and formulas
	$(BIN)/python benchmarks/performance_page.py
	$(BIN)/python benchmarks/costs_page.py
	$(BIN)/python benchmarks/scaling_page.py

coverage: $(STAMP)  ## line and branch coverage of src
	$(PYTEST) -m "not long" --cov --cov-report= --cov-fail-under=0
	TRITON_INTERPRET=1 $(PYTEST) -m "not long" --cov --cov-append --cov-report=term-missing tests/kernels

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) .venv-min .venv-new .venv-package .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.* htmlcov dist build
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
