"""KV budgets: the smallest number of streaming layers, by the bytes that the runtime allocates."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native import FULL, STREAMING
from support.oracle import Subject

from lt_gguf.gguf.file import read_model
from lt_gguf.memory.budget import kv_bytes, smallest_number
from lt_gguf.memory.kv import KVShape
from lt_gguf.selection import Model, Request, strategy
from lt_gguf.selection.within_budget import select_within
from lt_gguf.spec import StreamingSpec

SHAPE = KVShape((2,) * 4, 2, 32, 32)
TOKEN = 2 * 2 * 32 * 2  # bytes of K and V in f16, a layer
HELD = 256 * TOKEN  # of a streaming layer with the settings below
SEEN = {"sink": 4, "window": 60}
SMALL = SEEN | {"n_layer_main": 4, "n_ubatch": 64}


def request(n_layer: int = 4, **changes) -> Request:
    return Request(Model("llama", "a model", n_layer, n_layer), **SEEN | changes)


def test_the_smallest_number():
    full = 1024 * TOKEN
    for n in range(5):
        bytes_ = (4 - n) * full + n * HELD
        assert smallest_number(SHAPE, bytes_, 1024, **SMALL) == n
        if n < 4:
            assert smallest_number(SHAPE, bytes_ - 1, 1024, **SMALL) == n + 1
    assert smallest_number(SHAPE, 10**12, 1024, **SMALL) == 0


def test_an_impossible_budget_says_what_the_least_is():
    with pytest.raises(ValueError) as error:
        smallest_number(SHAPE, 4 * HELD - 1, 1024, **SMALL)
    message = str(error.value)
    assert message.startswith("KV budget = 0.25 MiB: however many of 4 layers stream (sink 4, window 60), a context of 1024 tokens")
    least = float(re.search(r"takes ([0-9.]+) MiB or more \(f16\), must be at least that", message)[1])
    assert smallest_number(SHAPE, int(least * 2**20), 1024, **SMALL) == 4


def test_bad_arguments():
    with pytest.raises(ValueError, match="context = 0: must be at least 1 token"):
        smallest_number(SHAPE, 10**9, 0, **SMALL)
    with pytest.raises(ValueError, match='cache type = "q3"'):
        smallest_number(SHAPE, 10**9, 1024, cache_type="q3", **SMALL)
    with pytest.raises(ValueError, match="blocks of 32 elements don't divide"):
        smallest_number(KVShape((2,), 2, 48, 48), 10**9, 1024, cache_type="q8_0", **SMALL | {"n_layer_main": 1})


def test_a_layer_that_is_cached_but_cannot_stream():
    """As the one that Granite Switch adds."""
    with pytest.raises(ValueError, match="however many of 3 layers stream"):
        smallest_number(SHAPE, 4 * HELD, 1024, **SMALL | {"n_layer_main": 3})
    assert smallest_number(SHAPE, 3 * HELD + 1024 * TOKEN, 1024, **SMALL | {"n_layer_main": 3}) == 3


@settings(deadline=None)
@given(
    heads=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    window=st.integers(1, 3000),
    n_ctx=st.integers(1, 20_000),
    cache_type=st.sampled_from(["f16", "f32", "q8_0"]),
    data=st.data(),
)
def test_it_fits_and_one_layer_less_does_not(heads, window, n_ctx, cache_type, data):
    shape = KVShape(tuple(heads), max(heads), 32, 64)
    sizes = {"n_ctx": n_ctx, "cache_type": cache_type, "n_ubatch": 512, "sink": 4, "window": window}
    n_layer = len(heads)
    # note: in 16 bits a layer that streams can take more than a quantized one with a small context
    least, most = sorted(kv_bytes(shape, range(n), **sizes) for n in (n_layer, 0))
    budget = data.draw(st.integers(least, most))
    ratios = np.array([data.draw(st.lists(st.floats(0, 1), min_size=n_layer, max_size=n_layer))])
    asked = Request(Model("llama", "m", n_layer, n_layer), ratios=ratios, sink=4, window=window)
    selection = select_within(strategy("lazy-ratio"), asked, shape, budget, n_ctx, cache_type=cache_type)
    n = len(selection.layers)
    assert kv_bytes(shape, selection.layers, **sizes) <= budget
    assert n >= smallest_number(shape, budget, n_ctx, n_layer_main=n_layer, sink=4, window=window, cache_type=cache_type)
    if n:
        less = strategy("lazy-ratio").select(Request(asked.model, n - 1, ratios=ratios, sink=4, window=window))
        assert kv_bytes(shape, less.layers, **sizes) > budget


def test_layers_that_save_little():
    """The lazy layers have few KV heads here, so more of them must stream than of the others."""
    shape = KVShape((8, 8, 1, 1), 8, 32, 32)
    asked = request(ratios=np.array([[0.1, 0.2, 0.8, 0.9]]))
    budget = kv_bytes(shape, [1], **SEEN, n_ctx=4096, cache_type="f16", n_ubatch=64)
    assert smallest_number(shape, budget, 4096, **SMALL) == 1
    selection = select_within(strategy("lazy-ratio"), asked, shape, budget, 4096, n_ubatch=64)
    assert selection.layers == (1, 2, 3)
    assert "; 3 is the smallest number with which the KV cache of 4096 tokens (f16) fits into" in selection.reason


def test_strategies_with_a_number_of_their_own():
    asked = request(layers="0,1", fraction=1)
    size = kv_bytes(SHAPE, [0, 1], **SEEN, n_ctx=1024, cache_type="f16", n_ubatch=64)
    selection = select_within(strategy("manual"), asked, SHAPE, size, 1024, n_ubatch=64)
    assert selection.layers == (0, 1) and "takes 0.63 MiB of a budget of 0.63 MiB" in selection.reason
    with pytest.raises(ValueError, match="selection manual: with 2 streaming layers the KV cache of 1024 tokens .f16. takes "):
        select_within(strategy("manual"), asked, SHAPE, size - 1, 1024, n_ubatch=64)
    asked = request(ratios=np.array([[0.95, 0.1, 0.95, 0.1]]))
    assert select_within(strategy("threshold"), asked, SHAPE, size, 1024, n_ubatch=64).layers == (0, 2)
    with pytest.raises(ValueError, match="must be a lower --threshold, a larger budget or a smaller context"):
        select_within(strategy("threshold"), asked, SHAPE, size - 1, 1024, n_ubatch=64)


def test_a_presets_own_window_counts():
    shape = KVShape((8,) * 64, 8, 128, 128)
    asked = Request(Model("qwen2", "m", 64, 64), sink=4, window=60)
    preset = strategy("preset:QwQ-32B-LightTransfer")
    size = kv_bytes(shape, preset.select(asked).layers, sink=129, window=1025, n_ctx=32768, cache_type="f16", n_ubatch=512)
    assert len(select_within(preset, asked, shape, size, 32768).layers) == 32
    with pytest.raises(ValueError, match="with 32 streaming layers .* must be another selection"):
        select_within(preset, asked, shape, size - 1, 32768)


# ------------------------------------------------------------------------------------------- the runtime


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject.build("llama", 4, tmp_path_factory.mktemp("budget"))


@pytest.mark.parametrize("n_ctx, n_ubatch", [(4096, 64), (700, 32), (4096, 512)])
@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
def test_the_runtime_allocates_no_more_than_the_budget(subject, tmp_path_factory, n_ctx, n_ubatch, cache_type):
    file = next(tmp_path_factory.getbasetemp().glob("budget*/model-f32.gguf"))
    shape = read_model(file).kv_shape
    for n in range(5):
        allocated = allocate(subject, range(n), n_ctx, n_ubatch, cache_type)
        assert kv_bytes(shape, range(n), n_ctx=n_ctx, cache_type=cache_type, n_ubatch=n_ubatch, **SEEN) == allocated
        found = smallest_number(shape, allocated, n_ctx, cache_type=cache_type, **SMALL | {"n_ubatch": n_ubatch})
        assert allocate(subject, range(found), n_ctx, n_ubatch, cache_type) <= allocated
        assert found == n or allocate(subject, range(found), n_ctx, n_ubatch, cache_type) == allocated


def allocate(subject: Subject, layers: range, n_ctx: int, n_ubatch: int, cache_type: str) -> int:
    spec = StreamingSpec(tuple(layers), 4, *SEEN.values())
    with subject.context(spec, n_ctx=n_ctx, n_batch=n_ubatch, n_ubatch=n_ubatch, kv=cache_type, flash=True) as context:
        return context.kv_bytes(FULL) + context.kv_bytes(STREAMING)
