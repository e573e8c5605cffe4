"""Hidden folders of unfinished files: those of killed processes go, those of living ones and other folders stay."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from lt_gguf.gguf.unfinished import unfinished_folder

PREFIX = ".writing-"
HOLD = """
import sys, time
from pathlib import Path
from lt_gguf.gguf.unfinished import unfinished_folder
with unfinished_folder(Path(sys.argv[1]), sys.argv[2]) as folder:
    (folder / "half").write_text("half")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def test_it_is_gone_at_the_end(tmp_path):
    with unfinished_folder(tmp_path, PREFIX) as folder:
        (folder / "half").write_text("half")
        assert folder.parent == tmp_path
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_has_left_goes_and_what_a_living_one_has_stays(tmp_path):
    processes, names = [], []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path, PREFIX], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        names.append(process.stdout.readline().strip())
    processes[0].send_signal(signal.SIGKILL)
    processes[0].wait()
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    with unfinished_folder(tmp_path, PREFIX) as folder:
        assert sorted(os.listdir(tmp_path)) == sorted([names[1], folder.name])
    assert (tmp_path / names[1] / "half").exists()
    processes[1].kill()
    processes[1].wait()


@pytest.mark.parametrize("name", [PREFIX, f"{PREFIX}mine", f"{PREFIX}12345678.old", ".writing", "writing-12345678"])
def test_other_folders_stay(tmp_path, name):
    (tmp_path / name).mkdir()
    with unfinished_folder(tmp_path, PREFIX):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_files_and_links_with_such_a_name_stay(tmp_path):
    (tmp_path / f"{PREFIX}12345678").write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"{PREFIX}abcdefgh").symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path))
    with unfinished_folder(tmp_path, PREFIX):
        pass
    assert sorted(os.listdir(tmp_path)) == before


def test_without_locks_nothing_is_taken_for_left(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError("no locks here")

    (tmp_path / f"{PREFIX}12345678").mkdir()
    monkeypatch.setattr(fcntl, "flock", flock)
    with unfinished_folder(tmp_path, PREFIX) as folder:
        assert folder.exists()
    assert [path.name for path in tmp_path.iterdir()] == [f"{PREFIX}12345678"]
