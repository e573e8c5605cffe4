"""Runs a causal language model layer by layer, with the weights of one decoder layer in memory at a time.

The model is built on torch's meta device, where tensors have a shape and no memory. Weights are put into the part that is
about to run by transformers' own loader, which knows how each family's files differ from its modules, and taken out
after it. What runs is transformers' own forward pass of the decoder: it makes each layer's arguments (positions, RoPE,
masks), and only the layer whose turn it is computes. So a family that transformers supports needs no code here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from lt_gguf.checkpoint.weights import has_bad_values, stored_tensors
from lt_gguf.hf.decoder import find_layers, without_progress_bar
from lt_gguf.hf.lazy_ratio import IMPLEMENTATION

EMBEDDING, SHARED = "input embedding", "decoder"  # parts of a model that aren't layers


class LayerByLayer:
    """A model of which one part at a time has its weights.

    Args:
        checkpoint: folder of the checkpoint.
        config: its config, as `read_config` returns it.
        device: where the parts run.
        dtype: what they compute in.

    Raises:
        ValueError: the model doesn't have the shape that is needed here, or the files can't be read.
        OSError: a file can't be read.
    """

    def __init__(self, checkpoint: Path, config: PretrainedConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        with torch.device("meta"):
            self._model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION).eval()
        self._decoder, self._layers = find_layers(self._model)
        self._names = {module: name for name, module in self._model.named_modules()}
        self._weight_mapping = get_model_conversion_mapping(self._model)
        self._stored = stored_tensors(checkpoint)
        self._by_part = self._sort_into_parts()
        for layer in self._layers:
            layer.forward = self._skip
        self._load(SHARED, self._decoder_modules())

    @property
    def n_layer(self) -> int:
        return len(self._layers)

    @torch.no_grad()
    def embed(self, samples: list[list[int]]) -> Iterator[torch.Tensor]:
        """What goes into the first layer for each sample, (1, T, hidden_size) each. Raises as `load` does."""
        embedding = self._decoder.get_input_embeddings()
        # note: only the rows of tokens that occur are read, as the whole of it is bigger than a layer in many models
        used = torch.tensor(sorted({token for tokens in samples for token in tokens}))
        embedding.weight = nn.Parameter(self._read_embedding(embedding, used), requires_grad=False)
        embedding.padding_idx = None  # type: ignore[assignment]  # which may be beyond these rows; it matters to gradients only
        used = used.to(self.device)
        embedding.forward = lambda tokens: type(embedding).forward(embedding, torch.searchsorted(used, tokens))
        try:
            for tokens in samples:
                yield self._run(0, None, input_ids=torch.tensor([tokens], device=self.device))
        finally:
            embedding.to("meta")
            del embedding.forward

    def _read_embedding(self, embedding: nn.Module, rows: torch.Tensor) -> torch.Tensor:
        where = f"{self.checkpoint}: the {EMBEDDING}"
        if not isinstance(embedding, nn.Embedding):
            raise ValueError(f"{where} is a {type(embedding).__name__}, must be an Embedding: use the whole model")
        if not self._by_part[EMBEDDING]:
            raise ValueError(f"{where}: {self._names[embedding]}.weight is missing in the checkpoint's files")
        name = self._by_part[EMBEDDING][0]
        stored, expected = self._stored[name][...], tuple(embedding.weight.shape)
        if stored.shape != expected:
            raise ValueError(f"{where}: {name} has the shape {tuple(stored.shape)}, must have {expected} as the config says")
        weight = stored[rows].to(self.device, self.dtype)
        if has_bad_values(weight):
            raise ValueError(f"{where}: {name} has NaN or infinite values, must be finite: the checkpoint is damaged")
        self._compute_buffers(embedding.modules())
        return weight

    def load(self, layer: int) -> None:
        """Reads a layer's weights.

        Raises:
            ValueError: weights are missing, have another shape than the config says, or hold NaN or infinities.
            OSError: a file can't be read.
        """
        self._load(layer, self._layers[layer].modules())

    def drop(self, layer: int) -> None:
        """Gives the memory of a layer's weights back."""
        self._layers[layer].to("meta")
        with suppress(AttributeError):
            # note: glibc keeps much of what the loader's threads freed, more with each layer; other systems have no such call
            ctypes.CDLL(None).malloc_trim(0)

    @torch.no_grad()
    def run(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """What comes out of a loaded layer, for (1, T, hidden_size) that goes into it."""
        return self._run(layer, hidden, inputs_embeds=hidden)

    def _run(self, layer: int, hidden: torch.Tensor | None, **inputs: torch.Tensor) -> torch.Tensor:
        """Runs the decoder up to `layer`, which gets `hidden` in place of what comes; None: returns what comes."""
        module = self._layers[layer]

        def forward(*arguments: Any, **named: Any) -> torch.Tensor:
            if hidden is None:
                raise _Reached(arguments[0] if arguments else named["hidden_states"])
            if arguments:
                arguments = (hidden, *arguments[1:])
            else:
                named["hidden_states"] = hidden
            output = type(module).forward(module, *arguments, **named)
            raise _Reached(output if isinstance(output, torch.Tensor) else output[0])

        self._passed_on = hidden
        module.forward = forward
        try:
            self._decoder(use_cache=False, **inputs)
        except _Reached as reached:
            return reached.hidden
        finally:
            module.forward = self._skip
            self._passed_on = None
        raise ValueError(f"{type(self._decoder).__name__} doesn't run its layer {layer}: use the whole model")

    def _skip(self, *arguments: Any, **named: Any) -> torch.Tensor | None:
        """Stands in for the layers before the one that runs. What it returns is never looked at; its first element may be
        taken, where layers return tuples."""
        return self._passed_on

    def _decoder_modules(self) -> Iterable[nn.Module]:
        """The modules that every run needs: all but the layers and the input embedding."""
        apart = {id(module) for layer in self._layers for module in layer.modules()}
        apart |= {id(module) for module in self._decoder.get_input_embeddings().modules()}
        return [module for module in self._decoder.modules() if id(module) not in apart]

    def _sort_into_parts(self) -> dict[int | str, list[str]]:
        """The names of the stored tensors that each part needs, by layer number, EMBEDDING or SHARED."""
        names = self._names
        prefixes: dict[int | str, str] = {layer: f"{names[module]}." for layer, module in enumerate(self._layers)}
        prefixes[EMBEDDING] = f"{names[self._decoder.get_input_embeddings()]}."
        prefixes[SHARED] = f"{names[self._decoder]}."
        by_prefix = {prefix: part for part, prefix in prefixes.items()}
        expected = self._model.state_dict()
        renamings = [entry for entry in self._weight_mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._weight_mapping if isinstance(entry, WeightConverter)]
        parts: dict[int | str, list[str]] = {part: [] for part in prefixes}
        for stored in self._stored:
            # note: as transformers' loader does it, which renames once more when it loads
            name, _ = rename_source_key(stored, renamings, converters, self._model.base_model_prefix, expected)
            if name not in expected and stored in expected:
                name = stored
            # the longest prefix: layers and embedding are inside of the decoder
            found = [by_prefix[head] for head in _heads(name) if head in by_prefix]
            if found:
                parts[found[-1]].append(stored)
        return parts

    def _load(self, part: int | str, modules: Iterable[nn.Module]) -> None:
        """Puts the weights of a part into its modules."""
        where = f"{self.checkpoint}: layer {part}" if isinstance(part, int) else f"{self.checkpoint}: the {part}"
        modules = list(modules)
        dtype_plan = self._model._get_dtype_plan(self.dtype)
        settings = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=dtype_plan,
            weight_mapping=self._weight_mapping,  # type: ignore[arg-type]  # transformers makes it of a wider type than it takes
        )
        tensors = {name: self._stored[name] for name in self._by_part[part]}
        with without_progress_bar():
            info, _ = convert_and_load_state_dict_in_model(self._model, tensors, settings)
        for name, error in info.conversion_errors.items():
            raise ValueError(f"{where}: {name} can't be read: {error.strip().splitlines()[-1]}")
        for name, stored, expected in sorted(info.mismatched_keys):
            raise ValueError(f"{where}: {name} has the shape {tuple(stored)}, must have {tuple(expected)} as the config says")
        self._compute_buffers(modules)
        for module in modules:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in own:
                name = f"{self._names[module]}.{name}"
                if tensor.is_meta:
                    raise ValueError(f"{where}: {name} is missing in the checkpoint's files")
                if has_bad_values(tensor):
                    raise ValueError(f"{where}: {name} has NaN or infinite values, must be finite: the checkpoint is damaged")

    @torch.no_grad()
    def _compute_buffers(self, modules: Iterable[nn.Module]) -> None:
        """Computes what isn't stored in files, such as RoPE's frequencies."""
        for module in modules:
            computed = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
            for name in computed:
                setattr(module, name, torch.empty_like(getattr(module, name), device=self.device))
            if computed:
                # note: it leaves alone what the loader has marked as loaded
                with initialization.guard_torch_init_functions():
                    self._decoder._init_weights(module)


class _Reached(Exception):
    """The layer that was to run has run; what comes after it isn't wanted."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


def _heads(name: str) -> list[str]:
    """`a.b.c` -> `a.`, `a.b.`"""
    parts = name.split(".")
    return [".".join(parts[:i]) + "." for i in range(1, len(parts))]
