"""Bytes of a cache whose kinds of layers have types of their own. (That the runtime allocates as many: test_budget.py.)"""

from __future__ import annotations

import pytest

from lt_gguf.memory.kv import KVMemory, KVShape, cache_types_text, kv_memory
from lt_gguf.memory.prompt import prompt_memory
from lt_gguf.spec import StreamingSpec

SHAPE = KVShape((2, 2), 2, 32, 32)  # of K and V each 64 values a layer and token
SPEC = StreamingSpec((1,), 2, 4, 252)
CELLS = 768  # of 4 + 252 tokens and a micro-batch of 512


@pytest.mark.parametrize(
    "asked, type_k, type_v, expected",
    [
        (None, "q8_0", None, 2 * 64 * 2),  # streaming layers keep 16 bits
        (None, "q8_0", "f32", 64 * 2 + 64 * 4),
        (None, "f32", None, 2 * 64 * 4),
        ("q8_0", "f16", None, 2 * 64 * 34 / 32),
        ("q4_0", "q8_0", None, 2 * 64 * 18 / 32),
    ],
)
def test_streaming_layers_have_the_type_that_is_theirs(asked, type_k, type_v, expected):
    spec = StreamingSpec(SPEC.layers, SPEC.n_layer, SPEC.sink, SPEC.window, type=asked)
    found = kv_memory(SHAPE, spec, 4096, type_k=type_k, type_v=type_v)
    assert found.streaming == CELLS * expected
    assert found.full == kv_memory(SHAPE, None, 4096, type_k=type_k, type_v=type_v).total / 2


def test_layers_that_are_kept_count_in_16_bits():
    full = 4096 * 2 * 64
    kept = StreamingSpec((1,), 2, 4, 252, type="q8_0", cache_keep=(0, 1))
    assert kv_memory(SHAPE, kept, 4096, type_k="q4_0") == KVMemory(full * 2, CELLS * 2 * 64 * 2)
    assert kv_memory(SHAPE, kept.without_streaming(), 4096, type_k="q4_0") == KVMemory(full * 4, 0)
    assert prompt_memory(SHAPE, kept, 4096, n_embd=8, type_k="q4_0").batches == full * 2
    one = StreamingSpec((), 2, cache_keep=(1,))
    assert kv_memory(SHAPE, one, 4096, type_k="q4_0", type_v="f32") == KVMemory(4096 * 64 * (18 / 32 + 2 + 2 * 4), 0)


@pytest.mark.parametrize(
    "cache_type, spec, expected",
    [
        ("q8_0", None, "q8_0"),
        ("q8_0", SPEC, "q8_0, f16 in streaming layers"),
        ("f32", SPEC, "f32"),
        ("q8_0", StreamingSpec.off(2), "q8_0"),
        ("q4_0", StreamingSpec((), 4, cache_keep=(0,)), "q4_0, f16 in layer 0"),
        ("q4_0", StreamingSpec((1,), 4, cache_keep=(0, 1, 2)), "q4_0, f16 in streaming layers, f16 in layers 0,2"),
        ("q4_0", StreamingSpec((1,), 4, type="q4_0", cache_keep=(0, 1)), "q4_0, f16 in layers 0-1"),
        ("f16", StreamingSpec((1,), 4, cache_keep=(0, 1)), "f16"),
        ("q8_0/q4_0", None, "K q8_0, V q4_0"),
        ("q8_0/q4_0", StreamingSpec((1,), 4, cache_keep=(0, 1)), "K q8_0, V q4_0, f16 in streaming layers, f16 in layer 0"),
        (
            "f32/q4_0",
            StreamingSpec((1,), 4, cache_keep=(0,)),
            "K f32, V q4_0, K f32, V f16 in streaming layers, K f32, V f16 in layer 0",
        ),
    ],
)
def test_what_is_said_of_them(cache_type, spec, expected):
    assert cache_types_text(cache_type, spec) == expected


def test_layers_with_a_window_of_their_own():
    """They hold it and a micro-batch, whatever streams; their heads may be of another size."""
    shape = KVShape((2, 2, 2), 2, 32, 32, own_layers=(0, 2), own_window=100, own_head_sizes=(16, 16))
    cell, own = 2 * 64 * 2, 2 * 32 * 2  # bytes of K and V in f16
    spec = StreamingSpec((1,), 3, 4, 252)
    assert kv_memory(shape, None, 4096) == KVMemory(4096 * cell, 0, 2 * 768 * own)  # 100 + 512 cells, padded
    assert kv_memory(shape, spec, 4096) == KVMemory(0, CELLS * cell, 2 * 768 * own)
    assert kv_memory(shape, spec, 4096, n_seq_max=2, kv_unified=True).own == 2 * 768 * own
    assert kv_memory(shape, spec, 4096, n_seq_max=2).own == 2 * 2 * 768 * own
    assert kv_memory(shape, spec, 512).own == 2 * 512 * own
    assert kv_memory(shape, spec, 4096, flash_attn=False).own == 2 * 768 * (32 + 64) * 2  # V is as wide as in the widest layer
    # a prompt is not read layer by layer
    both = KVShape((2, 2, 2), 2, 32, 32, own_layers=(0,), own_window=100)
    prompt = prompt_memory(both, StreamingSpec((1, 2), 3, 4, 252), 4096, n_embd=8)
    assert prompt.whole == prompt.batches == 2 * 4096 * cell
