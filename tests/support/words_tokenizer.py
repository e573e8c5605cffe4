"""A tokenizer of whole words, which needs no model."""

from __future__ import annotations

import re

BOS = 1
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|user|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


class WordsTokenizer:
    """A token is a word with the space before it, a digit, or another character; or with `special` a special token's name."""

    eos_text = ""

    def __init__(self, chat_template: str | None = None, bos: tuple[int, ...] = (BOS,)) -> None:
        self.chat_template = chat_template
        self.bos = list(bos)
        self._ids = {"<s>": BOS}

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        names = r"<s>|<\|\w+\|>|" if special else ""
        pieces = re.findall(names + r" ?[A-Za-z]+|[0-9]|.", text, re.DOTALL)
        assert "".join(pieces) == text
        return [self._ids.setdefault(piece, BOS + len(self._ids)) for piece in pieces]

    def detokenize(self, tokens) -> str:
        pieces = {i: piece for piece, i in self._ids.items()}
        return "".join(pieces[token] for token in tokens)
