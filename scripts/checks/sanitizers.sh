#!/usr/bin/env bash
# The patch's tests on libraries built with sanitizers, and with llama.cpp's asserts on.
#
#     scripts/checks/sanitizers.sh address [PYTEST ARGUMENTS]   memory errors and undefined behaviour; then the fuzzer of the metadata,
#                                                            and llama-server under five kinds of load
#     scripts/checks/sanitizers.sh thread  [PYTEST ARGUMENTS]   data races, with two threads in each context
#
# Without pytest's arguments: tests/runtime and tests/oracle. On 2 cores `address` takes about half an hour the first time, `thread`
# some hours. Builds in build/sanitizers-NAME, or in the folder that BUILD_DIR names. GCC on Linux.
set -eu
cd "$(dirname "$0")/../.."

name=${1:-}
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
[ -x "$python" ] || { echo "sanitizers: $python isn't there: run 'make build' first" >&2; exit 1; }
PATH=$(dirname "$python"):$PATH # cmake and ninja, where pip put them

# Python itself isn't instrumented: the runtime must be loaded before it, and its own leaks are not ours.
case $name in
    # no-sanitize=enum: upstream's reader of GGUF files loads types as enums before it checks them, so any damaged file would end the fuzzing
    address) flags="-fsanitize=address,undefined -fno-sanitize=enum" runtimes="libasan.so libubsan.so" threads=1 run=() server=llama-server ;;
    # a fixed layout of the memory: the thread sanitizer's runtime can't cope with as much chance in it as Linux may use
    thread)  flags="-fsanitize=thread" runtimes="libtsan.so" threads=2 run=(setarch -R) server="" ;;
    *) echo "sanitizers: '$name' is none: use scripts/checks/sanitizers.sh address or thread" >&2; exit 2 ;;
esac
shift
dir=$(realpath -m "${BUILD_DIR:-build/sanitizers-$name}")

"$python" ggml-patch/upstream.py sync "$dir/llama.cpp"
# ggml's threads spin while they wait for each other: with more threads than free cores each wait would cost a time slice
[ "$name" != thread ] || sed -i 's/^    _mm_pause();/    sched_yield();/' "$dir/llama.cpp/ggml/src/ggml-cpu/ggml-cpu.c"
# -O2 without NDEBUG: asserts on, and still fast enough to drive by random operations
flags="-O2 -g1 -fno-omit-frame-pointer $flags"
cmake -S "$dir/llama.cpp" -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBUILD_SHARED_LIBS=ON \
    -DCMAKE_C_FLAGS_RELWITHDEBINFO="$flags" -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="$flags" \
    -DGGML_OPENMP=OFF -DGGML_RPC=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
    -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF >"$dir/cmake.log" || { cat "$dir/cmake.log" >&2; exit 1; }
ninja -C "$dir" llama ggml mtmd ggml-rpc $server

for runtime in $runtimes; do preload="${preload:-} $(gcc -print-file-name="$runtime")"; done
# pytest would swallow what they print
report=$dir/report
rm -f "$report".*
trap '[ $? -eq 0 ] || { echo "sanitizers, $name: failed"; head -n 60 "$report".* 2>/dev/null; } >&2' EXIT
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1:abort_on_error=1:log_path=$report
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1:log_path=$report
export TSAN_OPTIONS=halt_on_error=1:abort_on_error=1:report_signal_unsafe=0:suppressions=$PWD/scripts/checks/thread_sanitizer.txt:log_path=$report
export LT_GGUF_LIB_PATH=$dir/bin LLAMA_CPP_LIB_PATH=$dir/bin LT_TEST_THREADS=$threads

# not on these libraries: bits equal to a stock build without sanitizers, a process that doesn't grow, and llama-server, which isn't
# built with them (the thread sanitizer would see half of its locks)
[ $# -gt 0 ] || set -- -q tests/runtime tests/oracle --ignore tests/runtime/test_stock.py --ignore tests/runtime/test_server.py -k "not soak"
LD_PRELOAD=$preload "${run[@]}" "$python" -m pytest -p no:cacheprovider "$@"
if [ -n "$server" ]; then
    LD_PRELOAD=$preload "$python" scripts/checks/fuzz_metadata.py
    for options in "" "--draft ngram" "--draft model" "--prefill stream --draft ngram" "--separate --draft ngram"; do
        # shellcheck disable=SC2086 # options are words
        env -u LT_GGUF_LIB_PATH -u LLAMA_CPP_LIB_PATH "$python" scripts/checks/soak_server.py --server "$dir/bin/llama-server" --operations 2000 $options
    done
fi
echo "sanitizers, $name: clean"
