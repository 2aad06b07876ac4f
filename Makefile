# The main commands: `make bench`, `make demo` and `make test`. Each creates a virtual environment, installs, builds, and
# runs.
#
#   TORCH=torch==2.14.1   another torch    VENV=folder   another virtual environment    PYTHON=python3.12
TORCH ?= torch==2.13.0
VENV ?= .venv
PYTHON ?= python3
GPU_TORCH ?= torch==2.14.1
PYTEST_ARGS ?= -m "not slow"

BIN := $(VENV)/bin
CMAKE_BUILD := build/cmake-$(notdir $(abspath $(VENV)))
SOURCES := $(shell find csrc leaf_cuda -name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.cu*') \
           csrc/sources.txt setup.py pyproject.toml

PYTHON_SOURCES := benchmarks examples leaf_cuda tests setup.py
version_of = $(shell sed -n '/$(1)$$/{n;s/.*rev: v//p}' .pre-commit-config.yaml)
FORMATTERS = ruff==$(call version_of,ruff-pre-commit) clang-format==$(call version_of,mirrors-clang-format)

.PHONY: bench demo test test-cpp test-slow gpu-check report install lint format clean

bench: install
	$(BIN)/python benchmarks/bench_leaf.py --quick

# Trains on scikit-learn's digits: about a minute once it is built.
demo: install
	$(BIN)/python examples/paper_experiments.py --quick

test: install test-cpp
	$(BIN)/pytest -n 2 --dist loadfile $(PYTEST_ARGS)

# The tests that take long: planted bugs, tensors of more than 2^31 elements.
test-slow: install
	$(BIN)/pytest -m slow

test-cpp: $(VENV)/.installed
	$(BIN)/cmake -S . -B $(CMAKE_BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DCMAKE_BUILD_TYPE=Release \
	    -DCMAKE_PREFIX_PATH="$$($(BIN)/python -c 'import torch; print(torch.utils.cmake_prefix_path)')" > $(VENV)/cmake.log \
	    || { cat $(VENV)/cmake.log; exit 1; }
	$(BIN)/cmake --build $(CMAKE_BUILD)
	$(BIN)/ctest --test-dir $(CMAKE_BUILD) --output-on-failure --parallel 2

# Without a GPU, the script says so and exits with 3. Where Python has all that it needs, it can also be run directly.
gpu-check:
	@nvidia-smi -L > /dev/null 2>&1 || exec $(PYTHON) benchmarks/gpu_check.py
	$(MAKE) .venv-gpu/.dependencies VENV=.venv-gpu TORCH=$(GPU_TORCH)
	.venv-gpu/bin/python benchmarks/gpu_check.py

report: install
	$(BIN)/python benchmarks/report.py

install: $(VENV)/.installed

$(VENV)/.dependencies: pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" numpy
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel ninja cmake tabulate tqdm matplotlib \
	    pytest pytest-xdist hypothesis mpmath onnx onnxscript onnxruntime scikit-learn
	touch $@

# Not editable: the compiled module would lie in the source folder, and fit one torch version only.
$(VENV)/.installed: $(VENV)/.dependencies $(SOURCES)
	rm -rf build/lib*  # which setuptools adds to only: a module that is gone would be installed again
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps .
	touch $@

# Runs the linters and formatters as pre-commit does, in the versions that .pre-commit-config.yaml names.
lint format: $(VENV)/.dependencies
	$(BIN)/python -m pip install --quiet $(FORMATTERS)
	$(BIN)/ruff check $(if $(filter format,$@),--fix) .
	$(BIN)/ruff format $(if $(filter lint,$@),--check) $(PYTHON_SOURCES)
	find csrc tests benchmarks examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \
	    | xargs $(BIN)/clang-format $(if $(filter lint,$@),--dry-run -Werror,-i)

clean:
	rm -rf build dist .venv* *.egg-info
