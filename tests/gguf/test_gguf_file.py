"""What is read from a GGUF file: against gguf-py's own reader, and against the runtime for every architecture."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lt_gguf.gguf.file import check_can_stream, read_model
from lt_gguf.gguf.header import LONGEST_ARRAY_READ, read_header
from lt_gguf.memory.kv import KVMemory, KVShape, kv_memory
from lt_gguf.spec import CacheRecommendation, CacheTypes, StreamingSpec
from lt_gguf.spec.cache_types import CACHE_TYPES

N_LAYER = 4


def write_gguf(
    path: Path, arch: str = "llama", *, spec: StreamingSpec | None = None, n_tokens: int = 8, n_layer: int = N_LAYER, **keys: object
) -> Path:
    """A file of the architecture with metadata and one small tensor; `keys` are added below the architecture's name."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("a model")
    writer.add_block_count(n_layer)
    writer.add_context_length(2048)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list([f"<{i}>" for i in range(n_tokens)])
    for key, value in keys.items():
        key = f"{arch}.{key.replace('__', '.')}"
        add = {bool: writer.add_bool, int: writer.add_uint32, list: writer.add_array, str: writer.add_string}[type(value)]
        add(key, value)
    for key, (type_, value) in (spec.to_metadata(arch) if spec else {}).items():
        add = {"uint32": writer.add_uint32, "string": writer.add_string}.get(type_, writer.add_array)
        add(key, value)
    writer.add_tensor("token_embd.weight", np.zeros((8, 64), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_header_equals_that_of_gguf_py(tmp_path):
    spec = StreamingSpec((1, 3), N_LAYER)
    path = write_gguf(tmp_path / "a.gguf", spec=spec, n_tokens=LONGEST_ARRAY_READ + 1, numbers=[1, -2], words=["a", "ß"])
    header = read_header(path)
    reader = gguf.GGUFReader(path)
    fields = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    assert (header.version, header.n_tensors, header.size) == (3, 1, path.stat().st_size)
    for key, (type_, value) in header.metadata.items():
        types = [gguf_type.name.lower() for gguf_type in fields[key].types]
        assert type_ == (f"array of {types[1]}" if len(types) > 1 else types[0])
        if key == "tokenizer.ggml.tokens":
            assert value is None  # stepped over
        else:
            assert value == fields[key].contents()


@pytest.mark.parametrize("size", [0, 3, 4, 7, 23, 40, 100, 300])
def test_a_file_that_is_cut_off_is_named(tmp_path, size):
    path = write_gguf(tmp_path / "a.gguf", spec=StreamingSpec((1,), N_LAYER))
    with open(path, "r+b") as file:
        file.truncate(size)
    with pytest.raises(ValueError, match=r"a\.gguf: is (cut off|not a GGUF file)"):
        read_model(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_file_never_gives_anything_but_a_clear_error(tmp_path, data):
    path = tmp_path / "a.gguf"
    if not path.exists():
        recommended = CacheRecommendation(N_LAYER, CacheTypes("f32", "bf16"), (1,), (CacheTypes("q4_0", "q4_0"),))
        write_gguf(path, spec=StreamingSpec((1,), N_LAYER), **cache(recommended))
    header = bytearray(path.read_bytes()[:1500])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(header) - 8))
        number = data.draw(st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1))
        header[at : at + 8] = struct.pack("<Q", number)[: data.draw(st.integers(1, 8))].ljust(8, b"\0")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(header)
    try:
        read_model(damaged)
    except ValueError as error:
        assert str(error).startswith(str(damaged))
        assert "\n" not in str(error)


