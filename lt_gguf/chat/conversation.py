"""`Conversation`: documents, questions and answers with one model, without a terminal.

It reads as little as it can: what the context holds isn't read again, and what the disk has of an earlier time is restored.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lt_gguf.chat.prompt import PromptMaker
from lt_gguf.chat.turns import Answer, Turn
from lt_gguf.documents import Document
from lt_gguf.runtime.prompts import NotAheadError

if TYPE_CHECKING:
    from lt_gguf.runtime.kept_states import KeptStates
    from lt_gguf.runtime.llama import Llama

# Called with the tokens that have been read, and how many are to be.
Reading = Callable[[int, int], None]

# Tokens that a document must leave for questions and answers, if the context is that large.
ROOM = 256
# Reading fewer tokens is as fast as restoring them, and not worth a file.
_WORTH_KEEPING = 256
# A share of the context that is left: from then on it is said.
_NEARLY_FULL = 0.15


def _show_nothing(_: str) -> None:
    pass


class DoesNotFitError(ValueError):
    """A question or a document is longer than what is left of the context."""


@dataclass(frozen=True)
class Fit:
    """Whether documents fit, in tokens.

    Args:
        n_new: of the documents.
        n_before: what the context holds of the conversation before them.
        n_ctx: its size.
        n_to_read: what must be computed: not in the context and not on disk.
        n_on_disk: what the disk spares.
    """

    n_new: int
    n_before: int
    n_ctx: int
    n_to_read: int
    n_on_disk: int

    @property
    def n_left(self) -> int:
        """For questions and answers; negative where they don't fit."""
        return self.n_ctx - self.n_before - self.n_new

    @property
    def fits(self) -> bool:
        return self.n_left >= min(ROOM, self.n_ctx // 4)


class Conversation:
    """What was said so far, and how the next answer is made.

    Args:
        llm: the model; nobody else uses its context meanwhile.
        system: what it is told first.
        n_predict: most tokens of an answer; -1: no limit but the context.
        temperature: of sampling; 0: always the most likely token.
        kept: what it keeps on disk and restores; `None`: nothing.

    Attributes:
        turns: questions that were answered.
        pending: documents that the next question is about, read or not.
        last: how the last answer came about.
        n_restored: tokens that came from the disk so far.
        tokens_per_second_read: how fast the last long text was read, `None` if none was.
    """

    def __init__(
        self,
        llm: Llama,
        system: str | None = None,
        n_predict: int = -1,
        temperature: float = 0.8,
        kept: KeptStates | None = None,
    ) -> None:
        self.llm = llm
        self.system = system or None
        self.kept = kept
        self.turns: list[Turn] = []
        self.pending: list[Document] = []
        self.last: Answer | None = None
        self.n_restored = 0
        self.tokens_per_second_read: float | None = None
        self.say: Callable[[str], None] = lambda _: None
        self.prompts = PromptMaker(llm, max_tokens=n_predict, temperature=temperature)

    # ------------------------------------------------------------------------------------- what is there

    @property
    def documents(self) -> list[Document]:
        """All documents of the conversation, in their order."""
        return [document for turn in self.turns for document in turn.documents] + self.pending

    def n_used(self) -> int:
        """Tokens that the conversation takes, its pending documents included."""
        return len(self.prompts.beginning(self.system, self.turns, self.pending)) if self.turns or self.pending else 0

    def is_nearly_full(self) -> bool:
        return self.llm.n_ctx() - self.llm.n_tokens < max(ROOM, int(_NEARLY_FULL * self.llm.n_ctx()))

    # ------------------------------------------------------------------------------------------ documents

    def fit(self, documents: Sequence[Document]) -> Fit:
        """Whether the documents fit behind what is there; nothing is read."""
        tokens = self.prompts.beginning(self.system, self.turns, [*self.pending, *documents])
        n_before = self.n_used()
        n_here = self.llm.n_reusable(tokens)
        found = self.kept.find(tokens) if self.kept else None
        n_there = max(n_here, found[1] if found else 0)
        return Fit(len(tokens) - n_before, n_before, self.llm.n_ctx(), len(tokens) - n_there, n_there - n_here)

    def attach(self, documents: Sequence[Document], progress: Reading | None = None) -> int:
        """Puts documents before the next question, and reads them. Returns how many tokens were computed.

        Ctrl-C stops the reading: the documents stay, and the rest is read before the next answer.

        Raises:
            DoesNotFitError: they don't fit; nothing has changed.
            ValueError, RuntimeError: the model can't read them; nothing has changed but what the context holds.
            KeyboardInterrupt: as said.
        """
        fit = self.fit(documents)
        if not fit.fits:
            names = ", ".join(document.name for document in documents)
            raise DoesNotFitError(
                f"{names}: {fit.n_new} tokens don't fit, {max(0, fit.n_ctx - fit.n_before - ROOM)} of the context of {fit.n_ctx} are left"
            )
        before = list(self.pending)
        self.pending += documents
        try:
            return self.read_ahead(progress)
        except (ValueError, RuntimeError):
            self.pending = before
            raise

    def detach(self) -> list[Document]:
        """Forgets the documents that no question was asked about; returns them."""
        gone, self.pending = self.pending, []
        return gone

    def read_ahead(self, progress: Reading | None = None) -> int:
        """Reads what the next prompt begins with whatever is asked: from the disk if it is there, else by computing it, and then
        keeps it. Returns how many tokens were computed: none where memory allows to read them only as a whole, with the question."""
        if not (self.turns or self.pending):
            return 0
        tokens = self.prompts.beginning(self.system, self.turns, self.pending)
        try:
            n_read = self._read(tokens, progress)
        except NotAheadError:
            self.say("too much for the memory that is left to be read ahead: it is read together with the question")
            return 0
        if n_read >= _WORTH_KEEPING:
            self.keep()
        return n_read

    def keep(self) -> bool:
        """Keeps what the context holds on disk, so that it needn't be read again; false if it can't be, which is said."""
        return self.kept is not None and self.kept.keep(self.label(), self.say)

    def label(self) -> str:
        """What a person would call it: the documents, and how many questions followed."""
        names = ", ".join(document.name for document in self.documents) or (self.turns[0].question[:40] if self.turns else "")
        return f"{names} · {len(self.turns)} question{'s' * (len(self.turns) != 1)}" if self.turns else names

    # ------------------------------------------------------------------------------- questions and answers

    def ask(self, question: str, show: Callable[[str], None] = _show_nothing, progress: Reading | None = None) -> Answer:
        """Answers a question about the pending documents and what was said before; Ctrl-C ends the answer.

        Args:
            show: gets the answer, piece by piece.

        Raises:
            DoesNotFitError: it doesn't fit the context; nothing has changed.
            ValueError: the chat format refuses it; nothing has changed.
            KeyboardInterrupt: Ctrl-C came before the answer had begun; nothing has changed.
        """
        return self._answer(self.turns, Turn(question, documents=tuple(self.pending)), show, progress)

    def retry(self, show: Callable[[str], None] = _show_nothing, progress: Reading | None = None) -> Answer | None:
        """Answers the last question once more; `None` if there is none. Raises as `ask` does."""
        if not self.turns:
            return None
        return self._answer(self.turns[:-1], replace(self.turns[-1], answer=None), show, progress)

    def edit(self, question: str, show: Callable[[str], None] = _show_nothing, progress: Reading | None = None) -> Answer | None:
        """Asks `question` in place of the last one, about the same documents; `None` if there is none. Raises as `ask` does."""
        if not self.turns:
            return None
        return self._answer(self.turns[:-1], replace(self.turns[-1], question=question, answer=None), show, progress)

    def undo(self) -> bool:
        """Forgets the last question and its answer; its documents are there for the next one. False if there is none."""
        if not self.turns:
            return False
        self.pending = [*self.turns.pop().documents, *self.pending]
        return True

    def reset(self) -> None:
        """Begins anew, without documents."""
        self.turns, self.pending, self.last = [], [], None

    # ---------------------------------------------------------------------------- when the context gets full

    def shorten(self, n: int | None = None) -> int:
        """Drops the oldest questions and answers, their documents kept; returns how many.

        Args:
            n: how many; `None`: until half of what the documents leave is free.
        """
        most = len(self.turns)
        if n is None:
            n = 0
            first = len(self.prompts.beginning(self.system, [], self.documents)) if self.documents else 0
            while n < most and self._n_without(n) > first + (self.llm.n_ctx() - first) // 2:
                n += 1
        n = min(n, most)
        moved = [document for turn in self.turns[:n] for document in turn.documents]
        self.turns = self.turns[n:]
        if self.turns:
            self.turns[0] = replace(self.turns[0], documents=(*moved, *self.turns[0].documents))
        else:
            self.pending = [*moved, *self.pending]
        return n

    def branch(self, n: int = 0) -> int:
        """Goes back to behind the first `n` questions, the documents of later ones kept; returns how many were dropped."""
        dropped = self.turns[n:]
        self.pending = [*(document for turn in dropped for document in turn.documents), *self.pending]
        self.turns = self.turns[:n]
        return len(dropped)

    def _n_without(self, n: int) -> int:
        """Tokens of the conversation without its oldest `n` questions."""
        documents = [document for turn in self.turns[:n] for document in turn.documents]
        rest = self.turns[n:]
        if rest:
            rest = [replace(rest[0], documents=(*documents, *rest[0].documents)), *rest[1:]]
        return len(self.prompts.beginning(self.system, rest, self.pending if rest else [*documents, *self.pending]))

    # --------------------------------------------------------------------------------------------- within

    def _read(self, tokens: list[int], progress: Reading | None, is_whole: bool = False) -> int:
        """Makes the context begin with these tokens, which are a whole prompt or its beginning; returns how many were computed."""
        self._restore(tokens)
        n_before, begun = self.llm.n_read, time.monotonic()
        n_missing = len(tokens) - self.llm.n_reusable(tokens)
        if progress is not None and n_missing:
            progress(0, n_missing)  # note: of a large model the first batch takes half a minute
        try:
            (self.llm.read if is_whole else self.llm.read_ahead)(tokens, progress)
        finally:
            n_read = self.llm.n_read - n_before
            if n_read >= _WORTH_KEEPING:
                self.tokens_per_second_read = n_read / (time.monotonic() - begun)
        return n_read

    def _restore(self, tokens: list[int]) -> None:
        """Takes from the disk what spares most of reading a prompt."""
        if self.kept is None:
            return
        try:
            self.n_restored += self.kept.restore(tokens)
        except OSError as error:
            self.say(f"nothing can be restored from disk: {error}")
        for line in self.kept.store.take_noticed():
            self.say(f"{line}; it is read anew")

    def _answer(self, before: list[Turn], turn: Turn, show: Callable[[str], None], progress: Reading | None) -> Answer:
        """Answers a turn that follows `before`; they then are the conversation. It stays as it was if they don't fit."""
        prompt = self.prompts.whole(self.system, [*before, turn])
        n_ctx = self.llm.n_ctx()
        if len(prompt.tokens) >= n_ctx:
            raise DoesNotFitError(f"{len(prompt.tokens)} tokens don't fit the context of {n_ctx}")
        begun, n_read_before, n_restored_before = time.monotonic(), self.llm.n_read, self.n_restored
        self._restore(prompt.tokens)
        is_whole = False
        if len(prompt.tokens) - self.llm.n_reusable(prompt.tokens) > self.llm.n_batch:
            # note: a long prompt is read with a progress and can be stopped; its last token gives the logits for the answer
            try:
                self._read(prompt.tokens[:-1], progress)
            except NotAheadError:
                is_whole = True
                self._read(prompt.tokens, progress, is_whole)
        words: list[str] = []
        ended = ""
        first: tuple[int, float] | None = None  # tokens in the context and the time, when the first piece was there
        try:
            with closing(self._chunks(prompt.tokens, prompt.settings)) as chunks:
                for word, is_cut in chunks:
                    first = first or (self.llm.n_tokens, time.monotonic())
                    if word:
                        words.append(word)
                        show(word)
                    if is_cut:
                        ended = "cut off: the context is full" if self.llm.n_tokens >= n_ctx - 1 else "cut off"
        except KeyboardInterrupt:
            ended = "stopped"
        n_generated = self.llm.n_tokens - first[0] if first else 0
        self.turns = [*before, replace(turn, answer="".join(words))]
        if turn.documents:
            self.pending = []
        if is_whole:
            self.keep()
        n_restored = self.n_restored - n_restored_before
        seconds = first[1] - begun if first else None
        rate = n_generated / (time.monotonic() - first[1]) if first and n_generated else None
        self.last = Answer(
            self.turns[-1].answer or "",
            ended,
            self.llm.n_read - n_read_before,
            n_restored,
            n_generated + bool(first),
            seconds,
            rate,
        )
        return self.last

    def _chunks(self, tokens: list[int], settings: dict[str, Any]) -> Generator[tuple[str, bool], None, None]:
        """Pieces of the answer, and whether it is cut off there."""
        with closing(self.llm.create_completion(tokens, **settings)) as completion:
            for chunk in completion:
                choice = chunk["choices"][0]
                yield choice["text"], choice["finish_reason"] == "length"
