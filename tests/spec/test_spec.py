"""StreamingSpec: its text, its rule, its GGUF keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lt_gguf.spec import AutoSpec, Provenance, StreamingSpec, Typed, format_layers, parse_layers, parse_running, runtime_text
from lt_gguf.spec.auto import LAZY
from lt_gguf.spec.cache_types import kept_cache_type, streaming_cache_type
from lt_gguf.spec.fields import is_auto
from lt_gguf.spec.keys import layers_key

N_LAYER = 12
CANONICAL = "layers=1,3,5-9;sink=4;window=1020;prefill=full"

specs = st.builds(
    StreamingSpec,
    layers=st.lists(st.integers(0, N_LAYER - 1), min_size=1).map(tuple),
    n_layer=st.just(N_LAYER),
    sink=st.integers(0, 2**31 - 1),
    window=st.integers(1, 2**31 - 1),
    prefill=st.sampled_from(["full", "stream"]),
)


@given(specs)
def test_text_and_metadata_give_the_same_spec_back(spec):
    assert StreamingSpec.parse(str(spec), N_LAYER) == spec
    assert StreamingSpec.from_metadata(spec.to_metadata("llama"), "llama", N_LAYER) == spec
    assert parse_layers(format_layers(spec.layers), N_LAYER) == spec.layers


def test_defaults_and_canonical_text():
    spec = StreamingSpec((9, 3, 1, 5, 6, 7, 8, 3), N_LAYER)
    assert str(spec) == CANONICAL
    assert spec.layers == (1, 3, 5, 6, 7, 8, 9)
    assert str(StreamingSpec.off(N_LAYER)) == "off"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("off", StreamingSpec.off(N_LAYER)),
        (" layers = 5 - 7 , 1 ; window = 9 ", StreamingSpec((1, 5, 6, 7), N_LAYER, window=9)),
        ("layers=all;sink=0", StreamingSpec(tuple(range(N_LAYER)), N_LAYER, sink=0)),
        ("layers=none;sink=2", StreamingSpec((), N_LAYER, sink=2)),
        ("prefill=full;layers=0", StreamingSpec((0,), N_LAYER, prefill="full")),
    ],
)
def test_parse(text, expected):
    assert StreamingSpec.parse(text, N_LAYER) == expected


def test_parse_takes_missing_keys_from_the_base():
    base = StreamingSpec((2,), N_LAYER, sink=7, window=64, prefill="full")
    assert StreamingSpec.parse("window=9", N_LAYER, base) == StreamingSpec((2,), N_LAYER, 7, 9, "full")
    assert StreamingSpec.parse("layers=0-1", N_LAYER, base) == StreamingSpec((0, 1), N_LAYER, 7, 64, "full")
    assert StreamingSpec.parse("off", N_LAYER, base) == StreamingSpec.off(N_LAYER)


def test_a_cache_type_is_kept_but_in_no_file():
    spec = StreamingSpec.parse("layers=1,3;type=q8_0", N_LAYER)
    assert spec.type == "q8_0" and str(spec).endswith(";type=q8_0")
    assert StreamingSpec.parse(str(spec), N_LAYER) == spec
    assert StreamingSpec.parse("window=9", N_LAYER, spec).type == "q8_0"
    assert ";type" not in spec.hide_text()  # a context that only hides has one type for all layers
    with pytest.raises(ValueError, match="type = q8_0: a file has no key for it, must be given when it runs"):
        spec.to_metadata("llama")


@pytest.mark.parametrize(
    "full, given, expected",
    [("f32", None, "f32"), ("bf16", None, "bf16"), ("q8_0", None, "f16"), ("q4_0", None, "f16"), ("q4_0", "q8_0", "q8_0")],
)
def test_the_cache_type_of_streaming_layers(full, given, expected):
    assert streaming_cache_type(full, given) == expected


@given(specs, st.lists(st.integers(0, N_LAYER - 1)).map(tuple))
def test_layers_that_keep_16_bits_are_kept_but_in_no_file(spec, keep):
    for one in (replace(spec, cache_keep=keep), replace(StreamingSpec.off(N_LAYER), cache_keep=keep)):
        assert one.cache_keep == tuple(sorted(set(keep)))
        assert StreamingSpec.parse(str(one), N_LAYER) == one
        assert (";cache_keep=" in str(one)) == bool(keep) and "cache_keep" not in one.hide_text()
        assert one.without_streaming() == replace(StreamingSpec.off(N_LAYER), cache_keep=keep)
        if keep:
            with pytest.raises(
                ValueError,
                match="cache_keep = [0-9,-]+: a file's spec has no key for it, must be given when",
            ):
                one.to_metadata("llama")


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cache_keep=0", StreamingSpec.off(N_LAYER)),
        ("off;cache_keep=0", StreamingSpec.off(N_LAYER)),
        ("window=9;cache_keep=0", None),
    ],
)
def test_alone_they_leave_it_to_the_file_what_streams(text, expected):
    base = StreamingSpec((2,), N_LAYER, 7, 64)
    if expected is None:
        with pytest.raises(ValueError, match="says no layers"):
            StreamingSpec.parse(text, N_LAYER)
        expected = StreamingSpec((2,), N_LAYER, 7, 9)
        assert StreamingSpec.parse(text, N_LAYER, base) == replace(expected, cache_keep=(0,))
        return
    assert StreamingSpec.parse(text, N_LAYER) == replace(expected, cache_keep=(0,))
    assert StreamingSpec.parse(text, N_LAYER, base) == replace(expected if "off" in text else base, cache_keep=(0,))


@pytest.mark.parametrize("full, expected", [("f32", "f32"), ("bf16", "bf16"), ("f16", "f16"), ("q8_0", "f16"), ("q4_0", "f16")])
def test_the_cache_type_of_layers_that_are_kept(full, expected):
    assert kept_cache_type(full) == expected
    spec = StreamingSpec((1, 2), N_LAYER, type="q4_1", cache_keep=(0, 1))
    assert [spec.cache_type(il, full) for il in range(4)] == [expected, "f16", "q4_1", full]


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("", '"": must be "off" or key=value'),
        ("layers", '"layers": must be "off" or key=value'),
        ("layers=1;", '"": must be "off" or key=value'),
        ("layers=12", 'layers = "12": must be "all", "none", or layers and ranges of layers from 0 to 11'),
        ("layers=-1", 'layers = "-1"'),
        ("layers=5-3", 'layers = "5-3"'),
        ("layers=1,,2", 'layers = ""'),
        ("layers=1;layers=2", "layers: is given twice"),
        ("layers=1;sinks=2", "sinks: unknown key"),
        ("layers=1;sink=-1", "sink = -1: must be an integer from 0 to 2147483647"),
        ("layers=1;sink=four", 'sink = "four": must be an integer'),
        ("layers=1;window=0", "window = 0: must be an integer from 1"),
        ("layers=1;window=4294967296", "window = 4294967296: must be an integer from 1 to 2147483647"),
        ("layers=1;prefill=maybe", 'prefill = "maybe": must be "full" or "stream"'),
        ("layers=1;type=q6_K", 'type = "q6_K": must be one of f32, f16, bf16, q8_0'),
        ("sink=4", "says no layers"),
        ("layers=1;cache_keep=12", 'cache_keep = "12": must be "all", "none", or layers and ranges of layers from 0 to 11'),
        ("cache_keep=1-", 'cache_keep = "1-": must be "all"'),
        ("off;layers=1", "layers: can't be given with off, where no layer streams"),
        ("off;", '"": must be "off" or key=value'),
        ("auto:0.5", '"auto:0.5": chooses the layers while a prompt is read, must name them here'),
    ],
)
def test_bad_text_is_named_in_one_line(text, complaint):
    with pytest.raises(ValueError) as error:
        StreamingSpec.parse(text, N_LAYER)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "key, value, complaint",
    [
        ("layers", Typed("array of bool", [True] * 11), "[array of 11 bool]: must be an array of bool, one for each of the 12"),
        ("layers", Typed("array of int32", [1] * 12), "(array of int32): must be an array of bool"),
        ("layers", None, "is missing"),
        ("sink", Typed("int32", -1), "-1 (int32): must be an uint32"),
        ("sink", Typed("uint32", 2**32 - 1), "must be an integer from 0 to 2147483647"),
        ("window", Typed("uint32", 0), "window = 0: must be an integer from 1"),
        ("window", None, "is missing"),
        ("prefill", Typed("string", "half"), '"half": must be "full" or "stream"'),
        ("prefill", Typed("uint32", 1), "1 (uint32)"),
    ],
)
def test_bad_metadata_is_named_by_key(key, value, complaint):
    metadata = StreamingSpec((1,), N_LAYER).to_metadata("qwen2")
    key = f"qwen2.attention.streaming.{key}"
    metadata[key] = value
    if value is None:
        del metadata[key]
    with pytest.raises(ValueError) as error:
        StreamingSpec.from_metadata(metadata, "qwen2", N_LAYER)
    assert str(error.value).startswith(key)
    assert complaint in str(error.value)


def test_metadata_of_an_ordinary_file_or_another_architecture_is_no_spec():
    metadata = StreamingSpec((1,), N_LAYER).to_metadata("qwen2")
    assert StreamingSpec.from_metadata({}, "llama", N_LAYER) is None
    assert StreamingSpec.from_metadata(metadata, "llama", N_LAYER) is None


@pytest.mark.parametrize(
    "n_layer, fraction, layers",
    [
        (6, 0.5, (1, 3, 5)),
        (7, 0.5, (1, 3, 5)),
        (8, 0.25, (3, 7)),
        (9, 1 / 3, (2, 5, 8)),
        (4, 0, ()),
        (4, 1, (0, 1, 2, 3)),
        (10, 0.3, (3, 6, 9)),
        (80, 0.1, (9, 19, 29, 39, 49, 59, 69, 79)),
    ],
)
def test_interleaved(n_layer, fraction, layers):
    assert StreamingSpec.interleaved(n_layer, fraction).layers == layers


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan"), float("inf"), "0.5", True, None])
def test_bad_fraction(fraction):
    with pytest.raises(ValueError, match="fraction = .* must be a number from 0 to 1"):
        StreamingSpec.interleaved(8, fraction)


@pytest.mark.parametrize(
    "bad", [{"layers": (8,)}, {"layers": (-1,)}, {"layers": (1.5,)}, {"sink": -1}, {"window": 0}, {"prefill": ""}]
)
def test_bad_fields(bad):
    fields = {"layers": (1,), "n_layer": 8} | bad
    with pytest.raises(ValueError, match=next(iter(bad))):
        StreamingSpec(**fields)


@given(specs, st.integers(0, 300), st.integers(0, 300))
def test_visible_is_the_rule(spec, q, p):
    keys = set(range(min(spec.sink, q + 1))) | set(range(max(0, q - spec.window + 1), q + 1))
    assert spec.visible(q, p) == (p in keys)


def test_provenance_keys():
    provenance = Provenance("lazy-ratio", (0.25, 0.5), '{"samples": 8}')
    metadata = provenance.to_metadata()
    assert {key: type_ for key, (type_, _) in metadata.items()} == {
        "lighttransfer.version": "uint32",
        "lighttransfer.selection": "string",
        "lighttransfer.lazy_ratio": "array of float32",
        "lighttransfer.calibration": "string",
    }
    assert Provenance.from_metadata(metadata) == provenance
    assert Provenance.from_metadata({}) is None
    assert Provenance.from_metadata(Provenance("manual").to_metadata()) == Provenance("manual")


def test_keys_are_those_of_the_file_format():
    assert list(StreamingSpec((1,), 2).to_metadata("llama")) == [
        "llama.attention.streaming.layers",
        "llama.attention.streaming.sink",
        "llama.attention.streaming.window",
        "llama.attention.streaming.prefill",
    ]
    assert layers_key("phi3") == "phi3.attention.streaming.layers"


autos = st.builds(
    AutoSpec,
    fraction=st.integers(0, 1000).map(lambda n: n / 1000),
    sink=st.integers(0, 2**31 - 1),
    window=st.integers(1, 2**31 - 1),
    w_last=st.integers(1, 1024),
    lazy=st.sampled_from(LAZY),
    cache_keep=st.lists(st.integers(0, 511)).map(tuple),
)


@given(autos)
def test_auto_text_gives_the_same_spec_back(auto):
    assert AutoSpec.parse(str(auto)) == auto
    assert is_auto(str(auto)) and runtime_text(auto) == str(auto)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("auto:0.5", AutoSpec(0.5, 4, 1020, 16)),
        (" auto : 1 ; sink = 0", AutoSpec(1, 0)),
        ("auto=0.25;window=9;w_last=8", AutoSpec(0.25, 4, 9, 8)),
        ("auto=0.5;lazy=mean", AutoSpec(0.5, 4, 1020, 16, "mean")),
        ("lazy=min;auto=0.5", AutoSpec(0.5)),
        ("auto:0.5;cache_keep=2,0", AutoSpec(0.5, cache_keep=(0, 2))),
    ],
)
def test_parse_auto(text, expected):
    assert AutoSpec.parse(text) == expected


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("auto:", 'fraction = "": must be a number from 0 to 1'),
        ("auto:half", 'fraction = "half": must be a number from 0 to 1'),
        ("auto:1.5", "fraction = 1.5: must be a number from 0 to 1"),
        ("auto:nan", "fraction = nan: must be a number from 0 to 1"),
        ("auto=0.5;layers=1", "layers: are chosen for the prompt"),
        ("auto=0.5;prefill=stream", 'prefill = "stream": must be "full"'),
        ("auto=0.5;w_last=1025", "w_last = 1025: must be an integer from 1 to 1024"),
        ("auto=0.5;auto=0.5", "auto: is given twice"),
        ("auto=0.5;last=3", "last: unknown key"),
        ("auto=0.5;lazy=max", 'lazy = "max": must be "mean" or "min"'),
        ("auto=0.5;", '"": must be auto:0.5 or'),
        ("auto=0.5;cache_keep=all", 'cache_keep = "all": must be layers and ranges of layers'),
        ("auto=0.5;cache_keep=x", 'cache_keep = "x": must be'),
    ],
)
def test_bad_auto_text_is_named_in_one_line(text, complaint):
    with pytest.raises(ValueError) as error:
        AutoSpec.parse(text)
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_context_says():
    text = "auto=0.5;layers={};sink=2;window=40;prefill=full;w_last=16;lazy=mean"
    auto = AutoSpec(0.5, 2, 40, 16, "mean")
    assert parse_running(text.format("none"), N_LAYER) == (StreamingSpec((), N_LAYER, 2, 40, "full"), auto)
    assert parse_running(text.format("1,3-4"), N_LAYER) == (StreamingSpec((1, 3, 4), N_LAYER, 2, 40, "full"), auto)
    assert parse_running(CANONICAL, N_LAYER) == (StreamingSpec.parse(CANONICAL, N_LAYER), None)
    assert parse_running("off", N_LAYER) == (StreamingSpec.off(N_LAYER), None)


@pytest.mark.parametrize(
    "text, automatic",
    [("auto:0.5", True), (" auto = 1;sink=2", True), ("off", False), ("layers=1", False), ("automatic", False), ("auto", False)],
)
def test_is_auto(text, automatic):
    assert is_auto(text) == automatic
