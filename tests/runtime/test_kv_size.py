"""The memory that the KV cache takes is what the specification's formula says."""

from __future__ import annotations

import re

import pytest
from support.families import COMMON
from support.native import FULL, KV_BYTES, PROMPT, STREAMING
from support.oracle import Subject

from lt_gguf.spec import StreamingSpec
from lt_gguf.spec.cache_types import streaming_cache_type

N_LAYER = 4
HEAD_DIM = COMMON["hidden_size"] // COMMON["num_attention_heads"]
VALUES_A_TOKEN = 2 * COMMON["num_key_value_heads"] * HEAD_DIM  # of a layer: K and V


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Subject:
    return Subject.build("llama", N_LAYER, tmp_path_factory.mktemp("kv-size"))


def padded(cells: int) -> int:
    return -(-cells // 256) * 256


@pytest.mark.parametrize(
    "kv, flash", [("f32", False), ("f16", False), ("f16", True), ("bf16", True), ("q8_0", True), ("q4_0", True)]
)
@pytest.mark.parametrize(
    "layers, sink, window, n_ctx, n_ubatch, n_seq, unified",
    [
        ([1, 3], 4, 1020, 16384, 512, 1, False),
        ([1, 3], 4, 1020, 16384, 512, 4, False),
        ([1, 3], 4, 1020, 16384, 512, 4, True),
        ([0, 1, 2, 3], 4, 60, 2048, 64, 1, False),
        ([2], 129, 1025, 4096, 100, 2, True),
        ([1, 3], 4, 1020, 700, 64, 1, False),  # the streaming part is never larger than the full one
        ([1, 3], 0, 1, 512, 1, 1, False),
        ([], 4, 60, 1024, 64, 1, False),
    ],
)
@pytest.mark.parametrize("prefill", ["stream", "full"])
def test_bytes_are_those_of_the_formula(model, prefill, kv, flash, layers, sink, window, n_ctx, n_ubatch, n_seq, unified):
    """In both modes: what `prefill = full` needs besides exists only while a prompt is read."""
    spec = StreamingSpec(tuple(layers), N_LAYER, sink, window, prefill)
    settings = dict(n_batch=n_ubatch, n_ubatch=n_ubatch, n_seq_max=n_seq, kv_unified=unified, kv=kv, flash=flash)
    with model.context(spec, n_ctx=n_ctx, **settings) as context:
        of_a_stream = padded(n_ctx if unified else -(-n_ctx // n_seq))
        n_streams = 1 if unified else n_seq
        held = padded(min(of_a_stream, (sink + window) * (n_seq if unified else 1) + n_ubatch))
        token_bytes, in_streaming = (int(VALUES_A_TOKEN * KV_BYTES[type_]) for type_ in (kv, streaming_cache_type(kv)))
        assert context.kv_bytes(FULL) == (N_LAYER - len(layers)) * of_a_stream * n_streams * token_bytes
        assert context.kv_bytes(STREAMING) == len(layers) * held * n_streams * in_streaming
        assert context.kv_bytes(PROMPT) == 0
        if layers:
            assert context.kv_cells(FULL) == of_a_stream
            assert context.kv_cells(STREAMING) == held
            assert context.kv_cells(STREAMING) < (sink + window) * (n_seq if unified else 1) + n_ubatch + 256


@pytest.mark.parametrize("swa_full", [True, False])
def test_swa_full_changes_nothing(model, swa_full):
    """It is true in llama.cpp's defaults, and would undo the whole saving."""
    spec = StreamingSpec((0, 1, 2, 3), N_LAYER, 4, 60, "stream")
    with model.context(spec, n_ctx=4096, n_batch=64, n_ubatch=64, swa_full=swa_full) as context:
        assert context.kv_cells(STREAMING) == 256


def test_the_log_says_both_sizes(model):
    with model.context(StreamingSpec((1, 3), N_LAYER, 4, 60, "stream"), n_ctx=2048, n_batch=64, n_ubatch=64) as context:
        log = "\n".join(context.log)
    assert re.search(r"full .*\b2048 cells", log)
    assert re.search(r"streaming .*\b256 cells.*layers=1,3;sink=4;window=60", log)


def test_n_swa_says_the_window(model):
    """llama-server makes checkpoints of models that report a window."""
    import llama_cpp

    assert llama_cpp.llama_model_n_swa(model.native.handle) == 0
    model.native.set_streaming("layers=1;sink=4;window=60")
    try:
        assert llama_cpp.llama_model_n_swa(model.native.handle) == 60
    finally:
        model.native.set_streaming(None)
