"""Steps that remove: rewinds to everywhere, ranges in the middle, whole sequences."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import rule
from support.walk.base import END, N_SEQ, Walk, fractions, lengths, pick, sequences


class Removing(Walk):
    @rule(seq=sequences, n=lengths)
    def remove_the_end(self, seq, n):
        self.remove(seq, max(0, self.model.sequences[seq].next() - n), -1)

    @rule(seq=sequences, by=st.integers(-2, 1))
    def remove_up_to_the_edge_of_what_is_held(self, seq, by):
        self.remove(seq, max(0, self.context.pos_min(seq) - 1 + self.window + by), -1)

    @rule(seq=sequences, which=fractions, where=st.sampled_from([0, 0, 0.5, 1, 1]), by=st.integers(-1, 1))
    def rewind_to_a_prompt(self, seq, which, where, by):
        """To its begin, into its middle, to its end, and a position before or after."""
        sequence = self.model.sequences[seq]
        if sequence.prompts:
            prompt = pick(sequence.prompts, which)
            length = min(prompt.end, sequence.next()) - prompt.begin
            self.remove(seq, max(0, prompt.begin + int(where * length) + by), -1)

    @rule(seq=sequences, first=fractions, n=lengths)
    def remove_a_range(self, seq, first, n):
        p0 = int(first * self.model.sequences[seq].next())
        self.remove(seq, p0, p0 + n)

    @rule(seq=sequences, what=st.sampled_from(["the end of all", "a sequence", "the other sequences", "everything"]))
    def remove_more(self, seq, what):
        """One rule for several operations, so that walks don't spend their time on building up again."""
        if what == "a sequence":
            self.remove(seq, -1, -1)
        elif what == "everything":
            self.context.clear()
            for sequence in self.model.sequences:
                sequence.end()
        elif what == "the other sequences":
            self.context.seq_keep(seq)
            for other, sequence in enumerate(self.model.sequences):
                if other != seq and self.unified:  # llama.cpp looks at the cache of this sequence only
                    sequence.end()
        else:
            p0 = max(sequence.next() for sequence in self.model.sequences) - 20
            allowed = all(self.can_remove(other, p0, END) for other in range(N_SEQ))
            assert self.context.seq_rm(-1, p0, -1) == allowed
            if allowed:
                for sequence in self.model.sequences:
                    sequence.become(sequence.without(p0, END))

    def remove(self, seq: int, p0: int, p1: int):
        low, high = max(p0, 0), END if p1 < 0 else p1
        allowed = self.can_remove(seq, low, high)
        assert p1 >= 0 or self.context.can_rm(seq, p0) == allowed
        assert self.context.seq_rm(seq, p0, p1) == allowed
        if allowed:
            sequence = self.model.sequences[seq]
            sequence.become(sequence.without(low, high))

    def can_remove(self, seq: int, p0: int, p1: int) -> bool:
        sequence = self.model.sequences[seq]
        if sequence.refused and not sequence.entries:  # what a refused copy left: only removing all makes it usable
            return p0 <= 0 and p1 == END
        after = sequence.without(p0, p1)
        if not after.entries:
            return True
        return not sequence.refused and self.model.allows(
            seq, self.held[seq], after, lambda entry: -1 if p0 <= entry.pos < p1 else entry.pos
        )
