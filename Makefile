# Everything runs from .venv, which `make` fills from requirements.lock and keeps up to date.
#   make demo PYTHON=python3.12            another interpreter (3.11, 3.12 or 3.13)
#   make demo TORCH_INDEX=<index URL>      another build of torch, such as PyTorch's CPU-only one
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH_INDEX ?=
ARGS ?=
FUZZ ?=
BIN := .venv/bin
# One process for the integration tests, which wait, and one for the unit tests, which compute: tests/conftest.py.
TWO := $(if $(ARGS),,-n 2 --no-loadscope-reorder)
INSTALLED := .venv/.installed
PIP = $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check
UV := uv==0.13.9
TORCH = $(shell sed -n 's/^\# \(torch==[^ ]*\).*/\1/p' requirements.lock)

# What a package needs to build must not be fetched behind the lock's back: all are wheels, but for DeepSpeed,
# which is built from the lock's own setuptools, without its operators and so without a compiler.
LOCKED = $(PIP) --no-deps --require-hashes --requirement
export DS_BUILD_OPS := 0
# Ray must not wrap workers in `uv run`, nor send usage statistics, when these targets run.
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help
help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 18

.PHONY: demo
demo: install  ## install, then train a small model on the Python standard library (about 4 minutes)
	$(BIN)/raydist submit jobs/quickstart.yaml $(ARGS)

.PHONY: demo-kill
demo-kill: install  ## the same job undisturbed and SIGKILLed twice: equal final weights
	$(BIN)/python tests/chaos/demo_kill.py $(ARGS)

.PHONY: chaos
chaos: install  ## faults of every kind at random moments, each ending in the undisturbed bytes, 200 kills of saves, damaged files (an hour)
	$(BIN)/python -m tests.chaos.chaos $(ARGS)
	$(BIN)/python -m tests.chaos.saves
	$(BIN)/python -m tests.chaos.fuzz $(FUZZ)

.PHONY: chaos-ettr
chaos-ettr: install  ## the share of time in steps that count: a real run with kills, and 54 simulated days (about 15 minutes)
	$(BIN)/python -m tests.chaos.ettr $(ARGS)

.PHONY: test
test: install  ## the tests (about 8 minutes on 2 cores)
	$(BIN)/python -m pytest $(TWO) -m "not slow and not real and not gpu" $(ARGS)

.PHONY: test-all
test-all: install  ## these and the long ones
	$(BIN)/python -m pytest $(TWO) $(ARGS)

.PHONY: test-gpu
test-gpu: install  ## those that need a GPU, which `make test` leaves out
	$(BIN)/python -m pytest -m gpu $(ARGS)

.PHONY: check
check: install  ## style, types, and who imports whom
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

.PHONY: bench
bench: install  ## raydist against bare programs and Hugging Face's Trainer on the same work
	$(BIN)/python benchmarks/train_loop.py $(ARGS)
	$(BIN)/python benchmarks/prepare.py $(ARGS)
	$(BIN)/python benchmarks/checkpoint.py

.PHONY: bench-gpu
bench-gpu: install  ## raydist, the Trainer and a bare compiled loop on a GPU (ARGS=--quick: four minutes)
	$(BIN)/python benchmarks/gpu.py $(ARGS)

.PHONY: docs
docs: install  ## write docs/job.md from the schema, docs/support.md from the tests
	$(BIN)/python docs/generate.py

.PHONY: lock
lock:  ## make requirements.lock again: the newest of all that pyproject.toml admits
	@$(PYTHON) -m venv --clear build/lock
	@build/lock/bin/python -m pip install --quiet --quiet --disable-pip-version-check $(UV)
	build/lock/bin/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
	    --generate-hashes --upgrade --no-header --quiet --output-file build/lock/all.txt
	@awk -f .ci/lock.awk build/lock/all.txt > build/lock/requirements.lock
	@mv build/lock/requirements.lock requirements.lock
	@grep -c '==' requirements.lock | sed 's/$$/ pinned packages in requirements.lock/'

.PHONY: clean
clean:  ## remove .venv, caches and build folders; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

.PHONY: install
install: $(INSTALLED)

# An install that was interrupted left no stamp, and starts over.
$(INSTALLED): requirements.lock pyproject.toml
	@bash .ci/machine $(PYTHON)
	@[ -f $@ ] || rm -rf .venv
	@rm -f $@
	@[ -d .venv ] || $(PYTHON) -m venv .venv
	@echo "installing $$(grep -c '==' requirements.lock) pinned packages into .venv (a few minutes)"
	@awk '/^[a-z]/ { keep = !/^deepspeed==/ } keep' requirements.lock > .venv/wheels.txt
	@awk '/^[a-z]/ { keep = /^deepspeed==/ } keep' requirements.lock > .venv/sources.txt
	@$(LOCKED) .venv/wheels.txt --only-binary :all:
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@DS_ACCELERATOR=cpu $(LOCKED) .venv/sources.txt --no-build-isolation
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m pip check --disable-pip-version-check
	@touch $@
