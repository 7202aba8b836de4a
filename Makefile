# Needs Python 3.11 or newer, and make. Everything is installed into .venv; nothing else is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help setup demo test test-all test-providers gpu-check lint clean

help:
	@echo "make demo      fine-tune, export, verify and benchmark a real model (3 minutes on 2 cores, once installed)"
	@echo "make test      run the tests (under 15 minutes on 2 cores)"
	@echo "make test-all  run the slow tests, too"
	@echo "make test-providers  install the provider plugins, and export every target, run where a device is found"
	@echo "make gpu-check run the tests that need a CUDA device, on a machine that has one"
	@echo "make lint      ruff and mypy"
	@echo "make clean     remove .venv and caches (runs/ stays)"

setup: $(READY)

# torch goes first: where the CPU build is to be had it is enough, and nothing else then pulls another.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "edgetune needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV); this takes a few minutes the first time"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch>=2.11,<2.14'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

demo: $(READY)
	$(BIN)/edgetune run recipes/quickstart.yaml
	@echo "(edgetune lies in $(BIN): first \`. $(BIN)/activate\`, or type $(BIN)/edgetune)"

# Two processes, a file of tests in each, and one thread of arithmetic in each: tiny models gain nothing by more.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

test-all: $(READY)
	$(BIN)/python -m pytest

# A plugin that has no wheel for this machine is left out; the tests say what could not be run.
PLUGINS := onnxruntime-ep-openvino onnxruntime-ep-webgpu onnxruntime-qnn onnxruntime-ep-nv-tensorrt-rtx
test-providers: $(READY)
	@for plugin in $(PLUGINS); do $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: $$plugin || echo "$$plugin: no wheel here"; done
	$(BIN)/edgetune doctor
	$(BIN)/python -m pytest tests/runtime/test_providers.py tests/export/test_targets_run.py

# On a machine whose Python has a CUDA build of torch already: make gpu-check GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-check:
	$(GPU_PYTHON) -m pytest $(wildcard tests/*/test_*gpu.py) -m gpu --override-ini addopts="-v -ra --strict-markers"

lint: $(READY)
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
