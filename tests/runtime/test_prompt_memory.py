"""The memory of `prefill = full`: it exists while a long prompt is read, once for all sequences, within a limit."""

from __future__ import annotations

import ctypes

import pytest
from support.families import COMMON
from support.native import FULL, KV_BYTES, PROMPT, STREAMING, C, DecodeError, Model, log
from support.oracle import EXACT, Subject, difference, random_tokens
from support.transcript import Transcript

from lt_gguf.runtime.library import LIBRARY, library_dir
from lt_gguf.spec.cache_types import streaming_cache_type

N_LAYER, LAYERS = 4, (1, 3)
SINK, WINDOW, N_UBATCH = 4, 60, 64
HEAD_DIM = COMMON["hidden_size"] // COMMON["num_attention_heads"]
VALUES_A_TOKEN = 2 * COMMON["num_key_value_heads"] * HEAD_DIM  # of a layer: K and V
F32_TOKEN_BYTES = 4 * VALUES_A_TOKEN * len(LAYERS)
N_HEAD = COMMON["num_attention_heads"]
CACHES = pytest.mark.parametrize("unified", [True, False], ids=["unified", "separate"])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Subject:
    return Subject.build("llama", N_LAYER, tmp_path_factory.mktemp("prompt-memory"))


def padded(cells: int) -> int:
    return -(-cells // 256) * 256


def context_of(model, n_ctx=4096, **settings):
    spec = model.spec(SINK, WINDOW, LAYERS, prefill="full")
    return spec, model.context(spec, n_ctx=n_ctx, **dict(n_batch=512, n_ubatch=N_UBATCH) | settings)


def streaming_bytes(n_seq: int, unified: bool, token_bytes: int = F32_TOKEN_BYTES) -> int:
    """The formula of the specification, section 9: sink and window of each sequence, a micro-batch, padding."""
    cells = padded((SINK + WINDOW) * (n_seq if unified else 1) + N_UBATCH)
    return cells * (1 if unified else n_seq) * token_bytes


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("kv, flash", [("f32", False), ("f16", True), ("q8_0", True), ("q4_0", True)])
@pytest.mark.parametrize("n_seq", [1, 3])
def test_before_during_and_after_a_long_prompt(model, kv, flash, n_seq, unified):
    """The prompt's memory is given back when its last batch has been decoded; the streaming part never changes."""
    spec, context = context_of(model, 4096 * n_seq, n_seq_max=n_seq, kv_unified=unified, kv=kv, flash=flash)
    token_bytes = int(VALUES_A_TOKEN * KV_BYTES[streaming_cache_type(kv)]) * len(LAYERS)
    streaming = streaming_bytes(n_seq, unified, token_bytes)
    with context:
        full = context.kv_bytes(FULL)
        for n in (3000, 1000):
            transcript = Transcript(model, spec, context, n_seq - 1)
            transcript.context.clear()
            assert (context.kv_bytes(PROMPT), context.kv_cells(PROMPT)) == (0, 0)
            assert context.kv_bytes(STREAMING) == streaming
            transcript.read(n - 100, n_batch=512, end=False)
            assert context.kv_bytes(STREAMING) == streaming
            held = context.kv_bytes(PROMPT) + streaming
            assert n * token_bytes * 0.9 <= held, "the streaming layers hold all of a prompt while it is read"
            assert context.kv_bytes(PROMPT) <= 2 * padded(n) * token_bytes
            transcript.read(100)
            assert (context.kv_bytes(PROMPT), context.kv_cells(PROMPT)) == (0, 0)
            transcript.decode(10)
            transcript.read(20)
            assert context.kv_bytes(PROMPT) == 0
            assert (context.kv_bytes(STREAMING), context.kv_bytes(FULL)) == (streaming, full)


@pytest.mark.slow
@CACHES
def test_a_declared_prompt_takes_one_piece(model, unified):
    """Once it no longer fits the spare cells, it gets memory for all of itself; without a declaration that grows."""
    spec, context = context_of(model, 8192, n_seq_max=2, kv_unified=unified)
    sizes = {}
    with context:
        for declared in (True, False):
            context.clear()
            transcript = Transcript(model, spec, context)
            if declared:
                transcript.declare(2000)
            taken = []
            for _ in range(19):
                transcript.read(100, end=False)
                taken.append(context.kv_bytes(PROMPT))
            transcript.read(100)
            assert context.kv_bytes(PROMPT) == 0
            sizes[declared] = sorted(set(taken) - {0})
    assert len(sizes[True]) == 1 < len(sizes[False])
    assert 1700 * F32_TOKEN_BYTES <= sizes[True][0] <= (padded(2000 + SINK + WINDOW) + 256) * F32_TOKEN_BYTES


def test_short_messages_take_no_memory_of_a_prompt(model):
    """They are read in the spare cells: a chat doesn't allocate at each turn."""
    spec, context = context_of(model)
    with context:
        transcript = Transcript(model, spec, context)
        transcript.read(900)
        for _ in range(6):
            transcript.decode(20)
            transcript.read(40, end=False)
            assert context.kv_bytes(PROMPT) == 0
            transcript.read(10)
        assert transcript.difference() <= EXACT


class Watch:
    """Notes how many cells each layer's attention reads, by the shape of its scores."""

    def __init__(self) -> None:
        ggml = ctypes.CDLL(str(library_dir() / LIBRARY.replace("libllama", "libggml-base")))
        ggml.ggml_get_name.restype, ggml.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
        ggml.ggml_nelements.restype, ggml.ggml_nelements.argtypes = ctypes.c_int64, [ctypes.c_void_p]
        self.n_read: dict[str, int] = {}

        def watch(tensor: int, _ask: bool, _user_data: int | None) -> bool:
            name = ggml.ggml_get_name(tensor).decode()
            if name.startswith("kq-"):
                self.n_read[name] = ggml.ggml_nelements(tensor) // N_HEAD
            return False

        self.callback = C.ggml_backend_sched_eval_callback(watch)


@pytest.mark.slow
@pytest.mark.parametrize("n_message", [20, 300, 400, 1000])
def test_decoding_reads_no_more_cells_than_sinks_and_window_need(model, n_message):
    """Also after messages that were read in the cells for a large micro-batch: what is kept is moved to the first ones."""
    watch = Watch()
    spec, context = context_of(model, n_ubatch=512, cb_eval=watch.callback)
    with context:
        transcript = Transcript(model, spec, context)
        for _ in range(3):
            transcript.read(n_message)
            transcript.decode(1)
            expected = {f"kq-{il}": padded(SINK + WINDOW + 64 if il in LAYERS else len(transcript)) for il in range(N_LAYER)}
            assert watch.n_read == expected
        transcript.decode(WINDOW)
        assert transcript.difference() <= EXACT


@pytest.mark.slow
@CACHES
def test_sequences_that_read_one_after_the_other_share_the_memory(model, unified):
    """N hybrids and one prompt, not N full caches."""
    n_seq, n = 4, 2000
    spec, context = context_of(model, 2304 * n_seq, n_seq_max=n_seq, kv_unified=unified)
    with context:
        most = []
        for seq in range(n_seq):
            transcript = Transcript(model, spec, context, seq)
            transcript.read(n - 1, n_batch=500, end=False)
            most.append(context.kv_bytes(PROMPT))
            assert context.kv_bytes(STREAMING) == streaming_bytes(n_seq, unified)
            transcript.read(1)
            assert context.kv_bytes(PROMPT) == 0
        assert max(most) == min(most) <= 2 * padded(n) * F32_TOKEN_BYTES


@pytest.mark.slow
@CACHES
def test_what_other_sequences_hold_is_given_back_when_they_are_removed(model, unified):
    spec, context = context_of(model, 8192, n_seq_max=2, kv_unified=unified)
    with context:
        transcripts = [Transcript(model, spec, context, seq) for seq in range(2)]
        for transcript in transcripts:
            transcript.read(1500, n_batch=500, end=False)
        assert context.kv_bytes(PROMPT) + streaming_bytes(2, unified) >= 3000 * F32_TOKEN_BYTES
        assert context.seq_rm(0, -1, -1)
        transcripts[1].read(100)
        assert context.kv_bytes(PROMPT) == 0
        transcripts[1].decode(10)
        assert transcripts[1].difference() <= EXACT


@pytest.mark.slow
@pytest.mark.parametrize("give_up", [lambda c: c.clear(), lambda c: c.seq_rm(0, -1, -1), lambda c: c.seq_rm(0, 0, -1)])
def test_a_prompt_given_up_gives_its_memory_back(model, give_up):
    spec, context = context_of(model)
    with context:
        Transcript(model, spec, context).read(1500, n_batch=500, end=False)
        assert context.kv_bytes(PROMPT) > 0
        give_up(context)
        again = Transcript(model, spec, context, seed=1)
        again.read(30)
        assert context.kv_bytes(PROMPT) == 0
        again.decode(60)
        assert again.difference() <= EXACT


class TestLimit:
    LIMIT = 1000 * F32_TOKEN_BYTES  # a prompt of about a thousand tokens

    def test_a_declared_prompt_is_refused_before_it_starts(self, model):
        """In one line that names what would fit."""
        spec, context = context_of(model)
        with context:
            context.set_prompt_limit(self.LIMIT)
            transcript = Transcript(model, spec, context)
            transcript.read(300)
            transcript.decode(20)
            before = context.positions(FULL), context.positions(STREAMING), context.kv_bytes(PROMPT)
            with pytest.raises(ValueError) as refusal:
                context.prompt_begin(3000)
            line = str(refusal.value)
            assert "\n" not in line and "prefill=stream" in line and "MiB" in line and any(c.isdigit() for c in line)
            assert (context.positions(FULL), context.positions(STREAMING), context.kv_bytes(PROMPT)) == before
            transcript.decode(20)
            transcript.declare(600)
            transcript.read(600, n_batch=200)
            transcript.decode(20)
            assert transcript.difference() <= EXACT

    def test_an_undeclared_one_at_the_batch_that_would_need_more(self, model):
        spec, context = context_of(model)
        with context:
            context.set_prompt_limit(self.LIMIT)
            transcript, start = Transcript(model, spec, context), log.mark()
            with pytest.raises(DecodeError):
                for _ in range(6):
                    good = transcript.copy(0)
                    transcript.read(500, end=False)
            assert 500 <= len(good) <= 1300
            assert any("prompt" in line and "MiB" in line for line in log.since(start)), log.since(start)[-3:]
            assert context.kv_bytes(PROMPT) <= self.LIMIT
            assert context.positions(FULL) == context.positions(STREAMING) == list(range(len(good)))
            assert context.in_prompt()
            good.read(20)
            good.decode(70)
            assert good.difference() <= EXACT

    @pytest.mark.slow
    @pytest.mark.parametrize("what", ["whole", "sequence"])
    def test_a_state_from_the_middle_of_a_longer_prompt_is_refused(self, model, what):
        """With the reason, and nothing of it is left behind; with a larger limit it can be restored."""
        spec, context = context_of(model)
        with context:
            saved = Transcript(model, spec, context)
            saved.read(2000, n_batch=500, end=False)
            state = context.save() if what == "whole" else context.save_seq()
        spec, context = context_of(model)
        with context:
            context.set_prompt_limit(self.LIMIT)
            start = log.mark()
            assert not (context.restore(state) if what == "whole" else context.restore_seq(state))
            assert any("2000 tokens" in line and "limit" in line for line in log.since(start))
            assert context.kv_bytes(PROMPT) == 0 and context.positions(FULL) == context.positions(STREAMING) == []
            other = Transcript(model, spec, context, seed=1)
            other.read(100)
            other.decode(70)
            assert other.difference() <= EXACT
            context.set_prompt_limit(0)
            assert context.restore(state) if what == "whole" else context.restore_seq(state)
            again = saved.copy(0, context)
            again.read(20)
            again.decode(70)
            assert again.difference() <= EXACT

    def test_it_can_be_lifted(self, model):
        spec, context = context_of(model)
        with context:
            context.set_prompt_limit(1)
            short = Transcript(model, spec, context)
            short.read(60)  # in the spare cells
            with pytest.raises(ValueError):
                context.prompt_begin(2000)
            context.set_prompt_limit(0)
            short.declare(2000)
            short.read(2000, n_batch=500)
            assert short.difference() <= EXACT

    def test_the_environment_sets_it_in_mib(self, model, monkeypatch):
        monkeypatch.setenv("LT_PROMPT_LIMIT", "1")
        _spec, context = context_of(model)
        with context:
            context.prompt_begin(2**20 // F32_TOKEN_BYTES - 400)
            with pytest.raises(ValueError, match="1.*MiB"):
                context.prompt_begin(2**20 // F32_TOKEN_BYTES + 600)

    def test_prompts_longer_than_the_context_are_refused(self, model):
        _spec, context = context_of(model, 1024)
        with context, pytest.raises(ValueError, match="1024"):
            context.prompt_begin(1025)


def test_streaming_prefill_takes_no_memory_of_a_prompt(model):
    spec = model.spec(SINK, WINDOW, LAYERS)
    with model.context(spec, n_ctx=2048, n_batch=512, n_ubatch=N_UBATCH) as context:
        text = random_tokens(1500)
        computed = context.read_prompt(text)
        assert context.kv_bytes(PROMPT) == 0
    assert difference(computed, model.expected(text, spec)[-1:]) <= EXACT


@CACHES
def test_a_declared_prompt_that_asks_for_nothing_gives_its_memory_back(model, unified):
    spec, context = context_of(model, n_ctx=8192, n_seq_max=2, kv_unified=unified)
    with context:
        transcript = Transcript(model, spec, context)
        transcript.declare(600)
        transcript.read(600, n_batch=200, end=False)
        assert not context.in_prompt(0) and context.kv_bytes(PROMPT) == 0
        transcript.decode(5)
        assert transcript.difference() < EXACT


@pytest.mark.parametrize("limit", [None, 1])
def test_what_would_be_needed_counts_the_longest_prompt(model, monkeypatch, limit):
    """Where nothing is allocated, as llama.cpp's --fit asks: else a prompt would find no memory on a device that was filled."""
    if limit is not None:
        monkeypatch.setenv("LT_PROMPT_LIMIT", str(limit))
    spec = model.spec(SINK, WINDOW, LAYERS, prefill="full")
    with Model(model.native.path, no_alloc=True, load_mode=C.LLAMA_LOAD_MODE_NONE) as asked:
        asked.set_streaming(str(spec))
        with asked.context(n_ctx=4096, n_batch=512, n_ubatch=N_UBATCH) as context:
            expected = 4096 * F32_TOKEN_BYTES if limit is None else limit << 20
            assert context.kv_bytes(PROMPT) == pytest.approx(expected, abs=1)
    with context_of(model)[1] as context:
        assert context.kv_bytes(PROMPT) == 0
