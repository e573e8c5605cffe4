"""The long-running checks in scripts/, for a short while."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "checks"


def run(script: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, SCRIPTS / script, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--layers", "half"], ["--layers", "all", "--unified", "--kv", "f16"]])
def test_soak(arguments):
    assert "flat: 4" in run("soak.py", "--tokens", "40000", *arguments)


@pytest.mark.slow
def test_fuzzed_metadata():
    assert "no crash, no disagreement" in run("fuzz_metadata.py", "--cases", "200")


@pytest.mark.slow
def test_faults():
    said = run("faults.py", "--only", "convert,hub", "--kills", "1")
    assert "\n| convert | " in said and "\n| hub | " in said
