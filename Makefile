# Two commands set up everything they need in .venv: `make demo` and `make test`. `make` alone lists the others.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -c '^GPU')

# Without a GPU: the CPU build of torch, pinned, because a range picks a build with gigabytes of CUDA libraries.
# With one: the torch of $(PYTHON) if it has one, else the newest.
ifeq ($(GPU),0)
TORCH ?= torch==2.13.0
TORCH_FROM ?= --extra-index-url https://download.pytorch.org/whl/cpu --retries 1 --timeout 30
else
TORCH ?= torch>=2.6
TORCH_FROM ?=
VENV_FLAGS := $(shell $(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)
endif


BIN := $(VENV)/bin
RUN := $(BIN)/python
PIP := $(RUN) -m pip install -qq --disable-pip-version-check
LOG := $(VENV)/log
SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

# OpenMP threads that wait should sleep: spinning costs a scheduler slice per operation where another process holds a core. Back to
# back, with one core of two taken, the digits rollout took 10.0 s like this and 28.8 s without. Benchmarks are left as they are.
demo test test-unit test-triton test-package test-demo: export OMP_WAIT_POLICY ?= passive

# What the installation recorded of the compiled modules.
BUILD_REPORT := import json; [print("fastflow._" + name, "compiled" if r["ok"] else "not compiled: " + r["reason"]) \
  for name, r in json.load(open("fastflow/_build.json")).items()]

say = @echo '== $(1)'

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/demo.stamp ## dense-reward rollout of real handwritten digits, with pictures and a report under out/
	@$(RUN) -m fastflow rollout --model digits --steps 10 --group 16 --dense all --out out/digits

.PHONY: test
test: $(VENV)/dev.stamp ## lint, types, all tests and a short demo: what CI runs
	@rm -rf $(LOG)
	@$(MAKE) -j2 -O lint types test-demo
	@$(MAKE) -j2 -O test-package test-compile
	@$(MAKE) test-triton $(if $(filter-out 0,$(GPU)),test-gpu) test-unit
	$(call say,passed)
	@tail -qn 1 $(LOG)/*.log

.PHONY: lint
lint: $(VENV)/dev.stamp ## style and the rules of the house
	$(call say,lint)
	@PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files

.PHONY: types
types: $(VENV)/dev.stamp ## mypy, strict, on fastflow/
	$(call say,types)
	@$(RUN) -m mypy

.PHONY: test-unit
test-unit: $(VENV)/dev.stamp | $(LOG) ## unit tests, a file to a process
	$(call say,unit tests)
	@$(RUN) -m pytest -q -n auto --maxprocesses 4 --dist loadfile --ignore=tests/packaging --ignore=tests/triton 2>&1 \
	  | tee $(LOG)/unit.log

.PHONY: test-triton
test-triton: $(VENV)/dev.stamp | $(LOG) ## Triton kernels, interpreted on the CPU
	$(call say,Triton kernels in the interpreter)
	@TRITON_INTERPRET=1 $(RUN) -m pytest -q -n auto --maxprocesses 4 --dist load tests/triton 2>&1 | tee $(LOG)/triton.log

.PHONY: test-compile
test-compile: $(VENV)/dev.stamp | $(LOG) ## Triton kernels compiled for five GPU architectures; a register spill fails
	$(call say,Triton kernels compiled for sm_80 sm_89 sm_90 sm_100 sm_120)
	@$(RUN) -m fastflow compile --backend triton --no-sass --out $(LOG)/kernels 2>&1 | tee $(LOG)/compile.log

# On an NVIDIA GPU: .venv if it is there, else PYTHON as it is, with the CUDA module compiled in place for the GPU at hand.
GPU_RUN = $(or $(wildcard $(RUN)),$(PYTHON))
GPU_SPREAD = $(shell $(GPU_RUN) -c 'import xdist' 2>/dev/null && echo '-n 8')
NO_GPU = echo 'make: no NVIDIA GPU here; nothing to do'
RESULTS ?= bench/results
SHA ?=
BENCH_GPU = timeout $(1) $(GPU_RUN) -m bench $(2) --device cuda --results $(RESULTS) $(if $(SHA),--sha $(SHA))
TEST_GPU = timeout --signal=INT --kill-after=10 $(1) $(GPU_RUN) -m pytest -q $(2)

# Parts that run whether or not one before them failed: `run NAME COMMAND...`, and at the end all_went_well.
PARTS = failed=; run() { name=$$1; shift; echo "== $$name"; "$$@" || failed="$$failed $$name"; }; \
  all_went_well() { test -z "$$failed" || { echo "make: not all went well:$$failed"; exit 1; }; }

build/gpu.stamp: $(SOURCES)
	@mkdir -p $(@D)
	$(call say,compiling for this GPU)
	@$(GPU_RUN) setup.py -q build_ext --inplace
	@$(GPU_RUN) -c '$(BUILD_REPORT)'
	@touch $@

# The kernels first: what runs them can only be as right as they are. Each part has its time.
.PHONY: test-gpu
test-gpu: $(if $(filter-out 0,$(GPU)),build/gpu.stamp) ## Triton and CUDA kernels and rollouts on an NVIDIA GPU, with .venv or PYTHON as it is
	@test $(GPU) -gt 0 || { echo 'make: no NVIDIA GPU here'; exit 1; }
	@$(PARTS); \
	run kernels $(call TEST_GPU,290,$(GPU_SPREAD) tests/triton tests/cuda --ignore=tests/cuda/test_compile.py); \
	run rollouts $(call TEST_GPU,160,-m gpu tests/rollout tests/rewards tests/dynamics); \
	all_went_well

# Each part has its time and writes as it goes, so that one which fails leaves the others' figures. --seconds count from the
# start of the process, and leave what was begun before they are over the time to end.
.PHONY: bench-gpu
bench-gpu: $(if $(filter-out 0,$(GPU)),build/gpu.stamp) ## all GPU benchmarks, 9 minutes at most, compiling included; CSV files into RESULTS (bench/results)
ifeq ($(GPU),0)
	@$(NO_GPU)
else
	@$(PARTS); \
	run step $(call BENCH_GPU,140,step --seconds 120); \
	run log_prob_backward $(call BENCH_GPU,35,log_prob_backward --seconds 25); \
	run sd3.5 $(call BENCH_GPU,190,rollout --model sd3.5-medium-shape --rows 8 --repeats 3 --seconds 175); \
	run policy $(call BENCH_GPU,25,policy --seconds 15); \
	run matching $(call BENCH_GPU,25,matching --seconds 15); \
	run flux $(call BENCH_GPU,60,rollout --model flux-shape --rows 1 --repeats 1 --seconds 50 --no-graphs); \
	all_went_well
endif

.PHONY: bench-gpu-compiled
bench-gpu-compiled: $(if $(filter-out 0,$(GPU)),build/gpu.stamp) ## the dense rollout with the network under torch.compile, 9 minutes at most
ifeq ($(GPU),0)
	@$(NO_GPU)
else
	@$(call BENCH_GPU,470,rollout --model sd3.5-medium-shape --rows 8 --repeats 5 --seconds 440 --compile)
endif

.PHONY: sanitize-gpu
SANITIZE ?= memcheck racecheck
SANITIZED := not graph and not two_to_the_31 and not allocations and not peak_memory
sanitize-gpu: $(if $(filter-out 0,$(GPU)),build/gpu.stamp) ## CUDA kernels under compute-sanitizer on an NVIDIA GPU; SANITIZE=memcheck for one tool
ifeq ($(GPU),0)
	@$(NO_GPU)
else
	@command -v compute-sanitizer >/dev/null || { echo 'make: no compute-sanitizer here (it comes with the CUDA toolkit)'; exit 1; }
	@$(PARTS); \
	for tool in $(SANITIZE); do \
	  run $$tool env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 500 compute-sanitizer --tool $$tool --error-exitcode 9 \
	    --report-api-errors no $(GPU_RUN) -m pytest -q -x -m gpu tests/cuda -k '$(SANITIZED)'; \
	done; \
	all_went_well
endif

.PHONY: plots
plots: $(VENV)/dev.stamp ## pictures of bench/results for the README
	@$(RUN) -m bench plot

.PHONY: test-package
test-package: $(VENV)/dev.stamp | $(LOG) ## wheel in a clean environment, editable install, bare checkout
	$(call say,package)
	@$(RUN) -m pytest -q tests/packaging 2>&1 | tee $(LOG)/package.log

.PHONY: test-demo
test-demo: $(VENV)/dev.stamp | $(LOG) ## the demo in a short setting
	$(call say,demo in a short setting)
	@$(RUN) -m fastflow rollout --model digits --prompts 3,8 --group 4 --steps 5 --out $(LOG)/demo --no-progress

.PHONY: bench
bench: $(VENV)/dev.stamp ## the step benchmark on this machine
	@$(RUN) -m fastflow bench step

.PHONY: import-time
import-time: $(VENV)/demo.stamp ## what `import fastflow` adds to `import torch`
	@$(RUN) tests/packaging/import_time.py

.PHONY: clean
clean: ## remove what was built and written, .venv too
	@rm -rf $(VENV) build dist out *.egg-info fastflow/*.so fastflow/_build.json
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Set-up. torch goes in first and alone (what it needs follows), so that the rest finds its requirement met.
$(VENV)/torch.stamp:
	$(call say,setting up $(VENV))
	@command -v $(PYTHON) >/dev/null || { echo 'make: $(PYTHON) is not there; PYTHON=... names another'; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo 'make: Python 3.10 or newer is needed; PYTHON=... names another'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo 'make: $(PYTHON) lacks venv (on Debian: apt install python3-venv)'; exit 1; }
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@$(RUN) -c 'import torch' 2>/dev/null || $(PIP) --no-deps $(TORCH_FROM) '$(TORCH)'
	@touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(call say,installing fastflow and what the demo needs)
	@$(PIP) --editable '.[demo]'
	@$(RUN) -c '$(BUILD_REPORT)'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(call say,installing fastflow and what the tests need)
	@$(PIP) --editable '.[dev]'
	@$(RUN) -c '$(BUILD_REPORT)'
	@touch $@ $(VENV)/demo.stamp

$(LOG):
	@mkdir -p $@
