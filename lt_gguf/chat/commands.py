"""What a person types: messages, and commands that begin with a slash."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lt_gguf.chat import figures
from lt_gguf.chat.conversation import Conversation, DoesNotFitError
from lt_gguf.chat.screen import Screen, format_seconds
from lt_gguf.chat.sessions import Sessions
from lt_gguf.chat.turns import Answer
from lt_gguf.documents import Document, DocumentError, find_files, read_file

# What a person meets, each said in one line; the conversation goes on.
_ERRORS = (ValueError, OSError, RuntimeError, MemoryError)
_COMMAND = re.compile(r"/[a-z]+(?=\s|$)")


@dataclass(frozen=True)
class Command:
    """A command: its name, what it takes, what it is for, and the method that does it."""

    name: str
    takes: str
    help: str
    run: Callable[[Chat, str], None]


class Chat:
    """A conversation on a screen.

    Args:
        conversation: what is said.
        screen: where.
        sessions: where conversations are kept.
        full_kv: gives the bytes that full attention would take.
        session: the name under which the conversation is kept after each answer; `None`: only when asked to.
    """

    def __init__(
        self, conversation: Conversation, screen: Screen, sessions: Sessions, full_kv: figures.FullKV, session: str | None = None
    ) -> None:
        self.conversation = conversation
        self.screen = screen
        self.sessions = sessions
        self.full_kv = full_kv
        self.session = session
        self.is_over = False
        self.n_errors = 0
        conversation.say = screen.say

    def run(self) -> None:
        """Until the person leaves, or standard input ends."""
        first = ""
        while not self.is_over:
            try:
                line = self.screen.read(figures.status(self.conversation, self.full_kv), first)
            except KeyboardInterrupt:
                if not self.screen.is_interactive:
                    raise
                self.screen.say("/exit or Ctrl-D leaves")
                continue
            if line is None:
                break
            self.obey(line)
        if self.session is not None and self.conversation.turns:
            self.conversation.keep()

    def obey(self, line: str) -> bool:
        """Does what a line asks for; false if it couldn't, which has been said."""
        line = line.strip()
        if not line:
            return True
        try:
            found = _COMMAND.match(line)
            if found is None:
                self._show(self._ask(line))
            elif command := COMMANDS.get(found[0]):
                command.run(self, line[found.end() :].strip())
            else:
                raise ValueError(f"there is no command {found[0]} (/help lists them)")
            return True
        except KeyboardInterrupt:
            self.screen.say("stopped")
        except DoesNotFitError as error:
            self._complain(f"{error}: {self._what_to_do()}")
        except _ERRORS as error:
            self._complain(one_line(error))
        return False

    # ------------------------------------------------------------------------------ questions and answers

    def _ask(self, question: str) -> Answer:
        with self.screen.progress("reading", "tokens") as step, self.screen.answer() as show:
            return self.conversation.ask(question, show, step)

    def retry(self, _: str) -> None:
        if not self.conversation.turns:
            raise ValueError("there is no message to answer again")
        with self.screen.progress("reading", "tokens") as step, self.screen.answer() as show:
            answer = self.conversation.retry(show, step)
        self._show(answer)

    def edit(self, text: str) -> None:
        turns = self.conversation.turns
        if not text and not self.screen.is_interactive:
            raise ValueError("/edit TEXT: give the message that replaces your last one")
        if not turns:
            raise ValueError("there is no message to replace")
        text = text or self.screen.read("your last message: change it, Enter asks it", turns[-1].question) or ""
        if not text:
            return
        with self.screen.progress("reading", "tokens") as step, self.screen.answer() as show:
            answer = self.conversation.edit(text, show, step)
        self._show(answer)

    def undo(self, _: str) -> None:
        if gone := self.conversation.detach():
            self.screen.say(f"taken out: {', '.join(document.name for document in gone)}")
            return
        if not self.conversation.undo():
            raise ValueError("there is no message to forget")
        kept = ", ".join(document.name for document in self.conversation.pending)
        self.screen.say(f"the last message is forgotten{f'; {kept} stays' if kept else ''}")

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.screen.say("the conversation begins anew")

    def system(self, text: str) -> None:
        if not text:
            self.screen.say(f"system: {self.conversation.system or 'nothing is said before the conversation'}")
            return
        self.conversation.system = None if text == "-" else text
        self.screen.say("said first from now on" if text != "-" else "nothing is said first from now on")
        self._read_ahead()

    def _show(self, answer: Answer | None) -> None:
        """What is said after an answer."""
        if answer is None:
            return
        memory = figures.describe_memory(self.conversation.llm, self.full_kv)
        line = f"{figures.describe_answer(self.conversation, answer)} · {memory}"
        first = figures.first_token(answer)
        self.screen.say(f"{line} · {first}" if self.screen.is_interactive and first else line)
        if self.session is not None:
            self.sessions.save(self.session, self.conversation)
        if self.conversation.is_nearly_full():
            left = self.conversation.llm.n_ctx() - self.conversation.llm.n_tokens
            self.screen.say(f"the context is nearly full, {left} tokens are left: {self._what_to_do()}")

    # ------------------------------------------------------------------------------------------ documents

    def file(self, text: str) -> None:
        if not text:
            there = self.conversation.documents
            self.screen.say(
                "; ".join(document.describe() for document in there) or "/file PATH: give a file, a folder or a pattern"
            )
            return
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ValueError(f"/file {text}: {error}") from None
        self.open_files(find_files(words))

    def open_files(self, paths: Iterable[Path]) -> None:
        """Reads files, all together. Raises DocumentError, OSError, DoesNotFitError: none of them can be; what can't is said."""
        paths = list(paths)
        found: list[Document] = []
        for path in paths:
            try:
                with self.screen.progress(f"opening {path.name}", "pages") as step:
                    found.append(read_file(path, step))
            except (DocumentError, OSError) as error:
                if len(paths) == 1:
                    raise
                self._complain(one_line(error))
        self.attach(found)

    def attach(self, documents: list[Document]) -> None:
        """Says whether documents fit, and reads them. Raises DoesNotFitError."""
        conversation = self.conversation
        there = {(document.name, document.text) for document in conversation.documents}
        for document in documents:
            if document.note:
                self.screen.say(document.note)
            if (document.name, document.text) in there:
                self.screen.say(f"{document.name} is part of the conversation already")
        documents = [document for document in documents if (document.name, document.text) not in there]
        if not documents:
            return
        what = documents[0].describe() if len(documents) == 1 else f"{len(documents)} documents"
        fit = conversation.fit(documents)
        self.screen.say(figures.describe_fit(conversation, fit, what))
        begun, restored = time.monotonic(), conversation.n_restored
        try:
            with self.screen.progress(f"reading {what}", "tokens") as step:
                n_read = conversation.attach(documents, step)
        except KeyboardInterrupt:
            n_here = conversation.llm.n_tokens
            self.screen.say(f"stopped at {n_here} tokens: the rest is read before the next answer; /undo takes the documents out")
            return
        if n_read or conversation.n_restored > restored:
            self._say_read(n_read, conversation.n_restored - restored, time.monotonic() - begun)

    def _read_ahead(self) -> None:
        """After something earlier in the conversation has changed."""
        begun, restored = time.monotonic(), self.conversation.n_restored
        with self.screen.progress("reading the conversation", "tokens") as step:
            n_read = self.conversation.read_ahead(step)
        if n_read or self.conversation.n_restored > restored:
            self._say_read(n_read, self.conversation.n_restored - restored, time.monotonic() - begun)

    def _say_read(self, n_read: int, n_restored: int, seconds: float) -> None:
        restored = f"restored {n_restored} tokens from disk, " if n_restored else ""
        speed = f" ({n_read / seconds:.1f} tokens/s)" if n_read >= 32 else ""
        self.screen.say(
            f"{restored}read {n_read} tokens in {format_seconds(seconds) if seconds >= 10 else f'{seconds:.1f} s'}{speed}"
        )

    # ------------------------------------------------------------------------------- sessions and the end

    def save(self, name: str) -> None:
        if not (self.conversation.turns or self.conversation.pending):
            raise ValueError("there is nothing to save yet")
        name = name or self.session or self.sessions.new_name()
        self.sessions.save(name, self.conversation)
        kept = self.conversation.keep()
        how = "; what the model has read is on disk, too" if kept else ""
        self.screen.say(f"saved as {name}{how}")

    def load(self, name: str) -> None:
        if not name:
            raise ValueError("/load NAME: give a session's name (/sessions lists them)")
        if note := self.sessions.load(name, self.conversation):
            self.screen.say(note)
        n, documents = len(self.conversation.turns), self.conversation.documents
        about = f" about {', '.join(document.name for document in documents)}" if documents else ""
        self.screen.say(f"{name}: {n} question{'s' * (n != 1)}{about}")
        n_used = self.conversation.n_used()
        if n_used >= self.conversation.llm.n_ctx():
            raise DoesNotFitError(f"{name}: its {n_used} tokens don't fit the context of {self.conversation.llm.n_ctx()}")
        self._read_ahead()

    def list_sessions(self, _: str) -> None:
        listed = self.sessions.listed()
        if not listed:
            self.screen.say("no session is saved: /save NAME keeps one")
            return
        self.screen.table(
            [
                (
                    session.name,
                    f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(session.saved_at))} · {session.n_questions} questions"
                    f"{' about ' + ', '.join(session.documents) if session.documents else ''} · {session.model}",
                )
                for session in listed
            ]
        )

    def shorten(self, text: str) -> None:
        n = self.conversation.shorten(_number(text, "/shorten"))
        if not n:
            raise ValueError(
                "nothing is dropped: there is enough room, or no question" if not text else "there is no question to drop"
            )
        kept = f", {len(self.conversation.documents)} documents stay" if self.conversation.documents else ""
        self.screen.say(f"the {n} oldest questions are dropped{kept}")
        self._read_ahead()

    def branch(self, text: str) -> None:
        n = _number(text, "/branch") or 0
        if len(self.conversation.turns) <= n:
            raise ValueError(f"there is no question behind the first {n} to branch off from" if n else "there is no question yet")
        name = self.session or self.sessions.new_name()
        self.sessions.save(name, self.conversation)
        if self.session is not None:
            self.session = self.sessions.new_name()
        dropped = self.conversation.branch(n)
        self.screen.say(f"{dropped} questions are dropped here; the conversation with them is saved as {name}")
        self._read_ahead()

    def _what_to_do(self) -> str:
        """What can be done where the context is, or would be, full."""
        llm = self.conversation.llm
        choices = []
        if self.conversation.turns:
            choices = ["/shorten drops the oldest questions and keeps the documents", "/branch goes on from the documents alone"]
        choices.append("/reset begins anew")
        if llm.n_ctx() < llm._model.n_ctx_train():
            choices.append(f"--ctx makes it larger (the model was trained for {llm._model.n_ctx_train()})")
        return ", ".join(choices)

    # ---------------------------------------------------------------------------------------------- rest

    def stats(self, _: str) -> None:
        self.screen.table(figures.stats(self.conversation, self.full_kv))

    def layers(self, _: str) -> None:
        self.screen.table(figures.layers(self.conversation.llm))

    def help(self, _: str) -> None:
        self.screen.table([(f"{one.name} {one.takes}".strip(), one.help) for one in COMMANDS.values()])
        self.screen.table([("Ctrl-C", "stops an answer, or the reading of a document"), ("Ctrl-D", "leaves")])

    def leave(self, _: str) -> None:
        self.is_over = True

    def _complain(self, text: str) -> None:
        self.n_errors += 1
        self.screen.say(f"error: {text}")


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "/file", "PATH…", "reads documents for the next question: files, folders, patterns; alone: which there are", Chat.file
        ),
        Command("/retry", "", "answers your last message again", Chat.retry),
        Command("/edit", "[TEXT]", "asks TEXT in place of your last message; alone: to change it", Chat.edit),
        Command("/undo", "", "takes out what /file brought, else forgets the last message and its answer", Chat.undo),
        Command(
            "/shorten", "[N]", "drops the oldest N questions, or as many as half of the room needs; documents stay", Chat.shorten
        ),
        Command(
            "/branch", "[N]", "goes on behind the first N questions, or the documents; saves the conversation as it is", Chat.branch
        ),
        Command("/save", "[NAME]", "keeps the conversation and what the model has read", Chat.save),
        Command("/load", "NAME", "takes a saved conversation up again", Chat.load),
        Command("/sessions", "", "lists the saved conversations", Chat.list_sessions),
        Command("/system", "[TEXT]", "what the model is told first; - for nothing", Chat.system),
        Command("/stats", "", "context, memory, speed, what was read and what was spared", Chat.stats),
        Command("/layers", "", "which layers stream, and what they hold", Chat.layers),
        Command("/reset", "", "begins anew, without documents", Chat.reset),
        Command("/help", "", "this list", Chat.help),
        Command("/exit", "", "leaves", Chat.leave),
    )
}


def _number(text: str, command: str) -> int | None:
    if not text:
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{command} {text}: must be a number of questions, at least 1")
    return int(text)


def one_line(error: BaseException) -> str:
    """An error as a person reads it, in one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "this process can get no more memory"
    return " ".join(str(error).split())
