"""Installs a wheel as a newcomer would, in an empty root, and runs what it brings: commands, chat, Python, llama.cpp's tools.

    python scripts/checks/wheel_check.py dist/lt_gguf-*.whl    wants gguf and numpy, as build/wheel-venv and .venv have them

The root is a temporary directory with a fresh virtual environment in it. No compiler, no git and no program of the machine
is on the path, home and caches are empty, pip takes wheels only, and no file of the checkout is in sight. The model is a
random one of four layers, quantized there with the wheel's own llama-quantize. Ends with an error that names the step.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

LIMIT = 300  # seconds that one step may take; the longest is pip's
PIP_CONFIGURATIONS = ("~/.pip/pip.conf", "~/Library/Application Support/pip/pip.conf", "~/.config/pip/pip.conf")
# What every Linux of a manylinux tag has, and what macOS has: a library from elsewhere is one that a user may lack.
SYSTEM = re.compile(r"(ld-linux[^/]*|lib(c|m|dl|rt|pthread|util|stdc\+\+|gcc_s))\.so(\.\d+)*$")

MAPPED = """
import sys

def mapped():  # macOS has no such file; delocate has looked at the libraries there
    lines = open("/proc/self/maps").read().splitlines() if sys.platform == "linux" else ()
    return {line.split(maxsplit=5)[-1] for line in lines if ".so" in line}

def show(paths):
    print(*(f"mapped {path}" for path in sorted(paths)), sep="\\n")
"""

LOAD = f"""{MAPPED}
import ctypes, pathlib
before = mapped()
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/lib*.so")):
    ctypes.CDLL(str(path))
show(mapped() - before)
"""

USE = f"""{MAPPED}
import lt_gguf, llama_cpp
from lt_gguf import Llama

prompt = [5, 9, 299, 17, 260, 261, 262] * 4
def answer(llm, n=12):
    tokens = llm.generate(prompt, temp=0.0)
    return [next(tokens) for _ in range(n)]

path = sys.argv[1]
full = Llama(path, streaming="off", n_ctx=4096, verbose=False)
hybrid = Llama(path, n_ctx=4096, verbose=False)
assert str(hybrid.streaming) != str(full.streaming), hybrid.streaming
# a prompt that fits into sink and window has the full model's answer
assert answer(hybrid) == answer(full), (answer(hybrid), answer(full))
assert hybrid.kv_bytes()["total"] < full.kv_bytes()["total"], (hybrid.kv_bytes(), full.kv_bytes())
# and a script that knows nothing of us
assert llama_cpp.Llama(path, n_ctx=256, verbose=False)(prompt, max_tokens=4)["usage"]["completion_tokens"] > 0
print("binding", llama_cpp.__file__)
show(mapped())
"""


class CheckError(Exception):
    """The step that failed, and with what."""


class EmptyRoot:
    """A directory with a virtual environment and nothing else, and programs that see nothing else."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.venv, self.home, self.work = directory / "venv", directory / "home", directory / "work"
        for path in (self.home, self.work, directory / "tmp"):
            path.mkdir()
        venv.create(self.venv, with_pip=True)
        self.environment = {
            "PATH": str(self.venv / "bin"),
            "HOME": str(self.home),
            "TMPDIR": str(directory / "tmp"),
            "LC_ALL": "C.UTF-8",
            "COLUMNS": "120",
            # where pip finds packages isn't part of what is tried
            **{"PIP_CONFIG_FILE": str(file) for file in map(Path.expanduser, map(Path, PIP_CONFIGURATIONS)) if file.is_file()},  # noqa: B035 (the last one there is)
            **{name: value for name, value in os.environ.items() if name.startswith("PIP_") or name.lower().endswith("_proxy")},
        }

    def run(self, *command: object, text: str = "", **environment: str) -> str:
        """Output and errors of a command. Raises CheckError if it fails, or writes a traceback."""
        shown = " ".join(str(word).replace(f"{self.directory}/", "") for word in command if "\n" not in str(word))
        program = self.venv / "bin" / str(command[0]) if "/" not in str(command[0]) else command[0]
        try:
            done = subprocess.run(
                [program, *map(str, command[1:])],
                input=text,
                env=self.environment | environment,
                cwd=self.work,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=LIMIT,
            )
        except FileNotFoundError:
            raise CheckError(f"{shown}: {program} is missing") from None
        except subprocess.TimeoutExpired:
            raise CheckError(f"{shown}: not done after {LIMIT} s") from None
        if done.returncode or "Traceback" in done.stdout:
            tail = "\n".join(done.stdout.strip().splitlines()[-15:])
            raise CheckError(f"{shown}: exit code {done.returncode}\n{tail}")
        say(f"ok: {shown}")
        return done.stdout


