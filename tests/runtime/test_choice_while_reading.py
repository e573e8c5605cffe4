"""`auto=…` and a prompt that comes in one batch: each layer is measured when the prompt has passed it, and the laziest one of too many
is cut at once (LightTransfer, arXiv 2410.13846, algorithm 1). What is chosen, computed, taken and left."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.families import COMMON, FAMILIES
from support.lazy import laziest, lazy_ratios
from support.native import FULL, KV_BYTES, PARTIAL, PROMPT, STREAMING, DecodeError, Model, api
from support.oracle import EXACT, Subject, difference, random_tokens
from support.talkie import write_talkie
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture
from support.transcript import Transcript

from lt_gguf import Llama
from lt_gguf.spec import StreamingSpec, parse_layers

SINK, WINDOW, W_LAST, N_UBATCH = 4, 60, 32, 64
N_LAYER, N_CTX = 8, 2048
N_FEW = 256  # cells of each layer before one is chosen: sinks, window and an ubatch
LAYER_BYTES = 4 * 2 * COMMON["num_key_value_heads"] * COMMON["hidden_size"] // COMMON["num_attention_heads"]  # of a token, f32
HIDDEN_BYTES = 4 * COMMON["hidden_size"]
fractions = pytest.mark.parametrize("fraction", [0.4, 0.5, 0.75, 1])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Subject:
    return Subject.build("llama", N_LAYER, tmp_path_factory.mktemp("queue"))


def auto(fraction: float, lazy: str = "min") -> str:
    return f"auto={fraction};sink={SINK};window={WINDOW};w_last={W_LAST};lazy={lazy}"


def context_of(model: Subject, fraction: float = 0.5, lazy: str = "min", **settings):
    return model.context(auto(fraction, lazy), **dict(n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_UBATCH) | settings)


def chosen(context) -> tuple[int, ...]:
    return parse_layers(re.search(r"layers=([^;]*)", context.streaming())[1], context.model.n_layer)


def spec_of(context) -> StreamingSpec:
    return StreamingSpec(chosen(context), context.model.n_layer, SINK, WINDOW, "full")


@contextmanager
def watched(context):
    """Within the block: bytes of the full part, and of all that it doesn't keep, whenever somebody asks how far a prompt is."""
    seen = []
    parts = (FULL, STREAMING, PROMPT)
    with api().progress(context.handle, lambda share: not seen.append([context.kv_bytes(part) for part in parts])):
        yield seen


