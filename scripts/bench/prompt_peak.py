"""Measures the memory of a process while it reads a long prompt: in several batches, and in one, layer by layer (prefill = full).

    python scripts/bench/prompt_peak.py [--tokens 32768] [--streaming 8,12,auto:0.5] [--picture FILE.svg] [--threads N]

For each number of streaming layers, of 16, or share of them that is chosen while the prompt is read (auto:0.5), and with full
attention in all of them, a process of its own reads the same random tokens: in batches of 512, and as one batch. It notes its resident memory every 50 ms, beginning when the context is made and has
read a few tokens, so that weights and compute buffers are there. What it grows by with full attention in all layers, masks and the
like, is not the cache's and is taken off. Prints a Markdown table, beside what must be there at the peak: the full layers, one
streaming layer and the hidden states of all tokens; and with the sinks and windows, which are there all the time. The picture has
the memory over time. The model has random weights, and keys and values of a quarter of the hidden states' size, as Llama-3.1-8B has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
from support.native import FULL, STREAMING, C, Context, Model

from lt_gguf.bench.shapes import Shape, write_random_model
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.spec import AutoSpec, StreamingSpec
from lt_gguf.spec.auto import runtime_text
from lt_gguf.spec.fields import is_auto

SHAPE = Shape(16, 1024, 4, 4, 64, 512, 4096)
SINK, WINDOW, N_UBATCH = 4, 1020, 512
LAYER_BYTES = 2 * SHAPE.n_head_kv * SHAPE.head_size * 2  # K and V of a token in one layer, f16
MIB = 2**20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def decode(context: Context, tokens: np.ndarray, n_batch: int) -> np.ndarray:
    """Reads a prompt without an object for each token: float32 (n_vocab,) logits of the last one."""
    for first in range(0, len(tokens), n_batch):
        part = np.ascontiguousarray(tokens[first : first + n_batch])
        if code := C.llama_decode(context.handle, C.llama_batch_get_one(part.ctypes.data_as(C.llama_token_p), len(part))):
            raise SystemExit(f"error: llama_decode returned {code}")
    return np.ctypeslib.as_array(C.llama_get_logits_ith(context.handle, -1), shape=(context.model.n_vocab,)).copy()


def number(which: str) -> int:
    """How many layers stream."""
    return AutoSpec.parse(which).n_streaming(SHAPE.n_layer) if is_auto(which) else int(which)


def spec_of(which: str) -> str:
    if is_auto(which):
        return runtime_text(which)
    layers = tuple(range(SHAPE.n_layer - int(which), SHAPE.n_layer))
    return str(StreamingSpec(layers, SHAPE.n_layer, SINK, WINDOW, "full")) if layers else "off"


def read(path: Path, which: str, n_tokens: int, by_layer: bool, threads: int) -> dict[str, Any]:
    """Reads the prompt and decodes a few tokens; what that took."""
    tokens = np.random.default_rng(0).integers(3, SHAPE.n_vocab, n_tokens, np.int32)
    seen, ended = [], threading.Event()
    with Model(path) as model:
        model.set_streaming(spec_of(which))
        n_batch = n_tokens if by_layer else N_UBATCH
        with model.context(
            n_ctx=n_tokens + 256, n_batch=n_batch, n_ubatch=N_UBATCH, kv="f16", flash=True, n_threads=threads
        ) as context:
            decode(context, tokens[:N_UBATCH], N_UBATCH)
            context.clear()
            at_first = context.kv_bytes(FULL) + context.kv_bytes(STREAMING)
            start, before = time.perf_counter(), resident()

            def watch() -> None:
                while not ended.wait(0.05):
                    seen.append((time.perf_counter() - start, resident() - before))

            watcher = threading.Thread(target=watch)
            watcher.start()
            context.prompt_begin(n_tokens)
            logits = decode(context, tokens, n_batch)
            seconds = time.perf_counter() - start
            time.sleep(0.2)
            ended.set()
            watcher.join()
            full, streaming = context.kv_bytes(FULL), context.kv_bytes(STREAMING)
    return {
        "at_first": at_first,
        "cache": full + streaming,
        "streaming": streaming,
        "seen": seen,
        "seconds": seconds,
        "sum": float(logits.astype(np.float64).sum()),
    }


def measure(path: Path, which: str, by_layer: bool, options: argparse.Namespace) -> dict[str, Any]:
    arguments = [str(path), which, str(options.tokens), str(int(by_layer)), str(options.threads)]
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {done.stderr.strip().splitlines()[-1:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    result["rise"] = max(rise for _, rise in result["seen"])
    return result


def draw(path: Path, runs: dict[tuple[str, bool], dict[str, Any]], n_tokens: int) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    streaming = list(dict.fromkeys(which for which, _ in runs if which != "0"))
    all_full = runs["0", False]
    figure, axes = pyplot.subplots(1, len(streaming), figsize=(4.5 * len(streaming), 3.4), sharey=True, squeeze=False)
    for axis, which in zip(axes[0], streaming):
        for by_layer, label, color in ((False, "in several batches", "#888888"), (True, "layer by layer", "#0b6e4f")):
            run = runs[which, by_layer]
            times, rises = np.array(run["seen"]).T
            axis.plot(times, (run["at_first"] + np.maximum(0, rises - all_full["rise"])) / MIB, color=color, label=label)
        axis.axhline(all_full["cache"] / MIB, color="#c0392b", linestyle=":", label="all layers full")
        chosen = f", {which}" if is_auto(which) else ""
        axis.set_title(f"{number(which)} of {SHAPE.n_layer} layers streaming{chosen}", fontsize=10)
        axis.set_xlabel("seconds")
        axis.set_ylim(0)
    axes[0][0].set_ylabel("KV cache and prompt, MiB")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="lower left")
    figure.suptitle(f"Reading {n_tokens} tokens", fontsize=11)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--streaming", default="8,12,auto:0.5", help="numbers of streaming layers, of 16, and shares to choose")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--model", type=Path, default=Path("build/bench/peak-16x4x64.gguf"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if not options.model.exists():
        write_random_model(options.model, SHAPE, GGMLQuantizationType.F16)

    cases = [("0", False)] + [(which, by_layer) for which in options.streaming.split(",") for by_layer in (False, True)]
    runs = {}
    for which, by_layer in cases:
        print(f"streaming {which}, {'one batch' if by_layer else 'several batches'}", file=sys.stderr, flush=True)
        runs[which, by_layer] = measure(options.model, which, by_layer, options)

    full = runs["0", False]
    for run in runs.values():
        run["peak"] = run["at_first"] + run["rise"] - full["rise"]
    print(
        "| streaming | read | cache, MiB | at the peak, MiB | of all full "
        "| peak ÷ (full layers + 1 + hidden) | and sinks and windows | seconds | ÷ several batches |"
    )
    print("|" + " --: |" * 9)
    for (which, by_layer), run in runs.items():
        n = number(which)
        one = ((SHAPE.n_layer - n + (n > 0)) * LAYER_BYTES + (n > 0) * SHAPE.n_embd * 4) * options.tokens
        cells = [
            f"{n} of {SHAPE.n_layer}" + f" ({which})" * is_auto(which),
            "layer by layer" if by_layer else "in several batches",
            f"{run['cache'] / MIB:.1f}",
            f"{run['peak'] / MIB:.1f}",
            f"{run['peak'] / full['peak']:.2f}",
            f"{run['peak'] / one:.3f}",
            f"{run['peak'] / (one + run['streaming']):.3f}",
            f"{run['seconds']:.1f}",
            f"{run['seconds'] / runs[which, False]['seconds']:.3f}",
        ]
        print(f"| {' | '.join(cells)} |")
    same = all(runs[which, True]["sum"] == runs[which, False]["sum"] for which, by_layer in runs if by_layer)
    print(f"\n{options.tokens} tokens. The logits at the end are {'the same in both' if same else 'not the same'}.")
    if options.picture:
        draw(options.picture, runs, options.tokens)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        model, which, n_tokens, by_layer, threads = sys.argv[2:]
        print(json.dumps(read(Path(model), which, int(n_tokens), by_layer == "1", int(threads))))
    else:
        main()