def check(wheel: Path, root: EmptyRoot) -> None:
    """Raises CheckError at the first step that fails."""
    root.run("python", "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir", "--only-binary=:all:", wheel)
    for program in ("cc", "gcc", "g++", "c++", "clang", "git", "cmake", "make", "ninja"):
        if (root.venv / "bin" / program).exists():
            raise CheckError(f"{program} is on the path: a wheel that needs it would pass")

    tools = Path(
        root.run("python", "-c", "from lt_gguf.runtime.library import tool_path; print(tool_path('llama-bench'))").strip()
    ).parent
    names = sorted(path.name for path in tools.iterdir() if path.suffix != ".so")
    missing = {"llama-server", "llama-cli", "llama-bench", "llama-quantize", "llama-perplexity", "llama-imatrix", "rpc-server"} - {
        *names
    }
    if missing:
        raise CheckError(f"the wheel lacks tools: {', '.join(sorted(missing))}")
    for name in sorted({*names} - {"llama-quantize"}):  # whose help is an error; it has work to do below
        expect(
            root.run(tools / name, "--version" if name == "llama-server" else "--help"),
            "version|usage",
            f"{name} says nothing of itself",
        )

    check_libraries(root.run("python", "-c", LOAD, tools.parent), root.venv)

    expect(root.run("lt-gguf", "--version"), "^CPU: ", "lt-gguf --version names no backend for the CPU")
    write_model(root.work / "plain.gguf")
    root.run("lt-gguf", "flag", "plain.gguf", "hybrid.gguf", "--streaming-layers", "1,3", "--sink", 4, "--window", 60)
    root.run(tools / "llama-quantize", "hybrid.gguf", "model.gguf", "Q8_0")
    expect(root.run("lt-gguf", "inspect", "model.gguf"), "streaming", "inspect doesn't say what streams")
    root.run("lt-gguf", "run", "model.gguf", "-p", "word7 word8", "-n", 8, "--ctx", 512)
    expect(
        root.run("lt-gguf", "chat", "model.gguf", "-n", 8, "--ctx", 1024, text="word1 word2\n/retry\n/exit\n"),
        "KV",
        "chat says nothing",
    )
    bench = root.run(tools / "llama-bench", "-m", "model.gguf", "-p", 64, "-n", 8, "-r", 1, "-t", 1)
    expect(bench, r"tg8 \|\s+[\d.]+", "llama-bench measured nothing")
    check_binding(root.run("python", "-c", USE, "model.gguf"), root.venv)


def check_libraries(output: str, environment: Path) -> None:
    """Raises CheckError for a library that the wheel's libraries brought along and that other machines may lack."""
    libraries = [Path(line) for line in re.findall(r"^mapped (/.+)$", output, re.MULTILINE)]
    foreign = [path for path in libraries if not SYSTEM.fullmatch(path.name) and not path.is_relative_to(environment)]
    if foreign:
        raise CheckError(f"the wheel uses libraries of this machine that others may lack: {', '.join(map(str, foreign))}")


def check_binding(output: str, environment: Path) -> None:
    """Says which variant for CPUs was taken. Raises CheckError if the binding didn't come with the wheel."""
    binding = Path(re.search(r"^binding (.+)$", output, re.MULTILINE)[1])
    if not binding.is_relative_to(environment):
        raise CheckError(f"llama_cpp came from {binding}, not from the wheel")
    for module in re.findall(r"^mapped /.+/(libggml-cpu.*)$", output, re.MULTILINE):
        say(f"this CPU got {module}")


def write_model(path: Path) -> None:
    from tiny_model import write_tiny_model

    write_tiny_model(path, 4)


def expect(output: str, pattern: str, failure: str) -> None:
    if not re.search(pattern, output, re.IGNORECASE | re.MULTILINE):
        raise CheckError(f"{failure}:\n{output[-1000:]}")


def say(message: str) -> None:
    print(f"wheel_check: {message}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    wheel = parser.parse_args().wheel.resolve()
    if not wheel.is_file():
        raise CheckError(f"{wheel} isn't there: make wheel builds one into dist/")
    with tempfile.TemporaryDirectory(prefix="lt-gguf-wheel-") as directory:
        check(wheel, EmptyRoot(Path(directory).resolve()))
    say(f"{wheel.name} works")


if __name__ == "__main__":
    try:
        main()
    except CheckError as error:
        sys.exit(f"wheel_check: error: {error}")
