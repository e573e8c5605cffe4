"""How much memory the KV cache takes: of an ordinary model, and of a hybrid one (the cache sizes of
`ggml-patch/src/lt-kv-cache.cpp`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lt_gguf.spec import StreamingSpec, format_layers
from lt_gguf.spec.cache_types import (
    CACHE_TYPES,
    DEFAULT_CACHE_TYPE,
    CacheTypes,
    cache_type,
    kept_cache_type,
    streaming_cache_type,
)

DEFAULT_N_UBATCH = 512  # llama.cpp's own

_N_CELLS_PAD = 256


@dataclass(frozen=True)
class KVShape:
    """What one token takes in the KV cache.

    Args:
        n_head_kv: key-value heads, one number for each layer that has a cache.
        n_head_kv_max: the largest of the model; without flash attention the V of every layer is padded to it.
        head_size_k: elements of a key head.
        head_size_v: elements of a value head.
        own_layers: those with a sliding window of their own.
        own_window: its tokens.
        own_head_sizes: elements of a key head and of a value head in these layers; (0, 0): as in the others.
    """

    n_head_kv: tuple[int, ...]
    n_head_kv_max: int
    head_size_k: int
    head_size_v: int
    own_layers: tuple[int, ...] = ()
    own_window: int = 0
    own_head_sizes: tuple[int, int] = (0, 0)

    def head_sizes(self, il: int) -> tuple[int, int]:
        """Elements of a key head and of a value head."""
        other = (self.head_size_k, self.head_size_v)
        return self.own_head_sizes if il in self.own_layers and any(self.own_head_sizes) else other

    def token_bytes(self, il: int, type_k: str = DEFAULT_CACHE_TYPE, type_v: str | None = None, flash_attn: bool = True) -> int:
        """Bytes of K and V that a token takes in layer `il`.

        Raises:
            ValueError: an unknown cache type, or one that llama.cpp refuses for this model.
        """
        type_v = type_v or type_k
        self.check(type_k, type_v, flash_attn)
        head_size_k, head_size_v = self.head_sizes(il)
        width_v = self.n_head_kv[il] * head_size_v if flash_attn else self._widest_v
        return _row_bytes(type_k, self.n_head_kv[il] * head_size_k) + _row_bytes(type_v, width_v)

    def check(self, type_k: str, type_v: str, flash_attn: bool = True) -> None:
        """Raises ValueError: an unknown cache type, or one that llama.cpp refuses for this model."""
        block_k, block_v = cache_type(type_k).block, cache_type(type_v).block
        for head_size_k, head_size_v in {self.head_sizes(il) for il in range(max(1, len(self.n_head_kv)))}:
            for name, block, head_size in ((type_k, block_k, head_size_k), (type_v, block_v, head_size_v)):
                if head_size % block:
                    raise ValueError(
                        f"cache type = {name}: its blocks of {block} elements don't divide this model's heads of {head_size}"
                    )
        if block_v > 1 and not flash_attn:
            raise ValueError(f"cache type = {type_v}: a quantized V cache needs flash attention")

    @property
    def _widest_v(self) -> int:
        """Elements of V that a token has in the layer with most."""
        own = (self.n_head_kv[il] * self.head_sizes(il)[1] for il in self.own_layers)
        others = [n for il, n in enumerate(self.n_head_kv) if il not in self.own_layers]
        # note: of layers that only predict ahead only the largest number is known
        return max(*own, max(others, default=0) * self.head_size_v, 0) if self.own_layers else self.n_head_kv_max * self.head_size_v


class KVMemory(NamedTuple):
    """Bytes of K and V in the layers with full attention, in the streaming layers and in those with a sliding window of their own."""

    full: int
    streaming: int
    own: int = 0

    @property
    def total(self) -> int:
        return self.full + self.streaming + self.own


def kv_memory(
    shape: KVShape,
    spec: StreamingSpec | None,
    n_ctx: int,
    *,
    type_k: str = DEFAULT_CACHE_TYPE,
    type_v: str | None = None,
    n_ubatch: int = DEFAULT_N_UBATCH,
    n_seq_max: int = 1,
    kv_unified: bool = False,
    flash_attn: bool = True,
) -> KVMemory:
    """The bytes that a context allocates for K and V; in a model with sliding windows of its own, without `swa_full`.

    Args:
        spec: which layers stream; `None` for an ordinary model.
        n_ctx: context size in tokens, of all sequences together.
        type_k: of the layers with full attention; that of streaming layers, and of those that are kept in 16 bits, follows from it
            and from the spec.
        type_v: as `type_k` if not given.
        n_ubatch: micro-batch size in tokens; a streaming layer holds one beside its sinks and window.
        kv_unified: one cache shared by all sequences, instead of one each.

    Raises:
        ValueError: an unknown cache type, or one that llama.cpp refuses for this model.
    """
    n_ctx = padded_cells(n_ctx)
    n_caches = 1 if kv_unified else n_seq_max
    n_full = padded_cells(n_ctx // n_caches)
    n_streaming = 0 if spec is None else streaming_cells(spec, n_ctx, n_ubatch=n_ubatch, n_seq_max=n_seq_max, kv_unified=kv_unified)

    n_own = own_cells(shape, n_ctx, n_ubatch=n_ubatch, n_seq_max=n_seq_max, kv_unified=kv_unified)

    full = streaming = own = 0
    for il in range(len(shape.n_head_kv)):
        k, v = (type_ if spec is None else spec.cache_type(il, type_) for type_ in (type_k, type_v or type_k))
        if il in shape.own_layers:
            own += shape.token_bytes(il, k, v, flash_attn) * n_own * n_caches
        elif spec is not None and spec.is_streaming(il):
            streaming += shape.token_bytes(il, k, v, flash_attn) * n_streaming * n_caches
        else:
            full += shape.token_bytes(il, k, v, flash_attn) * n_full * n_caches
    return KVMemory(full, streaming, own)


def streaming_cells(
    spec: StreamingSpec, n_ctx: int, *, n_ubatch: int = DEFAULT_N_UBATCH, n_seq_max: int = 1, kv_unified: bool = False
) -> int:
    """Cells of a streaming layer's cache: sinks, window and a micro-batch. The arguments are those of `kv_memory`."""
    return _windowed_cells(spec.sink + spec.window, n_ctx, n_ubatch, n_seq_max, kv_unified)


