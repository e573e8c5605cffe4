"""transformers with a quantized KV cache in some layers: keys and values after RoPE rounded by gguf's own routines, and the queries
that meet them as llama.cpp's CPU backend rounds them. (It stays below what upstream's rotation needs: heads of 64.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import gguf
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lt_gguf.hf import streaming_attention

TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
CLOSER = {"q8_0": 0.6, "q4_0": 0.3}  # than any other rounding; what is left is 16 bits' own, which q8_0 isn't far above


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    return torch.from_numpy(gguf.dequantize(gguf.quantize(x.contiguous().numpy(), TYPES[name]), TYPES[name]))


@contextmanager
def quantized(monkeypatch: pytest.MonkeyPatch, name: str, layers: Collection[int]) -> Iterator[None]:
    """transformers' caches of these layers have that type."""

    def attention(module, query, key, value, *arguments, **settings):
        if module.layer_idx in layers:
            query, key, value = rounded(query, "q8_0"), rounded(key, name), rounded(value, name)
        return sdpa_attention_forward(module, query, key, value, *arguments, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(streaming_attention, "sdpa_attention_forward", attention)
        yield
