"""Layers that keep 16 bits in a quantized cache, as `Llama` has them: what it takes, what it says, whose states it takes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from support.native import FULL, PROMPT, STREAMING
from support.native import Model as NativeModel
from support.oracle import Subject
from support.tiny_checkpoint import N_LAYER, N_VOCAB, write_checkpoint

import lt_gguf
from lt_gguf.conversion import convert
from lt_gguf.evaluation.context import ScorerOptions
from lt_gguf.evaluation.scorer import Scorer
from lt_gguf.gguf.file import read_model
from lt_gguf.memory.kv import kv_memory
from lt_gguf.memory.prompt import prompt_memory
from lt_gguf.spec import AutoSpec, StreamingSpec, with_cache_keep
from lt_gguf.spec.cache_types import cache_type

SINK, WINDOW = 2, 40
PROMPT_TOKENS = np.random.default_rng(0).integers(3, N_VOCAB, 400).tolist()
SETTINGS = {"n_ctx": 1024, "n_batch": 32, "n_ubatch": 8, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
Q4 = {"type_k": cache_type("q4_0").ggml_type, "type_v": cache_type("q4_0").ggml_type, "flash_attn": True}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """A hybrid whose heads of 32 can be quantized; its odd layers stream."""
    folder = tmp_path_factory.mktemp("kept")
    checkpoint = write_checkpoint(folder, head_dim=32)
    options = {"outtype": "f32", "select": "interleave-odd", "sink": SINK, "window": WINDOW, "no_report": True}
    return convert(checkpoint, folder / "kept.gguf", **options).files[0]


def load(path: Path, **settings) -> lt_gguf.Llama:
    return lt_gguf.Llama(str(path), **(SETTINGS | Q4 | settings))


@pytest.mark.parametrize(
    "streaming, said, expected",
    [
        (None, None, "layers=1,3;sink=2;window=40;prefill=full;cache_keep=0"),
        (None, "layers=2;cache_keep=1", "layers=2;sink=2;window=40;prefill=full;cache_keep=0"),
        ("off", None, "off;cache_keep=0"),
        ("window=9;cache_keep=3", None, "layers=1,3;sink=2;window=9;prefill=full;cache_keep=0"),
        (StreamingSpec((2,), N_LAYER), None, "layers=2;sink=4;window=1020;prefill=full;cache_keep=0"),
    ],
)
def test_it_goes_with_whatever_says_what_streams(file, monkeypatch, streaming, said, expected):
    monkeypatch.setenv("LT_STREAMING", said or "")
    llm = load(file, streaming=streaming, cache_keep="0")
    spec = StreamingSpec.parse(expected, N_LAYER)
    assert llm.cache_keep == (0,) and str(llm.streaming or spec.without_streaming()) == expected
    shape = read_model(file).kv_shape
    expected_kv = kv_memory(shape, spec, 1024, type_k="q4_0", n_ubatch=8)
    assert llm.kv_bytes()["full"] == expected_kv.full and llm.kv_bytes()["streaming"] == expected_kv.streaming
    without = kv_memory(shape, StreamingSpec.parse(expected.replace(";cache_keep=0", ""), N_LAYER), 1024, type_k="q4_0", n_ubatch=8)
    assert expected_kv.full - without.full == 1024 * 2 * 2 * 32 * (2 - 18 / 32)  # of layer 0, K and V of two heads of 32
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.cache_keep == (0,)
    for one in (llm, copy):
        one.close()


def test_left_out_it_is_what_the_spec_says(file, monkeypatch):
    monkeypatch.setenv("LT_STREAMING", "cache_keep=1-2")
    for given, expected in ((None, (1, 2)), ("none", ()), ([3, 0], (0, 3)), ("all", (0, 1, 2, 3))):
        llm = load(file, cache_keep=given)
        assert llm.cache_keep == expected and llm.streaming is not None
        llm.close()


def test_layers_that_are_chosen_for_the_prompt(file):
    llm = load(file, streaming="auto:0.5", cache_keep="0,2", n_ctx=512)
    llm.eval(PROMPT_TOKENS)
    assert llm.cache_keep == (0, 2) and llm.streaming is not None and len(llm.streaming.layers) == 2
    assert np.isfinite(llm.lazy_ratios(PROMPT_TOKENS[:100], sink=2, window=9)).all()
    llm.close()


@pytest.mark.parametrize(
    "given, message",
    [
        ("4", 'streaming: cache_keep = "4": must be "all", "none", or layers and ranges of layers from 0 to 3'),
        ("1;2", 'streaming: "2": must be "off" or key=value pairs'),
        ([9], 'streaming: cache_keep = "9": must be'),
        (["a"], "cache_keep = 'a': must be an integer"),
        (0, "cache_keep = 0: must be numbers of layers, or a text as in"),
    ],
)
def test_what_it_is_not(file, given, message):
    with pytest.raises(ValueError) as error:
        load(file, cache_keep=given)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [None, "off"])
def test_a_state_of_other_types_is_refused(file, streaming):
    kept, plain = load(file, streaming=streaming, cache_keep=[0]), load(file, streaming=streaming)
    kept.eval(PROMPT_TOKENS)
    state = kept.save_state()
    with pytest.raises(RuntimeError, match="the state doesn't fit this context: .*(cache_keep|type)") as error:
        plain.load_state(state)
    assert "\n" not in str(error.value) and plain.n_tokens == 0
    kept.load_state(state)
    assert kept.n_tokens == len(PROMPT_TOKENS)
    for llm in (kept, plain):
        llm.close()


def test_scorers_keep_them(file):
    """With a context for each spec and with one for all."""
    request = [(PROMPT_TOKENS[:200], PROMPT_TOKENS[200:220])]
    found = {}
    for name, type_, keep in (("f16", "f16", None), ("kept", "q4_0", "all"), ("q4_0", "q4_0", None)):
        for reads_once in (False, True):
            options = ScorerOptions(n_parallel=1, n_threads=1, n_batch=64, cache_type_k=type_, cache_type_v=type_, cache_keep=keep)
            with Scorer(file, "off", options, reads_once=reads_once) as scorer:
                off = next(scorer.logprobs(request))
                scorer.with_streaming(None)
                assert scorer.spec is not None and scorer.spec.cache_keep == ((0, 1, 2, 3) if keep else ())
                found[name, reads_once] = off, next(scorer.logprobs(request))
    for i in range(2):
        for reads_once in (False, True):
            np.testing.assert_array_equal(found["kept", reads_once][i], found["f16", reads_once][i])
            assert np.abs(found["q4_0", reads_once][i] - found["f16", reads_once][i]).max() > 1e-3


def test_a_model_whose_cache_is_of_another_kind_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path, "gemma2")
    file = convert(checkpoint, tmp_path / "gemma2.gguf", outtype="f32", layers="none", no_report=True).files[0]
    with NativeModel(file) as model:
        model.set_streaming("off;cache_keep=none")
        with pytest.raises(ValueError, match='"gemma2" can\'t keep layers of their cache in 16 bits: it has a sliding window'):
            model.set_streaming("off;cache_keep=0")


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject.build("llama", N_LAYER, tmp_path_factory.mktemp("kept-sizes"))


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("type_", [None, "q8_0"])
@pytest.mark.parametrize("kept", [(0,), (1, 2), (0, 1, 2, 3)])
@pytest.mark.parametrize("layers", [(), (1, 3), (0, 1, 2, 3)])
def test_bytes_are_those_of_the_formula(subject, kv, type_, kept, layers):
    spec = StreamingSpec(layers, N_LAYER, 4, 60, "full", type_ if layers else None, kept)
    shape = read_model(subject.native.path).kv_shape
    with subject.context(spec, n_ctx=2048, n_batch=64, n_ubatch=64, kv=kv, flash=True) as context:
        expected = kv_memory(shape, spec, 2048, type_k=kv, n_ubatch=64)
        assert (context.kv_bytes(FULL), context.kv_bytes(STREAMING), 0) == expected
        context.prompt_begin(1500)
        prompt = prompt_memory(shape, spec, 1500, n_embd=128, n_ctx=2048, type_k=kv, n_ubatch=64)
        assert context.kv_bytes(PROMPT) == prompt.batches


@pytest.mark.parametrize("kept", ["0", "1", "0-1"])
def test_bytes_of_a_prompt_that_is_read_layer_by_layer(subject, kept):
    """One layer at a time, of which those that are kept are the larger ones."""
    spec = StreamingSpec.parse(f"layers=0-2;sink=4;window=60;type=q4_0;cache_keep={kept}", N_LAYER)
    shape = read_model(subject.native.path).kv_shape
    with subject.context(spec, n_ctx=2048, n_batch=2048, n_ubatch=64, kv="q8_0", flash=True) as context:
        context.read_prompt(np.full(100, 5))  # whether the graph can be cut between layers is known only then
        context.clear()
        context.prompt_begin(1500)
        whole = prompt_memory(shape, spec, 1500, n_embd=128, n_ctx=2048, type_k="q8_0", n_ubatch=64).whole
        assert context.kv_bytes(PROMPT) == whole


def test_with_cache_keep():
    spec = StreamingSpec((1,), N_LAYER, cache_keep=(2,))
    assert with_cache_keep(spec, None) is spec
    assert with_cache_keep(spec, "0,3") == StreamingSpec((1,), N_LAYER, cache_keep=(0, 3))
    assert with_cache_keep(AutoSpec(0.5), [1]) == f"{AutoSpec(0.5)};cache_keep=1"
    assert with_cache_keep("auto:0.5", "0") == "auto:0.5;cache_keep=0"
    assert with_cache_keep("cache_keep=1; window=9", ()) == " window=9;cache_keep=none"
