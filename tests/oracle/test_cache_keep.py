"""Layers whose KV cache stays in 16 bits where that of the others is quantized (`cache_keep`), whatever streams.

Two references: transformers with the same rounding in the other layers, and the runtime with a cache in 16 bits throughout, of which
nothing is left to differ where all layers are kept.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.native import FULL, STREAMING, Context
from support.oracle import RELATIVE, Subject, difference, random_tokens
from support.quantized_caches import CLOSER, quantized
from support.transcript import Transcript

from lt_gguf.runtime import api
from lt_gguf.spec import StreamingSpec

SINK, WINDOW, N_LAYER = 4, 60, 4
SETTINGS = {"n_ctx": 1024, "n_ubatch": 64, "flash": True}
N_PROMPT = 300
ALL = ";cache_keep=all"

# what streams, in each kind of context
FORMS = {
    "off": "off",
    "hybrid": f"layers=1,2;sink={SINK};window={WINDOW};prefill=full",
    "trained hybrid": f"layers=1,2;sink={SINK};window={WINDOW};prefill=stream",
    "all stream": f"layers=all;sink={SINK};window={WINDOW};prefill=full",
    "streaming layers quantized, too": f"layers=1,2;sink={SINK};window={WINDOW};prefill=full;type=q4_0",
    "hide": f"hide=1,2;sink={SINK};window={WINDOW};prefill=full",
    "auto": f"auto=0.5;sink={SINK};window={WINDOW}",
}


def conversation(context: Context, n_batch: int | None = None) -> np.ndarray:
    """The logits of two prompts' ends and of what is decoded after each."""
    tokens = random_tokens(N_PROMPT + 20 + 100 + 20)
    parts = np.split(tokens, np.cumsum([N_PROMPT, 20, 100]))
    rows, n_past = [], 0
    for i, part in enumerate(parts):
        read = context.read_prompt(part, n_past, n_batch=n_batch) if i % 2 == 0 else context.decode_one_by_one(part, n_past)
        rows.append(read)
        n_past += len(part)
    return np.concatenate(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, name, streams, type_, kept, others",
    [
        ("llama", "q4_0", (), None, (0,), (1, 2, 3)),
        ("mixtral", "q4_0", (), None, (1, 3), (0, 2)),
        ("llama", "q4_0", (1, 2), None, (0,), (3,)),
        ("llama", "q8_0", (1, 2), "q8_0", (1, 3), (0, 2)),
        ("llama", "q4_0", (1, 2), "q4_0", (1, 3), (0, 2)),
        ("smollm3", "q4_0", (0,), None, (3,), (1, 2)),
    ],
)
def test_the_others_alone_are_quantized(subject, measured, monkeypatch, family, name, streams, type_, kept, others):
    monkeypatch.setenv("LT_ATTENTION", "off")  # ours doesn't round queries, and the difference is to be seen
    model = subject(family)
    spec = replace(model.spec(SINK, WINDOW, streams, prefill="full" if streams else "stream"), type=type_, cache_keep=kept)
    with model.context(spec, kv=name, **SETTINGS) as context:
        assert context.streaming() == str(spec)
        transcript = Transcript(model, spec, context)
        transcript.read(N_PROMPT, n_batch=128, most=True)
        transcript.decode(40)
        transcript.read(100, n_batch=128, most=True)
        transcript.decode(20)
    rounded = {"so": others, "as if none were kept": sorted({*others, *kept}), "as if all were": (), "the kept ones alone": kept}
    errors = {}
    for which, layers in rounded.items():
        with quantized(monkeypatch, name, layers):
            errors[which] = difference(*transcript.logits())
    bound = CLOSER[name] * min(error for which, error in errors.items() if which != "so")
    measured(family, f"{name} KV, f16 in layers {kept}", errors["so"], bound, spec=str(spec))


@pytest.mark.parametrize("n_batch", [128, None], ids=["in batches", "as a whole"])
@pytest.mark.parametrize("form", FORMS)
def test_where_all_are_kept_it_is_a_cache_in_16_bits(subject, form, n_batch):
    """Bit by bit: whatever part of the cache a layer is in, and however a prompt is read."""
    model = subject("llama")
    spec = FORMS[form]
    rows, n_bytes = [], []
    for kv, text in (("q4_0", spec + ALL), ("f16", spec.removesuffix(";type=q4_0"))):
        with model.context(text, kv=kv, **SETTINGS) as context:
            rows.append(conversation(context, n_batch))
            n_bytes.append((context.kv_bytes(FULL), context.kv_bytes(STREAMING)))
    np.testing.assert_array_equal(*rows)
    assert n_bytes[0] == n_bytes[1]
    with model.context(spec, kv="q4_0", **SETTINGS) as context:
        assert difference(conversation(context, n_batch), rows[1]) > 1e-3 or form == "all stream"


