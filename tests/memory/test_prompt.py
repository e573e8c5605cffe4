"""Bytes that a long prompt takes while it is read, as computed and as the runtime allocates them."""

from __future__ import annotations

import pytest
from support.native import PROMPT
from support.oracle import Subject

from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import KVShape, streaming_cells
from lt_gguf.memory.prompt import PromptMemory, prompt_memory
from lt_gguf.spec import StreamingSpec

SHAPE = KVShape((2,) * 8, 2, 32, 32)  # of K and V each 64 values a layer and token
SPEC = StreamingSpec((1, 2, 3, 4, 5, 6), 8, 4, 60)


def test_sizes():
    token = 2 * 64 * 2
    assert prompt_memory(SHAPE, SPEC, 8192, n_embd=64) == PromptMemory(8192 * (token + 64 * 4), 6 * 8192 * token)
    # hidden states that take more than all layers
    assert prompt_memory(SHAPE, SPEC, 8192, n_embd=4096) == PromptMemory(6 * 8192 * token, 6 * 8192 * token)
    # whole cells of 256, one layer alone, a type of their own
    assert prompt_memory(SHAPE, SPEC, 8000, n_embd=64).whole == 8192 * token + 8000 * 64 * 4
    assert len({*prompt_memory(SHAPE, StreamingSpec((3,), 8, 4, 60), 8192, n_embd=64)}) == 1
    quantized = StreamingSpec(SPEC.layers, 8, 4, 60, type="q8_0")
    assert prompt_memory(SHAPE, quantized, 8192, n_embd=64).batches == 6 * 8192 * 2 * 64 * 34 // 32
    assert prompt_memory(SHAPE, SPEC, 8192, n_embd=64, type_k="q8_0").batches == 6 * 8192 * token


def test_what_takes_nothing():
    fits = streaming_cells(SPEC, 8192)
    assert (
        prompt_memory(SHAPE, SPEC, fits, n_embd=64, n_ctx=8192)
        == PromptMemory(0, 0)
        != prompt_memory(SHAPE, SPEC, fits + 1, n_embd=64, n_ctx=8192)
    )
    for spec in (None, StreamingSpec((), 8, 4, 60), StreamingSpec(SPEC.layers, 8, 4, 60, "stream")):
        assert prompt_memory(SHAPE, spec, 8192, n_embd=64) == PromptMemory(0, 0)
    with pytest.raises(ValueError, match="q3"):
        prompt_memory(SHAPE, SPEC, 8192, n_embd=64, type_k="q3")


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject.build("llama", 8, tmp_path_factory.mktemp("prompt"))


@pytest.mark.parametrize("layers", [(2,), (0, 3, 4), tuple(range(8))])
@pytest.mark.parametrize("kv", ["f32", "f16", "q8_0"])
def test_the_runtime_allocates_as_many(subject, layers, kv):
    described = read_model(subject.native.path)
    spec = StreamingSpec(layers, 8, 4, 60)
    for n_tokens in (255, 257, 700, 2000):
        expected = prompt_memory(
            described.kv_shape, spec, n_tokens, n_embd=described.n_embd, n_ctx=2304, type_k=kv, n_ubatch=64, flash_attn=True
        )
        for n_batch, n_bytes in ((n_tokens, expected.whole), (64, expected.batches)):
            with subject.context(spec, n_ctx=2304, n_batch=n_batch, n_ubatch=64, kv=kv, flash=True) as context:
                context.prompt_begin(n_tokens)
                assert context.kv_bytes(PROMPT) == n_bytes, (n_tokens, n_batch)
