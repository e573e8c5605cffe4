"""What a file recommends for its KV cache, as `Llama` takes it: its types, the layers in 16 bits, and what is said where it can't be."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from support.tiny_checkpoint import N_LAYER, N_VOCAB, write_checkpoint

import lt_gguf
from lt_gguf.conversion import convert
from lt_gguf.gguf.file import read_model
from lt_gguf.gguf.flagging import flag
from lt_gguf.memory.kv import kv_memory
from lt_gguf.runtime import context_size
from lt_gguf.runtime.cache_choice import CacheTypeWarning
from lt_gguf.runtime.kept_states import identity
from lt_gguf.spec import AutoSpec, CacheRecommendation, CacheTypes, StreamingSpec
from lt_gguf.spec.cache_types import PLAIN, cache_type

PROMPT = np.random.default_rng(0).integers(3, N_VOCAB, 200).tolist()
SETTINGS = {"n_ctx": 1024, "n_batch": 64, "n_ubatch": 8, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
Q8_Q4, Q4, Q8 = CacheTypes("q8_0", "q4_0"), CacheTypes("q4_0", "q4_0"), CacheTypes("q8_0", "q8_0")
STREAMS = StreamingSpec((1, 3), N_LAYER, 2, 40)
NUMBERS = {name: cache_type(name).ggml_type for name in ("f16", "q8_0", "q4_0")}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """An ordinary model whose heads of 32 can be quantized."""
    folder = tmp_path_factory.mktemp("recommended")
    checkpoint = write_checkpoint(folder, head_dim=32)
    return convert(checkpoint, folder / "plain.gguf", outtype="f32", layers="none", no_report=True).files[0]


@pytest.fixture(scope="module")
def file(plain) -> Path:
    """A hybrid that recommends K q8_0, V q4_0 and layer 2 in 16 bits, and says that q4_0 breaks it."""
    return flag(plain, plain.with_name("hybrid.gguf"), STREAMS, recommended=CacheRecommendation(N_LAYER, Q8_Q4, (2,), (Q4,)))[0]


def load(path: Path, notes: tuple[str, ...] = (), **settings) -> lt_gguf.Llama:
    """The model, loaded with a warning for each of `notes`, which has its words, and none else."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        llm = lt_gguf.Llama(str(path), **SETTINGS | settings)
    assert len(said) == len(notes), [str(one.message) for one in said]
    for one, words in zip(said, notes):
        assert one.category is CacheTypeWarning and words in str(one.message) and "\n" not in str(one.message)
        assert one.filename == __file__
    return llm


def assert_cache(
    llm: lt_gguf.Llama, types: CacheTypes, keep: tuple[int, ...], spec: StreamingSpec = STREAMS, flash: bool = True
) -> None:
    """Its types, also by the bytes that are allocated."""
    assert (llm.cache_types, llm.cache_keep) == (types, keep)
    of = StreamingSpec(spec.layers, N_LAYER, spec.sink, spec.window, cache_keep=keep)
    settings = {"type_k": types.k, "type_v": types.v, "n_ubatch": 8, "flash_attn": flash}
    expected = kv_memory(read_model(Path(llm.model_path)).kv_shape, of, llm.n_ctx(), **settings)
    assert (llm.kv_bytes()["full"], llm.kv_bytes()["streaming"], 0) == expected


def test_who_asks_for_nothing_gets_it(file):
    llm = load(file)  # and flash attention, which llama_cpp.Llama has off where nobody says
    assert_cache(llm, Q8_Q4, (2,))
    llm.eval(PROMPT)
    copy = pickle.loads(pickle.dumps(llm))
    assert_cache(copy, Q8_Q4, (2,))
    for one in (llm, copy):
        one.close()


def test_a_file_that_recommends_nothing_has_f16(plain):
    llm = load(plain)
    assert_cache(llm, PLAIN, (), StreamingSpec.off(N_LAYER), flash=False)
    llm.close()


@pytest.mark.parametrize(
    "asked, keep, types, kept",
    [
        ({"type_k": "q8_0", "type_v": "q8_0"}, None, Q8, (2,)),  # what resists stays in 16 bits whatever the others have
        ({"type_k": "q8_0", "type_v": "q8_0"}, "none", Q8, ()),
        ({"type_k": "q8_0"}, [0], CacheTypes("q8_0", "f16"), (0,)),  # as llama_cpp.Llama does
        ({"type_k": "f16", "type_v": "f16"}, None, PLAIN, ()),
        ({}, "0", Q8_Q4, (0,)),
        ({}, (), Q8_Q4, ()),
    ],
)
def test_what_is_asked_for_goes_before_it(file, asked, keep, types, kept):
    llm = load(file, flash_attn=True, cache_keep=keep, **{name: NUMBERS[type_] for name, type_ in asked.items()})
    assert_cache(llm, types, kept)
    llm.close()


