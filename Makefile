# Two commands, each alone enough on a machine that has only Python (3.11 to 3.14) and make:
#   make demo    checkpoint -> program -> engine -> text, and then the proof
#   make test    the test suite
# On Linux plain torch brings gigabytes of CUDA libraries; a CPU build is enough for everything here:
#   make demo TORCH_INDEX=<URL of a package index with CPU builds of torch>
# Installed into .venv, exact versions of configs/constraints.txt; downloads and caches stay in .cache.

PYTHON ?=
TORCH_INDEX ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DIST := dist
CACHE := $(CURDIR)/.cache
CONSTRAINTS := configs/constraints.txt
# Modules are compiled when they are first imported, also where the environment says to write no bytecode: of the
# thousands that torch and transformers bring, a run imports a few hundred, and compiling all takes longer than installing.
PIP_ARGS := bin/python -m pip --quiet --disable-pip-version-check install --no-compile --constraint $(CONSTRAINTS)
PIP := $(VENV)/$(PIP_ARGS)
unexport PYTHONDONTWRITEBYTECODE

export PIP_CACHE_DIR := $(CACHE)/pip
export XDG_CACHE_HOME := $(CACHE)
export HF_HOME := $(CACHE)/huggingface
export HF_HUB_OFFLINE := 1
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
export PRE_COMMIT_HOME := $(CACHE)/pre-commit
export PYTEST_ADDOPTS += -o "cache_dir=$(CACHE)/pytest"
export RUFF_CACHE_DIR := $(CACHE)/ruff
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/torchinductor
export TRITON_HOME := $(CACHE)

.PHONY: demo demo-ranks test docs lint hooks wheel gpu-check clean help

help:
	@sed -n 's/^#//; 1,6p' $(firstword $(MAKEFILE_LIST))
	@echo ' also: make demo-ranks (two ranks print what one prints), make docs (into .cache/site), make lint, make hooks (pre-commit), make wheel, make gpu-check, make clean'

demo: $(VENV)/.demo
	@$(BIN)/python tests/demo.py demo

demo-ranks: $(VENV)/.demo
	@$(BIN)/python -m tests.demo_ranks demo-ranks

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal --durations 25 --durations-min 5 $(PYTEST_ARGS)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build # not --quiet, which hides warnings from --strict
	@echo 'wrote .cache/site; open .cache/site/index.html'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python
	$(BIN)/python -c 'import seekforge; from importlinter.cli import lint_imports_command; lint_imports_command()' \
		--no-logo --cache-dir "$(CACHE)/import-linter" # imported first: the three source roots are one package then

hooks: $(VENV)/.dev
	$(BIN)/pre-commit install

wheel: $(VENV)/.dev
	$(BIN)/python -m build --wheel --no-isolation --outdir $(DIST) .

# On a machine with a GPU: compile every kernel for it, compare all operators, walk whole programs (needs torch with CUDA:
# the default index has it on Linux), time the real shapes into gpu-report/, then the tiny cases under compute-sanitizer
# where that is installed; and engines that ONNX Runtime runs through CUDA, by parity. With several GPUs also engines of several ranks, whose sums go through NCCL.
SM ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
GPU_CHECK := $(BIN)/python -m tests.gpu.check
GPU_FOLDER := $(CACHE)/gpu-check
# onnxruntime-gpu overwrites files of onnxruntime, which .venv has
ORT_CUDA := $(CACHE)/ort-cuda

gpu-check: $(VENV)/.gpu
	@test -n "$(SM)" || { echo 'error: no GPU here (nvidia-smi lists none); make gpu-check SM=90' >&2; exit 2; }
	$(GPU_CHECK) compile $(GPU_FOLDER) --sm $(SM)
	$(GPU_CHECK) run $(GPU_FOLDER) --only tiny
	$(GPU_CHECK) walk $(GPU_FOLDER)
	$(GPU_CHECK) run $(GPU_FOLDER) --only real --report gpu-report
	$(MAKE) --no-print-directory $(ORT_CUDA)/.installed
	$(ORT_CUDA)/bin/python -m tests.gpu.ort_cuda $(GPU_FOLDER)/ort-cuda
	@if command -v compute-sanitizer >/dev/null; then \
		compute-sanitizer --error-exitcode 1 $(GPU_CHECK) run $(GPU_FOLDER) --only tiny; \
	else echo 'compute-sanitizer is not installed: skipped'; fi
	@if [ "$$(nvidia-smi --list-gpus 2>/dev/null | wc -l)" -gt 1 ]; then \
		$(PIP) --no-build-isolation --editable '.[dev,gpu,nccl]' && $(BIN)/python -m pytest -m gpu -k several_real_gpus tests/runtime/backends/tensorrt; \
	else echo 'one GPU: engines of several ranks are not run'; fi

clean:
	rm -rf $(VENV) .cache demo demo-ranks dist

# The stamps: a step is done again when what it reads has changed. torch comes first and alone, because its index
# (TORCH_INDEX) is asked for nothing else; the docs need none.
$(VENV)/.python: $(CONSTRAINTS)
	@rm -f $(VENV)/.python $(VENV)/.base $(VENV)/.demo $(VENV)/.dev $(VENV)/.docs $(VENV)/.ci $(VENV)/.gpu
	@set -e; \
	for python in $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11 python); do \
		if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then \
			echo "creating $(VENV) with $$($$python --version)"; \
			$$python -m venv --clear $(VENV); \
			break; \
		fi; \
	done; \
	test -x $(BIN)/python || { \
		echo 'error: no Python 3.11 to 3.14 here; make ... PYTHON=/path/to/python3' >&2; exit 2; }
	@$(PIP) pip hatchling setuptools # what builds seekforge and the source-only packages: no build isolation below
	@touch $@

$(VENV)/.base: $(VENV)/.python
	@echo 'installing torch'
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps torch
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	@echo 'installing seekforge: exporter, CPU engine, server; transformers to compare with, and a client'
	@$(PIP) --no-build-isolation --editable '.[export,cpu,serve]' transformers openai
	@touch $@

$(VENV)/.docs: $(VENV)/.python pyproject.toml
	@echo 'installing what makes the docs'
	@$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	@echo 'installing seekforge with the development tools'
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# Both at once, which asks the index and reads the packages' metadata once.
$(VENV)/.ci: $(VENV)/.base pyproject.toml
	@echo 'installing seekforge with the development tools and what makes the docs'
	@$(PIP) --no-build-isolation --editable '.[dev,docs]'
	@touch $(VENV)/.dev $(VENV)/.docs $@

$(VENV)/.gpu: $(VENV)/.dev
	@echo 'installing what launches kernels'
	@$(PIP) --no-build-isolation --editable '.[dev,gpu]'
	@touch $@

$(ORT_CUDA)/.installed: $(VENV)/.python pyproject.toml
	@echo 'installing what runs engines through CUDA, into $(ORT_CUDA)'
	@$(BIN)/python -m venv --clear $(ORT_CUDA)
	@$(ORT_CUDA)/$(PIP_ARGS) pip hatchling
	@$(ORT_CUDA)/$(PIP_ARGS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps torch
	@$(ORT_CUDA)/$(PIP_ARGS) --no-build-isolation --editable '.[export,ort-cuda]'
	@touch $@
