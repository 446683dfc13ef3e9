# make run       sets up what is missing, builds, exports the demo model and streams text from PROMPT
# make test      the same set-up, then every test: C++, C++ under sanitizers, Python (CUDA kernels emulated, where the toolkit is)
# make test-gpu  the tests of the cuda target that need a GPU, on this machine's
# make bench     speed of the kernels and of PROGRAM, added to benchmarks/RESULTS.md
# make lint      ruff, mypy, clang-format, clang-tidy
# make format    rewrites the sources as lint wants them
# make clean     removes what was built and the demo's program; make distclean also .venv
#
# PYTHON=... names the Python (3.11 or 3.12) to make .venv with; PROGRAM=... another program than the demo's;
# ARGS=... adds options to qwen_runner. CUDA_ARCHITECTURES="80-real;90a-real" names the GPUs to compile kernels for.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: run gpu test test-cpp test-sanitize test-python test-gpu bench lint format clean distclean
export PYTHON

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/product
DEMO := programs/demo
PROGRAM ?= $(DEMO)
PROMPT ?= In the beginning
ARGS ?=
# A compiler's new warning stops CI, not a newcomer.
WARNINGS_AS_ERRORS := $(if $(CI),ON,OFF)
# The kernels of a GPU in sight (empty: CMake asks it). Without one nobody runs them here: one architecture shows that
# they compile, four would take minutes.
CUDA_ARCHITECTURES ?= $(if $(wildcard /dev/nvidiactl /dev/dxg),,90a-real)
STAGE := . tools/stage.sh; stage

cpp_names := -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h' -o -name '*.inc'
cpp_sources := $(shell find runner kernels $(cpp_names) -o -name '*.map' -o -name CMakeLists.txt) \
  $(wildcard tests/kernels/cuda_primitives*)
export_sources := $(shell find export kernels -name '*.py') runner/python/qwen_runner/chat_jinja.py $(wildcard demo/*.json demo/*.jinja demo/*.safetensors)

# What runs alone is built without what tests need, until something asks for that.
built := $(VENV)/.built-$(if $(or $(wildcard $(VENV)/.built-test),$(filter-out run,$(MAKECMDGOALS))),test,run)
# Only the demo's program is made here; another is the user's.
program := $(if $(filter $(DEMO),$(PROGRAM)),$(DEMO)/manifest.json)

run: $(built) $(program)
	@echo 'qwen_runner --program $(PROGRAM) --prompt "$(PROMPT)" $(ARGS)' >&2
	@$(BIN)/qwen_runner --program $(PROGRAM) --prompt "$(PROMPT)" $(ARGS)

# --- Set-up: .venv/.run, .venv/.test, .venv/.dev are the purposes it is ready for ------------------------------------

$(VENV)/.%: pyproject.toml tools/setup.sh
	@tools/setup.sh $*

# Editable: a change of Python needs no build, a change of C++ an incremental one.
$(VENV)/.built-run $(VENV)/.built-test: pyproject.toml CMakeLists.txt $(cpp_sources) | $(VENV)/.run
	@$(STAGE) "build" build/log/build.txt $(BIN)/python -m pip --disable-pip-version-check install -v --no-deps \
	  --no-build-isolation -C build-dir=$(BUILD) -C cmake.define.QWEN_BUILD_TESTS=$(if $(filter %-test,$@),ON,OFF) \
	  -C 'cmake.define.QWEN_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)' \
	  -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=$(WARNINGS_AS_ERRORS) -e .
	@grep -oE 'CUDA .*(CPU only|kernels for .*)' build/log/build.txt | tail -n 1
	@touch $@

$(DEMO)/manifest.json: $(export_sources) | $(built)
	@echo "export: demo -> $(DEMO)"
	@$(BIN)/python -m qwen_runner.export demo --output $(DEMO) --target cpu --quantize int4
	@touch $@

# --- Tests -----------------------------------------------------------------------------------------------------------

test: $(VENV)/.test test-cpp test-sanitize test-python

test-cpp: $(built)
	@$(STAGE) "build: C++ tests" build/log/tests.txt $(BIN)/cmake --build $(BUILD) --target runner_tests
	$(BUILD)/runner_tests --gtest_brief=1

test-sanitize: $(VENV)/.run
	@$(STAGE) "build: configure for sanitizers" build/log/sanitize-configure.txt $(BIN)/cmake -S . -B build/sanitize \
	  -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DQWEN_SANITIZE=ON -DQWEN_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1"
	@$(STAGE) "build: C++ tests with sanitizers" build/log/sanitize.txt $(BIN)/cmake --build build/sanitize \
	  --target runner_tests
	build/sanitize/runner_tests --gtest_brief=1

# One thread a process: there are two, and a thread that waits for a busy core spins.
test-python: $(VENV)/.test $(built) $(DEMO)/manifest.json
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# Before anything is installed or built; then again what was.
gpu:
	@nvidia-smi -L 2>/dev/null | grep -q '^GPU' || \
	  { echo "make test-gpu needs an NVIDIA GPU: nvidia-smi finds none on this machine" >&2; exit 1; }

# Those that fill the card's memory or measure it run alone; the first needs QWEN_FULL_PROGRAM, a program of the full shape.
whole_gpu_tests := tests/runner/test_cuda_full.py tests/runner/test_cuda_faults.py

test-gpu: gpu $(VENV)/.test $(built) test-cpp
	@$(BIN)/python tools/gpu.py
	OMP_NUM_THREADS=2 $(BIN)/python -m pytest -n 4 --dist worksteal -rs --no-fold-skipped -k 'not emulated' \
	  $(filter-out $(whole_gpu_tests),$(wildcard tests/kernels/test_cuda_*.py tests/runner/test_cuda_*.py))
	$(BIN)/python -m pytest -rs --no-fold-skipped -k 'not emulated and not architecture' $(whole_gpu_tests)

bench: $(VENV)/.bench $(built) $(program)
	$(BIN)/python benchmarks/record.py --program $(PROGRAM) $(ARGS)

# --- Style -----------------------------------------------------------------------------------------------------------

cpp_files = $(shell find runner kernels tests $(cpp_names))

lint: $(VENV)/.dev $(built)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/typing && mkdir -p build/typing/qwen_runner
	@ln -s $(CURDIR)/runner/python/qwen_runner/* $(CURDIR)/export $(CURDIR)/kernels build/typing/qwen_runner/
	cd build/typing && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p qwen_runner
	@$(BIN)/clang-format --dry-run -Werror $(cpp_files) && echo "clang-format: $(words $(cpp_files)) files"
	@$(STAGE) "clang-tidy" build/log/tidy.txt $(BIN)/run-clang-tidy.py -quiet -p $(BUILD) -j 2 \
	  -extra-arg=-Wno-error -clang-tidy-binary $(BIN)/clang-tidy '$(CURDIR)/(runner|kernels)/.*\.cpp'

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(cpp_files)

clean:
	rm -rf build $(DEMO) $(VENV)/.built-*

distclean: clean
	rm -rf $(VENV)
