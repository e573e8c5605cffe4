"""What of a context was read as a prompt and what was decoded, for the time when some of it must be read again.

With `prefill = full` a token of a prompt sees more than a decoded one, so a conversation is only the same when its prompts
are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple


class NotAheadError(ValueError):
    """The beginning of a prompt can't be read before its rest is known: it would take more than the prompt limit, which the prompt as a
    whole doesn't."""


class Piece(NamedTuple):
    """Positions [begin, end) that are read in one go.

    `continues`: they go on with a prompt that began before.
    """

    begin: int
    end: int
    is_prompt: bool
    continues: bool = False


@dataclass
class Prompts:
    """The prompts of a context, ascending: `[begin, end)`, the end `None` while the last one is being read."""

    spans: list[tuple[int, int | None]] = field(default_factory=list)

    @property
    def is_open(self) -> bool:
        return bool(self.spans) and self.spans[-1][1] is None

    @property
    def open_begin(self) -> int | None:
        """Where the prompt that is being read begins, `None` if none is."""
        return self.spans[-1][0] if self.is_open else None

    def first_end(self, n: int = 0) -> int:
        """Where the first prompt that ends behind the position `n` ends; 0 if none does."""
        return next((end for _, end in self.spans if end is not None and end > n), 0)

    def truncate(self, n: int) -> None:
        """Forgets the positions from `n` on. A prompt that loses its end is being read again."""
        self.spans = [(begin, None if end is None or end > n else end) for begin, end in self.spans if begin < n]

    def open(self, begin: int) -> None:
        if not self.is_open:
            self.spans.append((begin, None))

    def close(self, end: int) -> None:
        self.spans[-1] = (self.spans[-1][0], end)

    def pieces(self, begin: int, end: int) -> Iterator[Piece]:
        """How the positions [begin, end) were read."""
        for first, last in self.spans:
            last = end if last is None else last
            if last <= begin or first >= end:
                continue
            if begin < first:
                yield Piece(begin, first, is_prompt=False)
                begin = first
            yield Piece(begin, min(last, end), is_prompt=True, continues=first < begin)
            begin = last
        if begin < end:
            yield Piece(begin, end, is_prompt=False)

    def copy(self) -> Prompts:
        return Prompts(list(self.spans))
