"""What was said: `Turn`, a question with its documents and its answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lt_gguf.documents import Document


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question: the user's message.
        answer: the model's; `None` while it is to come.
        documents: what stands before the question in the same message.
    """

    question: str
    answer: str | None = None
    documents: tuple[Document, ...] = ()

    def to_json(self) -> dict[str, Any]:
        documents = [document.to_json() for document in self.documents]
        return {"question": self.question, "answer": self.answer, "documents": documents}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Turn:
        """Raises KeyError, TypeError or ValueError: it isn't what `to_json` gave."""
        question, answer = said["question"], said["answer"]
        if not isinstance(question, str) or not isinstance(answer, str):
            raise TypeError("a question and its answer must be text")
        return cls(question, answer, tuple(Document.from_json(document) for document in said["documents"]))


@dataclass(frozen=True)
class Answer:
    """How an answer came about.

    Args:
        text: the answer.
        ended: why it isn't whole: "stopped", "cut off" or "cut off: the context is full"; else empty.
        n_read: tokens that were computed as part of the prompt.
        n_restored: tokens of the prompt that came from the disk.
        n_generated: tokens of the answer.
        seconds_to_first: from the question to the first piece of the answer, `None` if there was none.
        tokens_per_second: of what followed the first piece, `None` if nothing did.
    """

    text: str
    ended: str
    n_read: int
    n_restored: int
    n_generated: int
    seconds_to_first: float | None
    tokens_per_second: float | None
