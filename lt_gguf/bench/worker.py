"""The process that is timed: `main` takes a `Job` on stdin and prints what it measures, a line of JSON for each depth.

A process for each, so that none finds the memory that another has touched, and the peak is its own. A cache is filled to a depth
without computing (`api.fill`): what its cells hold makes no difference to the time that reading them takes. A prompt is read.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from lt_gguf.bench.contender import DECODE, DEFAULT_N_UBATCH, PROMPT, THROUGHPUT, Job
from lt_gguf.runtime import api
from lt_gguf.runtime.batch import Batch, batch_part
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.log import captured_errors
from lt_gguf.runtime.supervised import end_with_parent
from lt_gguf.runtime.text_model import TextModel
from lt_gguf.spec.cache_types import cache_type

_llama_cpp = load_llama_cpp().llama_cpp

_TOKEN = 1  # that is decoded again and again


def main() -> None:
    job = Job.from_json(sys.stdin.readline())
    threading.Thread(target=end_with_parent, args=(sys.stdin, threading.Event()), daemon=True).start()
    try:
        for measured in run(job):
            print(json.dumps(measured), flush=True)
    except (ValueError, RuntimeError, MemoryError) as error:
        print(json.dumps({"error": " ".join(str(error).split()) or type(error).__name__}), flush=True)


def run(job: Job) -> Iterator[dict[str, Any]]:
    """What the job measures, depth by depth.

    Raises:
        ValueError: the model or its context can't be made so.
        RuntimeError: it can't be computed.
    """
    model = TextModel(job.model, job.n_gpu_layers)
    api.set_model_spec(model.handle, job.contender.streaming)
    tasks = {DECODE: _decode, PROMPT: _prompts, THROUGHPUT: _throughput}
    for depth, measured in tasks[job.task](model, job):
        yield {"depth": depth, **measured, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """The most memory that this process has had, what it has read of the model's file included; 0 where nobody says."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class TimedContext:
    """A context of `n_seq` sequences of `n_ctx` tokens each. Raises ValueError: it can't be made so."""

    def __init__(self, model: TextModel, job: Job, n_ctx: int, n_seq: int = 1, n_batch: int = DEFAULT_N_UBATCH) -> None:
        contender = job.contender
        parameters = _llama_cpp.llama_context_default_params()
        parameters.n_ctx = n_ctx * n_seq
        parameters.n_seq_max = n_seq
        parameters.n_batch = max(n_batch, DEFAULT_N_UBATCH)
        parameters.n_ubatch = DEFAULT_N_UBATCH
        parameters.n_threads = parameters.n_threads_batch = job.n_threads
        parameters.type_k = cache_type(contender.type_k).ggml_type
        parameters.type_v = cache_type(contender.type_v).ggml_type
        parameters.flash_attn_type = int(contender.flash_attn)
        parameters.kv_unified = False
        with captured_errors(forward=False) as log:
            self.handle: int | None = _llama_cpp.llama_init_from_model(model.handle, parameters)
        if not self.handle:
            raise ValueError(log.reason or "no context can be made")
        self._memory = _llama_cpp.llama_get_memory(self.handle)
        self._batch = Batch(parameters.n_batch)
        self._n_vocab = model.n_vocab

    def close(self) -> None:
        with captured_errors(forward=False):
            _llama_cpp.llama_free(self.handle)
        self.handle = None

    @property
    def kv_bytes(self) -> int:
        assert self.handle is not None
        return sum(api.kv_bytes(self.handle, part) for part in api.KVPart)

    def fill(self, seq: int, n: int) -> None:
        """Grows a sequence to `n` tokens."""
        assert self.handle is not None
        api.fill(self.handle, seq, n - self.length(seq))

    def length(self, seq: int) -> int:
        return _llama_cpp.llama_memory_seq_pos_max(self._memory, seq) + 1

    def read(self, n: int) -> None:
        """Reads a prompt of `n` tokens, as a whole, into the empty sequence 0."""
        assert self.handle is not None
        api.prompt_begin(self.handle, 0, n)
        tokens = np.random.default_rng(0).integers(0, self._n_vocab, n)
        self._compute(batch_part(tokens.tolist(), 0, 0, np.arange(n) == n - 1))

    def decode(self, n_seq: int, n: int) -> float:
        """Decodes `n` tokens of each of the first sequences, all at once. Returns the seconds that it took."""
        lengths = np.array([self.length(seq) for seq in range(n_seq)], np.int32)
        batch = np.stack([np.full(n_seq, _TOKEN, np.int32), lengths, np.arange(n_seq, dtype=np.int32), np.ones(n_seq, np.int32)])
        start = time.perf_counter()
        for _ in range(n):
            self._compute(batch)
            batch[1] += 1
        return time.perf_counter() - start

    def shift(self, n_keep: int) -> None:
        """Forgets the older half of sequence 0, as llama.cpp's server does in a full context."""
        n = self.length(0)
        n_discard = (n - n_keep) // 2
        _llama_cpp.llama_memory_seq_rm(self._memory, 0, n_keep, n_keep + n_discard)
        _llama_cpp.llama_memory_seq_add(self._memory, 0, n_keep + n_discard, n, -n_discard)

    def _compute(self, tokens: np.ndarray) -> None:
        self._batch.fill(tokens)
        with captured_errors(forward=False) as log:
            status = _llama_cpp.llama_decode(self.handle, self._batch.native)
            _llama_cpp.llama_synchronize(self.handle)
        if status:
            raise RuntimeError(log.reason or f"llama_decode failed with {status}")


