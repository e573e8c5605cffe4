"""What a hybrid model's memory must hold, as a plain Python model of the rule for streaming layers.

Of a sequence, F are the positions of its conversation, all of them in the full part; S are those that the streaming part
still holds; D = F - S were dropped. S may be larger than needed, so it is read from the runtime, and what the model says
is what follows from it: no position in D may be visible to the next token. All three are multisets: dividing positions
makes some of them equal.

With `prefill = full` a sequence also has prompts. What the next token sees then depends on the prompt that it belongs to,
and where none is being read it may be the first of one, which sees one position more than a decoded token.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from support.reference import Entry

from lt_gguf.spec import StreamingSpec

OPEN = 2**31 - 1  # the end of a prompt that is being read


@dataclass(frozen=True)
class Prompt:
    """The positions [begin, end) were read together; behind the sinks they see all from `first` on."""

    begin: int
    end: int
    first: int


@dataclass
class Sequence:
    """The conversation of one sequence. Where sequences share cells they share `Entry` objects."""

    entries: list[Entry] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    refused: bool = False  # an operation on it was refused: it can't be decoded any more

    def positions(self) -> list[int]:
        return sorted(entry.pos for entry in self.entries)

    def next(self) -> int:
        return max((entry.pos for entry in self.entries), default=-1) + 1

    def prompt(self) -> Prompt | None:
        """The prompt that is being read."""
        return self.prompts[-1] if self.prompts and self.prompts[-1].end == OPEN else None

    def is_whole(self) -> bool:
        """Whether it is a conversation from its first token on, without holes."""
        return self.positions() == list(range(self.next()))

    def end(self) -> None:
        self.entries, self.prompts, self.refused = [], [], False

    def snapshot(self) -> Sequence:
        return Sequence(list(self.entries), list(self.prompts), self.refused)

    def become(self, other: Sequence) -> None:
        self.entries, self.prompts, self.refused = list(other.entries), list(other.prompts), other.refused

    # -- what operations make of it

    def without(self, p0: int, p1: int) -> Sequence:
        """What remains when the positions within [p0, p1) are removed: a prompt that loses its end is being read again."""
        after = self.snapshot()
        after.entries = [entry for entry in self.entries if not p0 <= entry.pos < p1]
        if not after.entries:
            after.end()
        elif after.next() < self.next():
            after.cut_prompts()
        return after

    def cut_prompts(self) -> None:
        end = self.next()
        self.prompts = [replace(p, end=p.end if p.end <= end else OPEN) for p in self.prompts if p.begin < end]

    def moved(self, new_position: Callable[[Entry], int]) -> Sequence:
        """What it becomes when each entry gets a new position; what gets a negative one is removed."""
        pairs = [(entry.pos, new_position(entry)) for entry in self.entries]
        kept = sorted(pair for pair in pairs if pair[1] >= 0)

        def first_from(p: int) -> int:
            return next((new for old, new in kept if old >= p), -1)

        def behind_last_before(p: int) -> int:
            return next((new + 1 for old, new in reversed(kept) if old < p), -1)

        prompts = []
        for prompt in self.prompts:
            begin = first_from(prompt.begin)
            end = OPEN if prompt.end == OPEN else behind_last_before(prompt.end)
            if 0 <= begin < end:
                first = 0 if prompt.first == 0 else min(max(first_from(prompt.first), 0), begin)
                prompts.append(Prompt(begin, end, first))
        entries = [entry if entry.pos == new else entry.at(new) for entry, (_, new) in zip(self.entries, pairs) if new >= 0]
        return Sequence(entries, prompts, self.refused)

    def keeps_order(self, new_position: Callable[[Entry], int]) -> bool:
        """Whether entries at different positions stay so, in the same order: then prompts move with their tokens."""
        ordered = sorted((entry.pos, new_position(entry)) for entry in self.entries)
        remaining = [new for _, new in ordered if new >= 0]
        return all(a < b for a, b in itertools.pairwise(remaining))


class MemoryModel:
    def __init__(self, spec: StreamingSpec, n_seq: int):
        self.spec = spec
        self.two_phases = spec.prefill == "full"
        self.sequences = [Sequence() for _ in range(n_seq)]

    def first_seen(self, sequence: Sequence) -> int:
        """The first position behind the sinks that the next token may see."""
        if not self.two_phases:
            return sequence.next() - self.spec.window + 1
        prompt = sequence.prompt()
        return prompt.first if prompt else sequence.next() - self.spec.window

    def visible(self, positions: Iterable[int], sequence: Sequence) -> Counter:
        """Those of `positions` that the next token of the sequence may see."""
        first = self.first_seen(sequence)
        return Counter(p for p in positions if p < self.spec.sink or p >= first)

    def must_hold(self, seq: int) -> Counter:
        """The positions that the streaming part can't do without."""
        return self.visible(self.sequences[seq].positions(), self.sequences[seq])

    def dropped(self, seq: int, held: list[int]) -> Counter:
        return Counter(self.sequences[seq].positions()) - Counter(held)

    def pos_min(self, seq: int, held: list[int]) -> int:
        """What llama_memory_seq_pos_min says of a sequence, -1 if it is empty.

        Without phases the first position from which on the sequence is complete; otherwise the first one behind which,
        one window further, the sequence can be rewound to everything.
        """
        sequence, dropped = self.sequences[seq], self.dropped(seq, held)
        if not dropped:
            return min(sequence.positions(), default=-1)
        pos_min = max(dropped) + 1
        if self.two_phases:
            # within prompts that began too early a rewind brings back a token that sees what was dropped
            for prompt in sequence.prompts:
                end = min(prompt.end, sequence.next())
                if prompt.end != OPEN and prompt.first <= max(dropped):
                    pos_min = max(pos_min, end - self.spec.window)
        return pos_min

    def allows(self, seq: int, held: list[int], after: Sequence, new_position: Callable[[Entry], int]) -> bool:
        """Whether dropped positions stay hidden when the sequence becomes `after`, its entries moving to new positions."""
        left = self.dropped(seq, held)
        moved = []
        for entry in self.sequences[seq].entries:
            if left[entry.pos]:
                left[entry.pos] -= 1
                moved.append(new_position(entry))
        return not after.entries or not self.visible((p for p in moved if p >= 0), after)

    def shares_moved(self, seq: int, moved: dict[int, int]) -> bool:
        """Whether another sequence shares cells of this one whose entries, by id, get another position."""
        mine = {id(entry) for entry in self.sequences[seq].entries if moved.get(id(entry), entry.pos) != entry.pos}
        others = (other for i, other in enumerate(self.sequences) if i != seq)
        return any(id(entry) in mine for other in others for entry in other.entries)

    def cells(self) -> int:
        return len({id(entry) for sequence in self.sequences for entry in sequence.entries})
