"""Saved states on disk: found by their tokens, bounded, whole or not there, safe from other processes."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time

import pytest

from lt_gguf.runtime import state_store
from lt_gguf.runtime.state_file import DamagedError
from lt_gguf.runtime.state_store import StateStore

WHOSE, OTHER = "a" * 64, "b" * 64


def put(store: StateStore, tokens: list[int], whose: str = WHOSE, n_bytes: int = 1000, streams: bool = False, cuts=()) -> bool:
    fields = {"label": f"{len(tokens)} tokens", "model": "m.gguf", "streams": streams, "cuts": list(cuts)}
    return store.put(whose, tokens, fields, {"state": bytes(n_bytes)})


def age(store: StateStore, label: str, seconds: float) -> None:
    entry = next(entry for entry in store.entries() if entry.label == label)
    os.utime(entry.path, (time.time() - seconds, time.time() - seconds))


def found(store: StateStore, tokens: list[int], whose: str = WHOSE) -> tuple[int, int] | None:
    got = store.find(whose, tokens)
    return got and (got[0].n_tokens, got[1])


@pytest.fixture
def store(tmp_path) -> StateStore:
    return StateStore(tmp_path / "states", limit=100_000)


def test_the_state_that_spares_most_is_found(store):
    assert found(store, [1, 2, 3]) is None and store.entries() == []
    for tokens in ([1, 2], [1, 2, 3, 4], [9]):
        put(store, tokens)
    put(store, [1, 2, 3, 4, 5, 6], OTHER)
    assert found(store, [1, 2, 3, 4, 5, 6]) == (4, 4)
    assert found(store, [1, 2, 3, 7]) == (4, 3)  # it can be cut
    assert found(store, [1, 2, 3, 4, 5, 6], OTHER) == (6, 6)
    assert found(store, [8, 8]) is None and found(store, [1, 2], "c" * 64) is None


def test_what_streams_is_cut_at_its_snapshots_only(store):
    put(store, [1, 2, 3, 4, 5, 6], streams=True, cuts=[2, 4])
    assert found(store, [1, 2, 3, 4, 5, 6, 7]) == (6, 6)
    assert found(store, [1, 2, 3, 4, 5, 0]) == (6, 4)
    assert found(store, [1, 2, 3, 0]) == (6, 2)
    assert found(store, [1, 0]) is None


def test_the_parts_come_back(store):
    put(store, [1, 2, 3])
    entry, _ = store.find(WHOSE, [1, 2, 3])
    with store.opened(entry) as (header, parts):
        assert bytes(parts["state"]) == bytes(1000) and header.fields["label"] == "3 tokens"
        assert list(parts) == ["tokens", "state"]


def test_who_was_used_longest_ago_goes_first(store):
    store.limit = 4500
    for n in (3, 4, 5):
        assert put(store, list(range(n)))
        age(store, f"{n} tokens", 100 - n)
    with store.opened(store.find(WHOSE, [0, 1, 2])[0]):
        pass  # used now
    age(store, "4 tokens", 50)
    store.limit = 3 * store.entries()[0].n_bytes + 100
    assert put(store, list(range(6)))
    assert sorted(entry.n_tokens for entry in store.entries()) == [3, 4, 6]
    assert store.n_bytes <= store.limit
    before = store.n_bytes
    assert not put(store, list(range(7)), n_bytes=20_000)  # larger than all there may be
    assert store.n_bytes == before


def test_without_a_limit_nothing_is_kept_or_found(tmp_path):
    put(StateStore(tmp_path, 100_000), [1, 2])
    store = StateStore(tmp_path, 0)
    assert not put(store, [3]) and store.find(WHOSE, [1, 2]) is None


@pytest.mark.parametrize("at", [0, 9, 40, 400, -1])
def test_a_changed_byte_is_noticed(store, at):
    put(store, [1, 2, 3])
    path = store.entries()[0].path
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)
    got = store.find(WHOSE, [1, 2, 3])
    if got:
        with pytest.raises(DamagedError), store.opened(got[0]):
            pytest.fail("a changed file was opened")
    assert not path.exists() or at == 40
    if not path.exists():
        assert len(store.take_noticed()) == 1 and store.take_noticed() == []


def test_a_file_that_was_cut_is_noticed(store):
    put(store, [1, 2, 3])
    path = store.entries()[0].path
    os.truncate(path, path.stat().st_size - 1)
    assert found(store, [1, 2, 3]) is None and not path.exists()
    assert store.take_noticed() == [f"{path.name}: is damaged or cut off"]


def test_files_of_others_stay(store):
    put(store, [1])
    (store.folder / "notes.txt").write_text("mine")
    (store.folder / "x.state").write_text("not ours")
    assert len(store.entries()) == 1
    assert store.clear() > 0
    assert sorted(path.name for path in store.folder.iterdir()) == [".lock", "notes.txt", "x.state"]


def test_a_full_disk_leaves_all_as_it_was(store, monkeypatch):
    put(store, [1])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(state_store, "write_state", full)
    with pytest.raises(OSError, match="No space left"):
        put(store, [1, 2])
    assert [entry.n_tokens for entry in store.entries()] == [1]
    assert not list(store.folder.glob(".unfinished-*"))


def test_what_a_killed_process_left_goes(store):
    put(store, [1])
    left, fresh = store.folder / ".unfinished-a", store.folder / ".unfinished-b"
    left.write_bytes(b"x")
    fresh.write_bytes(b"x")
    os.utime(left, (0, 0))
    put(store, [2])
    assert not left.exists() and fresh.exists()  # that one is being written, perhaps


@pytest.mark.slow
def test_nobody_removes_what_another_process_reads(store):
    """The other process waits until the block has ended."""
    put(store, [1, 2, 3])
    code = f"from lt_gguf.runtime.state_store import StateStore; StateStore({str(store.folder)!r}).clear()"
    with store.opened(store.entries()[0]):
        clearing = subprocess.Popen([sys.executable, "-c", code])
        with pytest.raises(subprocess.TimeoutExpired):
            clearing.wait(1.5)
        assert len(store.entries()) == 1
    assert clearing.wait(30) == 0
    assert store.entries() == []


def test_the_folder_is_for_its_owner_alone(store):
    put(store, [1])
    assert store.folder.stat().st_mode & 0o077 == 0
    assert store.entries()[0].path.stat().st_mode & 0o077 == 0
