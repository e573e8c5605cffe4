"""Going back: little is read again, and all is as in a fresh context that was fed the same prompts and decoded tokens."""

from __future__ import annotations

import itertools
import pickle
import random

import numpy as np
import pytest
from tiny_checkpoint import N_VOCAB, SINK, WINDOW, hybrid_file  # noqa: F401 - a fixture

import lt_gguf  # before llama_cpp, to which it shows the libraries
import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from lt_gguf.runtime.prompts import Piece, Prompts
from lt_gguf.runtime.snapshots import Snapshots

# f32 keys and values, so that little but the order of additions differs; and cells for a small part of the prompts
SETTINGS = {"n_ctx": 2048, "n_batch": 64, "n_ubatch": 16, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
SETTINGS |= {"type_k": 0, "type_v": 0}
SPECS = {"prefill_stream": "layers=1,3;prefill=stream", "prefill_full": "layers=1,3;prefill=full", "auto": "auto:0.5"}

all_modes = pytest.mark.parametrize("mode", SPECS)


def load(path, mode: str = "prefill_stream", **settings) -> lt_gguf.Llama:
    return lt_gguf.Llama(str(path), **(SETTINGS | {"streaming": SPECS[mode]} | settings))


def text(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, N_VOCAB, n).tolist()


def logits(llm: lt_gguf.Llama) -> np.ndarray:
    """Those that the next token is sampled from."""
    return np.ctypeslib.as_array(llm._ctx.get_logits_ith(-1), (N_VOCAB,)).copy()


def answer(llm: lt_gguf.Llama, prompt: list[int], n: int = 12, **options) -> list[int]:
    """Generates n tokens; all but the last one are then in the context."""
    return list(itertools.islice(llm.generate(prompt, temp=0, **options), n))


def read_prompt(llm: lt_gguf.Llama, tokens: list[int]) -> None:
    """Reads tokens as a prompt, also where it is a single one."""
    answer(llm, tokens, 1, reset=False)


def fed(path, mode: str, history: list[tuple[str, list[int]]], **settings) -> lt_gguf.Llama:
    """A fresh context that has read `history`: prompts, and tokens that are decoded one by one."""
    llm = load(path, mode, snapshot_limit=0, **settings)
    for kind, tokens in history:
        if kind == "prompt":
            read_prompt(llm, tokens)
        else:
            for token in tokens:
                llm.eval([token])
    return llm


def assert_like(llm: lt_gguf.Llama, path, mode: str, history: list[tuple[str, list[int]]]) -> None:
    fresh = fed(path, mode, history)
    assert llm._input_ids.tolist() == fresh._input_ids.tolist() == [token for _, part in history for token in part]
    np.testing.assert_allclose(logits(llm), logits(fresh), atol=2e-4)


def n_read(llm: lt_gguf.Llama, action) -> int:
    """Number of tokens that are computed."""
    before = llm.n_read + llm.n_decoded
    action()
    return llm.n_read + llm.n_decoded - before


# ------------------------------------------------------------------------------- conversations


@all_modes
def test_editing_the_last_message_reads_only_what_follows_the_answer_before_it(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    first, second, edited = text(600), text(500, 1), text(150, 2)
    said = answer(llm, first)
    answer(llm, first + said + second)
    common = second[:30]  # what a chat template writes before each message
    prompt = first + said + common + edited
    assert n_read(llm, lambda: answer(llm, prompt, 1)) == len(common + edited) + 1  # and the answer's last token
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("decode", said[:-1]), ("prompt", said[-1:] + common + edited)])
    assert answer(llm, prompt) == answer(fed(hybrid_file, mode, [("prompt", first), ("decode", said[:-1])]), prompt)


@all_modes
@pytest.mark.parametrize("n_answer", [2, 150, 400])
def test_regenerating_an_answer_reads_nothing(hybrid_file, mode, n_answer):
    llm = load(hybrid_file, mode)
    document, question = text(900), text(300, 1)
    for prompt in (document, document + question):
        said = answer(llm, prompt, n_answer)
        assert n_read(llm, lambda: next(llm.generate(prompt, temp=0))) == 0
        np.testing.assert_allclose(logits(llm), logits(fed(hybrid_file, mode, split(prompt, document))), atol=2e-4)
        assert n_read(llm, lambda: answer(llm, prompt, n_answer)) == n_answer - 1
        assert answer(llm, prompt, n_answer) == said


