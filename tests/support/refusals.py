"""What must be refused, and leave the rest of the context usable."""

from __future__ import annotations

import numpy as np
import pytest
from support.native import Context, DecodeError, log


def restore_damaged(context: Context, state: bytes, seq: int, random: np.random.Generator) -> None:
    """Restores cut states of a sequence, which must be refused, and changed ones, which end in a refusal or in something valid."""
    for length in [0, 1, 3, 4, 8, 40, 100, len(state) // 2, len(state) - 1]:
        assert not context.restore_seq(state[:length], seq)
    for _ in range(40):
        damaged = bytearray(state)
        damaged[random.integers(0, 300)] ^= int(random.integers(1, 256))
        context.restore_seq(bytes(damaged), seq)
        context.seq_rm(seq, -1, -1)


def refuse_shift(context: Context, n_keep: int, n_discard: int) -> None:
    """A context shift of sequence 0 that needs dropped keys: a line says so, and the sequence can't be decoded until it is removed."""
    n = context.pos_max() + 1
    assert context.seq_rm(0, n_keep, n_keep + n_discard)
    start = log.mark()
    context.seq_add(0, n_keep + n_discard, -1, -n_discard)
    assert "sink" in " ".join(log.since(start)) and "n_keep" in " ".join(log.since(start))
    with pytest.raises(DecodeError) as refusal:
        context.decode([5], n)
    assert refusal.value.code < 0
