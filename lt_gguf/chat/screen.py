"""How a conversation looks: what any screen can do, and the plain one, for pipes, files and screen readers.

Answers go to stdout, everything else to stderr. The plain screen writes lines and nothing else: no colour, nothing that moves.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

# Called with what has been done, and how much there is to do.
Step = Callable[[int, int], None]

_SAY_EVERY = 5.0  # seconds between two lines of progress


class Screen(Protocol):
    """What a person sees and types on."""

    is_interactive: bool

    def read(self, status: str, first: str = "") -> str | None:
        """The next message, `None` at the end.

        Args:
            status: a line about the conversation, for screens that have a place for it.
            first: what stands there already, to be edited.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        ...

    def say(self, text: str) -> None:
        """Shows a note."""
        ...

    def table(self, rows: list[tuple[str, str]]) -> None:
        """Shows names and what belongs to them."""
        ...

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        """Within the block, what it gives shows the next piece of an answer."""
        ...

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Step]:
        """Within the block, what it gives shows how far something is."""
        ...


class PlainScreen:
    """Lines.

    Args:
        lines: where messages come from, a line each; `None`: from the person at the terminal, or standard input.
        is_interactive: a person sits there: `> ` asks for the next message.
    """

    def __init__(self, lines: TextIO | None = None, is_interactive: bool = False) -> None:
        self.lines = lines
        self.is_interactive = is_interactive

    def read(self, status: str, first: str = "") -> str | None:
        del status
        if first:
            self.say(f"it was: {first}")
        try:
            if self.is_interactive and self.lines is None and sys.stdout.isatty():
                import readline  # noqa: F401 - input() then has line editing and a history

                return input("> ").strip()
            # note: input() would write its prompt to the file to which answers go
            if self.is_interactive:
                print("> ", end="", file=sys.stderr, flush=True)
            line = (self.lines or sys.stdin).readline()
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise ValueError(f"the messages aren't text in UTF-8: {error}") from None
        return line.strip() if line else None

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def table(self, rows: list[tuple[str, str]]) -> None:
        for name, value in rows:
            self.say(f"{name}: {value}" if name else value)

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        def show(word: str) -> None:
            print(word, end="", flush=True)

        try:
            yield show
        finally:
            print(flush=True)

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Step]:
        begun = said_at = time.monotonic()

        def step(done: int, total: int) -> None:
            nonlocal said_at
            now = time.monotonic()
            if (self.is_interactive or sys.stderr.isatty()) and now - said_at >= _SAY_EVERY and done < total:
                said_at = now
                left = (now - begun) / done * (total - done) if done else 0
                self.say(f"{what}: {done} of {total} {unit}, about {format_seconds(left)} left")

        yield step


def format_seconds(seconds: float) -> str:
    """As in "8 s" or "2 min 5 s"."""
    seconds = max(0, round(seconds))
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60} s"
