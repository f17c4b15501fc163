SHELL := bash
# Each target makes .venv by itself. With PYTHON=python3 it uses that interpreter from the checkout,
# nothing installed: a GPU machine without network.
ifdef PYTHON
ready :=
else
PYTHON := .venv/bin/python
ready := .venv/ready
endif

RESULTS ?= out
export PYTHONPATH := .$(if $(PYTHONPATH),:$(PYTHONPATH))

.PHONY: demo test test-full mutations lint bench gpu-check clean

demo: $(ready)
	$(PYTHON) -m benchmarks.demo --out $(RESULTS)

test: $(ready)
	$(PYTHON) -m pytest

# 40 times as many examples of the property tests, and other ones on every run.
test-full: $(ready)
	$(PYTHON) -m pytest --hypothesis-profile=full

# Breaks the kernels in hundreds of places: a survivor without a reason fails. Hours on two cores.
mutations: $(ready)
	$(PYTHON) tests/mutations.py --out $(RESULTS)/mutations.csv $(MUTATION_OPTIONS)

lint: $(ready)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

bench: $(ready)
	$(PYTHON) -m benchmarks --results $(RESULTS)

# The tests first: a speed is never reported on wrong results. Where pytest-xdist is installed,
# TEST_OPTIONS="-n 8" compiles the kernels of eight tests at a time.
gpu-check: $(ready)
	mkdir -p $(RESULTS)
	$(PYTHON) -m benchmarks --require-gpu
	set -o pipefail; $(PYTHON) -m pytest -rs $(TEST_OPTIONS) 2>&1 | tee $(RESULTS)/tests.txt
	$(PYTHON) -m benchmarks --results $(RESULTS)

.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv out build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