@pytest.mark.parametrize(
    "streaming, said, types, kept",
    [
        (None, "window=9", Q8_Q4, (2,)),
        (None, "window=9;cache_keep=none", Q8_Q4, ()),
        ("cache_keep=0", None, Q8_Q4, (0,)),
        ("layers=all", None, Q8_Q4, (2,)),
        (StreamingSpec((0, 1, 3), N_LAYER), None, Q8_Q4, (2,)),
        # a layer that streamed when they were measured would have them
        ("off", None, PLAIN, ()),
        (None, "off", PLAIN, ()),
        ("layers=0-1", None, PLAIN, ()),
        ("auto:0.5", None, PLAIN, ()),
        (AutoSpec(0.5), None, PLAIN, ()),
    ],
)
def test_it_holds_while_the_layers_stream_that_the_file_says(file, monkeypatch, streaming, said, types, kept):
    monkeypatch.setenv("LT_STREAMING", said or "")
    llm = load(file, streaming=streaming)
    assert (llm.cache_types, llm.cache_keep) == (types, kept)
    llm.close()


@pytest.mark.parametrize("streaming", ["layers=0", "auto:0.5"])
def test_it_holds_where_layers_stream_of_a_file_that_lets_none(plain, tmp_path, streaming):
    (path,) = flag(plain, tmp_path / "full.gguf", None, recommended=CacheRecommendation(N_LAYER, Q8))
    llm = load(path, streaming=streaming)
    assert llm.cache_types == Q8
    llm.eval(PROMPT)
    llm.close()


def test_without_flash_attention_v_has_16_bits(file):
    note = "V of the KV cache is f16, not q4_0 as the file recommends: that needs flash attention"
    llm = load(file, (note,), flash_attn=False)
    assert_cache(llm, CacheTypes("q8_0", "f16"), (2,), flash=False)
    llm.eval(PROMPT)
    llm.close()
    assert load(file, flash_attn=False, type_k=NUMBERS["f16"]).cache_types == PLAIN
    with pytest.raises(ValueError, match="quantized V cache requires flash_attn"):
        load(file, flash_attn=False, type_v=NUMBERS["q4_0"])


def test_a_type_that_breaks_the_model_is_warned_of(file):
    note = "a KV cache of type q4_0 breaks this model, says its file, which recommends K q8_0, V q4_0, 16 bits in layer 2"
    llm = load(file, (note,), type_k=NUMBERS["q4_0"], type_v=NUMBERS["q4_0"], flash_attn=True)
    assert_cache(llm, Q4, (2,))
    llm.close()
    load(file, type_k=NUMBERS["q4_0"], type_v=NUMBERS["q8_0"], flash_attn=True).close()


def test_a_type_that_needs_layers_in_16_bits_is_warned_of_without_them(plain, tmp_path):
    (path,) = flag(plain, tmp_path / "kept.gguf", STREAMS, recommended=CacheRecommendation(N_LAYER, Q4, (0, 2), (Q4,)))
    load(path).close()
    load(path, type_k=NUMBERS["q4_0"], type_v=NUMBERS["q4_0"], flash_attn=True).close()
    load(path, cache_keep="0-2").close()
    load(path, ("a KV cache of type q4_0 breaks this model",), cache_keep="0").close()


def test_a_type_that_breaks_the_full_model_alone_is_warned_of_where_it_is_that(plain, tmp_path):
    (path,) = flag(plain, tmp_path / "hybrid.gguf", STREAMS, recommended=CacheRecommendation(N_LAYER, Q4, (), (Q4,)))
    assert load(path).cache_types == Q4
    asked = {"type_k": NUMBERS["q4_0"], "type_v": NUMBERS["q4_0"], "flash_attn": True}
    load(path, **asked).close()
    load(path, ("a KV cache of type q4_0 breaks this model",), streaming="off", **asked).close()


def test_the_largest_context_counts_with_it(file, monkeypatch):
    asked = []
    monkeypatch.setattr(context_size, "largest_context", lambda *_, **settings: asked.append(settings) or (1024, 1 << 30))
    monkeypatch.setattr(context_size, "available_memory", lambda: 4 << 30)
    load(file, n_ctx="auto").close()
    assert {(one["type_k"], one["type_v"], one["flash_attn"]) for one in asked} == {("q8_0", "q4_0", True)}


def test_states_are_of_their_types(file, tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path))
    by_file, by_hand = load(file), load(file, type_k=NUMBERS["q8_0"], type_v=NUMBERS["q4_0"], flash_attn=True, cache_keep=[2])
    plain_types = load(file, type_k=NUMBERS["f16"], flash_attn=True)
    assert identity(by_file) == identity(by_hand) != identity(plain_types)
    by_file.eval(PROMPT)
    state = by_file.save_state()
    by_hand.load_state(state)
    with pytest.raises(RuntimeError, match="the state doesn't fit this context"):
        plain_types.load_state(state)
    for llm in (by_file, by_hand, plain_types):
        llm.close()


def test_what_cannot_be_read_is_one_line(file, tmp_path):
    newer = tmp_path / "newer.gguf"
    key = b"llama.attention.cache.version" + (4).to_bytes(4, "little")
    raw = file.read_bytes()
    assert raw.count(key + b"\1\0\0\0") == 1
    newer.write_bytes(raw.replace(key + b"\1\0\0\0", key + b"\2\0\0\0"))
    with pytest.raises(ValueError) as error:
        load(newer)
    complaint = "llama.attention.cache.version = 2: is of a newer lt-gguf"
    assert str(error.value).startswith(f"{newer}: {complaint}") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="streaming = 3: must be a StreamingSpec"):
        load(file, streaming=3)
    with pytest.raises(ValueError, match="streaming: .*layers"):
        load(file, streaming="layers=9")
