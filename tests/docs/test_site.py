"""What the site's hook makes of the pages (scripts/docs/mkdocs_hooks.py); MkDocs itself isn't needed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "docs"))

import mkdocs_hooks as hooks

from lt_gguf.cli import COMMANDS


@pytest.mark.slow
def test_the_help_of_all_commands_says_nothing_of_this_machine():
    text = hooks.help_of_all_commands()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## lt-gguf {name}" for name in COMMANDS]
    assert text.count("Show this message and exit.") == 1 + len(COMMANDS)
    assert ", here" not in " ".join(text.split())


def test_links_become_links_of_the_site():
    page = "docs/evidence/results.md"
    text = "[a](../../models/demo/README.md#try) [b](oracle.md) ![c](../how-to/c.svg) [d](../../LICENSE) [e](https://e.e) [f](#f)"
    wanted = "[a](demo-model.md#try) [b](oracle.md) ![c](../how-to/c.svg) d [e](https://e.e) [f](#f)"
    assert hooks.site_links(text, page, "evidence/results.md") == wanted
    outside = "![p](training.png) [r](../../docs/evidence/results.md)"
    assert hooks.site_links(outside, "models/demo/README.md", "evidence/demo-model.md") == "![p](training.png) [r](results.md)"
    code = "```python\n[a](LICENSE)\n```"
    assert hooks.site_links(code, page, "evidence/results.md") == code


def test_lists_and_tables_get_the_blank_line_that_markdown_in_python_wants():
    assert hooks.with_blank_lines("a:\n- b\n  c\n- d\n\ne") == "a:\n\n- b\n  c\n- d\n\ne"
    assert hooks.with_blank_lines("```sh\n- a\n```\n| b |\n| - |\n| c |") == "```sh\n- a\n```\n\n| b |\n| - |\n| c |"


def test_every_page_outside_docs_is_there():
    assert all((ROOT / source).exists() for source in hooks.site_places())
