"""The builds of cpu_levels.py: llama.cpp without a CPU backend, ggml's backends for each kind of processor, the driver."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ggml-patch"))

from upstream import BuildError, Pin, sync

WORK = ROOT / "build" / "cpu-levels"
SOURCE = WORK / "llama.cpp"
HERE = Path(__file__).parent / "cpu"

PACKAGES = {"g++": "g++", "qemu-x86_64": "qemu-user", "qemu-aarch64": "qemu-user", "aarch64-linux-gnu-g++": "g++-aarch64-linux-gnu"}

# One library of each, and no architecture of ggml's for it: what -march=native gives a processor with i8mm and without SVE.
I8MM = "i8mm"
I8MM_ARCH = "armv8.6-a+dotprod+i8mm+fp16"


class Machine(Enum):
    X86_64 = "x86-64"
    AARCH64 = "aarch64"

    @property
    def path(self) -> Path:
        """Where the libraries and the driver are, all together."""
        return WORK / self.value

    @property
    def compiler(self) -> str:
        return "g++" if self is Machine.X86_64 else "aarch64-linux-gnu-g++"

    def qemu(self, cpu: str) -> list[str]:
        if self is Machine.X86_64:
            return ["qemu-x86_64", "-cpu", cpu]
        return ["qemu-aarch64", "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu]


def environment() -> dict[str, str]:
    """With cmake and ninja on the path, where pip put them."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def missing_tools(machines: set[Machine], qemu: bool) -> str:
    """One line: what isn't installed, and how to install it. Empty if nothing is missing."""
    if machines and (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return f"this needs Linux on x86-64, not {platform.system()} on {platform.machine()}"
    wanted = ["cmake", "ninja"] if machines else []
    for machine in machines:
        wanted.append(machine.compiler)
        if qemu:
            wanted.append(machine.qemu("")[0])
    missing = [tool for tool in wanted if not shutil.which(tool, path=environment()["PATH"])]
    if not missing:
        return ""
    how = {f"apt install {PACKAGES[tool]}" if tool in PACKAGES else f"pip install {tool}" for tool in missing}
    return f"not installed: {', '.join(sorted(missing))} ({'; '.join(sorted(how))}); or choose other levels with --only"


def build(machine: Machine, libraries: set[str], say: Callable[[str], None]) -> None:
    """The backends `libraries` and the driver for a machine, in `machine.path`. What is built already is left alone.

    Raises BuildError: what failed, and where its log is.
    """
    say(f"building for {machine.value}: {', '.join(sorted(libraries))} (the first time takes minutes)")
    start = time.monotonic()
    sync(SOURCE, Pin.load())
    # Built with the variants, llama.cpp would build all of them.
    built = [cmake(machine, "llama", ["llama"], "-DGGML_CPU=OFF")]
    if variants := sorted(libraries - {I8MM}):
        built.append(cmake(machine, "variants", [f"ggml-cpu-{name}" for name in variants], "-DGGML_CPU_ALL_VARIANTS=ON"))
    machine.path.mkdir(exist_ok=True)
    for directory in built:
        for library in directory.glob("bin/lib*.so"):
            link(library, machine.path / library.name)
    if I8MM in libraries:
        directory = cmake(machine, I8MM, ["ggml-cpu"], f"-DGGML_CPU_ARM_ARCH={I8MM_ARCH}")
        link(directory / "bin" / "libggml-cpu.so", machine.path / f"libggml-cpu-{I8MM}.so")
    includes = [f"-I{SOURCE / folder}" for folder in ("include", "ggml/include")]
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra"]
    links = [f"-L{machine.path}", "-Wl,-rpath,$ORIGIN", "-lllama", "-lggml", "-lggml-base", "-ldl"]
    compile_(machine, "driver", [*flags, *includes], [HERE / "driver.cpp"], links)
    if machine is Machine.X86_64:
        compile_(
            machine, "amx_emulator.so", [*flags, "-O3", "-mavx512f", "-shared", "-fPIC"], [HERE / "amx_emulator.cpp"], ["-ldl"]
        )
    say(f"built for {machine.value} in {time.monotonic() - start:.0f} s")


def cmake(machine: Machine, name: str, targets: list[str], *options: str) -> Path:
    directory = WORK / f"{machine.value}-{name}"
    options = ("-DCMAKE_BUILD_TYPE=Release", f"-DLT_SOURCE_TREE={SOURCE}", "-DGGML_NATIVE=OFF", "-DGGML_BACKEND_DL=ON", *options)
    options += ("-DGGML_RPC=OFF", "-DLLAMA_OPENSSL=OFF")
    if machine is Machine.AARCH64:
        compiler = machine.compiler
        options += ("-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}")
        options += (f"-DCMAKE_C_COMPILER={compiler.replace('g++', 'gcc')}",)
    if shutil.which("ccache"):
        options += ("-DCMAKE_C_COMPILER_LAUNCHER=ccache", "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", directory, *options], directory.with_suffix(".cmake.log"))
    run(["ninja", "-C", directory, *targets], directory.with_suffix(".log"))
    return directory


def compile_(machine: Machine, name: str, flags: list[str], sources: list[Path], links: list[str]) -> None:
    out = machine.path / name
    run([machine.compiler, *flags, *sources, "-o", out, *links], WORK / f"{machine.value}-{name}.log")


def run(command: list, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment()).returncode:
            raise BuildError(f"{shlex.join(map(str, command[:3]))} failed; the whole log is in {log}")


def link(library: Path, name: Path) -> None:
    """A name for a library beside the others, among which its $ORIGIN is."""
    if name.exists() and name.samefile(library):
        return
    fresh = name.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    os.link(library, fresh)
    os.replace(fresh, name)
