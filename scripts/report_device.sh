#!/usr/bin/env bash
# What somebody with a GPU that nobody here has runs once and pastes into an issue: what the machine is, whether the patch computes on it
# what transformers computes, and how fast it is.
#
#     scripts/report_device.sh [metal|cuda|vulkan|cpu]
#
# Without a word it is metal on a Mac and cpu elsewhere. Ten to thirty minutes, most of it compiling; packages and SmolLM2 (93 MB) come over
# the network. Writes build/report-NAME.md with whatever was reached: a part that fails says how, and the next one is tried.
# CMAKE_ARGS goes to cmake, too.
set -u
cd "$(dirname "$0")/.."

name=${1:-$([ "$(uname -s)" = Darwin ] && echo metal || echo cpu)}
layers=99
case $name in
    metal) options=-DGGML_METAL=ON ;;
    cuda) options=-DGGML_CUDA=ON ;;
    vulkan) options=-DGGML_VULKAN=ON ;;
    cpu) options= layers=0 ;;
    *) echo "report_device: '$name' is none: use scripts/report_device.sh metal, cuda, vulkan or cpu" >&2; exit 2 ;;
esac

mkdir -p build
report=build/report-$name.md
unfinished=$report.unfinished
trap 'rm -f "$unfinished"' EXIT
printf '# %s\n\ncommit %s\n' "$name" "$(git rev-parse --short HEAD 2>/dev/null || echo unknown)" >"$unfinished"

# a part of the report: its title, and the command whose output it is
part() {
    printf '\n## %s\n\n```text\n' "$1" >>"$unfinished"
    echo "report_device: $1"
    shift
    "$@" >>"$unfinished" 2>&1 </dev/null
    status=$?
    [ $status -eq 0 ] || printf 'ended with status %s\n' $status >>"$unfinished"
    printf '```\n' >>"$unfinished"
    return $status
}

machine() {
    uname -srm
    case $name in
        metal) sw_vers; sysctl -n machdep.cpu.brand_string hw.memsize ;;
        cuda) nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader ;;
        vulkan) vulkaninfo --summary ;;
    esac
}

build() {
    make build CMAKE_ARGS="$options ${CMAKE_ARGS:-}"
}

logits() {
    if [ "$name" = cpu ]; then
        .venv/bin/python -m pytest -q -p no:cacheprovider tests/oracle/test_logits.py
    else
        LT_BACKEND_LIBS=$(.venv/bin/python -c 'from lt_gguf.runtime.library import library_dir; print(library_dir())') \
            scripts/checks/backend_tests.sh "$name" -q tests/oracle/test_logits.py
    fi
}

# the half that loses least, and as much as it can spare with some loss: models/smollm2/README.md
speed() {
    .venv/bin/lt-gguf bench smollm2 -ngl $layers --streaming "layers=0-1,10-16,19,25-29" --streaming "layers=0-6,8-16,19,22,24-29" \
        --depths 1024,4096,7680 --prompts 2048 --cache-types f16,q8_0 --repeats 2 --peers --peer-python "${PEER_PYTHON:-.venv/bin/python}"
}

# most of the cache of a large model's shape, and little of its weights: what streaming is for
long_context() {
    .venv/bin/lt-gguf bench --shape llama-3.1-8b --shape-layers 4 -ngl $layers --shares 0.5,0.75 --depths 8192,32768 --prompts none --repeats 2 -n 16
}

part "Machine" machine
if part "Build" build; then
    part "Doctor" .venv/bin/lt-gguf doctor
    part "Logits beside transformers" logits
    part "Speed: SmolLM2-135M-Instruct" speed
    part "Speed: four layers of Llama-3.1-8B" long_context
fi

# what is nobody's business: where the checkout and the home folder are
sed -e "s|$PWD|.|g" -e "s|${HOME:-/nonexistent}|~|g" "$unfinished" >"$report" && echo "report_device: $report: please paste it into an issue"
! grep -q '^ended with status' "$report"
