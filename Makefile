# `make demo` and `make test` each work alone in a fresh clone: they make their own .venv.
# The first that runs here; CI has 3.11.
PYTHON ?= $(shell for v in 3.11 3.12 3.13; do python$$v -c '' 2>/dev/null && echo python$$v && break; done)
# What the tests run with; PyPI's build for Linux takes CUDA along.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := megatron_prolong examples tools tests benchmarks setup.py

.PHONY: demo test test-all test-gpu test-slurm lint bench clean

demo: $(VENV)/ready
	PATH="$(abspath $(BIN)):$$PATH" bash examples/demo.sh

# By file: the ranks and runs that the tests of one file share are started once.
test: $(VENV)/ready
	$(BIN)/python -m pytest -m "not gpu and not slurm and not slow" -n 2 --dist loadfile

test-all: $(VENV)/ready
	$(BIN)/python -m pytest -m "not gpu and not slurm" -n 2 --dist loadfile

test-gpu: $(VENV)/ready
	$(BIN)/python -m pytest -m gpu tests/gpu tests/distributed/test_gpu_layouts.py

test-slurm: $(VENV)/ready
	$(BIN)/python -m pytest -m slurm

lint: $(VENV)/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

bench: $(VENV)/ready
	@echo "one script per measurement; each writes its JSON result beside itself:"
	@ls benchmarks/*.py benchmarks/*/*.py

$(VENV)/ready: setup.py
	@test "$(PYTHON)" || { echo "error: no Python 3.11, 3.12 or 3.13 here; name one: make PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo
