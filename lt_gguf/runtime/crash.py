"""What is said when native code crashes: while doing what, in which function, on which CPU, and what to try.

Nothing here changes a process that doesn't ask: our commands call `enable`, importing `lt_gguf` doesn't. Two parts then wait for
SIGSEGV and its like. Once the native library is loaded, its own handler (`ggml-patch/src/lt-crash.cpp`) writes what this module has
prepared, with the place of the crash; Python's faulthandler follows with its trace, and the process ends by the signal.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import platform
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import TypeVar

from lt_gguf.runtime.cpu import cpu_flags, cpu_name, usable_cores

T = TypeVar("T")

# What signals mean that a bug raises; ggml-patch/src/lt-crash.cpp has the same words.
_MEANINGS = {
    "SIGSEGV": "invalid memory access",
    "SIGBUS": "a mapped file has become shorter",
    "SIGILL": "an instruction that this CPU doesn't have",
    "SIGFPE": "division by zero",
    "SIGABRT": "a check failed",
}
_X86_OPTIONS = {"avx": "GGML_AVX", "avx2": "GGML_AVX2", "bmi2": "GGML_BMI2", "fma": "GGML_FMA", "f16c": "GGML_F16C"}
_SELF_CHECK = f"{os.path.basename(sys.executable) or 'python'} -m lt_gguf.runtime.self_check"


class _Report:
    """What is known by now, and where it goes."""

    def __init__(self, command: str) -> None:
        self.command = command
        # note: a copy of stderr, because llama_cpp points stderr itself at nothing while it loads a model
        self.fd = os.dup(2)
        self.lock = threading.Lock()
        self.steps: list[object] = []
        self.library: ctypes.CDLL | None = None
        self.system = ""  # what ggml was compiled for, and found; empty before it has looked

    def use(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.lt_crash_report.argtypes = (ctypes.c_int, ctypes.c_char_p)
        library.lt_crash_step.argtypes = (ctypes.c_char_p,)
        self.say_step()
        self.say_about()

    def say_about(self) -> None:
        assert self.library
        self.library.lt_crash_report(self.fd, "\n".join(f"  {line}" for line in self.about()).encode())

    def say_step(self) -> None:
        if self.library:
            self.library.lt_crash_step((str(self.steps[-1]) if self.steps else f"running {self.command}").encode())

    def about(self) -> Iterator[str]:
        yield f"command: {self.command}"
        yield f"CPU: {cpu_name()}, {usable_cores()} cores for this process; {' '.join(cpu_flags()) or platform.machine()}"
        yield f"ggml: {self.system or 'not started'}"
        yield f"lt-gguf {_version()} in {_folder_of(self.library)}, Python {platform.python_version()}, {platform.platform()}"
        yield "what to try:"
        yield f"- {_SELF_CHECK} shows which kinds of weights this machine can compute with"
        yield f"- a build for plainer CPUs: {_plainer_build()}"
        if variant := _variant():
            yield f"- another of ggml's variants: move {variant} to another folder, and the next best one is taken"
        yield "- if layers run on a GPU: --n-gpu-layers 0"
        yield "- else report it, with all these lines"


class _Step:
    def __init__(self, what: str) -> None:
        self.what = what

    def __str__(self) -> str:
        return self.what


_report: _Report | None = None


def enable(command: str) -> None:
    """From now on a crash of this process tells what it was doing. `command`: the name of what is running."""
    global _report
    if _report is not None:
        _report.command = command
        return
    try:
        _report = _Report(command)
    except OSError:  # there is no stderr
        return
    faulthandler.enable(file=_report.fd)
    if binding := sys.modules.get("llama_cpp.llama_cpp"):
        library_loaded(binding._lib)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Says what is being done in the with block: "reading a prompt", for "while ...". Blocks may nest, and overlap in threads."""
    report = _report
    if report is None:
        yield
        return
    entry = _Step(what)
    with report.lock:
        report.steps.append(entry)
        report.say_step()
    try:
        yield
    finally:
        with report.lock:
            report.steps.remove(entry)
            report.say_step()


@contextmanager
def loading(file: object) -> Iterator[None]:
    """The step in which a model is loaded. Before the first one ggml looks at the machine, and logs what it finds."""
    if _report is not None and _report.library is not None and not _report.system:
        with step("starting ggml's backends"):
            ask = _report.library.llama_print_system_info
            ask.restype = ctypes.c_char_p
            _report.system = " ".join(ask().decode(errors="replace").split()) or "nothing known"
        _report.say_about()
    with step(f"loading {file}"):
        yield


def load_library(load: Callable[[], T]) -> T:
    """Calls what loads the native library.

    No handler of ours is there before; a library for another CPU may end the process by SIGILL. Faulthandler's trace then has the
    file name of each line of Python that was running, and so one that says what this means.
    """
    if _report is None:
        return load()
    advice = f"{cpu_name()} may lack an instruction that the library was compiled for: {_plainer_build()}"
    scope = {"load": load}
    exec(compile("loaded = load()", f"loading lt-gguf's native library: {advice}", "exec"), scope)
    return scope["loaded"]  # type: ignore[return-value]


def library_loaded(library: ctypes.CDLL) -> None:
    """Lets the native library report crashes from here on, if that was asked for and it can."""
    if _report is not None and _report.library is None and hasattr(library, "lt_crash_report"):
        _report.use(library)


def describe_death(program: str, step: str, number: int) -> str:
    """One line on a process that we started and that a signal ended. `step`: what it did, as in "quantizing"."""
    name = _signal_name(number)
    if name in _MEANINGS:
        crash = f"{program} crashed while {step}: {name} ({_MEANINGS[name]}), on {cpu_name()}"
        return f"{crash}; a build for plainer CPUs may help: {_plainer_build()}"
    want = ", perhaps for want of memory" if name == "SIGKILL" else ""
    return f"{program} was killed by {name} while {step}{want}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _plainer_build() -> str:
    """The command for a build that takes no instruction of this CPU for granted but what nearly all have."""
    options = ["-DGGML_NATIVE=OFF"]
    if platform.machine() in ("x86_64", "i686"):
        # note: without GGML_NATIVE these are on
        flags = cpu_flags()
        options += [f"-D{option}=OFF" for flag, option in _X86_OPTIONS.items() if flag not in flags]
    return f"CMAKE_ARGS='{' '.join(options)}' pip install ."


def _variant() -> str | None:
    """The file of ggml's code for this CPU, where it is one of several that were compiled."""
    try:
        with open("/proc/self/maps") as maps:
            files = {line.split(maxsplit=5)[5].strip() for line in maps if "/libggml-cpu-" in line}
    except OSError:
        return None
    return min(files, default=None)


def _folder_of(library: ctypes.CDLL | None) -> str:
    return os.path.dirname(library._name) if library else "?"


def _version() -> str:
    try:
        return metadata.version("lt-gguf")
    except metadata.PackageNotFoundError:
        return "(not installed)"
