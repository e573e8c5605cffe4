"""What has to be known of an architecture of llama.cpp before a model is loaded: how layers are counted, why some can't stream.

The runtime decides (`lt_why_not` in `ggml-patch/src/lt-model-specs.cpp`); this says the same from a file's metadata alone,
so that the converter can refuse before it has written gigabytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lt_gguf.spec import Typed

_RECURRENT = (
    "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7 jamba falcon-h1 plamo2 granitehybrid lfm2 lfm2moe nemotron_h "
    "nemotron_h_moe qwen3next kimi-linear bailingmoe3 kimi-k3 glm5-next qwen35 qwen35moe qwen4exp deepseek4 minimax-01"
).split()
_ENCODER = "t5 t5encoder eagle3 dflash".split()
_NOT_CAUSAL = "dream llada llada-moe rnd1".split()
_NO_KV_CACHE = (
    "clip bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding "
    "llama-embed wavtokenizer-dec"
).split()
_SPARSE = "minimax-m3 glm-dsa deepseek32 hy_v4".split()

# These have a sliding window whatever the file says,
_ALWAYS_SLIDING = (
    "cohere2 cohere2moe dots3note exaone-moe gemma2 gemma3n gemma4 gemma4-assistant gpt-oss granite_swa maple mimo2 muse-glimmer "
    "spark2_5 step35"
).split()
# these if the file names one. The others ignore the key (Phi-3's converter writes it, llama.cpp doesn't use it).
_SLIDING_IF_SET = "afmoe gemma3 laguna llama4 mellum olmo2 plamo3 smallthinker".split()

_REASONS = {
    "it has recurrent layers": _RECURRENT,
    "it has an encoder": _ENCODER,
    "its attention is not causal": _NOT_CAUSAL,
    "it has a sliding window of its own": _ALWAYS_SLIDING,
    "it has no KV cache": _NO_KV_CACHE,
}
_REASON_OF = {arch: reason for reason, archs in _REASONS.items() for arch in archs}


class LayerCount(NamedTuple):
    """The layers of a model: those the file holds, all that llama.cpp makes of them, and of these the first ones, which the
    main graph runs (the others predict ahead)."""

    file: int
    all: int
    main: int


def layer_count(arch: str, metadata: Mapping[str, Typed]) -> LayerCount:
    """Counts layers as llama.cpp does.

    Raises:
        ValueError: the file doesn't say how many blocks there are.
    """
    blocks = _number(metadata, f"{arch}.block_count", 0)
    if blocks < 1:
        raise ValueError(f"{arch}.block_count: is missing or 0, must be the number of layers")
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
    window = _number(metadata, f"{arch}.attention.sliding_window", 0)
    # note: llama.cpp takes a Llama 4 without the key for one with chunked attention
    chunked = arch == "llama4" and f"{arch}.attention.sliding_window" not in metadata
    exaone_32b = arch == "exaone4" and layer_count(arch, metadata).main == 64
    if chunked or exaone_32b or (arch in _SLIDING_IF_SET and window > 0):
        return "it has a sliding window of its own"
    if _number(metadata, f"{arch}.attention.key_length_mla", 0) > 0:
        return "it uses multi-head latent attention (MLA)"
    if arch in _SPARSE:
        return "it has a sparse attention of its own"
    return None


def _number(metadata: Mapping[str, Typed], key: str, default: int) -> int:
    value: Any = metadata.get(key, Typed("", default)).value
    return value if isinstance(value, int) and not isinstance(value, bool) else default
