"""`auto=…`: at the end of the first prompt each layer's lazy ratio is measured, and the laziest layers stream from then on.

The first prompt is the first one at whose end there are more tokens than sink and window: before, a streaming layer would
hold everything and there is nothing to choose by.
"""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from support.checkpoints import save_gguf
from support.families import COMMON, FAMILIES
from support.lazy import laziest, lazy_ratios
from support.native import FULL, PARTIAL, PROMPT, STREAMING, Model
from support.oracle import EXACT, EXACT_RATIO, RELATIVE, Subject, random_tokens
from support.transcript import Transcript

from lt_gguf.spec import Lazy, StreamingSpec, parse_layers
from lt_gguf.spec.auto import LAZY

SINK, WINDOW, W_LAST = 4, 60, 32
# the largest error of a ratio, about five times what was measured
BOUNDS = {("f32", False): 1e-6, ("f32", True): 2e-4, ("f16", False): 2e-4, ("f16", True): 2e-4, ("bf16", True): 5e-4}
BOUNDS |= {("q8_0", True): 1e-3, ("q4_0", True): 1e-2}
BOUNDS = {setting: max(bound, EXACT_RATIO) for setting, bound in BOUNDS.items()}


def auto(fraction: float, sink: int = SINK, window: int = WINDOW, w_last: int = W_LAST, lazy: Lazy = "min") -> str:
    return f"auto={fraction};sink={sink};window={window};w_last={w_last};lazy={lazy}"


def context_of(model: Subject, text: str, **settings):
    return model.context(text, **dict(n_ctx=1024, n_batch=512, n_ubatch=64) | settings)


def chosen(context) -> tuple[int, ...]:
    return parse_layers(re.search(r"layers=([^;]*)", context.streaming())[1], context.model.n_layer)


def spec_of(context, sink: int = SINK, window: int = WINDOW) -> StreamingSpec:
    return StreamingSpec(chosen(context), context.model.n_layer, sink, window, "full")


def cases():
    for number, family in enumerate(FAMILIES):
        for index, (kv, flash) in enumerate(BOUNDS):
            usual = family in ("llama", "smollm3") or (kv, flash) == ("f32", False) or index == number % len(BOUNDS)
            yield pytest.param(family, kv, flash, marks=() if usual else pytest.mark.full)


@pytest.mark.slow
@pytest.mark.parametrize("lazy", LAZY)
@pytest.mark.parametrize("family, kv, flash", list(cases()))
def test_ratios_are_those_of_plain_softmax(subject, measured, family, kv, flash, lazy):
    model = subject(family)
    tokens = random_tokens(500)
    expected = lazy_ratios(model.hf, tokens, SINK, WINDOW, W_LAST, lazy)
    with context_of(model, auto(0.5, lazy=lazy), kv=kv, flash=flash) as context:
        assert context.lazy_ratios() is None
        context.read_prompt(tokens, n_batch=128)
        worst = float(np.abs(context.lazy_ratios() - expected).max())
    assert ((expected > 0) & (expected < 1)).all() and len(set(expected)) == model.n_layer
    measured(family, f"lazy ratio ({lazy}), {kv} KV" + ", flash attention" * flash, worst, BOUNDS[kv, flash])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_notices_one_key_and_one_query_too_many(subject, family):
    model, tokens = subject(family), random_tokens(500)
    expected = lazy_ratios(model.hf, tokens, SINK, WINDOW, W_LAST)
    for change in [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]:
        other = lazy_ratios(model.hf, tokens, *np.add((SINK, WINDOW, W_LAST), change))
        assert np.abs(other - expected).max() > 2 * BOUNDS["f32", True]


