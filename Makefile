# make demo      prints which answers are right, and the predicted P(knows): 2 to 4 minutes, depending on the CPU
# make test      the tests to run before every commit
# make test-all  every test, and the numbers once more as other CPUs round them
# make test-core the numeric tests alone, with CORE_FLAGS=--xla_cpu_max_isa=AVX2 as another CPU rounds
# make coverage  lines and branches that `make test` covers, in processes that tests start, too
# make docs      the API reference in build/api, from docstrings
# make notebooks runs the notebooks and stores their outputs
# make check     style and types

PYTHON ?= python3
VENV ?= .venv
# torch is what the parity tests compare with. Without it and lm-eval (TEST_EXTRAS=test) their tests are skipped.
TEST_EXTRAS ?= test,torch,lm-eval
PYTEST ?=
WORKERS ?= 2

BIN := $(VENV)/bin
# XLA's CPU client maps its scratch memory anew at every call; huge pages make that cheap.
RUN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python

# Whole files go to one worker: what a file makes once, for all its tests, is made once.
PYTEST_COMMAND := pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
TESTS := $(BIN)/python -m $(PYTEST_COMMAND)
# What computes numbers on one device. CORE_FLAGS are XLA's: another kind of CPU, other optimisation.
CORE := tests/nn tests/models tests/estimators tests/signals \
  tests/training/test_step.py tests/training/test_losses.py tests/training/test_optimizers.py
CORE_TESTS := not exhaustive and not eight_devices
CORE_FLAGS :=

# Every process that a test starts would compile the library's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all test-core coverage docs notebooks check clean

demo: $(VENV)/.installed
	$(RUN) -m tilelli_jax demo

test: $(VENV)/.installed-test
	$(TESTS) $(PYTEST)

test-all: $(VENV)/.installed-test
	$(TESTS) -m "" $(PYTEST)
	$(MAKE) test-core CORE_FLAGS=--xla_cpu_max_isa=AVX2
	$(MAKE) test-core CORE_FLAGS=--xla_cpu_max_isa=SSE4_2
	$(MAKE) test-core CORE_FLAGS=--xla_backend_optimization_level=3

test-core: $(VENV)/.installed-test
	XLA_FLAGS="$(CORE_FLAGS)" $(TESTS) -m "$(CORE_TESTS)" $(CORE) $(PYTEST)

coverage: $(VENV)/.installed-dev $(VENV)/.installed-test
	$(BIN)/coverage erase
	PWD="$(CURDIR)" $(BIN)/coverage run -m $(PYTEST_COMMAND) $(PYTEST); status=$$?; \
	  $(BIN)/coverage combine --quiet && $(BIN)/coverage report; exit $$status

docs: $(VENV)/.installed-dev $(VENV)/.installed-test
	rm -rf build/api
	$(BIN)/python tools/api_docs.py build/api

notebooks: $(VENV)/.installed-test
	$(RUN) tools/notebooks.py

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	rm -rf build/types && mkdir -p build/types/tilelli_jax  # the package as it is installed
	ln -s $(filter-out %/__pycache__,$(wildcard $(CURDIR)/tilelli_jax/*)) $(CURDIR)/convert $(CURDIR)/eval $(CURDIR)/configs \
	  build/types/tilelli_jax
	$(BIN)/mypy
	$(BIN)/shellcheck .ci/* launch/*.sh

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[eval]'
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(TEST_EXTRAS)]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