def test_description(tmp_path):
    spec = StreamingSpec((0, 2), N_LAYER, sink=2, window=30)
    path = write_gguf(tmp_path / "a.gguf", spec=spec, attention__key_length=24)
    model = read_model(path)
    assert (model.architecture, model.name, model.n_layer, model.n_ctx_train) == ("llama", "a model", N_LAYER, 2048)
    assert (model.n_head, model.n_head_kv, model.head_size_k, model.head_size_v) == ((4,) * 4, (2,) * 4, 24, 16)
    assert (model.n_bytes, model.n_files) == (path.stat().st_size, 1)
    assert model.spec == spec
    assert model.why_not_streaming is None
    assert model.kv_shape == KVShape((2,) * 4, 2, 24, 16)


def test_heads_of_each_layer(tmp_path):
    writer_keys = {"attention__head_count_kv": [4, 2, 0, 1]}
    model = read_model(write_gguf(tmp_path / "a.gguf", "deci", **writer_keys))
    assert model.n_head_kv == (4, 2, 0, 1)
    assert [model.kv_shape.token_bytes(il) for il in range(N_LAYER)] == [256, 128, 0, 64]
    assert [model.kv_shape.token_bytes(il, flash_attn=False) for il in range(N_LAYER)] == [256, 192, 128, 160]
    with pytest.raises(ValueError, match=r"head_count_kv = \[array of int32, 3 items\]: must be .* each of 4 layers"):
        read_model(write_gguf(tmp_path / "b.gguf", "deci", attention__head_count_kv=[4, 2, 0]))


@pytest.mark.parametrize(
    "arch, keys, reason",
    [
        ("llama", {}, None),
        ("phi3", {"attention__sliding_window": 2048}, None),  # llama.cpp doesn't use it
        ("gemma3", {}, None),
        ("gemma3", {"attention__sliding_window": 512}, "all its layers have a sliding window"),  # of each six one hasn't
        ("gemma2", {}, None),
        ("gemma4", {"attention__shared_kv_layers": 2}, "keys and values of others"),
        ("gemma4-assistant", {}, "drafts for another model"),
        ("dots3note", {}, "sparse"),
        ("qwen3next", {}, "recurrent"),
        ("bert", {}, "no KV cache"),
        ("t5", {}, "encoder"),
        ("llama", {"attention__causal": False}, "not causal"),
        ("deepseek2", {}, None),
        ("deepseek2", {"attention__key_length_mla": 192}, "MLA"),
    ],
)
def test_why_an_architecture_cannot_stream(tmp_path, arch, keys, reason):
    model = read_model(write_gguf(tmp_path / "a.gguf", arch, **keys))
    assert (model.why_not_streaming is None) if reason is None else (reason in model.why_not_streaming)
    if reason is None:
        return
    with pytest.raises(ValueError, match=f"architecture {arch} can't have streaming layers: .*{reason}"):
        read_model(write_gguf(tmp_path / "b.gguf", arch, spec=StreamingSpec((1,), N_LAYER), **keys))
    with pytest.raises(ValueError, match=f"architecture {arch} can't keep layers of their cache in 16 bits: .*{reason}"):
        check_can_stream(arch, StreamingSpec((), N_LAYER, cache_keep=(0,)), N_LAYER, model.why_not_streaming)
    with pytest.raises(ValueError, match=reason):
        _ = model.kv_shape


def test_a_gemma_3n_whose_layers_share_keys_and_values(tmp_path):
    keys = {"attention__sliding_window": 512}
    assert "of others" in read_model(write_gguf(tmp_path / "a.gguf", "gemma3n", n_layer=30, **keys)).why_not_streaming
    assert read_model(write_gguf(tmp_path / "b.gguf", "gemma3n", n_layer=20, **keys)).may_stream == (4, 9, 14, 19)


def test_more_layers_than_llama_cpp_has(tmp_path):
    with pytest.raises(ValueError, match="llama.block_count = 4294967295: must be the number of layers, at most 512"):
        read_model(write_gguf(tmp_path / "a.gguf", n_layer=2**32 - 1))


