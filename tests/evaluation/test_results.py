"""What was measured is in the file as soon as it is measured, and an evaluation goes on from there."""

from __future__ import annotations

import hashlib
import json

import pytest
from support.small_gguf import write_small

from lt_gguf.evaluation.results import FORMAT_VERSION, Journal, model_hash, write_text
from lt_gguf.evaluation.retrieval import Question

SETTINGS = {"model": "m.gguf", "seed": 1, "text": {"name": "t", "samples": 3}}
ONE, TWO = Question("single", 1024, 0.25, 0), Question("votes", 1024, None, 7)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "records.jsonl"


def fill(path, *questions: Question) -> None:
    with Journal(path, SETTINGS) as journal:
        for question in questions:
            journal.add("off", question, score=0.5, prompt="ab")


def test_records_are_written_at_once_and_read_again(path):
    with Journal(path, SETTINGS) as journal:
        assert journal.records == {}
        journal.add("off", ONE, score=0.5, prompt="ab")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines[0] == {"settings": {"version": FORMAT_VERSION, **SETTINGS}}
        assert lines[1:] == [{"spec": "off", **ONE._asdict(), "score": 0.5, "prompt": "ab"}]
        journal.add("layers=1", ONE, kl=0.1)
    with Journal(path, SETTINGS) as journal:
        assert journal.records == {("off", ONE): {"score": 0.5, "prompt": "ab"}, ("layers=1", ONE): {"kl": 0.1}}
        journal.add("off", TWO, score=1.0)
    with Journal(path, SETTINGS) as journal:
        assert list(journal.records) == [("off", ONE), ("layers=1", ONE), ("off", TWO)]


def test_nothing_is_measured_twice(path):
    with Journal(path, SETTINGS) as journal:
        journal.add("off", ONE, score=0.5)
        journal.add("off", ONE, score=1.0)
        assert journal.records["off", ONE] == {"score": 0.5}
    assert len(path.read_text().splitlines()) == 2


def test_without_a_path_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Journal(None, SETTINGS) as journal:
        journal.add("off", ONE, score=0.5)
        assert journal.records == {("off", ONE): {"score": 0.5}}
    assert list(tmp_path.iterdir()) == []


def test_a_line_that_was_cut_off_is_dropped(path):
    fill(path, ONE, TWO)
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole[:n])
        n_lines = whole[:n].count(b"\n")
        with Journal(path, SETTINGS) as journal:
            assert list(journal.records) == [("off", ONE), ("off", TWO)][: max(0, n_lines - 1)]
            for question in (ONE, TWO):
                journal.add("off", question, score=0.5, prompt="ab")
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "settings, complaint",
    [
        (SETTINGS | {"seed": 2}, "was measured with seed = 1, this would be with 2: name another folder"),
        (SETTINGS | {"more": "x"}, 'measured with more = null, this would be with "x"'),
        ({"model": "m.gguf", "seed": 1}, "measured with text = .*, this would be with null"),
        (SETTINGS | {"text": {"samples": 4}}, 'text = {"name": "t", "samples": 3}, this would be with {"samples": 4}'),
        (SETTINGS | {"model": "n" * 100}, 'model = "m.gguf", this would be with "n{36}[.]{3}: '),
    ],
)
def test_other_settings_are_refused(path, settings, complaint):
    fill(path, ONE)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=complaint) as error:
        Journal(path, settings)
    assert str(error.value).startswith(f"{path}: ") and path.read_bytes() == before


def test_another_version_is_refused(path):
    fill(path)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="was measured with version = 2, this would be with 1"):
        Journal(path, SETTINGS)


@pytest.mark.parametrize("line", ["no json", "[]", "3", '{"spec": "off"}', "\x00"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_file_of_something_else(path, line, number):
    fill(path, ONE, TWO)
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"records.jsonl: line {number} isn't of an evaluation, remove it or name another"):
        Journal(path, SETTINGS)


def test_one_at_a_time(path):
    with Journal(path, SETTINGS), pytest.raises(ValueError, match="another evaluation is writing it"):
        Journal(path, SETTINGS)
    Journal(path, SETTINGS).__exit__()


def test_the_hash_of_a_model(tmp_path):
    (one,) = write_small(tmp_path / "one.gguf")
    assert model_hash(one) == hashlib.sha256(one.read_bytes()).hexdigest()
    parts = write_small(tmp_path / "parts.gguf", files=2)
    assert model_hash(parts[0]) == hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    with pytest.raises(ValueError, match="not a GGUF file"):
        model_hash(write_text(tmp_path / "no.gguf", "text"))


def test_a_file_is_written_as_a_whole(tmp_path):
    path = write_text(tmp_path / "a.md", "öne")
    assert path.read_text(encoding="utf-8") == "öne"
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "two \ud800")
    assert path.read_text(encoding="utf-8") == "öne" and list(tmp_path.iterdir()) == [path]
