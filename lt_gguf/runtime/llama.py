"""`Llama`: llama-cpp-python's class for hybrid models."""

from __future__ import annotations

import operator
import os
import threading
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import numpy as np

from lt_gguf.models import local_path, resolve, resolve_on_hub
from lt_gguf.models.remembered import chosen_for
from lt_gguf.runtime import api, context_size, crash, disk_cache, lazy_ratios
from lt_gguf.runtime.cache_choice import CacheTypeWarning, choose_cache, recommending, types_of
from lt_gguf.runtime.context_size import ContextSize
from lt_gguf.runtime.cpu import usable_cores
from lt_gguf.runtime.log import captured_errors
from lt_gguf.runtime.reading_ahead import ReadingLlama
from lt_gguf.runtime.snapshots import DEFAULT_LIMIT
from lt_gguf.runtime.turns import Turns, streams, takes_moment, takes_turn
from lt_gguf.spec import (
    DEFAULT_SINK,
    DEFAULT_W_LAST,
    DEFAULT_WINDOW,
    AutoSpec,
    CacheTypes,
    Lazy,
    StreamingSpec,
    runtime_text,
)
from lt_gguf.spec.cache_keep import Layers
from lt_gguf.spec.cache_types import cache_type
from lt_gguf.spec.fields import INT32_MAX, check_size

# note: llama_cpp.Llama.__init__ turns the process's stdout away for a moment; two that do so at once wouldn't bring it back
_loading = threading.RLock()


