"""Calibration texts: how they are read and cut into samples."""

from __future__ import annotations

import hashlib
import json

import pytest

from lt_gguf.calibration import Calibration, Texts, check_length, cut_samples, read_texts


def test_plain_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("öäü, line one\nline two\n", encoding="utf-8")
    texts = read_texts(path)
    assert texts == Texts("book.txt", hashlib.sha256(path.read_bytes()).hexdigest(), ("öäü, line one\nline two\n",))


def test_jsonl_of_texts_and_of_conversations(tmp_path):
    path = tmp_path / "data.JSONL"
    messages = [{"role": "user", "content": "Hello!\nYou?"}, {"role": "assistant", "content": "Hi.", "name": "x"}]
    # the line separator U+2028 is part of a string, not the end of a line
    lines = [{"text": "one\u2028more"}, {"text": messages}]
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\r\n", encoding="utf-8")
    assert read_texts(path).documents == ("one\u2028more", "user: Hello!\nYou?\nassistant: Hi.")
    path.write_text('{"text": 1, "other": "this"}', encoding="utf-8")
    assert read_texts(path, "other").documents == ("this",)


@pytest.mark.parametrize(
    "line, complaint",
    [
        ('{"text": "a"', "line 2: is no JSON"),
        ('["a"]', 'line 2: has no fields, must be an object with "text", or --calibration-field must name another'),
        ('{"body": "a", "n": 1}', 'line 2: has only body, n, must be an object with "text"'),
        ('{"text": 3}', 'line 2: "text" must be a string, or a list of messages'),
        ('{"text": []}', 'line 2: "text" must be a string, or a list of messages'),
        ('{"text": [{"role": "user"}]}', 'line 2: "text" must be a string, or a list of messages'),
        ('{"text": [{"role": "user", "content": null}]}', 'line 2: "text" must be a string, or a list of messages'),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, complaint):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError) as error:
        read_texts(path)
    assert str(error.value).startswith(f"{path}: {complaint}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name, content", [("a.txt", b""), ("a.txt", b" \n"), ("a.jsonl", b""), ("a.jsonl", b'{"text": ""}\n')])
def test_no_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="has no text"):
        read_texts(tmp_path / name)


def test_not_utf_8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match="a.txt: is not UTF-8, see byte 3"):
        read_texts(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError):
        read_texts(tmp_path / "none.txt")


def test_the_built_in_texts():
    texts = read_texts(None)
    assert texts == read_texts(None)
    text = "\n\n".join(texts.documents)
    assert texts.sha256 == hashlib.sha256(text.encode()).hexdigest()
    assert 2_000_000 <= len(text) < 4_000_000
    assert texts.name.startswith("texts of Python 3.")
    assert "The Python interpreter" in text or "expression" in text
    assert "import sys" in text
    # nothing in it is of this machine: a hash that others can check
    assert "_sysconfigdata" not in texts.name and "build_time_vars = {" not in text


# ----------------------------------------------------------------------------------------------- samples


def characters(text: str) -> list[int]:
    return list(map(ord, text))


def test_samples_are_spread_evenly_and_have_the_same_length():
    text = "".join(chr(1000 + i) for i in range(100))
    prompts = cut_samples(Texts("t", "", (text[:50], text[52:])), characters, [1, 2], 3, 12)
    assert prompts[1] == [1, 2, *range(1033, 1043)]
    assert [len(prompt) for prompt in prompts] == [12] * 3
    assert [prompt[2] - 1000 for prompt in prompts] == [0, 33, 66]


def test_documents_are_apart():
    assert cut_samples(Texts("t", "", ("ab", "cd")), characters, [], 1, 6) == [characters("ab\n\ncd")]


def test_a_text_that_is_just_long_enough():
    texts = Texts("t", "", ("x" * 30,))
    assert cut_samples(texts, characters, [1], 3, 11) == [[1] + [ord("x")] * 10] * 3
    with pytest.raises(ValueError) as error:
        cut_samples(texts, characters, [1], 3, 12)
    assert str(error.value) == (
        "t: part 1 of 3 has 10 tokens, must have 11 for samples of 12: give a longer text, fewer samples or a shorter length"
    )


def test_only_what_is_needed_is_tokenized():
    seen = []

    def every_fourth(text: str) -> list[int]:
        seen.append(len(text))
        return characters(text[::4])

    prompts = cut_samples(Texts("t", "", ("y" * 10_000_000,)), every_fourth, [], 8, 1000)
    assert [len(prompt) for prompt in prompts] == [1000] * 8
    assert sum(seen) <= 8 * 1000 * 8

    def every_fiftieth(text: str) -> list[int]:  # fewer tokens than was thought: more text is read
        seen.append(len(text))
        return characters(text[::50])

    seen.clear()
    assert len(cut_samples(Texts("t", "", ("y" * 1_000_000,)), every_fiftieth, [], 1, 1000)[0]) == 1000
    assert 50_000 <= max(seen) <= 100_000


@pytest.mark.parametrize(
    "samples, length, complaint",
    [(0, 10, "samples = 0: must be at least 1"), (1, 1, "calibration length = 1: must be at least 2"), (1, -5, "length = -5")],
)
def test_numbers_out_of_range(samples, length, complaint):
    with pytest.raises(ValueError, match=complaint):
        cut_samples(Texts("t", "", ("text",)), characters, [1], samples, length)


def test_no_prompt_within_sink_and_window():
    check_length(1025, 4, 1020)
    with pytest.raises(ValueError, match=r"calibration length = 1024: must be more than sink \+ window = 1024, else every"):
        check_length(1024, 4, 1020)


def test_description():
    assert Calibration("book.txt", "ab", 3, 200).describe(2, 40, 16) == {
        "data": "book.txt",
        "sha256": "ab",
        "samples": 3,
        "length": 200,
        "tokens": 600,
        "w_last": 16,
        "w_sink": 2,
        "w_recent": 40,
    }
