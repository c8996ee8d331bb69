# `make demo` and `make test` set up first: .venv is made once, and again when pyproject.toml changes.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# What is run from here sends no usage statistics.
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0
export VLLM_NO_USAGE_STATS := 1

# Two processes: tests on Ray Serve, and beside them those on Ray alone; then, in both, all others.
BESIDE := --numprocesses 2 --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv demo circle serve test check soak lint format monitoring clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(READY) ## make .venv: CPU engine, Ray and the tools below

$(READY): pyproject.toml tools/setup.py
	@$(PYTHON) tools/setup.py
	@touch $@

demo: $(READY) ## everything on this machine, without a GPU
	@$(BIN)/python -m jobs.demo

circle: $(READY) ## train, quantize, evaluate, batch and serve a tiny model, with real accuracy
	@$(BIN)/python -m jobs.circle

serve: $(READY) ## the tiny model with an OpenAI API on this machine, without a GPU
	@$(BIN)/python -m phi4ray.train.tiny .demo/tiny-phi-4
	@$(BIN)/python -m jobs.serve --recipe tiny-cpu --model .demo/tiny-phi-4 \
		--served-model-name microsoft/phi-4

test: lint ## lint and all tests
	@$(BIN)/python -m pytest $(BESIDE)

check: lint ## lint and the tests that need no engine, no cluster and no training: under a minute
	@$(BIN)/python -m pytest -q $(BESIDE) -m "not (engine or crash or cluster or slow)" tests/unit tests/contract

soak: $(READY) ## the long tests at full length: more kills, more requests, half an hour
	@PHI4RAY_SOAK=1 $(BIN)/python -m pytest $(BESIDE) tests/crash tests/cluster

lint: $(READY) ## ruff and mypy
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: $(READY) ## ruff's fixes and formatting
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

monitoring: $(READY) ## write k8s/monitoring's dashboards and rules from tools/monitoring
	@$(BIN)/python -m tools.monitoring

clean: ## remove what runs leave behind; .venv stays
	rm -rf .demo .hypothesis .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
