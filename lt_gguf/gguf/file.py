"""Describes a GGUF model: its shape, its KV cache and its streaming spec."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lt_gguf.gguf.architectures import LayerCount, OwnWindow, layer_count, own_window, why_not_streaming
from lt_gguf.gguf.header import GGUFHeader, read_header
from lt_gguf.memory.kv import KVShape
from lt_gguf.spec import CacheRecommendation, Provenance, StreamingSpec, Typed, format_layers
from lt_gguf.spec.fields import CACHE_KEEP
from lt_gguf.spec.keys import cache_prefix

_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFModel:
    """What a GGUF file says of its model.

    Args:
        path: of the file, of the first one if the model is split.
        architecture: llama.cpp's name of it.
        name: the model's own, or the file's.
        n_layer: number of layers, those included that only predict ahead.
        n_layer_main: of them, the first ones, which the main graph runs; only these have a KV cache.
        n_ctx_train: context size that the model was trained for, in tokens.
        n_embd: elements of a hidden state.
        n_head: attention heads, one number a layer.
        n_head_kv: key-value heads, one number a layer.
        head_size_k: elements of a key head.
        head_size_v: elements of a value head.
        n_bytes: of all the model's files together.
        n_files: of a split model, else 1.
        spec: the file's streaming spec, `None` for an ordinary model.
        provenance: how its streaming layers were chosen, if the file says so.
        why_not_streaming: the reason for which this model can't have streaming layers, `None` if it can.
        recommended: types of the KV cache that the file recommends, `None` if it recommends none.
        own_window: the layers that have a sliding window of their own, `None` if there are none.
        own_head_sizes: elements of a key head and of a value head in these.
    """

    path: Path
    architecture: str
    name: str
    n_layer: int
    n_layer_main: int
    n_ctx_train: int
    n_embd: int
    n_head: tuple[int, ...]
    n_head_kv: tuple[int, ...]
    head_size_k: int
    head_size_v: int
    n_bytes: int
    n_files: int
    spec: StreamingSpec | None
    provenance: Provenance | None
    why_not_streaming: str | None
    recommended: CacheRecommendation | None = None
    own_window: OwnWindow | None = None
    own_head_sizes: tuple[int, int] = (0, 0)

    @property
    def may_stream(self) -> tuple[int, ...]:
        """The layers that may stream: those of the main graph with full attention."""
        if self.why_not_streaming:
            return ()
        own = self.own_window.layers if self.own_window else ()
        return tuple(il for il in range(self.n_layer_main) if il not in own)

    def parse_spec(self, text: str) -> StreamingSpec:
        """Reads a spec as `StreamingSpec.parse` does; what it leaves out is the file's, and `all` means the layers that may stream.

        Raises:
            ValueError: the text is malformed.
        """
        return StreamingSpec.parse(text, self.n_layer, self.spec, self.may_stream)

    def check_can_stream(self, spec: StreamingSpec | None = None) -> None:
        """Raises ValueError if `spec` makes layers stream that can't, or keeps layers in 16 bits that have no cache; without one, if
        none can stream."""
        spec = StreamingSpec(self.may_stream or (0,), self.n_layer) if spec is None else spec
        check_can_stream(self.architecture, spec, self.n_layer_main, self.why_not_streaming, self.own_window)

    @property
    def kv_shape(self) -> KVShape:
        """The shape of the KV cache.

        Raises:
            ValueError: this architecture has no plain KV cache.
        """
        if self.why_not_streaming:
            raise ValueError(
                f"{self.path}: the KV cache of the architecture {self.architecture} isn't sinks, a window and full "
                f"attention: {self.why_not_streaming}"
            )
        # note: the layer that Granite Switch adds to the main ones is in the cache too
        n_cached = self.n_layer if self.architecture == "graniteswitch" else self.n_layer_main
        shape = KVShape(self.n_head_kv[:n_cached], max(self.n_head_kv), self.head_size_k, self.head_size_v)
        if self.own_window is None:
            return shape
        return replace(
            shape, own_layers=self.own_window.layers, own_window=self.own_window.tokens, own_head_sizes=self.own_head_sizes
        )

    def check_recommended(self, recommended: CacheRecommendation | None) -> None:
        """Raises ValueError if the file can't recommend this for the cache of its model."""
        if recommended is None:
            return
        if self.why_not_streaming:
            raise ValueError(
                f"no types of the cache can be recommended for the architecture {self.architecture}: {self.why_not_streaming}"
            )
        keeps = StreamingSpec((), self.n_layer, cache_keep=recommended.keep)
        self.check_can_stream(keeps)
        # note: llama.cpp switches flash attention off for Grok
        self.kv_shape.check(*recommended.types, flash_attn=self.architecture != "grok")


