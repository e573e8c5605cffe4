"""llama-server reads a long prompt layer by layer where nobody else waits for it, or where nothing else fits the limit."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support import server
from support.oracle import Subject, random_tokens

STREAMING = "layers=all;sink=4;window=40;prefill=full"
SETTINGS = ["--ctx-size", "20480", "--batch-size", "256", "--ubatch-size", "64", "--flash-attn", "off"]
SETTINGS += ["--cache-type-k", "f32", "--cache-type-v", "f32"]

# 2,000 tokens take 8 MiB in all eight layers at once, and 2 MiB layer by layer.
LONG, LIMIT = random_tokens(2000, seed=1).tolist(), "4"
SLOW = random_tokens(6500, seed=2).tolist()  # takes some seconds


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return Subject.build("llama", 8, tmp_path_factory.mktemp("server")).native.path


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> list[int]:
    """The answer to LONG where it is read in batches, beside other slots."""
    with running(model, tmp_path_factory.mktemp("batches") / "log", "--parallel", "2") as address:
        return complete(address, LONG, 12)[0]


def running(model: Path, log: Path, *options: str) -> AbstractContextManager[str]:
    return server.running(model, STREAMING, log, *SETTINGS, *options)


def request(address: str, prompt: list[int], n: int, **more) -> urllib.request.Request:
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "return_tokens": True} | more
    return urllib.request.Request(f"{address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})


def complete(address: str, prompt: list[int], n: int) -> tuple[list[int], int]:
    """The tokens of the answer, and how many of the prompt's were not processed again."""
    with urllib.request.urlopen(request(address, prompt, n), timeout=120) as response:
        answer = json.load(response)
    return answer["tokens"], answer["timings"]["cache_n"]


def events(address: str, prompt: list[int], n: int) -> Iterator[dict]:
    with urllib.request.urlopen(request(address, prompt, n, stream=True, return_progress=True), timeout=120) as response:
        for line in response:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])


@pytest.mark.slow
def test_a_prompt_of_the_only_slot_comes_as_a_whole(model, expected, tmp_path, monkeypatch):
    """It fits a limit that it wouldn't fit in batches, answers the same, and so does a second turn."""
    more = random_tokens(500, seed=5).tolist()
    monkeypatch.setenv("LT_PROMPT_LIMIT", LIMIT)
    with running(model, tmp_path / "log") as address:
        answer, _ = complete(address, LONG, 12)
        second, n_cached = complete(address, LONG + answer + more, 12)
        with pytest.raises(urllib.error.HTTPError) as refusal:
            complete(address, SLOW, 1)
        assert b"tokens would fit" in refusal.value.read()
        assert complete(address, LONG, 12)[0] == expected
    monkeypatch.delenv("LT_PROMPT_LIMIT")
    assert answer == expected
    assert n_cached >= len(LONG)
    with running(model, tmp_path / "batches", "--parallel", "2") as address:
        assert complete(address, LONG, 12)[0] == expected
        assert complete(address, LONG + answer + more, 12)[0] == second


@pytest.mark.slow
def test_layers_are_chosen_while_a_prompt_comes_as_a_whole(model, tmp_path, monkeypatch):
    """4,096 cells of one layer and the hidden states fit the limit, those of four layers don't."""
    auto, settings = "auto=0.5;sink=4;window=40", [*SETTINGS, "--ctx-size", "4096", "--parallel", "1"]
    prompt = random_tokens(3900, seed=7).tolist()
    answers = []
    for limit, n_prompts in (("0", 1), ("4", 2)):
        monkeypatch.setenv("LT_PROMPT_LIMIT", limit)
        with server.running(model, auto, tmp_path / limit, *settings) as address:
            for _ in range(n_prompts):
                answers.append(complete(address, prompt, 12)[0])
                complete(address, prompt[::-1], 1)  # another conversation, which chooses others
            if limit == "4":
                with pytest.raises(urllib.error.HTTPError):  # the beginning of a prompt comes in batches
                    complete(address, prompt[:3000] + [7], 0)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_a_prompt_that_fits_in_no_other_way_waits_for_the_others(model, expected, tmp_path, monkeypatch):
    """Nor is it overtaken by who comes later."""
    monkeypatch.setenv("LT_PROMPT_LIMIT", LIMIT)
    ended, answers = [], {}

    def ask(name: str, prompt: list[int], n: int) -> None:
        answers[name] = complete(address, prompt, n)[0]
        ended.append(name)

    with running(model, tmp_path / "log", "--parallel", "3") as address:
        alone = complete(address, LONG[:30], 1000)[0]
        asking = []
        for name, prompt, n in (("short", LONG[:30], 1000), ("long", LONG, 12), ("late", LONG[:40], 5)):
            asking.append(threading.Thread(target=ask, args=(name, prompt, n)))
            asking[-1].start()
            time.sleep(0.15)
        for thread in asking:
            thread.join()
    assert answers["short"] == alone
    assert answers["long"] == expected
    assert ended == ["short", "long", "late"]


