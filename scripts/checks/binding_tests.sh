#!/usr/bin/env bash
# llama-cpp-python's own tests that need no download, on our libraries: as they are, and once more with streaming layers.
# The tests of its prompt cache want a small transformer from a hub; they get MODEL instead.
#
#     scripts/checks/binding_tests.sh [MODEL.gguf]     (default: the demo's, see `make demo`)
#
# Takes about a minute. Works in build/binding-tests; installs the tests' own requirements into the environment.
set -eu
cd "$(dirname "$0")/../.."

python=$(realpath -s "${PYTHON:-.venv/bin/python}")
model=$(realpath "${1:-build/demo/demo-f16.gguf}")
dir=$PWD/build/binding-tests
[ -x "$python" ] || { echo "binding_tests: $python isn't there: run 'make build' first" >&2; exit 1; }
[ -f "$model" ] || { echo "binding_tests: $model isn't there: run 'make demo' first, or name a GGUF file" >&2; exit 1; }

rm -rf "$dir" && mkdir -p "$dir"
"$python" - "$dir" <<'PY'
import sys, tarfile
sys.path.insert(0, "ggml-patch")
from upstream import Pin, fetch_sdist
pin = Pin.load()
root = pin.sdist.removesuffix(".tar.gz")
wanted = (f"{root}/tests/", f"{root}/{pin.llama_cpp}/models/ggml-vocab-llama-spm.gguf")
with tarfile.open(fetch_sdist(pin)) as archive:
    for member in archive:
        if member.name.startswith(wanted):
            member.name = member.name.removeprefix(f"{root}/")
            archive.extract(member, sys.argv[1], filter="data")
PY
cat >"$dir/conftest.py" <<PY
import huggingface_hub
import lt_gguf  # points llama_cpp at our libraries
huggingface_hub.hf_hub_download = lambda *_, **__: "$model"
PY
"$python" -m pip install -q scipy httpx huggingface-hub pytest fastapi sse-starlette starlette-context pydantic-settings

cd "$dir"
# what is left out needs models of other kinds (recurrent, embedding, a certain chat model)
selection="not real_ and not recurrent and not hybrid"
"$python" -m pytest -q -p no:cacheprovider tests -k "$selection"
for prefill in stream full; do
    LT_STREAMING="layers=all;sink=4;window=28;prefill=$prefill" "$python" -m pytest -q -p no:cacheprovider tests -k "$selection"
done