@pytest.mark.slow
@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("n_ubatch", [1, 16, 33, 512])
@pytest.mark.parametrize("n_batch", [1, 7, 31, 32, 33, 200, 299, 300])
def test_every_split_gives_the_same(subject, n_batch, n_ubatch, flash):
    """Also where the last queries are spread over many batches, and the last batch has one token."""
    model = subject("llama")
    tokens = random_tokens(300, seed=1)
    with context_of(model, auto(0.5), n_ubatch=n_ubatch, flash=flash) as context:
        context.read_prompt(tokens, n_batch=n_batch)
        expected = lazy_ratios(model.hf, tokens, SINK, WINDOW, W_LAST, "min")
        np.testing.assert_allclose(context.lazy_ratios(), expected, rtol=0, atol=BOUNDS["f32", flash])


@pytest.mark.parametrize("sink, window, w_last", [(0, 1, 1), (0, 33, 8), (129, 300, 64), (4, 60, 600), (7, 1, 32)])
@pytest.mark.parametrize("n", [2, 9, 31, 32, 34, 64, 65, 66, 500])
def test_prompts_of_every_length(subject, n, sink, window, w_last):
    """Shorter than w_last, and as long as sinks and window or one more."""
    model = subject("llama")
    tokens = random_tokens(n, seed=n)
    with context_of(model, auto(0.5, sink, window, w_last)) as context:
        context.read_prompt(tokens, n_batch=100)
        if n <= sink + window:
            assert context.lazy_ratios() is None and chosen(context) == ()
        else:
            expected = lazy_ratios(model.hf, tokens, sink, window, w_last, "min")
            np.testing.assert_allclose(context.lazy_ratios(), expected, rtol=0, atol=BOUNDS["f32", False])
            assert chosen(context) == laziest(expected, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "llama-mha", "gemma", "smollm3"])
@pytest.mark.parametrize("fraction", [0, 0.24, 0.25, 0.5, 0.74, 1])
def test_the_laziest_layers_stream_from_then_on(subject, measured, family, fraction):
    model = subject(family)
    before = f"auto={fraction:g};layers=none;sink={SINK};window={WINDOW};prefill=full;w_last={W_LAST};lazy=min"
    with context_of(model, auto(fraction), n_ctx=2048) as context:
        assert context.streaming() == before
        transcript = Transcript(model, None, context)
        transcript.read(500, n_batch=128, end=False, most=True)
        assert context.streaming() == before
        transcript.read(100, most=True)
        layers = laziest(lazy_ratios(model.hf, np.array(transcript.tokens), SINK, WINDOW, W_LAST, "min"), fraction)
        assert chosen(context) == layers
        if layers:
            transcript.spec = spec_of(context)
            assert context.positions(STREAMING) == [*range(SINK), *range(600 - WINDOW, 600)]
        transcript.decode(70)
        transcript.read(150, n_batch=40, most=True)
        transcript.decode(20, together=10)
        assert chosen(context) == layers, "later prompts choose nothing"
        measured(family, "prefill = full, layers chosen for the prompt", transcript.difference(), EXACT, layers=layers)


@pytest.mark.parametrize("kv", ["f16", "q8_0", "q4_0"])
def test_error_of_other_types_is_that_of_the_full_model(subject, measured, kv):
    model = subject("llama")
    errors = []
    for text in ("off", auto(0.5)):
        with context_of(model, text, kv=kv, flash=True) as context:
            transcript = Transcript(model, None, context)
            transcript.read(400, n_batch=128, most=True)
            if text != "off":
                transcript.spec = spec_of(context)
            transcript.decode(40)
            transcript.read(50, most=True)
            errors.append(transcript.difference())
    full, hybrid = errors
    measured("llama", f"prefill = full, layers chosen for the prompt, {kv} KV", hybrid, RELATIVE * full, full=full)


