"""Steps that save and restore: everything, one sequence, and the streaming part alone."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from support.memory_model import Sequence
from support.native import PARTIAL, STREAMING
from support.reference import Entry
from support.walk.base import fractions, pick, sequences
from support.walk.decoding import Decoding, asked_for
from support.walk.removing import Removing


class States(Decoding, Removing):
    @rule()
    def save_everything(self):
        self.saved_whole.append((self.context.save(), [sequence.snapshot() for sequence in self.model.sequences]))

    @precondition(lambda self: self.saved_whole)
    @rule(which=fractions)
    def restore_everything(self, which):
        state, conversations = pick(self.saved_whole, which)
        assert self.context.restore(state)
        # a cell that two sequences shared is still shared, but it is no longer one that is shared with anything else
        fresh: dict[int, Entry] = {}
        for sequence, saved in zip(self.model.sequences, conversations):
            entries = [fresh.setdefault(id(entry), entry.at(entry.pos)) for entry in saved.entries]
            sequence.become(Sequence(entries, saved.prompts))

    @rule(seq=sequences)
    def save_a_sequence(self, seq):
        self.saved.append((self.context.save_seq(seq), self.model.sequences[seq].snapshot()))

    @precondition(lambda self: self.saved)
    @rule(seq=sequences, which=fractions)
    def restore_a_sequence(self, seq, which):
        state, saved = pick(self.saved, which)
        self.remove(seq, -1, -1)
        if len(saved.entries) <= self.room(seq):
            assert self.context.restore_seq(state, seq)
            self.model.sequences[seq].become(Sequence([entry.at(entry.pos) for entry in saved.entries], saved.prompts))

    @rule(seq=sequences, n=st.one_of(st.integers(1, 20), st.integers(200, 300)), asked=asked_for)
    def save_a_checkpoint_and_go_on(self, seq, n, asked):
        sequence = self.model.sequences[seq]
        if sequence.entries:
            self.saved_partial.append((self.context.save_seq(seq, PARTIAL), sequence.snapshot()))
            self.decode(seq, n, asked)

    @precondition(lambda self: self.saved_partial)
    @rule(seq=sequences, which=fractions, back=st.integers(0, 6))
    def return_to_a_checkpoint(self, seq, which, back):
        """As llama-server does it: restore the streaming part, then remove what came after it from the full part."""
        sequence = self.model.sequences[seq]
        checkpoints = [saved for saved in self.saved_partial if self.goes_on(sequence, saved[1])]
        if sequence.refused or not checkpoints:
            return  # a checkpoint of another conversation is the caller's mistake
        state, saved = pick(checkpoints, which)
        assert self.context.restore_seq(state, seq, PARTIAL)
        self.restored_partial = True
        self.held[seq] = self.context.positions(STREAMING, seq)
        assert set(self.held[seq]) <= {entry.pos for entry in saved.entries}
        sequence.prompts = list(saved.prompts)
        if saved.next() < sequence.next() and self.model.must_hold(seq) - Counter(self.held[seq]):
            self.expect_refusal(seq)
        self.remove(seq, saved.next(), -1)
        self.remove(seq, saved.next() - back, -1)

    @staticmethod
    def goes_on(sequence: Sequence, saved: Sequence) -> bool:
        """Whether the sequence is what `saved` was, with tokens after it."""
        end = saved.next()
        now = [(entry.pos, id(entry.keys)) for entry in sequence.entries if entry.pos < end]
        return sorted(now) == sorted((entry.pos, id(entry.keys)) for entry in saved.entries)