def split(prompt: list[int], document: list[int]) -> list[tuple[str, list[int]]]:
    rest = prompt[len(document) :]
    return [("prompt", document)] + ([("prompt", rest)] if rest else [])


@all_modes
def test_going_back_several_messages(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    history, prompt = [], []
    for turn in range(5):
        message = text(200, turn)
        history.append(("prompt", prompt[len(prompt) - 1 :] + message if prompt else message))
        prompt = prompt + message
        said = answer(llm, prompt, 9)
        history.append(("decode", said[:-1]))
        prompt = prompt + said
    second = [token for _, tokens in history[:4] for token in tokens]
    edited = second + text(100, 9)
    assert n_read(llm, lambda: answer(llm, edited, 1)) == 100
    assert_like(llm, hybrid_file, mode, [*history[:4], ("prompt", text(100, 9))])
    assert llm._snapshots.positions[-1] == len(edited)  # what was replaced is gone


@all_modes
def test_without_room_for_snapshots_all_is_read_again_and_right(hybrid_file, mode):
    llm = load(hybrid_file, mode, snapshot_limit=0)
    first, second = text(600), text(500, 1)
    said = answer(llm, first)
    answer(llm, first + said + second)
    prompt = first + said + second[:10] + text(50, 2)
    assert n_read(llm, lambda: answer(llm, prompt, 1)) == len(prompt)
    rest = prompt[len(first) + len(said) - 1 :]
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("decode", said[:-1]), ("prompt", rest)])


def test_what_needs_no_snapshot_takes_none(hybrid_file):
    llm = load(hybrid_file, streaming="off")
    answer(llm, text(600), 30)
    answer(llm, text(600), 30)
    assert len(llm._snapshots) == 0
    llm = load(hybrid_file)
    answer(llm, text(600), 30)
    llm._snapshots.clear()
    llm.n_tokens -= 10  # within what the window still holds
    assert n_read(llm, lambda: llm.eval([5])) == 1


@all_modes
def test_the_limit_drops_the_oldest_first(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    prompt: list[int] = []
    for turn in range(4):
        prompt = prompt + text(300, turn)
        prompt += answer(llm, prompt)
    all_positions, limit = llm._snapshots.positions, llm._snapshots.n_bytes // 2
    assert len(all_positions) == 7  # four prompts' ends, three beginnings
    llm = load(hybrid_file, mode, snapshot_limit=limit)
    prompt = []
    for turn in range(4):
        prompt = prompt + text(300, turn)
        prompt += answer(llm, prompt)
        assert llm._snapshots.n_bytes <= limit
    kept = llm._snapshots.positions
    assert 2 <= len(kept) < 7 and kept == all_positions[-len(kept) :]


# ------------------------------------------------------------------------- eval and generate directly


@all_modes
@pytest.mark.parametrize("n_kept", [0, 1, 30, 200, 599, 600, 601, 750, 799, 800])
def test_eval_after_setting_n_tokens_back(hybrid_file, mode, n_kept):
    """600 tokens of a prompt, 200 decoded ones: what is kept stays what it was."""
    llm = load(hybrid_file, mode)
    prompt, decoded, more = text(600), text(200, 1), text(80, 2)
    llm.eval(prompt)
    for token in decoded:
        llm.eval([token])
    llm.n_tokens = n_kept
    llm.eval(more)
    history = [("prompt", prompt), ("decode", decoded[: n_kept - 600]), ("prompt", more)]
    assert_like(llm, hybrid_file, mode, [("prompt", prompt[:n_kept] + more)] if n_kept < 600 else history)


@all_modes
def test_wrong_drafts_are_taken_back(hybrid_file, mode):
    class WrongDraft:
        def __call__(self, input_ids, /, **_):
            return np.full(300, 5, dtype=np.intc)

    settings = {"n_batch": 512}
    expected = answer(load(hybrid_file, mode, **settings), text(600))
    for draft_model in (WrongDraft(), LlamaPromptLookupDecoding(num_pred_tokens=4)):
        llm = load(hybrid_file, mode, draft_model=draft_model, **settings)
        assert answer(llm, text(600)) == expected
        assert answer(llm, text(600)) == expected


@all_modes
def test_logits_of_all_tokens_change_nothing(hybrid_file, mode):
    llm = load(hybrid_file, mode, logits_all=True)
    llm.eval(text(600))
    plain = load(hybrid_file, mode)
    for n in (599, 600):
        plain.reset()
        plain.eval(text(600)[:n])
        np.testing.assert_allclose(llm.scores[n - 1], logits(plain), atol=2e-4)


@all_modes
def test_logits_are_asked_for_at_the_prompts_end_only(hybrid_file, mode, monkeypatch):
    llm = load(hybrid_file, mode)
    asked = []

    def decode(batch):
        asked.extend(batch.batch.logits[: batch.batch.n_tokens])
        return type(llm._ctx).decode(llm._ctx, batch)

    monkeypatch.setattr(llm._ctx, "decode", decode)
    llm.eval(text(300))
    assert asked == [0] * 299 + [1]


# ---------------------------------------------------------------------------- interrupted and failed


def interrupt(monkeypatch, llm, at: int, when: str) -> None:
    """Lets the at-th llama_decode from now on end with Ctrl-C, before or after the work was done."""
    calls = itertools.count()

    def decode(batch):
        if next(calls) != at:
            return type(llm._ctx).decode(llm._ctx, batch)
        monkeypatch.undo()
        if when == "after":
            type(llm._ctx).decode(llm._ctx, batch)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._ctx, "decode", decode)


