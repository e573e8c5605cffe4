"""GGUF files on the hub, with huggingface_hub itself against a server that answers as the hub does."""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_hub import REPO, Hub, running

from lt_gguf.models import hub as hub_of_models
from lt_gguf.models import hub_files

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path) -> Iterator[Hub]:
    with running(tmp_path / "home") as model:
        yield model


NAMES = ["README.md", "m-Q8_0.gguf", "m-F16.gguf", "m-Q4_K_M.gguf", "mmproj-m-Q4_K_M.gguf", "m-imatrix.gguf"]
SPLIT = [f"big/b-Q4_K_M-0000{i}-of-00002.gguf" for i in (1, 2)]


@pytest.mark.parametrize(
    "files, pattern, chosen, others",
    [
        (["a.gguf"], None, "a.gguf", 0),
        (NAMES, None, "m-Q4_K_M.gguf", 2),
        (["m-F16.gguf", "m-Q8_0.gguf"], None, "m-Q8_0.gguf", 1),
        (["m-F16.gguf", "m-BF16.gguf"], None, "m-BF16.gguf", 1),
        (NAMES, "q8_0", "m-Q8_0.gguf", 0),
        (NAMES, "F16", "m-F16.gguf", 0),
        (["m-BF16.gguf", "m-F16.gguf"], "F16", "m-F16.gguf", 0),
        (NAMES, "*q8_0*.gguf", "m-Q8_0.gguf", 0),
        (NAMES, "m-F16.gguf", "m-F16.gguf", 0),
        (NAMES, "mmproj-m-Q4_K_M.gguf", "mmproj-m-Q4_K_M.gguf", 0),  # who names it wants it
        (SPLIT, None, SPLIT[0], 0),
        ([*NAMES, *SPLIT], "Q4_K_M", SPLIT[0], 1),
        (SPLIT, "b-*.gguf", SPLIT[0], 0),
    ],
)
def test_which_file_is_meant(files, pattern, chosen, others, capsys):
    assert hub_files.choose(REPO, files, pattern) == chosen
    err = capsys.readouterr().err
    assert err.count("\n") == (others > 0)
    if others:
        assert err.startswith(f"{REPO}: taking {chosen}; others that fit: ") and err.count(".gguf") == 1 + others


@pytest.mark.parametrize(
    "files, pattern, complaint",
    [
        ([], None, "has no GGUF file"),
        (["model.safetensors"], None, f"has no GGUF file: it is a checkpoint, lt-gguf convert {REPO} makes one"),
        (NAMES, "Q5_K_M", "it has no file for Q5_K_M, must be one of m-F16.gguf, m-Q4_K_M.gguf, m-Q8_0.gguf"),
        (NAMES, "*.gguf", "*.gguf fits 3 files, must fit one: m-F16.gguf, m-Q4_K_M.gguf, m-Q8_0.gguf"),
        ([f"{i:02}.gguf" for i in range(20)], "x.gguf", "07.gguf and 12 more"),
    ],
)
def test_which_file_cannot_be_told(files, pattern, complaint):
    with pytest.raises(ValueError) as error:
        hub_files.choose(REPO, files, pattern)
    assert str(error.value).startswith(f"{REPO}: ") and complaint in str(error.value)


@pytest.mark.slow
def test_a_download_and_the_cache_without_the_hub(hub):
    hub.files = {"m-Q8_0.gguf": b"eight", "m-Q4_K_M.gguf": b"four"}
    result = hub.fetch("Q8_0")
    assert result.returncode == 0, result.stderr
    path = Path(result.stdout.strip())
    assert path.read_bytes() == b"eight" and path.is_relative_to(hub.home)
    assert len(hub.ranges) == 1
    assert hub.fetch("Q8_0").stdout == result.stdout and len(hub.ranges) == 1  # not downloaded again
    for offline in (True, False):
        hub.address = hub.address if offline else "http://127.0.0.1:9"
        for pattern in ("Q8_0", None, "m-*.gguf"):
            again = hub.fetch(pattern, offline=offline)
            assert again.stdout == result.stdout, again.stderr
            assert "the local cache has it" in again.stderr
        missing = hub.fetch("Q4_K_M", offline=offline)
        assert missing.stderr.strip() == f"ValueError: {REPO}: the local cache has no file for Q4_K_M, must be one of m-Q8_0.gguf"
        unknown = hub.fetch(repo="somebody/else", offline=offline)
        assert unknown.stderr.startswith("OSError: somebody/else: ") and "must be a file, or try again" in unknown.stderr
        assert unknown.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("comes_back", [True, False])
