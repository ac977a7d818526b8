# Each target installs what it needs into VENV first (.ci/install; a moment when nothing changed).
VENV   ?= .venv
PYTHON ?= python3
ARGS   ?=
ONLY   ?= $(patsubst benchmarks/%.py,%,$(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))))

SHELL         := bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install quickstart test lint format bench clean

bin     := $(abspath $(VENV))/bin
install = PYTHON="$(PYTHON)" .ci/install "$(VENV)"
demo_languages := ar,de,en,es,ru,zh
scripts := $(wildcard .ci/* slurm/*.sbatch slurm/*.sh tests/*.sh docs/studies/*/*.sh)

# No GPU, no model hub, one thread per rank; DeepSpeed's compiled parts in a folder of this checkout (a lock left by a killed
# build would hang every later run), found with the ninja of VENV.
quickstart test bench: export PATH := $(bin):$(PATH)
quickstart test bench: export CUDA_VISIBLE_DEVICES :=
quickstart test bench: export HF_HUB_OFFLINE := 1
quickstart test bench: export OMP_NUM_THREADS := 1
quickstart test bench: export TOKENIZERS_PARALLELISM := false
quickstart test bench: export TORCH_EXTENSIONS_DIR := $(CURDIR)/.cache/torch_extensions

help:        ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20
	@echo "  Variables: VENV=$(VENV) PYTHON=$(PYTHON) ARGS= (passed to pytest)"

install:     ## a virtual environment with everything for tests, in VENV
	@$(install) cpu dev

quickstart:  ## demo data, a tiny model, four arms and a QLoRA run on two processes, a report; its path is printed last
	@$(install) cpu
	[ -d data/demo/train ] || "$(bin)/python" launch/prepare.py demo --split train --languages $(demo_languages) --out data/demo/train
	[ -d data/demo/test ] || "$(bin)/python" launch/prepare.py demo --split test --languages $(demo_languages) --out data/demo/test
	[ -d models/tiny ] || "$(bin)/python" launch/tiny_model.py data/demo/train --layers 1 --vocabulary 5000 --out models/tiny
	"$(bin)/python" launch/study.py run launch/configs/quickstart.yaml

test:        ## all tests, on the CPU, as many files at a time as there are cores; ARGS="-k loss" picks some
	@$(install) cpu dev
	"$(bin)/python" -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint:        ## ruff, mypy, shell scripts; changes nothing
	@$(install) cpu dev
	"$(bin)/ruff" check .
	"$(bin)/ruff" format --check .
	"$(bin)/mypy"
	@for script in $(scripts); do echo "bash -n $$script"; bash -n "$$script"; done
	@if command -v shellcheck >/dev/null; then echo "shellcheck $(scripts)"; shellcheck --shell=bash $(scripts); \
	 else echo "SKIPPED: shellcheck isn't installed: shell scripts were only parsed (.ci/run installs it)" >&2; fi

format:      ## sort imports, mend what ruff can mend, format
	@$(install) cpu dev
	"$(bin)/ruff" check --fix .
	"$(bin)/ruff" format .

bench:       ## every benchmark, one after another, numbers in runs/bench/; ONLY="step padding" picks some, ARGS are theirs
	@$(install) cpu dev bench
	@mkdir -p runs/bench
	@for benchmark in $(ONLY); do \
	   echo "==== $$benchmark"; "$(bin)/python" "benchmarks/$$benchmark.py" --json "runs/bench/$$benchmark.json" $(ARGS); done

clean:       ## caches and build results; data/, models/, runs/ and VENV stay
	rm -rf .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist ./*.egg-info
	find hybrid_scale launch tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
