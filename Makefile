# Everything runs in $(VENV), which is made on the first call and kept. PYTHON counts when it is made;
# `make clean` first to change it.

PYTHON ?= python3
VENV ?= .venv
# torch comes first and alone: whatever depends on it would otherwise choose a build with CUDA.
TORCH ?= torch==2.13.0
# More arguments for pytest, for example: make test ARGS="-k bundle -x"
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-ray check docs clean

help: ## Show this text
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(firstword $(MAKEFILE_LIST)) | awk -F '|' '{printf "%-12s %s\n", $$1, $$2}'
	@echo "Variables: PYTHON=$(PYTHON) VENV=$(VENV) TORCH=$(TORCH) ARGS=for pytest"

demo: $(VENV)/.installed ## Merge the shipped family: similarity, bytes, perplexity, answers
	$(BIN)/moemerge demo

test: $(VENV)/.developing ## Run the test suite
	$(BIN)/python -m pytest -n auto $(ARGS)

test-ray: $(VENV)/.developing ## Run the tests on a Ray cluster of several nodes
	$(BIN)/python -m pytest -m ray tests/cluster $(ARGS)

check: $(VENV)/.developing ## Lint, format, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.developing ## Build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

clean: ## Remove the environment, caches and the demo's output
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "moemerge needs Python 3.11 or later; $(PYTHON) is `$(PYTHON) --version 2>&1`. Set PYTHON=" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP) install '$(TORCH)'
	@touch $@

$(VENV)/.installed: pyproject.toml $(VENV)/.torch
	$(PIP) install --editable '.[report]'
	@touch $@

$(VENV)/.developing: pyproject.toml $(VENV)/.torch
	$(PIP) install --editable '.[dev]'
	@touch $@ $(VENV)/.installed
