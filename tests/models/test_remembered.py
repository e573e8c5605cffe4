"""What was chosen for a file is found again, by the file's content, and by `streaming="auto"` wherever a spec may be given."""

from __future__ import annotations

import shutil
import warnings

import pytest
from support.small_gguf import N_LAYER, write_small

import lt_gguf
from lt_gguf.gguf.flagging import flag
from lt_gguf.models import remembered
from lt_gguf.models.remembered import chosen_for, recall, remember
from lt_gguf.spec import StreamingSpec

SPEC = StreamingSpec((0, 2), N_LAYER, 3, 50)
SETTINGS = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    (path,) = write_small(tmp_path / "small.gguf")
    return path


def test_by_content(file, tmp_path):
    assert recall(file) is None
    remember(file, SPEC)
    assert recall(file) == SPEC
    assert recall(shutil.copy(file, tmp_path / "another name.gguf")) == SPEC
    (other,) = write_small(tmp_path / "other.gguf", name="another one")
    assert recall(other) is None
    remember(file, StreamingSpec.off(N_LAYER))
    assert recall(file) == StreamingSpec.off(N_LAYER)
    assert len(list((tmp_path / "cache" / "chosen").iterdir())) == 1


@pytest.mark.parametrize("damaged", ["", "{", "[]", '{"streaming": "layers=9", "n_layer": 4}', '{"n_layer": 4}'])
def test_what_cannot_be_read_is_as_if_it_were_not_there(file, tmp_path, damaged):
    remember(file, SPEC)
    (kept,) = (tmp_path / "cache" / "chosen").iterdir()
    kept.write_text(damaged)
    assert recall(file) is None


def test_a_failure_leaves_what_was_there(file, tmp_path, monkeypatch):
    remember(file, SPEC)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remembered.os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        remember(file, StreamingSpec.off(N_LAYER))
    assert recall(file) == SPEC and len(list((tmp_path / "cache" / "chosen").iterdir())) == 1


def test_what_auto_means(file, tmp_path):
    assert chosen_for(file, "layers=1") == ("layers=1", None) and chosen_for(file, None) == (None, None)
    found, line = chosen_for(file, "auto")
    assert found is None and f"{file}: no choice of streaming layers is known" in line and "\n" not in line
    remember(file, SPEC)
    assert chosen_for(file, "auto") == (SPEC, None)
    flagged = tmp_path / "flagged.gguf"
    flag(file, flagged, StreamingSpec((1,), N_LAYER))
    remember(flagged, SPEC)
    assert chosen_for(flagged, "auto") == (None, None)  # the file says it


def test_llama(file):
    with pytest.warns(RuntimeWarning, match="no choice of streaming layers is known.*lt-gguf analyze"):
        assert lt_gguf.Llama(file, streaming="auto", **SETTINGS).streaming is None
    remember(file, SPEC)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert lt_gguf.Llama(file, streaming="auto", **SETTINGS).streaming == SPEC


def test_commands(file, lt_gguf_command):
    status, out, err = lt_gguf_command("inspect", file, "--streaming", "auto", "--json")
    assert status == 0 and '"layers": ""' not in err and "no choice of streaming layers is known" in err
    status, out, err = lt_gguf_command("eval", file, "--streaming", "auto")
    assert (status, out) == (1, "") and err.startswith(f"error: {file}: no choice of streaming layers is known")
    remember(file, SPEC)
    status, out, err = lt_gguf_command("inspect", file, "--streaming", "auto", "--json")
    assert (status, err) == (0, "") and '"window": 50' in out
    status, out, err = lt_gguf_command("run", file, "--streaming", "auto", "-p", "the", "-n", 2, "--temp", 0, "--threads", 1)
    assert (status, err) == (0, "") and out
