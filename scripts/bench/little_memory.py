"""Measures what fits a computer with little memory: in a control group of so much and no more (Linux, root).

    python scripts/bench/little_memory.py context [--memory 8GiB] [--streaming 24] [--cache-type f16]
    python scripts/bench/little_memory.py weights --model FILE.gguf --memory 800MiB [--tokens 2048] [--repeats 3]

`context`: the largest context of a model in Llama-3.1-8B's shape (random weights, Q4_0), as `n_ctx="auto"` finds it, with full
attention and with streaming layers, and what the process then takes at most, the weights included. With
streaming layers it reads a prompt that fills the context until two of them have passed it, which is when there is most: those
that follow use the same memory.

`weights`: how long a prompt takes where not all weights fit, so that they are read from the disk again and again: in batches of 512
once for each batch, layer by layer once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
import control_group  # beside this file
from prompt_peak import decode
from support.native import FULL, STREAMING, Model, api

from lt_gguf.bench.shapes import random_model
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.sizes import format_bytes, parse_size
from lt_gguf.runtime.context_size import largest_size
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import cache_type

N_UBATCH = 512
MAPPED = {"use_extra_bufts": False}  # the weights stay where they are in the file; else some CPUs' are rearranged, in a copy


def own_memory() -> int:
    """Bytes of this process in memory that aren't a file's."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) << 10


def fill(file: str, spec: str, kv: str, threads: int) -> dict[str, Any]:
    """Makes the largest context and reads in it; its size and what was there at most."""
    described = read_model(file)
    streaming = StreamingSpec.parse(spec, described.n_layer)
    type_ = cache_type(kv).ggml_type
    n_ctx = largest_size(file, streaming, type_k=type_, type_v=type_, flash_attn=True).n_ctx
    most, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            most.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    tokens = np.random.default_rng(0).integers(3, 1000, n_ctx - 64, np.int32)
    with Model(file, **MAPPED) as model:
        started = time.perf_counter()
        model.set_streaming(spec)
        with model.context(n_ctx=n_ctx, n_batch=n_ctx, n_ubatch=N_UBATCH, kv=kv, flash=True, n_threads=threads) as context:
            decode(context, tokens[:N_UBATCH], N_UBATCH)  # all weights are there
            if streaming.layers:
                context.clear()
                steps = iter(range(2 * -(-len(tokens) // N_UBATCH)))
                context.prompt_begin(len(tokens))
                with api().progress(context.handle, lambda _: next(steps, None) is not None):
                    try:
                        decode(context, tokens, len(tokens))
                    except SystemExit:  # stopped, as it was to be
                        assert next(steps, None) is None
            cache = context.kv_bytes(FULL) + context.kv_bytes(STREAMING)
    ended.set()
    watcher.join()
    return {"n_ctx": n_ctx, "cache": cache, "own": max(most), "seconds": time.perf_counter() - started}


def read(file: str, spec: str, n_tokens: int, n_batch: int, threads: int) -> dict[str, Any]:
    """Seconds of a prompt."""
    with Model(file, **MAPPED) as model:
        model.set_streaming(spec)
        settings = {"n_batch": n_batch, "n_ubatch": N_UBATCH, "kv": "f16", "flash": True, "n_threads": threads}
        with model.context(n_ctx=n_tokens + 256, **settings) as context:
            tokens = np.random.default_rng(0).integers(3, 1000, n_tokens, np.int32)
            decode(context, tokens[:8], 8)
            context.clear()
            started = time.perf_counter()
            context.prompt_begin(n_tokens)
            decode(context, tokens, n_batch)
            return {"seconds": time.perf_counter() - started}


def child(options: argparse.Namespace, what: str, file: Path, *arguments: object) -> dict[str, Any]:
    words = [sys.executable, __file__, "--child", what, str(file), *map(str, arguments), str(options.threads)]
    with file.open("rb") as weights:  # what is in the page cache already would count for somebody else
        os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return json.loads(control_group.run(words, parse_size(options.memory)).splitlines()[-1])


def context(options: argparse.Namespace) -> None:
    file = options.model or random_model(Path("build/bench"), "llama-3.1-8b")
    model = read_model(file)
    print("| streaming | context, tokens | KV cache | own memory at its peak | with the weights | seconds |")
    print("| --- | --: | --: | --: | --: | --: |")
    for n in (0, options.streaming):
        spec = str(StreamingSpec(tuple(range(n)), model.n_layer, 4, 1020, "full")) if n else "off"
        seen = child(options, "fill", file, spec, options.cache_type)
        cells = [seen["cache"], seen["own"], seen["own"] + model.n_bytes]
        sizes = " | ".join(format_bytes(cell) for cell in cells)
        print(f"| {n} of {model.n_layer} | {seen['n_ctx']} | {sizes} | {seen['seconds']:.0f} |", flush=True)
    print(f"\n{file.name}, {format_bytes(model.n_bytes)} of weights, cache {options.cache_type}, memory {options.memory}")


def weights(options: argparse.Namespace) -> None:
    if options.model is None:
        raise SystemExit("error: weights needs --model FILE.gguf")
    model = read_model(options.model)
    spec = str(StreamingSpec(tuple(range(options.streaming)), model.n_layer, 4, 252, "full"))
    seconds: dict[int, list[float]] = {N_UBATCH: [], options.tokens: []}
    for _ in range(options.repeats):
        for n_batch, seen in seconds.items():
            seen.append(child(options, "read", options.model, spec, options.tokens, n_batch)["seconds"])
            print(f"{n_batch} tokens a batch: {seen[-1]:.1f} s", file=sys.stderr)
    ratios = [whole / batches for batches, whole in zip(*seconds.values())]
    batches, whole = (statistics.median(seen) for seen in seconds.values())
    print(
        f"{options.model.name}, {format_bytes(model.n_bytes)} of weights, memory {options.memory}, {options.tokens} tokens: "
        f"{batches:.1f} s in batches of {N_UBATCH}, {whole:.1f} s layer by layer; ratio {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["context", "weights"])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--memory", default="8GiB")
    parser.add_argument("--streaming", type=int, default=24, help="number of streaming layers, the first ones")
    parser.add_argument("--cache-type", default="f16")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=usable_cores())
    options = parser.parse_args()
    (context if options.what == "context" else weights)(options)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        what, *words, threads = sys.argv[2:]
        if what == "fill":
            print(json.dumps(fill(*words, int(threads))))
        else:
            file, spec, n_tokens, n_batch = words
            print(json.dumps(read(file, spec, int(n_tokens), int(n_batch), int(threads))))
    else:
        main()