class Llama(ReadingLlama):
    """A `llama_cpp.Llama` whose flagged layers keep only sinks and a window in their KV cache.

    Threads may share it: one call at a time has the model, a stream from its first item until it has ended or is closed, and
    the others wait in the order in which they came. `save_state`, `lazy_ratios`, `kv_bytes` and `streaming` don't change the
    context and only wait until no token is being computed. A call that would wait for a stream that only its own thread can
    end raises RuntimeError. So does whatever is called or goes on after `close()`, which waits for calls, but not for streams.

    Args:
        model_path: path of the GGUF file, or the name of one of `lt_gguf.models.MODELS`.
        streaming: which layers stream. `None`: what the file and the environment variable LT_STREAMING say; `"off"`:
            none; a `StreamingSpec`, or its text, in which keys that are left out come from the file; an `AutoSpec` or
            its text, `"auto:0.5"`: that share of the layers, chosen for the first prompt of each conversation; `"auto"`: what the
            file says, else what was chosen for it by measuring it once (`lt_gguf.choose_streaming`, or `lt-gguf analyze`); where
            nothing is known, a warning says so, and all layers have full attention.
        cache_keep: layers whose KV cache stays in 16 bits where `type_k` and `type_v` quantize it: their numbers, or a text as in
            `"0,2-3"`, in place of what a spec says. `None`: what the spec says, else what the file recommends, else none.
        prompt_limit: most bytes that streaming layers may take besides their cache while a long prompt is read with
            full attention (`prefill = full`); 0: no limit; `None`: what the environment variable LT_PROMPT_LIMIT says.
        snapshot_limit: most bytes of snapshots, with which a conversation goes back to an earlier prompt without
            reading it again; the oldest go first. 0: none is kept.
        timeout: seconds for which a call waits while other threads' calls have the model, then it raises TimeoutError; 0:
            not at all; `None`: without limit. Each method that uses the model takes it, too, for one call.
        kwargs: as for `llama_cpp.Llama`. `type_k` and `type_v`, both left out: what the file recommends, as long as the layers stream
            that it lets stream, else f16; a V that needs flash attention switches it on, or is f16 where `flash_attn=False` says
            that it stays off, and a CacheTypeWarning says so. Another one says that the file calls a type one that breaks the
            model. `n_ctx="auto"`: as large as the model was trained for and memory allows, the weights, the
            cache and a prompt that fills it counted; `prompt_limit` is then what that leaves for prompts, unless it is given.
            `swa_full` has no effect on streaming layers. `n_threads` and `n_threads_batch`: `None` is the number of physical cores
            that the process may use (`lt_gguf.runtime.cpu.usable_cores`).

    Raises:
        ValueError: an argument is out of range, or the file can't be loaded or its model can't stream as asked; the message
            has llama.cpp's own reason.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        streaming: StreamingSpec | AutoSpec | str | None = None,
        cache_keep: Layers | None = None,
        prompt_limit: int | None = None,
        snapshot_limit: int = DEFAULT_LIMIT,
        timeout: float | None = None,
        verbose: bool = True,
        **kwargs: Any,
    ) -> None:
        if streaming is not None and not isinstance(streaming, (str, StreamingSpec, AutoSpec)):
            raise ValueError(f'streaming = {streaming!r}: must be a StreamingSpec, an AutoSpec, a string, "off" or None')
        model_path = local_path(model_path)
        chosen, unknown = chosen_for(model_path, streaming)
        if unknown:
            warnings.warn(unknown, RuntimeWarning, stacklevel=2)
        asked = types_of(kwargs.get("type_k"), kwargs.get("type_v"))
        cache = choose_cache(recommending(model_path), chosen, asked, cache_keep, kwargs.get("flash_attn"))
        for note in cache.notes:
            warnings.warn(note, CacheTypeWarning, stacklevel=2)
        self._streaming_argument = cache.streaming
        if asked is None:
            kwargs |= {"type_k": cache_type(cache.types.k).ggml_type, "type_v": cache_type(cache.types.v).ggml_type}
        if cache.flash_attn is not None:
            kwargs["flash_attn"] = cache.flash_attn
        self._prompt_limit = None if prompt_limit is None else check_size("prompt_limit", prompt_limit)
        check_size("snapshot_limit", snapshot_limit)
        is_largest = isinstance(kwargs.get("n_ctx"), str) and kwargs["n_ctx"] == context_size.AUTO
        if "n_ctx" in kwargs and not is_largest:
            kwargs["n_ctx"] = _check_n_ctx(kwargs["n_ctx"])
        for name in ("n_threads", "n_threads_batch"):  # llama_cpp's own default is half of the machine's
            kwargs[name] = kwargs.get(name) or usable_cores()
        self._turns = Turns(timeout)
        load = self._load_largest if is_largest else self._load
        load(model_path, snapshot_limit=snapshot_limit, verbose=verbose, **kwargs)
        if self._prompt_limit is not None:
            api.set_prompt_limit(self.ctx, self._prompt_limit)

    def _load(self, model_path: str, *, verbose: bool, **kwargs: Any) -> None:
        with _loading, captured_errors(forward=verbose) as log, crash.loading(model_path):
            try:
                super().__init__(model_path, verbose=verbose, **kwargs)
            except ValueError as error:
                super().close()
                if not log.reason:
                    raise
                raise ValueError(f"{model_path}: {log.reason}") from error

    def _load_largest(self, model_path: str, **kwargs: Any) -> None:
        """As `_load`, with the largest context that fits, and the prompt limit that goes with it."""
        names = ("type_k", "type_v", "flash_attn", "n_ubatch")
        settings = {name: kwargs[name] for name in names if name in kwargs}
        size = self._load_some(context_size.largest_size(model_path, self._streaming_argument, **settings), model_path, **kwargs)
        if size.prompt_limit and not self.reads_by_layer(self._n_ctx - 1):
            # note: whether a model can be read layer by layer nobody knows before its graph is there
            in_batches = context_size.largest_size(model_path, self._streaming_argument, **settings, whole=False)
            if in_batches.n_ctx < size.n_ctx:
                super().close()
                size = self._load_some(in_batches, model_path, **kwargs)
        if size.prompt_limit and self._prompt_limit is None and "LT_PROMPT_LIMIT" not in os.environ:
            self._prompt_limit = size.prompt_limit

    def _load_some(self, size: ContextSize, model_path: str, **kwargs: Any) -> ContextSize:
        """Loads with a context of that size or, where there is less memory than was thought, a smaller one; returns its size."""
        while True:
            try:
                self._load(model_path, **kwargs | {"n_ctx": size.n_ctx})
                return size
            except ValueError:
                if not size.can_be_less:
                    raise
                size = size.halved()

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str | os.PathLike[str],
        filename: str | None = None,
        additional_files: Sequence[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Self:
        """The model that a name stands for; what isn't on this machine is downloaded. As `llama_cpp.Llama.from_pretrained`,
        and whatever the commands take is taken here, too.

        Args:
            repo_id: a path, a name of `lt_gguf.models.MODELS`, or ORG/NAME on the hub, as for `lt_gguf.models.resolve`.
            filename: of a model on the hub, a pattern of file names, or a quantization's name such as Q4_K_M. `None`: the
                only file, or Q4_K_M.
            additional_files: names or patterns of other files of that repository to download with it.
            local_dir: folder to download them to, instead of huggingface_hub's cache.
            local_dir_use_symlinks: has no effect, as in huggingface_hub itself.
            cache_dir: another cache than huggingface_hub's own.
            kwargs: as for `Llama`.

        Raises:
            ValueError, OSError, ImportError: as `lt_gguf.models.resolve` and `Llama` do.
        """
        if filename is None and not additional_files and local_dir is None and cache_dir is None:
            return cls(resolve(repo_id), **kwargs)
        files = {"additional_files": additional_files or (), "local_dir": local_dir, "cache_dir": cache_dir}
        return cls(resolve_on_hub(repo_id, filename, **files), **kwargs)

    # note: llama_cpp.Llama.__init__ sets this attribute when the model is loaded and makes the context afterwards: the
    # only moment at which the spec can be overridden
    @property
    def _model(self) -> Any:
        return self.__dict__["_model"]

    @_model.setter
    def _model(self, model: Any) -> None:
        self.__dict__["_model"] = model
        spec = self._streaming_argument
        if spec is None:
            return
        if isinstance(spec, StreamingSpec) and spec.n_layer != self._n_layer():
            raise ValueError(f"streaming: is for a model of {spec.n_layer} layers, must be for {self._n_layer()}")
        self._set_model_spec(spec)

    # what uses the context, except for what follows; they call each other
    __call__ = streams(ReadingLlama.__call__)
    create_completion = streams(ReadingLlama.create_completion)
    create_chat_completion = streams(ReadingLlama.create_chat_completion)
    generate = streams(ReadingLlama.generate, always=True)
    eval = takes_turn(ReadingLlama.eval)
    read = takes_turn(ReadingLlama.read)
    read_ahead = takes_turn(ReadingLlama.read_ahead)
    sample = takes_turn(ReadingLlama.sample)
    embed = takes_turn(ReadingLlama.embed)
    create_embedding = takes_turn(ReadingLlama.create_embedding)
    reset = takes_turn(ReadingLlama.reset)
    save_state = takes_moment(ReadingLlama.save_state)
    n_reusable = takes_moment(ReadingLlama.n_reusable)
    set_seed = takes_moment(ReadingLlama.set_seed)

    @property
    def streaming(self) -> StreamingSpec | None:
        """Which layers stream in this context now, `None` if none does."""
        read = partial(ReadingLlama.streaming.__get__, self)
        is_fixed = self.auto is None or self._turns.is_closed
        return read() if is_fixed else self._turns.moment("Llama.streaming", read)

    @property
    def cache_keep(self) -> tuple[int, ...]:
        """The layers of this context whose KV cache stays in 16 bits where that of the others is quantized."""
        return self._spec.cache_keep

    @property
    def cache_types(self) -> CacheTypes:
        """The types of K and V in the layers of this context that have full attention and aren't among `cache_keep`."""
        found = types_of(self.context_params.type_k, self.context_params.type_v)
        assert found is not None
        return found

    @takes_moment
    def kv_bytes(self) -> dict[str, int]:
        """Bytes allocated for K and V: in the `full` layers, in the `streaming` ones, what these take besides while a long
        `prompt` is read with full attention, beside streaming layers in those with a sliding window of their own (`swa`), in `total`."""
        parts = {part.name.lower(): api.kv_bytes(self.ctx, part) for part in api.KVPart}
        return parts | {"total": sum(parts.values())}

    @takes_moment
    def lazy_ratios(
        self,
        tokens: Sequence[int],
        sink: int = DEFAULT_SINK,
        window: int = DEFAULT_WINDOW,
        w_last: int = DEFAULT_W_LAST,
        lazy: Lazy = "mean",
    ) -> np.ndarray:
        """The lazy ratio of each layer for a prompt: of the attention of its last `w_last` tokens, the share that goes to
        the first `sink` and the last `window` of its tokens (arXiv 2410.13846, section 3), the mean over these tokens and all
        heads, or with `lazy="min"` the smallest: what `auto:0.5` chooses by.

        The prompt is read with full attention in a second context on the same model, which is freed afterwards; this
        one isn't touched.

        Returns:
            float32 (n_layer,), from 0 to 1, NaN where a layer has no KV cache of its own; the layers with the highest
            ratios are the lazy ones.

        Raises:
            ValueError: the prompt is longer than the model's context, or too short to tell layers apart.
        """
        spec = AutoSpec(0.0, sink, window, w_last, lazy, self.cache_keep)
        n_max = max(self._model.n_ctx_train(), self._n_ctx)
        if len(tokens) > n_max:
            raise ValueError(f"the prompt has {len(tokens)} tokens, must have at most the model's context of {n_max}")
        if len(tokens) <= sink + window:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, all of them within sink + window = {sink + window}, so that every "
                "lazy ratio is 1: must have more, or give a smaller window"
            )
        self._set_model_spec(spec)
        try:
            return lazy_ratios.measure(
                self._model.model, self.context_params, tokens, spec, self._lora_adapter, self.lora_scale, self.verbose
            )
        finally:
            self._set_model_spec(self._streaming_argument)

    @takes_moment
    def set_cache(self, cache: Any) -> None:
        """As `llama_cpp.Llama.set_cache`. A `LlamaDiskCache`, llama_cpp's own too, keeps its states as `lt_gguf.LlamaDiskCache` does."""
        super().set_cache(disk_cache.of(self, cache))

    @takes_turn
    def load_state(self, state: Any) -> None:
        """Restores what `save_state` returned.

        Raises:
            RuntimeError: the state is of another model, or of a context with another size or spec; the context is empty.
        """
        with captured_errors(forward=self.verbose) as log:
            try:
                super().load_state(state)
            except (RuntimeError, ValueError) as error:
                self._forget()
                reason = log.reason or str(error)
                raise RuntimeError(f"the state doesn't fit this context: {reason}") from error

    def close(self) -> None:
        """Frees the model once no token is being computed. Nothing else can be done afterwards."""
        turns: Turns | None = self.__dict__.get("_turns")
        if turns is not None:  # else __init__ has refused an argument
            turns.close("Llama.close", super().close)

    def __del__(self) -> None:
        super().close()  # note: without waiting, as a finalizer must: nobody has this object any more

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {
            "streaming": self._streaming_argument,
            "prompt_limit": self._prompt_limit,
            "snapshot_limit": self._snapshots.limit,
            "timeout": self._turns.timeout,
        }

    def _set_model_spec(self, spec: StreamingSpec | AutoSpec | str | None) -> None:
        try:
            api.set_model_spec(self._model.model, None if spec is None else runtime_text(spec))
        except ValueError as error:
            raise ValueError(f"streaming: {error}") from None


def _check_n_ctx(value: Any) -> int:
    """A context's size. Raises ValueError if it isn't one."""
    allowed = f'a number of tokens up to {INT32_MAX}, 0: as many as the model was trained for, "auto": and as memory allows'
    try:
        n_ctx = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        n_ctx = -1
    if not 0 <= n_ctx <= INT32_MAX:
        raise ValueError(f"n_ctx = {value!r}: must be {allowed}")
    return n_ctx
