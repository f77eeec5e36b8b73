# Everything happens in .venv; only Python 3.11 or newer is needed.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# By a path, not by an import hook: a hook would lose against a folder that is called pagedkv, such as this checkout
# seen from the folder above it.
EDITABLE := --config-settings editable_mode=compat --editable

.PHONY: demo demo-engine test mutants check slow soak bench gpu-check clean

demo: .venv/demo ## Replay the sample trace, four times as fast and on little memory, so that requests queue and are preempted.
	$(BIN)/pagedkv replay --rate-scale 4 --num-blocks 1500 --out out-demo

demo-engine: .venv/engine ## Serve a tiny random model: a batch, a stream, a shared prefix. ARGS="--model NAME" for a real one.
	$(BIN)/python examples/quickstart.py $(ARGS)

test: .venv/test ## Run the tests.
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

slow: .venv/test ## Run the slow tests too.
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# docs/reliability.md says what each line measures and what came of it.
soak: .venv/test ## The long checks: an hour of fuzzing (SECONDS=60 for less), long forms of tests on trust, liveness, every mutant.
	$(BIN)/python tests/fuzz/run.py --seconds $(or $(SECONDS),3600)
	$(BIN)/python -m pytest -m slow tests/security tests/fuzz tests/pagedkv
	$(BIN)/pagedkv liveness --traces 100000
	$(BIN)/python benchmarks/mutation.py --sample 0 --thorough

mutants: .venv/test ## Plant 150 small bugs, one at a time, and see whether the tests notice. ARGS="--sample 0" for all.
	$(BIN)/python benchmarks/mutation.py $(ARGS)

check: .venv/test ## Lint, format and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/test ## Run every benchmark and write the results to benchmarks/results/.
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

# With the environment's own Python where there is no .venv: GPU machines bring their torch and Triton along.
gpu-check: ## Check and time the GPU kernels: needs a CUDA GPU, torch and Triton. ARGS=--quick checks only.
	PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_check.py $(ARGS)

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) $(EDITABLE) '.[sim]'
	touch $@

.venv/engine: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) $(EDITABLE) '.[engine]'
	touch $@

.venv/test: .venv/bin/python pyproject.toml constraints.txt
	$(PIP) $(EDITABLE) '.[dev]'
	touch $@

clean: ## Remove what the other targets made.
	rm -rf .venv out-demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
