"""`SharedPrompts`: documents that are read once, with full attention, and then serve for every set of streaming layers.

With `prefill = full` what the layers keep of a prompt is the same, whatever streams after it. So the runtime keeps all of it, and a
candidate costs the few tokens that follow, in which its layers are only not shown what they would have dropped (`lt_context_hide`).
That gives the logits of a context in which they stream (tested).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from lt_gguf.evaluation.context import ScorerOptions, ScoringContext
from lt_gguf.runtime import api
from lt_gguf.runtime.batch import SEQUENCE, WANTED, batch_part
from lt_gguf.runtime.text_model import TextModel
from lt_gguf.spec import StreamingSpec, with_cache_keep


class SharedPrompts:
    """A context for one document at a time, and conversations about it that share its cache. A context manager.

    Args:
        model: that reads them.
        options: how; `n_ctx` and `n_parallel` don't count.
        n_ctx: tokens of a document with all its conversations, at most.
        n_seq: conversations at a time.

    Raises:
        ValueError: the model can't stream, or there is no memory for so much.
    """

    def __init__(self, model: TextModel, options: ScorerOptions, n_ctx: int, n_seq: int) -> None:
        self._n_layer, self._n_seq = model.n_layer, n_seq
        api.set_model_spec(model.handle, str(with_cache_keep(api.HIDE_LATER, options.cache_keep)))
        try:
            self._context = ScoringContext(model, options, n_ctx, n_seq, unified=True)
        finally:
            api.set_model_spec(model.handle, None)
        self._hidden: StreamingSpec | None = None
        self._n_past = [0] * n_seq

    def __enter__(self) -> SharedPrompts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the context. Nothing else can be done afterwards."""
        self._context.close()

    def hide(self, spec: StreamingSpec | None) -> None:
        """From now on tokens are computed as if these layers streamed; `None`: with full attention. Raises ValueError: they can't."""
        if spec != self._hidden:
            assert self._context.handle is not None
            api.context_hide(self._context.handle, spec or StreamingSpec.off(self._n_layer))
            self._hidden = spec

    def clear(self) -> None:
        """Forgets document and conversations."""
        self._context.clear()
        self._n_past = [0] * self._n_seq

    def save(self) -> np.ndarray:
        """What has been read of a document, uint8."""
        self.hide(None)
        return self._context.save(0)

    def restore(self, state: np.ndarray, n_tokens: int) -> None:
        """Goes on with a document of so many tokens that was saved."""
        self.clear()
        self.hide(None)
        self._context.restore(0, state)
        self._n_past[0] = n_tokens

    def share(self, n: int) -> None:
        """Lets `n` conversations begin with the document, which the first one has."""
        for seq in range(1, n):
            self._context.copy(0, seq)
            self._n_past[seq] = self._n_past[0]

    def read(self, messages: Sequence[Sequence[int]]) -> None:
        """Reads a prompt, or a part of one, in each of the first conversations."""
        parts = []
        for seq, tokens in enumerate(messages):
            self._context.begin_prompt(seq, len(tokens))
            parts.append(batch_part(tokens, self._n_past[seq], seq, False))
            # note: the end of a prompt asks for logits, else the next tokens would belong to it
            parts[-1][WANTED, -1:] = True
        for _ in self._compute(np.concatenate(parts, axis=1), self._context.n_at_once):
            pass

    def decode(self, answers: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Decodes the tokens of an answer in each of the first conversations.

        Returns:
            float32 (tokens, n_vocab) for each: the log-probabilities of what comes after each token.
        """
        parts = [batch_part(tokens, self._n_past[seq], seq, True) for seq, tokens in enumerate(answers)]
        rows = np.concatenate(list(self._compute(np.concatenate(parts, axis=1), self._context.n_wanted_at_once)))
        return np.split(rows, np.cumsum([part.shape[1] for part in parts])[:-1])

    def n_past(self, seq: int = 0) -> int:
        """Tokens that a conversation has, with the document."""
        return self._n_past[seq]

    def cut(self, n: Sequence[int]) -> None:
        """Removes what the first conversations have after their first `n` tokens."""
        for seq, n_left in enumerate(n):
            if n_left < self._n_past[seq]:
                self._context.cut(seq, n_left)
                self._n_past[seq] = n_left

    def _compute(self, tokens: np.ndarray, n_at_once: int) -> Iterator[np.ndarray]:
        for begin in range(0, tokens.shape[1], n_at_once):
            part = tokens[:, begin : begin + n_at_once]
            rows = self._context.compute(part)
            for seq, n in zip(*np.unique(part[SEQUENCE], return_counts=True)):
                self._n_past[seq] += int(n)
            yield rows
