"""The CPU: what it is, and how many of its cores this process may use."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lt_gguf.runtime.control_groups import group_folders, read_or_empty

_ROOT = Path("/")

# How often a thread of GCC's OpenMP looks whether the others are there before it sleeps: tens of microseconds. Its own 300,000 let
# it keep a core busy for which the thread that it waits for is queueing, on a machine with other work. With two threads on two
# busy cores SmolLM2-135M decodes 12 tokens/s so, 2 with the 300,000, and 120 with both where nothing else runs.
_SPINS = "1000"


def usable_cores(root: Path = _ROOT) -> int:
    """The physical cores that this process may use, at least 1: what a number of CPU threads is where nobody gives one.

    The threads of a matrix product wait for each other, so two on one core, or more than a container gets time for, are no
    faster than one and often slower. Counted are the CPUs of the process's affinity, hyper-threads of one core once, those of
    a hybrid processor's fast cores alone (as llama.cpp does); no more than the quota of its cgroups, rounded up, and than
    the environment variable OMP_NUM_THREADS, with which users and batch systems bound what a process takes.

    Args:
        root: the folder that holds `proc` and `sys`, for tests.
    """
    asked = re.match(r"\s*0*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    n = _cores(root)
    return min(n, int(asked[1])) if asked else n


def _cores(root: Path) -> int:
    if sys.platform == "darwin":
        return max(1, _sysctl_number("hw.perflevel0.physicalcpu") or _sysctl_number("hw.physicalcpu") or os.cpu_count() or 1)
    try:
        cpus = os.sched_getaffinity(0)
    except AttributeError:
        cpus = set(range(os.cpu_count() or 1))
    devices = root / "sys" / "devices"
    fast = _cpu_list(read_or_empty(devices / "cpu_core" / "cpus"))  # there where a processor has cores of two kinds (Intel)
    cores = {_siblings(devices, cpu) for cpu in (cpus & fast or cpus)}
    quotas = [-(-quota // period) for quota, period in _cgroup_quotas(root)]
    return max(1, min([len(cores), *quotas]))


def set_up_openmp() -> None:
    """For a process of ours, before torch is imported: torch takes as many threads as we do, it knows nothing of quotas, and threads
    that wait sleep soon. Children inherit it; what the user says wins."""
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    if _spins_are_ours():
        os.environ["GOMP_SPINCOUNT"] = _SPINS


@contextmanager
def short_spins() -> Iterator[None]:
    """For a process of others: GCC's OpenMP, if it is loaded in the with block, has threads that wait sleep soon.

    It reads its settings when it is loaded, so nobody else gets to see this. (Where torch was imported before, its copy serves us too.)
    """
    if not _spins_are_ours():
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)


def _spins_are_ours() -> bool:
    """Whether the user hasn't said how threads wait."""
    return not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()


def cpu_name() -> str:
    """What the processor is called, as well as the system knows it."""
    if sys.platform == "darwin":
        return _sysctl_text("machdep.cpu.brand_string") or platform.machine()
    named = re.search(r"^(?:model name|Processor|cpu model)\s*:\s*(\S.*)$", read_or_empty(_ROOT / "proc" / "cpuinfo"), re.MULTILINE)
    return named[1].strip() if named else platform.machine()


# Those that ggml has code for, as the kernel writes them.
_FLAGS_OF_GGML = re.compile(r"sse4_2|ssse3|avx\w*|fma|f16c|bmi2|amx\w*|asimd\w*|i8mm|bf16|sve\w*|sme\d?|vsx|rvv")


def cpu_flags() -> list[str]:
    """The instruction sets that the processor has and ggml may use; empty where the system doesn't list them."""
    listed = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", read_or_empty(_ROOT / "proc" / "cpuinfo"), re.MULTILINE)
    return [flag for flag in (listed[1].split() if listed else []) if _FLAGS_OF_GGML.fullmatch(flag)]


def _siblings(devices: Path, cpu: int) -> frozenset[int]:
    """The CPUs that are hyper-threads of one core with this one, itself included."""
    topology = devices / "system" / "cpu" / f"cpu{cpu}" / "topology"
    # note: a kernel before 5.5 has only the second name; some containers hide both
    listed = read_or_empty(topology / "core_cpus_list") or read_or_empty(topology / "thread_siblings_list")
    return frozenset(_cpu_list(listed) | {cpu})


def _cpu_list(text: str) -> set[int]:
    """The numbers of a list as the kernel writes it: 0-3,8."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", text)
    return {cpu for first, last in ranges for cpu in range(int(first), int(last or first) + 1)}


def _cgroup_quotas(root: Path) -> Iterator[tuple[int, int]]:
    """Microseconds of CPU time that this process's control groups get in a period, and the period; of each group that has a limit."""
    mounted = root / "sys" / "fs" / "cgroup"
    for line in read_or_empty(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2, which may stand beside version 1
            for folder in group_folders([mounted, mounted / "unified"], path):
                quota, _, period = read_or_empty(folder / "cpu.max").strip().partition(" ")
                if quota.isdecimal() and period.isdecimal():
                    yield int(quota), int(period)
        elif "cpu" in controllers.split(","):
            for folder in group_folders([mounted / controllers, mounted / "cpu"], path):
                quota, period = (read_or_empty(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
                if quota.isdecimal() and period.isdecimal():  # -1: no limit
                    yield int(quota), int(period)


def _sysctl_number(name: str) -> int:
    """0 if there is no such value."""
    data = _sysctl(name)
    return int.from_bytes(data, sys.byteorder)


def _sysctl_text(name: str) -> str:
    return _sysctl(name).rstrip(b"\0").decode(errors="replace")


def _sysctl(name: str) -> bytes:
    """A value of macOS's kernel, empty if there is none of that name."""
    sysctlbyname = ctypes.CDLL(None).sysctlbyname
    data, size = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    if sysctlbyname(name.encode(), data, ctypes.byref(size), None, ctypes.c_size_t(0)):
        return b""
    return data.raw[: size.value]
