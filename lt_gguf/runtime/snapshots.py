"""Snapshots of what the streaming layers hold, so that a conversation can go back further than their window.

The full layers hold every position anyway: going back there is only removing. A snapshot is therefore small, sinks and
window of the streaming layers, as long as it is taken when no prompt is being read.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from lt_gguf.runtime.library import load_llama_cpp

_llama_cpp = load_llama_cpp().llama_cpp
_PARTIAL = _llama_cpp.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY

DEFAULT_LIMIT = 512 * 2**20  # bytes


@dataclass(frozen=True)
class Snapshot:
    """The streaming layers after the first `n_tokens` tokens.

    Args:
        n_tokens: number of tokens in the context at that moment.
        state: llama.cpp's partial state of sequence 0.
        logits: float32 (n_vocab,), those of the last token; `None` if nobody needs them.
    """

    n_tokens: int
    state: ctypes.Array
    logits: np.ndarray | None = None

    @property
    def n_bytes(self) -> int:
        return len(self.state) + (0 if self.logits is None else self.logits.nbytes)

    def restore(self, context: int) -> bool:
        """Brings the streaming layers back. The full ones must hold the same tokens, and the caller removes what follows.

        Returns false if the context doesn't take it; what the sequence holds is undefined then.
        """
        return _llama_cpp.llama_state_seq_set_data_ext(context, self.state, len(self.state), 0, _PARTIAL) == len(self.state)


class Snapshots:
    """The snapshots of one conversation, each at another position.

    Args:
        limit: most bytes that they take together; the oldest go first. 0: none is kept.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self.limit = limit
        self._kept: list[Snapshot] = []  # oldest first

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def n_bytes(self) -> int:
        return sum(snapshot.n_bytes for snapshot in self._kept)

    @property
    def positions(self) -> list[int]:
        return sorted(snapshot.n_tokens for snapshot in self._kept)

    def take(self, context: int, n_tokens: int, logits: np.ndarray | None = None) -> None:
        """Keeps the present moment, in which the context holds exactly `n_tokens` tokens, if it fits the limit.

        A snapshot at the same position is replaced.
        """
        size = _llama_cpp.llama_state_seq_get_size_ext(context, 0, _PARTIAL)
        if not 0 < size + (0 if logits is None else logits.nbytes) <= self.limit:
            return
        state = (ctypes.c_uint8 * size)()
        n_bytes = _llama_cpp.llama_state_seq_get_data_ext(context, state, size, 0, _PARTIAL)
        if n_bytes == 0:
            return
        if n_bytes < size:
            state = (ctypes.c_uint8 * n_bytes).from_buffer_copy(memoryview(state)[:n_bytes])
        kept = [snapshot for snapshot in self._kept if snapshot.n_tokens != n_tokens]
        self._kept = [*kept, Snapshot(n_tokens, state, logits)]
        while self.n_bytes > self.limit:
            del self._kept[0]

    def at(self, n_tokens: int) -> Snapshot | None:
        return next((snapshot for snapshot in self._kept if snapshot.n_tokens == n_tokens), None)

    def nearest(self, n_tokens: int) -> Snapshot | None:
        """The last one that holds no more than the first `n_tokens` tokens."""
        usable = (snapshot for snapshot in self._kept if snapshot.n_tokens <= n_tokens)
        return max(usable, key=lambda snapshot: snapshot.n_tokens, default=None)

    def drop_after(self, n_tokens: int) -> None:
        """Drops those that hold more than the first `n_tokens` tokens, which are about to be replaced."""
        self._kept = [snapshot for snapshot in self._kept if snapshot.n_tokens <= n_tokens]

    def clear(self) -> None:
        self._kept = []
