# make run     sets up what is missing, builds, exports the demo model and streams text from PROMPT
# make test    the same set-up, then every test: C++, C++ under sanitizers, Python
# make bench   speed of the demo model
# make lint    ruff, mypy, clang-format, clang-tidy
# make format  rewrites the sources as lint wants them
# make clean   removes what was built and exported; make distclean also .venv
#
# PYTHON=... names the Python (3.11 or 3.12) to make .venv with; ARGS=... adds options to qwen_runner.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: run test test-cpp test-sanitize test-python bench lint format clean distclean
export PYTHON

VENV := .venv
BIN := $(VENV)/bin
BUILD := build/product
PROGRAM := programs/demo
PROMPT ?= In the beginning
ARGS ?=
# A compiler's new warning stops CI, not a newcomer.
WARNINGS_AS_ERRORS := $(if $(CI),ON,OFF)
STAGE := . tools/stage.sh; stage

cpp_sources := $(shell find runner kernels -name '*.cpp' -o -name '*.h' -o -name '*.inc' -o -name '*.map' -o -name CMakeLists.txt)
export_sources := $(shell find export kernels -name '*.py') runner/python/qwen_runner/chat_jinja.py $(wildcard demo/*.json demo/*.jinja demo/*.safetensors)

run: $(PROGRAM)/manifest.json
	@echo 'qwen_runner --program $(PROGRAM) --prompt "$(PROMPT)" $(ARGS)' >&2
	@$(BIN)/qwen_runner --program $(PROGRAM) --prompt "$(PROMPT)" $(ARGS)

# --- Set-up: .venv/.run, .venv/.test, .venv/.dev are the purposes it is ready for ------------------------------------

$(VENV)/.%: pyproject.toml tools/setup.sh
	@tools/setup.sh $*

# Editable: a change of Python needs no build, a change of C++ an incremental one.
$(VENV)/.installed: pyproject.toml CMakeLists.txt $(cpp_sources) | $(VENV)/.run
	@$(STAGE) "build" build/log/build.txt $(BIN)/python -m pip --disable-pip-version-check install -v --no-deps \
	  --no-build-isolation -C build-dir=$(BUILD) -C cmake.define.QWEN_BUILD_TESTS=ON \
	  -C cmake.define.CMAKE_COMPILE_WARNING_AS_ERROR=$(WARNINGS_AS_ERRORS) -e .
	@grep -oE 'CUDA .*(CPU only|cpu target only)' build/log/build.txt | tail -n 1
	@touch $@

$(PROGRAM)/manifest.json: $(VENV)/.installed $(export_sources)
	@echo "export: demo -> $(PROGRAM)"
	@$(BIN)/python -m qwen_runner.export demo --output $(PROGRAM) --target cpu --quantize int4
	@touch $@

# --- Tests -----------------------------------------------------------------------------------------------------------

test: $(VENV)/.test test-cpp test-sanitize test-python

test-cpp: $(VENV)/.installed
	@$(STAGE) "build: C++ tests" build/log/tests.txt $(BIN)/cmake --build $(BUILD) --target runner_tests
	$(BUILD)/runner_tests --gtest_brief=1

test-sanitize: $(VENV)/.run
	@$(STAGE) "build: configure for sanitizers" build/log/sanitize-configure.txt $(BIN)/cmake -S . -B build/sanitize \
	  -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DQWEN_SANITIZE=ON -DQWEN_BUILD_TESTS=ON -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1"
	@$(STAGE) "build: C++ tests with sanitizers" build/log/sanitize.txt $(BIN)/cmake --build build/sanitize \
	  --target runner_tests
	build/sanitize/runner_tests --gtest_brief=1

test-python: $(VENV)/.test $(PROGRAM)/manifest.json
	$(BIN)/python -m pytest -n 2 --dist loadfile

bench: $(PROGRAM)/manifest.json
	$(BIN)/qwen_runner bench $(PROGRAM) $(ARGS)

# --- Style -----------------------------------------------------------------------------------------------------------

cpp_files = $(shell find runner kernels tests -name '*.cpp' -o -name '*.h' -o -name '*.inc')

lint: $(VENV)/.dev $(VENV)/.installed
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
	rm -rf build programs $(VENV)/.installed

distclean: clean
	rm -rf $(VENV)
