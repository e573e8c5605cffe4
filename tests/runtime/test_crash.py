"""A crash in native code says what was being done, where it was, on which CPU and what to try, and ends the process by its signal."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.small_gguf import write_small

from lt_gguf.runtime import crash
from lt_gguf.runtime.cpu import cpu_name
from lt_gguf.runtime.library import library_dir

CHILD = Path(__file__).parents[1] / "support" / "crash_child.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("crash") / "small.gguf")[0]


def crashed(step: str, model: Path) -> tuple[int, str]:
    """What becomes of a child that crashes in a step: its exit status, and what it says on stderr."""
    child = subprocess.run([sys.executable, CHILD, step, model], capture_output=True, text=True, timeout=120)
    assert child.stdout == ""
    return child.returncode, child.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, doing",
    [
        ("loading", "loading {}"),
        ("prompt", "reading a prompt, 100 tokens from position 0 on, {}"),
        ("decoding", "decoding from position 100 on, {}"),
        ("snapshot", "taking a snapshot of 100 tokens"),
        ("lazy ratios", "measuring lazy ratios of a prompt of 100 tokens"),
        ("context", "making a context of 1024 tokens, {}"),
        ("scoring", "reading a prompt, 3 tokens, {}"),
        ("scoring, decoding", "decoding, {}"),
        ("threads", "testing"),
        ("command", "reading a prompt, 23 tokens from position 0 on, {}"),
    ],
)
def test_a_crash_says_what_was_done_and_where(model, step, doing):
    status, said = crashed(step, model)
    assert status == -signal.SIGSEGV
    lines = said.strip().splitlines()
    assert lines[0] == f"crash: SIGSEGV (invalid memory access) in native code, while {doing.format(model)}"
    assert lines[1] == f"  command: {'lt-gguf run' if step == 'command' else 'a child of the tests'}"
    assert f"  CPU: {cpu_name()}, " in said and str(library_dir()) in said
    assert "\n  ggml: CPU : " in said or step == "threads"  # what ggml has found, from the first model on
    assert "\n  in libggml-base.so: ggml_nelements\n" in said
    assert said.count("crash: ") == 1  # by one thread
    trace = said[said.index("\nFatal Python error: Segmentation fault") :]
    assert "crash_child.py" in trace and "die" in trace
    assert "secret" not in said


@pytest.mark.slow
@pytest.mark.parametrize("name, meaning", crash._MEANINGS.items())
def test_the_process_ends_by_the_signal(model, name, meaning):
    number = signal.Signals[name]
    status, said = crashed(f"signal {int(number)}", model)
    assert status == -number
    assert said.startswith(f"\ncrash: {name} ({meaning}) in native code, while testing\n")
    assert "Fatal Python error" in said


def test_a_failed_check_is_quoted(model):
    status, said = crashed("check", model)
    assert status == -signal.SIGABRT
    assert "\ncrash: SIGABRT (a check failed) in native code, while testing\n" in said
    assert "\n  some.c:7: GGML_ASSERT(1 == 2) failed\n" in said
    assert said.count("GGML_ASSERT") == 1


def test_memory_that_ggml_does_not_get_is_one_line(model):
    status, said = crashed("memory", model)
    assert status == 1 and "crash" not in said
    assert said.splitlines()[-1] == "error: this process can get no more memory (ggml needs some for tensors), while testing"


def test_a_library_for_another_cpu_is_explained_by_the_trace(model):
    status, said = crashed("library", model)
    assert status == -signal.SIGILL
    assert f"File \"loading lt-gguf's native library: {cpu_name()} may lack an instruction" in said
    assert "-DGGML_NATIVE=OFF" in said


def test_importing_the_package_changes_nothing(model):
    assert crashed("unasked", model) == (-signal.SIGSEGV, "")


# ------------------------------------------------------------------------------------------------- steps


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """The steps that the library is told."""
    told: list[str] = []
    report = crash._Report("a test")
    report.library = SimpleNamespace(lt_crash_step=lambda text: told.append(text.decode()))
    monkeypatch.setattr(crash, "_report", report)
    return told


def test_steps_nest(said):
    with crash.step("one"):
        with crash.step("two"):
            pass
        with pytest.raises(KeyError), crash.step("three"):
            raise KeyError
    assert said == ["one", "two", "one", "three", "one", "running a test"]


def test_steps_overlap(said):
    """As in two threads: what goes on is told, whichever began first."""
    first, second = crash.step("first"), crash.step("second")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert said == ["first", "second", "second", "running a test"]


def test_an_older_library_is_no_error(monkeypatch):
    report = crash._Report("a test")
    monkeypatch.setattr(crash, "_report", report)
    crash.library_loaded(SimpleNamespace())
    assert report.library is None
    with crash.step("testing"), crash.loading("a model"):
        pass


# ------------------------------------------------------------------------------------------------- our children


@pytest.mark.parametrize(
    "number, expected",
    [
        (signal.SIGKILL, "a tool was killed by SIGKILL while working, perhaps for want of memory"),
        (signal.SIGTERM, "a tool was killed by SIGTERM while working"),
        (signal.SIGILL, f"a tool crashed while working: SIGILL (an instruction that this CPU doesn't have), on {cpu_name()}; "),
        (99, "a tool was killed by signal 99 while working"),
    ],
)
def test_the_death_of_a_child_is_one_line(number, expected):
    line = crash.describe_death("a tool", "working", number)
    assert line.startswith(expected) and "\n" not in line
    assert ("GGML_NATIVE=OFF" in line) == (number == signal.SIGILL)


@pytest.mark.parametrize(
    "flags, options",
    [
        ("sse4_2 avx avx2 fma f16c bmi2 avx512f", "-DGGML_NATIVE=OFF"),
        ("sse4_2 avx", "-DGGML_NATIVE=OFF -DGGML_AVX2=OFF -DGGML_BMI2=OFF -DGGML_FMA=OFF -DGGML_F16C=OFF"),
    ],
)
def test_the_build_to_try_fits_the_cpu(monkeypatch, flags, options):
    monkeypatch.setattr(crash, "cpu_flags", flags.split)
    monkeypatch.setattr(crash.platform, "machine", lambda: "x86_64")
    assert crash._plainer_build() == f"CMAKE_ARGS='{options}' pip install ."