def test_a_conversation_that_begins_with_a_short_message_chooses_at_a_later_one(subject):
    """The layers of a greeting would be no choice; all stay full until a prompt ends behind sinks and window."""
    model = subject("llama")
    with context_of(model, auto(0.5)) as context:
        transcript = Transcript(model, None, context)
        transcript.read(20)
        transcript.decode(70)
        transcript.decode(10, together=10)
        assert chosen(context) == () and context.lazy_ratios() is None
        transcript.read(50, most=True)
        ratios = lazy_ratios(model.hf, np.array(transcript.tokens), SINK, WINDOW, W_LAST, "min")
        np.testing.assert_allclose(context.lazy_ratios(), ratios, rtol=0, atol=BOUNDS["f32", False])
        assert chosen(context) == laziest(ratios, 0.5)
        assert transcript.difference() <= EXACT  # so far all layers were full
        transcript.rows, transcript.prompts = {}, [(0, len(transcript))]
        transcript.spec = spec_of(context)
        transcript.decode(80)
        transcript.read(20)
        assert transcript.difference() <= EXACT


def test_of_equal_layers_the_lower_ones_stay_full(tmp_path):
    """Queries of zero make all attention even, so that every layer's ratio is the same."""
    model = FAMILIES["llama"].build_model(4)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    even = Subject("llama", model, Model(save_gguf(model, FAMILIES["llama"], tmp_path)))
    for fraction, layers in ((0.25, (3,)), (0.5, (2, 3)), (0.75, (1, 2, 3))):
        with context_of(even, auto(fraction)) as context:
            context.read_prompt(random_tokens(200))
            assert len(set(context.lazy_ratios())) == 1
            assert chosen(context) == layers


@pytest.mark.slow
@pytest.mark.parametrize(
    "clear",
    [
        pytest.param(lambda c: c.clear(), id="clear"),
        pytest.param(lambda c: c.seq_rm(0, -1, -1), id="rm"),
        pytest.param(lambda c: c.seq_rm(0, 0, -1), id="rm from 0"),
        pytest.param(lambda c: c.seq_keep(1), id="keep another"),
        pytest.param(lambda c: c.seq_add(0, 0, -1, -10_000), id="shift out"),
    ],
)
def test_an_empty_memory_begins_anew(subject, clear):
    """All layers are full again, and the next first prompt chooses its own."""
    model = subject("llama")
    seen = set()
    with context_of(model, auto(0.5), n_ctx=1024) as context:
        full = context.kv_bytes(FULL)
        for seed in range(6):
            transcript = Transcript(model, None, context, seed=seed)
            transcript.read(200 + 50 * seed, n_batch=100)
            ratios = lazy_ratios(model.hf, np.array(transcript.tokens), SINK, WINDOW, W_LAST, "min")
            assert chosen(context) == laziest(ratios, 0.5)
            np.testing.assert_allclose(context.lazy_ratios(), ratios, rtol=0, atol=1e-4)
            seen.add(chosen(context))
            transcript.spec = spec_of(context)
            transcript.decode(40)
            assert transcript.difference() <= EXACT
            clear(context)
            assert chosen(context) == () and context.kv_bytes(FULL) == full
    assert len(seen) > 1, "prompts that choose the same layers show nothing"


@pytest.mark.parametrize("fraction", [0.5, 1])
def test_the_memory_of_the_chosen_layers_is_given_back(subject, fraction):
    model = subject("llama")
    layer_bytes = 4 * 2 * COMMON["num_key_value_heads"] * COMMON["hidden_size"] // COMMON["num_attention_heads"]
    n_streaming = int(fraction * 4)
    with context_of(model, auto(fraction), n_ctx=2048) as context:
        few = 4 * 256 * layer_bytes  # before there is much, no layer has cells for all of the context
        assert (context.kv_bytes(FULL), context.kv_bytes(PROMPT)) == (few, 0)
        transcript = Transcript(model, None, context)
        transcript.read(200, end=False)
        assert context.kv_bytes(FULL) == few
        transcript.read(100, end=False)
        assert context.kv_bytes(FULL) == 4 * 512 * layer_bytes
        transcript.read(1700, n_batch=512, end=False)
        assert context.kv_bytes(FULL) == 4 * 2048 * layer_bytes
        transcript.read(40)
        assert context.kv_bytes(FULL) == (4 - n_streaming) * 2048 * layer_bytes
        assert context.kv_bytes(STREAMING) == n_streaming * 256 * layer_bytes
        assert context.kv_bytes(PROMPT) == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", ["whole", "sequence"])
