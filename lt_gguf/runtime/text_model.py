"""`TextModel`: the weights and the vocabulary of a GGUF file, on which contexts can be made."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from lt_gguf.runtime import crash
from lt_gguf.runtime.library import load_llama_cpp
from lt_gguf.runtime.log import captured_errors

_binding = load_llama_cpp()
_llama_cpp = _binding.llama_cpp


class TextModel:
    """A loaded file.

    Args:
        file: GGUF file, the first one of a split model.
        n_gpu_layers: layers that run on the GPU, if there is one; -1: all.

    Attributes:
        file: its path.
        n_vocab: number of tokens that the model knows.
        n_layer: number of layers, as in a `StreamingSpec`.
        n_ctx_train: context size that the model was trained for, in tokens.

    Raises:
        ValueError: the file can't be loaded; one line.
    """

    def __init__(self, file: str | os.PathLike[str], n_gpu_layers: int = 0) -> None:
        self.file = Path(file)
        self._model: Any = None
        _llama_cpp.llama_backend_init()
        parameters = _llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = n_gpu_layers
        with captured_errors(forward=False) as log, crash.loading(file):
            try:
                self._model = _binding._internals.LlamaModel(path_model=str(file), params=parameters)
            except ValueError as error:
                raise ValueError(f"{file}: {log.reason}" if log.reason else str(error)) from error
        handle = self.handle
        self.n_vocab: int = self._model.n_vocab()
        self.n_layer: int = _llama_cpp.llama_model_n_layer(handle) + _llama_cpp.llama_model_n_layer_nextn(handle)
        self.n_ctx_train: int = self._model.n_ctx_train()

    @property
    def handle(self) -> Any:
        """The llama_model."""
        return self._model.model

    def close(self) -> None:
        """Frees the model. Nothing else can be done afterwards."""
        model, self._model = self._model, None
        if model is not None:
            model.close()

    @cached_property
    def bos(self) -> list[int]:
        """The tokens that begin a text: one or none."""
        return self._model.tokenize(b"", add_bos=True, special=False)

    @cached_property
    def eos(self) -> set[int]:
        """The tokens that end an answer."""
        return {token for token in range(self.n_vocab) if _llama_cpp.llama_vocab_is_eog(self._model.vocab, token)}

    @cached_property
    def end_token(self) -> int | None:
        """The one of them that ends a text, `None` if there is none."""
        token = self._model.token_eos()
        return None if token < 0 else token

    @cached_property
    def eos_text(self) -> str:
        """The text of that token, as chat templates write it; empty if there is none."""
        return "" if self.end_token is None else self.detokenize([self.end_token], special=True)

    @cached_property
    def chat_template(self) -> str | None:
        """The file's, in Jinja."""
        template = _llama_cpp.llama_model_chat_template(self.handle, None)
        return None if template is None else template.decode()

    def tokenize(self, text: str, special: bool = False) -> list[int]:
        """The tokens of a text, none added. `special`: the names of special tokens in it are these tokens."""
        return self._model.tokenize(text.encode(), add_bos=False, special=special)

    def detokenize(self, tokens: Sequence[int], special: bool = False) -> str:
        """The text of tokens, of special ones only if asked for. What `tokenize` puts before a text (SentencePiece: a space)
        is gone."""
        array = (ctypes.c_int32 * len(tokens))(*tokens)
        size = 16 * len(tokens)
        while True:
            buffer = ctypes.create_string_buffer(max(1, size))
            n = _llama_cpp.llama_detokenize(self._model.vocab, array, len(tokens), buffer, size, False, special)
            if n >= 0:
                return buffer.raw[:n].decode(errors="replace")
            size = -n
