"""A context that reads prompts and is timed while it does: what `prompts.py` measures with."""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from support.native import FULL, PROMPT, STREAMING, C, Context, Model, log

from lt_gguf.spec import (
    StreamingSpec,
    parse_running,
)

N_BATCH = 512
N_ROOM = 256  # cells of the context for what follows the prompt
N_FOLLOWING = 4  # tokens decoded after the prompt's end: the first, and others to compare it with


class BenchError(Exception):
    """What could not be measured."""


# ------------------------------------------------------------------------------------------- the log


class TimedLog:
    """llama.cpp's log, kept with the time of each line and not shown.

    Args:
        clock: seconds; `time.thread_time` where llama.cpp computes in this thread alone.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.lines: list[tuple[float, str]] = []
        self._callback = C.llama_log_callback(self._write)
        C.llama_log_set(self._callback, ctypes.c_void_p())

    def _write(self, _level: int, text: bytes, _user_data: int | None) -> None:
        self.lines.append((self.clock(), text.decode(errors="replace")))
        log.lines.append(self.lines[-1][1].rstrip("\n"))  # where errors are quoted from

    def seconds_of_switch(self, since: float) -> float:
        """From the allocation of the chosen layers' streaming cache to the line that names the layers; 0 without them."""
        lines = [(at, text) for at, text in self.lines if at >= since]
        if end := next((at for at, text in lines if "streaming layers for this prompt" in text), None):
            return end - lines[0][0]
        return 0.0


# ----------------------------------------------------------------------------------------- reading


class Reader:
    """A context that reads a prompt; times are those of llama_decode until all is computed, in seconds of the log's clock."""

    def __init__(self, model: Model, spec: str, n_tokens: int, threads: int, timed_log: TimedLog):
        model.set_streaming(spec)
        self.context: Context = model.context(
            n_ctx=n_tokens + N_ROOM, n_batch=N_BATCH, n_ubatch=N_BATCH, kv="f16", flash=True, n_threads=threads
        )
        self.n_layer = model.n_layer
        self._log = timed_log
        self._batch = C.llama_batch_init(N_BATCH, 0, 1)
        self._state: ctypes.Array | None = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_) -> None:
        C.llama_batch_free(self._batch)
        self.context.close()

    @property
    def spec(self) -> StreamingSpec:
        """What streams now."""
        return parse_running(self.context.streaming(), self.n_layer)[0]

    def kv_bytes(self) -> tuple[int, int, int]:
        return tuple(self.context.kv_bytes(part) for part in (FULL, STREAMING, PROMPT))

    def read(self, tokens: Sequence[int], begin: int, asks_last: bool = False) -> float:
        """Computes tokens from position `begin` on; only the last one may ask for logits."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, begin + i, 1, 0
            batch.logits[i] = asks_last and i + 1 == len(tokens)
        start = self._log.clock()
        code = C.llama_decode(self.context.handle, batch)
        C.llama_synchronize(self.context.handle)
        seconds = self._log.clock() - start
        if code:
            raise BenchError(f"llama_decode returned {code} at position {begin}: {' | '.join(log.lines[-6:])}")
        return seconds

    def read_end(self, tokens: Sequence[int], begin: int) -> End:
        """Reads the prompt's last tokens and decodes a few."""
        start = self._log.clock()
        last = self.read(tokens, begin, asks_last=True)
        following = [self.read([i], begin + len(tokens) + i, asks_last=True) for i in range(N_FOLLOWING)]
        return End(last, following[0], statistics.median(following[1:]), self._log.seconds_of_switch(start))

    def decode(self, n_tokens: int, begin: int) -> float:
        """Tokens per second, one after the other. Afterwards the context is as before."""
        seconds = sum(self.read([i], begin + i, asks_last=True) for i in range(n_tokens))
        self.remove(begin)
        return n_tokens / seconds

    def remove(self, begin: int) -> None:
        if not self.context.seq_rm(0, begin, -1):
            raise BenchError(f"the positions from {begin} on can't be removed")

    def save(self) -> None:
        """Keeps this moment for `restore`."""
        size = C.llama_state_get_size(self.context.handle)
        self._state = (ctypes.c_uint8 * size)()
        if C.llama_state_get_data(self.context.handle, self._state, size) != size:
            raise BenchError("the state in the middle of the prompt can't be saved")

    def restore(self) -> None:
        if C.llama_state_set_data(self.context.handle, self._state, len(self._state)) != len(self._state):
            raise BenchError(f"the state in the middle of the prompt can't be restored: {' | '.join(log.lines[-6:])}")


@dataclass(frozen=True)
class End:
    """The end of a prompt, in seconds: its last batch, the first decoded token, a later one, and the switch of chosen layers."""

    last: float
    first: float
    later: float
    switch: float

    @property
    def cost(self) -> float:
        """The last batch, and what the first decoded token takes more than a later one."""
        return self.last + self.first - self.later
