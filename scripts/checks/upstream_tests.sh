#!/usr/bin/env bash
# llama.cpp's own C++ tests that need no download, on the patched tree; then the ones about memory once more with all
# layers streaming, and tests/gguf/test_every_architecture.py on the model that upstream generates for each architecture.
#
#     scripts/checks/upstream_tests.sh [MODEL.gguf]     a small model for the tests that want one (default: the demo's, see `make demo`)
#
# Left out: what needs a download, and test-backend-sampler, which asserts on the words of one certain model.
# Takes about half an hour on 2 cores the first time. Builds in build/upstream-tests. Ends with "N passed, N failed".
set -u
cd "$(dirname "$0")/../.."

python=${PYTHON:-.venv/bin/python}
model=$(realpath "${1:-build/demo/demo-f16.gguf}")
dir=$PWD/build/upstream-tests
bin=$dir/bin
generated=$dir/models

[ -x "$(command -v "$python")" ] || { echo "upstream_tests: $python isn't there: run 'make build' first" >&2; exit 1; }
[ -f "$model" ] || { echo "upstream_tests: $model isn't there: run 'make demo' first, or name a GGUF file" >&2; exit 1; }
PATH=$(dirname "$(realpath -s "$(command -v "$python")")"):$PATH # cmake and ninja, where pip put them

memory_tests="test-save-load-state test-state-restore-fragmented test-thread-safety"
model_tests="$memory_tests test-model-load-cancel test-autorelease"
plain_tests="test-batch-alloc test-sampling test-opt test-alloc test-barrier test-quantize-fns test-rope test-gguf test-c"
targets="test-llama-archs test-recurrent-state-rollback test-backend-ops $model_tests $plain_tests"

# shellcheck disable=SC2086 # the lists are words
PYTHON=$python scripts/checks/upstream_build.sh $targets || exit 1

passed=0 failed=0
work=$dir # some tests leave files where they run
check() { # NAME COMMAND...
    local name=$1 log="$dir/${1//[^[:alnum:]-]/_}.log"
    shift
    local start=$SECONDS
    if (cd "$work" && "$@") >"$log" 2>&1; then
        passed=$((passed + 1))
        printf 'PASS  %-60s %4d s\n' "$name" $((SECONDS - start))
    else
        failed=$((failed + 1))
        printf 'FAIL  %-60s %4d s  %s\n' "$name" $((SECONDS - start)) "$log"
    fi
}
on_model() { # PREFIX-OF-NAME; the tests that take a model
    local arguments
    for test in $2; do
        case $test in
            test-thread-safety) arguments="-m $model -p Once -n 64 -c 256 -ub 32 -np 4 -t 2" ;;
            test-save-load-state | test-state-restore-fragmented) arguments="-m $model" ;;
            *) arguments="$model" ;;
        esac
        # shellcheck disable=SC2086
        check "$1$test" "$bin/$test" $arguments
    done
}

for test in $plain_tests; do check "$test" "$bin/$test"; done
check "test-llama-archs" "$bin/test-llama-archs"
mkdir -p "$generated"
check "test-llama-archs -o (a model for each architecture)" "$bin/test-llama-archs" -s 1 -o "$generated"
check "test-save-load-state, all architectures" "$bin/test-save-load-state" --models "$generated"
check "test-recurrent-state-rollback, all architectures" "$bin/test-recurrent-state-rollback" --models "$generated"
on_model "" "$model_tests"

for prefill in stream full; do
    export LT_STREAMING="layers=all;sink=4;window=28;prefill=$prefill"
    on_model "streaming, prefill = $prefill: " "$memory_tests"
done
unset LT_STREAMING

work=$PWD
check "tests/gguf/test_every_architecture.py" env LT_TEST_MODELS="$generated" "$python" -m pytest -q tests/gguf/test_every_architecture.py
check "test-backend-ops, CPU" "$bin/test-backend-ops" test -b CPU

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
