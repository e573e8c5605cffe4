"""The wheel for other machines, in pieces: what its metadata asks for, the binding that it carries, what is left in dist/.

Building all of it takes many minutes: `make wheel` does, and runs it in an empty root (scripts/checks/wheel_check.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "ggml-patch"), str(ROOT / "scripts" / "setup"), str(ROOT / "scripts" / "checks")]

import build_wheel
import wheel_check
from pinned_source import Pin, run_time_requirements, unpack_binding

METADATA = """\
Metadata-Version: 2.1
Name: binding
Version: 1
Requires-Dist: numpy>=1.20
Requires-Dist: colorama>=0.4; sys_platform == "win32"
Requires-Dist: uvicorn>=0.22; extra == "server"
Requires-Dist: pytest>=7; python_version > "3" and extra == 'test'
"""
PIN = Pin("binding", "1", "binding-1.tar.gz", "5" * 64, "vendor/llama.cpp", "c0ffee")


@pytest.fixture
def binding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The binding's wheel of PIN, in a cache of its own."""
    monkeypatch.setenv("LT_GGUF_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "cache" / PIN.sha256[:12] / "binding-1-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("llama_cpp/__init__.py", "")
        archive.writestr("binding-1.dist-info/METADATA", METADATA)
    return path


def test_the_binding_s_requirements_are_taken_without_its_extras(binding: Path) -> None:
    assert run_time_requirements(binding) == ["numpy>=1.20", 'colorama>=0.4; sys_platform == "win32"']


def test_unpacking_the_binding_replaces_what_was_there(binding: Path, tmp_path: Path) -> None:
    for left in ("binding/llama_cpp/old.py", "binding.unpacking/half.py"):
        (tmp_path / left).parent.mkdir(parents=True)
        (tmp_path / left).touch()
    unpack_binding(PIN, tmp_path / "binding")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["binding", "cache"]
    assert [path.name for path in (tmp_path / "binding" / "llama_cpp").iterdir()] == ["__init__.py"]


def dependencies(state: str, portable: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What the build backend adds to the package's dependencies, asked as scikit-build-core asks."""
    stub = tmp_path / "stub" / "scikit_build_core"
    stub.mkdir(parents=True)
    (stub / "__init__.py").touch()
    names = [f"get_requires_for_build_{target}" for target in ("sdist", "wheel", "editable")]
    (stub / "build.py").write_text("".join(f"{name} = None\n" for name in names))
    code = f"""
from lt_gguf_build import BindingRequirement, BuildError
provider = BindingRequirement()
provider.build_state({state!r})
try:
    print(*provider.dynamic_metadata({{}}, {{}})["dependencies"], sep="\\n")
except BuildError as error:
    raise SystemExit(str(error))
"""
    path = os.pathsep.join(map(str, (tmp_path / "stub", ROOT / "cmake", ROOT / "ggml-patch")))
    environment = {**os.environ, "PYTHONPATH": path, "LT_GGUF_PORTABLE": portable}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("state", ["metadata_wheel", "wheel"])  # pip asks for both, and they must agree
def test_a_wheel_for_other_machines_names_no_file_of_this_one(state: str, tmp_path: Path) -> None:
    lines = dependencies(state, "1", tmp_path).stdout.split("\n")
    names = {line.split(">")[0] for line in lines if line}
    assert names == {"typing-extensions", "numpy", "diskcache", "jinja2"}, lines


@pytest.mark.parametrize(("state", "portable"), [("wheel", ""), ("wheel", "0"), ("editable", "1"), ("metadata_editable", "1")])
def test_every_other_build_takes_the_binding_from_the_cache(state: str, portable: str, tmp_path: Path) -> None:
    (line,) = dependencies(state, portable, tmp_path).stdout.split("\n")[:-1]
    assert line.startswith("llama-cpp-python @ file:///") and line.endswith(".whl")


def test_a_source_distribution_names_the_version(tmp_path: Path) -> None:
    assert dependencies("sdist", "1", tmp_path).stdout == f"{Pin.load().requirement}\n"


def test_anything_but_yes_and_no_is_an_error(tmp_path: Path) -> None:
    done = dependencies("wheel", "yes", tmp_path)
    assert done.returncode and done.stderr.startswith("LT_GGUF_PORTABLE=yes: 1 asks for a wheel for other machines")


def test_a_new_wheel_replaces_those_of_its_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_wheel, "DIST", tmp_path / "dist")
    (tmp_path / "dist").mkdir()
    tag = "lt_gguf-{}-py3-none-{}.whl".format
    others = [tag("1.0", "manylinux_2_34_aarch64"), tag("0.9", "manylinux_2_34_x86_64")]
    for name in (*others, tag("1.0", "manylinux_2_36_x86_64")):
        (tmp_path / "dist" / name).write_text("old")
    new = tmp_path / tag("1.0", "manylinux_2_34_x86_64")
    new.write_text("new")
    assert build_wheel.publish(new).read_text() == "new"
    assert sorted(path.name for path in (tmp_path / "dist").iterdir()) == sorted([*others, new.name])


def test_a_failed_step_ends_in_one_line_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_wheel, "ROOT", tmp_path)
    monkeypatch.setattr(build_wheel, "LOG", tmp_path / "log")
    said = ["compiling", "lt-gguf: error: there is no working compiler", "error: subprocess-exited-with-error"]
    code = f"print(*{said}, sep='\\n'); raise SystemExit(1)"
    with pytest.raises(build_wheel.WheelError) as caught:
        build_wheel.run([sys.executable, "-c", code], "the build failed")
    assert str(caught.value) == "the build failed (there is no working compiler): the whole log is in log"
    assert "compiling" in (tmp_path / "log").read_text()


