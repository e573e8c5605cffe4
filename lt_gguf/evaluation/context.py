"""`ScoringContext`: a context of a loaded model, and what its logits say of the tokens that are computed in it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from lt_gguf.runtime import api, crash
from lt_gguf.runtime.batch import WANTED, Batch
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.log import captured_errors
from lt_gguf.runtime.text_model import TextModel
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE, cache_type
from lt_gguf.spec.fields import check_integer

_llama_cpp = load_llama_cpp().llama_cpp

_BYTES = ctypes.POINTER(ctypes.c_uint8)

_LOGITS_BYTES = 2**26  # most that are taken at a time: with a large vocabulary, batches of answers are smaller


@dataclass(frozen=True)
class ScorerOptions:
    """How a model is loaded and run.

    Args:
        n_ctx: most tokens of one request, prompt and answer together; 0: as many as there are, the context grows. (Give
            it for models whose RoPE depends on the size of the context.)
        n_parallel: requests that are worked on at a time.
        n_batch: tokens that are computed at once.
        n_threads: CPU threads; `None`: the physical cores that the process may use.
        n_gpu_layers: layers that run on the GPU, if there is one; -1: all.
        cache_type_k: type of K in the KV cache, a key of `lt_gguf.memory.kv.CACHE_TYPES`.
        cache_type_v: the same of V.
        cache_keep: layers whose cache isn't quantized, as in `0,2-3`, in place of what a spec says; `None`: what it says.
        flash_attn: use flash attention.

    Raises:
        ValueError: a value is out of range; the message names it and says what is allowed.
    """

    n_ctx: int = 0
    n_parallel: int = 4
    n_batch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = 0
    cache_type_k: str = DEFAULT_CACHE_TYPE
    cache_type_v: str = DEFAULT_CACHE_TYPE
    cache_keep: str | None = None
    flash_attn: bool = True

    def __post_init__(self) -> None:
        check_integer("n_ctx", self.n_ctx, 0)
        check_integer("n_parallel", self.n_parallel, 1, _llama_cpp.llama_max_parallel_sequences())
        check_integer("n_batch", self.n_batch, 1)
        check_integer("n_threads", 1 if self.n_threads is None else self.n_threads, 1)
        check_integer("n_gpu_layers", self.n_gpu_layers, -1)
        cache_type(self.cache_type_k)
        cache_type(self.cache_type_v)


DEFAULT_OPTIONS = ScorerOptions()


class ScoringContext:
    """A context, in which by default several sequences have a cache of their own.

    Args:
        model: what is computed; its spec is that of this thread at the time (`api.set_model_spec`).
        options: how; `n_ctx` and `n_parallel` don't count.
        n_ctx: tokens of one sequence.
        n_seq: number of sequences.
        unified: they share a cache of `n_ctx` tokens.

    Attributes:
        handle: the llama_context.
        n_at_once: tokens that one `compute` takes.
        n_wanted_at_once: the same where each is wanted.

    Raises:
        ValueError: it can't be made; one line.
    """

    def __init__(self, model: TextModel, options: ScorerOptions, n_ctx: int, n_seq: int, unified: bool = False) -> None:
        self._file, self._n_vocab = model.file, model.n_vocab
        parameters = _llama_cpp.llama_context_default_params()
        parameters.n_ctx = n_ctx if unified else n_ctx * n_seq
        parameters.n_seq_max = n_seq
        parameters.n_batch = options.n_batch
        parameters.n_threads = parameters.n_threads_batch = options.n_threads or usable_cores()
        parameters.type_k = cache_type(options.cache_type_k).ggml_type
        parameters.type_v = cache_type(options.cache_type_v).ggml_type
        parameters.flash_attn_type = int(options.flash_attn)
        # in a common cache the attention of each sequence goes over the tokens of all
        parameters.kv_unified = unified
        with captured_errors(forward=False) as log, crash.step(f"making a context of {parameters.n_ctx} tokens, {self._file}"):
            self.handle: int | None = _llama_cpp.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise ValueError(f"{self._file}: {log.reason or 'no context can be made'}")
        self._batch = Batch(_llama_cpp.llama_n_batch(self.handle))
        self.n_at_once = self._batch.size
        self.n_wanted_at_once = min(self._batch.size, max(1, _LOGITS_BYTES // (4 * self._n_vocab)))

    def close(self) -> None:
        """Frees the context. Nothing else can be done afterwards."""
        if self.handle:
            with captured_errors(forward=False):  # it says how much memory it gives back
                _llama_cpp.llama_free(self.handle)
        self.handle = None

    def clear(self) -> None:
        """Removes all tokens."""
        with captured_errors(forward=False):  # a context that chooses its layers makes its caches anew, and says so
            _llama_cpp.llama_memory_clear(_llama_cpp.llama_get_memory(self.handle), False)

    def cut(self, seq: int, n: int) -> None:
        """Removes the tokens of a sequence from position `n` on. Raises RuntimeError: they can't be."""
        if not _llama_cpp.llama_memory_seq_rm(_llama_cpp.llama_get_memory(self.handle), seq, n, -1):
            raise RuntimeError(f"{self._file}: tokens from position {n} on can't be removed")

    def copy(self, seq: int, to: int) -> None:
        """Lets another sequence, which is empty, share the tokens of one; in a unified cache they take no more memory."""
        _llama_cpp.llama_memory_seq_cp(_llama_cpp.llama_get_memory(self.handle), seq, to, -1, -1)

    def save(self, seq: int) -> np.ndarray:
        """The state of a sequence, uint8."""
        size = _llama_cpp.llama_state_seq_get_size(self.handle, seq)
        state = np.empty(size, np.uint8)
        written = _llama_cpp.llama_state_seq_get_data(self.handle, state.ctypes.data_as(_BYTES), size, seq)
        if written != size:
            raise RuntimeError(f"{self._file}: the state of a sequence can't be saved")
        return state

    def restore(self, seq: int, state: np.ndarray) -> None:
        """Gives a sequence what `save` has returned. Raises RuntimeError: there is no room for it."""
        with captured_errors(forward=False) as log:
            read = _llama_cpp.llama_state_seq_set_data(self.handle, state.ctypes.data_as(_BYTES), state.size, seq)
        if read != state.size:
            raise RuntimeError(f"{self._file}: the state of a sequence can't be restored: {log.reason or 'no reason is given'}")

    def begin_prompt(self, seq: int, n: int) -> None:
        """Announces that the next `n` tokens of a sequence are a prompt. Raises ValueError: they don't fit."""
        assert self.handle is not None
        api.prompt_begin(self.handle, seq, n)

    def compute(self, tokens: np.ndarray) -> np.ndarray:
        """One llama_decode of tokens in an array for batches (4, at most `n_at_once`).

        Returns:
            float32 (those that are wanted, n_vocab): log-probabilities of what comes after them.

        Raises:
            RuntimeError: llama_decode failed.
        """
        self._batch.fill(tokens)
        n, n_wanted = tokens.shape[1], int(tokens[WANTED].sum())
        doing = "decoding" if n == n_wanted else f"reading a prompt, {n} tokens"
        with captured_errors(forward=False) as log, crash.step(f"{doing}, {self._file}"):
            code = _llama_cpp.llama_decode(self.handle, self._batch.native)
        if code:
            raise RuntimeError(f"llama_decode returned {code}: {log.reason or 'it gives no reason'}")
        if not n_wanted:
            return np.empty((0, self._n_vocab), np.float32)
        return _log_softmax(np.ctypeslib.as_array(_llama_cpp.llama_get_logits(self.handle), (n_wanted, self._n_vocab)))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """The same shape and type; sums are in float64."""
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True, dtype=np.float64)).astype(np.float32)