@all_modes
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", [0, 3, 6])
def test_ctrl_c_while_a_prompt_is_read(hybrid_file, monkeypatch, mode, at, when):
    llm = load(hybrid_file, mode)
    first, second, third = text(600), text(400, 1), text(200, 2)
    llm.eval(first)
    interrupt(monkeypatch, llm, at, when)
    with pytest.raises(KeyboardInterrupt):
        llm.eval(second)
    assert llm.n_tokens == 600 + at * 64
    kept = second[: at * 64]
    llm.eval(third)
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("prompt", kept + third)])


@all_modes
@pytest.mark.parametrize("at", [0, 2, 9, 10])
def test_ctrl_c_while_going_back(hybrid_file, monkeypatch, mode, at):
    llm = load(hybrid_file, mode, snapshot_limit=0)
    history = [("prompt", text(600)), ("decode", text(40, 1)), ("prompt", text(100, 2)), ("decode", text(300, 3))]
    for kind, tokens in history:
        if kind == "prompt":
            llm.eval(tokens)
        else:
            for token in tokens:
                llm.eval([token])
    llm.n_tokens = 700  # all must be read again: a batch of decoded tokens is the 11th
    interrupt(monkeypatch, llm, at, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.eval(text(5, 4))
    assert llm.n_tokens == 700
    llm.eval([7])
    assert_like(llm, hybrid_file, mode, [*history[:2], ("prompt", history[2][1][:60] + [7])])


@all_modes
def test_an_aborted_decode(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    first, second = text(600), text(300, 1)
    llm.eval(first)
    answers = iter([False] * 40)
    callback = llama_cpp.ggml_abort_callback(lambda _: next(answers, True))
    llama_cpp.llama_set_abort_callback(llm.ctx, callback, None)
    with pytest.raises(RuntimeError, match="llama_decode returned 2"):
        llm.eval(second)
    n_kept = llm.n_tokens - 600
    assert 0 <= n_kept < 300
    llama_cpp.llama_set_abort_callback(llm.ctx, llama_cpp.ggml_abort_callback(), None)
    llm.eval(second[n_kept:])
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("prompt", second)])


