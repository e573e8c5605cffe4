"""`Llama`: llama-cpp-python's class for hybrid models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lt_gguf.runtime import api
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.log import captured_errors
from lt_gguf.spec import StreamingSpec

_binding = load_llama_cpp()


class Llama(_binding.Llama):
    """A `llama_cpp.Llama` whose flagged layers keep only sinks and a window in their KV cache.

    Args:
        model_path: path of the GGUF file.
        streaming: which layers stream. `None`: what the file and the environment variable LT_STREAMING say; `"off"`:
            none; a `StreamingSpec`, or its text, in which keys that are left out come from the file.
        kwargs: as for `llama_cpp.Llama`. `swa_full` has no effect on streaming layers.

    Raises:
        ValueError: the file can't be loaded or its model can't stream as asked; the message has llama.cpp's own reason.
    """

    def __init__(
        self, model_path: str, *, streaming: StreamingSpec | str | None = None, verbose: bool = True, **kwargs: Any
    ) -> None:
        self._streaming_argument = streaming
        self._streaming: StreamingSpec | None = None
        with captured_errors(forward=verbose) as log:
            try:
                super().__init__(model_path, verbose=verbose, **kwargs)
            except ValueError as error:
                self.close()
                if not log.reason:
                    raise
                raise ValueError(f"{model_path}: {log.reason}") from error
        text = api.context_spec(self.ctx)
        self._streaming = None if text == "off" else StreamingSpec.parse(text, self._n_layer())

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
        if not isinstance(spec, (str, StreamingSpec)):
            raise ValueError(f'streaming = {spec!r}: must be a StreamingSpec, a string, "off" or None')
        if isinstance(spec, StreamingSpec) and spec.n_layer != self._n_layer():
            raise ValueError(f"streaming: is for a model of {spec.n_layer} layers, must be for {self._n_layer()}")
        try:
            api.set_model_spec(model.model, str(spec))
        except ValueError as error:
            raise ValueError(f"streaming: {error}") from None

    @property
    def streaming(self) -> StreamingSpec | None:
        """Which layers stream in this context, `None` if none does."""
        return self._streaming

    def kv_bytes(self) -> dict[str, int]:
        """Bytes allocated for K and V: in the `full` layers, in the `streaming` ones, in `total`."""
        full = api.kv_bytes(self.ctx, api.KVPart.FULL)
        streaming = api.kv_bytes(self.ctx, api.KVPart.STREAMING)
        return {"full": full, "streaming": streaming, "total": full + streaming}

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluates tokens that follow the first `n_tokens` of the context.

        If the context holds others after those, they are removed. Where a streaming layer has dropped keys that what
        remains needs, all of it is processed again: upstream would go on with the wrong ones.
        """
        if not self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1):
            kept = self.input_ids[: self.n_tokens].tolist()
            if self.verbose:
                print(f"Llama.eval: can't go back to position {len(kept)}, processing it all again", file=sys.stderr)
            self._forget()
            super().eval(kept)
        super().eval(tokens)

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

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"streaming": self._streaming_argument}

    def _forget(self) -> None:
        self._ctx.kv_cache_clear()
        self.n_tokens = 0
        self._requires_eval = True

    def _n_layer(self) -> int:
        model = self._model.model
        native = _binding.llama_cpp
        return native.llama_model_n_layer(model) + native.llama_model_n_layer_nextn(model)
