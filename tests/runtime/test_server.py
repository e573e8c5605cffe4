"""llama-server on a hybrid model: an edited or regenerated conversation goes on from a checkpoint, and answers the same."""

from __future__ import annotations

import json
import os
import urllib.request
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from support import server
from support.oracle import Subject, random_tokens

from lt_gguf.gguf.flagging import flag
from lt_gguf.spec import StreamingSpec

WINDOW, N_UBATCH = 40, 64
# The streaming part has 256 cells: after an answer of 300 tokens it holds nothing of the prompt but the sinks.
N_PROMPT, N_ANSWER = 600, 300
PROMPT = random_tokens(N_PROMPT).tolist()
SETTINGS = ["--ctx-size", "2048", "--batch-size", "256", "--ubatch-size", str(N_UBATCH), "--flash-attn", "off"]
SETTINGS += ["--cache-type-k", "f32", "--cache-type-v", "f32"]


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    return Subject.build("llama", 4, tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> Path:
    return Subject.build("llama", 2, tmp_path_factory.mktemp("draft")).native.path


def running(model: Path, streaming: str, log: Path, *options: str) -> AbstractContextManager[str]:
    return server.running(model, streaming, log, *SETTINGS, *options)


def complete(address: str, prompt: list[int], n: int, cached: bool = True) -> tuple[list[int], int]:
    """The tokens of the answer, and how many of the prompt's were not processed again."""
    options = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    body = json.dumps(options | {"cache_prompt": cached}).encode()
    request = urllib.request.Request(f"{address}/completion", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        answer = json.load(response)
    return answer["tokens"], answer["timings"]["cache_n"]


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["1,3", "all"])
def test_an_edited_conversation_goes_on_from_a_checkpoint(subject, tmp_path, layers):
    edited = PROMPT[:598] + random_tokens(100, seed=1).tolist()
    edited_early = PROMPT[:300] + random_tokens(200, seed=2).tolist()
    streaming = f"layers={layers};sink=4;window={WINDOW};prefill=stream"
    with running(subject.native.path, streaming, tmp_path / "server.log") as address:
        first, _ = complete(address, PROMPT, N_ANSWER)
        answers = {"edited": complete(address, edited, N_ANSWER)}
        answers["edited early"] = complete(address, edited_early, 30)
        complete(address, PROMPT, N_ANSWER)
        answers["regenerated"] = complete(address, PROMPT, N_ANSWER)
    with running(subject.native.path, streaming, tmp_path / "fresh.log") as address:
        fresh = {
            "edited": complete(address, edited, N_ANSWER, cached=False)[0],
            "edited early": complete(address, edited_early, 30, cached=False)[0],
            "regenerated": first,
        }
    log = (tmp_path / "server.log").read_text()
    for name, (tokens, _) in answers.items():
        assert tokens == fresh[name], f"{name}: another answer than a fresh server's\n{log[-3000:]}"
    # the checkpoint four tokens before the prompt's end, less the one token that is always processed again
    assert answers["edited"][1] >= N_PROMPT - 6, log[-3000:]
    assert answers["regenerated"][1] >= N_PROMPT - 6, log[-3000:]
    assert answers["edited early"][1] == 0  # nothing was kept of what comes before there


# -- prefill = full


def conversation(*lengths: int) -> list[list[int]]:
    return [random_tokens(n, seed=50 + i).tolist() for i, n in enumerate(lengths)]


def replay(address: str, messages: list[list[int]], n_answer: int) -> tuple[list[int], list[int], list[int]]:
    """Sends the messages one after the other, each with all that was said before it.

    Returns the whole text before the last message, the last answer, and how many tokens of each prompt were cached.
    """
    text: list[int] = []
    cached = []
    for message in messages:
        before, text = text, text + message
        answer, n_cached = complete(address, text, n_answer)
        cached.append(n_cached)
        text = text + answer
    return before, answer, cached


def test_a_long_conversation_is_never_read_again(subject, tmp_path):
    """With prefill = full: each turn reads its message only, and so does an edit of the last message or of an earlier one."""
    streaming = f"layers=1,3;sink=4;window={WINDOW};prefill=full"
    messages = conversation(700, 300, 280)
    edited = [*messages[:2], random_tokens(290, seed=99).tolist()]
    path = subject.native.path
    with running(path, streaming, tmp_path / "edited.log") as address:
        before, first, cached = replay(address, messages, 20)
        second, again = complete(address, before + edited[2], 20)
        regenerated, n_regenerated = complete(address, before + edited[2], 20)
    with running(path, streaming, tmp_path / "fresh.log") as address:
        _, fresh, _ = replay(address, edited, 20)
    log = (tmp_path / "edited.log").read_text()
    assert second == fresh, log[-3000:]
    assert regenerated == fresh
    assert first != second, "an edit that changes nothing shows nothing"
    for n_cached, n_before in zip(cached, (0, 700 + 20, 700 + 300 + 40)):
        assert n_cached >= n_before - 1, log[-3000:]
    assert again >= len(before) - 2 and n_regenerated >= len(before) - 2, log[-3000:]


def test_a_prompt_over_the_limit_is_refused(subject, tmp_path):
    """In words, before it is read, and the server goes on."""
    import urllib.error

    os.environ["LT_PROMPT_LIMIT"] = "1"
    try:
        with running(subject.native.path, f"layers=1,3;sink=4;window={WINDOW};prefill=full", tmp_path / "limit.log") as address:
            short, _ = complete(address, PROMPT[:300], 5)
            with pytest.raises(urllib.error.HTTPError) as refusal:
                complete(address, random_tokens(1900, seed=3).tolist(), 5)
            assert b"tokens would fit" in refusal.value.read()
            assert complete(address, PROMPT[:300], 5)[0] == short
    finally:
        del os.environ["LT_PROMPT_LIMIT"]


def test_an_older_prompt_once_more(subject, tmp_path):
    """Its checkpoint is that of its end, where at least one token must be read again: in the middle of what it was."""
    text = random_tokens(600, seed=7).tolist()
    with running(subject.native.path, f"layers=1,3;sink=4;window={WINDOW};prefill=full", tmp_path / "older.log") as address:
        first, _ = complete(address, text[:150], 1)
        complete(address, text[:550], 1)
        assert complete(address, text[:150], 1)[0] == first


def test_a_context_shift_keeps_the_sinks(subject, tmp_path):
    """Also where the request asks to keep less: an answer longer than the context is made to its end."""
    with running(
        subject.native.path, "layers=1,3;sink=4;window=40;prefill=full", tmp_path / "shift.log", "--context-shift"
    ) as address:
        answer, _ = complete(address, PROMPT, 1800)
        assert len(answer) == 1800


# -- the end of a prompt


@pytest.mark.slow
def test_the_same_request_again_reads_nothing(subject, tmp_path):
    """A document and a question in one message: its end was saved with its logits, of which the answer is then made."""
    document, other = random_tokens(900, seed=11).tolist(), random_tokens(60, seed=12).tolist()
    streaming = f"layers=1,3;sink=4;window={WINDOW};prefill=full"
    with running(subject.native.path, streaming, tmp_path / "again.log") as address:
        first, read = complete(address, document, N_ANSWER)
        again, cached = complete(address, document, N_ANSWER)
        at_once, cached_at_once = complete(address, document, 3)
        _, turn = complete(address, document + first[:20] + other, 20)
        back, cached_back = complete(address, document, N_ANSWER)
        shorter, _ = complete(address, document[:-1], 20)
    with running(subject.native.path, streaming, tmp_path / "fresh.log") as address:
        fresh, _ = complete(address, document[:-1], 20)
    log = (tmp_path / "again.log").read_text()[-3000:]
    assert (again, back, at_once) == (first, first, first[:3]), log
    assert (read, cached, cached_at_once, cached_back) == (0, len(document), len(document), len(document)), log
    assert turn >= len(document), log
    assert shorter == fresh


@pytest.mark.slow
def test_a_context_shift_that_keeps_more_than_the_sinks(subject, tmp_path):
    """`n_keep` is granted as far as what the streaming layers have dropped stays hidden; the answer is made to its end."""
    with running(
        subject.native.path, "layers=1,3;sink=4;window=1020;prefill=full", tmp_path / "shift.log", "--context-shift"
    ) as address:
        for n_keep in (0, 300, 1500):
            options = {"prompt": PROMPT, "n_predict": 1800, "n_keep": n_keep, "ignore_eos": True, "return_tokens": True}
            request = urllib.request.Request(
                f"{address}/completion", json.dumps(options).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=120) as response:
                assert len(json.load(response)["tokens"]) == 1800


@pytest.mark.slow
def test_a_checkpoint_is_not_one_of_a_conversation_with_another_last_token(subject, tmp_path):
    """Two conversations that begin alike leave a checkpoint of their first token, which then is another one."""
    streaming = f"layers=1,3;sink=4;window={WINDOW};prefill=full"
    begin, other = [50, *random_tokens(300, seed=21).tolist()], [50, *random_tokens(300, seed=22).tolist()]
    new = [60, *random_tokens(300, seed=23).tolist()]
    edited = new[:50] + random_tokens(100, seed=24).tolist()
    with running(subject.native.path, streaming, tmp_path / "edit.log") as address:
        complete(address, begin, 5)
        assert complete(address, other, 5)[1] == 1
        complete(address, new, N_ANSWER)
        after, n_cached = complete(address, edited, 20)
    with running(subject.native.path, streaming, tmp_path / "fresh.log") as address:
        fresh, _ = complete(address, edited, 20)
    assert after == fresh
    assert n_cached == 0


# -- drafts


def test_the_variable_is_for_the_model_and_not_for_its_draft(subject, draft, tmp_path):
    """The draft has fewer layers, of which LT_STREAMING names one that it doesn't have."""
    options = ["--model-draft", str(draft), "--spec-type", "draft-simple"]
    with running(subject.native.path, f"layers=1,3;sink=4;window={WINDOW}", tmp_path / "draft.log", *options) as address:
        first, _ = complete(address, PROMPT, 50)
        assert complete(address, PROMPT[:300] + PROMPT[:100], 20)[0]
        assert complete(address, PROMPT, 50)[0] == first


@pytest.mark.slow
def test_a_draft_with_streaming_layers_follows_edits(subject, draft, tmp_path):
    """The model itself has none: whether its draft can go back is asked of the draft."""
    hybrid = tmp_path / "hybrid-draft.gguf"
    flag(draft, hybrid, StreamingSpec.parse("layers=0,1;sink=4;window=20;prefill=full", 2))
    options = ["--model-draft", str(hybrid), "--spec-type", "draft-simple"]
    with running(subject.native.path, "", tmp_path / "hybrid-draft.log", *options) as address:
        first, _ = complete(address, PROMPT, 300)
        edited, _ = complete(address, PROMPT[:200] + random_tokens(100, seed=5).tolist(), 100)
        assert len(edited) == 100
        assert complete(address, PROMPT, 300)[0] == first
