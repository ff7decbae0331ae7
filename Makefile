# Each target first sets up what it needs in .venv, so that any of them works in a fresh checkout.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The lower ends of the ranges in setup.cfg.
OLDEST := .venv-oldest
OLDEST_PYTHON ?= python3.10
OLDEST_VERSIONS := tensorflow==2.16.2 keras==3.8.0
# Ray is large, and only one test needs it.
RAY := .venv-ray
# KerasHub brings TensorFlow Text, and only the tests in tests/hub need it.
HUB := .venv-hub
# What is measured beside this library, each with Keras alone: PyTorch for CPUs takes 1.1 GB, that
# for GPUs several. Its version is held, so that figures of two runs can be compared.
JAX := .venv-jax
TORCH := .venv-torch
# CPU or GPU: what make bench puts its towers on.
DEVICES ?= CPU
# How many processes run tests: one more than two cores, as some tests wait for what they start.
PROCESSES ?= 3
# A file's tests share what is costly to start, so they stay in one process. Files begin in the
# order of tests/sweeps.py, so that no long one begins last.
SIDE_BY_SIDE = -n $(PROCESSES) --dist loadfile --no-loadscope-reorder
VERSIONS := .venv-versions
# Only files with examples: two commands may define the same flag, but not in one process.
EXAMPLES = $(shell grep -rl --include='*.py' '>>> ' parallel_keras)
CODE := parallel_keras tests conftest.py setup.py docs benchmarks tools

# Nothing but parallel_keras/_compat.py may reach into Keras' or TensorFlow's private parts.
# ruff's SLF001 reports private attributes of other objects; this finds what it does not look at.
PRIVATE := (from|import) +(keras\.src|tensorflow\.python)|keras\.src|tensorflow\.python
PRIVATE := $(PRIVATE)|__internal__|\.extended\._|super\(\)\._[a-z]
PRIVATE := $(PRIVATE)|(get|set|has|del)attr\([^,()]+, *["']_[a-z]

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-ci test-all test-oldest test-versions test-ray test-hub test-gpu dist bench \
  bench-quick bench-links bench-frameworks bench-render check lint types doctest docs private format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.extra-demo ## Train on digits on one device and on all; writes digits.keras, demo.png
	TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python -m parallel_keras demo

test: $(VENV)/.extra-test ## Run the tests, of long sweeps a few cases
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow and not rest'

test-ci: $(VENV)/.extra-test ## Run the tests but the slow ones: what .ci/run runs
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'not slow'

test-all: $(VENV)/.extra-test ## Run all tests, also the slow ones
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-oldest: $(OLDEST)/.installed ## Run the tests with the oldest Python, TensorFlow and Keras
	$(OLDEST)/bin/python -m pytest $(SIDE_BY_SIDE)

test-versions: $(VENV)/.extra-test ## Run tests with each Keras and Python; fills docs/versions.md
	$(BIN)/python -m tools.try_versions

test-ray: $(RAY)/.installed ## Run the test with Ray Train, with two workers on this machine
	$(RAY)/bin/python -m pytest tests/test_ray.py

test-hub: $(HUB)/.installed ## Run the tests with KerasHub's tasks, on raw strings and images
	$(HUB)/bin/python -m pytest tests/hub/test_hub.py

dist: $(VENV)/.extra-dist $(VENV)/.extra-test ## Build wheel and sdist into dist/, and try both out
	rm -rf build dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m tools.check_dist

test-gpu: $(VENV)/.extra-test ## Run the tests on four logical GPUs, split from the first card
	PARALLEL_KERAS_TEST_DEVICES=GPU $(BIN)/python -m pytest

bench: $(VENV)/.extra-bench ## Measure everything beside its peers (half an hour, quiet machine); DEVICES=GPU
	$(BIN)/python -m benchmarks --devices=$(DEVICES)

bench-quick: $(VENV)/.extra-bench ## Measure less, in under 3 minutes; documents stay as they are
	$(BIN)/python -m benchmarks --quick --devices=$(DEVICES)

bench-links: $(VENV)/.extra-bench ## Measure devices behind links of a chosen speed (8 minutes, root)
	$(BIN)/python -m benchmarks links

bench-frameworks: $(VENV)/.extra-bench $(JAX)/.installed $(TORCH)/.installed ## Measure beside JAX and PyTorch (8 minutes)
	$(BIN)/python -m benchmarks frameworks

bench-render: $(VENV)/.extra-bench ## Make plots and tables of benchmarks/results.json anew
	$(BIN)/python -m benchmarks --render

check: lint private types doctest docs ## Everything but the tests: style, types, examples, docs

lint: $(VENV)/.extra-test ## Check format and style
	$(BIN)/ruff format --check $(wildcard $(CODE))
	$(BIN)/ruff check $(wildcard $(CODE))

types: $(VENV)/.extra-test ## Check the types
	$(BIN)/mypy parallel_keras

doctest: $(VENV)/.extra-test ## Run the examples in the docstrings
	$(BIN)/python -m pytest --doctest-modules $(EXAMPLES)

docs: $(VENV)/.extra-docs ## Build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

private: ## Look for uses of Keras' and TensorFlow's private parts
	@! grep -rnE --include='*.py' --exclude=_compat.py '$(subst ','\'',$(PRIVATE))' parallel_keras \
	  || { echo 'private: the lines above use private parts; only _compat.py may.' >&2; exit 1; }

format: $(VENV)/.extra-test ## Rewrite the code in the house style
	$(BIN)/ruff format $(wildcard $(CODE))
	$(BIN)/ruff check --fix $(wildcard $(CODE))

clean: ## Remove .venv and all that is built or cached
	rm -rf $(VENV) $(OLDEST) $(RAY) $(HUB) $(VERSIONS) $(JAX) $(TORCH) site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Some systems split ensurepip off from Python; there, the pip that is installed fills in.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(BIN)/python install pip; }
	touch $@

# One install at a time, also under make -j: two pips in one environment break it.
$(VENV)/.extra-%: setup.cfg setup.py $(VENV)/.created
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

$(OLDEST)/.installed: setup.cfg setup.py
	$(OLDEST_PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --editable '.[test]' $(OLDEST_VERSIONS)
	touch $@

$(RAY)/.installed: setup.cfg setup.py
	$(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --editable '.[ray,test]'
	touch $@

$(HUB)/.installed: setup.cfg setup.py
	$(PYTHON) -m venv $(HUB)
	$(HUB)/bin/python -m pip install --quiet --editable '.[hub,test]'
	touch $@

$(JAX)/.installed:
	$(PYTHON) -m venv $(JAX)
	$(JAX)/bin/python -m pip install --quiet jax keras
	touch $@

$(TORCH)/.installed:
	$(PYTHON) -m venv $(TORCH)
	$(TORCH)/bin/python -m pip install --quiet 'torch==2.13.*' keras
	touch $@

.NOTPARALLEL:
