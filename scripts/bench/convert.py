"""Measures what our converter takes longer than upstream's on the same checkpoint, without an analysis.

    python scripts/bench/convert.py [--size 1GiB] [--outtype auto] [--repeats 5] [--folder DIR]

Makes a Llama checkpoint with random bfloat16 weights of about that size, in two files, and converts it in turns with both, several times.
The first round isn't counted: it fills the page cache. Prints a Markdown row with the medians and the ratio of each pair.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

from lt_gguf.memory.sizes import format_bytes, parse_size
from lt_gguf.runtime.library import upstream_dir

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

HIDDEN, N_FF, N_VOCAB = 2048, 5632, 320
LAYER_BYTES = 2 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * N_FF)  # bfloat16, without norms


def write_checkpoint(folder: Path, n_bytes: int) -> int:
    """Writes the checkpoint; returns the bytes of its weights."""
    import torch
    from support import tiny_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=N_VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=N_FF,
        num_hidden_layers=max(1, round(n_bytes / LAYER_BYTES)),
        num_attention_heads=16,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max(n_bytes // 2, 2**20))
    tiny_checkpoint.write_tokenizer(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def seconds(command: list[str], outfile: Path) -> float:
    """How long the command takes to write `outfile`, which is removed."""
    start = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - start
    if result.returncode:
        sys.exit(f"error: {result.stderr.strip().splitlines()[-1]}")
    outfile.unlink()
    os.sync()  # its last pages, so that the next one doesn't wait for them
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", default="1GiB", help="of the checkpoint's weights")
    parser.add_argument("--outtype", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write; else a folder for temporary files")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        checkpoint, outfile = Path(scratch) / "checkpoint", Path(scratch) / "out.gguf"
        with console.status("Making a checkpoint with random weights"):
            n_bytes = write_checkpoint(checkpoint, parse_size(arguments.size))
        common = [str(checkpoint), "--outfile", str(outfile), "--outtype", arguments.outtype]
        ours = [sys.executable, str(ROOT / "convert" / "hf_to_gguf_lt.py"), *common, "--select", "interleave-odd"]
        upstreams = [sys.executable, str(upstream_dir() / "convert_hf_to_gguf.py"), *common]
        pairs = []
        for i in track(range(arguments.repeats + 1), "Converting in turns", console=console, transient=True):
            # note: each goes first in every other round
            order = (ours, upstreams) if i % 2 else (upstreams, ours)
            taken = {id(command): seconds(command, outfile) for command in order}
            pairs.append((taken[id(ours)], taken[id(upstreams)]))
    pairs = pairs[1:]
    ratios = [our / upstream for our, upstream in pairs]
    print("| weights | --outtype | upstream | ours | ours ÷ upstream, median (range) |")
    print("| --: | --- | --: | --: | --: |")
    print(
        f"| {format_bytes(n_bytes)} | {arguments.outtype} | {statistics.median(pair[1] for pair in pairs):.2f} s "
        f"| {statistics.median(pair[0] for pair in pairs):.2f} s "
        f"| {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) |"
    )


if __name__ == "__main__":
    main()
