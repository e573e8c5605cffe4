"""The examples run, and do what they say."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.chat import WORDS
from support.serve import serving
from support.tiny_checkpoint import hybrid_file  # noqa: F401 - a fixture

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(example: str, *arguments: object, cache: Path) -> tuple[str, str]:
    environment = os.environ | {"LT_GGUF_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / example, *map(str, arguments)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


@pytest.fixture
def document(tmp_path) -> Path:
    path = tmp_path / "fox.md"
    path.write_text(WORDS * 20)
    return path


def test_ask_document(hybrid_file, document, tmp_path):
    first, said = run("ask_document.py", hybrid_file, document, "the dog", "--n-predict", "8", cache=tmp_path)
    assert ", 0 came from the disk" in said
    again, said = run("ask_document.py", hybrid_file, document, "the dog", "--n-predict", "8", cache=tmp_path)
    assert again == first and " 0 came from the disk" not in said


def test_many_questions(hybrid_file, document, tmp_path):
    questions = tmp_path / "questions.txt"
    questions.write_text("the dog\n\na fox\nthe dog\n")
    out, said = run("many_questions.py", hybrid_file, document, questions, "--n-predict", "8", cache=tmp_path)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["question"] for answer in answers] == ["the dog", "a fox", "the dog"]
    assert answers[0]["answer"] == answers[2]["answer"]
    assert all(int(line.split()[1]) < 60 for line in said.splitlines() if line.startswith("read "))


def test_langchain_retriever(hybrid_file, document, tmp_path):
    other = tmp_path / "other.md"
    other.write_text("a cache of keys and values\n\nzero one two three")
    with serving(hybrid_file, "--threads", "1", "--ctx", "2048") as served:
        arguments = f"{served.address}/v1", "keys?", document, other, "--n-predict", "8"
        out, _ = run("langchain_retriever.py", *arguments, cache=tmp_path)
        assert out.endswith("\n")
        read = re.search(r"^llamacpp:prompt_tokens_total (\d+)", served.ask("/metrics").decode(), re.MULTILINE)
        assert 10 < int(read[1]) < 100  # the piece that has the word, and not the fox
