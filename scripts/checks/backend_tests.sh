#!/usr/bin/env bash
# The patch's tests with everything on a GPU: the weights, the KV cache and its copies, the lazy ratios.
#
#     scripts/checks/backend_tests.sh cuda|metal|vulkan [PYTEST ARGUMENTS]
#
# A GPU's float32 is coarser than a CPU's, so the full models' own difference to transformers is measured first, and a hybrid's
# may be 2.5 times as large (LT_TEST_EXACT=NUMBER: take this bound, measure nothing).
# CMAKE_ARGS goes to cmake; what chooses a device, such as CUDA_VISIBLE_DEVICES or GGML_VK_VISIBLE_DEVICES, is passed on.
# LT_BACKEND_LIBS=DIR: libraries that were built before, also on another machine, and nothing is built here.
# Without pytest's arguments: tests/oracle and those of tests/runtime that say what a layer holds. Builds in build/backend-NAME.
#
# No GPU? Mesa's llvmpipe runs Vulkan on a CPU, in one to fifteen seconds a test (Debian 13: apt install libvulkan-dev glslc spirv-headers
# mesa-vulkan-drivers; Debian 12's headers are too old, and its Mesa damages its own heap).
#     GGML_VK_VISIBLE_DEVICES=0 GGML_VK_DISABLE_F16=1 scripts/checks/backend_tests.sh vulkan tests/oracle/test_states.py
set -eu
cd "$(dirname "$0")/../.."

name=${1:-}
case $name in
    cuda) option=GGML_CUDA ;;
    metal) option=GGML_METAL ;;
    vulkan) option=GGML_VULKAN ;;
    *) echo "backend_tests: '$name' is none: use scripts/checks/backend_tests.sh cuda, metal or vulkan" >&2; exit 2 ;;
esac
shift
python=${PYTHON:-$PWD/.venv/bin/python}
[ -x "$python" ] || { echo "backend_tests: $python isn't there: run 'make build' first" >&2; exit 1; }
PATH=$(dirname "$python"):$PATH # cmake and ninja, where pip put them
dir=$PWD/build/backend-$name

if [ -n "${LT_BACKEND_LIBS:-}" ]; then
    dir=$LT_BACKEND_LIBS
else
    "$python" ggml-patch/upstream.py sync "$dir/llama.cpp"
    # shellcheck disable=SC2086 # CMAKE_ARGS is words
    cmake -S "$dir/llama.cpp" -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=ON -D$option=ON \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF \
        -DLLAMA_OPENSSL=OFF -DLLAMA_ALL_WARNINGS=OFF ${CMAKE_ARGS:-} >"$dir/cmake.log" 2>&1 ||
        { grep -A4 'CMake Error' "$dir/cmake.log" >&2; echo "backend_tests: cmake failed, see $dir/cmake.log" >&2; exit 1; }
    ninja -C "$dir" llama ggml mtmd
    dir=$dir/bin
fi

export LT_GGUF_LIB_PATH=$dir LLAMA_CPP_LIB_PATH=$dir
pytest() { "$python" -m pytest -p no:cacheprovider "$@"; }

# without a device llama.cpp quietly computes on the CPU, where all of this passes anyway
"$python" -c 'import sys; from lt_gguf.runtime.library import load_llama_cpp; sys.exit(not load_llama_cpp().llama_supports_gpu_offload())' ||
    { echo "backend_tests: ggml finds no device for $name" >&2; exit 1; }

if [ -z "${LT_TEST_EXACT:-}" ]; then
    measured=$(mktemp)
    rm -f "$measured"
    LT_TEST_EXACT=inf pytest -q tests/oracle/test_logits.py -k test_full_model --measurements "$measured"
    LT_TEST_EXACT=$("$python" - "$measured" <<'PY'
import json, sys
worst = max(json.loads(line)["difference"] for line in open(sys.argv[1]))
sys.exit("backend_tests: the full models' logits are not finite") if worst == float("inf") else print(max(2e-4, 2.5 * worst))
PY
    )
fi
export LT_TEST_EXACT
echo "backend_tests: logits may differ from transformers' by $LT_TEST_EXACT (2e-4 on a CPU)"

# left out: how small a fault the oracle, on the CPU, can see; and aborts, which upstream knows on CPUs and Metal alone
[ $# -gt 0 ] || set -- -q tests/oracle tests/runtime/test_{memory_walk,prompt_memory,rollback,saved_states,snapshots}.py
pytest -k "not notices and not abort" "$@"
