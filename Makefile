# Two commands for a newcomer, `make demo` and `make test`; each sets up all it needs in .venv and build/. `make help` lists the rest.

SHELL  := /bin/bash
PYTHON ?= python3
# The release that this project is tested with. Where pip finds a CPU build of it (2.13.0+cpu, say through PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL), that one satisfies the pin and wins; on Linux the package index's own build brings 3 GB of CUDA along.
# Any torch from 2.6 on works: make demo TORCH=torch
TORCH ?= torch==2.13.0
# A test process for each core (tests/conftest.py counts them), each with one thread; 0: none beside make's own, to debug in.
WORKERS ?= auto
PYTEST_ARGS ?=
TREE ?=
NEWEST ?=

VENV   := .venv
PY     := $(VENV)/bin/python
DEMO   := $(VENV)/.installed-demo
STAMP  := $(VENV)/.installed
DEVELOP := $(VENV)/.installed-develop
# The tests of a file stay in one process: the models that they share are made once. The order is that of tests/conftest.py.
PYTEST := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
NEWEST_VENV := build/newest-venv
# What decides what is compiled and installed. Our Python files aren't among it: the package is installed editable, so they are used in place.
INPUTS := CMakeLists.txt pyproject.toml $(filter-out %/develop.txt,$(wildcard requirements/*.txt)) $(wildcard cmake/*.* ggml-patch/*.toml ggml-patch/*.py ggml-patch/*.patch ggml-patch/src/*)

.PHONY: help demo test test-fast test-all build lint format docs lock wheel worktree patch clean FORCE

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(DEMO)  ## a checkpoint becomes a hybrid model, and a real model answers about a long text: full beside hybrid
	@$(PY) scripts/demo.py

ifdef NEWEST
# A venv of its own, so that .venv stays what was tested. Deprecations that the field announces are failures here.
test: build/make-options.txt | $(PY)
	@$(PYTHON) -m venv --clear $(NEWEST_VENV)
	@echo "Installing the newest packages that pyproject.toml's ranges allow into $(NEWEST_VENV)"
	@$(NEWEST_VENV)/bin/python -m pip install --disable-pip-version-check -q -e '.[test]' '$(TORCH)'
	@$(NEWEST_VENV)/bin/python $(PYTEST) -W error::FutureWarning $(PYTEST_ARGS)
else
test: $(STAMP)  ## run the tests; PYTEST_ARGS="-k window" passes options to pytest, NEWEST=1 takes the newest packages instead of the locked ones
	@$(PY) $(PYTEST) $(PYTEST_ARGS)
endif

test-fast: $(STAMP)  ## the tests that take no more than seconds, and no real model: a developer's loop, a minute or so
	@$(PY) $(PYTEST) -m "not slow and not real_model" $(PYTEST_ARGS)

test-all: $(STAMP)  ## every test: the whole matrix of the oracle, and what needs models and builds that take long to make; half an hour, and the first time another half
	@PYTHON=$(PY) scripts/checks/all_tests.sh $(PYTEST_ARGS)

lint: $(DEVELOP)  ## ruff, mypy, and the order of the rooms
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(PY) scripts/checks/rooms.py
	@$(PY) -m mypy

format: $(DEVELOP)  ## what make lint would say of the form of Python files, done
	@$(VENV)/bin/ruff check --fix .
	@$(VENV)/bin/ruff format .

docs: $(DEVELOP)  ## the site in build/site; a broken link is an error
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo build/site/index.html

build: $(STAMP)  ## compile what changed and install it into .venv; CMAKE_ARGS="-DGGML_CUDA=ON" chooses a backend

# Where all has been installed once, the demo needs it to stay so.
$(DEMO): $(INPUTS) build/make-options.txt | $(PY)
	@$(PY) scripts/setup/install.py $(if $(wildcard $(STAMP)),test,demo) --torch '$(TORCH)'
	@touch $(DEMO) $(wildcard $(STAMP))

$(STAMP): $(INPUTS) build/make-options.txt | $(PY)
	@$(PY) scripts/setup/install.py test --torch '$(TORCH)'
	@touch $(DEMO) $(STAMP)

# Linters, types and the site: what a change is looked at with, beside what the tests run on.
$(DEVELOP): $(STAMP) requirements/develop.txt
	@echo "Installing into $(VENV) what lints and what makes the site"
	@$(PY) -m pip install --disable-pip-version-check --require-hashes --no-deps -r requirements/develop.txt >build/install-develop.log 2>&1 || \
		{ tail -3 build/install-develop.log; echo "lt-gguf: error: the packages of requirements/develop.txt can't be installed, for the reason above (all of it is in build/install-develop.log)"; exit 1; }
	@touch $(DEVELOP)

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"lt-gguf: error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "lt-gguf: error: cannot make $(VENV): install Python's venv (Debian: apt install python3-venv)"; exit 1; }

# Changes only when an option does, and so rebuilds only then.
build/make-options.txt: FORCE
	@mkdir -p build
	@echo '$(PYTHON) $(TORCH) $(CMAKE_ARGS)' | cmp -s - $@ || echo '$(PYTHON) $(TORCH) $(CMAKE_ARGS)' > $@

lock: $(PY)  ## renew requirements/*.txt from the ranges in pyproject.toml
	@$(PYTHON) -m venv build/lock-venv
	@build/lock-venv/bin/python -m pip install --disable-pip-version-check -q $$($(PY) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]["lock"])' | tr -d ' ')
	@build/lock-venv/bin/python scripts/setup/lock.py

wheel:  ## one wheel for all machines of this kind, with every CPU variant, tried in an empty root and put into dist/
	@$(PYTHON) scripts/setup/build_wheel.py

worktree: $(PY)  ## TREE=dir: a git tree of llama.cpp with our patch on top, to edit
	@$(PY) ggml-patch/upstream.py worktree $(TREE)

patch: $(PY)  ## TREE=dir: write ggml-patch/hooks.patch and src/ from such a tree
	@$(PY) ggml-patch/upstream.py regenerate $(TREE)

clean:  ## remove .venv and build/ (the downloaded source stays in the user cache)
	rm -rf $(VENV) build
