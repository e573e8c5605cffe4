"""A conversation as tokens: the model's own chat template, and each document in it as a piece of its own.

Documents are tokenized apart from what surrounds them. So a prompt begins with the same tokens whatever is asked about a document,
and a document that has the name of a special token in its text, such as <|im_end|>, doesn't end the message that it stands in.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lt_gguf.chat.turns import Turn
from lt_gguf.documents import Document
from lt_gguf.runtime.library import load_llama_cpp

if TYPE_CHECKING:
    from lt_gguf.runtime.llama import Llama

_Llama = load_llama_cpp().Llama


@dataclass(frozen=True)
class Prompt:
    """What the model is to read.

    Args:
        tokens: all of it.
        settings: what else `Llama.create_completion` gets for it: sampling, and what ends an answer.
    """

    tokens: list[int]
    settings: dict[str, Any]


class _Recorder:
    """Stands in for a `Llama` whose `create_chat_completion` is called: notes the prompt that the chat format makes."""

    def __init__(self, llm: Llama) -> None:
        self.chat_handler = llm.chat_handler
        self.chat_format = llm.chat_format
        self._chat_handlers = llm._chat_handlers
        self.verbose = llm.verbose
        self.text = ""
        self.add_bos = True
        self.settings: dict[str, Any] = {}

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        self.text, self.add_bos = text.decode(), add_bos
        return []

    def create_completion(self, prompt: object, **settings: Any) -> list[Any]:
        self.settings = settings
        return []


class PromptMaker:
    """Makes prompts for one model; what a document's tokens are is remembered.

    Args:
        llm: the model, whose tokenizer and chat format are used.
        settings: arguments of `Llama.create_chat_completion` beside the messages, such as the temperature.
    """

    def __init__(self, llm: Llama, **settings: Any) -> None:
        self.llm = llm
        self.settings = settings
        self._mark = f"piece-{secrets.token_hex(8)}"  # which nobody can have written into a message
        self._tokens: dict[str, list[int]] = {}

    def whole(self, system: str | None, turns: Sequence[Turn]) -> Prompt:
        """The prompt that the answer to the last turn follows. Raises ValueError: the chat format refuses such a conversation."""
        pieces: list[Document] = []
        recorder = self._render(system, turns, pieces)
        return Prompt(self._assemble(recorder, pieces), recorder.settings)

    def beginning(self, system: str | None, turns: Sequence[Turn], documents: Sequence[Document]) -> list[int]:
        """The tokens that the prompt begins with, whatever the next question about the documents is.

        Raises:
            ValueError: as `whole` does.
        """
        pieces: list[Document] = []
        question = "" if documents else f"{self._mark}-0-"
        recorder = self._render(system, [*turns, Turn(question or "…", documents=tuple(documents))], pieces)
        # up to the end of the last document, else to where the question begins
        end = recorder.text.rfind(self._mark)
        if end < 0:
            return []
        keep = len(f"{self._mark}-{len(pieces) - 1}-") if documents else 0
        recorder.text = recorder.text[: end + keep]
        return self._assemble(recorder, pieces)

    def document_tokens(self, document: Document) -> list[int]:
        """Those of a document with the lines before and after it."""
        text = f"Document {document.name}:\n\n{document.text}\n\nEnd of the document {document.name}."
        if text not in self._tokens:
            self._tokens[text] = self._tokenize(text, special=False)
        return self._tokens[text]

    def _render(self, system: str | None, turns: Sequence[Turn], pieces: list[Document]) -> _Recorder:
        """The conversation by the chat format, with a mark for each document, which are added to `pieces`."""
        messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        for turn in turns:
            marks = []
            for document in turn.documents:
                marks.append(f"{self._mark}-{len(pieces)}-")
                pieces.append(document)
            messages.append({"role": "user", "content": "\n\n".join([*marks, turn.question])})
            if turn.answer is not None:
                messages.append({"role": "assistant", "content": turn.answer})
        recorder = _Recorder(self.llm)
        _Llama.create_chat_completion(recorder, messages, stream=True, **self.settings)
        return recorder

    def _assemble(self, recorder: _Recorder, pieces: Sequence[Document]) -> list[int]:
        """Text by the tokenizer with its special tokens, each document between as it is."""
        parts = re.split(rf"{self._mark}-(\d+)-", recorder.text)
        tokens: list[int] = []
        for i, part in enumerate(parts):
            if i % 2:
                tokens += self.document_tokens(pieces[int(part)])
            elif part or i == 0:
                tokens += self._tokenize(part, special=True, add_bos=recorder.add_bos and i == 0)
        return tokens

    def _tokenize(self, text: str, special: bool, add_bos: bool = False) -> list[int]:
        return list(self.llm.tokenize(text.encode(), add_bos=add_bos, special=special))
