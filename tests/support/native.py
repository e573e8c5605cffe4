"""A thin harness over llama.cpp's C API: models, contexts and what the tests ask of them, as Python values.

It drives whichever libllama `llama_cpp` was pointed at: the patched one by default, or
the one that LLAMA_CPP_LIB_PATH names, such as a stock build in a process of its own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

if "LLAMA_CPP_LIB_PATH" in os.environ:
    import llama_cpp as C
else:
    from lt_gguf.runtime.library import load_llama_cpp

    C = load_llama_cpp()

N_THREADS = int(os.environ.get("LT_TEST_THREADS", "1"))  # the models are small, where threads only cost
FULL, STREAMING, PROMPT, SWA = range(4)  # enum lt_kv_part
PARTIAL = C.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # enum ggml_type
KV_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}  # a value, with its block's scale


class Token(NamedTuple):
    """One token of a batch."""

    id: int
    pos: int
    seqs: tuple[int, ...] = (0,)
    logits: bool = True


class DecodeError(RuntimeError):
    def __init__(self, code: int):
        super().__init__(f"llama_decode returned {code}: {' | '.join(log.lines[-3:])}")
        self.code = code


class Log:
    """The library's log, kept in memory; it still goes where it went before, for tests of just that."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._n_forgotten = 0
        self._before, self._before_data = C.llama_log_callback(), ctypes.c_void_p()
        C.llama_log_get(ctypes.byref(self._before), ctypes.byref(self._before_data))
        self._callback = C.llama_log_callback(self._write)
        C.llama_log_set(self._callback, None)

    def _write(self, level: int, text: bytes, _user_data) -> None:
        self._before(level, text, self._before_data)
        self.lines.append(text.decode(errors="replace").rstrip("\n"))
        if len(self.lines) > 4000:
            del self.lines[:2000]
            self._n_forgotten += 2000

    def mark(self) -> int:
        """Where the log is now, for `since`."""
        return self._n_forgotten + len(self.lines)

    def since(self, mark: int) -> list[str]:
        return self.lines[max(0, mark - self._n_forgotten) :]


log = Log()
C.llama_backend_init()


def api():
    """The patch's own functions, which a stock libllama doesn't have."""
    from lt_gguf.runtime import api

    return api


def _lt(name: str, *arguments):
    """A function of the patch that says yes or no of a context."""
    function = getattr(C.llama_cpp._lib, name)
    function.restype, function.argtypes = ctypes.c_bool, (ctypes.c_void_p, *arguments)
    return function


