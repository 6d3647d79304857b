# `make demo` trains a real model on this machine; `make test` checks everything. Both make their environment first.
#
#   make demo ARGS="seed=2"    Hydra overrides for the run
#   make preflight RECIPE=safework_72b ARGS="algorithm=cpgd"     is this run possible, and would Slurm take it?
#   make preflight RECIPE=safework_72b ARGS="stage=ladder"       all stages, before the first has run
#   make env EXTRA=gpu         the environment of a GPU machine: .[gpu] in place of .[cpu]; all targets then keep it
#   make env-rehearsal         the same beside .venv, on any machine
#   make env PYTHON=/path/to/python3.12

VENV := .venv
# The extra that the environment was made with, or whose making was broken off: no target replaces it by another.
MADE_WITH := $(lastword $(subst -, ,$(notdir $(wildcard $(VENV)/.install*-*))))
EXTRA ?= $(or $(MADE_WITH),cpu)
ARGS ?=
PYTHON ?=
RECIPE ?= demo

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(EXTRA)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:
# Some containers set it: then each of a run's processes compiles the thousands of modules that it imports anew.
unexport PYTHONDONTWRITEBYTECODE
.PHONY: demo test test-fast test-durations mutation lint figures gpu-check gpu-check-node gpu-check-two-nodes gpu-rehearsal \
  slurm-check kill-check preflight env env-rehearsal clean

demo: $(STAMP)
	@exec $(PY) -m recipes.train recipe=demo $(ARGS)

PYTEST := $(PY) -m pytest -q --no-loadscope-reorder --ignore=tests/gpu
# Three processes on two cores: the one with Slurm's tests mostly waits.
ALL_TESTS := $(PYTEST) -n 3

test: lint
	@echo "==> pytest"
	exec $(ALL_TESTS) --durations=15

# What a change of an algorithm, a verifier or a setting touches: no run, no engine, no ranks. Each process imports
# everything, so two on two cores are faster than three.
test-fast: $(STAMP)
	@exec $(PYTEST) -n 2 --fast

# The tests' seconds, by which both share them out. On an idle machine.
test-durations: $(STAMP)
	@exec $(ALL_TESTS) --record-durations

# Mutants of the algorithms, the verifiers and the loop that no test fails on; hours for all. A part:
# ARGS="recipes.algorithms.*"; drawn by chance: ARGS="$$(.venv/bin/python -m tests.mutation_sample 600 1)".
# `.venv/bin/mutmut show NAME` prints a survivor.
mutation: $(STAMP)
	@export OMP_NUM_THREADS=1
	$(VENV)/bin/mutmut run --max-children 2 $(ARGS)
	$(VENV)/bin/mutmut results

lint: $(STAMP)
	@echo "==> ruff, mypy"
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# Which files of benchmarks/results are not of the present code.
figures: $(STAMP)
	@exec $(PY) -m benchmarks.figures

slurm-check: $(STAMP)
	@exec $(PY) -m pytest -q tests/slurm

# A run is killed at 20 random moments and resumed each time: ARGS="--seed 2".
kill-check: $(STAMP)
	@exec $(PY) -m tests.recipes.kill_check $(ARGS)

# The rungs of docs/gpu_checks.md: one GPU, eight of one node, two nodes from a login node. A group of checks that fails
# ends the first: what comes after it needs it.
GPU_CHECK = $(PY) -m pytest -q --gpu-record=benchmarks/results/gpu
ONE_GPU := "trainer" "memory decoding" "rollout graphs fp8_rollout fp8_cache speculation" "sleep colocation" "recipe" "fp8"

gpu-check: $(STAMP)
	@for group in $(ONE_GPU); do
	  echo "==> $$group"
	  $(GPU_CHECK)/one_gpu.json $$(printf 'tests/gpu/test_%s.py ' $$group)
	done

gpu-check-node: $(STAMP)
	@exec $(GPU_CHECK)/node.json tests/gpu/test_node.py tests/gpu/test_node_recipe.py

gpu-check-two-nodes: $(STAMP)
	@exec $(GPU_CHECK)/two_nodes.json tests/gpu/test_two_nodes.py

# The CUDA side without a GPU, part of `make test`: what Megatron-Core and we call in the GPU's packages, Transformer
# Engine's layers with kernels computed by torch, tests/gpu on a fake GPU, the weight sync over a fake driver.
REHEARSAL := tests/te tests/test_vllm_contract.py tests/rewards/test_serve_contract.py tests/rollout/test_fake_cuda.py tests/rollout/test_gpu_engine.py
REHEARSAL += tests/test_gpu_rehearsal.py

gpu-rehearsal: $(STAMP)
	@exec $(PY) -m pytest -q $(REHEARSAL)

# Takes the environment that is there, which on a cluster may be another than EXTRA's.
preflight:
	@[[ -x $(PY) ]] || { echo "error: no $(PY); make it first: make env EXTRA=gpu" >&2; exit 1; }
	exec $(PY) -m recipes.preflight recipe=$(RECIPE) $(ARGS)

env: $(STAMP)

# The whole environment of a GPU machine, on any machine and beside .venv; `rm -r build/gpu_env` removes it.
env-rehearsal:
	@exec $(MAKE) env EXTRA=gpu VENV=build/gpu_env

# What was compiled for the GPU environment stays in wheels/.
clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis mutants
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Finds a Python, which then makes the environment (setup_env.py). Python 3.12 comes first because it is the version that
# the results were made with. A pyenv shim can be on the PATH and still fail, hence each candidate is run.
$(STAMP): setup.py pyproject.toml pins.txt
	@fail() { printf 'error: %s\n' "$$1" >&2; exit 1; }
	works() { "$$1" -c "import sys; sys.exit(sys.version_info[:2] != (3, $$2))" 2> /dev/null; }
	complete() { "$$1" -c 'import bz2, ctypes, ensurepip, lzma, sqlite3, ssl, venv' 2> /dev/null; }
	python= incomplete=
	for minor in 12 13 14; do
	  for candidate in $(or $(PYTHON),python3.$$minor "$${PYENV_ROOT:-$${HOME:-}/.pyenv}"/versions/3.$$minor.*/bin/python3 python3); do
	    works "$$candidate" $$minor || continue
	    if complete "$$candidate"; then python=$$candidate; break 2; fi
	    incomplete=$$candidate
	  done
	done
	[[ -n $$python || -z $$incomplete ]] || fail "$$incomplete lacks standard modules (one of bz2, ctypes, ensurepip, lzma,\
	 sqlite3, ssl, venv); on Debian: apt-get install python3-venv"
	[[ -n $$python ]] || fail "no Python 3.12, 3.13 or 3.14 $(if $(PYTHON),at PYTHON=$(PYTHON),on the PATH or under pyenv);\
	 install one (pyenv install 3.12) or name it: make env PYTHON=/path/to/python3.12"
	exec "$$python" setup_env.py --extra $(EXTRA) --venv $(VENV)
