"""Cache types by kind of layer: what grows may be quantized, what streams keeps 16 bits unless the spec says otherwise.

The reference is transformers with the same rounding, see `support.quantized_caches`.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.families import COMMON, FAMILIES
from support.native import FULL, PROMPT, STREAMING
from support.oracle import Subject, difference, random_tokens
from support.quantized_caches import CLOSER, TYPES, quantized
from support.transcript import Transcript

SINK, WINDOW, STREAMS = 4, 60, (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["full", "stream"])
@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("family", ["llama", "mixtral", "smollm3"])
def test_only_what_grows_is_quantized(subject, measured, monkeypatch, family, name, prefill):
    monkeypatch.setenv("LT_ATTENTION", "off")  # ours doesn't round queries, and the difference is to be seen
    model = subject(family)
    spec = model.spec(SINK, WINDOW, STREAMS, prefill=prefill)
    with model.context(spec, n_ctx=1024, n_ubatch=64, kv=name, flash=True) as context:
        transcript = Transcript(model, spec, context)
        transcript.read(300, n_batch=128, most=True)
        transcript.decode(40)
        transcript.read(100, n_batch=128, most=True)
        transcript.decode(20)
    errors = {}
    for which, layers in {"full": (0, 3), "streaming": STREAMS, "all": range(4), "none": ()}.items():
        with quantized(monkeypatch, name, layers):
            errors[which] = difference(*transcript.logits())
    setting = f"{name} KV in full layers, f16 in streaming ones, prefill = {prefill}"
    others = min(errors[which] for which in ("streaming", "all", "none"))
    measured(family, setting, errors["full"], CLOSER[name] * others, spec=str(spec))


@pytest.mark.parametrize("given", ["f32", "bf16", "q8_0", "q4_0"])
def test_a_type_that_the_spec_asks_for(subject, given):
    """Where all layers stream, nothing of the other type is left: bit by bit a context that has this one throughout."""
    model = subject("llama")
    spec = model.spec(SINK, WINDOW, range(4), prefill="full")
    found = []
    other = "q8_0" if given == "q4_0" else "q4_0"
    throughout = f"{spec};type={given}" if given in TYPES else str(spec)
    for kv, text in ((other, f"{spec};type={given}"), (given, throughout)):
        with model.context(text, n_ctx=1024, n_ubatch=64, kv=kv, flash=True) as context:
            transcript = Transcript(model, spec, context)
            transcript.read(300, n_batch=128, most=True)
            transcript.decode(20)
            found.append((transcript.rows, context.kv_bytes(STREAMING), context.streaming()))
    (rows, n_bytes, text), (expected, n_expected, _) = found
    assert text == f"{spec};type={given}" and n_bytes == n_expected
    assert rows.keys() == expected.keys()
    for position, row in rows.items():
        np.testing.assert_array_equal(row, expected[position])


@pytest.mark.parametrize(
    "kv, flash, expected", [("f32", False, 4), ("f16", True, 2), ("bf16", True, 2), ("q8_0", True, 2), ("q4_0", True, 2)]
)
def test_left_out_it_is_f16_or_what_the_others_have(subject, kv, flash, expected):
    model = subject("llama")
    with model.context(
        model.spec(SINK, WINDOW, STREAMS, prefill="full"), n_ctx=1024, n_batch=512, n_ubatch=64, kv=kv, flash=flash
    ) as context:
        values = 2 * len(STREAMS) * COMMON["num_key_value_heads"] * COMMON["hidden_size"] // COMMON["num_attention_heads"]
        assert context.kv_bytes(STREAMING) == expected * values * context.kv_cells(STREAMING)
        context.prompt_begin(600)
        assert context.kv_bytes(PROMPT) == expected * values * context.kv_cells(PROMPT)


def test_states_of_another_type_are_refused(subject):
    model, tokens = subject("llama"), random_tokens(300)
    spec = model.spec(SINK, WINDOW, STREAMS, prefill="full")
    settings = dict(n_ctx=1024, n_ubatch=64, kv="q8_0", flash=True)
    with model.context(spec, **settings) as context, model.context(f"{spec};type=q8_0", **settings) as other:
        context.read_prompt(tokens, n_batch=128)
        state = context.save_seq()
        assert not other.restore_seq(state)
        assert other.positions(FULL) == [] and other.positions(STREAMING) == []
        context.clear()
        assert context.restore_seq(state) and context.positions(FULL) == list(range(300))


@pytest.mark.parametrize(
    "text, settings, message",
    [
        ("layers=1;type=q8_0", {}, "type = q8_0: a quantized V needs flash attention"),
        ("auto=0.5;type=f16", {}, "type: can't be given with auto"),
        ("hide=1;type=f16", {}, "type: can't be given with hide"),
        ("layers=1;type=q6_K", {}, 'type = "q6_K": must be one of f32, f16, bf16, q8_0'),
    ],
)
def test_refused_in_one_line(subject, text, settings, message):
    with pytest.raises(ValueError) as error, subject("llama").context(text, **settings):
        pass
    assert message in str(error.value) and "\n" not in str(error.value)


def test_blocks_that_do_not_divide_the_heads(tmp_path):
    family = FAMILIES["llama"]
    odd = replace(family, options=family.options | {"head_dim": 24})
    model = Subject.of(odd, 4, tmp_path)
    with pytest.raises(
        ValueError, match=r"type = q8_0: must be one whose blocks, here of 32 values, divide the heads of layer 1, of 24"
    ):
        model.native.set_streaming("layers=1;type=q8_0")
