#!/usr/bin/env bash
# Every test there is, none left out for want of something that takes long to make: what `make test-all` runs.
#
#     scripts/checks/all_tests.sh [PYTEST ARGUMENTS]
#
# Beside the whole matrix of the oracle (--full) that is what `make test` skips for want of
#   a model of each architecture that llama.cpp knows, which its test-llama-archs makes (eight minutes of one core to compile),
#   a build with a module for each kind of CPU, as a wheel has it (twenty-five minutes of one core),
# and kvpress, whose own ranges don't allow our transformers: its score is installed without what it asks for.
# All of that stays in build/, so a second run begins with the tests.
set -eu
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
models=$PWD/build/upstream-tests/models

scripts/checks/upstream_build.sh test-llama-archs
if [ ! -d "$models" ]; then
    rm -rf "$models.unfinished" && mkdir -p "$models.unfinished"
    build/upstream-tests/bin/test-llama-archs -s 1 -o "$models.unfinished" >build/upstream-tests/models.log 2>&1 ||
        { echo "all_tests: test-llama-archs failed, see build/upstream-tests/models.log" >&2; exit 1; }
    mv "$models.unfinished" "$models"
fi
ls build/wheel/py3-*/bin/libllama.* >/dev/null 2>&1 || python3 scripts/setup/build_wheel.py
[ -d build/kvpress ] || "$python" -m pip install --disable-pip-version-check -q --no-deps --target build/kvpress 'kvpress>=0.5,<0.6'
PYTHONPATH=$PWD/build/kvpress LT_TEST_MODELS=$models exec "$python" -m pytest -n auto --dist loadfile --no-loadscope-reorder --full "$@"
