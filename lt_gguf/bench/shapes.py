"""Measures what a hybrid model gains in decoding speed over the full model, on the same file, in one run.

    python scripts/bench/decode.py [--model FILE.gguf | --shape NAME] [--depths 2048,8192,16384] [--repeats 3]

For each depth it runs llama-bench on the full and on the hybrid model in turn, several times, and prints a Markdown table with the
median of the ratios beside the ratio that the bytes read predict: for each token the weights, and of the KV cache all
positions in a full layer and at most sink + window in a streaming one. Without --model it makes one with random weights, every other layer
streaming: of a shape that lets the cache matter (16 layers of 8 KV heads of 64), or of another (--shape).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from rich.console import Console
from rich.progress import track

from lt_gguf.gguf.file import GGUFModel, read_model
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.runtime.library import tool_path
from lt_gguf.spec import StreamingSpec


class Shape(NamedTuple):
    """A Llama's."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_ff: int
    n_vocab: int


SHAPES = {
    "16x8x64": Shape(16, 1024, 16, 8, 64, 2048, 4096),  # few weights, so that the cache matters
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),  # 15 GiB
}


def write_random_model(path: Path, shape: Shape, type_: GGMLQuantizationType = GGMLQuantizationType.F16) -> None:
    """A Llama with random weights in float16 or quantized; appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).standard_normal(1 << 22, np.float32)  # once and again: only their number matters
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        writer = GGUFWriter(Path(scratch) / path.name, "llama")
        writer.add_name("random weights, for benchmarks only")
        writer.add_vocab_size(shape.n_vocab)
        writer.add_tokenizer_model("no_vocab")
        writer.add_context_length(131072)
        writer.add_embedding_length(shape.n_embd)
        writer.add_block_count(shape.n_layer)
        writer.add_feed_forward_length(shape.n_ff)
        writer.add_head_count(shape.n_head)
        writer.add_head_count_kv(shape.n_head_kv)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_key_length(shape.head_size)
        writer.add_value_length(shape.head_size)
        writer.add_rope_dimension_count(shape.head_size)

        @functools.cache
        def rows(n_in: int) -> np.ndarray:
            return quantize(values[: values.size // n_in * n_in].reshape(-1, n_in) / n_in**0.5, type_)

        def matrix(name: str, n_in: int, n_out: int) -> None:
            writer.add_tensor(name, np.resize(rows(n_in), (n_out, rows(n_in).shape[1])), raw_dtype=type_)

        n_q, n_kv = shape.n_head * shape.head_size, shape.n_head_kv * shape.head_size
        matrix("token_embd.weight", shape.n_embd, shape.n_vocab)
        writer.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
        for layer in range(shape.n_layer):
            prefix = f"blk.{layer}."
            for norm in ("attn_norm", "ffn_norm"):
                writer.add_tensor(f"{prefix}{norm}.weight", np.ones(shape.n_embd, np.float32))
            matrix(f"{prefix}attn_q.weight", shape.n_embd, n_q)
            matrix(f"{prefix}attn_k.weight", shape.n_embd, n_kv)
            matrix(f"{prefix}attn_v.weight", shape.n_embd, n_kv)
            matrix(f"{prefix}attn_output.weight", n_q, shape.n_embd)
            matrix(f"{prefix}ffn_gate.weight", shape.n_embd, shape.n_ff)
            matrix(f"{prefix}ffn_up.weight", shape.n_embd, shape.n_ff)
            matrix(f"{prefix}ffn_down.weight", shape.n_ff, shape.n_embd)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (Path(scratch) / path.name).rename(path)


def bytes_read(model: GGUFModel, spec: StreamingSpec | None, depth: int) -> int:
    """By one decoded token at `depth`: the weights, and K and V in f16."""
    cells = [min(depth, spec.sink + spec.window) if spec and spec.is_streaming(il) else depth for il in range(model.n_layer_main)]
    return model.n_bytes + sum(n * model.kv_shape.token_bytes(il) for il, n in enumerate(cells))


def tokens_per_second(model: Path, spec: str, depth: int, n_tokens: int, threads: int, flash: str) -> float:
    """llama-bench's figure for decoding `n_tokens` after `depth`."""
    command = [tool_path("llama-bench"), "-m", model, "-p", "0", "-n", n_tokens, "-d", depth, "-r", "1", "-fa", flash,
               "-t", threads, "-ub", "512", "-o", "json"]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env={**os.environ, "LT_STREAMING": spec})
    if done.returncode:
        sys.exit(f"bench: llama-bench failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)[0]["avg_ts"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a GGUF file (default: one with random weights)")
    parser.add_argument("--shape", choices=list(SHAPES), default=next(iter(SHAPES)), help="of the one with random weights")
    parser.add_argument("--streaming", help="spec of the hybrid (default: the file's, else every other layer, sink 4, window 1020)")
    parser.add_argument("--depths", default="2048,8192,16384", help="numbers of tokens already in the cache")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--n-tokens", type=int, default=32, help="to decode and time in each run")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--flash-attn", choices=["on", "off"], default="on")
    options = parser.parse_args()

    path = options.model or Path(f"build/bench/random-{options.shape}-f16.gguf")
    if not options.model and not path.exists():
        write_random_model(path, SHAPES[options.shape])
    model = read_model(path)
    if options.streaming:
        spec = StreamingSpec.parse(options.streaming, model.n_layer, model.spec)
    else:
        spec = model.spec or StreamingSpec.interleaved(model.n_layer, 0.5)

    console = Console(stderr=True)
    rows = []
    for depth in map(int, options.depths.split(",")):
        speeds = []
        for _ in track(range(options.repeats), f"depth {depth}", console=console):
            settings = options.n_tokens, options.threads, options.flash_attn
            speeds.append([tokens_per_second(path, s, depth, *settings) for s in ("off", str(spec))])
        ratios = [hybrid / full for full, hybrid in speeds]
        predicted = bytes_read(model, None, depth) / bytes_read(model, spec, depth)
        full, hybrid = (statistics.median(column) for column in zip(*speeds))
        ratio = statistics.median(ratios)
        rows.append(
            f"| {depth} | {full:.1f} | {hybrid:.1f} | {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | {predicted:.2f} | {ratio / predicted:.0%} |"
        )

    print(
        f"{path.name}, {spec}, f16 cache, flash attention {options.flash_attn}, {options.threads} threads, {options.repeats} pairs of runs\n"
    )
    print(
        "| tokens in the cache | full, tokens/s | hybrid, tokens/s | hybrid ÷ full, median (range) | predicted from bytes | measured ÷ predicted |"
    )
    print("| --: | --: | --: | --: | --: | --: |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
