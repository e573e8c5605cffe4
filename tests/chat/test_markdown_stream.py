"""Markdown that is shown while it is written: what is complete is printed once, and nothing is lost."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from lt_gguf.chat.markdown_stream import MarkdownStream, complete


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


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_all_of_an_answer_is_shown(size):
    text = (
        "# Title\n\nSome *text*.\n\n```py\n" + "\n".join(f"line_{i} = {i}" for i in range(60)) + "\n```\n\n- one\n- two\n\nThe end."
    )
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
    with MarkdownStream(console) as stream:
        for i in range(0, len(text), size):
            stream.add(text[i : i + size])
    shown = out.getvalue()
    for part in ("Title", "Some text.", "line_0 = 0", "line_59 = 59", "one", "two", "The end."):
        assert part in shown


def test_an_answer_that_is_interrupted_stays():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=20, color_system=None)
    with pytest.raises(KeyboardInterrupt), MarkdownStream(console) as stream:
        stream.add("Half an ans")
        raise KeyboardInterrupt
    assert out.getvalue().rstrip().endswith("Half an ans")
