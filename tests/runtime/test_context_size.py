"""`n_ctx="auto"`: the largest context that fits what is free, a prompt that fills it counted."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from support.llama import answer, load, text
from support.talkie import write_talkie
from support.tiny_checkpoint import write_checkpoint

from lt_gguf.conversion import convert
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.budget import largest_context
from lt_gguf.memory.prompt import prompt_memory
from lt_gguf.runtime import context_size
from lt_gguf.runtime.rewinding import RewindingLlama
from lt_gguf.spec import AutoSpec, StreamingSpec

N_LAYER = 8
ALL = StreamingSpec(tuple(range(N_LAYER)), N_LAYER, 2, 40, "full")
HALF = StreamingSpec((0, 1, 2, 3), N_LAYER, 2, 40, "full")
ODD = StreamingSpec((1, 3, 5, 7), N_LAYER, 2, 40, "stream")
TYPES = {"type_k": "f32", "type_v": "f32", "n_ubatch": 16, "flash_attn": False}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A hybrid model whose odd layers stream."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    write_checkpoint(folder, num_hidden_layers=N_LAYER)
    options = {"outtype": "f32", "select": "interleave-odd", "sink": 2, "window": 40, "prefill": "stream"}
    return convert(folder, folder / "tiny.gguf", **options).files[0]


def free_for(monkeypatch, file, n_ctx: int, spec: StreamingSpec | None = ALL, whole: bool = True) -> int:
    """Makes as much memory free as a context needs; returns what is left of it for prompts."""
    described = read_model(file)

    def largest(n_bytes: int) -> tuple[int, int]:
        model = {"n_embd": described.n_embd, "n_head": described.n_head[0], "whole": whole}
        return largest_context(described.kv_shape, spec, n_bytes, 2048, **model, **TYPES)

    low, high = 0, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if largest(middle)[0] >= n_ctx else (middle, high)
    monkeypatch.setattr(context_size, "available_memory", lambda: high + described.n_bytes + (768 << 20))
    return largest(high)[1]


def test_as_large_as_it_was_trained_for(file, monkeypatch):
    for available in (None, 1 << 40):
        monkeypatch.setattr(context_size, "available_memory", lambda available=available: available)
        assert load(file, n_ctx="auto").n_ctx() == 2048
    monkeypatch.setattr(context_size, "available_memory", lambda: 1 << 20)
    assert load(file, n_ctx="auto").n_ctx() == 1024  # the least that is tried


def test_a_prompt_that_fills_it_can_be_read(file, monkeypatch):
    left = free_for(monkeypatch, file, 2048)
    llm = load(file, "by_layer", streaming=ALL, n_ctx="auto")
    assert llm.n_ctx() == 2048
    need = prompt_memory(read_model(file).kv_shape, ALL, 2048, n_embd=64, type_k="f32", n_ubatch=16, flash_attn=False)
    assert llm.__getstate__()["prompt_limit"] == left and need.whole <= left < need.batches
    assert llm.reads_by_layer(2047) and llm.reads_by_layer(1500)
    assert answer(llm, text(2000), 2)
    with pytest.raises(ValueError, match="a prompt of 2000 tokens needs .* the limit is"):
        load(file, "prefill_full", streaming=ALL, prompt_limit=left).eval(text(2000))
    assert pickle.loads(pickle.dumps(llm)).__getstate__()["prompt_limit"] == left


def test_a_limit_that_is_given_stays(file, monkeypatch):
    free_for(monkeypatch, file, 2048)
    llm = load(file, "by_layer", streaming=ALL, n_ctx="auto", prompt_limit=12345)
    assert llm.__getstate__()["prompt_limit"] == 12345
    monkeypatch.setenv("LT_PROMPT_LIMIT", "1")
    assert load(file, "by_layer", streaming=ALL, n_ctx="auto").__getstate__()["prompt_limit"] is None


def test_what_is_read_in_batches_gets_a_smaller_one(file, monkeypatch):
    free_for(monkeypatch, file, 2048)
    asks_all = load(file, streaming=ALL, n_ctx="auto", logits_all=True)  # such a prompt isn't read layer by layer
    assert asks_all.n_ctx() == 1024
    left = free_for(monkeypatch, file, 2048, whole=False)
    asks_all = load(file, streaming=ALL, n_ctx="auto", logits_all=True)
    assert asks_all.n_ctx() == 2048 and asks_all.__getstate__()["prompt_limit"] == left
    asks_all.eval(text(2000))
    assert asks_all.n_tokens == 2000


def test_a_model_that_cannot_be_read_layer_by_layer_gets_a_smaller_one(file, monkeypatch, tmp_path):
    """Which nobody knows before it is loaded."""
    talkie = write_talkie(tmp_path / "talkie.gguf", file)
    left = free_for(monkeypatch, talkie, 2048)
    llm = load(talkie, "by_layer", streaming=ALL, n_ctx="auto")
    assert llm.n_ctx() == 1024 and llm.__getstate__()["prompt_limit"] > left
    assert len(answer(llm, text(1000), 3)) == 3


@pytest.mark.parametrize(
    "streaming, spec",
    [
        ("off", None),
        ("auto:0.5", HALF),  # so many stay full, whichever they are
        (AutoSpec(0.5), replace(HALF, sink=4, window=1020)),
        ("auto:0.1", None),  # of eight layers none
        (None, ODD),  # the file's
        ("prefill=full", replace(ODD, prefill="full")),
        (ALL, ALL),
    ],
)
def test_what_streams_counts(file, monkeypatch, streaming, spec):
    left = free_for(monkeypatch, file, 2048, spec)
    llm = load(file, "by_layer", streaming=streaming, n_ctx="auto")
    assert llm.n_ctx() == 2048 and llm.__getstate__()["prompt_limit"] == (left if spec and spec.prefill == "full" else None)
    enough = context_size.available_memory()
    monkeypatch.setattr(context_size, "available_memory", lambda: enough - 1)
    assert load(file, "by_layer", streaming=streaming, n_ctx="auto").n_ctx() == 1024


def test_what_the_environment_says_counts(file, monkeypatch):
    free_for(monkeypatch, file, 2048)
    monkeypatch.setenv("LT_STREAMING", "layers=all;prefill=full")
    assert load(file, "by_layer", streaming=None, n_ctx="auto").n_ctx() == 2048
    monkeypatch.setenv("LT_STREAMING", "off")
    assert load(file, "by_layer", streaming=None, n_ctx="auto").n_ctx() == 1024


def test_where_memory_is_short_a_smaller_one_is_tried(file, monkeypatch):
    sizes, init = [], RewindingLlama.__init__

    def short(self, *args, n_ctx: int, **kwargs) -> None:
        sizes.append(n_ctx)
        init(self, *args, n_ctx=n_ctx, **kwargs)  # made all the same, so that there is something to free
        if n_ctx > 1024:
            raise ValueError("Failed to create llama_context")

    monkeypatch.setattr(RewindingLlama, "__init__", short)
    llm = load(file, n_ctx="auto")
    assert sizes == [2048, 1024] and len(answer(llm, text(100), 3)) == 3
    with pytest.raises(ValueError, match="Failed to create llama_context"):
        load(file, n_ctx=2048)


def test_what_is_no_model(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="a.gguf"):
        load(tmp_path / "a.gguf", n_ctx="auto")
