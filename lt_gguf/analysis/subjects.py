"""What can be measured: a GGUF file, by the runtime, and a Hugging Face checkpoint, by transformers."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from lt_gguf import calibration
from lt_gguf.calibration import DEFAULT_LENGTH, Texts
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import KVShape
from lt_gguf.models import remembered
from lt_gguf.selection import Model
from lt_gguf.selection.evidence import Candidates
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import cache_type

if TYPE_CHECKING:
    from lt_gguf.evaluation.context import ScorerOptions


class Subject(Protocol):
    """A model that is measured: its name for the report, what a strategy knows of it, and the context that it was trained for."""

    name: str
    model: Model
    n_ctx: int

    def measure(self, texts: Texts, samples: int, length: int, **settings: Any) -> np.ndarray:
        """Lazy ratios (samples, layers) on prompts of `length` tokens that are cut out of the texts."""

    def candidates(self, texts: Texts, spec: StreamingSpec, **settings: Any) -> AbstractContextManager[Candidates]:
        """What measures sets of layers on the hybrid itself. Raises ValueError: this can't be run."""

    def kv_shape(self) -> KVShape:
        """What a token takes in its cache. Raises ValueError: that isn't known."""

    def remember(self, spec: StreamingSpec) -> None:
        """Is told what it can spare."""


class GGUFFile:
    """A GGUF file, which the runtime measures.

    Args:
        file: its path, the first one of a split model.
        options: how it is loaded.
        verbose: show llama.cpp's log.

    Raises:
        ValueError: it isn't a model, or none of its layers can stream.
        OSError: it can't be read.
    """

    def __init__(self, file: str, options: ScorerOptions, verbose: bool = False) -> None:
        described = read_model(file)
        described.check_can_stream()
        self._file, self._options, self._verbose = file, options, verbose
        self.name = Path(file).name
        self.model = Model(
            described.architecture, described.name, described.n_layer, described.n_layer_main, may_stream=described.may_stream
        )
        self.n_ctx = described.n_ctx_train

    def measure(self, texts: Texts, samples: int, length: int, **settings: Any) -> np.ndarray:
        from lt_gguf.runtime import analysis
        from lt_gguf.runtime.llama import Llama
        from lt_gguf.runtime.log import captured_errors

        options = self._options
        threads: dict[str, Any] = {"n_threads": options.n_threads, "n_threads_batch": options.n_threads}
        with captured_errors(forward=self._verbose):
            llm = Llama(
                self._file,
                streaming="off",
                cache_keep="none" if options.cache_keep is None else options.cache_keep,  # whatever the file recommends
                n_ctx=min(options.n_batch, self.n_ctx or options.n_batch),
                n_batch=options.n_batch,
                n_gpu_layers=options.n_gpu_layers,
                flash_attn=options.flash_attn,
                type_k=cache_type(options.cache_type_k).ggml_type,
                type_v=cache_type(options.cache_type_v).ggml_type,
                seed=0,
                verbose=self._verbose,
                **threads,
            )
            prompts = calibration.cut_samples(texts, *analysis.tokenizer(llm), samples, length)
            return analysis.measure(llm, prompts, **settings)

    def candidates(self, texts: Texts, spec: StreamingSpec, **settings: Any) -> AbstractContextManager[Candidates]:
        from lt_gguf.evaluation.candidates import open_candidates

        return open_candidates(Path(self._file), spec, texts, options=self._options, **settings)

    def kv_shape(self) -> KVShape:
        return read_model(self._file).kv_shape

    def remember(self, spec: StreamingSpec) -> None:
        with suppress(OSError):  # it saves time, and isn't worth an error
            remembered.remember(self._file, spec)


class Checkpoint:
    """A Hugging Face checkpoint, which transformers measures layer by layer.

    Args:
        name: its folder, or its id on the hub.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`, ...
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        threads: CPU threads; 0: torch's own number.

    Raises:
        ValueError: there is none, or it can't be analysed.
        OSError: it can't be read or downloaded.
        ImportError: torch or transformers is missing.
    """

    def __init__(self, name: str, device: str, dtype: str, threads: int) -> None:
        from lt_gguf.checkpoint import resolver
        from lt_gguf.models import hub

        try:
            from lt_gguf.checkpoint.checks import full_layers, read_config
        except ImportError as error:
            raise ImportError(f"checkpoints need {error.name}: pip install 'lt-gguf[convert]'; GGUF files don't") from None
        self._folder = resolver.resolve(name)
        self._settings: dict[str, Any] = {"device": device, "dtype": dtype}
        self._threads = threads
        config = read_config(self._folder)
        text_config = config.get_text_config(decoder=True)
        n_layer = text_config.num_hidden_layers
        self.name = name if hub.is_hub_id(name) else self._folder.resolve().name
        said = json.loads((self._folder / "config.json").read_text(encoding="utf-8"))
        # note: llama.cpp's name of the architecture is known when the checkpoint has been converted
        self.model = Model(text_config.model_type, self.name, n_layer, n_layer, said, full_layers(config))
        self.n_ctx = getattr(text_config, "max_position_embeddings", None) or DEFAULT_LENGTH

    def measure(self, texts: Texts, samples: int, length: int, **settings: Any) -> np.ndarray:
        import torch

        from lt_gguf.hf import analysis

        if self._threads > 0:
            torch.set_num_threads(self._threads)
        prompts = calibration.cut_samples(texts, *analysis.load_tokenizer(self._folder), samples, length)
        return analysis.measure(self._folder, prompts, **settings, **self._settings)

    def candidates(self, texts: Texts, spec: StreamingSpec, **settings: Any) -> AbstractContextManager[Candidates]:
        raise ValueError(f"{self.name}: is a checkpoint, must be a GGUF file to run the hybrid itself")

    def kv_shape(self) -> KVShape:
        raise ValueError(f"{self.name}: is a checkpoint, must be a GGUF file to measure types of the KV cache")

    def remember(self, spec: StreamingSpec) -> None:
        pass  # the file that is made of it says it
