"""Measures what one slot's prompt costs the others: some sequences decode while another one reads, in the same batches.

    python scripts/bench/slots.py MODEL.gguf [--streaming SPEC] [--decoding 1,3,7] [--prompt 4096] [--repeats 3]

As llama-server does it with a unified cache: each batch has up to 512 tokens of the prompt and one token of each of the others. Prints
seconds for reading the prompt, with all layers full and with the hybrid, and their ratio (above 1: the hybrid is faster), each the
median of runs in turn. LT_GGUF_LIB_PATH chooses other libraries, to compare two versions of the patch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.native import C, Context, Model, Token
from support.oracle import random_tokens

from lt_gguf.runtime.cpu import usable_cores

N_BATCH, N_BEFORE = 512, 1500  # tokens that the others have when the prompt comes: more than their windows


def seconds(model: Model, spec: str, n_decoding: int, n_prompt: int) -> float:
    """For a prompt that is read beside `n_decoding` sequences."""
    model.set_streaming(spec)
    n_seq = n_decoding + 1
    n_ctx = n_prompt + n_decoding * (N_BEFORE + n_prompt // 500 + 10)
    settings = dict(n_batch=N_BATCH + n_seq, n_ubatch=N_BATCH, n_seq_max=n_seq, kv_unified=True, kv="f16", flash=True)
    with model.context(n_ctx=n_ctx, n_threads=usable_cores(), **settings) as context:
        for seq in range(n_decoding):
            read(context, seq, N_BEFORE)
        context.prompt_begin(n_prompt, n_decoding)
        prompt = random_tokens(n_prompt)
        begin = time.perf_counter()
        for step, first in enumerate(range(0, n_prompt, N_BATCH)):
            last = min(first + N_BATCH, n_prompt)
            batch = [Token(5, N_BEFORE + step, (seq,)) for seq in range(n_decoding)]
            batch += [Token(int(prompt[i]), i, (n_decoding,), i == n_prompt - 1) for i in range(first, last)]
            context.decode_batch(batch)
        C.llama_synchronize(context.handle)
        return time.perf_counter() - begin


def read(context: Context, seq: int, n: int) -> None:
    context.prompt_begin(n, seq)
    context.decode_batch([Token(int(t), i, (seq,), i == n - 1) for i, t in enumerate(random_tokens(n, seed=seq))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--streaming", default="layers=0,1,8-13,16,24-29;sink=4;window=1020;prefill=full")
    parser.add_argument("--decoding", default="1,3,7", help="numbers of sequences that decode meanwhile")
    parser.add_argument("--prompt", type=int, default=4096, help="tokens")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{options.model.name}, a prompt of {options.prompt} tokens, {options.repeats} pairs of runs\n")
    print("| sequences that decode meanwhile | full, s | hybrid, s | full ÷ hybrid, median (range) |\n| --: | --: | --: | --: |")
    with Model(options.model) as model:
        for n in map(int, options.decoding.split(",")):
            runs = [
                [seconds(model, spec, n, options.prompt) for spec in ("off", options.streaming)]
                for _ in track(range(options.repeats), f"{n} decoding", console=Console(stderr=True))
            ]
            full, hybrid = (statistics.median(column) for column in zip(*runs))
            ratios = [a / b for a, b in runs]
            print(f"| {n} | {full:.1f} | {hybrid:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