WAIT = """
#include <condition_variable>
#include <cstdio>
#include <thread>
int main() {
    std::mutex mutex;
    std::condition_variable changed;
    int stage = 0;
    std::thread other([&] {
        std::unique_lock<std::mutex> lock(mutex);
        changed.wait(lock, [&] { return stage == 1; });
        stage = 2;
        changed.notify_all();
    });
    std::unique_lock<std::mutex> lock(mutex);
    stage = 1;
    changed.notify_all();
    changed.wait(lock, [&] { return stage == 2; });
    lock.unlock();
    other.join();
    std::puts("woken");
}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="libstdc++ is the C++ library of Linux")
def test_waiting_for_a_condition_asks_for_no_libstdcxx_12(tmp_path: Path) -> None:
    (tmp_path / "wait.cpp").write_text(WAIT)
    compile_ = ["c++", "-std=c++17", "-O2", "-pthread", "-o", tmp_path / "wait", tmp_path / "wait.cpp"]
    carried = subprocess.run([*compile_, ROOT / "cmake" / "condition_variable.cpp"], capture_output=True, text=True)
    if "_M_cond" in carried.stderr:
        pytest.skip("this C++ library is no libstdc++ 12 or newer")
    assert carried.returncode == 0, carried.stderr
    assert subprocess.run([tmp_path / "wait"], capture_output=True, text=True, timeout=60).stdout == "woken\n"
    assert b"GLIBCXX_3.4.30" not in (tmp_path / "wait").read_bytes()
    subprocess.run(compile_, check=True)
    assert b"GLIBCXX_3.4.30" in (tmp_path / "wait").read_bytes()  # what it is for


def mapped(tmp_path: Path, *libraries: str) -> str:
    """What a process in the check says that it has mapped."""
    return "".join(f"mapped {tmp_path / library}\n" for library in libraries)


def test_libraries_of_the_wheel_and_of_every_system_are_fine(tmp_path: Path) -> None:
    output = mapped(tmp_path, "venv/lib/libllama.so", "venv/bin/libggml-cpu-zen4.so", "usr/libstdc++.so.6.0.30", "usr/libm.so.6")
    wheel_check.check_libraries(output, tmp_path / "venv")


def test_a_library_that_others_may_lack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(wheel_check.CheckError, match="libssl.so.3"):
        wheel_check.check_libraries(mapped(tmp_path, "venv/lib/libllama.so", "usr/libssl.so.3"), tmp_path / "venv")


def test_the_check_says_which_variant_was_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = f"binding {tmp_path}/venv/llama_cpp/__init__.py\n" + mapped(tmp_path, "venv/bin/libggml-cpu-zen4.so")
    wheel_check.check_binding(output, tmp_path / "venv")
    assert capsys.readouterr().out == "wheel_check: this CPU got libggml-cpu-zen4.so\n"


def test_a_binding_from_elsewhere_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(wheel_check.CheckError, match="not from the wheel"):
        wheel_check.check_binding(f"binding {tmp_path}/elsewhere/llama_cpp/__init__.py\n", tmp_path / "venv")


def test_the_check_names_the_step_that_failed(tmp_path: Path) -> None:
    root = wheel_check.EmptyRoot.__new__(wheel_check.EmptyRoot)
    root.directory = root.work = tmp_path
    root.venv, root.environment = Path(sys.prefix), {"PATH": ""}
    assert root.run(sys.executable, "-c", "import shutil; print(shutil.which('git'))") == "None\n"
    with pytest.raises(wheel_check.CheckError, match="exit code 3"):
        root.run(sys.executable, "-c", "raise SystemExit(3)")
    with pytest.raises(wheel_check.CheckError, match="missing"):
        root.run("no-such-tool")
