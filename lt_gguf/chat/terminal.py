"""The screen in a terminal: prompt_toolkit for what is typed, rich for what is shown."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document as TextBuffer
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import create_input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from lt_gguf.chat.markdown_stream import MarkdownStream
from lt_gguf.chat.screen import Step

_PERIOD = 3600.0  # seconds of which the estimate is a mean: a batch may take half a minute
_LONGEST_KEPT = 4000  # characters: a pasted document isn't what one looks for in the history


class _ShortHistory(FileHistory):
    """The lines that a person typed, on disk; no pasted documents."""

    def store_string(self, string: str) -> None:
        if len(string) <= _LONGEST_KEPT:
            try:
                super().store_string(string)
            except OSError:
                return  # note: a full disk is no reason to lose a message


class CommandCompleter(Completer):
    """Completes commands, then what they take: paths, names of sessions.

    Args:
        commands: names, and what they are for.
        paths: the commands that take paths.
        names: for other commands, what gives the names that they take.
    """

    def __init__(self, commands: dict[str, str], paths: Iterable[str], names: dict[str, Callable[[], list[str]]]) -> None:
        self.commands = commands
        self.paths = tuple(paths)
        self.names = names
        self._path = PathCompleter(expanduser=True)

    def get_completions(self, document: TextBuffer, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, rest = text.partition(" ")
        if not text.startswith("/") or "\n" in text:
            return
        if not space:
            for name, help_text in self.commands.items():
                if name.startswith(command):
                    yield Completion(name, -len(command), display_meta=help_text)
        elif command in self.paths:
            word = rest.rsplit(" ", 1)[-1]
            yield from self._path.get_completions(TextBuffer(word, len(word)), complete_event)
        elif command in self.names:
            for name in self.names[command]():
                if name.startswith(rest):
                    yield Completion(name, -len(rest))


class TerminalScreen:
    """A terminal with colours and a cursor.

    Args:
        completer: of what is typed.
        history: the file with what was typed before; `None`: nothing is kept.
        keyboard: where it is typed, where that isn't standard input.
    """

    is_interactive = True

    def __init__(self, completer: Completer, history: Path | None = None, keyboard: TextIO | None = None) -> None:
        self.out = Console(highlight=False)
        self.notes = Console(stderr=True, highlight=False)
        self._status = ""
        self._bar: Progress | None = None
        depth = ColorDepth.DEPTH_1_BIT if os.environ.get("NO_COLOR") else None
        settings: dict[str, Any] = {} if keyboard is None else {"input": create_input(keyboard)}
        self._session: PromptSession[str] = PromptSession(
            completer=completer,
            complete_while_typing=False,
            history=_history(history),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="  ",
            bottom_toolbar=lambda: FormattedText([("class:status", f" {self._status}")]),
            color_depth=depth,
            enable_open_in_editor=True,  # Ctrl-X Ctrl-E
            **settings,
        )

    def read(self, status: str, first: str = "") -> str | None:
        self._status = status
        try:
            return self._session.prompt(FormattedText([("bold", "> ")]), default=first).strip()
        except EOFError:
            return None

    def say(self, text: str) -> None:
        self.notes.print(text, style="dim", markup=False)

    def table(self, rows: list[tuple[str, str]]) -> None:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold", no_wrap=True)
        table.add_column(style="dim")
        for name, value in rows:
            table.add_row(name, value)
        self.notes.print(table, markup=False)

    @contextmanager
    def answer(self) -> Iterator[Callable[[str], None]]:
        with MarkdownStream(self.out) as stream:

            def show(word: str) -> None:
                if self._bar is not None:  # note: two things that move would write over one another
                    self._bar.stop()
                    self._bar = None
                stream.add(word)

            yield show

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator[Step]:
        columns = (
            *(TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit)),
            *(TimeElapsedColumn(), TextColumn("· left"), TimeRemainingColumn(), TextColumn("· Ctrl-C stops", style="dim")),
        )
        # note: it appears with the first step, where there is none it never does
        self._bar = bar = Progress(*columns, console=self.notes, transient=True, speed_estimate_period=_PERIOD)
        task = bar.add_task(what, total=None)

        def step(done: int, total: int) -> None:
            bar.start()
            bar.update(task, completed=done, total=total)

        try:
            yield step
        finally:
            bar.stop()
            self._bar = None


def _history(path: Path | None) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return _ShortHistory(str(path))


def _keys() -> KeyBindings:
    """Enter sends; Alt-Enter and Ctrl-J begin a new line, and so does Enter after a backslash."""
    keys = KeyBindings()

    @keys.add("enter")
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.complete_state and buffer.complete_state.current_completion:
            buffer.complete_state = None
        elif buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return keys
