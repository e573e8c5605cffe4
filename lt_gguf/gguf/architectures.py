"""What has to be known of an architecture of llama.cpp before a model is loaded: how layers are counted, why some can't stream.

The runtime decides (`lt_why_not` in `ggml-patch/src/lt-model-specs.cpp`); this says the same from a file's metadata alone,
so that the converter can refuse before it has written gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lt_gguf.spec import Typed

_MOST_LAYERS = 512  # of llama.cpp

_RECURRENT = (
    "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h "
    "nemotron_h_moe qwen3next kimi-linear bailingmoe3 kimi-k3 glm5-next qwen35 qwen35moe qwen4exp deepseek4 minimax-01"
).split()
_ENCODER = "t5 t5encoder eagle3 dflash".split()
_DRAFTS = "gemma4-assistant".split()
_NOT_CAUSAL = "dream llada llada-moe rnd1".split()
_NO_KV_CACHE = (
    "clip bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding "
    "llama-embed wavtokenizer-dec"
).split()
_SPARSE = "dots3note minimax-m3 glm-dsa deepseek32 hy_v4".split()

_REASONS = {
    "it has recurrent layers": _RECURRENT,
    "it has an encoder": _ENCODER,
    "its attention is not causal": _NOT_CAUSAL,
    "it has no KV cache": _NO_KV_CACHE,
    "it drafts for another model, whose layers it reads": _DRAFTS,
}
_REASON_OF = {arch: reason for reason, archs in _REASONS.items() for arch in archs}


class Sliding(NamedTuple):
    """How llama.cpp finds the layers of an architecture that have a sliding window of their own.

    Args:
        period: of so many layers one has full attention, where the file doesn't say which; 0: it must.
        is_first: it is the first of them, else the last.
        window: tokens, where the file doesn't say; 0: it must, or no layer has one.
        is_fixed: the file's window only says that there is one.
    """

    period: int
    is_first: bool = False
    window: int = 0
    is_fixed: bool = False


# note: other architectures ignore the keys (Phi-3's converter writes them, llama.cpp doesn't use them)
_SLIDING = {
    "afmoe": Sliding(4),
    "cohere2": Sliding(4),
    "cohere2moe": Sliding(4, is_first=True),
    "exaone-moe": Sliding(4, window=128),
    "exaone4": Sliding(4, window=4096),
    "gemma2": Sliding(2, window=4096),
    "gemma3": Sliding(6),
    "gemma3n": Sliding(5),
    "gemma4": Sliding(0),
    "gpt-oss": Sliding(2),
    "granite_swa": Sliding(0),
    "laguna": Sliding(4, is_first=True),
    "llama4": Sliding(4, window=8192, is_fixed=True),
    "maple": Sliding(0),
    "mellum": Sliding(4),
    "mimo2": Sliding(0),
    "muse-glimmer": Sliding(4),
    "olmo2": Sliding(4),
    "plamo3": Sliding(8),
    "smallthinker": Sliding(4, is_first=True, window=4096, is_fixed=True),
    "spark2_5": Sliding(0),
    "step35": Sliding(0),
}


class OwnWindow(NamedTuple):
    """The layers that have a sliding window of their own, and its tokens (Llama 4: of a chunk)."""

    layers: tuple[int, ...]
    tokens: int


class LayerCount(NamedTuple):
    """The layers of a model: those the file holds, all that llama.cpp makes of them, and of these the first ones, which the
    main graph runs (the others predict ahead)."""

    file: int
    all: int
    main: int


def layer_count(arch: str, metadata: Mapping[str, Typed]) -> LayerCount:
    """Counts layers as llama.cpp does.

    Raises:
        ValueError: the file doesn't say how many blocks there are, or says what can't be.
    """
    blocks = _number(metadata, f"{arch}.block_count", 0)
    if blocks < 1:
        raise ValueError(f"{arch}.block_count: is missing or 0, must be the number of layers")
    if blocks > _MOST_LAYERS:
        raise ValueError(f"{arch}.block_count = {blocks}: must be the number of layers, at most {_MOST_LAYERS}")
    if arch == "nanbeige":  # runs its blocks several times, each time with a KV cache of its own
        looped = blocks * max(1, _number(metadata, f"{arch}.num_loops", 1))
        return LayerCount(blocks, looped, looped)
    if arch == "graniteswitch":  # adds a layer that chooses the adapter
        return LayerCount(blocks, blocks + 1, blocks)
    return LayerCount(blocks, blocks, blocks - min(blocks, _number(metadata, f"{arch}.nextn_predict_layers", 0)))


def why_not_streaming(arch: str, metadata: Mapping[str, Typed]) -> str | None:
    """The reason for which a model can't have streaming layers, `None` if it can."""
    if arch in _REASON_OF:
        return _REASON_OF[arch]
    if metadata.get(f"{arch}.attention.causal", Typed("bool", True)).value is False:
        return "its attention is not causal"
    if _number(metadata, f"{arch}.attention.key_length_mla", 0) > 0:
        return "it uses multi-head latent attention (MLA)"
    if arch in _SPARSE:
        return "it has a sparse attention of its own"
    n_layer = layer_count(arch, metadata).main
    shares = _number(metadata, f"{arch}.attention.shared_kv_layers", 0) > 0 if arch == "gemma4" else n_layer > 20
    if arch in ("gemma3n", "gemma4") and shares:
        return "layers of it use the keys and values of others"
    own = own_window(arch, metadata)
    if own is not None and len(own.layers) == n_layer:
        return "all its layers have a sliding window of their own"
    return None


def own_window(arch: str, metadata: Mapping[str, Typed]) -> OwnWindow | None:
    """The layers with a sliding window of their own, `None` if there are none."""
    known = _SLIDING.get(arch)
    n_layer = layer_count(arch, metadata).main
    # note: only the 32B model of Exaone 4 has one
    if known is None or (arch == "exaone4" and n_layer != 64):
        return None
    key = f"{arch}.attention.sliding_window"
    # note: llama.cpp takes a Llama 4 without the key for one with chunked attention
    says_none = key not in metadata if arch == "smallthinker" else _number(metadata, key, known.window) == 0
    if says_none:
        return None
    tokens = known.window if known.is_fixed else _number(metadata, key, known.window)
    pattern: Any = metadata.get(f"{key}_pattern", Typed("", None)).value
    if isinstance(pattern, list):
        layers = tuple(il for il, slides in enumerate(pattern[:n_layer]) if slides)
    else:
        period = _number(metadata, f"{key}_pattern", known.period)
        full = 0 if known.is_first else period - 1
        layers = tuple(il for il in range(n_layer) if not period or il % period != full)
    return OwnWindow(layers, tokens) if layers else None


def _number(metadata: Mapping[str, Typed], key: str, default: int) -> int:
    value: Any = metadata.get(key, Typed("", default)).value
    return value if isinstance(value, int) and not isinstance(value, bool) else default
