# Two commands for a newcomer, `make demo` and `make test`; each sets up all it needs in .venv and build/. `make help` lists the rest.

# bash for pipefail: pip's failure must not vanish in the pipe that shows its output
SHELL  := /bin/bash
PYTHON ?= python3
# The release that this project is tested with. Where pip finds a CPU build of it (2.13.0+cpu, say through PIP_FIND_LINKS or
# PIP_EXTRA_INDEX_URL), that one satisfies the pin and wins; on Linux the package index's own build brings 3 GB of CUDA along.
# Any torch from 2.6 on works: make demo TORCH=torch
TORCH ?= torch==2.13.0
PYTEST_ARGS ?=
TREE ?=

VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
LOG    := build/install.log
# What decides what is compiled. Our Python files aren't among them: the package is installed editable, so they are used in place.
INPUTS := CMakeLists.txt pyproject.toml $(wildcard cmake/*.* ggml-patch/*.toml ggml-patch/*.py ggml-patch/*.patch ggml-patch/src/*)

.PHONY: help demo test build worktree patch clean FORCE

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' $(MAKEFILE_LIST) | expand -t 12

demo: $(STAMP)  ## convert, quantize and run the demo model, full beside hybrid
	@$(PY) scripts/demo.py

test: $(STAMP)  ## run the tests; PYTEST_ARGS="-k window" passes options to pytest
	@$(PY) -m pytest $(PYTEST_ARGS)

build: $(STAMP)  ## compile what changed and install it into .venv; CMAKE_ARGS="-DGGML_CUDA=ON" chooses a backend

$(STAMP): $(INPUTS) build/make-options.txt | $(PY)
	@echo "Building and installing into $(VENV); the whole log is in $(LOG)"
	@set -o pipefail; \
	$(PY) -m pip install -v --disable-pip-version-check -e '.[test]' '$(TORCH)' 2>&1 | tee $(LOG) \
	    | grep --line-buffered -v -e 'Link requires a different Python' -e 'WARNING: Location' \
	|| { echo; grep -h 'lt-gguf: error:' $(LOG) | tail -n 1 | sed 's:^ *::' | grep . \
	     || echo "lt-gguf: error: $$(grep -h 'ERROR: ' $(LOG) | tail -n 1 | sed 's:.*ERROR. ::'): check the network and pip's settings, then run make again"; \
	     exit 1; }
	@touch $@

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"lt-gguf: error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "lt-gguf: error: cannot make $(VENV): install Python's venv (Debian: apt install python3-venv)"; exit 1; }

# Changes only when an option does, and so rebuilds only then.
build/make-options.txt: FORCE
	@mkdir -p build
	@echo '$(PYTHON) $(TORCH) $(CMAKE_ARGS)' | cmp -s - $@ || echo '$(PYTHON) $(TORCH) $(CMAKE_ARGS)' > $@

worktree: $(PY)  ## TREE=dir: a git tree of llama.cpp with our patch on top, to edit
	@$(PY) ggml-patch/upstream.py worktree $(TREE)

patch: $(PY)  ## TREE=dir: write ggml-patch/hooks.patch and src/ from such a tree
	@$(PY) ggml-patch/upstream.py regenerate $(TREE)

clean:  ## remove .venv and build/ (the downloaded source stays in the user cache)
	rm -rf $(VENV) build
