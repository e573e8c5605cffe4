"""`lt-gguf chat` as it is typed: through a pipe, with documents, with questions on the command line; and `lt-gguf cache`."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from support.chat import WORDS
from support.document_files import pdf
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

from lt_gguf.chat import figures
from lt_gguf.chat.screen import PlainScreen
from lt_gguf.cli import chat
from lt_gguf.runtime import available_memory, context_size
from lt_gguf.spec.cache_types import PLAIN

QUICK = ["--threads", "1", "--batch-size", "64"]
SMALL = [*QUICK, "--ctx", "512"]


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """States and sessions of these tests alone."""
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LT_GGUF_DATA", str(tmp_path / "data"))


def through_a_pipe(monkeypatch, text: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode()), encoding="utf-8"))


# ------------------------------------------------------------------------------------------- messages


def test_messages_through_a_pipe(lt_gguf_command, hybrid_file, monkeypatch):
    through_a_pipe(monkeypatch, "hello\nonce more\n/reset\nhello\n/exit\nnever read\n")
    status, out, err = lt_gguf_command("chat", hybrid_file, "-n", 6, "--temp", 0, *SMALL)
    assert status == 0
    lines = err.splitlines()
    kv = "KV 192.00 KiB hybrid, 256.00 KiB full (25% saved)"  # 512 cells; 256 in the streaming layers
    assert lines[0] == f"{kv} · 1 CPU thread · context of 512 tokens"
    answers = [line for line in lines if line.endswith(kv) and "of 512 tokens" in line]
    assert len(answers) == 3
    assert answers[0].split(" of ")[0] == answers[2].split(" of ")[0] != answers[1].split(" of ")[0]
    assert out.count("\n") >= 3 and "\x1b" not in out + err


@pytest.mark.parametrize("streaming", ["layers=1,3", "layers=1,3;prefill=full", "auto:0.5"])
def test_only_what_is_new_is_read(lt_gguf_command, hybrid_file, monkeypatch, streaming):
    long = "the quick brown fox jumps over the lazy dog and runs away " * 3
    lines = [long, "and then", "/retry", "/edit and now", "/undo", "and then", "/edit", "/exit"]
    through_a_pipe(monkeypatch, "\n".join(lines) + "\n")
    status, out, err = lt_gguf_command("chat", hybrid_file, "-n", 5, "--temp", 0, *SMALL, "--streaming", streaming)
    assert status == 0
    answers = [line for line in err.splitlines() if " of 512 tokens · " in line]
    n_read = [int(line.split(" · read ")[1].split()[0]) for line in answers]
    n_tokens = [int(line.split()[0]) for line in answers]
    assert n_read[0] > 50
    assert all(0 < n < 40 for n in (n_read[1], n_read[3], n_read[4]))
    assert n_read[2] == 0
    assert n_tokens[1] == n_tokens[2] == n_tokens[4]
    assert ("layers" in answers[-1]) == (streaming == "auto:0.5")
    texts = out.splitlines()
    assert texts[1] == texts[2] == texts[4]
    assert "the last message is forgotten" in err and "/edit TEXT: give the message" in err


def test_no_layer_streams_yet(lt_gguf_command, hybrid_file, monkeypatch):
    through_a_pipe(monkeypatch, "/exit\n")
    _, _, err = lt_gguf_command("chat", hybrid_file, *SMALL, "--streaming", "auto:0.5")
    assert err.splitlines()[0] == "KV 128.00 KiB, no layer streams yet · 1 CPU thread · context of 512 tokens"


def test_no_formula_is_needed_where_no_layer_streams():
    """Models with a memory of their own have none."""
    llm = SimpleNamespace(kv_bytes=lambda: {"total": 1024}, streaming=None, auto=None, cache_types=PLAIN)
    assert figures.describe_memory(llm, lambda: pytest.fail("asked")) == "KV 1.00 KiB, no layer streams"


@pytest.mark.parametrize("stops", [EOFError, KeyboardInterrupt])
def test_ctrl_c_and_ctrl_d_on_a_plain_screen(monkeypatch, stops):
    def interrupted(_prompt: str) -> str:
        raise stops

    monkeypatch.setattr("builtins.input", interrupted)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    screen = PlainScreen(is_interactive=True)
    if stops is EOFError:
        assert screen.read("") is None
    else:
        with pytest.raises(KeyboardInterrupt):
            screen.read("")


# ------------------------------------------------------------------------------------------ documents


def test_a_document_is_read_once(lt_gguf_command, hybrid_file, tmp_path):
    (tmp_path / "tower.txt").write_text(WORDS * 20)
    command = ("chat", hybrid_file, tmp_path / "tower.txt", "--ask", "the dog", "--ask", "a fox", "-n", 5, "--temp", 0, *QUICK)
    first, again = lt_gguf_command(*command), lt_gguf_command(*command)
    assert (first[0], again[0]) == (0, 0) and first[1] == again[1] and first[1].count("\n") >= 2
    assert "tower.txt (text): " in first[2] and ", fits: " in first[2] and "restored" not in first[2]
    assert "are on disk from an earlier time" in again[2] and "restored " in again[2]
    status, out, _ = lt_gguf_command("cache", "list")
    assert status == 0 and "tower.txt" in out and out.splitlines()[-1].startswith("1 states, ")
    status, out, _ = lt_gguf_command("cache", "list", "--json")
    (state,) = json.loads(out)["states"]
    assert (state["label"], state["model"]) == ("tower.txt", "tiny.gguf") and state["tokens"] > 400 and state["bytes"] > 10_000
    status, out, _ = lt_gguf_command("cache", "clear")
    assert status == 0 and out.startswith("removed 1 states, ")
    assert lt_gguf_command(*command)[2].count("restored") == 0
    nothing = lt_gguf_command(*command, "--cache-limit", 0)
    assert nothing[0] == 0 and "restored" not in nothing[2]


def test_a_damaged_state_in_the_list(lt_gguf_command, hybrid_file, tmp_path):
    (tmp_path / "tower.txt").write_text(WORDS * 10)
    lt_gguf_command("chat", hybrid_file, tmp_path / "tower.txt", "--ask", "the dog", "-n", 2, *QUICK)
    (path,) = (tmp_path / "cache" / "states").glob("*.state")
    path.write_bytes(b"x" * 100)
    status, out, err = lt_gguf_command("cache", "list")
    assert status == 0 and out.startswith("0 states") and err == f"removed: {path.name}: isn't a saved state of this version\n"


def test_a_document_from_a_pipe(lt_gguf_command, hybrid_file, monkeypatch):
    through_a_pipe(monkeypatch, WORDS * 10)
    status, out, err = lt_gguf_command("chat", hybrid_file, "-", "--ask", "the dog", "-n", 5, *QUICK)
    assert status == 0 and out.strip() and "standard input (text): " in err


@pytest.mark.slow
def test_a_document_from_a_pipe_needs_somebody_to_ask(hybrid_file, tmp_path):
    command = [sys.executable, "-c", "from lt_gguf.cli import main; main()"]
    done = subprocess.run(
        [*command, "chat", hybrid_file, "-", *SMALL], input="text", capture_output=True, text=True, start_new_session=True
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: standard input is a document, and there is no terminal for questions: give them as --ask TEXT"
    )


@pytest.mark.parametrize(
    "name, content, complaint",
    [
        ("none.txt", None, "none.txt: there is no such file"),
        ("scan.pdf", pdf([""]), "scan.pdf: its page holds pictures and no text"),
        ("a.bin", bytes(1000), "a.bin: is a binary file"),
        ("huge.txt", (WORDS * 200).encode(), "tokens don't fit"),
    ],
)
def test_a_document_that_cannot_be_read_is_one_line(lt_gguf_command, hybrid_file, tmp_path, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    status, out, err = lt_gguf_command("chat", hybrid_file, tmp_path / name, "--ask", "x", *SMALL)
    assert (status, out) == (1, "")
    assert err.splitlines()[-1].startswith("error: ") and complaint in err.splitlines()[-1]


def test_a_question_that_does_not_fit_ends_it(lt_gguf_command, hybrid_file):
    status, _, err = lt_gguf_command("chat", hybrid_file, "--ask", WORDS * 60, *SMALL)
    assert status == 1 and "tokens don't fit the context of 512: /reset begins anew" in err.splitlines()[-1]


def test_a_document_in_place_of_the_model(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"")
    assert chat.told_apart(str(tmp_path / "a.pdf"), ["b.txt"]) == (None, [str(tmp_path / "a.pdf"), "b.txt"])
    assert chat.told_apart("-", []) == (None, ["-"])
    for name in (None, "smollm2", "none.pdf", str(tmp_path / "a.gguf")):
        assert chat.told_apart(name, ["b.txt"]) == (name, ["b.txt"])


def test_a_session_is_begun_and_taken_up(lt_gguf_command, hybrid_file, tmp_path):
    command = ("chat", hybrid_file, "--session", "mine", "-n", 4, "--temp", 0, *SMALL)
    assert lt_gguf_command(*command, "--ask", "the dog")[0] == 0
    status, _, err = lt_gguf_command(*command, "--ask", "a fox")
    assert status == 0 and "mine: 1 question" in err
    said = json.loads((tmp_path / "data" / "sessions" / "mine.json").read_text())
    assert [turn["question"] for turn in said["turns"]] == ["the dog", "a fox"]
    assert os.stat(tmp_path / "data" / "sessions" / "mine.json").st_mode & 0o077 == 0
    status, _, err = lt_gguf_command("chat", hybrid_file, "--session", "a/b", "--ask", "x")
    assert (
        status == 1
        and err == "error: \"a/b\": can't be a session's name: must be letters, digits, spaces, dots and dashes, at most 64\n"
    )


# ------------------------------------------------------------------------------------ the context's size


def test_the_context_is_as_large_as_can_be(lt_gguf_command, hybrid_file, monkeypatch):
    through_a_pipe(monkeypatch, "/exit\n")
    _, _, err = lt_gguf_command("chat", hybrid_file, *QUICK)
    assert err.splitlines()[0].endswith("context of 2048 tokens")  # what it was trained for
    monkeypatch.setattr(context_size, "available_memory", lambda: 1 << 20)
    through_a_pipe(monkeypatch, "/exit\n")
    _, _, err = lt_gguf_command("chat", hybrid_file, *QUICK)
    assert err.splitlines()[0].endswith("context of 1024 tokens")  # the least that is tried


def test_available_memory(tmp_path):
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    assert available_memory.available_memory(tmp_path) is None
    write("proc/meminfo", "MemTotal: 16000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory.available_memory(tmp_path) == 8000 << 10
    write("proc/self/cgroup", "0::/a/b\n")
    write("sys/fs/cgroup/a/memory.max", "5000000\n")
    write("sys/fs/cgroup/a/memory.current", "4000000\n")
    write("sys/fs/cgroup/a/b/memory.max", "max\n")
    write("sys/fs/cgroup/a/b/memory.current", "100\n")
    assert available_memory.available_memory(tmp_path) == 1_000_000
    write("sys/fs/cgroup/a/memory.stat", "anon 1\ninactive_file 500000\n")
    assert available_memory.available_memory(tmp_path) == 1_500_000
    write("proc/self/cgroup", "4:memory:/c\n")
    write("sys/fs/cgroup/memory/c/memory.limit_in_bytes", "3000000")
    write("sys/fs/cgroup/memory/c/memory.usage_in_bytes", "3500000")
    assert available_memory.available_memory(tmp_path) == 0


def test_the_help_of_both_commands(lt_gguf_command):
    status, out, _ = lt_gguf_command("chat", "--help")
    assert status == 0 and all(option in out for option in ("--cache-limit", "--plain", "--session", "--ask", "DOCUMENT"))
    assert lt_gguf_command("cache", "--help")[0] == 0
    status, _, err = lt_gguf_command("cache", "burn")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1