def read_model(path: str | os.PathLike[str], takes_recommended: bool = True) -> GGUFModel:
    """Reads the description of the model at `path` (the first file of a split one).

    Args:
        takes_recommended: what the file recommends for its cache is read and checked; else it is as if there were nothing.

    Raises:
        OSError: a file can't be opened.
        ValueError: it isn't a GGUF model, its metadata is malformed, or a part of it is missing; one line that names
            the file, the key and what is allowed.
    """
    path = Path(path)
    return describe_model(path, read_header(path), takes_recommended)


def describe_model(path: Path, header: GGUFHeader, takes_recommended: bool = True) -> GGUFModel:
    """The description of the model whose first file is at `path` and has this header, or is to have it; the arguments are `read_model`'s.

    Raises:
        ValueError: as `read_model` does.
    """
    metadata = header.metadata
    try:
        files = model_files(path, header)
        arch = _string(metadata, "general.architecture")
        layers = layer_count(arch, metadata)
        n_head = _per_layer(metadata, f"{arch}.attention.head_count", layers, default=(0,) * layers.all)
        n_head_kv = _per_layer(metadata, f"{arch}.attention.head_count_kv", layers, default=n_head)
        n_embd = _integer(metadata, f"{arch}.embedding_length", 0)
        head_size = n_embd // n_head[0] if n_head[0] else 0
        spec = StreamingSpec.from_metadata(metadata, arch, layers.all)
        reason, own = why_not_streaming(arch, metadata), own_window(arch, metadata)
        check_can_stream(arch, spec, layers.main, reason, own)
        head_size_k = _integer(metadata, f"{arch}.attention.key_length", head_size)
        head_size_v = _integer(metadata, f"{arch}.attention.value_length", head_size)
        own_head_size_k = _integer(metadata, f"{arch}.attention.key_length_swa", head_size_k)
        own_head_size_v = _integer(metadata, f"{arch}.attention.value_length_swa", head_size_v)
        model = GGUFModel(
            path=path,
            architecture=arch,
            name=str(metadata.get("general.name", Typed("string", path.stem)).value),
            n_layer=layers.all,
            n_layer_main=layers.main,
            n_ctx_train=_integer(metadata, f"{arch}.context_length", 0),
            n_embd=n_embd,
            n_head=n_head,
            n_head_kv=n_head_kv,
            head_size_k=head_size_k,
            head_size_v=head_size_v,
            n_bytes=sum(file.stat().st_size for file in files),
            n_files=len(files),
            spec=spec,
            provenance=Provenance.from_metadata(metadata),
            why_not_streaming=reason,
            recommended=CacheRecommendation.from_metadata(metadata, arch, layers.all) if takes_recommended else None,
            own_window=own,
            own_head_sizes=(own_head_size_k, own_head_size_v),
        )
        try:
            model.check_recommended(model.recommended)
            if model.recommended is not None:
                model.recommended.check(spec)
        except ValueError as error:
            raise ValueError(f"{cache_prefix(arch)}*: {error}") from None
        return model
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def check_can_stream(
    arch: str, spec: StreamingSpec | None, n_layer_main: int, reason: str | None, own_window: OwnWindow | None = None
) -> None:
    """Raises ValueError if `spec` makes layers stream that can't, or keeps layers in 16 bits that have no cache.

    Args:
        reason: for which the architecture can't stream, `None` if it can.
        own_window: the layers that have a sliding window of their own.
    """
    if spec is None or not (spec.layers or spec.cache_keep):
        return
    if own_window and not spec.layers:
        reason = reason or "it has a sliding window of its own, and no layer streams"
    if reason and not spec.layers:
        raise ValueError(f"models of the architecture {arch} can't keep layers of their cache in 16 bits: {reason}")
    if reason:
        raise ValueError(f"models of the architecture {arch} can't have streaming layers: {reason}")
    if spec.cache_keep and spec.cache_keep[-1] >= n_layer_main:
        raise ValueError(
            f"{CACHE_KEEP} = {format_layers(spec.cache_keep)}: must be layers from 0 to {n_layer_main - 1}, the main graph runs no others"
        )
    if spec.layers and spec.layers[-1] >= n_layer_main:
        raise ValueError(
            f"layer {spec.layers[-1]} can't stream: the main graph doesn't run it, only layers from 0 to {n_layer_main - 1} can"
        )
    if own_window and (wrong := sorted(set(spec.layers) & set(own_window.layers))):
        may = format_layers(set(range(n_layer_main)) - set(own_window.layers))
        raise ValueError(
            f"layer {wrong[0]} can't stream: it has a sliding window of its own, of {own_window.tokens} tokens, only the layers with "
            f"full attention can: {may}"
        )


