#!/usr/bin/env python3
"""Sets up the environment of `make demo` or `make test`, with the locked packages; the Makefile runs it with .venv's Python.

    python scripts/setup/install.py demo      what the demo runs on; of llama.cpp's tools llama-quantize alone, so that it begins early
    python scripts/setup/install.py test      all that the tests run on, and all tools

Packages are installed beside the compiling, which has the processor while they have the network. Everything that pip and the
compiler say goes to build/install-*.log; only Python's standard library is needed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build"
DEMO_TOOLS = "-DLT_TOOLS=llama-quantize"
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "install")

# Lines of the log that tell what is going on; the rest is there for those who look for a reason.
PROGRESS = re.compile(
    r"^\s*(?:lt-gguf: (?P<said>(?!error).+)|\[(?P<step>\d+)/(?P<steps>\d+)\] |(?P<packing>Downloading|Installing) (?P<package>\S+))"
)


class Step:
    """A command that runs in the background with its output in a file of its own."""

    def __init__(self, name: str, *commands: Sequence[str], **environment: str) -> None:
        self.name = name
        self.log = LOGS / f"install-{name.partition(' ')[0]}.log"
        self.doing = ""
        self._commands = list(commands)
        self._environment = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        self._read = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.log.write_bytes(b"")

    def is_running(self) -> bool:
        """Starts the next command where one has ended well; false when all have, or one has failed."""
        if self._process is None or self._process.poll() == 0:
            if not self._commands:
                return False
            with self.log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._commands.pop(0), stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT, env=self._environment
                )
        return self._process.poll() is None

    def has_failed(self) -> bool:
        return self._process is not None and self._process.poll() not in (None, 0)

    def end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait()

    def news(self) -> list[str]:
        """What has been said since it was asked last, for people to read; `doing` is what it is at now."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            text = log.read()
        text = text[: text.rfind(b"\n") + 1]
        self._read += len(text)
        lines = []
        for found in filter(None, map(PROGRESS.match, text.decode(errors="replace").splitlines())):
            if found["step"]:
                self.doing = f"compiling {found['step']} of {found['steps']}"
            elif found["packing"] == "Downloading":
                self.doing = f"{self.name}: downloading {found['package'][:40]}"
            elif found["packing"]:
                self.doing = f"{self.name}: installing"
            else:
                lines.append(found["said"])
        return lines

    def reason(self) -> str:
        """Why it failed, in one line; before it the last words of the log, where nothing in it is known to be the reason."""
        lines = self.log.read_text(errors="replace").splitlines()
        ours = [line.partition("lt-gguf: error: ")[2] for line in lines if "lt-gguf: error: " in line]
        pips = [line.partition("ERROR: ")[2] for line in lines if "ERROR: " in line]
        if ours:
            return ours[-1]
        if any("DO NOT MATCH THE HASHES" in line for line in pips):
            return "a package isn't the one that requirements/ names by its hash: check the package index, or run make lock"
        if any("No space left on device" in line for line in lines):
            return "the disk is full: free some space and run make again"
        if not pips:
            return "\n".join([*lines[-20:], f"{self.name} failed, for the reason above"])
        return f"{self.name} failed ({pips[-1].strip()}): check the network and pip's settings, then run make again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("goal", choices=("demo", "test"))
    parser.add_argument("--torch", required=True, help="pip's requirement for torch, which the locks don't have")
    options = parser.parse_args()
    LOGS.mkdir(exist_ok=True)
    start = time.monotonic()
    print(
        f"Installing into {Path(sys.prefix).name} what `make {options.goal}` needs; pip's and the compiler's words are in build/install-*.log"
    )
    run(Step("tools that build", locked("build")))
    arguments = os.environ.get("CMAKE_ARGS", "")
    compiling = Step(
        "lt-gguf",
        [*PIP, "-v", "--no-deps", "--no-build-isolation", "-e", "."],
        CMAKE_ARGS=f"{DEMO_TOOLS} {arguments}" if options.goal == "demo" else arguments,
    )
    # note: what of torch's requirements the lock doesn't have is CUDA, where this torch is a build for it
    packages = Step("packages", locked(options.goal), [*PIP, options.torch])
    run(compiling, packages)
    run(Step("llama-cpp-python", [*PIP, "--no-deps", "--no-index", binding_wheel()]))
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(f"Installed in {minutes} min {seconds:02} s")


def locked(name: str) -> list[str]:
    lock = ROOT / "requirements" / f"{name}.txt"
    return [*PIP, "--require-hashes", "--no-deps", "--no-build-isolation", "-r", str(lock)]


def binding_wheel() -> str:
    """The wheel of llama-cpp-python without its libraries, which the build has made."""
    sys.path.insert(0, str(ROOT / "ggml-patch"))
    from pinned_source import BuildError, Pin, binding_wheel

    try:
        return str(binding_wheel(Pin.load()))
    except BuildError as error:
        fail(str(error))


def run(*steps: Step) -> None:
    """Runs the steps side by side and shows how far they are; exits where one fails, and ends the others."""
    try:
        shown_at = 0.0
        while running := [step for step in steps if step.is_running()]:
            for line in [line for step in steps for line in step.news()]:
                show(line, is_lasting=True)
            if any(step.has_failed() for step in steps):
                break
            if sys.stdout.isatty() or time.monotonic() - shown_at > 15:
                show(" · ".join(step.doing for step in running if step.doing))
                shown_at = time.monotonic()
            time.sleep(0.2)
        for step in steps:
            if step.has_failed():
                fail(f"{step.reason()} (the whole output is in build/{step.log.name})")
    except KeyboardInterrupt:
        show("", is_lasting=True)
        sys.exit(130)
    finally:
        for step in steps:
            step.end()
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)


def show(line: str, is_lasting: bool = False) -> None:
    """A line of progress, which the next one replaces where a terminal shows it, or one that stays."""
    if not sys.stdout.isatty():
        if line:
            print(line, flush=True)
    else:
        width = shutil.get_terminal_size().columns - 1
        print("\r\x1b[K" + (line if is_lasting else line[:width]), end="\n" if is_lasting else "", flush=True)


def fail(message: str) -> NoReturn:
    *before, last = message.splitlines()
    sys.exit("\n".join([*before, f"lt-gguf: error: {last}"]))


if __name__ == "__main__":
    main()