@all_modes
def test_after_ctrl_c_no_stale_logits_are_sampled(hybrid_file, monkeypatch, mode):
    llm = load(hybrid_file, mode)
    llm.eval(text(600))
    interrupt(monkeypatch, llm, 0, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.eval(text(100, 1))
    assert answer(llm, text(600)) == answer(load(hybrid_file, mode), text(600))


@all_modes
@pytest.mark.parametrize("attribute", ["n_tokens", "_broken_at", "_logits_at", "n_read", "_requires_eval"])
def test_ctrl_c_between_a_decode_and_its_bookkeeping(hybrid_file, mode, attribute):
    """It strikes where the attribute is about to be set after the third or the fifth batch, which is the last one."""
    for n_sets in (1,) if attribute in ("_logits_at", "_requires_eval") else (3, 5):
        llm = load(hybrid_file, mode)
        llm.eval(text(600))
        counted = itertools.count(1)

        class Interrupted(type(llm)):
            def __setattr__(self, name, value):
                if name == attribute and self._broken_at is not None and self._is_decoded() and next(counted) == n_sets:
                    raise KeyboardInterrupt
                super().__setattr__(name, value)

            def _is_decoded(self):
                return llama_cpp.llama_memory_seq_pos_max(self._ctx.memory, 0) >= self._broken_at

        llm.__class__ = Interrupted
        with pytest.raises(KeyboardInterrupt):
            llm.eval(text(300, 1))
        n = llm.n_tokens
        assert n - 600 in (128, 192, 256, 300)
        llm.eval([7])
        kept = text(300, 1)[: n - 600]
        history = [("prompt", text(600)), ("prompt", kept), ("decode", [7])]
        if len(kept) < 300:
            history[1:] = [("prompt", kept + [7])]
        assert_like(llm, hybrid_file, mode, history)


@all_modes
def test_ctrl_c_while_a_state_is_restored(hybrid_file, monkeypatch, mode):
    llm = load(hybrid_file, mode)
    llm.eval(text(600))
    state = llm.save_state()
    llm.eval(text(500, 1))

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_state_set_data", interrupted)
    llm.reset()
    llm.eval(text(700, 2))
    with pytest.raises(KeyboardInterrupt):
        llm.load_state(state)
    assert llm.n_tokens == 600
    llm.eval([7])
    assert llm.n_tokens == 601
    whole = load(hybrid_file, mode, snapshot_limit=0)
    for tokens in (text(600), [7]):
        whole.eval(tokens)
    np.testing.assert_allclose(logits(llm), logits(whole), atol=2e-4)


def test_ctrl_c_while_embedding(hybrid_file, monkeypatch):
    llm = load(hybrid_file, embedding=True, n_batch=32, n_ubatch=32, pooling_type=1)
    llm.eval(text(20))
    interrupt(monkeypatch, llm, 0, "after")
    with pytest.raises(KeyboardInterrupt):
        llm.embed("the quick brown fox")
    n_before = llm.n_read
    llm.eval([7])
    assert llm.n_read - n_before == 20  # what the embedding has replaced
    assert llm._input_ids.tolist() == [*text(20), 7]
    assert len(llm.embed("the quick brown fox")) == 64
    assert llm.n_tokens == 0
    assert n_read(llm, lambda: llm.eval([7])) == 1


# ---------------------------------------------------------------------------------- saved states


@all_modes
def test_a_saved_state_knows_its_prompts(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    prompt, decoded = text(600), text(300, 1)
    llm.eval(prompt)
    for token in decoded:
        llm.eval([token])
    state = llm.save_state()
    for other in (llm, load(hybrid_file, mode), load(hybrid_file, mode, n_ctx=1024)):
        other.load_state(state)
        other.n_tokens = 650
        other.eval(text(20, 2))
        assert_like(other, hybrid_file, mode, [("prompt", prompt), ("decode", decoded[:50]), ("prompt", text(20, 2))])


@all_modes
def test_states_in_llama_cpps_cache(hybrid_file, mode):
    """llama-cpp-python restores a state from its cache where more of a prompt is in there than in the context."""
    llm = load(hybrid_file, mode)
    llm.set_cache(llama_cpp.LlamaRAMCache())
    first, second, more = text(400), text(400, 1), text(30, 2)
    for prompt in (first, second):
        llm.create_completion(prompt, max_tokens=8, temperature=0)
    n_read = llm.n_read
    llm.create_completion(first + more, max_tokens=1, temperature=0)
    assert llm.n_read - n_read == 30  # the cached answer was cut off
    assert_like(llm, hybrid_file, mode, [("prompt", first), ("prompt", more)])


@all_modes
def test_a_saved_state_can_be_gone_back_from(hybrid_file, mode):
    llm = load(hybrid_file, mode)
    first, second, edited = text(600), text(300, 1), text(40, 2)
    said = answer(llm, first)
    answer(llm, first + said + second, 50)
    state = pickle.loads(pickle.dumps(llm.save_state()))
    other = load(hybrid_file, mode)
    other.load_state(state)
    assert n_read(other, lambda: answer(other, first + said + edited, 1)) == 41
    assert_like(other, hybrid_file, mode, [("prompt", first), ("decode", said[:-1]), ("prompt", said[-1:] + edited)])


@pytest.mark.parametrize("settings", [{"n_batch": 128}, {"n_batch": 32, "n_ctx": 1024}], ids=str)
def test_a_state_in_a_context_with_other_batches(hybrid_file, settings):
    llm = load(hybrid_file)
    llm.eval(text(600))
    other = load(hybrid_file, **settings)
    other.load_state(llm.save_state())
    other.eval([7])
    assert_like(other, hybrid_file, "prefill_stream", [("prompt", text(600)), ("decode", [7])])


@all_modes
def test_a_state_of_llama_cpps_own_class(hybrid_file, mode):
    """It doesn't say what was a prompt: going back far takes it all for one."""
    llm = load(hybrid_file, mode)
    llm.eval(text(900))
    state = llm.save_state()
    del state.lt_gguf
    llm.load_state(state)
    llm.n_tokens = 400
    llm.eval(text(20, 2))
    assert_like(llm, hybrid_file, mode, [("prompt", text(900)[:400] + text(20, 2))])


# --------------------------------------------------------------------------------------- random walks


class Walk:
    """A context, and what it should be like: its prompts and decoded tokens."""

    def __init__(self, path, mode: str, seed: int, monkeypatch) -> None:
        self.path, self.mode, self.monkeypatch = path, mode, monkeypatch
        self.random = random.Random(seed)
        limit = self.random.choice([0, 300_000, 1_500_000, 512 * 2**20])
        self.llm = load(path, mode, snapshot_limit=limit)
        self.history: list[tuple[str, list[int]]] = []

    @property
    def tokens(self) -> list[int]:
        return [token for _, tokens in self.history for token in tokens]

    def text(self, n: int) -> list[int]:
        return text(n, self.random.randrange(1000))

    def truncate(self, n: int) -> bool:
        """Returns whether a prompt has lost its end."""
        kept, cut = [], False
        for kind, tokens in self.history:
            if n > 0:
                kept.append((kind, tokens[:n]))
                cut = kind == "prompt" and n < len(tokens)
            n -= len(tokens)
        self.history = kept
        return cut

    def append(self, kind: str, tokens: list[int], goes_on: bool = False) -> None:
        if goes_on or (self.history and kind == self.history[-1][0] == "decode"):
            kind, before = self.history.pop()
            tokens = before + tokens
        self.history.append((kind, tokens))

    def prompt(self) -> None:
        tokens = self.text(self.random.choice([2, 20, 150, 400]))
        self.llm.eval(tokens)
        self.append("prompt", tokens)

    def decode(self) -> None:
        for token in self.text(self.random.choice([1, 10, 60])):
            self.llm.eval([token])
            self.append("decode", [token])

    def go_back(self) -> None:
        n = self.random.randrange(len(self.tokens) + 1)
        tokens = self.text(self.random.choice([1, 2, 30, 100]))
        self.llm.n_tokens = n
        cut = self.truncate(n)
        self.llm.eval(tokens)
        self.append("prompt" if len(tokens) > 1 else "decode", tokens, goes_on=cut)

    def chat(self) -> None:
        """Another prompt, which begins as the conversation does."""
        n = self.random.randrange(1, len(self.tokens) + 1)
        tokens = self.tokens[:n] + [1] + self.text(self.random.choice([1, 50, 200]))  # 1 is in no text
        answer(self.llm, tokens, 1)
        self.append("prompt", tokens[n:], goes_on=self.truncate(n))

    def regenerate(self) -> None:
        ends = list(itertools.accumulate(len(tokens) for _, tokens in self.history))
        n = self.random.choice([end for end, (kind, _) in zip(ends, self.history) if kind == "prompt"] or [0])
        if n:
            answer(self.llm, self.tokens[:n], 1)
            self.truncate(n)

    def interrupted(self) -> None:
        tokens = self.text(300)
        interrupt(self.monkeypatch, self.llm, self.random.randrange(1, 4), self.random.choice(["before", "after"]))
        n = len(self.tokens)
        with pytest.raises(KeyboardInterrupt):
            self.llm.eval(tokens)
        rest = self.text(20)
        tokens = tokens[: self.llm.n_tokens - n] + rest
        self.llm.eval(rest)
        self.append("prompt", tokens)

    def save_and_load(self) -> None:
        state = self.llm.save_state()
        self.llm.eval(self.text(250))
        self.llm.load_state(state)
        self.decode()

    def step(self) -> None:
        if not self.tokens or len(self.tokens) > 1200:
            self.llm.reset()
            self.history = []
            actions = [self.prompt, self.decode]
        else:
            actions = [self.prompt, self.decode, self.go_back, self.go_back, self.chat, self.chat]
            actions += [self.regenerate, self.regenerate, self.interrupted, self.save_and_load]
        self.random.choice(actions)()


@all_modes
@pytest.mark.parametrize("seed", range(8))
def test_random_walk(hybrid_file, monkeypatch, mode, seed):
    walk = Walk(hybrid_file, mode, seed, monkeypatch)
    for _ in range(30):
        walk.step()
        assert_like(walk.llm, hybrid_file, mode, walk.history)


# ------------------------------------------------------------------------------------------ the parts


def test_prompts():
    prompts = Prompts()
    prompts.open(0)
    prompts.close(100)
    prompts.open(150)
    assert prompts.is_open and prompts.first_end() == 100
    prompts.close(200)
    assert (prompts.first_end(99), prompts.first_end(100), prompts.first_end(200)) == (100, 200, 0)
    assert list(prompts.pieces(100, 220)) == [Piece(100, 150, False), Piece(150, 200, True), Piece(200, 220, False)]
    assert list(prompts.pieces(50, 160)) == [Piece(50, 100, True, True), Piece(100, 150, False), Piece(150, 160, True)]
    prompts.truncate(160)
    assert prompts.is_open
    assert list(prompts.pieces(155, 160)) == [Piece(155, 160, True, True)]
    prompts.truncate(150)
    assert not prompts.is_open and prompts.spans == [(0, 100)]
    prompts.truncate(100)
    assert prompts.spans == [(0, 100)]
    prompts.truncate(0)
    assert prompts == Prompts() and prompts.first_end() == 0


def test_snapshots_hold_no_more_than_sinks_window_and_spare_cells(hybrid_file):
    llm = load(hybrid_file)
    llm.eval(text(1500))
    (position,) = llm._snapshots.positions
    assert position == 1500
    n_cells = 256  # SINK + WINDOW + a micro-batch, rounded up
    assert SINK + WINDOW < n_cells
    assert llm._snapshots.n_bytes < 2 * n_cells * 2 * 2 * 16 * 4 + 4 * N_VOCAB + 8192


def test_a_snapshot_that_is_larger_than_the_limit_is_not_kept(hybrid_file):
    llm = load(hybrid_file)
    llm.eval(text(600))
    snapshots = Snapshots(llm._snapshots.n_bytes - 1)
    snapshots.take(llm.ctx, 600, logits(llm))
    assert len(snapshots) == 0
    snapshots.take(llm.ctx, 600)
    snapshots.take(llm.ctx, 600)
    assert snapshots.positions == [600]
