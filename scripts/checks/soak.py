"""Decodes a million tokens on a tiny hybrid model and watches that memory stays flat.

    python scripts/checks/soak.py [--tokens N] [--layers half|all] [--sequences N] [--unified] [--kv f16]

Sequences are decoded together, a token each at a time. One half of them shifts its context when it is full, as
llama.cpp's tools do; the other half goes back to a checkpoint of its prompt, as llama-server does for an edited message,
and decodes the same tokens again, so that its logits must be those of the first time. Ends with an error if KV bytes
change, if the process grows by more than --tolerance after the first tenth of the tokens, or if the logits differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.native import FULL, PARTIAL, STREAMING, Context, Model, Token
from tiny_model import N_VOCAB, write_tiny_model

SINK, WINDOW = 4, 124
N_CTX_SEQ, N_PROMPT, N_KEEP, N_DISCARD = 768, 200, 16, 500
LOGIT_TOLERANCE = {
    "f32": 1e-3,
    "f16": 5e-2,
    "bf16": 0.2,
    "q8_0": 0.2,
}  # of logits of size 1; where cells lie changes the order of sums


class SoakError(Exception):
    """What did not stay as it was."""


class Sequence:
    """One sequence: at each call of `token` its next token, and from time to time room for more."""

    def __init__(self, context: Context, seq: int, shifts: bool):
        self.context, self.seq, self.shifts = context, seq, shifts
        self.text = np.random.default_rng(seq).integers(3, N_VOCAB, N_CTX_SEQ)
        context.decode(self.text[:N_PROMPT], 0, seq)
        self.checkpoint = context.save_seq(seq, PARTIAL)
        self.n_past = N_PROMPT
        self.n_rounds = 0

    def token(self) -> Token:
        if self.n_past == N_CTX_SEQ:
            self.n_rounds += 1
            if self.shifts:
                self.shift()
            else:
                self.go_back()
        self.n_past += 1
        is_last = not self.shifts and self.n_past == N_CTX_SEQ
        return Token(int(self.text[self.n_past - 1]), self.n_past - 1, (self.seq,), is_last)

    def shift(self) -> None:
        if not self.context.seq_rm(self.seq, N_KEEP, N_KEEP + N_DISCARD):
            raise SoakError(f"sequence {self.seq} could not be shifted in round {self.n_rounds}")
        self.context.seq_add(self.seq, N_KEEP + N_DISCARD, -1, -N_DISCARD)
        self.n_past -= N_DISCARD

    def go_back(self) -> None:
        restored = self.context.restore_seq(self.checkpoint, self.seq, PARTIAL)
        if not restored or not self.context.seq_rm(self.seq, N_PROMPT, -1):
            raise SoakError(f"sequence {self.seq} could not go back to its prompt in round {self.n_rounds}")
        self.n_past = N_PROMPT


def soak(context: Context, n_tokens: int, n_seq: int, kv: str, tolerance: float) -> None:
    """Decodes `n_tokens` tokens. Raises SoakError if something doesn't stay flat; `tolerance` is in MiB."""
    process = psutil.Process()
    kv_bytes = context.kv_bytes(FULL), context.kv_bytes(STREAMING)
    sequences = [Sequence(context, seq, shifts=seq % 2 == 0) for seq in range(n_seq)]
    first_logits: dict[int, np.ndarray] = {}
    baseline = largest = 0.0
    n_done, start, next_report = 0, time.monotonic(), 0
    while n_done < n_tokens:
        batch = [sequence.token() for sequence in sequences]
        asked = [token.seqs[0] for token in batch if token.logits]
        for seq, row in zip(asked, context.decode_batch(batch)):
            difference = np.abs(row - first_logits.setdefault(seq, row)).max()
            if not difference <= LOGIT_TOLERANCE[kv]:
                raise SoakError(f"sequence {seq}, round {sequences[seq].n_rounds}: logits differ by {difference:.2e}")
        n_done += n_seq
        if n_done < next_report:
            continue
        next_report += n_tokens / 20
        rss = process.memory_info().rss / 2**20
        if n_done >= n_tokens / 10:
            baseline = baseline or rss
            largest = max(largest, rss)
        now = context.kv_bytes(FULL), context.kv_bytes(STREAMING)
        print(
            f"{n_done:9,} tokens  {n_done / (time.monotonic() - start):7,.0f} tokens/s  process {rss:7.1f} MiB  "
            f"KV full {now[0]:,} streaming {now[1]:,} bytes  {sum(s.n_rounds for s in sequences):,} rounds",
            flush=True,
        )
        if now != kv_bytes:
            raise SoakError(f"KV bytes were {kv_bytes} and are {now} after {n_done:,} tokens")
        if largest > baseline + tolerance:
            raise SoakError(f"the process grew from {baseline:.1f} to {largest:.1f} MiB after {n_done:,} tokens")
    for sequence in sequences:
        held = context.positions(STREAMING, sequence.seq)
        if len(held) > context.kv_cells(STREAMING) or held[:SINK] != list(range(SINK)):
            raise SoakError(f"sequence {sequence.seq} holds {held[:10]}... of its streaming part")
    print(f"flat: {n_done:,} tokens, process {baseline:.1f} MiB at a tenth, {largest:.1f} MiB at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--layers", choices=["half", "all"], default="half", help="which layers stream")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--unified", action="store_true", help="one cache for all sequences")
    parser.add_argument("--kv", choices=LOGIT_TOLERANCE, default="f32")
    parser.add_argument("--tolerance", type=float, default=4.0, help="MiB by which the process may grow after a tenth")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, Model(write_tiny_model(Path(directory) / "tiny.gguf")) as model:
        model.set_streaming(f"layers={'1' if options.layers == 'half' else 'all'};sink={SINK};window={WINDOW};prefill=stream")
        settings = dict(n_batch=512, n_ubatch=64, n_seq_max=options.sequences, kv_unified=options.unified)
        settings |= dict(kv=options.kv, flash=options.kv != "f32")
        with model.context(n_ctx=N_CTX_SEQ * options.sequences, **settings) as context:
            try:
                soak(context, options.tokens, options.sequences, options.kv, options.tolerance)
            except SoakError as error:
                sys.exit(f"soak: error: {error}")


if __name__ == "__main__":
    main()