@pytest.mark.parametrize(
    "arch, keys, n_layer, window, full",
    [
        ("gemma2", {}, 4, 4096, (1, 3)),
        ("gemma2", {"attention__sliding_window": 30}, 4, 30, (1, 3)),
        ("gemma3", {"attention__sliding_window": 512}, 14, 512, (5, 11)),
        ("gemma3", {"attention__sliding_window": 512, "attention__sliding_window_pattern": 2}, 4, 512, (1, 3)),
        (
            "olmo2",
            {"attention__sliding_window": 64, "attention__sliding_window_pattern": [True, False, False, True]},
            4,
            64,
            (1, 2),
        ),
        ("gpt-oss", {"attention__sliding_window": 128}, 4, 128, (1, 3)),
        ("cohere2", {"attention__sliding_window": 128}, 8, 128, (3, 7)),
        ("cohere2moe", {"attention__sliding_window": 128}, 8, 128, (0, 4)),
        ("llama4", {}, 8, 8192, (3, 7)),
        ("smallthinker", {"attention__sliding_window": 99}, 8, 4096, (0, 4)),
        ("exaone4", {}, 64, 4096, tuple(range(3, 64, 4))),
        ("exaone4", {}, 4, None, (0, 1, 2, 3)),
        ("llama4", {"attention__sliding_window": 0}, 4, None, (0, 1, 2, 3)),
        ("exaone-moe", {"attention__sliding_window": 128, "nextn_predict_layers": 1}, 9, 128, (3, 7)),
        ("llama", {"attention__sliding_window": 128}, 4, None, (0, 1, 2, 3)),
    ],
)
def test_layers_with_a_window_of_their_own(tmp_path, arch, keys, n_layer, window, full):
    model = read_model(write_gguf(tmp_path / "a.gguf", arch, n_layer=n_layer, **keys))
    assert model.may_stream == full
    n_main = n_layer - keys.get("nextn_predict_layers", 0)
    own = tuple(il for il in range(n_main) if il not in full)
    assert model.own_window == ((own, window) if own else None)
    assert model.parse_spec("layers=all").layers == full
    model.check_can_stream()
    model.check_can_stream(StreamingSpec(full, n_layer))
    if not own:
        return
    named = (
        f"layer {own[0]} can't stream: it has a sliding window of its own, of {window} tokens, only the layers .* can: {full[0]}"
    )
    with pytest.raises(ValueError, match=named):
        model.check_can_stream(StreamingSpec((own[0], full[0]), n_layer))
    with pytest.raises(ValueError, match="can't keep layers of their cache in 16 bits: it has a sliding window of its own, and no"):
        model.check_can_stream(StreamingSpec((), n_layer, cache_keep=(0,)))


def test_layers_that_predict_ahead_cannot_stream(tmp_path):
    keys = {"nextn_predict_layers": 1}
    model = read_model(write_gguf(tmp_path / "a.gguf", "glm4moe", spec=StreamingSpec((2,), N_LAYER), **keys))
    assert (model.n_layer, model.n_layer_main, len(model.kv_shape.n_head_kv)) == (4, 3, 3)
    with pytest.raises(ValueError, match="layer 3 can't stream: .* only layers from 0 to 2 can"):
        read_model(write_gguf(tmp_path / "b.gguf", "glm4moe", spec=StreamingSpec((3,), N_LAYER), **keys))
    with pytest.raises(ValueError, match="cache_keep = 2-3: must be layers from 0 to 2"):
        check_can_stream("glm4moe", StreamingSpec((), N_LAYER, cache_keep=(2, 3)), 3, None)


def cache(recommended: CacheRecommendation, arch: str = "llama", **changed: object) -> dict[str, object]:
    """Its keys for `write_gguf`."""
    keys = {key.removeprefix(f"{arch}.").replace(".", "__"): value for key, (_, value) in recommended.to_metadata(arch).items()}
    return keys | {f"attention__cache__{key}": value for key, value in changed.items()}


