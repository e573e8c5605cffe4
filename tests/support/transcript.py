"""A conversation as a context was fed it: its tokens, which of them are prompts, and the logits that came back."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from support.native import Context, Token
from support.oracle import Subject, difference, random_tokens

from lt_gguf.spec import StreamingSpec

OPEN = 2**31 - 1  # the end of a prompt that is being read


class Transcript:
    """One sequence of `context`. What is read and decoded is recorded; `difference` compares it with transformers.

    What a prompt is follows the specification, section 4, from the logits that were asked for, or from `declared`.
    """

    def __init__(self, subject: Subject, spec: StreamingSpec | None, context: Context, seq: int = 0, seed: int = 0):
        self.subject, self.spec, self.context, self.seq = subject, spec, context, seq
        self.tokens: list[int] = []
        self.prompts: list[tuple[int, int]] = []
        self.rows: dict[int, np.ndarray] = {}
        self.declared = 0  # tokens of a declared prompt that are still to come
        self._worst = 0.0
        self._random = np.random.default_rng([seed, seq, 7])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def two_phases(self) -> bool:
        return self.spec is not None and self.spec.prefill == "full"

    @property
    def in_prompt(self) -> bool:
        return bool(self.prompts) and self.prompts[-1][1] == OPEN

    # -- what a batch is

    def batch(self, n: int, logits: Sequence[bool]) -> list[Token]:
        """The next `n` tokens, as a part of a batch whose other parts are other sequences'. They count as decoded with it."""
        start = len(self)
        ids = random_tokens(n, self._random)
        if self.declared or not all(logits):
            self._open(start)
        self.tokens += ids.tolist()
        if self.declared:
            assert n <= self.declared, "a batch that ends behind a declared prompt is not what applications send"
            self.declared -= n
            ends = not self.declared
        else:
            ends = logits[-1]
        if self.in_prompt and ends:
            self.prompts[-1] = (self.prompts[-1][0], len(self))
        return [Token(int(t), start + i, (self.seq,), bool(wanted)) for i, (t, wanted) in enumerate(zip(ids, logits))]

    def record(self, batch: Sequence[Token], rows: np.ndarray) -> None:
        """Takes the logits of `batch`, of which this sequence's tokens are kept."""
        for token, row in zip((token for token in batch if token.logits), rows, strict=True):
            if self.seq in token.seqs:
                self.rows[token.pos] = row

    def _open(self, start: int) -> None:
        if not self.in_prompt:
            self.prompts.append((start, OPEN))

    # -- reading and decoding

    def read(self, n: int, n_batch: int | None = None, end: bool = True, most: bool = False) -> None:
        """Reads `n` tokens of a prompt, in batches of `n_batch`; with `end` the last one asks for logits, which ends it.

        With `most` nearly all ask, as far as they don't end it: what is compared is then the inside of the prompt, too.
        """
        first, n_batch = len(self), n_batch or n
        for done in range(0, n, n_batch):
            size = min(n_batch, n - done)
            last = end and done + size == n
            wanted = [most] * size
            wanted[-1] = last
            if last and size > 1 and not self.in_prompt:
                wanted[0] = False
            self._decode(size, wanted)
        assert len(self) == first + n

    def decode(self, n: int, together: int = 1) -> None:
        """Decodes `n` tokens which all ask for logits, in batches of `together`: more than one is a draft's check."""
        for done in range(0, n, together):
            size = min(together, n - done)
            self._decode(size, [True] * size)

    def declare(self, n: int) -> None:
        self.context.prompt_begin(n, self.seq)
        self.declared = n

    def _decode(self, n: int, wanted: list[bool]) -> None:
        batch = self.batch(n, wanted)
        self.record(batch, self.context.decode_batch(batch))
        if self.two_phases:
            assert self.context.in_prompt(self.seq) == self.in_prompt

    # -- going back

    def rewind(self, end: int) -> bool:
        """Removes all from position `end` on, if the context allows it; within a prompt it is then being read again."""
        if not self.context.seq_rm(self.seq, end, -1):
            return False
        self.forget(end)
        return True

    def forget(self, end: int) -> None:
        self._worst = self.difference()
        self.declared = 0
        self.tokens = self.tokens[:end]
        self.rows = {pos: row for pos, row in self.rows.items() if pos < end}
        self.prompts = [(b, e if e <= end else OPEN) for b, e in self.prompts if b < end]

    def copy(self, seq: int, context: Context | None = None) -> Transcript:
        """What a copy of the sequence in another one, or in another context, is from here on."""
        other = Transcript(self.subject, self.spec, context or self.context, seq, seed=int(self._random.integers(2**31)))
        other.tokens, other.prompts, other.declared = list(self.tokens), list(self.prompts), self.declared
        return other

    # -- against transformers

    def logits(self) -> tuple[np.ndarray, np.ndarray]:
        """What came back and is still there, and what transformers says of it, float32 (number of rows, n_vocab)."""
        prompts = self.prompts if self.two_phases else None
        expected = self.subject.expected(np.array(self.tokens), self.spec, prompts)
        return np.stack(list(self.rows.values())), expected[list(self.rows)]

    def difference(self) -> float:
        """The largest difference of a logit so far, what was removed since included."""
        if self.rows:
            self._worst = max(self._worst, difference(*self.logits()))
        return self._worst
