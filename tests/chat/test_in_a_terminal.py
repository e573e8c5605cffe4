"""`lt-gguf chat` in a real terminal, end to end: what is typed and pasted, what is shown, Ctrl-C, and coming back."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from support.chat import WORDS
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture
from support.tmux import Terminal, terminal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux isn't installed"),
]
COMMAND = [Path(sys.executable).parent / "lt-gguf", "chat"]
QUICK = ["--threads", "1", "--batch-size", "64", "--temp", "0"]
READY = " of 2048 tokens ("  # in the line below what is typed


@pytest.fixture
def home(tmp_path):
    (tmp_path / "tower.txt").write_text(WORDS * 15)
    (tmp_path / "notes.md").write_text(WORDS * 2)
    return tmp_path


def environment(home: Path) -> dict[str, str]:
    own = {"LT_GGUF_CACHE": home / "cache", "LT_GGUF_DATA": home / "data", "HOME": home, "TERM": "xterm-256color"}
    return {name: str(value) for name, value in own.items()} | {"LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def start(window: Terminal, home: Path, *words: object, raw: Path | None = None) -> None:
    window.start([*COMMAND, *words, *QUICK], environment(home), raw)


def test_a_conversation_about_a_document(hybrid_file, home):
    with terminal(home) as window:
        start(window, home, hybrid_file, "tower.txt", "-n", "8")
        shown = window.wait(READY)
        assert "tower.txt (text): " in shown and ", fits: " in shown and "read " in shown
        assert "/help lists the commands" in shown and "· tower.txt" in shown
        # a question
        window.type("the dog")
        window.keys("Enter")
        window.wait("first token after")
        window.wait("tower.txt · ")  # the line below
        # a paste of several lines is one message, and goes when Enter does
        window.paste("the quick\nbrown fox\njumps")
        shown = window.wait("jumps")
        assert shown.count("first token after") == 1
        window.keys("Enter")
        window.wait("first token after", 2)
        # commands and paths are completed
        window.type("/fi")
        window.keys("Tab")
        window.wait("> /file")  # and not the one of the greeting
        window.type(" not")
        window.keys("Tab")
        window.wait("/file notes.md")
        window.keys("Enter")
        window.wait("notes.md (Markdown): ")
        window.wait("2 documents")
        # going back: the last question is offered to be changed
        window.type("/edit")
        window.keys("Enter")
        window.wait("change it")
        shown = window.wait("  jumps", 2)
        window.keys("C-c")
        window.wait("stopped")
        window.type("/save tower")
        window.keys("Enter")
        window.wait("saved as tower; what the model has read is on disk, too")
        # what was typed before
        window.keys("Up", "Up")
        window.wait("> /edit", 2)
        window.keys("C-u")
        window.keys("C-d")
        window.wait("ENDED 0")
    with terminal(home) as window:
        start(window, home, hybrid_file, "-n", "8")
        window.wait(READY)
        window.type("/load tower")
        window.keys("Enter")
        shown = window.wait("restored ")
        assert "tower: 2 questions about tower.txt, notes.md" in shown
        window.type("/undo")
        window.keys("Enter")
        window.wait("taken out: notes.md")
        window.type("/exit")
        window.keys("Enter")
        window.wait("ENDED 0")


def test_ctrl_c_stops_the_answer_and_not_the_program(hybrid_file, home):
    with terminal(home) as window:
        start(window, home, hybrid_file, "-n", "2000", "--system", "the fox", "--temp", "3")
        window.wait(READY)
        window.keys("C-c")
        window.wait("/exit or Ctrl-D leaves")
        window.type("the dog")
        window.keys("Enter")
        for _ in range(20):  # the answer of random weights may end at once
            window.keys("C-c")
            shown = window.screen(500)
            if "(stopped)" in shown or "stopped" in shown or "first token after" in shown:
                break
        window.wait(READY)
        window.type("/stats")
        window.keys("Enter")
        window.wait("the model was trained for 2048")
        window.keys("C-d")
        window.wait("ENDED 0")


def test_plain_lines(hybrid_file, home):
    """No colour and no cursor: what a screen reader gets is text and line ends."""
    raw = home / "raw"
    with terminal(home) as window:
        start(window, home, hybrid_file, "tower.txt", "--plain", "-n", "4", raw=raw)
        window.wait("> ")
        window.type("the dog")
        window.keys("Enter")
        window.wait("first token after")
        window.type("/help")
        window.keys("Enter")
        window.wait("/file PATH…: reads documents")
        window.type("/exit")
        window.keys("Enter")
        window.wait("ENDED 0")
    written = raw.read_bytes()
    assert b"tower.txt (text): " in written
    # note: readline asks the terminal to mark pastes, which shows nothing
    assert b"\x1b" not in written.replace(b"\x1b[?2004h", b"").replace(b"\x1b[?2004l", b"")


def test_a_document_from_a_pipe_and_questions_from_the_terminal(hybrid_file, home):
    with terminal(home) as window:
        words = " ".join(map(str, [*COMMAND, hybrid_file, "-", "-n", "4", *QUICK]))
        window.start(["bash", "-c", f"cat tower.txt | {words}"], environment(home))
        shown = window.wait(READY)
        assert "standard input (text): " in shown
        window.type("the dog")
        window.keys("Enter")
        window.wait("first token after")
        window.keys("C-d")
        window.wait("ENDED 0")


def test_a_narrow_terminal_and_what_is_no_document(hybrid_file, home):
    (home / "a.bin").write_bytes(bytes(1000))
    with terminal(home, width=50, height=12) as window:
        start(window, home, hybrid_file, "a.bin", "-n", "4")
        window.wait("error: a.bin: is a binary file")
        window.wait(READY.strip())
        window.type("the dog")
        window.keys("Enter")
        window.wait("first token")
        window.keys("C-d")
        window.wait("ENDED 0")