def test_a_download_that_breaks_off(hub, comes_back):
    content = bytes(range(256)) * 65536  # 16 MiB: huggingface_hub reads 10 at a time
    hub.files = {"m.gguf": content}
    hub.cut, hub.goes_away = 12 << 20, not comes_back
    result = hub.fetch()
    if comes_back:
        assert hub.ranges == [None, "bytes=10485760-"]  # goes on where it stopped, but for what wasn't written yet
    else:
        assert result.returncode == 1
        last = result.stderr.strip().splitlines()[-1]
        assert last.startswith(f"OSError: {REPO}: the download broke off (") and last.endswith("try again with a connection")
        assert not list(hub.home.rglob("*.gguf"))
        hub.cut, hub.gone = None, False
        result = hub.fetch()
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).read_bytes() == content


@pytest.mark.slow
def test_a_download_that_is_killed_begins_anew_and_leaves_nothing(hub):
    hub.files, hub.pause = {"m.gguf": bytes(64 << 20)}, 0.1

    def written():
        return [path.stat().st_size for path in hub.home.rglob("*.incomplete")]

    process = hub.start()
    while not any(written()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    hub.pause = 0
    (n_bytes,) = written()
    assert not list(hub.home.rglob("*.gguf"))
    result = hub.fetch()
    assert result.returncode == 0, result.stderr
    assert f"{REPO}: {n_bytes / 1e6:.1f} MB of an interrupted download are removed: it begins anew" in result.stderr
    assert Path(result.stdout.strip()).stat().st_size == 64 << 20 and written() == []


def test_only_what_nobody_downloads_is_removed(tmp_path, capsys):
    folder = f"models--{REPO.replace('/', '--')}"
    blobs, locks = tmp_path / folder / "blobs", tmp_path / ".locks" / folder
    blobs.mkdir(parents=True)
    locks.mkdir(parents=True)
    for name in ("aa.01234567.incomplete", "bb.01234567.incomplete", "cc.incomplete", "dd"):
        (blobs / name).write_bytes(bytes(2_000_000))
    with (locks / "bb.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        hub_of_models.remove_leftovers(REPO, tmp_path)
    assert sorted(path.name for path in blobs.iterdir()) == ["bb.01234567.incomplete", "cc.incomplete", "dd"]
    assert capsys.readouterr().err.startswith(f"{REPO}: 2.0 MB of an interrupted download are removed")
    hub_of_models.remove_leftovers("somebody/else", tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_cache_that_cannot_be_written(hub):
    hub.files = {"m.gguf": b"four"}
    hub.home.mkdir()
    (hub.home / "hub").write_text("a file where the folder should be")
    result = hub.fetch()
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith(f"OSError: {REPO}: huggingface_hub's cache can't be written (") and last.endswith("to a folder that can")


@pytest.mark.slow
def test_a_split_model_comes_whole(hub):
    hub.files = {name: name.encode() for name in [*SPLIT, "mmproj-b.gguf"]}
    result = hub.fetch("Q4_K_M", additional_files=["mmproj*"])
    assert result.returncode == 0, result.stderr
    first = Path(result.stdout.strip())
    assert first.name == SPLIT[0].rsplit("/")[-1] and first.with_name(SPLIT[1].rsplit("/")[-1]).is_file()
    assert (first.parents[1] / "mmproj-b.gguf").is_file()
    hub.files = {SPLIT[0]: b""}
    result = hub.fetch()
    assert f"{SPLIT[0]} is the first of 2 files, of which 1 are missing: {SPLIT[1]}" in result.stderr


def test_a_download_to_a_folder(hub, tmp_path):
    hub.files = {"m.gguf": b"four"}
    folder = tmp_path / "folder"
    for offline in (False, True):
        result = hub.fetch(local_dir=str(folder), offline=offline)
        assert result.stdout.strip() == str(folder / "m.gguf"), result.stderr
    assert (folder / "m.gguf").read_bytes() == b"four"


@pytest.mark.slow
@pytest.mark.parametrize(
    "files, only", [(["m.gguf", "README.md"], True), (["m.gguf", "model.safetensors"], False), (["model.safetensors"], False)]
)
def test_a_model_without_a_checkpoint(hub, files, only):
    hub.files = dict.fromkeys(files, b"")
    assert hub.fetch(function="has_only_gguf").stdout.strip() == str(only)


def test_what_the_hub_does_not_have(hub):
    result = hub.fetch(repo="somebody/else")
    assert result.stderr.startswith("ValueError: somebody/else: there is no such file, and no such model on the hub")
    result = hub.fetch(repo="some--body/else.git")
    assert result.stderr.startswith(
        "ValueError: some--body/else.git: there is no such file, and no model on the hub can have that name"
    )


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"huggingface_hub is needed: pip install 'lt-gguf\[hub\]'"):
        hub_files.fetch(REPO)