@fractions
@pytest.mark.parametrize("kv, flash", [("f32", False), ("f16", True), ("q8_0", True)])
@pytest.mark.parametrize("lazy", ["min", "mean"])
def test_the_same_choice_and_the_same_numbers_as_at_the_end(model, fraction, kv, flash, lazy):
    tokens = random_tokens(1430)
    said = []
    for n_batch in (N_UBATCH, N_CTX):
        with context_of(model, fraction, lazy, kv=kv, flash=flash) as context, watched(context) as seen:
            first = context.read_prompt(tokens[:1000], n_batch=n_batch)
            assert len(seen) == 16 * (N_LAYER if n_batch == N_CTX else 1)
            later = [
                context.decode_one_by_one(tokens[1000:1100], 1000),
                context.read_prompt(tokens[1100:1400], 1100, n_batch=n_batch),
            ]
            later.append(context.decode_one_by_one(tokens[1400:], 1400))
            held = [context.positions(part) for part in (FULL, STREAMING)]
            n_bytes = [context.kv_bytes(part) for part in (FULL, STREAMING, PROMPT)]
            said.append((first, later, context.streaming(), context.lazy_ratios().tolist(), held, n_bytes))
    (first, later, *rest), (first_whole, later_whole, *rest_whole) = said
    assert rest == rest_whole
    assert difference(first, first_whole) <= (EXACT if "LT_TEST_EXACT" in os.environ else 0)
    assert kv != "f32" or max(map(difference, later, later_whole)) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, tmp_path):
    model = Subject.build(family, N_LAYER, tmp_path)
    with context_of(model) as context, watched(context) as seen:
        assert any(f"is read in {N_LAYER} runs of layers" in line for line in context.log), context.log
        transcript = Transcript(model, None, context)
        transcript.read(700)
        assert len(seen) == N_LAYER * -(-700 // N_UBATCH)
        ratios = lazy_ratios(model.hf, np.array(transcript.tokens), SINK, WINDOW, W_LAST, "min")
        np.testing.assert_allclose(context.lazy_ratios(), ratios, rtol=0, atol=1e-5)
        assert chosen(context) == laziest(ratios, 0.5)
        transcript.spec = spec_of(context)
        transcript.decode(70)
        transcript.read(500)
        transcript.decode(20, 1)
        assert transcript.difference() < EXACT


@fractions
def test_so_many_layers_as_stay_full_and_one_are_held(model, fraction):
    n_full = N_LAYER - int(fraction * N_LAYER)
    few = N_LAYER * N_FEW * LAYER_BYTES
    n_tokens = 1900
    with context_of(model, fraction) as context:
        assert context.kv_bytes(FULL) == few
        context.prompt_begin(n_tokens)
        layers = (n_full + 1) * N_CTX * LAYER_BYTES  # taken before it is read, and not by a batch that might find none
        hidden = n_tokens * HIDDEN_BYTES
        assert [context.kv_bytes(part) for part in (FULL, PROMPT)] == [few, min(layers, N_LAYER * N_CTX * LAYER_BYTES) + hidden]
        with watched(context) as seen:
            context.read_prompt(random_tokens(n_tokens))
        kept = int(fraction * N_LAYER) * N_FEW * LAYER_BYTES
        assert max(map(sum, seen)) <= layers + hidden + few + kept
        assert [context.kv_bytes(part) for part in (FULL, STREAMING, PROMPT)] == [n_full * N_CTX * LAYER_BYTES, kept, 0]


@pytest.mark.parametrize("n_before", [0, 40])
def test_what_the_context_has_no_room_for_is_refused(model, n_before):
    with context_of(model) as context:
        if n_before:
            context.read_prompt(random_tokens(n_before))
        with pytest.raises(
            ValueError, match=f"2040 tokens after {n_before} others does not fit" if n_before else "2049 tokens after 0"
        ):
            context.prompt_begin(2040 if n_before else 2049)
        assert not context.in_prompt() and context.kv_bytes(PROMPT) == 0


@pytest.mark.parametrize("n_batch", [N_UBATCH, N_CTX])
def test_the_limit_is_for_what_the_layers_take_that_come_to_stream(model, n_batch):
    """As a whole one of them and the hidden states, in batches all, and beside those that stay full until these are larger."""
    n_tokens, n_lazy = 1500, N_LAYER // 2
    by_layer = n_batch == N_CTX
    needed = N_CTX * LAYER_BYTES + n_tokens * HIDDEN_BYTES if by_layer else N_LAYER * 1536 * LAYER_BYTES
    with context_of(model, n_batch=n_batch) as context:
        few = context.kv_bytes(FULL)
        context.set_prompt_limit(needed - 1)
        with pytest.raises(ValueError, match=r"a prompt of 1500 tokens needs .* at most (\d+) tokens would fit") as refused:
            context.prompt_begin(n_tokens)
        n_fit = int(str(refused.value).split("at most ")[1].split()[0])
        assert 1200 < n_fit < n_tokens and (context.kv_bytes(FULL), context.kv_bytes(PROMPT)) == (few, 0)
        if not by_layer:
            with pytest.raises(DecodeError):  # nobody announces it
                context.read_prompt(random_tokens(n_tokens), n_batch=N_UBATCH)
        for n in (n_fit, n_tokens):
            context.clear()
            context.set_prompt_limit(needed - (n == n_fit))
            context.prompt_begin(n)
            context.read_prompt(random_tokens(n))
            assert len(chosen(context)) == n_lazy
        context.decode_one_by_one(random_tokens(20), n_tokens)


@pytest.mark.parametrize("n_batch", [N_UBATCH, N_CTX])
@pytest.mark.parametrize("kv", ["q8_0", "q4_0"])
@pytest.mark.parametrize("kept", [(), (0,), (5,), (1, 6), tuple(range(N_LAYER))])
def test_layers_in_16_bits_count_as_such(model, kv, kept, n_batch):
    """In what a prompt is said to need, in which way it is read therefore, in what it takes, and in what is left of it."""
    n_tokens, n_lazy = 1500, N_LAYER // 2
    values = LAYER_BYTES // 4
    token_bytes = [int(values * KV_BYTES["f16" if il in kept else kv]) for il in range(N_LAYER)]
    few = N_FEW * sum(token_bytes)
    # as a whole one layer at a time, and any may be the one; in batches all of them, before the laziest go
    whole, batches = N_CTX * max(token_bytes) + n_tokens * HIDDEN_BYTES, 1536 * sum(token_bytes)
    by_layer = n_batch == N_CTX and whole + few < batches  # small layers take less than the hidden states of the tokens
    needed = whole if by_layer else batches
    spec = f"{auto(0.5)};cache_keep={','.join(map(str, kept)) or 'none'}"
    settings = {"n_ctx": N_CTX, "n_ubatch": N_UBATCH, "n_batch": n_batch, "kv": kv, "flash": True}
    with model.context(spec, **settings) as context, watched(context) as seen:
        assert context.kv_bytes(FULL) == few
        context.set_prompt_limit(needed - 1)
        with pytest.raises(ValueError, match="a prompt of 1500 tokens needs"):
            context.prompt_begin(n_tokens)
        assert (context.kv_bytes(FULL), context.kv_bytes(PROMPT)) == (few, 0)
        context.set_prompt_limit(needed)
        context.prompt_begin(n_tokens)
        context.read_prompt(random_tokens(n_tokens))
        assert (len(seen) > 2 * -(-n_tokens // N_UBATCH)) == by_layer
        layers = chosen(context)
        assert len(layers) == n_lazy
        full = sum(token_bytes[il] for il in range(N_LAYER) if il not in layers)
        streaming = sum(token_bytes[il] for il in layers)
        assert [context.kv_bytes(part) for part in (FULL, STREAMING, PROMPT)] == [N_CTX * full, N_FEW * streaming, 0]
        if by_layer:
            most = N_CTX * sum(sorted(token_bytes)[-n_lazy - 1 :]) + n_tokens * HIDDEN_BYTES
            assert max(map(sum, seen)) <= most + few + N_FEW * streaming
        assert np.isfinite(context.decode_one_by_one(random_tokens(20), n_tokens)).all()


@fractions
@pytest.mark.parametrize("n_before", [0, 7, 60])
def test_after_a_short_message(subject_rows, model, fraction, n_before):
    """It is too short to choose by, and its keys and values are there in all layers."""
    with context_of(model, fraction) as context, watched(context) as seen:
        transcript = Transcript(model, None, context)
        if n_before:
            transcript.read(n_before)
            transcript.decode(3)
            assert chosen(context) == ()
        seen.clear()
        transcript.read(900)
        assert len(seen) == N_LAYER * -(-900 // N_UBATCH)
        ratios = lazy_ratios(model.hf, np.array(transcript.tokens), SINK, WINDOW, W_LAST, "min")
        np.testing.assert_allclose(context.lazy_ratios(), ratios, rtol=0, atol=1e-5)
        assert transcript.difference() <= EXACT  # until now all layers were full
        subject_rows(transcript)
        transcript.spec = spec_of(context)
        transcript.decode(80)
        transcript.read(300)
        transcript.decode(5)
        assert transcript.difference() <= EXACT


@pytest.fixture
def subject_rows():
    """What was computed before the choice was with all layers full, so that it is one prompt to what comes after."""

    def forget(transcript: Transcript) -> None:
        transcript.rows, transcript.prompts = {}, [(0, len(transcript))]

    return forget


@pytest.mark.parametrize("n_checks", [0, 30, 400, 1500])
@pytest.mark.parametrize("n_before", [0, 50])
def test_an_abort_leaves_what_was_there_before(model, n_before, n_checks):
    tokens = random_tokens(1300)
    with context_of(model) as context:
        if n_before:
            context.read_prompt(tokens[:n_before])
        few = context.kv_bytes(FULL)
        context.abort_after(n_checks)
        with pytest.raises(DecodeError) as aborted:
            context.read_prompt(tokens[n_before:1100], n_before)
        assert aborted.value.code == 2
        context.abort_after(None)
        assert context.positions(FULL) == list(range(n_before)) and not context.in_prompt()
        assert (context.kv_bytes(FULL), context.kv_bytes(PROMPT)) == (few, 0)
        assert chosen(context) == ()
        if n_before:
            assert (
                difference(context.decode_one_by_one(tokens[n_before : n_before + 5], n_before), answer(model, tokens, n_before))
                <= EXACT
            )
            assert context.seq_rm(0, n_before, -1)
        again = context.read_prompt(tokens[n_before:1100], n_before), context.decode_one_by_one(tokens[1100:1120], 1100)
        layers = chosen(context)
    with context_of(model) as other:
        if n_before:
            other.read_prompt(tokens[:n_before])
        expected = other.read_prompt(tokens[n_before:1100], n_before), other.decode_one_by_one(tokens[1100:1120], 1100)
        assert chosen(other) == layers
    assert max(map(difference, again, expected)) <= EXACT


def answer(model: Subject, tokens: np.ndarray, n_before: int) -> np.ndarray:
    with context_of(model) as context:
        context.read_prompt(tokens[:n_before])
        return context.decode_one_by_one(tokens[n_before : n_before + 5], n_before)


@pytest.mark.parametrize("until", [0.3, 0.9])
def test_a_caller_that_wants_no_more_of_it(model, until):
    """Before a layer has been cut, and when some have: what these keep lies in memory of the part that was empty before."""
    tokens = random_tokens(1000)
    with context_of(model) as context, context_of(model) as other:
        few = context.kv_bytes(FULL)
        with api().progress(context.handle, lambda share: share < until), pytest.raises(DecodeError):
            context.read_prompt(tokens)
        assert context.positions(FULL) == [] and chosen(context) == ()
        assert (context.kv_bytes(FULL), context.kv_bytes(PROMPT)) == (few, 0)
        for message in (tokens[:50], tokens):
            assert (context.read_prompt(message) == other.read_prompt(message)).all()
            context.clear()
            other.clear()


def test_an_emptied_context_chooses_anew(model):
    seen = set()
    with context_of(model) as context:
        few = context.kv_bytes(FULL)
        for seed in range(5):
            tokens = random_tokens(700 + 50 * seed, np.random.default_rng(seed))
            context.prompt_begin(len(tokens))
            assert context.kv_bytes(FULL) == few  # it has not grown, because the prompt comes as a whole
            context.read_prompt(tokens)
            ratios = lazy_ratios(model.hf, tokens, SINK, WINDOW, W_LAST, "min")
            assert chosen(context) == laziest(ratios, 0.5)
            seen.add(chosen(context))
            context.clear()
            assert context.kv_bytes(FULL) == few
    assert len(seen) > 1, "prompts that choose the same layers show nothing"


def test_states_and_checkpoints_of_what_was_chosen_so(model):
    with context_of(model) as context:
        saved = Transcript(model, None, context)
        saved.read(700)
        saved.spec = spec_of(context)
        saved.decode(10)
        checkpoint, state = context.save_seq(0, PARTIAL), context.save_seq()
        kept = saved.copy(0)
        saved.decode(70)
        assert context.restore_seq(checkpoint, 0, PARTIAL) and context.seq_rm(0, 710, -1)
        kept.decode(20)
        assert kept.difference() <= EXACT
    with context_of(model) as other:
        assert other.restore_seq(state) and chosen(other) == saved.spec.layers
        restored = kept.copy(0, other)
        restored.forget(710)
        restored.decode(70)
        restored.read(300)
        assert restored.difference() <= EXACT


def test_a_model_that_cannot_be_cut_takes_all_its_layers(hybrid_file, tmp_path):
    file, tokens = write_talkie(tmp_path / "talkie.gguf", hybrid_file), random_tokens(1000)
    rows = []
    with Model(file) as model:
        model.set_streaming("auto=0.5;sink=2;window=40;w_last=8")
        for n_batch in (N_UBATCH, N_CTX):
            with model.context(n_ctx=N_CTX, n_batch=n_batch, n_ubatch=N_UBATCH) as context:
                assert not api().fits_by_layer(context.handle, 0, 900)
                context.prompt_begin(900)
                assert context.kv_bytes(FULL) == model.n_layer * 1024 * (2 * 2 * 16 * 4)
                rows.append((context.read_prompt(tokens[:900]), context.decode_one_by_one(tokens[900:950], 900)))
    assert all(difference(*pair) <= EXACT for pair in zip(*rows))


STEPS = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 60) | st.integers(200, 900)),
    st.tuples(st.just("decode"), st.integers(1, 40)),
    st.tuples(st.just("go back"), st.integers(1, 80)),
    st.tuples(st.just("stop"), st.integers(300, 900)),
    st.tuples(st.just("clear"), st.just(0)),
)


@pytest.mark.slow
@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, min_size=2, max_size=10), until=st.floats(0, 0.99))
def test_whatever_is_done_is_done_as_in_batches(model, steps, until):
    """Two contexts: one is given each prompt at once and stopped in some; what they hold and say is the same."""
    with context_of(model) as whole, context_of(model) as other:
        n = 0
        for what, amount in steps:
            new = random_tokens(min(amount, N_CTX - n), np.random.default_rng([n, amount]))
            rows = []
            if not len(new):
                continue
            if what == "read":
                rows = [whole.read_prompt(new, n), other.read_prompt(new, n, n_batch=N_UBATCH)]
                n += len(new)
            elif what == "stop":
                if api().fits_by_layer(whole.handle, 0, len(new)) and not whole.in_prompt():
                    with api().progress(whole.handle, lambda share: share < until), pytest.raises(DecodeError):
                        whole.read_prompt(new, n)
            elif what == "decode":
                rows = [context.decode_one_by_one(new, n) for context in (whole, other)]
                n += len(new)
            elif what == "go back":
                done = {context.seq_rm(0, max(0, n - amount), -1) for context in (whole, other)}
                assert len(done) == 1
                n = max(0, n - amount) if done == {True} else n
            else:
                whole.clear()
                other.clear()
                n = 0
            assert whole.streaming() == other.streaming()
            for part in (FULL, STREAMING):
                assert whole.positions(part) == other.positions(part)
            assert not rows or difference(*rows) <= EXACT
            assert whole.kv_bytes(PROMPT) == other.kv_bytes(PROMPT) == 0


def test_a_prompt_that_is_short_for_the_context_is_read_in_batches(model):
    """Layers of the context's size, one more than stay full, would take more than all have for the prompt."""
    with context_of(model, n_ctx=16 * N_CTX) as context, watched(context) as seen:
        context.read_prompt(random_tokens(1000))
        assert len(seen) == 16 and max(map(sum, seen)) == N_LAYER * 1024 * LAYER_BYTES
        assert len(chosen(context)) == N_LAYER // 2 and context.kv_bytes(FULL) == N_LAYER // 2 * 16 * N_CTX * LAYER_BYTES


def test_llama_reads_so(demo_gguf):
    """One prompt, one batch, whatever n_batch is; and where it is read in batches, the same."""
    text = random_tokens(1500).tolist()
    said = []
    for by_layer in (True, False):
        llm = Llama(demo_gguf, n_ctx=4096, n_batch=128, streaming="auto=0.5;sink=4;window=60", verbose=False)
        assert llm.reads_by_layer(len(text))
        llm._reads_by_layer = by_layer
        llm.eval(text)
        said.append((llm.streaming, llm.kv_bytes(), llm.n_read))
        llm.close()
    assert said[0] == said[1] and said[0][0] is not None