@pytest.mark.slow
@pytest.mark.parametrize("slots", ["1", "2"])
def test_the_beginning_of_a_prompt_is_read_before_its_rest(model, expected, tmp_path, monkeypatch, slots):
    """With `n_predict` 0 it stays open, so the answer is that of a prompt that was read at once; saved, it serves for others, too."""
    begun, other = 1950, random_tokens(50, seed=9).tolist()
    states = tmp_path / "states"
    states.mkdir()
    with running(model, tmp_path / "log", "--slot-save-path", str(states), "--parallel", slots) as address:

        def slot(action: str) -> None:
            body = json.dumps({"filename": "begun"}).encode()
            with urllib.request.urlopen(f"{address}/slots/0?action={action}", body, timeout=60) as response:
                assert json.load(response)["id_slot"] == 0

        at_first = {"id_slot": 0}
        alone = complete(address, LONG[:begun] + other, 12)[0]
        with urllib.request.urlopen(request(address, LONG[:begun], 0, **at_first), timeout=120) as response:
            answer = json.load(response)
        assert answer["tokens"] == [] and answer["content"] == "" and answer["timings"]["predicted_n"] == 0
        slot("save")
        for rest, said in ((LONG[begun:], expected), (other, alone), (LONG[begun:], expected)):
            slot("restore")
            with urllib.request.urlopen(request(address, LONG[:begun] + rest, 12, **at_first), timeout=120) as response:
                answer = json.load(response)
            assert answer["tokens"] == said and answer["timings"]["cache_n"] == begun
        # more of the beginning may come, too, or another prompt instead
        slot("restore")
        for prompt, n in ((LONG[:1980], 0), (LONG, 12)):
            with urllib.request.urlopen(request(address, prompt, n, **at_first), timeout=120) as response:
                answer = json.load(response)
        assert answer["tokens"] == expected and answer["timings"]["cache_n"] == 1980
        slot("restore")
        with urllib.request.urlopen(request(address, other, 12, **at_first), timeout=120) as response:
            assert json.load(response)["tokens"] == complete(address, other, 12)[0]
        # what has been answered as a whole prompt is read once more as the beginning of another
        for prompt, n, said in (
            (LONG[:begun], 12, None),
            (LONG[:begun], 0, []),
            (LONG, 12, expected),
            (LONG, 0, []),
            (LONG, 12, expected),
        ):
            with urllib.request.urlopen(request(address, prompt, n, **at_first), timeout=120) as response:
                answer = json.load(response)
            assert said is None or answer["tokens"] == said
    # what fits only as a whole has no beginning
    monkeypatch.setenv("LT_PROMPT_LIMIT", LIMIT)
    with running(model, tmp_path / "little") as address:
        with pytest.raises(urllib.error.HTTPError, match="400"):
            complete(address, LONG[:begun], 0)
        assert complete(address, LONG, 12)[0] == expected


@pytest.mark.slow
def test_progress_is_told_while_it_is_read(model, tmp_path):
    with running(model, tmp_path / "log") as address:
        told = [event["prompt_progress"]["processed"] for event in events(address, SLOW, 2) if "prompt_progress" in event]
    assert told == sorted(told) and told[-1] == len(SLOW)
    assert 40 < len(told) <= 102


@pytest.mark.slow
def test_a_client_that_leaves_ends_it(model, tmp_path):
    """At the next step, and what was there before the prompt still is."""
    begin = LONG[:1000]
    with running(model, tmp_path / "log") as address:
        answer, _ = complete(address, begin, 8)
        conversation = begin + answer + SLOW[:2500]
        start = time.monotonic()
        whole = complete(address, conversation, 1)[0]
        seconds = time.monotonic() - start
        complete(address, begin, 8)

        leaving = http.client.HTTPConnection(urlsplit(address).netloc)
        asked = request(address, conversation, 8)
        leaving.request("POST", "/completion", asked.data, dict(asked.header_items()))
        time.sleep(seconds / 4)
        leaving.close()

        start = time.monotonic()
        again, n_cached = complete(address, begin + answer + LONG[1000:1200], 8)
        waited = time.monotonic() - start
        assert n_cached >= len(begin)
        assert complete(address, conversation, 1)[0] == whole
    assert "was cancelled while its prompt was read" in (tmp_path / "log").read_text()
    assert waited < seconds / 2, "it was read to its end"
    with running(model, tmp_path / "fresh") as address:
        complete(address, begin, 8)
        assert complete(address, begin + answer + LONG[1000:1200], 8)[0] == again
