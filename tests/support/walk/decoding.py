"""Steps that feed tokens: decoded ones, prompts and parts of prompts, of one sequence or of several at once."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from support.memory_model import OPEN, Prompt, Sequence
from support.native import DecodeError, Token
from support.oracle import EXACT, difference
from support.reference import Conversation
from support.walk.base import N_BATCH, N_SEQ, Walk, lengths, sequences

# which tokens of a batch ask for logits: all of a decoded one; others belong to a prompt, which the last one ends or not
ASKED = {
    "all": lambda n: [True] * n,
    "last": lambda n: [False] * (n - 1) + [True],
    "none": lambda n: [False] * n,
    "all but last": lambda n: [True] * (n - 1) + [False],
    "all but first": lambda n: [False] * (n > 1) + [True] * (n - (n > 1)),
    "some": lambda n: [i % 3 == 1 for i in range(n)],
}
asked_for = st.sampled_from(list(ASKED))


class Decoding(Walk):
    @initialize(lengths=st.tuples(*[st.sampled_from([0, 10, 150, 300, 400])] * N_SEQ), asked=asked_for)
    def begin_with_prompts(self, lengths, asked):
        for seq, n in enumerate(lengths):
            self.decode(seq, n, asked)

    @rule(seq=sequences, n=st.integers(100, 250), asked=asked_for)
    def feed_a_long_text(self, seq, n, asked):
        """The streaming part has 256 cells at least: only much text makes it drop something."""
        self.decode(seq, n, asked)

    @rule(seq=sequences, n=lengths, asked=asked_for)
    def feed_a_few_tokens(self, seq, n, asked):
        self.decode(seq, n, asked)

    @rule(seq=sequences, n=st.integers(1, 20))
    def decode_a_few_tokens(self, seq, n):
        self.decode(seq, n, "all")

    @rule(seq=sequences, n=st.one_of(lengths, st.integers(100, 250)), size=st.integers(1, 120), asked=asked_for)
    def read_a_declared_prompt(self, seq, n, size, asked):
        """It is one whatever logits it asks for, and ends with its last token."""
        sequence = self.model.sequences[seq]
        n = min(n, self.room(seq))
        if n and not sequence.refused and not sequence.prompt():
            self.context.prompt_begin(n, seq)
            for first in range(0, n, size):
                part = min(size, n - first)
                self.decode(seq, part, asked, declared=True, ends=first + part == n)

    def decode(self, seq: int, n: int, asked: str = "all", declared: bool = False, ends: bool | None = None):
        sequence = self.model.sequences[seq]
        n = min(n, self.room(seq))
        if sequence.refused:
            self.expect_refusal(seq)
        elif n:
            wanted = ASKED[asked](n)
            batch, expected = self.batch(seq, wanted, declared, ends)
            assert difference(self.context.decode_batch(batch), expected) < EXACT

    def batch(self, seq: int, wanted: list[bool], declared: bool = False, ends: bool | None = None):
        """The next tokens of a sequence, which are then part of it, and the logits that those who ask for them get."""
        sequence = self.model.sequences[seq]
        start, n = sequence.next(), len(wanted)
        tokens = self.tokens(n)
        first = self.open_prompt(sequence, declared or not all(wanted))
        conversation = Conversation(self.llama, sequence.entries)
        expected = conversation.decode(tokens, range(start, start + n), first)
        sequence.entries = conversation.entries
        self.close_prompt(sequence, wanted[-1] if ends is None else ends)
        batch = [Token(int(t), start + i, (seq,), asks) for i, (t, asks) in enumerate(zip(tokens, wanted))]
        return batch, expected[np.array(wanted, bool)]

    def open_prompt(self, sequence: Sequence, begins: bool) -> int | None:
        """The first position that the next tokens see as tokens of a prompt, None if they are decoded."""
        if not self.model.two_phases:
            return None
        if begins and not sequence.prompt():
            start = sequence.next()
            sequence.prompts.append(Prompt(start, OPEN, max(0, start - self.window)))
        prompt = sequence.prompt()
        return prompt.first if prompt else None

    def close_prompt(self, sequence: Sequence, ends: bool) -> None:
        prompt = sequence.prompt()
        if prompt and ends:
            sequence.prompts[-1] = Prompt(prompt.begin, sequence.next(), prompt.first)

    @rule(n=st.tuples(*[st.integers(0, 60)] * N_SEQ), asked=st.tuples(*[asked_for] * N_SEQ), in_turns=st.booleans())
    def feed_several_sequences_at_once(self, n, asked, in_turns):
        """In all phases at once, their tokens one after the other or in turns."""
        usable = [seq for seq in range(N_SEQ) if n[seq] and not self.model.sequences[seq].refused]
        if not usable or min(map(self.room, usable)) < sum(n[seq] for seq in usable):
            return
        parts = [self.batch(seq, ASKED[asked[seq]](n[seq])) for seq in usable]
        if in_turns:
            batch = [part[i] for i in range(max(n)) for part, _ in parts if i < len(part)]
        else:
            batch = [token for part, _ in parts for token in part]
        assert len(batch) <= N_BATCH
        asking = [token.seqs[0] for token in batch if token.logits]
        computed = self.context.decode_batch(batch)
        for seq, (_, expected) in zip(usable, parts):
            assert difference(computed[[other == seq for other in asking]], expected) < EXACT

    @precondition(lambda self: self.unified)
    @rule(a=sequences, b=sequences, n=st.integers(1, 60), asked=asked_for)
    def feed_a_common_text(self, a, b, n, asked):
        first, second = self.model.sequences[a], self.model.sequences[b]
        fresh = not (first.entries or first.refused or second.entries or second.refused)
        if a != b and fresh and self.room(a) >= n:
            batch, expected = self.batch(a, ASKED[asked](n))
            computed = self.context.decode_batch(token._replace(seqs=(a, b)) for token in batch)
            assert difference(computed, expected) < EXACT
            second.become(first)

    def expect_refusal(self, seq: int):
        with pytest.raises(DecodeError) as refusal:
            self.context.decode(self.tokens(1), self.model.sequences[seq].next(), seq)
        assert refusal.value.code < 0
