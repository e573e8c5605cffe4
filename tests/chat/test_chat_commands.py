"""What a person types, and what they are told: one line for each thing that can't be done, and the conversation goes on."""

from __future__ import annotations

import pytest
from support.chat import LONG, WORDS, new_chat, new_conversation
from support.document_files import pdf
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

from lt_gguf.chat.commands import COMMANDS
from lt_gguf.chat.screen import format_seconds


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tower.txt").write_text(LONG.text)
    (tmp_path / "scan.pdf").write_bytes(pdf([""]))
    (tmp_path / "notes").mkdir()
    for name in ("a.md", "b.md"):
        (tmp_path / "notes" / name).write_text(f"{name} {WORDS}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_whole_conversation(hybrid_file, folder):
    typed = "/file tower.txt|the dog|/retry|/edit a fox|/undo|a fox|/save mine|/reset|/load mine|/sessions|/stats|/layers|/help|/exit|never"
    chat, screen = new_chat(new_conversation(hybrid_file, folder), folder, *typed.split("|"))
    chat.run()
    assert screen.lines == ["never"] and chat.n_errors == 0
    first, again, edited, last = screen.answers
    assert first == again and edited == last
    said = "\n".join(screen.said)
    parts = (
        "tower.txt (text): |fits: |the last message is forgotten; tower.txt stays|saved as mine; what the model has read is on disk"
    )
    parts += "|mine: 1 question about tower.txt|1 questions about tower.txt|documents: tower.txt (text)|streaming: 2 layers hold "
    for part in f"{parts}|/file PATH…: reads documents|Ctrl-D: leaves|first token after ".split("|"):
        assert part in said, part
    assert screen.steps[-1][0] <= screen.steps[-1][1]
    assert len(chat.conversation.turns) == 1


def test_files_folders_and_patterns(hybrid_file, folder):
    chat, screen = new_chat(new_conversation(hybrid_file, folder), folder)
    assert chat.obey("/file") and screen.said[-1].startswith("/file PATH: give a file")
    assert chat.obey("/file notes") and [d.name for d in chat.conversation.documents] == ["a.md", "b.md"]
    assert any(line.startswith("2 documents: ") for line in screen.said)
    assert chat.obey("/file notes *.md") and "a.md is part of the conversation already" in screen.said
    assert chat.obey("/undo") and screen.said[-1] == "taken out: a.md, b.md"
    assert chat.obey("/file tower.txt scan.pdf")  # of several, what can be read is
    assert [d.name for d in chat.conversation.documents] == ["tower.txt"]
    assert any(line.startswith("error: scan.pdf: its page holds pictures and no text") for line in screen.said)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("/fil", "there is no command /fil (/help lists them)"),
        ("/retry", "there is no message to answer again"),
        ("/edit x", "there is no message to replace"),
        ("/undo", "there is no message to forget"),
        ("/save", "there is nothing to save yet"),
        ("/load", "/load NAME: give a session's name (/sessions lists them)"),
        ("/load none", "none: there is no session of that name (/sessions lists them)"),
        ("/shorten", "nothing is dropped: there is enough room, or no question"),
        ("/shorten x", "/shorten x: must be a number of questions, at least 1"),
        ("/branch", "there is no question yet"),
        ("/file none.txt", "none.txt: there is no such file"),
        ("/file scan.pdf", "scan.pdf: its page holds pictures and no text: must be a PDF with text, which OCR makes"),
        ("/file 'open", "/file 'open: No closing quotation"),
    ],
)
def test_what_cannot_be_done_is_one_line(hybrid_file, folder, line, complaint):
    chat, screen = new_chat(conversation_of(hybrid_file), folder)
    assert not chat.obey(line) and chat.n_errors == 1
    assert len(screen.said) == 1 and screen.said[0].startswith(f"error: {complaint}") and "\n" not in screen.said[0]
    assert chat.conversation.turns == []


_conversations = {}


def conversation_of(file):
    """One for all tests in which nothing is read."""
    return _conversations.setdefault(file, new_conversation(file, None))


