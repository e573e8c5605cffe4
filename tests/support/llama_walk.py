"""A random conversation with `lt_gguf.Llama`, and what it should be like."""

from __future__ import annotations

import itertools
import random

import pytest
from support.llama import answer, interrupt, load, text


class Walk:
    """A context, and what it should be like: its prompts and decoded tokens."""

    def __init__(self, path, mode: str, seed: int, monkeypatch) -> None:
        self.path, self.mode, self.monkeypatch = path, mode, monkeypatch
        self.random = random.Random(seed)
        limit = self.random.choice([0, 300_000, 1_500_000, 512 * 2**20])
        self.llm = load(path, mode, snapshot_limit=limit)
        self.history: list[tuple[str, list[int]]] = []

    @property
    def tokens(self) -> list[int]:
        return [token for _, tokens in self.history for token in tokens]

    def text(self, n: int) -> list[int]:
        return text(n, self.random.randrange(1000))

    def truncate(self, n: int) -> bool:
        """Returns whether a prompt has lost its end."""
        kept, cut = [], False
        for kind, tokens in self.history:
            if n > 0:
                kept.append((kind, tokens[:n]))
                cut = kind == "prompt" and n < len(tokens)
            n -= len(tokens)
        self.history = kept
        return cut

    def append(self, kind: str, tokens: list[int], goes_on: bool = False) -> None:
        if goes_on or (self.history and kind == self.history[-1][0] == "decode"):
            kind, before = self.history.pop()
            tokens = before + tokens
        self.history.append((kind, tokens))

    def prompt(self) -> None:
        tokens = self.text(self.random.choice([2, 20, 150, 400]))
        self.llm.eval(tokens)
        self.append("prompt", tokens)

    def decode(self) -> None:
        for token in self.text(self.random.choice([1, 10, 60])):
            self.llm.eval([token])
            self.append("decode", [token])

    def go_back(self) -> None:
        n = self.random.randrange(len(self.tokens) + 1)
        tokens = self.text(self.random.choice([1, 2, 30, 100]))
        self.llm.n_tokens = n
        cut = self.truncate(n)
        self.llm.eval(tokens)
        self.append("prompt" if len(tokens) > 1 else "decode", tokens, goes_on=cut)

    def chat(self) -> None:
        """Another prompt, which begins as the conversation does."""
        n = self.random.randrange(1, len(self.tokens) + 1)
        tokens = self.tokens[:n] + [1] + self.text(self.random.choice([1, 50, 200]))  # 1 is in no text
        answer(self.llm, tokens, 1)
        self.append("prompt", tokens[n:], goes_on=self.truncate(n))

    def regenerate(self) -> None:
        ends = list(itertools.accumulate(len(tokens) for _, tokens in self.history))
        n = self.random.choice([end for end, (kind, _) in zip(ends, self.history) if kind == "prompt"] or [0])
        if n:
            answer(self.llm, self.tokens[:n], 1)
            self.truncate(n)

    def interrupted(self) -> None:
        tokens = self.text(300)
        at = 0 if self.mode == "by_layer" else self.random.randrange(1, 4)
        interrupt(self.monkeypatch, self.llm, at, self.random.choice(["before", "after"]))
        n = len(self.tokens)
        with pytest.raises(KeyboardInterrupt):
            self.llm.eval(tokens)
        rest = self.text(20)
        tokens = tokens[: self.llm.n_tokens - n] + rest
        self.llm.eval(rest)
        self.append("prompt", tokens)

    def save_and_load(self) -> None:
        state = self.llm.save_state()
        self.llm.eval(self.text(250))
        self.llm.load_state(state)
        self.decode()

    def step(self) -> None:
        if not self.tokens or len(self.tokens) > 1200:
            self.llm.reset()
            self.history = []
            actions = [self.prompt, self.decode]
        else:
            actions = [self.prompt, self.decode, self.go_back, self.go_back, self.chat, self.chat]
            actions += [self.regenerate, self.regenerate, self.interrupted, self.save_and_load]
        self.random.choice(actions)()
