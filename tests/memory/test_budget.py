"""KV budgets: the smallest number of streaming layers, by the bytes that the runtime allocates."""

from __future__ import annotations

import functools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.native import FULL, STREAMING
from support.oracle import Subject

from lt_gguf.gguf.file import read_model
from lt_gguf.memory.budget import largest_context, peak_bytes, smallest_number
from lt_gguf.memory.kv import KVShape, kv_memory
from lt_gguf.memory.prompt import prompt_memory
from lt_gguf.selection import Model, Request, strategy
from lt_gguf.selection.within_budget import select_within
from lt_gguf.spec import StreamingSpec

SHAPE = KVShape((2,) * 4, 2, 32, 32)
TOKEN = 2 * 2 * 32 * 2  # bytes of K and V in f16, a layer
HELD = 256 * TOKEN  # of a streaming layer with the settings below
SEEN = {"sink": 4, "window": 60}
AFTER = {"n_embd": 64, "prefill": "stream"}  # what a prompt takes while it is read isn't in it
SMALL = SEEN | AFTER | {"may_stream": range(4), "n_ubatch": 64}


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


def test_layers_that_are_kept_in_16_bits_count_as_such():
    """They are the first to stream, as they save most; and a budget that is enough without them isn't with them."""
    quantized = 1024 * TOKEN * 18 // 64
    assert smallest_number(SHAPE, 4 * quantized, 1024, cache_type="q4_0", **SMALL) == 0
    kept = {"cache_type": "q4_0", "cache_keep": (2,)}
    assert smallest_number(SHAPE, 1024 * TOKEN + 3 * quantized, 1024, **kept, **SMALL) == 0
    assert smallest_number(SHAPE, 1024 * TOKEN + 3 * quantized - 1, 1024, **kept, **SMALL) == 1
    assert smallest_number(SHAPE, HELD + 3 * quantized, 1024, **kept, **SMALL) == 1
    settings = {"n_ctx": 1024, "n_ubatch": 64, **SEEN, **AFTER, **kept}
    assert peak_bytes(SHAPE, (2,), **settings) == HELD + 3 * quantized
    assert peak_bytes(SHAPE, (2,), **settings | {"cache_type": "f16/q4_0"}) == HELD + 3 * (quantized + 1024 * TOKEN) // 2
    assert smallest_number(SHAPE, 2 * (quantized + 1024 * TOKEN), 1024, cache_type="f16/q4_0", **SMALL) == 0


def test_a_prompt_that_is_read_with_full_attention_counts():
    n_ctx, n_embd = 4096, 8  # hidden states of 32 bytes a token
    at_peak = SMALL | {"n_embd": n_embd, "prefill": "full"}

    def peak(n: int) -> int:
        by_layer = TOKEN + 4 * n_embd  # one streaming layer, hidden states
        return n_ctx * (4 - n) * TOKEN + n * HELD + (n_ctx * min(by_layer, n * TOKEN) if n else 0)

    assert peak(1) > peak(0) > peak(2) > peak(3) > peak(4)  # one layer that streams takes more than none at first
    for n in (0, 2, 3, 4):
        assert smallest_number(SHAPE, peak(n), n_ctx, **at_peak) == n
        assert peak_bytes(
            SHAPE, range(n), **SEEN, n_ctx=n_ctx, n_embd=n_embd, prefill="full", cache_type="f16", n_ubatch=64
        ) == peak(n)
    with pytest.raises(ValueError, match=r"prefill full.*takes 1.38 MiB or more"):
        smallest_number(SHAPE, peak(4) - 1, n_ctx, **at_peak)
    assert smallest_number(SHAPE, peak(4) - 1, n_ctx, **at_peak | {"prefill": "stream"}) == 3
    # hidden states that take more than all layers do: then nothing is gained at the peak
    with pytest.raises(ValueError, match="however many"):
        smallest_number(SHAPE, peak(0) - 1, n_ctx, **at_peak | {"n_embd": 4096})


