"""Steps that copy sequences and that change positions, as llama.cpp's context shift and self-extend do."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from support.memory_model import Prompt, Sequence
from support.native import FULL, PROMPT, STREAMING
from support.walk.base import END, fractions, sequences
from support.walk.removing import Removing


class Copying(Removing):
    @rule(source=sequences, destination=sequences, last=st.one_of(st.just(1.0), fractions))
    def copy_a_prefix(self, source, destination, last):
        p1 = int(last * self.model.sequences[source].next()) + 1
        if source != destination:
            self.remove(destination, -1, -1)
            self.held[destination] = []
            self.copy(source, destination, 0, p1 if self.unified and last < 1 else -1)

    @precondition(lambda self: self.unified)
    @rule(source=sequences, destination=sequences)
    def copy_what_follows(self, source, destination):
        origin, copied = self.model.sequences[source], self.model.sequences[destination]
        p0 = copied.next()
        within = any(p.begin < p0 < p.end for sequence in (origin, copied) for p in sequence.prompts)
        if source != destination and p0 < origin.next() and not within:
            self.copy(source, destination, p0, -1)

    def copy(self, source: int, destination: int, p0: int, p1: int):
        origin, copied = self.model.sequences[source], self.model.sequences[destination]
        high = END if p1 < 0 else p1
        taken = [entry for entry in origin.entries if p0 <= entry.pos < high]
        dropped = [p for p in self.model.dropped(source, self.held[source]) if p0 <= p < high]
        self.context.seq_cp(source, destination, p0, p1)

        after = copied.snapshot()
        # a cell of a unified cache is in both sequences; otherwise its content is copied
        after.entries += taken if self.unified else [entry.at(entry.pos) for entry in taken]
        after.prompts += [Prompt(max(p.begin, p0), p.end, p.first) for p in origin.prompts if p.end > p0 and p.begin < high]
        after.refused = copied.refused or origin.refused
        if after.next() < origin.next():
            after.cut_prompts()  # as if the whole had been copied and its end removed
        # refused, too, where only one of them has a prompt in the part for long prompts, which would have to be copied for the other
        differs = copied.entries and bool(origin.prompt()) != bool(copied.prompt())
        stays = differs and taken and self.context.positions(FULL, destination) == copied.positions()
        if self.model.visible(dropped, after) or stays:
            copied.refused = True
        else:
            copied.become(after)

    @rule(seq=sequences, n_keep=st.integers(0, 40), n_discard=st.integers(1, 60))
    def shift_the_context(self, seq, n_keep, n_discard):
        """As llama.cpp's tools do it: forget what follows the first n_keep tokens and close the gap."""
        self.remove(seq, n_keep, n_keep + n_discard)
        self.held[seq] = self.context.positions(STREAMING, seq)
        p0 = n_keep + n_discard
        self.move(seq, p0, -1, lambda p: p - n_discard, lambda *span: self.context.seq_add(*span, -n_discard))

    @rule(seq=sequences, first=fractions, last=fractions, by=st.integers(-60, 60))
    def add_to_positions(self, seq, first, last, by):
        end = self.model.sequences[seq].next() + 1
        p0, p1 = sorted((int(first * end), int(last * end)))
        self.move(seq, p0, p1, lambda p: p + by, lambda *span: self.context.seq_add(*span, by))

    @rule(seq=sequences, first=fractions, last=fractions, by=st.integers(2, 3))
    def divide_positions(self, seq, first, last, by):
        end = self.model.sequences[seq].next() + 1
        p0, p1 = sorted((int(first * end), int(last * end)))
        self.move(seq, p0, p1, lambda p: p // by, lambda *span: self.context.seq_div(*span, by))

    def move(self, seq: int, p0: int, p1: int, mapping, operation):
        """An operation that maps the positions within [p0, p1); what gets a negative one is removed.

        Cells that other sequences share move there, too.
        """
        high = END if p1 < 0 else p1
        sequence = self.model.sequences[seq]
        moved = {id(entry): mapping(entry.pos) for entry in sequence.entries if p0 <= entry.pos < high}

        def new_position(entry):
            return moved.get(id(entry), entry.pos)

        if not self.order_is_kept(new_position):
            return
        # what sequences share they go on sharing
        entries = {id(e): e.at(new_position(e)) for s in self.model.sequences for e in s.entries if new_position(e) >= 0}
        afters = [self.after_move(other, new_position, entries) for other in self.model.sequences]
        allowed = not sequence.refused and all(
            self.model.allows(other, self.held_to_go_on(other), after, new_position) for other, after in enumerate(afters)
        )
        shared = self.model.shares_moved(seq, moved)
        ambiguous = self.restored_partial or self.has_equal_positions()
        operation(seq, p0, p1)
        if shared:
            # refused, too, where sequences share a cell of one part and not that of the other, which positions don't say
            has_moved = not sequence.refused and self.context.positions(FULL, seq) == afters[seq].positions()
            assert allowed or ambiguous or not has_moved, "what was dropped has become visible"
            allowed = has_moved
        if allowed:
            for other, after in zip(self.model.sequences, afters):
                other.become(after)
        else:
            sequence.refused = True

    def held_to_go_on(self, seq: int) -> list[int]:
        """Without what is only held for a rewind to before the prompt that is being read."""
        return self.context.positions(PROMPT, seq) or self.held[seq]

    def order_is_kept(self, new_position) -> bool:
        """Where positions become equal or change places, what a prompt is isn't defined any more."""
        if not self.model.two_phases:
            return True
        return all(not s.prompts or s.keeps_order(new_position) for s in self.model.sequences)

    @staticmethod
    def after_move(sequence: Sequence, new_position, entries: dict) -> Sequence:
        after = sequence.moved(new_position)
        after.entries = [entries[id(entry)] for entry in sequence.entries if id(entry) in entries]
        return after

    def has_equal_positions(self) -> bool:
        return any(len(set(s.positions())) < len(s.entries) for s in self.model.sequences)