def test_what_is_recommended_for_the_cache(tmp_path):
    types, breaks = CacheTypes("q8_0", "q4_0"), (CacheTypes("q4_0", "q4_0"),)
    recommended = CacheRecommendation(N_LAYER, types, (1,), breaks)
    path = write_gguf(tmp_path / "a.gguf", attention__key_length=64, attention__value_length=64, **cache(recommended))
    assert read_model(path).recommended == recommended and read_model(path).spec is None
    assert read_model(path, takes_recommended=False).recommended is None
    assert read_model(write_gguf(tmp_path / "b.gguf")).recommended is None


@pytest.mark.parametrize(
    "arch, recommended, changed, complaint",
    [
        ("llama", CacheRecommendation(N_LAYER), {"version": 2}, "llama.attention.cache.version = 2: is of a newer lt-gguf"),
        ("llama", CacheRecommendation(N_LAYER), {"type_k": "q3"}, 'llama.attention.cache.type_k = "q3": must be one of f32'),
        (
            "llama",
            CacheRecommendation(3, keep=(1,)),
            {},
            "cache.keep = [array of 3 bool]: must be an array of bool, one for each of the 4",
        ),
        (
            "llama",
            CacheRecommendation(N_LAYER, CacheTypes("q8_0", "f16")),
            {},
            "llama.attention.cache.*: cache type = q8_0: its blocks",
        ),
        ("llama", CacheRecommendation(N_LAYER, CacheTypes("f16", "q4_0")), {}, "elements don't divide this model's heads of 16"),
        (
            "qwen3next",
            CacheRecommendation(N_LAYER),
            {},
            "no types of the cache can be recommended for the architecture qwen3next: it has recurrent layers",
        ),
        ("gemma2", CacheRecommendation(N_LAYER, keep=(1,)), {}, "gemma2 can't keep layers of their cache in 16 bits: it has a sl"),
        ("glm4moe", CacheRecommendation(N_LAYER, keep=(3,)), {}, "cache_keep = 3: must be layers from 0 to 2"),
        ("grok", CacheRecommendation(N_LAYER, CacheTypes("f16", "q8_0")), {}, "a quantized V cache needs flash attention"),
    ],
)
def test_what_cannot_be_recommended(tmp_path, arch, recommended, changed, complaint):
    more = {"nextn_predict_layers": 1} if arch == "glm4moe" else {}
    more |= {"attention__key_length": 64, "attention__value_length": 64} if arch == "grok" else {}
    path = write_gguf(tmp_path / "a.gguf", arch, **cache(recommended, arch, **changed), **more)
    with pytest.raises(ValueError) as error:
        read_model(path)
    assert str(error.value).startswith(f"{path}: ") and complaint in str(error.value) and "\n" not in str(error.value)
    assert read_model(path, takes_recommended=False).recommended is None


def test_split_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    writer.add_block_count(N_LAYER)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    for name in "abc":
        writer.add_tensor(name, np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("m-*.gguf"))
    model = read_model(files[0])
    assert model.n_files == 3
    assert model.n_bytes == sum(file.stat().st_size for file in files)
    with pytest.raises(ValueError, match="is part 2 of 3, name the first one: m-00001-of-00003.gguf"):
        read_model(files[1])
    files[2].unlink()
    with pytest.raises(ValueError, match="1 are not beside it: m-00003-of-00003.gguf"):
        read_model(files[0])


# --------------------------------------------------------------------------------------------- KV memory

SHAPE = KVShape((2,) * 8, 2, 64, 64)  # 512 bytes a token and layer in f16


