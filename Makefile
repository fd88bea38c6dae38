# make demo    trains a small network for about three minutes and shows what it has learned
# make test    everything that CI runs of the tests
# make check   style and types

PYTHON ?= python3
VENV ?= .venv
# torch is what the parity tests compare with. Without it (TEST_EXTRAS=test) they are skipped.
TEST_EXTRAS ?= test,torch
PYTEST ?=

BIN := $(VENV)/bin
# XLA's CPU client maps its scratch memory anew at every call; huge pages make that cheap.
RUN := GLIBC_TUNABLES=glibc.malloc.hugetlb=1 $(BIN)/python

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(RUN) -m tilelli_jax.train --config configs/demo.yaml

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(PYTEST)

check: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[$(TEST_EXTRAS)]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/bin/python
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@ $(VENV)/.installed