def test_slashes_that_are_no_commands(hybrid_file, folder):
    chat, screen = new_chat(new_conversation(hybrid_file, None), folder)
    assert chat.obey("/usr/bin is what") and chat.obey("/2 of it") and chat.obey("  ")
    assert len(screen.answers) == 2


def test_ctrl_c_does_not_leave(hybrid_file, folder):
    chat, screen = new_chat(new_conversation(hybrid_file, None), folder, KeyboardInterrupt(), "the dog", None)
    chat.run()
    assert "/exit or Ctrl-D leaves" in screen.said and len(screen.answers) == 1


def test_ctrl_c_while_a_document_is_read(hybrid_file, folder, monkeypatch):
    conversation = new_conversation(hybrid_file, folder)
    chat, screen = new_chat(conversation, folder)

    def read(tokens, progress):
        type(conversation.llm).read_ahead(conversation.llm, tokens[:128], progress)
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation.llm, "read_ahead", read)
    assert chat.obey("/file tower.txt")
    assert screen.said[-1].startswith("stopped at 128 tokens: the rest is read before the next answer")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert chat.obey("the dog") and len(screen.answers) == 1


def test_the_end_of_the_context_is_said_before(hybrid_file, folder):
    chat, screen = new_chat(new_conversation(hybrid_file, folder, n_ctx=768), folder)
    while not any("the context is nearly full" in line for line in screen.said):
        assert chat.obey(WORDS * 5)
    line = screen.said[-1]
    assert (
        "/shorten drops the oldest questions and keeps the documents, /branch goes on from" in line
        and "--ctx makes it larger" in line
    )
    while chat.obey(WORDS * 5):
        assert len(chat.conversation.turns) < 30
    assert "tokens don't fit the context of 768: /shorten" in screen.said[-1]
    n = len(chat.conversation.turns)
    assert chat.obey("/shorten") and 0 < len(chat.conversation.turns) < n
    assert chat.obey(WORDS * 5)
    assert chat.obey("/branch") and chat.conversation.turns == [] and len(chat.sessions.listed()) == 1


def test_a_document_that_does_not_fit(hybrid_file, folder):
    (folder / "huge.txt").write_text(WORDS * 400)
    chat, screen = new_chat(new_conversation(hybrid_file, folder, n_ctx=512), folder)
    assert not chat.obey("/file huge.txt")
    assert screen.said[-2].startswith("huge.txt (text): ") and "fits" not in screen.said[-2]
    assert "tokens don't fit" in screen.said[-1] and "--ctx makes it larger (the model was trained for 2048)" in screen.said[-1]
    assert chat.obey("the dog")


def test_editing_without_a_text_offers_the_last_one(hybrid_file, folder):
    chat, screen = new_chat(new_conversation(hybrid_file, None), folder, "a fox")
    chat.obey("the dog")
    assert chat.obey("/edit") and "first: the dog" in screen.said
    assert chat.conversation.turns[-1].question == "a fox"


def test_a_named_session_is_kept_after_each_answer(hybrid_file, folder):
    chat, _ = new_chat(new_conversation(hybrid_file, folder), folder, "the dog", session="mine")
    chat.run()
    assert chat.sessions.listed()[0].n_questions == 1
    assert chat.conversation.kept.store.entries()[0].label == "the dog · 1 question"


def test_the_system_prompt(hybrid_file, folder):
    chat, screen = new_chat(new_conversation(hybrid_file, folder), folder)
    chat.obey("/file tower.txt")
    assert chat.obey("/system the lazy fox") and chat.conversation.system == "the lazy fox"
    assert any(line.startswith("read ") for line in screen.said[-1:])
    assert chat.obey("/system") and screen.said[-1] == "system: the lazy fox"
    assert chat.obey("/system -") and chat.conversation.system is None
    assert "restored" in screen.said[-1]  # as it was before


def test_every_command_has_its_help():
    assert all(command.help and command.name == name for name, command in COMMANDS.items())


@pytest.mark.parametrize("seconds, text", [(0.2, "0 s"), (59.4, "59 s"), (61, "1 min 1 s"), (-3, "0 s")])
def test_format_seconds(seconds, text):
    assert format_seconds(seconds) == text
