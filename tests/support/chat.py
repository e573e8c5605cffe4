"""A conversation with a tiny hybrid model, and a screen that notes what it is shown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.llama import load

from lt_gguf.chat.commands import Chat
from lt_gguf.chat.conversation import Conversation
from lt_gguf.chat.sessions import Sessions
from lt_gguf.documents import Document
from lt_gguf.runtime.kept_states import KeptStates
from lt_gguf.runtime.state_store import StateStore

WORDS = "the quick brown fox jumps over the lazy dog and runs away "
LONG = Document("long.txt", WORDS * 20, "text")
SHORT = Document("short.txt", WORDS * 12, "text")


def new_conversation(file, folder: Path | None, mode: str = "prefill_full", n_predict: int = 6, **settings) -> Conversation:
    """One whose states lie in a folder, `None`: nothing is kept."""
    llm = load(file, mode, **settings)
    kept = None if folder is None else KeptStates(llm, StateStore(folder / "states"))
    return Conversation(llm, None, n_predict, 0.0, kept)


def ask(conversation: Conversation, question: str) -> str:
    words: list[str] = []
    conversation.ask(question, words.append)
    return "".join(words)


def n_computed(conversation: Conversation, action) -> int:
    """Tokens of prompts that are read."""
    before = conversation.llm.n_read
    action()
    return conversation.llm.n_read - before


class NotedScreen:
    """A person sits there, and types `lines`; an exception among them is raised."""

    is_interactive = True

    def __init__(self, *lines: object) -> None:
        self.lines = list(lines)
        self.said: list[str] = []
        self.answers: list[str] = []
        self.steps: list[tuple[int, int]] = []

    def read(self, status: str, first: str = "") -> str | None:
        self.said += [f"status: {status}", f"first: {first}"] if first else [f"status: {status}"]
        line = self.lines.pop(0) if self.lines else None
        if isinstance(line, BaseException):
            raise line
        return line

    def say(self, text: str) -> None:
        self.said.append(text)

    def table(self, rows: list[tuple[str, str]]) -> None:
        self.said += [f"{name}: {value}" for name, value in rows]

    @contextmanager
    def answer(self) -> Iterator:
        words: list[str] = []
        yield words.append
        self.answers.append("".join(words))

    @contextmanager
    def progress(self, what: str, unit: str) -> Iterator:
        yield lambda done, total: self.steps.append((done, total))


def new_chat(conversation: Conversation, folder: Path, *lines: object, session: str | None = None) -> tuple[Chat, NotedScreen]:
    screen = NotedScreen(*lines)
    return Chat(conversation, screen, Sessions(folder / "sessions"), lambda: 1 << 20, session), screen
