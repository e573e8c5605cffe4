"""How much memory the KV cache takes: of an ordinary model, and of a hybrid one (the cache sizes of
`ggml-patch/src/lt-kv-cache.cpp`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lt_gguf.spec import StreamingSpec


class CacheType(NamedTuple):
    """A type that llama.cpp takes for a KV cache: its number in ggml.h, elements and bytes of a block."""

    ggml_type: int
    block: int
    block_bytes: int


CACHE_TYPES = {
    "f32": CacheType(0, 1, 4),
    "f16": CacheType(1, 1, 2),
    "bf16": CacheType(30, 1, 2),
    "q8_0": CacheType(8, 32, 34),
    "q4_0": CacheType(2, 32, 18),
    "q4_1": CacheType(3, 32, 20),
    "iq4_nl": CacheType(20, 32, 18),
    "q5_0": CacheType(6, 32, 22),
    "q5_1": CacheType(7, 32, 24),
}
DEFAULT_CACHE_TYPE = "f16"
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
    """

    n_head_kv: tuple[int, ...]
    n_head_kv_max: int
    head_size_k: int
    head_size_v: int

    def token_bytes(self, il: int, type_k: str = DEFAULT_CACHE_TYPE, type_v: str | None = None, flash_attn: bool = True) -> int:
        """Bytes of K and V that a token takes in layer `il`.

        Raises:
            ValueError: an unknown cache type, or one that llama.cpp refuses for this model.
        """
        type_v = type_v or type_k
        block_k, block_v = cache_type(type_k).block, cache_type(type_v).block
        for name, block, head_size in ((type_k, block_k, self.head_size_k), (type_v, block_v, self.head_size_v)):
            if head_size % block:
                raise ValueError(
                    f"cache type = {name}: its blocks of {block} elements don't divide this model's heads of {head_size}"
                )
        if block_v > 1 and not flash_attn:
            raise ValueError(f"cache type = {type_v}: a quantized V cache needs flash attention")
        n_head_kv_v = self.n_head_kv[il] if flash_attn else self.n_head_kv_max
        return _row_bytes(type_k, self.n_head_kv[il] * self.head_size_k) + _row_bytes(type_v, n_head_kv_v * self.head_size_v)


class KVMemory(NamedTuple):
    """Bytes of K and V in the layers with full attention and in the streaming layers."""

    full: int
    streaming: int

    @property
    def total(self) -> int:
        return self.full + self.streaming


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
    """The bytes that a context allocates for K and V.

    Args:
        spec: which layers stream; `None` for an ordinary model.
        n_ctx: context size in tokens, of all sequences together.
        type_v: as `type_k` if not given.
        n_ubatch: micro-batch size in tokens; a streaming layer holds one beside its sinks and window.
        kv_unified: one cache shared by all sequences, instead of one each.

    Raises:
        ValueError: an unknown cache type, or one that llama.cpp refuses for this model.
    """
    n_ctx = _pad(n_ctx)
    n_caches = 1 if kv_unified else n_seq_max
    n_full = _pad(n_ctx // n_caches)
    n_streaming = 0
    if spec is not None:
        n_visible = (spec.sink + spec.window) * (n_seq_max if kv_unified else 1)
        n_streaming = _pad(min(n_full, n_visible + min(n_ubatch, n_ctx)))

    full = streaming = 0
    for il in range(len(shape.n_head_kv)):
        token_bytes = shape.token_bytes(il, type_k, type_v, flash_attn)
        if spec is not None and spec.is_streaming(il):
            streaming += token_bytes * n_streaming * n_caches
        else:
            full += token_bytes * n_full * n_caches
    return KVMemory(full, streaming)


def cache_type(name: str) -> CacheType:
    """The type of that name. Raises ValueError if llama.cpp takes no such type for a KV cache."""
    if name not in CACHE_TYPES:
        raise ValueError(f'cache type = "{name}": must be one of {", ".join(CACHE_TYPES)}')
    return CACHE_TYPES[name]


def _row_bytes(type_name: str, n_elements: int) -> int:
    return n_elements // CACHE_TYPES[type_name].block * CACHE_TYPES[type_name].block_bytes


def _pad(n_cells: int) -> int:
    return -(-n_cells // _N_CELLS_PAD) * _N_CELLS_PAD
