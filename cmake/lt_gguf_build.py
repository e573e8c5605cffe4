"""The build backend: scikit-build-core, with the source made ready before it and a clear last line when it fails.

pip calls these functions (PEP 517). Two things happen here that scikit-build-core has no place for:

- before CMake runs, `ggml-patch/upstream.py` fetches, unpacks and patches llama.cpp into `build/llama.cpp`;
- the package's metadata names a wheel of llama-cpp-python's Python files, made from the same source and kept in the
  user cache. If it named the version alone, pip would build that package and compile a second llama.cpp.

With `LT_GGUF_PORTABLE=1` in the environment (`make wheel` sets it) the wheel is one for other machines: every variant of
ggml's CPU backend instead of the one for this CPU (cmake/options.cmake), and the binding's Python files inside the wheel
instead of a path in this machine's cache. All of that happens in `build/wheel`, apart from the builds for this machine.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pinned_source  # ggml-patch/ is on the backend's path, see pyproject.toml
import upstream
from pinned_source import BuildError, Pin
from scikit_build_core import build as backend

get_requires_for_build_sdist = backend.get_requires_for_build_sdist
get_requires_for_build_wheel = backend.get_requires_for_build_wheel
get_requires_for_build_editable = backend.get_requires_for_build_editable

BUILD_DIR = Path("build")
PORTABLE = "LT_GGUF_PORTABLE"  # "1": a wheel for other machines
PORTABLE_DIR = Path("build/wheel")
BUILD_BYTES = 100e6  # objects and libraries of a build for the CPU, the smallest
PORTABLE_BYTES = 250e6  # and of all variants for CPUs
# What CMake keeps in its cache from one run to the next, though the user may have changed it since.
CONFIGURATION = "CMAKE_ARGS CMAKE_GENERATOR CMAKE_PREFIX_PATH CC CXX CUDACXX CFLAGS CXXFLAGS LDFLAGS".split()

# The first pattern that a failed build's output has gives the last line, which says what to do.
EXPLANATIONS = [
    (
        r"No space left on device|Disk quota exceeded",
        "the disk of build/ or of the temporary directory is full; free some space and run it again",
    ),
    (
        r"CMAKE_C(XX)?_COMPILER (could be found|not set)|is not a full path to an existing compiler"
        r"|is not able to compile a simple test program",
        "there is no working C and C++ compiler: install gcc and g++ (Debian: apt install build-essential; "
        "macOS: xcode-select --install), or set CC and CXX to one",
    ),
    (
        r"CUDA Toolkit not found|CMAKE_CUDA_COMPILER (could be found|not set)|Failed to find nvcc|CUDA::cublas",
        "GGML_CUDA=ON needs the CUDA toolkit with nvcc and cuBLAS: install it, or set CUDACXX to its nvcc",
    ),
    (
        r"Could NOT find Vulkan|glslc.*not found",
        "GGML_VULKAN=ON needs Vulkan's headers, loader and glslc (Debian: apt install libvulkan-dev glslc)",
    ),
    (
        r"Killed signal terminated program|virtual memory exhausted|out of memory",
        "the compiler ran out of memory: run it again with CMAKE_BUILD_PARALLEL_LEVEL=1",
    ),
]


def build_sdist(sdist_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    return backend.build_sdist(sdist_directory, config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    with _clear_errors():
        return backend.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Mapping[str, Any] | None = None) -> str:
    with _clear_errors():
        return backend.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    return _build(backend.build_wheel, wheel_directory, config_settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Mapping[str, Any] | None = None, metadata_directory: str | None = None
) -> str:
    return _build(backend.build_editable, wheel_directory, config_settings, metadata_directory)


class BindingRequirement:
    """scikit-build-core's dynamic metadata: llama-cpp-python, at the pinned version, as the wheel without libraries."""

    state = "wheel"

    def build_state(self, state: str) -> None:
        self.state = state

    def dynamic_metadata(self, settings: Mapping[str, Any], project: Mapping[str, Any]) -> dict[str, list[str]]:
        pin = Pin.load()
        if self.state == "sdist":  # goes to other machines, where a path of this one means nothing
            return {"dependencies": [pin.requirement]}
        wheel = pinned_source.binding_wheel(pin)
        if self.state in ("wheel", "metadata_wheel") and portable():  # carries the binding, so needs what the binding needs
            return {"dependencies": pinned_source.run_time_requirements(wheel)}
        return {"dependencies": [f"{pin.package} @ {wheel.as_uri()}"]}


