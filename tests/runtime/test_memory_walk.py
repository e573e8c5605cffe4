"""Random walks over a hybrid model's memory, against a plain model of what it must hold and numpy's logits."""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from support.memory_model import MemoryModel, Sequence
from support.native import FULL, PARTIAL, STREAMING, DecodeError, Token
from support.oracle import EXACT, Subject, difference, random_tokens
from support.reference import Conversation, Entry, NumpyLlama

SINK, WINDOW = 3, 16
N_SEQ, N_UBATCH = 3, 8
N_CTX = {True: 1024, False: 512 * N_SEQ}  # unified: for all sequences together; otherwise 512 for each
END = 2**31 - 1

sequences = st.integers(0, N_SEQ - 1)
lengths = st.integers(1, 40)
fractions = st.floats(0, 1)


@cache
def tiny_model() -> Subject:
    return Subject.build("llama", 2, Path(tempfile.mkdtemp()))


class MemoryWalk(RuleBasedStateMachine):
    layers = [1]
    unified = True

    def __init__(self):
        super().__init__()
        subject = tiny_model()
        spec = subject.spec(SINK, WINDOW, self.layers)
        self.llama = reference(tuple(self.layers))
        self.model = MemoryModel(spec, N_SEQ)
        self.context = subject.context(
            spec, n_ctx=N_CTX[self.unified], n_batch=512, n_ubatch=N_UBATCH, n_seq_max=N_SEQ, kv_unified=self.unified
        )
        self.held = [[] for _ in range(N_SEQ)]
        self.saved_whole: list[tuple[bytes, list[list[Entry]]]] = []
        self.saved: list[tuple[bytes, list[Entry]]] = []
        self.saved_partial: list[tuple[bytes, list[Entry]]] = []
        self.restored_partial = False
        self.n_tokens = 0

    def teardown(self):
        self.context.close()

    # -- what holds after every step

    @invariant()
    def memory_holds_what_it_must(self):
        for seq in range(N_SEQ):
            sequence = self.model.sequences[seq]
            held = self.context.positions(STREAMING, seq)
            assert self.context.positions(FULL, seq) == sequence.positions()
            assert not Counter(held) - Counter(sequence.positions()), "the streaming part holds what was removed"
            assert not self.model.must_hold(seq) - Counter(held), "a position that the next token sees was dropped"
            assert self.context.pos_min(seq) == self.model.pos_min(seq, held)
            assert self.context.pos_max(seq) == sequence.next() - 1
            self.held[seq] = held

    # -- decoding

    def room(self, seq: int) -> int:
        if self.unified:
            return N_CTX[True] - self.model.cells()
        return 512 - len(self.model.sequences[seq].entries)

    def tokens(self, n: int) -> np.ndarray:
        self.n_tokens += 1
        return random_tokens(n, seed=self.n_tokens)

    @initialize(lengths=st.tuples(*[st.sampled_from([0, 10, 150, 300, 400])] * N_SEQ))
    def decode_prompts(self, lengths):
        for seq, n in enumerate(lengths):
            self.decode(seq, n)

    @rule(seq=sequences, n=st.integers(100, 250))
    def decode_a_long_text(self, seq, n):
        """The streaming part has 256 cells at least: only much text makes it drop something."""
        self.decode(seq, n)

    @rule(seq=sequences, n=lengths)
    def decode_a_few_tokens(self, seq, n):
        self.decode(seq, n)

    def decode(self, seq: int, n: int):
        sequence = self.model.sequences[seq]
        tokens = self.tokens(min(n, self.room(seq)))
        if sequence.refused:
            self.expect_refusal(seq)
        elif len(tokens):
            start = sequence.next()
            conversation = Conversation(self.llama, sequence.entries)
            expected = conversation.decode(tokens, range(start, start + len(tokens)))
            assert difference(self.context.decode(tokens, start, seq), expected) < EXACT
            sequence.entries = conversation.entries

    @rule(n=st.integers(1, 40))
    def decode_all_sequences_in_turns(self, n):
        usable = [seq for seq in range(N_SEQ) if not self.model.sequences[seq].refused]
        if usable and min(map(self.room, usable)) >= n * len(usable):
            tokens = {seq: self.tokens(n) for seq in usable}
            starts = {seq: self.model.sequences[seq].next() for seq in usable}
            turns = [Token(int(tokens[seq][i]), starts[seq] + i, (seq,)) for i in range(n) for seq in usable]
            computed = self.context.decode_batch(turns)
            for index, seq in enumerate(usable):
                conversation = Conversation(self.llama, self.model.sequences[seq].entries)
                expected = conversation.decode(tokens[seq], range(starts[seq], starts[seq] + n))
                assert difference(computed[index :: len(usable)], expected) < EXACT
                self.model.sequences[seq].entries = conversation.entries

    @precondition(lambda self: self.unified)
    @rule(a=sequences, b=sequences, n=st.integers(1, 60))
    def decode_a_common_prompt(self, a, b, n):
        first, second = self.model.sequences[a], self.model.sequences[b]
        fresh = not (first.entries or first.refused or second.entries or second.refused)
        if a != b and fresh and self.room(a) >= n:
            tokens = self.tokens(n)
            conversation = Conversation(self.llama)
            expected = conversation.decode(tokens, range(n))
            computed = self.context.decode_batch(Token(int(t), i, (a, b)) for i, t in enumerate(tokens))
            assert difference(computed, expected) < EXACT
            first.entries, second.entries = list(conversation.entries), list(conversation.entries)

    def expect_refusal(self, seq: int):
        with pytest.raises(DecodeError) as refusal:
            self.context.decode(self.tokens(1), self.model.sequences[seq].next(), seq)
        assert refusal.value.code < 0

    # -- removing

    @rule(seq=sequences, n=lengths)
    def remove_the_end(self, seq, n):
        self.remove(seq, max(0, self.model.sequences[seq].next() - n), -1)

    @rule(seq=sequences, by=st.integers(-2, 1))
    def remove_up_to_the_edge_of_what_is_held(self, seq, by):
        self.remove(seq, max(0, self.context.pos_min(seq) - 1 + WINDOW + by), -1)

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
                    self.keep_entries(sequence, lambda entry: entry.pos < p0)

    def remove(self, seq: int, p0: int, p1: int):
        low, high = max(p0, 0), END if p1 < 0 else p1
        allowed = self.can_remove(seq, low, high)
        assert self.context.seq_rm(seq, p0, p1) == allowed
        if allowed:
            self.keep_entries(self.model.sequences[seq], lambda entry: not low <= entry.pos < high)

    def can_remove(self, seq: int, p0: int, p1: int) -> bool:
        sequence = self.model.sequences[seq]
        if sequence.refused and not sequence.entries:  # what a refused copy left: only removing all makes it usable
            return p0 <= 0 and p1 == END
        if all(p0 <= entry.pos < p1 for entry in sequence.entries):
            return True
        after = [entry.at(-1) if p0 <= entry.pos < p1 else entry for entry in sequence.entries]
        return not sequence.refused and self.model.allows(seq, self.held[seq], after)

    @staticmethod
    def keep_entries(sequence: Sequence, condition):
        sequence.entries = [entry for entry in sequence.entries if condition(entry)]
        if not sequence.entries:
            sequence.end()

    # -- copying

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
        p0 = self.model.sequences[destination].next()
        if source != destination and p0 < self.model.sequences[source].next():
            self.copy(source, destination, p0, -1)

    def copy(self, source: int, destination: int, p0: int, p1: int):
        origin, copied = self.model.sequences[source], self.model.sequences[destination]
        high = END if p1 < 0 else p1
        taken = [entry for entry in origin.entries if p0 <= entry.pos < high]
        q = max([copied.next()] + [entry.pos + 1 for entry in taken])
        dropped = [p for p in self.model.dropped(source, self.held[source]) if p0 <= p < high]
        self.context.seq_cp(source, destination, p0, p1)
        if self.model.visible(dropped, q):
            copied.refused = True
        else:
            # a cell of a unified cache is in both sequences; otherwise its content is copied
            copied.entries = copied.entries + (taken if self.unified else [entry.at(entry.pos) for entry in taken])
            copied.refused = copied.refused or origin.refused

    # -- shifting

    @rule(seq=sequences, n_keep=st.integers(0, 40), n_discard=st.integers(1, 60))
    def shift_the_context(self, seq, n_keep, n_discard):
        """As llama.cpp's tools do it: forget what follows the first n_keep tokens and close the gap."""
        self.remove(seq, n_keep, n_keep + n_discard)
        self.held[seq] = self.context.positions(STREAMING, seq)
        self.move(seq, n_keep + n_discard, -1, lambda entry: entry.at(entry.pos - n_discard), lambda *span: self.context.seq_add(*span, -n_discard))

    @rule(seq=sequences, first=fractions, last=fractions, by=st.integers(-60, 60))
    def add_to_positions(self, seq, first, last, by):
        end = self.model.sequences[seq].next() + 1
        p0, p1 = sorted((int(first * end), int(last * end)))
        self.move(seq, p0, p1, lambda entry: entry.at(entry.pos + by), lambda *span: self.context.seq_add(*span, by))

    @rule(seq=sequences, first=fractions, last=fractions, by=st.integers(2, 3))
    def divide_positions(self, seq, first, last, by):
        end = self.model.sequences[seq].next() + 1
        p0, p1 = sorted((int(first * end), int(last * end)))
        self.move(seq, p0, p1, lambda entry: entry.at(entry.pos // by), lambda *span: self.context.seq_div(*span, by))

    def move(self, seq: int, p0: int, p1: int, mapping, operation):
        """An operation that maps the entries within [p0, p1); what gets a negative position is removed.

        Cells that other sequences share move there, too.
        """
        high = END if p1 < 0 else p1
        sequence = self.model.sequences[seq]
        moved = {id(entry): mapping(entry) for entry in sequence.entries if p0 <= entry.pos < high}
        conversations = [[moved.get(id(entry), entry) for entry in other.entries] for other in self.model.sequences]
        allowed = not sequence.refused and all(
            self.model.allows(other, self.held[other], conversation) for other, conversation in enumerate(conversations)
        )
        ambiguous = self.restored_partial or self.has_equal_positions()
        operation(seq, p0, p1)
        if allowed and ambiguous and self.model.shares_cells(seq, p0, high):
            # refused, too, where the two parts share these cells differently, which positions alone don't say
            after = sorted(entry.pos for entry in conversations[seq] if entry.pos >= 0)
            allowed = self.context.positions(FULL, seq) == after
        if allowed:
            for other, conversation in zip(self.model.sequences, conversations):
                other.entries = [entry for entry in conversation if entry.pos >= 0]
        else:
            sequence.refused = True

    def has_equal_positions(self) -> bool:
        return any(len(set(s.positions())) < len(s.entries) for s in self.model.sequences)

    # -- states

    @rule()
    def save_everything(self):
        conversations = [list(sequence.entries) for sequence in self.model.sequences]
        self.saved_whole.append((self.context.save(), conversations))

    @precondition(lambda self: self.saved_whole)
    @rule(which=fractions)
    def restore_everything(self, which):
        state, conversations = pick(self.saved_whole, which)
        assert self.context.restore(state)
        # a cell that two sequences shared is still shared, but it is no longer one that is shared with anything else
        fresh: dict[int, Entry] = {}
        for sequence, entries in zip(self.model.sequences, conversations):
            sequence.end()
            sequence.entries = [fresh.setdefault(id(entry), entry.at(entry.pos)) for entry in entries]

    @rule(seq=sequences)
    def save_a_sequence(self, seq):
        self.saved.append((self.context.save_seq(seq), list(self.model.sequences[seq].entries)))

    @precondition(lambda self: self.saved)
    @rule(seq=sequences, which=fractions)
    def restore_a_sequence(self, seq, which):
        state, entries = pick(self.saved, which)
        self.remove(seq, -1, -1)
        if len(entries) <= self.room(seq):
            assert self.context.restore_seq(state, seq)
            self.model.sequences[seq].end()
            self.model.sequences[seq].entries = [entry.at(entry.pos) for entry in entries]

    @rule(seq=sequences, n=st.one_of(st.integers(1, 20), st.integers(200, 300)))
    def save_a_checkpoint_and_go_on(self, seq, n):
        if self.model.sequences[seq].entries:
            self.saved_partial.append((self.context.save_seq(seq, PARTIAL), list(self.model.sequences[seq].entries)))
            self.decode(seq, n)

    @precondition(lambda self: self.saved_partial)
    @rule(seq=sequences, which=fractions, back=st.integers(0, 6))
    def return_to_a_checkpoint(self, seq, which, back):
        """As llama-server does it: restore the streaming part, then remove what came after it from the full part."""
        if self.model.sequences[seq].refused:
            return
        checkpoints = [saved for saved in self.saved_partial if self.goes_on(seq, saved[1])]
        if not checkpoints:
            return  # a checkpoint of another conversation is the caller's mistake
        state, entries = pick(checkpoints, which)
        end = max(entry.pos for entry in entries) + 1
        assert self.context.restore_seq(state, seq, PARTIAL)
        self.restored_partial = True
        self.held[seq] = self.context.positions(STREAMING, seq)
        assert set(self.held[seq]) <= {entry.pos for entry in entries}
        if self.model.must_hold(seq) - Counter(self.held[seq]):
            self.expect_refusal(seq)
        self.remove(seq, end, -1)
        self.remove(seq, end - back, -1)

    def goes_on(self, seq: int, entries: list[Entry]) -> bool:
        """Whether the sequence is what `entries` were, with tokens after them."""
        end = max(entry.pos for entry in entries) + 1
        now = [(e.pos, id(e.keys)) for e in self.model.sequences[seq].entries if e.pos < end]
        return sorted(now) == sorted((e.pos, id(e.keys)) for e in entries)


@cache
def reference(layers: tuple[int, ...]) -> NumpyLlama:
    subject = tiny_model()
    return NumpyLlama(subject.hf, subject.spec(SINK, WINDOW, layers))


def pick(items: list, fraction: float):
    return items[min(int(fraction * len(items)), len(items) - 1)]


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])
@pytest.mark.parametrize("layers", [[1], [0, 1]], ids=["half", "all"])
def test_random_walks(request, layers, unified):
    machine = type("Walk", (MemoryWalk,), {"layers": layers, "unified": unified})
    full = request.config.getoption("--full")
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=400 if full else 25,
            stateful_step_count=40,
            derandomize=not full,  # without --full the same walks in every run
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            print_blob=True,
        ),
    )