@pytest.mark.parametrize("n_ctx, n_ubatch", [(1024, 64), (2048, 16)])
def test_states_carry_the_choice(subject, what, n_ctx, n_ubatch):
    model = subject("llama")
    with context_of(model, auto(0.5)) as context:
        saved = Transcript(model, None, context)
        saved.read(500)
        saved.spec = spec_of(context)
        saved.decode(20)
        state = context.save() if what == "whole" else context.save_seq()
        text, ratios = context.streaming(), context.lazy_ratios()

    def restore(context) -> bool:
        return context.restore(state) if what == "whole" else context.restore_seq(state)

    with context_of(model, auto(0.5), n_ctx=n_ctx, n_ubatch=n_ubatch) as context:
        for n_before in (0, 300):  # into an empty context, and into one that has chosen other layers
            if n_before:
                context.clear()
                context.read_prompt(random_tokens(n_before, seed=8))
            assert restore(context) and context.streaming() == text
            known = context.lazy_ratios()  # the state's own or none, but not those of what was there before
            assert known is None or known.tolist() == ratios.tolist()
            transcript = saved.copy(0, context)
            transcript.decode(70)
            transcript.read(90, most=True)
            assert transcript.difference() <= EXACT
    for other in (auto(0.25), auto(0.5, sink=5), auto(0.5, window=61), str(replace(saved.spec, prefill="stream"))):
        with context_of(model, other) as context:
            assert not restore(context), other


def test_states_from_before_the_choice(subject):
    """In the middle of the first prompt all layers are still full."""
    model = subject("llama")
    with context_of(model, auto(0.5)) as context:
        saved = Transcript(model, None, context)
        saved.read(300, end=False)
        state = context.save_seq()
        saved.read(10)
    with context_of(model, auto(0.5)) as context:
        context.read_prompt(random_tokens(200, seed=8))
        assert context.restore_seq(state) and chosen(context) == () and context.in_prompt()
        saved.forget(300)
        transcript = saved.copy(0, context)
        transcript.read(100)
        ratios = lazy_ratios(model.hf, np.array(transcript.tokens), SINK, WINDOW, W_LAST, "min")
        assert chosen(context) == laziest(ratios, 0.5)
        transcript.spec = spec_of(context)
        transcript.decode(50)
        assert transcript.difference() <= EXACT


def test_checkpoints_and_rewinds_keep_the_choice(subject):
    model = subject("llama")
    with context_of(model, auto(0.5)) as context:
        transcript = Transcript(model, None, context)
        transcript.read(400)
        transcript.spec, text = spec_of(context), context.streaming()
        checkpoint, saved = context.save_seq(0, PARTIAL), transcript.copy(0)
        transcript.decode(50)
        assert transcript.rewind(420)
        transcript.read(200)
        assert context.restore_seq(checkpoint, 0, PARTIAL) and context.seq_rm(0, 400, -1)
        saved.decode(60)
        assert context.streaming() == text
        assert transcript.difference() <= EXACT and saved.difference() <= EXACT


def test_several_sequences_are_an_error(subject):
    with pytest.raises(ValueError, match="one sequence only, this context has 2"):
        context_of(subject("llama"), auto(0.5), n_seq_max=2)


@pytest.mark.parametrize(
    "text, words",
    [
        ("auto=1.5", "auto.*1.5.*from 0 to 1"),
        ("auto=-0.1", "auto"),
        ("auto=half", "auto.*half"),
        ("auto=nan", "auto"),
        ("auto=0.5;w_last=0", "w_last.*0"),
        ("auto=0.5;prefill=stream", "prefill"),
        ("auto=0.5;window=0", "window"),
        ("layers=1;w_last=8", "w_last"),
    ],
)
def test_malformed_specs_are_refused(subject, text, words):
    model = subject("llama").native
    with pytest.raises(ValueError, match=words):
        model.set_streaming(text)
    assert model.streaming() == "off"