def own_cells(shape: KVShape, n_ctx: int, *, n_ubatch: int = DEFAULT_N_UBATCH, n_seq_max: int = 1, kv_unified: bool = False) -> int:
    """Cells of the cache of a layer with a sliding window of its own. The arguments are those of `kv_memory`."""
    return _windowed_cells(shape.own_window, n_ctx, n_ubatch, n_seq_max, kv_unified) if shape.own_layers else 0


def _windowed_cells(n_visible: int, n_ctx: int, n_ubatch: int, n_seq_max: int, kv_unified: bool) -> int:
    n_ctx = padded_cells(n_ctx)
    n_full = padded_cells(n_ctx // (1 if kv_unified else n_seq_max))
    return padded_cells(min(n_full, n_visible * (n_seq_max if kv_unified else 1) + min(n_ubatch, n_ctx)))


def cache_types_text(cache_type: str, spec: StreamingSpec | None) -> str:
    """`q8_0`, or `q8_0, f16 in streaming layers`, or `K q8_0, V q4_0, f16 in layers 0,2-3`, or both.

    Args:
        cache_type: of the layers with full attention, as `CacheTypes.parse` reads it.
    """
    types = CacheTypes.parse(cache_type)
    if spec is None:
        return types.said
    parts = [types.said]
    streaming = CacheTypes(*(streaming_cache_type(name, spec.type) for name in types)) if spec.layers else types
    if streaming != types:
        parts.append(f"{streaming.said} in streaming layers")
    # those that would have another type if they weren't kept
    kept = [
        il
        for il in spec.cache_keep
        if CacheTypes(*(spec.cache_type(il, name) for name in types)) != (streaming if spec.is_streaming(il) else types)
    ]
    if kept:
        in_16_bits = CacheTypes(*map(kept_cache_type, types))
        parts.append(f"{in_16_bits.said} in layer{'s' if len(kept) > 1 else ''} {format_layers(kept)}")
    return ", ".join(parts)


def _row_bytes(type_name: str, n_elements: int) -> int:
    return n_elements // CACHE_TYPES[type_name].block * CACHE_TYPES[type_name].block_bytes


def padded_cells(n_cells: int) -> int:
    """As many as llama.cpp allocates for so many."""
    return -(-n_cells // _N_CELLS_PAD) * _N_CELLS_PAD
