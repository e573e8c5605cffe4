"""The pinned source distribution, through pip and from the user cache, and the binding's wheel that is made of it.

Only the standard library and pip are needed.
"""

from __future__ import annotations

import email
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PATCH_DIR = Path(__file__).resolve().parent
CACHED_BYTES = 80e6  # the source distribution and the binding's wheel
UNPACKED_SDIST_BYTES = 260e6  # what pip unpacks of it in the temporary directory while it downloads


class BuildError(Exception):
    """What is wrong and what to do about it, in one line."""


@dataclass(frozen=True)
class Pin:
    """`UPSTREAM.toml`."""

    package: str
    version: str
    sdist: str
    sha256: str
    llama_cpp: str
    commit: str

    @classmethod
    def load(cls) -> Pin:
        return cls(**tomllib.loads((PATCH_DIR / "UPSTREAM.toml").read_text()))

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"


def cache_dir() -> Path:
    """`$LT_GGUF_CACHE`, else `$XDG_CACHE_HOME/lt-gguf`, else `~/.cache/lt-gguf`; made if it isn't there."""
    if own := os.environ.get("LT_GGUF_CACHE"):
        path = Path(own).expanduser()
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lt-gguf"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"cannot make the cache directory {path} ({error.strerror}): set LT_GGUF_CACHE to one that is writable"
        ) from error
    return path.resolve()


def need_space(directory: Path, size: float) -> None:
    """Raises BuildError if `directory`'s disk has less than `size` bytes free."""
    directory = directory.resolve()
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < size:
        raise _disk_full(directory, f" ({free / 1e6:.0f} MB free, {size / 1e6:.0f} MB needed)")


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """A full disk in the block becomes a BuildError that names `where`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(where) from error
        raise


def _disk_full(where: object, numbers: str = "") -> BuildError:
    return BuildError(f"the disk of {where} is full{numbers}: free some space and run it again")


def fetch_sdist(pin: Pin) -> Path:
    """The pinned source distribution, from the cache or through pip; its sha256 is checked either way."""
    path = cache_dir() / pin.sdist
    if path.exists():
        found = _sha256(path)
        if found == pin.sha256:
            return path
        path.unlink()
        say(f"deleted {path}: its sha256 is {found}, UPSTREAM.toml wants {pin.sha256}")

    say(f"fetching {pin.requirement} through pip; it is kept in {path.parent}")
    need_space(path.parent, CACHED_BYTES)
    need_space(Path(tempfile.gettempdir()), UNPACKED_SDIST_BYTES)
    with disk_errors(path.parent), tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as scratch:
        # pip checks the hash itself before it runs anything of what it downloaded. It then asks the source distribution
        # for its metadata with scikit-build-core, which is at hand where that builds us too.
        isolation = ["--no-build-isolation"] if importlib.util.find_spec("scikit_build_core") else []
        wanted = Path(scratch) / "requirements.txt"
        wanted.write_text(f"{pin.requirement} --hash=sha256:{pin.sha256}\n")
        output, ok = _pip("download", "--no-deps", *isolation, f"--no-binary={pin.package}", "--dest", scratch, "-r", str(wanted))
        got = Path(scratch) / pin.sdist
        if not ok or not got.exists():
            raise _download_error(pin, path, output)
        if (found := _sha256(got)) != pin.sha256:
            raise _wrong_hash(pin, found)
        os.replace(got, path)
    return path


def _wrong_hash(pin: Pin, found: str) -> BuildError:
    return BuildError(
        f"sha256 of {pin.sdist} is {found}, ggml-patch/UPSTREAM.toml wants {pin.sha256}: nothing was kept; "
        "correct the pin or the package index"
    )


def _download_error(pin: Pin, path: Path, output: str) -> BuildError:
    if "DO NOT MATCH THE HASHES" in output:
        found = re.search(r"Got\s+([0-9a-f]{64})", output)
        return _wrong_hash(pin, found[1] if found else "another")
    if "No space left on device" in output:
        return _disk_full(f"{tempfile.gettempdir()} or of {path.parent}")
    errors = [line.removeprefix("ERROR: ") for line in output.splitlines() if line.startswith("ERROR: ")]
    return BuildError(
        f"pip could not download {pin.requirement} ({errors[-1] if errors else 'its output is above'}): "
        f"check the network and pip's index settings, or put {pin.sdist} into {path.parent}, and run it again"
    )


def binding_wheel(pin: Pin) -> Path:
    """A wheel of llama-cpp-python's Python files alone, built from the pinned source and kept in the cache.

    No compiler runs: the libraries are ours. pip would compile a second llama.cpp from the source distribution.
    """
    directory = cache_dir() / pin.sha256[:12]  # a wheel made from another source is never taken for this one
    if wheels := list(directory.glob("*.whl")):
        return wheels[0]
    sdist = fetch_sdist(pin)
    say(f"building the wheel of {pin.requirement} without its libraries")
    with disk_errors(directory), tempfile.TemporaryDirectory(dir=cache_dir(), prefix="wheel-") as scratch:
        need_space(Path(tempfile.gettempdir()), UNPACKED_SDIST_BYTES)
        _, ok = _pip(
            "wheel",
            "--no-cache-dir",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "-C",
            "wheel.cmake=false",
            "--wheel-dir",
            scratch,
            str(sdist),
        )
        wheels = list(Path(scratch).glob("*.whl"))
        if not ok or not wheels:
            raise BuildError(f"pip could not build the wheel of {pin.requirement}: its output is above")
        directory.mkdir(exist_ok=True)
        os.replace(wheels[0], directory / wheels[0].name)
    return directory / wheels[0].name


def run_time_requirements(wheel: Path) -> list[str]:
    """What the package in `wheel` needs at run time, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    requirements = metadata.get_all("Requires-Dist", [])
    return [requirement for requirement in requirements if "extra" not in requirement.partition(";")[2]]


def unpack_binding(pin: Pin, directory: Path) -> None:
    """Replace `directory` by the binding's Python files; interrupted, it leaves the old ones or none, never a half."""
    fresh = directory.with_name(directory.name + ".unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    with disk_errors(directory), zipfile.ZipFile(binding_wheel(pin)) as archive:
        archive.extractall(fresh)
    shutil.rmtree(directory, ignore_errors=True)
    os.replace(fresh, directory)


def _pip(*arguments: str) -> tuple[str, bool]:
    """pip's output, which is also shown as it comes, and whether it succeeded."""
    # CMAKE_ARGS and scikit-build-core's variables are meant for our build, not for the binding's metadata; what the pip around us has
    # set for its call of our backend would have this pip look for the binding's backend among our files.
    ours = ("CMAKE_ARGS", "SKBUILD_", "_PYPROJECT_HOOKS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        for line in process.stdout:
            lines.append(line)
            sys.stdout.write(f"  {line}")
            sys.stdout.flush()
    if any("No module named pip" in line for line in lines):
        raise BuildError(f"{sys.executable} has no pip: run `{sys.executable} -m ensurepip` and try again")
    return "".join(lines), process.returncode == 0


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def say(message: str) -> None:
    print(f"lt-gguf: {message}", flush=True)
