"""How fast attention of one token is on the CPU: our kernel beside both of llama.cpp's ways and what memory gives, in one run.

    python scripts/bench/attention.py [--depths 1024,8192,32768] [--threads 1,2] [--repeats 15] [--queries 1]

One layer at a time, of the shapes of some models. As much of the cache as layers make `--mebibytes` is gone through in turn, so that it
comes from memory and not from the processor's caches, as in a model. Each time is the least of the repeats, which take turns. Memory's speed
is that of a plain read of as many bytes by as many threads. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import threading
import time
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Type

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.attention import Attention, Operation, rounded

SHAPES = {  # heads, KV heads, size of a head
    "SmolLM2-135M": (9, 3, 64),
    "Qwen2.5-1.5B": (12, 2, 128),
    "Llama-3.1-8B": (32, 8, 128),
}
TYPES = {"f16": Type.F16, "q8_0": Type.Q8_0, "q4_0": Type.Q4_0}
WAYS = {"ours": "ours", "flash": "flash attention", "products": "without it"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depths", type=numbers, default=[1024, 8192, 32768], help="cells of the cache")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--types", type=lambda text: text.split(","), default=list(TYPES), help=f"of the cache: {', '.join(TYPES)}")
    parser.add_argument("--queries", type=int, default=1, help="tokens at a time, as drafts are checked")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--mebibytes", type=int, default=192, help="of cache that is gone through; more than the processor keeps")
    options = parser.parse_args()
    print(f"{options.queries} token{'s' * (options.queries > 1)} at a time, a layer; ms, and how many times as fast ours is\n")
    print("| shape | cache | cells | threads | ours | llama.cpp, flash attention | without it | GB/s | of a plain read |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: | --: |")
    for shape in SHAPES:
        for type_ in options.types:
            for depth in options.depths:
                made = attention(shape, TYPES[type_], depth, options.queries)
                n_bytes = sum(x.size * size(TYPES[type_]) for x in (made.k, made.v))
                n_layers = max(1, round(options.mebibytes * 2**20 / n_bytes))
                with contextlib.ExitStack() as stack:
                    ways = {way: [stack.enter_context(made.operation(way)) for _ in range(n_layers)] for way in ways_of(type_)}
                    for n_threads in options.threads:
                        seconds = {way: best(layers, n_threads, options.repeats) for way, layers in ways.items()}
                        read = read_speed(int(n_bytes * n_layers), n_threads)
                        print(row(shape, type_, depth, n_threads, seconds, n_bytes, read), flush=True)


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def ways_of(type_: str) -> list[str]:
    """Values that aren't held transposed in blocks need flash attention."""
    return [way for way in WAYS if way != "products" or type_ == "f16"]


def size(type_: Type) -> float:
    from gguf.constants import GGML_QUANT_SIZES

    n, n_bytes = GGML_QUANT_SIZES[type_]
    return n_bytes / n


def attention(shape: str, type_: Type, n_cells: int, n_queries: int) -> Attention:
    n_head, n_kv, dim = SHAPES[shape]
    rng = np.random.default_rng(0)
    k, v = (rounded(rng.standard_normal((1, n_cells, n_kv, dim), np.float32), type_) for _ in range(2))
    q = rng.standard_normal((1, n_queries, n_head, dim), np.float32)
    return Attention(q, k, v, np.zeros((1, n_queries, n_cells), np.float16), type_k=type_, type_v=type_)


def best(layers: list[Operation], n_threads: int, repeats: int) -> float:
    """Seconds of a layer."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        for layer in layers:
            layer.compute(n_threads)
        seconds.append((time.perf_counter() - begun) / len(layers))
    return min(seconds)


def read_speed(n_bytes: int, n_threads: int) -> float:
    """Bytes a second of a sum over that many bytes."""
    parts = np.array_split(np.ones(max(n_bytes, 64 << 20) // 8, np.int64), n_threads)
    seconds = []
    for _ in range(5):
        threads = [threading.Thread(target=part.sum) for part in parts]
        begun = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds.append(time.perf_counter() - begun)
    return sum(part.nbytes for part in parts) / min(seconds)


def row(shape: str, type_: str, depth: int, n_threads: int, seconds: dict[str, float], n_bytes: float, read: float) -> str:
    others = [
        f"{seconds[way] * 1e3:.2f} ({seconds[way] / seconds['ours']:.1f})" if way in seconds else "–"
        for way in ("flash", "products")
    ]
    speed = n_bytes / seconds["ours"]
    cells = [
        shape,
        type_,
        f"{depth:,}",
        str(n_threads),
        f"{seconds['ours'] * 1e3:.2f}",
        *others,
        f"{speed / 1e9:.1f}",
        f"{100 * speed / read:.0f} %",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
