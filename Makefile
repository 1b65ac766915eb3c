# Two commands: `make demo` and `make test`. Each sets up .venv when it is missing or out of date.
VENV   ?= .venv
PYTHON ?= python3.11
BIN    := $(VENV)/bin
# Where torch's CPU builds live, asked only if the configured package index has none.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
GPU    := $(if $(filter cpu,$(STACK)),,$(shell nvidia-smi -L >/dev/null 2>&1 && echo yes))
# A file of constraints/: cpu, cuda; lowest, newest (give them a VENV of their own).
STACK  ?= $(if $(GPU),cuda,cpu)
TORCH  := $(shell sed -n '/^torch==/p' constraints/$(STACK).txt constraints/common.txt | head -n 1)
READY  := $(VENV)/.ready-$(STACK)

export OMP_NUM_THREADS ?= 1
# DeepSpeed compiles an operator here: one folder per environment, or two environments would rebuild it in turn.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export PATH := $(CURDIR)/$(BIN):$(PATH)
ifeq ($(GPU),)
export DS_ACCELERATOR := cpu
endif

.PHONY: help setup demo demo-pipeline test test-slow test-long test-gpu check bench-smoke clean
help:           ## list the targets
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: $(READY) ## create .venv with the pinned stack

$(READY): pyproject.toml constraints/common.txt constraints/$(STACK).txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check "$(TORCH)" \
	  || $(BIN)/pip install -q --disable-pip-version-check --extra-index-url $(TORCH_CPU_INDEX) "$(TORCH)"
	$(BIN)/pip install -q --disable-pip-version-check -c constraints/$(STACK).txt -e '.[test,dev]'
	$(BIN)/python launch/build_ops.py
	touch $@

demo: $(READY)  ## prepare real text, train with scoring on 2 ranks, print the answer; replaces runs/demo
	$(BIN)/python launch/build_ops.py
	bash launch/demo.sh

demo-pipeline: $(READY) ## the demo on two pipeline stages
	$(BIN)/python launch/build_ops.py
	bash launch/demo.sh pipeline

# Files go to two workers, in order: many of their tests wait more than they compute. Slow ones want the machine to themselves.
test: $(READY)  ## the default tests
	$(BIN)/python launch/build_ops.py
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(READY) ## faults, miniatures and further layouts: what CI runs beside the default tests
	$(BIN)/python launch/build_ops.py
	$(BIN)/python -m pytest -q -m slow

test-long: $(READY) ## the full products of layouts as well
	$(BIN)/python launch/build_ops.py
	$(BIN)/python -m pytest -q --long

test-gpu: $(READY)  ## on a GPU: values of the CPU, kernels against fp64, nothing that the host waits for
	$(BIN)/python -m pytest -q tests/test_gpu.py tests/test_triton*.py

bench-smoke: $(READY) ## what scoring costs in a tiny model, in seconds: figures, no judgement
	$(BIN)/python -m benchmarks.overhead --smoke

check: $(READY) ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:          ## remove what the demo and the tests leave
	rm -rf runs data/demo .pytest_cache
