"""Reading a prompt before it is answered, or its beginning before the rest is known: a document, while a person still thinks of the
question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from lt_gguf.runtime.interruptible import interruptible
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.prompts import NotAheadError
from lt_gguf.runtime.rewinding import RewindingLlama, Role

_llama_cpp = load_llama_cpp().llama_cpp


class ReadingLlama(RewindingLlama):
    """`RewindingLlama` that reads before it answers."""

    def read(self, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Reads a prompt that `generate` is going to answer: of it, what the context doesn't begin with already.

        Args:
            progress: called while it is read, with the tokens that have been read (layer by layer: the share of the work), and how
                many are to be. If it raises an error, or Ctrl-C does, the whole batches that were read stay.

        Raises:
            ValueError: it doesn't fit the context or the prompt limit; none of the tokens has been read.
            RuntimeError: llama_decode failed.
        """
        missing = self._reuse(list(tokens))
        if not missing:
            return
        self._role = Role.PROMPT
        try:
            self._eval(missing, progress=None if progress is None else partial(_report, progress, lambda: None))
        finally:
            self._role = None

    def read_ahead(self, tokens: Sequence[int], progress: Callable[[int, int], None] | None = None) -> None:
        """Reads the beginning of a prompt, the rest of which will follow: of it, what the context doesn't begin with already.

        To the prompt that follows it is as if all had been read at once: with `prefill = full`, streaming layers keep all of
        it until the prompt's end. (`KVPart.PROMPT` of the cache; `eval` of these tokens would end the prompt.)

        Args:
            progress: called after each batch with the tokens that have been read, and how many are to be. If it raises an
                error, or Ctrl-C does, what was read stays and needn't be read again.

        Raises:
            ValueError: it doesn't fit the context or the prompt limit; none of the tokens has been read.
            NotAheadError: it doesn't fit the prompt limit in several batches, as a whole it would (`read`); no more has been read.
            RuntimeError: llama_decode failed.
        """
        tokens = list(tokens)
        if len(tokens) >= self._n_ctx:
            raise ValueError(f"{len(tokens)} tokens don't fit a context of {self._n_ctx}, which needs room for more")
        n = self._n_common(tokens)
        if n == len(tokens):
            return
        if n == 0:
            self.reset()
        self.n_tokens = n
        self._requires_eval = True
        self._role = Role.PROMPT
        try:
            with interruptible(self.ctx) as check:
                self._eval(tokens[n:], ends=False, progress=partial(_report, progress, check))
        except ValueError as error:
            begun = self._prompts.open_begin
            if self.reads_by_layer(len(tokens) + 1 - (n if begun is None else begun)):
                raise NotAheadError(str(error)) from None
            raise
        finally:
            self._role = None

    def n_reusable(self, tokens: Sequence[int]) -> int:
        """How many of a prompt's first tokens `generate` and `read_ahead` wouldn't read again; an estimate, never too large
        by more than what is read again anyway."""
        n = self._n_common(tokens)
        if self.streaming is None or n >= 1 + _llama_cpp.llama_memory_seq_pos_max(self._ctx.memory, 0):
            return n
        is_within_prompt = self._reads_in_full and any(b < n < e for b, e in self._prompts.spans if e is not None)
        if not is_within_prompt and n >= _llama_cpp.llama_memory_seq_pos_min(self._ctx.memory, 0):
            return n
        snapshot = self._snapshots.nearest(n)
        return snapshot.n_tokens if snapshot else 0


def _report(progress: Callable[[int, int], None] | None, check: Callable[[], None], before: int, total: int, done: int) -> None:
    if progress is not None:
        progress(before + done, total)
    check()
