"""What scripts/checks/cpu_levels.py says before it builds anything, and of what it measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parents[2] / "scripts" / "checks"
sys.path.insert(0, str(CHECKS))

import cpu_builds
import cpu_levels


@pytest.fixture
def no_tools(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu_builds.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_level_that_is_not_there():
    done = subprocess.run([sys.executable, CHECKS / "cpu_levels.py", "--only", "avx2,avx3"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "no level 'avx3'" in done.stderr and "avx2" in done.stderr


def test_missing_tools_are_named_with_how_to_install_them(no_tools, monkeypatch):
    monkeypatch.setattr(cpu_builds.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(cpu_builds.platform, "system", lambda: "Linux")
    assert cpu_builds.missing_tools(set(), qemu=False) == ""
    here = cpu_builds.missing_tools({cpu_builds.Machine.X86_64}, qemu=False)
    assert "g++" in here and "qemu" not in here
    cross = cpu_builds.missing_tools({cpu_builds.Machine.AARCH64}, qemu=True)
    assert "\n" not in cross
    for part in ("apt install qemu-user", "apt install g++-aarch64-linux-gnu", "pip install ninja", "--only"):
        assert part in cross


def test_a_machine_that_can_not_run_it(monkeypatch):
    monkeypatch.setattr(cpu_builds.platform, "machine", lambda: "arm64")
    assert "x86-64" in cpu_builds.missing_tools({cpu_builds.Machine.X86_64}, qemu=False)


def test_a_level_compiled_for_something_else_is_an_error(monkeypatch):
    level = next(level for level in cpu_levels.LEVELS if level.key == "avx2")
    said = {"words": "ok SSE3=1 AVX=1 AVX2=1 FMA=1 F16C=1 LLAMAFILE=1\n"}
    monkeypatch.setattr(cpu_levels, "output", lambda command, **options: said["words"])
    assert cpu_levels.compiled_for(level, ["driver", "library"]) == "SSE3, AVX, AVX2, FMA, F16C"
    for words, wrong in (("ok AVX2=1 FMA=1\n", "F16C"), ("ok AVX2=1 FMA=1 F16C=1 AVX512=1\n", "AVX512")):
        said["words"] = words
        with pytest.raises(cpu_levels.BuildError, match=f"should be are {wrong}"):
            cpu_levels.compiled_for(level, ["driver", "library"])


def test_the_table_has_the_largest_of_each_kind():
    rows = [
        {"difference": 2e-5},
        {"difference": 1e-5},
        {"difference": 0.3, "full": 0.2},
        {"difference": 0.1, "full": 0.1, "noise": 0.02},
    ]
    result = cpu_levels.Result("AVX2", "AVX2", "this processor", 4, 1, rows)
    assert result.row() == "| AVX2 | AVX2 | this processor | 4 of 5 | 2.0e-05 | 1.50 | 0.020 |"
    assert cpu_levels.Result("AMX", "", "not run").row() == "| AMX |  | not run |  |  |  |  |"
