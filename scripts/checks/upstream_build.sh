#!/usr/bin/env bash
# Builds some of llama.cpp's own tests from the patched tree, in build/upstream-tests.
#
#     scripts/checks/upstream_build.sh TARGET...
#
# upstream_tests.sh runs them; all_tests.sh lets test-llama-archs make a small model of each architecture.
set -eu
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
dir=$PWD/build/upstream-tests

[ -x "$(command -v "$python")" ] || { echo "upstream_build: $python isn't there: run 'make build' first" >&2; exit 1; }
PATH=$(dirname "$(realpath -s "$(command -v "$python")")"):$PATH # cmake and ninja, where pip put them

"$python" ggml-patch/upstream.py sync "$dir/llama.cpp"
cmake -S "$dir/llama.cpp" -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=Release -DLLAMA_BUILD_TESTS=ON -DLLAMA_BUILD_UI=OFF \
    -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF >"$dir/cmake.log" 2>&1 ||
    { echo "upstream_build: cmake failed, see $dir/cmake.log" >&2; exit 1; }
ninja -C "$dir" "$@" || { echo "upstream_build: the build failed, its output is above" >&2; exit 1; }