def portable() -> bool:
    """Whether the wheel is for other machines. Raises BuildError if the variable says neither yes nor no."""
    value = os.environ.get(PORTABLE, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{PORTABLE}={value}: 1 asks for a wheel for other machines, 0 or nothing for one for this machine")
    return value == "1"


def _build(build, wheel_directory: str, config_settings: Mapping[str, Any] | None, metadata_directory: str | None) -> str:
    with _clear_errors():
        if sys.platform == "win32":
            raise BuildError("Windows isn't supported: build inside WSL 2")
        pin = Pin.load()
        if f'BINDING_VERSION = "{pin.version}"' not in Path("lt_gguf/runtime/library.py").read_text():
            raise BuildError(
                f"ggml-patch/UPSTREAM.toml pins {pin.version}, lt_gguf/runtime/library.py names another: make them equal"
            )
        for_others = portable() and build is backend.build_wheel  # an editable installation is for this machine
        directory, arguments = PORTABLE_DIR if for_others else BUILD_DIR, [f"-DLT_UPSTREAM_COMMIT={pin.commit}"]
        upstream.sync(directory / "llama.cpp", pin)
        if for_others:
            pinned_source.unpack_binding(pin, directory / "binding")
            here = shlex.quote(str(Path.cwd() / directory))
            arguments += ["-DLT_PORTABLE=ON", f"-DLT_SOURCE_TREE={here}/llama.cpp", f"-DLT_BINDING={here}/binding"]
            config_settings = {**(config_settings or {}), "build-dir": f"{directory}/{{wheel_tag}}"}
        _drop_stale_configuration(directory)
        if not any(directory.glob("py3-*/bin/*llama*")):  # else most of it is there already
            pinned_source.need_space(directory, PORTABLE_BYTES if for_others else BUILD_BYTES)
        os.environ["CMAKE_ARGS"] = " ".join([*arguments, os.environ.get("CMAKE_ARGS", "")])
        # ccache, where it is installed, then knows an object again that another checkout compiled.
        os.environ.setdefault("CCACHE_BASEDIR", str(Path.cwd()))
        os.environ.setdefault("CCACHE_NOHASHDIR", "1")
        with _watched_output() as output:
            wheel = None
            try:
                wheel = build(wheel_directory, config_settings, metadata_directory)
            except OSError as error:
                output.append(str(error))
            except SystemExit:
                pass
        if wheel is None:
            raise BuildError(_explain(output))
        if not for_others:  # which is built to be taken elsewhere
            _check_room_to_install(Path(wheel_directory) / wheel)
        return wheel


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except BuildError as error:
        sys.stdout.flush()
        print(f"\nlt-gguf: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _drop_stale_configuration(directory: Path) -> None:
    """Configure anew when compilers or CMAKE_ARGS changed: `pip install .` after a CUDA build means the CPU again."""
    now = "".join(f"{name}={os.environ.get(name, '')}\n" for name in CONFIGURATION)
    record = directory / "configuration.txt"
    if not record.exists() or record.read_text() != now:
        for cache in directory.glob("py3-*/CMakeCache.txt"):
            cache.unlink()
            shutil.rmtree(cache.parent / "CMakeFiles", ignore_errors=True)
        record.write_text(now)


def _check_room_to_install(wheel: Path) -> None:
    """pip unpacks the wheel after this, and would leave a part of it behind on a disk that is full."""
    with zipfile.ZipFile(wheel) as archive:
        size = sum(info.file_size for info in archive.infolist())
    pinned_source.need_space(Path(sysconfig.get_path("platlib")), 1.1 * size)


@contextmanager
def _watched_output() -> Iterator[list[str]]:
    """Lets the output of the block and its subprocesses through, and collects its lines."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    read_end, write_end = os.pipe()

    def forward() -> None:
        with open(read_end, encoding="utf-8", errors="replace") as stream:
            for line in stream:
                lines.append(line)
                os.write(saved[0], line.encode())

    forwarder = threading.Thread(target=forward)
    forwarder.start()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)
    try:
        yield lines
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        forwarder.join()
        os.close(saved[0])
        os.close(saved[1])


def _explain(output: list[str]) -> str:
    text = "".join(output)
    for pattern, what_to_do in EXPLANATIONS:
        if re.search(pattern, text):
            return what_to_do
    if first := re.search(r"^.*\berror: .*$", text, re.MULTILINE) or re.search(r"CMake Error[^\n]*:\n\s*([^\n]+)", text):
        return f"the build failed with: {first[first.lastindex or 0].strip()}"
    return "the build failed: its output is above"
