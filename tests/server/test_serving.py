"""`lt-gguf serve` as it is typed: llama-server behind it, documents, ends of all kinds."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.serve import serving, start
from support.tiny_checkpoint import N_LAYER, hybrid_file, write_checkpoint  # noqa: F401 - a fixture

from lt_gguf.conversion import convert
from lt_gguf.gguf.flagging import flag
from lt_gguf.spec import CacheRecommendation, CacheTypes, StreamingSpec

QUICK = ["--threads", "1", "--ctx", "1024"]
STREAMS = ["--streaming", "layers=0-3;sink=2;window=60;prefill=full"]
WORDS = "the quick brown fox jumps over the lazy dog and runs away "


def refusal(*options: object, **settings) -> str:
    """The one line of a command that can't serve."""
    _, said = (process := start(*options, **settings)).communicate(timeout=60)
    assert process.returncode == 1, said
    *_, last = said.strip().splitlines()
    assert last.startswith("error: ") and "Traceback" not in said
    return last


def gone(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(timeout=10)
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.mark.slow
def test_a_conversation_about_a_document(hybrid_file):
    with serving(hybrid_file, *QUICK, *STREAMS) as served:
        info = json.loads(served.ask("/lt/info"))
        assert (info["n_layer"], info["n_ctx"], info["n_slots"], info["file"]) == (4, 1024, 1, "tiny.gguf")
        assert info["streaming"] == {"layers": [0, 1, 2, 3], "sink": 2, "window": 60, "prefill": "full"}
        assert info["token_bytes"] == info["streaming_token_bytes"] == [2 * 2 * 16 * 2] * 4
        document = json.loads(served.ask("/lt/document", (WORDS * 15).encode(), {"X-Filename": "fox.md"}))
        assert document["name"] == "fox.md" and document["n_tokens"] > 300
        text = f"Document fox.md:\n\n{document['text']}\n\nEnd of the document fox.md.\n\n"
        messages = [{"role": "user", "content": f"{text}the dog"}]
        n_tokens = json.loads(served.ask("/lt/tokens", {"messages": messages}))["n_tokens"]
        said = {"messages": messages, "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        said |= {"stream": True, "stream_options": {"include_usage": True}, "return_progress": True, "cache_prompt": True}
        events = [
            json.loads(line[6:]) for line in served.ask("/v1/chat/completions", said).splitlines() if line.startswith(b"data: {")
        ]
        progress = [event["prompt_progress"] for event in events if "prompt_progress" in event]
        assert progress[-1]["processed"] == progress[-1]["total"] == n_tokens and len(progress) > 3
        assert events[-1]["timings"]["prompt_n"] == n_tokens
        streamed = "".join(choice["delta"].get("content") or "" for event in events for choice in event.get("choices", []))
        # the same once more: nothing of it is read, and the answer is the same
        again = served.chat(messages[0]["content"])
        assert again["choices"][0]["message"]["content"] == streamed and again["timings"]["prompt_n"] <= 1
        assert again["model"] == "tiny"  # no path of this computer
        status, _ = served.end()
        assert status == 0


@pytest.mark.slow
def test_another_question_in_place_of_one_reads_no_document(hybrid_file, tmp_path):
    document = f"Document fox.md:\n\n{WORDS * 15}\n\nEnd of the document fox.md.\n\n"

    def ask(question: str, **settings: object) -> tuple[str, int]:
        """The answer, and how many tokens were read for it."""
        said = {
            "messages": [{"role": "user", "content": document + question}],
            "max_tokens": 12,
            "temperature": 0,
            "ignore_eos": True,
        }
        lines = served.ask("/v1/chat/completions", said | {"stream": True, "return_progress": True} | settings).splitlines()
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        read = [event[key]["prompt_n"] for event in events for key in ("lt_begun", "timings") if key in event]
        progress = [event["prompt_progress"]["total"] for event in events if "prompt_progress" in event]
        assert progress and all(read) == (len(read) == 1 or read[0] > 0)
        deltas = [choice["delta"] for event in events for choice in event.get("choices", [])]
        return "".join(delta.get("content") or "" for delta in deltas), sum(read)

    # note: a question of a few tokens is computed with other roundings than a prompt, and random weights show it
    environment = {"LT_GGUF_CACHE": str(tmp_path), "LT_ATTENTION": "off"}
    with serving(hybrid_file, *QUICK, *STREAMS, environment=environment) as served:
        first = {"lt_read_first": len(document)}
        questions = ["the dog", "a quick brown fox", "the dog", "and runs away"]
        alone = [ask(question, cache_prompt=False) for question in questions]
        again = [ask(question, **first) for question in questions]
        assert [text for text, _ in again] == [text for text, _ in alone]
        assert abs(again[0][1] - alone[0][1]) < 4 and alone[0][1] > 300 and all(n < 60 for _, n in again[1:])
        # it is still there when llama-server had to be started again, and gone with the server
        served.child().kill()
        for _ in range(200):
            with contextlib.suppress(urllib.error.HTTPError):
                assert ask(questions[1], **first) == again[1]
                break
            time.sleep(0.05)
        [states] = tmp_path.glob(".serve-*")
        assert states.stat().st_mode & 0o077 == 0 and len(list(states.iterdir())) == 1
        served.end()
        assert not states.exists()


@pytest.mark.slow
@pytest.mark.parametrize("streams", [True, False])
def test_a_document_is_read_before_its_question(hybrid_file, streams):
    document = f"Document fox.md:\n\n{WORDS * 15}\n\nEnd of the document fox.md.\n\n"

    def begun(served, content: str) -> list[dict]:
        said = {"messages": [{"role": "user", "content": content}], "lt_read_first": len(content)}
        lines = served.ask("/lt/read", said).splitlines()
        assert b"data: [DONE]" in lines[-2:]
        events = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
        return [event["lt_begun"] for event in events if "lt_begun" in event]

    with serving(
        hybrid_file, *QUICK, *(STREAMS if streams else ["--streaming", "off"]), environment={"LT_ATTENTION": "off"}
    ) as served:
        [first] = begun(served, document)
        assert first["prompt_n"] > 300
        [again] = begun(served, document)
        assert again["prompt_n"] <= 1
        asked = served.chat(document + "the dog", max_tokens=12, lt_read_first=len(document))
        alone = served.chat(document + "the dog", max_tokens=12, cache_prompt=False)
        assert asked["choices"][0]["message"]["content"] == alone["choices"][0]["message"]["content"]
        assert asked["timings"]["prompt_n"] < 60 and asked["timings"]["cache_n"] > 300


@pytest.mark.slow
def test_no_document_is_read_ahead_where_layers_are_chosen_for_the_question(hybrid_file):
    said = {"messages": [{"role": "user", "content": WORDS * 15}], "lt_read_first": len(WORDS * 15)}
    with serving(hybrid_file, *QUICK, "--streaming", "auto:0.5") as served:
        assert served.ask("/lt/read", said) == b""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_its_child_ends_with_it(hybrid_file, how):
    with serving(hybrid_file, *QUICK) as served:
        child = served.child()
        status, said = served.end(how)
        assert status == (-9 if how == signal.SIGKILL else 0) and "Traceback" not in said
        assert gone(child)


@pytest.mark.slow
def test_an_answer_in_the_middle_does_not_hold_its_end_up(hybrid_file):
    said = {"messages": [{"role": "user", "content": "the dog"}], "stream": True, "max_tokens": 900, "ignore_eos": True}
    with serving(hybrid_file, *QUICK) as served:
        asking = urllib.request.Request(f"{served.address}/v1/chat/completions", json.dumps(said).encode())
        with urllib.request.urlopen(asking, timeout=60) as answer:
            assert answer.readline().startswith(b"data: ")
            child = served.child()
            status, text = served.end()
            assert status == 0 and "Traceback" not in text and gone(child)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_what_stands_between_is_killed(hybrid_file):
    with serving(hybrid_file, *QUICK) as served:
        child = served.child()
        child.parent().kill()
        assert gone(child)
        for _ in range(200):
            with contextlib.suppress(urllib.error.HTTPError):
                served.chat("the dog")
                break
            time.sleep(0.05)
        assert served.end()[1].count("it is started again") == 1


@pytest.mark.slow
def test_a_child_that_dies_is_started_again(hybrid_file):
    with serving(hybrid_file, *QUICK) as served:
        before = served.chat("the dog")["choices"][0]["message"]["content"]
        for _ in range(2):
            served.child().kill()
            seen = set()
            for _ in range(200):
                try:
                    assert served.chat("the dog")["choices"][0]["message"]["content"] == before
                    break
                except urllib.error.HTTPError as error:
                    seen.add(error.code)
                    time.sleep(0.05)
            assert seen <= {503}
        # a third time within two minutes is too often
        served.child().kill()
        _, said = served.process.communicate(timeout=30)
        assert served.process.returncode == 1
        assert (
            said.count("llama-server was killed by SIGKILL while answering, perhaps for want of memory; it is started again") == 2
        )
        assert re.search(r"\nerror: llama-server was killed by SIGKILL while answering.*3rd time", said)


@pytest.mark.slow
def test_what_it_cannot_serve(hybrid_file, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"127.0.0.1:{port}: Address already in use: name another --port" in refusal(hybrid_file, "--port", port)
    assert "needs --api-key, or LT_GGUF_API_KEY" in refusal(hybrid_file, "--host", "0.0.0.0")
    assert "--parallel = 0: must be at least 1" in refusal(hybrid_file, "--parallel", "0")
    assert "--port = 65536: must be from 0 to 65535" in refusal(hybrid_file, "--port", "65536")
    assert "--host = no.such.host.invalid" in refusal(hybrid_file, "--host", "no.such.host.invalid", "--api-key", "k")
    assert "--no-such-option" in refusal(hybrid_file, *QUICK, "--", "--no-such-option")
    assert 'error: --streaming: layers = "9": must be' in refusal(hybrid_file, *QUICK, "--streaming", "layers=9")
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(hybrid_file.read_bytes()[:-5000])
    assert "while loading the model" in refusal(damaged, *QUICK)
    assert "none.gguf" in refusal(tmp_path / "none.gguf")


@pytest.mark.slow
def test_the_key_and_several_at_a_time(hybrid_file):
    with serving(hybrid_file, *QUICK, "--parallel", "2", environment={"LT_GGUF_API_KEY": "right"}) as served:
        with pytest.raises(urllib.error.HTTPError) as refused:
            served.ask("/v1/models")
        assert refused.value.code == 401
        key = {"Authorization": "Bearer right"}
        info = json.loads(served.ask("/lt/info", headers=key))
        assert (info["n_slots"], info["n_ctx"]) == (2, 1024)
        assert [slot["n_ctx"] for slot in json.loads(served.ask("/slots", headers=key))] == [1024, 1024]


@pytest.mark.slow
def test_the_context_is_as_large_as_can_be(hybrid_file):
    with serving(hybrid_file, "--threads", "1") as served:
        assert json.loads(served.ask("/lt/info"))["n_ctx"] == 2048  # what it was trained for


@pytest.mark.slow
def test_llama_server_has_the_cache_that_the_file_recommends(tmp_path):
    plain = convert(write_checkpoint(tmp_path, head_dim=32), tmp_path / "plain.gguf", outtype="f32", layers="none", no_report=True)
    recommended = CacheRecommendation(N_LAYER, CacheTypes("q8_0", "q4_0"), (0,), (CacheTypes("q4_0", "q4_0"),))
    (file,) = flag(plain.files[0], tmp_path / "hybrid.gguf", StreamingSpec((1, 3), N_LAYER, 2, 60), recommended=recommended)
    text = "K q8_0, V q4_0, f16 in streaming layers, f16 in layer 0"
    with serving(file, *QUICK) as served:
        assert json.loads(served.ask("/lt/info"))["cache"] == text
        command = served.child().cmdline()
        assert [command[command.index(f"--cache-type-{name}") + 1] for name in "kv"] == ["q8_0", "q4_0"]
        assert served.child().environ()["LT_STREAMING"] == "cache_keep=0"
        assert served.chat(WORDS * 15)["usage"]["completion_tokens"] == 5
        _, said = served.end()
    assert f", KV cache {text}" in said
    assert "cache.type_k" in refusal(edited(file, tmp_path / "bad.gguf"), *QUICK)


def edited(file: Path, bad: Path) -> Path:
    """The file with a type of K that there isn't."""
    raw = file.read_bytes()
    assert raw.count(b"q8_0") == 1
    bad.write_bytes(raw.replace(b"q8_0", b"q9_0"))
    return bad


def test_its_folder_is_this_users_alone():
    from lt_gguf.server.llama_server import LlamaServer, ServerSettings

    server = LlamaServer(ServerSettings("a.gguf", 512))
    assert Path(server.address).parent.stat().st_mode & 0o077 == 0
