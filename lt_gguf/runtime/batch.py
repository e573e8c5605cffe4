"""`Batch`: a llama_batch on numpy arrays, filled at once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np

from lt_gguf.runtime.library import load_llama_cpp

_llama_cpp = load_llama_cpp().llama_cpp

# the rows of the arrays of tokens that batches are filled with; wanted: the logits of a token are
TOKEN, POSITION, SEQUENCE, WANTED = range(4)


class Batch:
    """A llama_batch of up to `size` tokens, each of one sequence. `native` is what llama_decode takes, while this lives."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rows = np.zeros((3, size), np.int32)
        self._n_sequences = np.ones(size, np.int32)
        self._wanted = np.zeros(size, np.int8)
        sequences = self._rows[SEQUENCE]
        self._sequence_at = sequences.ctypes.data + sequences.itemsize * np.arange(size, dtype=np.uintp)
        integers = ctypes.POINTER(ctypes.c_int32)
        self.native = _llama_cpp.llama_batch(
            0,
            self._rows[TOKEN].ctypes.data_as(integers),
            None,
            self._rows[POSITION].ctypes.data_as(integers),
            self._n_sequences.ctypes.data_as(integers),
            self._sequence_at.ctypes.data_as(ctypes.POINTER(integers)),
            self._wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, tokens: np.ndarray) -> None:
        """Takes the tokens of an array (4, at most `size`)."""
        n = self.native.n_tokens = tokens.shape[1]
        self._rows[:, :n] = tokens[:WANTED]
        self._wanted[:n] = tokens[WANTED]


def batch_part(tokens: Sequence[int], begin: int, sequence: int, wanted: bool | np.ndarray) -> np.ndarray:
    """Tokens of one sequence, from position `begin` on, as an array for batches: int32 (4, tokens)."""
    part = np.empty((4, len(tokens)), np.int32)
    part[TOKEN] = tokens
    part[POSITION] = np.arange(begin, begin + len(tokens))
    part[SEQUENCE] = sequence
    part[WANTED] = wanted
    return part
