"""Flagging that is interrupted, fills the disk, or copies much: nothing is left behind, and the memory doesn't grow."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
from support.small_gguf import N_LAYER, write_small

FINAL = {1: "new.gguf", 3: "new-00001-of-00003.gguf"}

COMMAND = [sys.executable, "-c", "from lt_gguf.cli import main; main()", "flag"]
# the copy stops where it has begun, and says so
HOLD = "lambda *_: print('copying', flush=True) or time.sleep(60)"
HELD = f"import time; from lt_gguf.gguf import flagging; flagging._Count.__call__ = {HOLD}"


@pytest.mark.slow
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_an_interruption_leaves_nothing(tmp_path, files, how):
    old = write_small(tmp_path / "old.gguf", files=files)
    final = tmp_path / FINAL[files]
    command = [*COMMAND, str(old[0]), str(final), "--streaming-layers", "1"]
    command[2] = f"{HELD}; {command[2]}"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "copying\n"
        process.send_signal(how)
        assert process.wait(timeout=60) == {signal.SIGINT: 130, signal.SIGTERM: 143}.get(how, -how)
        assert "Traceback" not in process.stderr.read()
    left = set(tmp_path.iterdir()) - set(old)
    assert all(path.name.startswith(".flagging-") for path in left) and bool(left) == (how == signal.SIGKILL)
    subprocess.run([*COMMAND, str(old[0]), str(final), "--streaming-layers", "1"], check=True, capture_output=True)
    assert final in tmp_path.iterdir()
    assert not list(tmp_path.glob(".*"))  # what was left has gone, too


@pytest.mark.parametrize("files", [1, 3])
def test_a_full_disk_leaves_nothing(tmp_path, files):
    old = write_small(tmp_path / "old.gguf", files=files)
    final = tmp_path / FINAL[files]
    final.write_text("mine")
    limit = old[-1].stat().st_size - 1000
    command = [*COMMAND, str(old[0]), str(final), "--streaming-layers", "1", "--overwrite"]
    result = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path}/new") and result.stderr.endswith(".gguf: File too large\n")
    assert sorted(tmp_path.iterdir()) == sorted([*old, final])
    assert final.read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("by", ["kernel", "hand"])
def test_memory_does_not_grow_with_the_file(tmp_path, by):
    (old,) = write_small(tmp_path / "old.gguf")
    size = 256 << 20
    os.truncate(old, size)  # sparse: as if the last tensor were large
    program = f"""
import errno, os, resource, sys
from lt_gguf.gguf.flagging import flag
from lt_gguf.gguf.file import read_model
from lt_gguf.spec import StreamingSpec
def cannot(*_):
    raise OSError(errno.EXDEV, "other file system")
if {by == "hand"}:
    os.copy_file_range = cannot
read_model(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
flag(sys.argv[1], sys.argv[2], StreamingSpec((1,), {N_LAYER}))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    new = tmp_path / "new.gguf"
    done = subprocess.run([sys.executable, "-c", program, old, new], capture_output=True, text=True, check=True)
    assert new.stat().st_size > size
    assert int(done.stdout) < 32 << 10  # KiB
    new.unlink()