def _decode(model: TextModel, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
    if job.contender.shift_at:
        yield from _decode_shifted(model, job)
        return
    context = TimedContext(model, job, max(job.depths) + job.n_tokens + 1)
    for depth in job.depths:
        context.fill(0, depth)
        context.decode(1, 1)  # builds the graph
        seconds = context.decode(1, job.n_tokens)
        yield depth, {"tokens_per_second": job.n_tokens / seconds, "kv_bytes": context.kv_bytes}
    context.close()


def _decode_shifted(model: TextModel, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
    """At any depth beyond its context: at three quarters of it, the mean, and a shift's time spread over the tokens between two."""
    size, n_keep = job.contender.shift_at, 4
    context = TimedContext(model, job, size)
    context.fill(0, size * 3 // 4)
    context.decode(1, 1)
    each = context.decode(1, job.n_tokens) / job.n_tokens
    context.fill(0, size)
    start = time.perf_counter()
    context.shift(n_keep)
    context.decode(1, 1)
    shift = max(0.0, time.perf_counter() - start - each)
    n_between = (size - n_keep) // 2
    for depth in job.depths:
        yield depth, {"tokens_per_second": 1 / (each + shift / n_between), "kv_bytes": context.kv_bytes}
    context.close()


def _prompts(model: TextModel, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
    for depth in job.depths:
        context = TimedContext(model, job, depth + 2, n_batch=depth)
        start = time.perf_counter()
        context.read(depth)
        seconds = time.perf_counter() - start
        yield depth, {"first_token_seconds": seconds, "tokens_per_second": depth / seconds, "kv_bytes": context.kv_bytes}
        context.close()


def _throughput(model: TextModel, job: Job) -> Iterator[tuple[int, dict[str, Any]]]:
    for depth, n_seq in zip(job.depths, job.n_seq, strict=True):
        context = TimedContext(model, job, depth + job.n_tokens + 1, n_seq)
        for seq in range(n_seq):
            context.fill(seq, depth)
        context.decode(n_seq, 1)
        seconds = context.decode(n_seq, job.n_tokens)
        measured = {"tokens_per_second": n_seq * job.n_tokens / seconds, "n_seq": n_seq, "kv_bytes": context.kv_bytes}
        yield depth, measured
        context.close()
