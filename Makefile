PYTHON ?= python3
JOBS ?= 2

VENV := .venv
RUN := $(VENV)/bin
SOURCES := $(wildcard csrc/CMakeLists.txt csrc/*.h csrc/*.def csrc/bindings/* csrc/cpu/* csrc/onnxruntime/* build_tools/*.py)
CUDA_SOURCES := $(SOURCES) $(wildcard csrc/cuda/CMakeLists.txt csrc/cuda/*.cpp csrc/cuda/*.h csrc/cuda/*.cu*)
MINUTES ?= 6
# Rows of constraints/
OLDEST := torch2.11
NEWEST := torch2.14
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
# One thread a worker: torch's own threads would fight over the cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN)/python -m pytest -n $(JOBS)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all test-matrix mutants lint venv cuda gpu clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: venv  ## quantize a small Vim and show what it costs in accuracy
	$(RUN)/python examples/demo.py

test: lint  ## lint, then the tests that take seconds (JOBS=2 workers)
	$(PYTEST)

test-all: lint  ## lint, then every test that needs no GPU
	$(PYTEST) -m "not gpu" --hypothesis-profile=thorough

lint: venv  ## ruff, mypy, clang-format and the import rules
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports --no-logo
	find csrc tests/emulated -not -path "*/CMakeFiles/*" \( -name "*.h" -o -name "*.[ch]pp" -o -name "*.cu" -o -name "*.cuh" \) \
	  | xargs $(RUN)/clang-format --dry-run -Werror

# tests/test_environment.py fails where torch or torchvision is another than the row's.
test-matrix: .venv-$(OLDEST)/.installed .venv/.installed  ## the tests on the oldest and the newest torch (constraints/)
	PTQ4VM_CONSTRAINTS=constraints/$(OLDEST).txt $(MAKE) tests-only VENV=.venv-$(OLDEST)
	PTQ4VM_CONSTRAINTS=constraints/$(NEWEST).txt $(MAKE) tests-only VENV=.venv

.PHONY: tests-only
tests-only:
	$(PYTEST)

mutants: venv  ## mutation testing of the fast tests, hours (MUTANTS=250 draws so many; what is done is kept)
	$(RUN)/python -c 'import mutmut' 2>/dev/null || $(RUN)/python $(PIP_INSTALL) -e '.[mutants]' -c constraints/$(NEWEST).txt
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN)/python tests/mutants.py $(if $(MUTANTS),--sample $(MUTANTS)) $(ARGS)

venv: $(VENV)/.installed  ## .venv with the package and its development tools

# Minutes; TORCH_CUDA_ARCH_LIST and what csrc/cuda/CMakeLists.txt names besides say for which GPUs and with what.
cuda: venv  ## the kernels of GPUs too (needs nvcc, and no GPU)
	test -n "$$PTQ4VM_CUTLASS_DIR" || $(RUN)/python $(PIP_INSTALL) --no-deps nvidia-cutlass==4.2.0.0
	PTQ4VM_CUDA=1 $(RUN)/python $(PIP_INSTALL) --no-deps --force-reinstall -e .

# OFFLINE=1 takes PYTHON as it is, with torch, scikit-build-core and the rest installed, and needs no network.
GPU_PYTHON := $(if $(OFFLINE),$(PYTHON),$(RUN)/python)

gpu: ptq4vm/_C_cuda.so  ## on a machine with a GPU: build, test and time there (MINUTES=6, OFFLINE=1)
	@status=0; \
	$(GPU_PYTHON) -m pytest tests/gpu -m gpu -rs || status=$$?; \
	$(GPU_PYTHON) benchmarks/gpu.py --minutes $(MINUTES) || status=$$?; \
	exit $$status

ptq4vm/_C_cuda.so: $(CUDA_SOURCES)
ifdef OFFLINE
	PTQ4VM_CUDA=1 $(PYTHON) $(PIP_INSTALL) --no-deps --no-build-isolation -e .
else
	$(MAKE) cuda
endif
	@touch $@

# $(1) directory, $(2) row of constraints/. torch and torchvision come in one pass, since each torchvision fits one torch,
# and before the package, whose kernels are built with the headers of the torch that is there.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "ptq4vm needs Python 3.11 or newer, '$(PYTHON)' is not: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "installing into $(1) (torch is large, this takes minutes)"
	@$(PYTHON) -m venv $(1)
	@$(1)/bin/python $(PIP_INSTALL) -c constraints/$(2).txt torch torchvision
	@$(1)/bin/python $(PIP_INSTALL) -c constraints/$(2).txt -e '.[dev]'
	@touch $(1)/.installed
endef

.venv/.installed: pyproject.toml constraints/$(NEWEST).txt $(SOURCES)
	$(call install,.venv,$(NEWEST))

.venv-$(OLDEST)/.installed: pyproject.toml constraints/$(OLDEST).txt $(SOURCES)
	$(call install,.venv-$(OLDEST),$(OLDEST))

clean:  ## remove the environments, caches and built files
	rm -rf .venv .venv-* mutants build dist *.egg-info ptq4vm/_C_cpu.so ptq4vm/_C_cuda.so ptq4vm/_onnxruntime.so
	cd csrc && rm -rf .cmake .ninja_* .skbuild-info.json CMakeCache.txt CMakeFiles CMakeInit.txt build.ninja cmake_install.cmake cuda/CMakeFiles cuda/cmake_install.cmake
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
