"""What a hybrid model's memory must hold, as a plain Python model of the rule for streaming layers.

Of a sequence, F are the positions of its conversation, all of them in the full part; S are those that the streaming part
still holds; D = F - S were dropped. S may be larger than needed, so it is read from the runtime, and what the model says
is what follows from it: no position in D may be visible to the next token. All three are multisets: dividing positions
makes some of them equal.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Iterable

from lt_gguf.spec import StreamingSpec
from support.reference import Entry


@dataclass
class Sequence:
    """The conversation of one sequence. Where sequences share cells they share `Entry` objects."""

    entries: list[Entry] = field(default_factory=list)
    refused: bool = False  # an operation on it was refused: it can't be decoded any more

    def positions(self) -> list[int]:
        return sorted(entry.pos for entry in self.entries)

    def next(self) -> int:
        return max((entry.pos for entry in self.entries), default=-1) + 1

    def end(self) -> None:
        self.entries = []
        self.refused = False


class MemoryModel:
    def __init__(self, spec: StreamingSpec, n_seq: int):
        self.spec = spec
        self.sequences = [Sequence() for _ in range(n_seq)]

    def visible(self, positions: Iterable[int], q: int) -> Counter:
        return Counter(p for p in positions if self.spec.visible(q, p))

    def must_hold(self, seq: int) -> Counter:
        """The positions that the streaming part can't do without: those that the next token sees."""
        sequence = self.sequences[seq]
        return self.visible(sequence.positions(), sequence.next())

    def dropped(self, seq: int, held: list[int]) -> Counter:
        return Counter(self.sequences[seq].positions()) - Counter(held)

    def pos_min(self, seq: int, held: list[int]) -> int:
        """The smallest position from which on the sequence is complete in all layers, -1 if it is empty."""
        dropped = self.dropped(seq, held)
        return max(dropped) + 1 if dropped else min(self.sequences[seq].positions(), default=-1)

    def allows(self, seq: int, held: list[int], after: list[Entry]) -> bool:
        """Whether dropped positions stay hidden if the sequence's entries become `after`, in the same order.

        A negative position says that the entry is removed.
        """
        now = {entry.pos: changed.pos for entry, changed in zip(self.sequences[seq].entries, after)}
        remaining = [entry.pos for entry in after if entry.pos >= 0]
        dropped = [now[p] for p in self.dropped(seq, held) if now[p] >= 0]
        return not remaining or not self.visible(dropped, max(remaining) + 1)

    def shares_cells(self, seq: int, p0: int, p1: int) -> bool:
        """Whether an entry of the sequence within [p0, p1) is in another sequence too."""
        moved = {id(entry) for entry in self.sequences[seq].entries if p0 <= entry.pos < p1}
        others = (other for other in self.sequences if other is not self.sequences[seq])
        return any(id(entry) in moved for other in others for entry in other.entries)

    def cells(self) -> int:
        return len({id(entry) for sequence in self.sequences for entry in sequence.entries})