class Model:
    """A GGUF file, loaded. Raises ValueError with the log's last lines if llama.cpp refuses it."""

    def __init__(self, path: Path | str, **params):
        self.path = Path(path)
        start = log.mark()
        parameters = C.llama_model_default_params()
        for name, value in params.items():
            setattr(parameters, name, value)
        self.handle = C.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.handle:
            raise ValueError(f"{self.path.name} was not loaded: {' | '.join(log.since(start)[-4:])}")
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.handle))
        self.n_layer = C.llama_model_n_layer(self.handle)
        self.n_swa = C.llama_model_n_swa(self.handle)

    def set_streaming(self, spec: str | None) -> None:
        """Overrides the spec of contexts made from now on; None goes back to the file's. Raises ValueError."""
        api().set_model_spec(self.handle, spec)

    def streaming(self) -> str:
        return api().model_spec(self.handle)

    def lora(self, path: Path) -> int:
        adapter = C.llama_adapter_lora_init(self.handle, str(path).encode())
        assert adapter, log.lines[-3:]
        return adapter

    def context(self, **settings) -> Context:
        return Context(self, **settings)

    def close(self) -> None:
        if self.handle:
            C.llama_model_free(self.handle)
            self.handle = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Context:
    """A llama_context. `settings` are fields of llama_context_params; `kv` sets the type of K and V, `flash` flash
    attention. Where nothing is said: f32 KV, no flash attention, N_THREADS, n_ubatch = n_batch = n_ctx."""

    def __init__(self, model: Model, *, n_ctx: int = 512, kv: str = "f32", flash: bool = False, **settings):
        self.model = model
        parameters = C.llama_context_default_params()
        settings = {"n_batch": n_ctx, "n_ubatch": settings.get("n_batch", n_ctx), "n_threads": N_THREADS} | settings
        settings |= {"type_k": KV_TYPES[kv], "type_v": KV_TYPES[kv], "flash_attn_type": int(flash), "n_ctx": n_ctx}
        for name, value in settings.items():
            setattr(parameters, name, value)
        parameters.n_threads_batch = parameters.n_threads
        start = log.mark()
        self.handle = C.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise ValueError(f"no context: {' | '.join(log.since(start)[-4:])}")
        self.log = log.since(start)
        self.n_batch = C.llama_n_batch(self.handle)
        self.memory = C.llama_get_memory(self.handle)
        self._batch = C.llama_batch_init(self.n_batch, 0, max(1, parameters.n_seq_max))

    # -- decoding

    def decode(self, tokens: Sequence[int], start: int = 0, seq: int = 0) -> np.ndarray:
        """Decodes `tokens` of one sequence at the positions from `start`: float32 (len(tokens), n_vocab) logits."""
        return self.decode_batch([Token(int(t), start + i, (seq,)) for i, t in enumerate(tokens)])

    def decode_one_by_one(self, tokens: Sequence[int], start: int = 0, seq: int = 0) -> np.ndarray:
        return np.concatenate([self.decode([t], start + i, seq) for i, t in enumerate(tokens)])

    def read_prompt(self, tokens: Sequence[int], start: int = 0, seq: int = 0, n_batch: int | None = None) -> np.ndarray:
        """Reads `tokens` as applications read a prompt: only its last token asks for logits, float32 (1, n_vocab)."""
        last = start + len(tokens) - 1
        batch = [Token(int(t), start + i, (seq,), start + i == last) for i, t in enumerate(tokens)]
        n_batch = n_batch or self.n_batch
        return np.concatenate([self.decode_batch(batch[i : i + n_batch]) for i in range(0, len(batch), n_batch)])

    def decode_batch(self, tokens: Iterable[Token]) -> np.ndarray:
        """Decodes in calls of up to n_batch tokens: float32 (number of tokens with logits, n_vocab).

        Raises DecodeError if a call doesn't return 0.
        """
        tokens = list(tokens)
        rows = []
        for first in range(0, len(tokens), self.n_batch):
            part = tokens[first : first + self.n_batch]
            if code := self._decode(part):
                raise DecodeError(code)
            rows += [self._logits(i) for i, token in enumerate(part) if token.logits]
        return np.stack(rows) if rows else np.empty((0, self.model.n_vocab), np.float32)

    def _decode(self, tokens: list[Token]) -> int:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token.id, token.pos, token.logits
            batch.n_seq_id[i] = len(token.seqs)
            for j, seq in enumerate(token.seqs):
                batch.seq_id[i][j] = seq
        return C.llama_decode(self.handle, batch)

    def _logits(self, i: int) -> np.ndarray:
        row = C.llama_get_logits_ith(self.handle, i)
        return np.ctypeslib.as_array(row, shape=(self.model.n_vocab,)).copy()

    def abort_after(self, n_checks: int | None) -> None:
        """Makes the decoding that follows stop at the n-th time the library asks whether to go on; None: never."""
        asked = iter(range(n_checks or 0))
        answer = None if n_checks is None else (lambda _: next(asked, None) is None)
        self._abort = C.ggml_abort_callback(answer) if answer else C.ggml_abort_callback()
        C.llama_set_abort_callback(self.handle, self._abort, None)

    # -- prompts

    def in_prompt(self, seq: int = 0) -> bool:
        """Whether the last batch of the sequence left a prompt open."""
        return api().seq_in_prompt(self.handle, seq)

    def prompt_begin(self, n_tokens: int, seq: int = 0) -> None:
        """Declares that the next `n_tokens` tokens are one prompt. Raises ValueError if they don't fit."""
        api().prompt_begin(self.handle, seq, n_tokens)

    def set_prompt_limit(self, n_bytes: int) -> None:
        api().set_prompt_limit(self.handle, n_bytes)

    def lazy_ratios(self) -> np.ndarray | None:
        """The lazy ratio of each layer, None before they are measured."""
        ratios = api().lazy_ratios(self.handle)
        return None if ratios is None else np.asarray(ratios)

    def set_lora(self, adapter: int, scale: float = 1.0) -> None:
        adapters = (C.llama_adapter_lora_p_ctypes * 1)(adapter)
        assert C.llama_set_adapters_lora(self.handle, adapters, 1, (ctypes.c_float * 1)(scale)) == 0

    # -- the memory

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        return C.llama_memory_seq_rm(self.memory, seq, p0, p1)

    def can_rm(self, seq: int, p0: int) -> bool:
        """Whether `seq_rm(seq, p0, -1)` would succeed."""
        return _lt("lt_seq_can_rm", ctypes.c_int32, ctypes.c_int32)(self.handle, seq, p0)

    def can_checkpoint(self, seq: int = 0) -> bool:
        """Whether a partial state of the sequence would be small, and could be restored."""
        return _lt("lt_seq_can_checkpoint", ctypes.c_int32)(self.handle, seq)

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        C.llama_memory_seq_cp(self.memory, src, dst, p0, p1)

    def seq_keep(self, seq: int) -> None:
        C.llama_memory_seq_keep(self.memory, seq)

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        C.llama_memory_seq_add(self.memory, seq, p0, p1, delta)

    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None:
        C.llama_memory_seq_div(self.memory, seq, p0, p1, d)

    def clear(self) -> None:
        C.llama_memory_clear(self.memory, True)

    def pos_min(self, seq: int = 0) -> int:
        return C.llama_memory_seq_pos_min(self.memory, seq)

    def pos_max(self, seq: int = 0) -> int:
        return C.llama_memory_seq_pos_max(self.memory, seq)

    def can_shift(self) -> bool:
        return C.llama_memory_can_shift(self.memory)

    def streaming(self) -> str:
        return api().context_spec(self.handle)

    def kv_bytes(self, part: int) -> int:
        return api().kv_bytes(self.handle, part)

    def kv_cells(self, part: int) -> int:
        return api().kv_cells(self.handle, part)

    def positions(self, part: int, seq: int = 0) -> list[int]:
        """The positions of a sequence that the part holds, ascending."""
        positions = api().seq_positions(self.handle, part, seq)
        assert positions is not None, "this memory has no view of positions"
        return positions

    # -- states

    def save(self) -> bytes:
        """The whole state: every sequence."""
        size = C.llama_state_get_size(self.handle)
        buffer = (ctypes.c_uint8 * size)()
        n = C.llama_state_get_data(self.handle, buffer, size)
        return bytes(buffer[:n])

    def restore(self, state: bytes) -> bool:
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        return C.llama_state_set_data(self.handle, buffer, len(state)) == len(state)

    def save_seq(self, seq: int = 0, flags: int = 0) -> bytes:
        """The state of one sequence. With `PARTIAL` only what a rewind can't bring back: the streaming part."""
        size = C.llama_state_seq_get_size_ext(self.handle, seq, flags)
        buffer = (ctypes.c_uint8 * max(1, size))()
        n = C.llama_state_seq_get_data_ext(self.handle, buffer, size, seq, flags)
        return bytes(buffer[:n])

    def restore_seq(self, state: bytes, seq: int = 0, flags: int = 0) -> bool:
        buffer = (ctypes.c_uint8 * max(1, len(state))).from_buffer_copy(state or b"\0")
        return C.llama_state_seq_set_data_ext(self.handle, buffer, len(state), seq, flags) == len(state) > 0

    def close(self) -> None:
        if self.handle:
            C.llama_batch_free(self._batch)
            C.llama_free(self.handle)
            self.handle = None

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_) -> None:
        self.close()