def model_files(path: Path, header: GGUFHeader) -> list[Path]:
    """All files of the model whose first one is `path`. Raises ValueError if it isn't the first, or others are missing."""
    count = _integer(header.metadata, "split.count", 1)
    files = split_files(path, count)
    if (_integer(header.metadata, "split.no", 0) != 0 and count > 1) or files[0].name != path.name:
        number = int(path.stem.rsplit("-of-", 1)[0][-5:])
        raise ValueError(f"is part {number} of {count}, name the first one: {files[0].name}")
    missing = [file.name for file in files[1:] if not file.is_file()]
    if missing:
        raise ValueError(f"is the first of {count} files, of which {len(missing)} are not beside it: {', '.join(missing[:3])}")
    return files


def split_files(path: Path, count: int) -> list[Path]:
    """The names of all `count` files of a model of which `path` is one. Raises ValueError if it isn't named so."""
    if count <= 1:
        return [path]
    name = _SHARD_NAME.fullmatch(path.name)
    if not name or int(name["count"]) != count:
        raise ValueError(f"is the first of {count} files, must be named like model-00001-of-{count:05}.gguf")
    return [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]


def _string(metadata: Mapping[str, Typed], key: str) -> str:
    if key not in metadata or metadata[key].type != "string":
        raise ValueError(f"{key}: is missing or no string, the file isn't a model")
    return metadata[key].value


def _integer(metadata: Mapping[str, Typed], key: str, default: int) -> int:
    found: Any = metadata.get(key, Typed("uint32", default)).value
    if isinstance(found, bool) or not isinstance(found, int) or found < 0:
        raise ValueError(f"{key} = {found}: must be an integer of at least 0")
    return found


def _per_layer(metadata: Mapping[str, Typed], key: str, layers: LayerCount, default: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each of all layers; a file gives either one for all or an array."""
    found = metadata.get(key)
    if found is None:
        return default
    numbers = found.value or [] if found.type.startswith("array") else [_integer(metadata, key, 0)] * layers.file
    if len(numbers) != layers.file or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(
            f"{key} = [{found.type}, {len(numbers)} items]: must be an integer of at least 0 for each of {layers.file} layers"
        )
    # note: layers that llama.cpp runs again are as in the file; the one that Granite Switch adds has a single head
    repeated = tuple(numbers) * (layers.all // layers.file)
    return (*repeated, *[1] * (layers.all - len(repeated)))
