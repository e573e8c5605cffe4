"""The self-check: a crash of one kind of weights is a line, and stops the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lt_gguf.runtime import self_check
from lt_gguf.runtime.cpu import cpu_name
from lt_gguf.runtime.library import LIBRARY, OVERRIDE

ROOT = Path(__file__).parents[2]

# A child in which something goes wrong with one type of weights.
BROKEN = """
import ctypes, sys
import numpy as np
from lt_gguf.runtime import crash, self_check
from lt_gguf.runtime.library import library_dir
run_model = self_check.run_model
def broken(file, streaming):
    if file.name == {file!r} and streaming != "off":
        with crash.step("reading a prompt"):
            {what}
    return run_model(file, streaming)
self_check.run_model = broken
sys.exit(self_check.main(["--here", *sys.argv[1:]]))
"""
SEGV = 'ctypes.CDLL(str(next(library_dir().glob("libggml-base.*")))).ggml_nelements(ctypes.c_void_p(16))'


@pytest.fixture
def break_child(tmp_path, monkeypatch):
    """Lets the children do something with the models of a type; returns the command of one."""

    def break_(what: str, type_: str = "q4_0") -> list[str]:
        script = tmp_path / "broken.py"
        script.write_text(BROKEN.format(file=f"{type_}.gguf", what=what))
        command = [sys.executable, str(script)]
        monkeypatch.setattr(self_check, "_CHILD", command)
        return command

    return break_


@pytest.mark.slow
def test_all_types_work_here():
    works = {}
    assert self_check.check(show=works.__setitem__) == []
    assert list(works) == list(self_check.TYPES)
    assert all(0 < difference < self_check.TOLERANCE for difference in works.values())


def test_a_crash_is_a_line_and_the_other_types_are_checked(break_child):
    break_child(SEGV)
    works = {}
    (problem,) = self_check.check(["q8_0", "q4_0", "f16"], works.__setitem__)
    assert list(works) == ["q8_0", "f16"]
    what = (
        "q4_0 weights: SIGSEGV (invalid memory access) in native code, while reading a prompt, in libggml-base.so: ggml_nelements"
    )
    assert problem.startswith(f"{what}, on {cpu_name()} (") and "\n" not in problem


def test_another_signal(break_child):
    break_child('getattr(ctypes.CDLL(None), "raise")(4)')
    (problem,) = self_check.check(["q4_0"])
    assert problem.startswith("q4_0 weights: SIGILL (an instruction that this CPU doesn't have) in native code, while reading")


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, said",
    [
        ("return np.full((44, 320), np.nan, np.float32)", "are nan standard deviations from"),
        ("return run_model(file, streaming)[::-1]", "standard deviations from"),
    ],
)
def test_wrong_logits_are_a_line(break_child, what, said):
    break_child(what)
    works = {}
    (problem,) = self_check.check(["q4_0", "f16"], works.__setitem__)
    assert problem.startswith("q4_0 weights: the logits with a streaming layer ") and said in problem
    assert list(works) == ["f16"]


def test_a_child_that_does_not_start(monkeypatch):
    monkeypatch.setattr(self_check, "_CHILD", [sys.executable, "-c", "import os; os.kill(os.getpid(), 4)"])
    (problem,) = self_check.check()
    assert problem.startswith("the process crashed while loading the native library: SIGILL (")


def test_a_broken_library_is_one_line(monkeypatch, tmp_path):
    (tmp_path / LIBRARY).write_text("no library")
    monkeypatch.setenv(OVERRIDE, str(tmp_path))
    (problem,) = self_check.check()
    assert problem.startswith("Failed to load shared library") and "\n" not in problem


@pytest.mark.slow
def test_a_child_that_hangs(break_child, monkeypatch):
    break_child("import time; time.sleep(100)")
    monkeypatch.setattr(self_check, "SECONDS", 3)
    assert self_check.check(["q4_0"]) == ["q4_0 weights: it hasn't ended after 3 seconds"]


def test_the_command(capsys):
    assert self_check.main(["f16"]) == 0
    assert "  f16     works, within 0.0" in capsys.readouterr().out
    assert self_check.main(["q3"]) == f"error: q3: must be among {', '.join(self_check.TYPES)}"


@pytest.mark.slow
def test_the_suite_ends_with_a_line(break_child, tmp_path):
    """As a newcomer sees it whose CPU crashes: no test is run."""
    child = break_child(SEGV)
    (tmp_path / "breaking.py").write_text(f"from lt_gguf.runtime import self_check\nself_check._CHILD = {child!r}\n")
    command = [sys.executable, "-m", "pytest", "-p", "breaking", "-q", "tests/spec/test_spec.py"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment)
    assert (result.returncode, result.stdout.strip()) == (pytest.ExitCode.USAGE_ERROR, "")
    (line,) = result.stderr.split("\n\n")[0].splitlines()
    assert line.startswith("ERROR: q4_0 weights: SIGSEGV (") and "in libggml-base.so: ggml_nelements, on " in line
