"""What every step of a walk uses: the context, the model of what it must hold, and what holds after each step."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from support.memory_model import MemoryModel, Sequence
from support.native import FULL, PROMPT, STREAMING
from support.oracle import Subject, random_tokens
from support.reference import NumpyLlama

from lt_gguf.spec import StreamingSpec

N_SEQ, N_UBATCH, N_BATCH = 3, 8, 512
N_CTX = {True: 1024, False: 512 * N_SEQ}  # unified: for all sequences together; otherwise 512 for each
END = 2**31 - 1

sequences = st.integers(0, N_SEQ - 1)
lengths = st.integers(1, 40)
fractions = st.floats(0, 1)


@cache
def tiny_model() -> Subject:
    return Subject.build("llama", 2, Path(tempfile.mkdtemp()))


@cache
def reference(spec: StreamingSpec) -> NumpyLlama:
    return NumpyLlama(tiny_model().hf, spec)


def pick(items: list, fraction: float):
    return items[min(int(fraction * len(items)), len(items) - 1)]


class Walk(RuleBasedStateMachine):
    layers = [1]
    unified = True
    prefill = "stream"
    sink, window = 3, 16

    def __init__(self):
        super().__init__()
        subject = tiny_model()
        spec = subject.spec(self.sink, self.window, self.layers, prefill=self.prefill)
        self.llama = reference(spec)
        self.model = MemoryModel(spec, N_SEQ)
        self.context = subject.context(
            spec, n_ctx=N_CTX[self.unified], n_batch=N_BATCH, n_ubatch=N_UBATCH, n_seq_max=N_SEQ, kv_unified=self.unified
        )
        self.held = [[] for _ in range(N_SEQ)]
        self.saved_whole: list[tuple[bytes, list[Sequence]]] = []
        self.saved: list[tuple[bytes, Sequence]] = []
        self.saved_partial: list[tuple[bytes, Sequence]] = []
        self.restored_partial = False
        self.n_tokens = 0

    def teardown(self):
        self.context.close()

    @invariant()
    def memory_holds_what_it_must(self):
        for seq, sequence in enumerate(self.model.sequences):
            held = self.context.positions(STREAMING, seq)
            assert self.context.positions(FULL, seq) == sequence.positions()
            assert not Counter(held) - Counter(sequence.positions()), "the streaming part holds what was removed"
            assert not self.model.must_hold(seq) - Counter(held), "a position that the next token may see was dropped"
            assert self.context.pos_max(seq) == sequence.next() - 1
            if sequence.is_whole() or not self.model.two_phases:
                assert self.context.pos_min(seq) == self.model.pos_min(seq, held), sequence.prompts
            if self.model.two_phases:
                assert self.context.in_prompt(seq) == (sequence.prompt() is not None)
            self.held[seq] = held
        if not any(sequence.prompt() for sequence in self.model.sequences):
            assert self.context.kv_bytes(PROMPT) == 0, "no prompt is being read"

    def room(self, seq: int) -> int:
        if self.unified:
            return N_CTX[True] - self.model.cells()
        return 512 - len(self.model.sequences[seq].entries)

    def tokens(self, n: int) -> np.ndarray:
        self.n_tokens += 1
        return random_tokens(n, seed=self.n_tokens)