@pytest.mark.parametrize("n_batch", [128, None], ids=["in batches", "as a whole"])
def test_layers_that_a_prompt_chooses_keep_their_types(subject, n_batch):
    """What streams in the end comes out of the full part, and so do its types: the bytes of each part are those of its layers."""
    model = subject("llama")
    with (
        model.context(f"{FORMS['auto']};cache_keep=0-1", kv="q4_0", **SETTINGS) as context,
        model.context(FORMS["auto"], kv="f16", **SETTINGS) as other,
    ):
        conversation(context, n_batch)
        conversation(other, n_batch)
        layers = StreamingSpec.parse(context.streaming().partition(";")[2].partition(";w_last")[0], N_LAYER).layers
        assert len(layers) == 2
        for part, those in ((FULL, set(range(N_LAYER)) - {*layers}), (STREAMING, {*layers})):
            of_f16 = other.kv_bytes(part) // 2
            assert context.kv_bytes(part) == sum(of_f16 if il < 2 else of_f16 * 18 // 64 for il in those)


@pytest.mark.parametrize("form", ["off", "hybrid", "hide"])
def test_kept_layers_hold_what_is_rotated(subject, measured, form):
    """Heads of 64 are rotated where a cache is quantized, and a kept layer holds rotated keys and values, which changes no more than
    their rounding to 16 bits."""
    model: Subject = subject("llama-mha")
    spec = FORMS[form]
    with model.context(spec, **SETTINGS | {"flash": False}) as context:
        exact = conversation(context, 128)
    errors = {}
    for what, kv, text in (("f16", "f16", spec), ("kept", "q4_0", spec + ALL), ("q4_0", "q4_0", spec)):
        with model.context(text, kv=kv, **SETTINGS) as context:
            errors[what] = difference(conversation(context, 128), exact)
    assert errors["q4_0"] > 5 * RELATIVE * errors["f16"]
    measured("llama-mha", f"all layers kept in f16, rotated, {form}", errors["kept"], RELATIVE * errors["f16"], full=errors["f16"])


@pytest.mark.parametrize("form", ["off", "hybrid"])
def test_states_of_other_types_are_refused(subject, form):
    model, tokens = subject("llama"), random_tokens(N_PROMPT)
    spec = FORMS[form]
    with (
        model.context(f"{spec};cache_keep=0", kv="q4_0", **SETTINGS) as context,
        model.context(f"{spec};cache_keep=0,3", kv="q4_0", **SETTINGS) as more,
        model.context(spec, kv="q4_0", **SETTINGS) as none,
    ):
        context.read_prompt(tokens, n_batch=128)
        state = context.save_seq()
        for other in (more, none):
            assert not other.restore_seq(state) and other.positions(FULL) == []
        context.clear()
        assert context.restore_seq(state) and context.positions(FULL) == list(range(N_PROMPT))


@pytest.mark.parametrize("form", ["off", "hybrid"])
def test_where_nothing_is_quantized_it_changes_nothing(subject, form):
    model, tokens = subject("llama"), random_tokens(N_PROMPT)
    spec = FORMS[form]
    with (
        model.context(f"{spec};cache_keep=0", kv="f16", **SETTINGS) as context,
        model.context(spec, kv="f16", **SETTINGS) as other,
    ):
        np.testing.assert_array_equal(conversation(context), conversation(other))
        assert [context.kv_bytes(part) for part in (FULL, STREAMING)] == [other.kv_bytes(part) for part in (FULL, STREAMING)]
        for one in (context, other):
            one.clear()
        context.read_prompt(tokens, n_batch=128)
        assert other.restore_seq(context.save_seq())


def test_a_context_that_hides_has_its_types_from_the_beginning(subject):
    model = subject("llama")
    with model.context(f"hide=none;sink={SINK};window={WINDOW};cache_keep=0", kv="q4_0", **SETTINGS) as context:
        api.context_hide(context.handle, model.spec(SINK, WINDOW, (1, 2), prefill="full"))
        assert context.streaming().startswith("hide=1-2;") and context.streaming().endswith(";cache_keep=0")
        with pytest.raises(ValueError, match="cache_keep: must be given where the context is made"):
            api.context_hide_text(context.handle, "hide=1;cache_keep=2")


@pytest.mark.parametrize(
    "text, message",
    [
        ("off;cache_keep=4", 'cache_keep = "4": must be "all", "none", or layers and ranges of layers from 0 to 3, as in 1,3,5-9'),
        ("layers=1;cache_keep=0,", 'cache_keep = "": must be an integer'),
        ("layers=1;cache_keep=two", 'cache_keep = "two": must be an integer'),
        ("auto=0.5;cache_keep=2-1", 'cache_keep = "2-1": must be "all", "none", or layers'),
        ("cache_keep=0;cache_keep=1", "cache_keep: is given twice"),
        ("off;sink=4", "sink: can't be given with off, where no layer streams"),
        ("sink=4;cache_keep=0", "says no layers and the file names none"),
    ],
)
def test_refused_in_one_line(subject, text, message):
    with pytest.raises(ValueError) as error:
        subject("llama").native.set_streaming(text)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cache_keep=0", "off;cache_keep=0"),
        (" off ; cache_keep = 2-3,0 ", "off;cache_keep=0,2-3"),
        ("off;cache_keep=none", "off"),
        ("layers=1;cache_keep=none", "layers=1;sink=4;window=1020;prefill=full"),
        ("cache_keep=all;type=f32;layers=1", "layers=1;sink=4;window=1020;prefill=full;type=f32;cache_keep=0-3"),
    ],
)
def test_runtime_and_package_agree_on_texts(subject, text, expected):
    native = subject("llama").native
    native.set_streaming(text)
    try:
        assert native.streaming() == expected == str(StreamingSpec.parse(text, N_LAYER))
    finally:
        native.set_streaming(None)
