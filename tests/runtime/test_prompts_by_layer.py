"""A prompt that comes in one batch passes all its tokens through some layers before the next ones: what that gives, takes and leaves."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from support.families import COMMON, FAMILIES
from support.native import FULL, PROMPT, STREAMING, DecodeError, Model, api
from support.oracle import EXACT, Subject, difference, random_tokens
from support.talkie import write_talkie
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture
from support.transcript import Transcript

from lt_gguf import Llama

SINK, WINDOW, N_UBATCH = 4, 150, 64
N_LAYER, N_CTX = 6, 2048
LAYERS = {"some": [0, 3, 4], "half": [1, 3, 5], "most": [0, 1, 2, 4, 5], "all": [0, 1, 2, 3, 4, 5]}
TOKEN_BYTES = 4 * 2 * COMMON["num_key_value_heads"] * COMMON["hidden_size"] // COMMON["num_attention_heads"]  # of a layer, f32
HIDDEN_BYTES = 4 * COMMON["hidden_size"]
RUNS = {"some": 5, "half": 6, "most": 6, "all": 6}  # each streaming layer, and the full layers between them
layers = pytest.mark.parametrize("layers", LAYERS)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Subject:
    return Subject.build("llama", N_LAYER, tmp_path_factory.mktemp("by-layer"))


def context_of(model, layers="half", n_batch=N_CTX, **settings):
    spec = model.spec(SINK, WINDOW, LAYERS[layers], prefill="full")
    return model.context(spec, **dict(n_ctx=N_CTX, n_batch=n_batch, n_ubatch=N_UBATCH) | settings)


@contextmanager
def most_bytes(context):
    """The most that the prompt part takes within the block, as `[bytes]`, and how often somebody asked."""
    seen = []
    with api().progress(context.handle, lambda share: not seen.append((share, context.kv_bytes(PROMPT)))):
        yield seen


def converse(context) -> list[np.ndarray]:
    """A long prompt, an answer, a long message, an answer, a short message."""
    tokens = random_tokens(1600)
    context.prompt_begin(700)
    return [
        context.read_prompt(tokens[:700]),
        context.decode_one_by_one(tokens[700:720], 700),
        context.read_prompt(tokens[720:1300], 720),
        context.decode_one_by_one(tokens[1300:1310], 1300),
        context.read_prompt(tokens[1310:1330], 1310),
    ]


@layers
@pytest.mark.parametrize("kv, flash", [("f32", False), ("f16", True), ("q8_0", True)])
@pytest.mark.parametrize("n_seq, unified", [(1, False), (2, True), (2, False)])
def test_the_same_numbers_as_batch_by_batch(model, layers, kv, flash, n_seq, unified):
    """On the CPU bit for bit, as long as what is added up lies in the same order: until the first prompt has ended."""
    answers, held = [], []
    for n_batch in (N_UBATCH, N_CTX):
        with context_of(
            model, layers, n_batch, n_ctx=N_CTX * n_seq, kv=kv, flash=flash, n_seq_max=n_seq, kv_unified=unified
        ) as context:
            answers.append(converse(context))
            held.append([context.positions(part) for part in (FULL, STREAMING)])
            assert context.kv_bytes(PROMPT) == 0
    assert held[0] == held[1]
    first, *later = map(difference, *answers)
    assert first <= (EXACT if "LT_TEST_EXACT" in os.environ else 0)
    assert kv != "f32" or max(later) <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_so(family, tmp_path):
    model = Subject.build(family, N_LAYER, tmp_path)
    with context_of(model, "most") as context, most_bytes(context) as seen:
        assert any("is read in 6 runs of layers" in line for line in context.log), context.log
        transcript = Transcript(model, model.spec(SINK, WINDOW, LAYERS["most"], prefill="full"), context)
        transcript.read(500)
        assert len(seen) == 6 * -(-500 // N_UBATCH)
        transcript.decode(20, 1)
        assert transcript.difference() < EXACT


def test_a_model_whose_layers_pass_on_more_is_read_as_ever(hybrid_file, tmp_path):
    """The embeddings of all tokens are added in each of its layers."""
    file, tokens = write_talkie(tmp_path / "talkie.gguf", hybrid_file), random_tokens(1200)
    answers = []
    with Model(file) as model:
        model.set_streaming("layers=0-3;sink=2;window=40;prefill=full")
        for n_batch in (N_UBATCH, N_CTX):
            with model.context(n_ctx=N_CTX, n_batch=n_batch, n_ubatch=N_UBATCH) as context:
                said = [line for line in context.log if "make_runs" in line]
                assert len(said) == 1 and "pass on more than the hidden states: all streaming layers hold a prompt" in said[0]
                assert not api().fits_by_layer(context.handle, 0, 1000)
                context.prompt_begin(1000)
                assert context.kv_bytes(PROMPT) == 1024 * 4 * (2 * 2 * 16 * 4)
                answers.append((context.read_prompt(tokens[:1000]), context.decode_one_by_one(tokens[1000:1020], 1000)))
    assert all(difference(*pair) <= EXACT for pair in zip(*answers))


@layers
def test_one_streaming_layer_holds_the_prompt_at_a_time(model, layers):
    tokens = random_tokens(1400)
    with context_of(model, layers) as context, most_bytes(context) as seen:
        context.read_prompt(tokens[:1000])
        assert {n_bytes for _, n_bytes in seen[:-1]} == {1024 * TOKEN_BYTES + 1000 * HIDDEN_BYTES}
        shares = [share for share, _ in seen]
        assert shares == sorted(set(shares)) and shares[-1] == 1 and len(shares) == RUNS[layers] * 16
        seen.clear()
        # what is kept of a second prompt can't go to where that of the first one must stay until the end
        context.read_prompt(tokens[1000:], 1000)
        kept = 256 * TOKEN_BYTES * len(LAYERS[layers])
        assert {n_bytes for _, n_bytes in seen[:-1]} == {768 * TOKEN_BYTES + 400 * HIDDEN_BYTES + kept}


@pytest.mark.parametrize("n_checks", [0, 30, 400, 1200])
@layers
def test_an_abort_leaves_what_was_there_before(model, layers, n_checks):
    tokens = random_tokens(1300)
    with context_of(model, layers) as context:
        context.read_prompt(tokens[:300])
        context.decode_one_by_one(tokens[300:310], 300)
        before = [context.positions(part) for part in (FULL, STREAMING)]
        context.abort_after(n_checks)
        with pytest.raises(DecodeError) as aborted:
            context.read_prompt(tokens[310:1100], 310)
        assert aborted.value.code == 2
        context.abort_after(None)
        assert [context.positions(part) for part in (FULL, STREAMING)] == before
        assert context.kv_bytes(PROMPT) == 0 and not context.in_prompt()
        again = context.read_prompt(tokens[310:1100], 310), context.decode_one_by_one(tokens[1100:1120], 1100)
    with context_of(model, layers, N_UBATCH) as other:
        other.read_prompt(tokens[:300])
        other.decode_one_by_one(tokens[300:310], 300)
        expected = other.read_prompt(tokens[310:1100], 310), other.decode_one_by_one(tokens[1100:1120], 1100)
    assert max(map(difference, again, expected)) <= EXACT


def test_the_limit_counts_one_layer_and_the_hidden_states(model):
    """Three layers at once would take more than it."""
    n, needed = 1000, 1024 * TOKEN_BYTES + 1000 * HIDDEN_BYTES
    with context_of(model) as context:
        context.set_prompt_limit(needed - 1)
        with pytest.raises(ValueError, match=r"a prompt of 1000 tokens needs .* at most (\d+) tokens would fit") as refused:
            context.prompt_begin(n)
        n_fit = int(str(refused.value).split("at most ")[1].split()[0])
        assert n - 300 < n_fit < n
        for n_tokens in (n_fit, n):
            context.clear()
            context.set_prompt_limit(needed - (n_tokens == n_fit))
            context.prompt_begin(n_tokens)
            assert context.kv_bytes(PROMPT) > 0
            context.read_prompt(random_tokens(n_tokens))


def test_a_prompt_that_was_announced_and_not_read_gives_its_memory_back(model):
    with context_of(model) as context:
        context.prompt_begin(1000)
        assert context.kv_bytes(PROMPT) == 1024 * TOKEN_BYTES + 1000 * HIDDEN_BYTES
        context.read_prompt(random_tokens(30))
        assert context.kv_bytes(PROMPT) == 0


def test_what_would_save_nothing_is_read_as_before(model):
    """The hidden states of a token take as much as one layer holds of it, here."""
    spec = model.spec(SINK, WINDOW, [3], prefill="full")
    with model.context(spec, n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_UBATCH) as context, most_bytes(context) as seen:
        context.read_prompt(random_tokens(1000))
        assert len(seen) == 16 and {n_bytes for _, n_bytes in seen[:-1]} <= {0, 1024 * TOKEN_BYTES}


@pytest.mark.parametrize("why", ["in-several-batches", "all-logits", "beside-another"])
def test_other_prompts_are_read_as_before(model, why):
    tokens = random_tokens(600)
    with context_of(model, n_seq_max=2, kv_unified=True) as context, most_bytes(context) as seen:
        if why == "in-several-batches":
            context.read_prompt(tokens, n_batch=300)
        elif why == "all-logits":
            context.prompt_begin(len(tokens))
            context.decode(tokens)
        else:
            from support.native import Token

            prompt = [Token(int(t), i, (0,), i == len(tokens) - 1) for i, t in enumerate(tokens)]
            context.decode_batch([*prompt, Token(5, 0, (1,), True)])
        assert max(n_bytes for _, n_bytes in seen) >= 3 * 512 * TOKEN_BYTES


class TestLlama:
    @pytest.fixture(scope="class")
    def llm(self, demo_gguf):
        with_layers = Llama(
            demo_gguf, n_ctx=4096, n_batch=128, streaming="layers=1,2,5;sink=4;window=60;prefill=full", verbose=False
        )
        yield with_layers
        with_layers.close()

    def test_a_long_prompt_comes_in_one_batch_and_gives_the_same(self, llm):
        text = random_tokens(1500).tolist()
        answers = []
        for by_layer in (True, False):
            llm._reads_by_layer = by_layer
            llm.reset()
            llm.eval(text)
            answers.append(logits(llm))
            llm.eval([5])
            answers.append(logits(llm))
        llm._reads_by_layer = True
        assert difference(np.stack(answers[:2]), np.stack(answers[2:])) <= EXACT

    def test_ctrl_c_stops_it_and_loses_nothing_of_the_conversation(self, llm):
        text = random_tokens(3900).tolist()
        llm.reset()
        llm.eval(text[:200])
        llm.eval([7])
        expected = logits(llm)
        threading.Thread(target=lambda: (time.sleep(0.05), os.kill(os.getpid(), signal.SIGINT))).start()
        with pytest.raises(KeyboardInterrupt):
            llm.eval(text[200:])
        llm.n_tokens = 200
        llm.eval([7])
        assert difference(logits(llm), expected) <= EXACT
        llm.eval(text[201:])
        assert llm.n_tokens == len(text)


def logits(llm: Llama) -> np.ndarray:
    import llama_cpp

    return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, -1), (1, llm.n_vocab())).copy()
