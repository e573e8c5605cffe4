"""What is compared: `Contender`, a way to run a model; and `Job`, what a process is told to time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lt_gguf.gguf.file import GGUFModel
from lt_gguf.memory.kv import kv_memory
from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import DEFAULT_CACHE_TYPE

OFF = "off"
FULL = "full"
DEFAULT_N_UBATCH = 512

DECODE, PROMPT, THROUGHPUT = "decode", "prompt", "throughput"


@dataclass(frozen=True)
class Contender:
    """A way to run the model.

    Args:
        name: in tables.
        streaming: which layers stream, as a spec's text.
        type_k: of K in the KV cache.
        type_v: the same of V.
        flash_attn: with flash attention.
        own_attention: with this project's attention of few tokens on the CPU; else llama.cpp's.
        shift_at: the context is of so many tokens, and when it is full the older half of them is forgotten; 0: it isn't.
        library: what runs it: llama.cpp, or transformers in a Python of its own (see `peer_torch.py`).
        options: of that.
    """

    name: str
    streaming: str = OFF
    type_k: str = DEFAULT_CACHE_TYPE
    type_v: str = DEFAULT_CACHE_TYPE
    flash_attn: bool = True
    own_attention: bool = True
    shift_at: int = 0
    library: str = "llama.cpp"
    options: dict[str, Any] | None = None

    @property
    def is_peer(self) -> bool:
        """It is what others have."""
        return not self.own_attention or self.library != "llama.cpp"

    @property
    def is_hybrid(self) -> bool:
        return self.streaming != OFF

    def cells_read(self, model: GGUFModel, depth: int) -> list[int]:
        """Positions whose keys and values the attention of one token reads in each layer, after `depth` tokens."""
        spec = self._spec(model)
        depth = min(depth, self.shift_at or depth)
        shape = model.kv_shape
        windows = dict.fromkeys(spec.layers, spec.sink + spec.window) | dict.fromkeys(shape.own_layers, shape.own_window)
        return [min(depth, windows.get(il, depth)) for il in range(len(shape.n_head_kv))]

    def bytes_read(self, model: GGUFModel, depth: int) -> int:
        """What one decoded token reads at `depth` at least: all weights, and K and V of what it sees."""
        spec, shape = self._spec(model), model.kv_shape
        return model.n_bytes + sum(
            n * shape.token_bytes(il, spec.cache_type(il, self.type_k), spec.cache_type(il, self.type_v))
            for il, n in enumerate(self.cells_read(model, depth))
        )

    def context_bytes(self, model: GGUFModel, n_ctx: int) -> int:
        """What the KV cache of a context of `n_ctx` tokens takes; 0 where nobody says before it is measured."""
        return self.kv_bytes(model, min(n_ctx, self.shift_at or n_ctx)) if self.library == "llama.cpp" else 0

    def kv_bytes(self, model: GGUFModel, n_ctx: int, n_seq: int = 1) -> int:
        """What a KV cache takes for `n_seq` sequences of `n_ctx` tokens each.

        Raises:
            ValueError: a cache type doesn't fit the model.
        """
        spec = self._spec(model)
        return kv_memory(
            model.kv_shape,
            spec,
            n_ctx * n_seq,
            type_k=self.type_k,
            type_v=self.type_v,
            n_ubatch=DEFAULT_N_UBATCH,
            n_seq_max=n_seq,
            flash_attn=self.flash_attn,
        ).total

    def _spec(self, model: GGUFModel) -> StreamingSpec:
        return StreamingSpec.parse(self.streaming, model.n_layer)


@dataclass(frozen=True)
class Job:
    """What a process times of one contender; it prints a line of JSON for each depth.

    Args:
        model: the GGUF file.
        task: "decode", "prompt" or "throughput".
        depths: tokens in the cache, or of the prompt, ascending.
        n_tokens: that are decoded for a time.
        n_seq: sequences that are decoded at once at each depth ("throughput").
        n_threads: on the CPU.
        n_gpu_layers: on the GPU.
    """

    model: str
    contender: Contender
    task: str
    depths: tuple[int, ...]
    n_tokens: int
    n_threads: int
    n_gpu_layers: int = 0
    n_seq: tuple[int, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        fields: dict[str, Any] = json.loads(text)
        fields["contender"] = Contender(**fields["contender"])
        return cls(**(fields | {key: tuple(fields[key]) for key in ("depths", "n_seq")}))


def ours(specs: Sequence[StreamingSpec], cache_types: Sequence[str], flash_attn: bool) -> list[Contender]:
    """Full attention and each of the hybrids, with each type of cache, interleaved as they are listed."""
    return [
        Contender(f"{name}, {type_}", streaming, type_, type_, flash_attn)
        for type_ in cache_types
        for name, streaming in [(FULL, OFF), *zip(_names(specs), map(str, specs))]
    ]


def _names(specs: Sequence[StreamingSpec]) -> list[str]:
    """Short ones that tell them apart: how many layers stream, then what else differs."""
    names = [f"{len(spec.layers)} of {spec.n_layer} stream" for spec in specs]
    for field in ("window", "sink", "prefill"):
        if len({getattr(spec, field) for spec in specs}) > 1:
            names = [f"{name}, {field} {getattr(spec, field)}" for name, spec in zip(names, specs)]
    counts = {name: names.count(name) for name in names}
    seen: dict[str, int] = {}
    for i, name in enumerate(names):
        if counts[name] > 1:
            seen[name] = seen.get(name, 0) + 1
            names[i] = f"{name} ({seen[name]})"
    return names