def test_an_impossible_budget_says_what_the_least_is():
    with pytest.raises(ValueError) as error:
        smallest_number(SHAPE, 4 * HELD - 1, 1024, **SMALL)
    message = str(error.value)
    assert message.startswith(
        "KV budget = 0.25 MiB: however many of 4 layers stream (sink 4, window 60, prefill stream), a context"
    )
    least = float(re.search(r"takes ([0-9.]+) MiB or more \(f16\), must be at least that", message)[1])
    assert smallest_number(SHAPE, int(least * 2**20), 1024, **SMALL) == 4


def test_bad_arguments():
    with pytest.raises(ValueError, match="context = 0: must be at least 1 token"):
        smallest_number(SHAPE, 10**9, 0, **SMALL)
    with pytest.raises(ValueError, match='cache type = "q3"'):
        smallest_number(SHAPE, 10**9, 1024, cache_type="q3", **SMALL)
    with pytest.raises(ValueError, match="blocks of 32 elements don't divide"):
        smallest_number(KVShape((2,), 2, 48, 48), 10**9, 1024, cache_type="q8_0", **SMALL | {"may_stream": (0,)})


def test_a_layer_that_is_cached_but_cannot_stream():
    """As the one that Granite Switch adds."""
    with pytest.raises(ValueError, match="however many of 3 layers stream"):
        smallest_number(SHAPE, 4 * HELD, 1024, **SMALL | {"may_stream": range(3)})
    assert smallest_number(SHAPE, 3 * HELD + 1024 * TOKEN, 1024, **SMALL | {"may_stream": range(3)}) == 3


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
    sizes = AFTER | {"n_ctx": n_ctx, "cache_type": cache_type, "n_ubatch": 512, "sink": 4, "window": window}
    n_layer = len(heads)
    # note: in 16 bits a layer that streams can take more than a quantized one with a small context
    least, most = sorted(peak_bytes(shape, range(n), **sizes) for n in (n_layer, 0))
    budget = data.draw(st.integers(least, most))
    ratios = np.array([data.draw(st.lists(st.floats(0, 1), min_size=n_layer, max_size=n_layer))])
    asked = Request(Model("llama", "m", n_layer, n_layer), ratios=ratios, sink=4, window=window)
    selection = select_within(strategy("lazy-ratio"), asked, shape, budget, n_ctx, **AFTER, cache_type=cache_type)
    n = len(selection.layers)
    assert peak_bytes(shape, selection.layers, **sizes) <= budget
    assert n >= smallest_number(
        shape, budget, n_ctx, may_stream=range(n_layer), sink=4, window=window, **AFTER, cache_type=cache_type
    )
    if n:
        less = strategy("lazy-ratio").select(Request(asked.model, n - 1, ratios=ratios, sink=4, window=window))
        assert peak_bytes(shape, less.layers, **sizes) > budget


def test_layers_that_save_little():
    """The lazy layers have few KV heads here, so more of them must stream than of the others."""
    shape = KVShape((8, 8, 1, 1), 8, 32, 32)
    asked = request(ratios=np.array([[0.1, 0.2, 0.8, 0.9]]))
    budget = peak_bytes(shape, [1], **SEEN, **AFTER, n_ctx=4096, cache_type="f16", n_ubatch=64)
    assert smallest_number(shape, budget, 4096, **SMALL) == 1
    selection = select_within(strategy("lazy-ratio"), asked, shape, budget, 4096, **AFTER, n_ubatch=64)
    assert selection.layers == (1, 2, 3)
    assert "; 3 is the smallest number with which the KV cache of 4096 tokens (f16) fits into" in selection.reason


def test_strategies_with_a_number_of_their_own():
    asked = request(layers="0,1", fraction=1)
    size = peak_bytes(SHAPE, [0, 1], **SEEN, **AFTER, n_ctx=1024, cache_type="f16", n_ubatch=64)
    selection = select_within(strategy("manual"), asked, SHAPE, size, 1024, **AFTER, n_ubatch=64)
    assert selection.layers == (0, 1) and "takes 0.63 MiB of a budget of 0.63 MiB" in selection.reason
    with pytest.raises(ValueError, match="selection manual: with 2 streaming layers the KV cache of 1024 tokens .f16. takes "):
        select_within(strategy("manual"), asked, SHAPE, size - 1, 1024, **AFTER, n_ubatch=64)
    asked = request(ratios=np.array([[0.95, 0.1, 0.95, 0.1]]))
    assert select_within(strategy("threshold"), asked, SHAPE, size, 1024, **AFTER, n_ubatch=64).layers == (0, 2)
    with pytest.raises(ValueError, match="must be a lower --threshold, a larger budget or a smaller context"):
        select_within(strategy("threshold"), asked, SHAPE, size - 1, 1024, **AFTER, n_ubatch=64)


