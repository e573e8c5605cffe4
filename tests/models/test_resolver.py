"""What a text means where a GGUF file is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from lt_gguf import models
from lt_gguf.models import hub_files, package
from lt_gguf.models.resolver import split_hub_name


@pytest.fixture
def downloads(tmp_path, monkeypatch) -> list[tuple]:
    """What would have been downloaded; the working directory is an empty folder."""
    asked: list[tuple] = []

    def fetch_named(model):
        asked.append((model.name,))
        return Path("/cache/named.gguf")

    def fetch_from_hub(repo, pattern=None):
        asked.append((repo, pattern))
        return Path("/cache/hub.gguf")

    monkeypatch.setattr(package, "fetch", fetch_named)
    monkeypatch.setattr(hub_files, "fetch", fetch_from_hub)
    monkeypatch.chdir(tmp_path)
    return asked


@pytest.mark.parametrize(
    "text, asked",
    [
        ("smollm2", ("smollm2",)),
        ("org/name", ("org/name", None)),
        ("org/name:Q4_K_M", ("org/name", "Q4_K_M")),
        ("org/name:*q8_0*.gguf", ("org/name", "*q8_0*.gguf")),
        ("org/name:sub/name-Q8_0.gguf", ("org/name", "sub/name-Q8_0.gguf")),
    ],
)
def test_names_are_downloaded_and_paths_win(text, asked, downloads, tmp_path):
    assert models.resolve(text).parent == Path("/cache")
    assert downloads == [asked]
    file = tmp_path / text
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"")
    assert models.resolve(text) == Path(text)
    assert downloads == [asked]


@pytest.mark.parametrize("text", ["none.gguf", "models/none.gguf", "./none", "a/b/c", "/none"])
def test_a_path_that_is_not_there(text, downloads):
    with pytest.raises(FileNotFoundError) as error:
        models.resolve(text)
    assert error.value.filename == text
    assert not downloads


@pytest.mark.parametrize(
    "text, hint", [("smolm2", "did you mean smollm2?"), ("SmolLM2", "did you mean smollm2?"), ("gpt", "must be")]
)
def test_a_name_that_is_none(text, hint, downloads):
    with pytest.raises(ValueError) as error:
        models.resolve(text)
    message = str(error.value)
    assert message.startswith(f"{text}: there is no such file and no model of that name") and hint in message
    assert "smollm2" in message and "ORG/NAME:Q4_K_M" in message  # what there is, and what is allowed
    assert ("did you mean" in message) == ("did you mean" in hint)
    assert not downloads


def test_a_folder_is_no_model(tmp_path, downloads):
    with pytest.raises(ValueError, match="is a folder, must be a GGUF file"):
        models.resolve(tmp_path)


def test_what_a_class_takes_without_surprises(downloads, tmp_path):
    """`Llama(model_path)` knows names, and takes anything else for a path."""
    assert models.local_path("smollm2") == "/cache/named.gguf"
    assert models.local_path("org/name") == "org/name"
    assert downloads == [("smollm2",)]
    (tmp_path / "smollm2").write_bytes(b"")
    assert models.local_path("smollm2") == "smollm2"
    assert downloads == [("smollm2",)]


def test_what_is_a_path(downloads, tmp_path):
    for text in ("smollm2", "org/name", "org/name:Q8_0", "name"):
        assert not models.is_path(text)
    for text in ("none.gguf", "models/none.gguf", "a/b/c"):
        assert models.is_path(text)
    (tmp_path / "smollm2").write_bytes(b"")
    assert models.is_path("smollm2")


def test_what_is_a_gguf_file_and_what_a_checkpoint(tmp_path, downloads, monkeypatch):
    monkeypatch.setattr(hub_files, "has_only_gguf", lambda repo: repo == "org/only-gguf")
    (tmp_path / "checkpoint").mkdir()
    expected = {
        "checkpoint": False,
        "org/name": False,
        "org/only-gguf": True,
        "org/name:Q8_0": True,
        "smollm2": True,
        "x.gguf": True,
    }
    assert {text: models.is_gguf(text) for text in expected} == expected


def test_hub_names():
    assert split_hub_name("org/name") == ("org/name", None)
    assert split_hub_name("org/name:Q4_K_M") == ("org/name", "Q4_K_M")
    for text in ("name", "a/b/c", "org/name.gguf", "org/name:", "./name", "../name:Q8_0", "http://host/name"):
        assert split_hub_name(text) is None
