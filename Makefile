# make tune | test | faults | acceptance | check | docs | ui | setup.   Other arguments: make tune ARGS="optim.lr=3e-4"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export RAY_USAGE_STATS_ENABLED ?= 0

.PHONY: setup tune test faults acceptance check docs ui
.DEFAULT_GOAL := setup

setup: $(VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "make: $(PYTHON) is not Python 3.11 to 3.13; name one that is: make setup PYTHON=python3.11" >&2; exit 2; }
	@echo "Making $(VENV) from pyproject.toml and constraints.txt (some minutes, once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[dev]'
	@touch $@

tune: setup
	$(BIN)/python experiments/tune.py $(ARGS)

test: setup
	$(BIN)/python -m pytest -n 2 $(ARGS)

faults: setup
	$(BIN)/python -m pytest -m slow $(ARGS)

acceptance: setup
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[acceptance,docs]'
	$(BIN)/python -m pytest tests/acceptance -m acceptance $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	@$(BIN)/python -m pip install -qq --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

ui: setup
	$(BIN)/python experiments/ui.py $(ARGS)
