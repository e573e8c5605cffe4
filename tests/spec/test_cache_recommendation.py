"""What a file recommends for its KV cache: its GGUF keys, what they can't say, and whom it warns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_gguf.spec import CacheRecommendation, CacheTypes, Typed
from lt_gguf.spec.cache_keep import says_cache_keep
from lt_gguf.spec.cache_types import CACHE_TYPES
from lt_gguf.spec.streaming import StreamingSpec

N_LAYER = 4
Q8_Q4, Q4 = CacheTypes("q8_0", "q4_0"), CacheTypes("q4_0", "q4_0")
FOUND = CacheRecommendation(N_LAYER, Q8_Q4, (0, 2), (Q4,))
PREFIX = "llama.attention.cache."

types = st.builds(CacheTypes, st.sampled_from(list(CACHE_TYPES)), st.sampled_from(list(CACHE_TYPES)))


@given(types, st.sets(st.integers(0, N_LAYER - 1)), st.lists(types))
def test_metadata_give_the_same_back(chosen, keep, breaks):
    found = CacheRecommendation(N_LAYER, chosen, tuple(keep), tuple(one for one in breaks if one != chosen))
    metadata = found.to_metadata("llama")
    assert CacheRecommendation.from_metadata(metadata, "llama", N_LAYER) == found
    assert CacheRecommendation.from_metadata(metadata, "qwen2", N_LAYER) is None
    assert CacheTypes.parse(str(chosen)) == chosen


def test_keys_are_those_of_the_file_format():
    assert FOUND.to_metadata("llama") == {
        "llama.attention.cache.version": Typed("uint32", 1),
        "llama.attention.cache.type_k": Typed("string", "q8_0"),
        "llama.attention.cache.type_v": Typed("string", "q4_0"),
        "llama.attention.cache.keep": Typed("array of bool", [True, False, True, False]),
        "llama.attention.cache.breaks": Typed("array of string", ["q4_0"]),
    }
    least = [f"phi3.attention.cache.{key}" for key in ("version", "type_k", "type_v")]
    assert list(CacheRecommendation(N_LAYER).to_metadata("phi3")) == least


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("version", None, "version: is missing, must be the uint32 1"),
        ("version", Typed("string", "1"), "version = 1 (string): must be the uint32 1"),
        ("version", Typed("uint32", 0), "version = 0: must be the uint32 1"),
        ("version", Typed("uint32", 2), "version = 2: is of a newer lt-gguf, this one knows 1: update it, or remove what"),
        ("type_k", None, "type_k: is missing, must be one of f32, f16"),
        ("type_k", Typed("string", "q9"), 'type_k = "q9": must be one of f32, f16'),
        ("type_v", Typed("uint32", 8), "type_v = 8 (uint32): must be one of f32, f16"),
        ("type_v", Typed("string", ""), 'type_v = "": must be one of f32, f16'),
        (
            "keep",
            Typed("array of bool", [True] * 3),
            "keep = [array of 3 bool]: must be an array of bool, one for each of the 4 layers",
        ),
        ("keep", Typed("array of bool", None), "keep = [array of many bool]: must be an array of bool, one for each of the 4"),
        ("keep", Typed("array of uint32", [0]), "keep = (array of uint32): must be an array of bool, one for each of the 4 layers"),
        ("breaks", Typed("string", "q4_0"), "breaks = q4_0 (string): must be an array of strings"),
        ("breaks", Typed("array of string", ["q4_0", "q3"]), 'breaks: cache type = "q3": must be one of f32'),
        (
            "breaks",
            Typed("array of string", ["f16/f16/f16"]),
            'breaks: cache type = "f16/f16/f16": must be one type, or those of K and',
        ),
        ("breaks", Typed("array of string", None), "breaks = [array of many strings]: must be an array of strings"),
    ],
)
def test_bad_metadata_are_named_by_key(key, value, complaint):
    metadata = FOUND.to_metadata("llama")
    del metadata[PREFIX + key]
    if value is not None:
        metadata[PREFIX + key] = value
    with pytest.raises(ValueError) as error:
        CacheRecommendation.from_metadata(metadata, "llama", N_LAYER)
    assert str(error.value).startswith(PREFIX + complaint) and "\n" not in str(error.value)


def test_what_a_later_version_adds_is_not_taken_for_nothing():
    with pytest.raises(ValueError, match="cache.version: is missing"):
        CacheRecommendation.from_metadata({f"{PREFIX}type_q": Typed("string", "f16")}, "llama", N_LAYER)


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"types": CacheTypes("f16", "q3")}, 'cache type = "q3": must be one of'),
        ({"breaks": (CacheTypes("q3", "f16"),)}, 'cache type = "q3": must be one of'),
        ({"keep": (4,)}, "keep = 4: must be an integer from 0 to 3"),
    ],
)
def test_what_it_is_not(fields, complaint):
    with pytest.raises(ValueError, match=complaint):
        CacheRecommendation(N_LAYER, **fields)


@pytest.mark.parametrize(
    "asked, keep, warns",
    [
        (Q4, (), True),
        (Q4, (0, 2), True),  # that the model does with these in 16 bits, too, nobody says
        (Q8_Q4, (), False),
        (CacheTypes("q4_0", "q8_0"), (), False),
        (CacheTypes("f16", "f16"), (), False),
    ],
)
def test_whom_it_warns(asked, keep, warns):
    expected = "a KV cache of type q4_0 breaks this model, says its file, which recommends K q8_0, V q4_0, 16 bits in layers 0,2"
    assert [FOUND.warning(asked, keep, streams) for streams in (True, False)] == [expected if warns else None] * 2


def test_what_is_recommended_may_break_the_model_without_the_layers_that_are_kept():
    found = CacheRecommendation(N_LAYER, Q4, (0,), (Q4,))
    assert [found.warning(Q4, keep, True) is None for keep in ((), (1,), (0,), (0, 3))] == [False, False, True, True]
    found.check(None)


def test_what_is_recommended_may_break_the_model_where_nothing_streams():
    found = CacheRecommendation(N_LAYER, Q4, (), (Q4,))
    found.check(StreamingSpec((1,), N_LAYER))
    assert found.warning(Q4, (), True) is None and "q4_0 breaks this model" in found.warning(Q4, (), False)
    for spec in (None, StreamingSpec.off(N_LAYER)):
        with pytest.raises(ValueError, match="cache type = q4_0: is recommended and breaks the model, must not be both"):
            found.check(spec)


def test_what_is_said_of_it():
    assert str(FOUND) == "K q8_0, V q4_0, 16 bits in layers 0,2; q4_0 breaks the model"
    both = CacheRecommendation(N_LAYER, CacheTypes("q8_0", "q8_0"), (1,), (Q4, Q8_Q4, Q4))
    assert str(both) == "q8_0, 16 bits in layer 1; q4_0 and q8_0/q4_0 break the model"
    assert str(CacheRecommendation(N_LAYER)) == "f16"


def test_changed():
    changed = CacheRecommendation.changed
    assert changed(None, N_LAYER, None, None, None) is None and changed(FOUND, N_LAYER, None, None, None) is FOUND
    assert changed(None, N_LAYER, "q8_0/q4_0", (0, 2), "q4_0") == FOUND
    assert changed(FOUND, N_LAYER, "f16", None, None) == CacheRecommendation(N_LAYER, keep=(0, 2), breaks=(Q4,))
    assert changed(FOUND, N_LAYER, None, (), "none") == CacheRecommendation(N_LAYER, Q8_Q4)
    assert changed(FOUND, N_LAYER, None, None, " q4_0/q8_0, iq4_nl").breaks == (
        CacheTypes("q4_0", "q8_0"),
        CacheTypes("iq4_nl", "iq4_nl"),
    )
    for bad in ({"types": "q9"}, {"breaks": ""}):
        with pytest.raises(ValueError):
            changed(FOUND, N_LAYER, **{"types": None, "keep": (), "breaks": None} | bad)


def test_whether_layers_are_named_that_keep_16_bits(monkeypatch):
    monkeypatch.setenv("LT_STREAMING", "window=9; cache_keep = none")
    assert says_cache_keep(None) and says_cache_keep("off;cache_keep=0") and says_cache_keep(StreamingSpec((), 2, cache_keep=(1,)))
    assert not says_cache_keep("off") and not says_cache_keep(StreamingSpec((), 2)) and not says_cache_keep("auto:0.5")
    monkeypatch.delenv("LT_STREAMING")
    assert not says_cache_keep(None)
