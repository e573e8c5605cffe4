#!/usr/bin/env bash
# The patch's tests on libraries built with the address and undefined-behaviour sanitizers, and with llama.cpp's asserts on.
#
#     scripts/sanitizers.sh [PYTEST ARGUMENTS]     (default: tests/runtime, then the fuzzer of the metadata)
#
# Takes about 25 minutes on 2 cores the first time. Builds in build/sanitizers. GCC or Clang on Linux.
set -eu
cd "$(dirname "$0")/.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
dir=$PWD/build/sanitizers
[ -x "$python" ] || { echo "sanitizers: $python isn't there: run 'make build' first" >&2; exit 1; }
PATH=$(dirname "$python"):$PATH # cmake and ninja, where pip put them

"$python" ggml-patch/upstream.py sync "$dir/llama.cpp"
# -O1 without NDEBUG: asserts on, and still fast enough to drive by random operations
# no-sanitize=enum: upstream's reader of GGUF files loads types as enums before it checks them, so any damaged file would end the fuzzing
flags="-O1 -g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=enum"
cmake -S "$dir/llama.cpp" -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBUILD_SHARED_LIBS=ON \
    -DCMAKE_C_FLAGS_RELWITHDEBINFO="$flags" -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="$flags" \
    -DGGML_OPENMP=OFF -DGGML_RPC=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF >"$dir/cmake.log" || { cat "$dir/cmake.log" >&2; exit 1; }
ninja -C "$dir" llama ggml mtmd ggml-rpc

# Python itself isn't instrumented: the runtime must be loaded before it, and its own leaks are not ours.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export LT_GGUF_LIB_PATH=$dir/bin LLAMA_CPP_LIB_PATH=$dir/bin

if [ $# -gt 0 ]; then
    exec "$python" -m pytest -p no:cacheprovider "$@"
fi
# not on these libraries: bits equal to a stock build without sanitizers, and a process that doesn't grow
"$python" -m pytest -q -p no:cacheprovider tests/runtime --ignore tests/runtime/test_stock.py -k "not soak"
"$python" scripts/fuzz_metadata.py
echo "sanitizers: clean"
