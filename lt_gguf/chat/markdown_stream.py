"""Markdown that is shown while it is written.

What is complete, a paragraph or a whole block of code, is printed and scrolls away; only the block at the end is drawn anew with each
piece, and of that no more than the screen holds. So an answer of any length stands in the terminal's own scrollback.
"""

from __future__ import annotations

import re
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

_FENCE = re.compile(r"^ {0,3}(`{3,}|~{3,})", re.MULTILINE)
_LINES_KEPT = 3  # of the screen, for what stands below
_PER_SECOND = 12


class MarkdownStream:
    """A context manager; within it, `add` shows the next piece of a text."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._rest = ""
        self._live: Live | None = None
        self._drawn_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.update(Text(""), refresh=True)
            self._live.stop()
            self._live = None
        if self._rest.strip():
            self.console.print(Markdown(self._rest))
        self._rest = ""

    def add(self, piece: str) -> None:
        if self._live is None:  # note: until then the screen may show how far reading is
            # note: a thread that draws beside this one would now and then leave a block where it stood, and it then stands there twice
            self._live = Live(console=self.console, auto_refresh=False, transient=True, vertical_overflow="crop")
            self._live.start()
        self._rest += piece
        done = complete(self._rest)
        if done:
            self._live.update(Text(""), refresh=True)
            self.console.print(Markdown(self._rest[:done]))
            self.console.print()
            self._rest = self._rest[done:].lstrip("\n")
        now = time.monotonic()
        if done or now - self._drawn_at >= 1 / _PER_SECOND:
            self._drawn_at = now
            self._live.update(self._tail(), refresh=True)

    def _tail(self) -> Markdown:
        """What the screen holds of the block that isn't complete; of a block of code, its last lines."""
        lines = self._rest.split("\n")
        most = max(1, self.console.height - _LINES_KEPT)
        if len(lines) <= most:
            return Markdown(self._rest)
        opened = _FENCE.match(self._rest)
        first = [lines[0]] if opened else []
        return Markdown("\n".join([*first, *lines[-most:]]))


def complete(text: str) -> int:
    """How many characters of a text are blocks that what follows can't change: up to a blank line outside of code. 0 if none is.

    A list goes on after a blank line, and so does indented text: these wait for what comes.
    """
    end, fence, position = 0, "", 0
    lines = text.split("\n")
    for i, line in enumerate(lines[:-1]):
        position += len(line) + 1
        found = _FENCE.match(line)
        if found and not fence:
            fence = found[1]
        elif found and line.strip().startswith(fence[0] * len(fence)) and not line.strip().strip(fence[0]):
            fence = ""
        following = lines[i + 1]
        if fence or line.strip() or not following.strip():
            continue
        is_complete_line = i + 1 < len(lines) - 1 or len(following) > 3  # enough of it to see what it is
        if is_complete_line and not re.match(r"(\s|[-*+] |\d+[.)])", following):
            end = position
    return end if text[:end].strip() else 0
