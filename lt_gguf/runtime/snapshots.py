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
        state: llama.cpp's partial state of sequence 0; nobody changes it.
        logits: float32 (n_vocab,), those of the last token; `None` if nobody needs them.
    """

    n_tokens: int
    state: bytearray
    logits: np.ndarray | None = None

    @property
    def n_bytes(self) -> int:
        return len(self.state) + (0 if self.logits is None else self.logits.nbytes)

    def restore(self, context: int) -> bool:
        """Brings the streaming layers back. The full ones must hold the same tokens, and the caller removes what follows.

        Returns false if the context doesn't take it; what the sequence holds is undefined then.
        """
        size = len(self.state)
        return _llama_cpp.llama_state_seq_set_data_ext(context, _pointer(self.state), size, 0, _PARTIAL) == size


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
        state = bytearray(size)
        n_bytes = _llama_cpp.llama_state_seq_get_data_ext(context, _pointer(state), size, 0, _PARTIAL)
        if n_bytes > 0:
            self.keep(Snapshot(n_tokens, state if n_bytes == size else state[:n_bytes], logits))

    def keep(self, snapshot: Snapshot) -> None:
        """Keeps a snapshot in place of one at the same position, if it fits the limit."""
        if snapshot.n_bytes > self.limit:
            return
        self._kept = [kept for kept in self._kept if kept.n_tokens != snapshot.n_tokens]
        self._kept.append(snapshot)
        while self.n_bytes > self.limit:
            del self._kept[0]

    def at(self, n_tokens: int) -> Snapshot | None:
        return next((snapshot for snapshot in self._kept if snapshot.n_tokens == n_tokens), None)

    def nearest(self, n_tokens: int) -> Snapshot | None:
        """The last one that holds no more than the first `n_tokens` tokens."""
        usable = (snapshot for snapshot in self._kept if snapshot.n_tokens <= n_tokens)
        return max(usable, key=lambda snapshot: snapshot.n_tokens, default=None)

    def newest(self, n_tokens: int, n: int) -> list[Snapshot]:
        """The last `n` of those that hold no more than the first `n_tokens` tokens, in their order."""
        usable = [snapshot for snapshot in self._kept if snapshot.n_tokens <= n_tokens]
        return sorted(usable, key=lambda snapshot: snapshot.n_tokens)[len(usable) - min(n, len(usable)) :]

    def drop_after(self, n_tokens: int) -> None:
        """Drops those that hold more than the first `n_tokens` tokens, which are about to be replaced."""
        self._kept = [snapshot for snapshot in self._kept if snapshot.n_tokens <= n_tokens]

    def clear(self) -> None:
        self._kept = []


def _pointer(state: bytearray) -> ctypes.Array[ctypes.c_uint8]:
    return (ctypes.c_uint8 * len(state)).from_buffer(state)
