"""Markdown that is shown while it is written: what is complete is printed once, and nothing is lost."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from lt_gguf.chat import markdown_stream
from lt_gguf.chat.markdown_stream import MarkdownStream, complete

TEXT = "# Title\n\nSome *text*.\n\n```py\n{}\n```\n\n- one\n- two\n\nThe end."


def on_screen(written: str, height: int) -> list[str]:
    """The lines that stand in a terminal and above it after all this was written, without those that are empty."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[a-zA-Z]|[\r\n]|[^\x1b\r\n]+", written):
        if part == "\n":
            row += 1
            lines += [""] * (row == len(lines))
            column = 0
        elif part == "\r":
            column = 0
        elif part.endswith("A"):
            row = max(0, len(lines) - height, row - int(part[2:-1] or 1))  # a cursor doesn't go above the screen
        elif part == "\x1b[2K":
            lines[row] = ""
        elif not part.startswith("\x1b"):
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize(
    "text, n",
    [
        ("a paragraph that goes on", 0),
        ("a paragraph\n\n", 0),  # what follows may belong to it
        ("a paragraph\n\nanother", 13),
        ("a paragraph\n\n- a list", 13 * 0),
        ("a\n\nb\n\ncdef", 6),
        ("```py\nx = 1\n\ny = 2\n", 0),
        ("```py\nx = 1\n\ny = 2\n```\n\nthen", 24),
        ("~~~~\n```\n\n~~~\n\nx\n~~~~\n\nthen", 23),
        ("- one\n\n- two\n\nthen more", 14),
        ("\n\n\n", 0),
    ],
)
def test_what_is_complete(text, n):
    assert complete(text) == n


@pytest.mark.parametrize("per_second", [1e9, 1e-9])  # each piece is drawn, none is
@pytest.mark.parametrize("n", [3, 12, 30])  # lines of code: fewer than the screen has, nearly as many, more
@pytest.mark.parametrize("size", [2, 5, 1000])
def test_all_of_an_answer_is_shown_once(monkeypatch, size, n, per_second):
    monkeypatch.setattr(markdown_stream, "_PER_SECOND", per_second)
    code = [f"line_{i} = {i}" for i in range(n)]
    text = TEXT.format("\n".join(code))
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
    console.print("> a question")
    with MarkdownStream(console) as stream:
        for i in range(0, len(text), size):
            stream.add(text[i : i + size])
    shown = on_screen(out.getvalue(), 20)
    assert [line for line in shown if "Title" not in line and "━" not in line] == [
        "> a question", "Some text.", *code, "• one", "• two", "The end."
    ]  # fmt: skip


def test_an_answer_that_is_interrupted_stays():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
    with pytest.raises(KeyboardInterrupt), MarkdownStream(console) as stream:
        stream.add("Half an ans")
        raise KeyboardInterrupt
    assert out.getvalue().rstrip().endswith("Half an ans")