def test_a_presets_own_window_counts():
    shape = KVShape((8,) * 64, 8, 128, 128)
    asked = Request(Model("qwen2", "m", 64, 64), sink=4, window=60)
    preset = strategy("preset:QwQ-32B-LightTransfer")
    size = peak_bytes(
        shape, preset.select(asked).layers, sink=129, window=1025, **AFTER, n_ctx=32768, cache_type="f16", n_ubatch=512
    )
    assert len(select_within(preset, asked, shape, size, 32768, **AFTER).layers) == 32
    with pytest.raises(ValueError, match="with 32 streaming layers .* must be another selection"):
        select_within(preset, asked, shape, size - 1, 32768, **AFTER)


# ------------------------------------------------------------------------------------ the largest context


def needed(n_ctx: int, spec: StreamingSpec | None, n_embd: int, whole: bool = True) -> int:
    """Bytes of a context with flash attention, its cache, mask and the prompt that fills it."""
    prompt = prompt_memory(SHAPE, spec, n_ctx, n_embd=n_embd)
    mask = n_ctx * 512 * 6
    return kv_memory(SHAPE, spec, n_ctx).total + mask + min(prompt.batches, prompt.whole + 512 * n_ctx if whole else prompt.batches)


@pytest.mark.parametrize("spec", [None, *(StreamingSpec((0, 1, 2), 4, *SEEN.values(), prefill) for prefill in ("full", "stream"))])
@pytest.mark.parametrize("whole", [True, False])
def test_the_largest_context(spec, whole):
    most, model = 32768, {"n_embd": 32, "n_head": 4, "whole": whole, "flash_attn": True}
    largest = functools.partial(largest_context, SHAPE, spec, n_ctx_most=most, **model)
    for n_ctx in (most, 8192, 3072):
        need = needed(n_ctx, spec, 32, whole)
        found, for_prompts = largest(need)
        assert (
            found == n_ctx
            and for_prompts == need - needed(n_ctx, spec, 32, whole=False) + prompt_memory(SHAPE, spec, n_ctx, n_embd=32).batches
        )
        assert largest(need - 1)[0] == n_ctx - 1024
    assert largest(needed(5000, spec, 32, whole))[0] == 4096  # in steps
    assert largest(-5)[0] == 1024 and largest_context(SHAPE, spec, 0, 300, **model)[0] == 300  # what is tried though it doesn't fit


def test_without_flash_attention_less_fits():
    model = {"n_embd": 32, "n_head": 64}
    n_bytes = needed(16384, None, 32)
    assert largest_context(SHAPE, None, n_bytes, 32768, **model, flash_attn=True)[0] == 16384
    assert largest_context(SHAPE, None, n_bytes, 32768, **model, flash_attn=False)[0] == 1024


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
        assert peak_bytes(shape, range(n), n_ctx=n_ctx, cache_type=cache_type, n_ubatch=n_ubatch, **SEEN, **AFTER) == allocated
        found = smallest_number(shape, allocated, n_ctx, cache_type=cache_type, **SMALL | {"n_ubatch": n_ubatch})
        assert allocate(subject, range(found), n_ctx, n_ubatch, cache_type) <= allocated
        assert found == n or allocate(subject, range(found), n_ctx, n_ubatch, cache_type) == allocated


def allocate(subject: Subject, layers: range, n_ctx: int, n_ubatch: int, cache_type: str) -> int:
    spec = StreamingSpec(tuple(layers), 4, *SEEN.values())
    with subject.context(spec, n_ctx=n_ctx, n_batch=n_ubatch, n_ubatch=n_ubatch, kv=cache_type, flash=True) as context:
        return context.kv_bytes(FULL) + context.kv_bytes(STREAMING)