def test_memory_by_hand():
    spec = StreamingSpec((1, 3, 5, 7), 8, sink=4, window=1020)
    assert kv_memory(SHAPE, None, 32768) == KVMemory(8 * 512 * 32768, 0)
    # 4 + 1020 + 512 = 1536 cells, already a multiple of 256
    assert kv_memory(SHAPE, spec, 32768) == KVMemory(4 * 512 * 32768, 4 * 512 * 1536)
    assert kv_memory(SHAPE, spec, 32768, n_ubatch=1) == KVMemory(4 * 512 * 32768, 4 * 512 * 1280)
    # never more than the context, which is padded too
    assert kv_memory(SHAPE, spec, 1000) == KVMemory(4 * 512 * 1024, 4 * 512 * 1024)
    assert kv_memory(SHAPE, spec, 32768, n_seq_max=4) == KVMemory(4 * 512 * 32768, 4 * 512 * 4 * 1536)
    # 4 x 1024 + 512 = 4608
    assert kv_memory(SHAPE, spec, 32768, n_seq_max=4, kv_unified=True) == KVMemory(4 * 512 * 32768, 4 * 512 * 4608)
    assert kv_memory(SHAPE, spec, 32768).total == 4 * 512 * (32768 + 1536)


def test_cache_types_are_ggmls():
    for name, (ggml_type, block, block_bytes) in CACHE_TYPES.items():
        assert gguf.GGMLQuantizationType[name.upper()] == ggml_type
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(ggml_type)] == (block, block_bytes)


def test_cache_types_that_llama_cpp_refuses():
    assert SHAPE.token_bytes(0, "q8_0") == 2 * 136
    assert SHAPE.token_bytes(0, "f32", "q4_0") == 512 + 72
    with pytest.raises(ValueError, match='cache type = "q3": must be one of f32, f16'):
        SHAPE.token_bytes(0, "q3")
    with pytest.raises(ValueError, match="blocks of 32 elements don't divide this model's heads of 48"):
        KVShape((2,), 2, 64, 48).token_bytes(0, "f16", "q8_0")
    with pytest.raises(ValueError, match="needs flash attention"):
        SHAPE.token_bytes(0, "q8_0", flash_attn=False)


# ------------------------------------------------------------------------- every architecture of llama.cpp

# scripts/checks/upstream_tests.sh makes a small model of each
DIRECTORY = os.environ.get("LT_TEST_MODELS")
MODELS = sorted(Path(DIRECTORY).glob("*.gguf")) if DIRECTORY else []


@pytest.mark.skipif(not MODELS, reason="LT_TEST_MODELS names no directory with models")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_says_of_every_architecture_what_the_runtime_says(path):
    from lt_gguf.runtime import api
    from lt_gguf.runtime.library import load_llama_cpp

    native = load_llama_cpp().llama_cpp
    described = read_model(path)
    model = native.llama_model_load_from_file(str(path).encode(), native.llama_model_default_params())
    try:
        n_main = native.llama_model_n_layer(model)
        assert (described.n_layer_main, described.n_layer) == (n_main, n_main + native.llama_model_n_layer_nextn(model))
        assert api.may_stream(model) == described.may_stream
        try:
            api.set_model_spec(model, "layers=all")
        except ValueError as error:
            assert described.why_not_streaming and described.why_not_streaming in str(error)
            return
        assert described.why_not_streaming is None
        for text in ("off", f"layers={described.may_stream[0]};sink=2;window=30", "layers=all;sink=2;window=30"):
            api.set_model_spec(model, text)
            spec = described.parse_spec(text)
            for flash_attn in (False, described.architecture != "grok"):  # llama.cpp switches it off for Grok
                context = new_context(native, model, flash_attn)
                parts = api.KVPart.FULL, api.KVPart.STREAMING, api.KVPart.SWA
                allocated = KVMemory(*(api.kv_bytes(context, part) for part in parts))
                native.llama_free(context)
                expected = kv_memory(described.kv_shape, spec, 1024, n_ubatch=64, flash_attn=flash_attn)
                # note: without streaming layers the cache is llama.cpp's own, of which only all is known
                assert (expected.total if text == "off" else expected) == (allocated.total if text == "off" else allocated)
    finally:
        native.llama_model_free(model)


def new_context(native, model: ctypes.c_void_p, flash_attn: bool):
    params = native.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 1024, 128, 64
    params.flash_attn_type = int(flash_attn)
    params.swa_full = False
    return native.llama_init_from_model(model, params)
