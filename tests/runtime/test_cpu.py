"""How many threads compute where nobody says it: the physical cores that the process may use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.small_gguf import write_small

from lt_gguf.runtime import cpu

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="Linux has affinities and cgroups")


@pytest.fixture(autouse=True)
def unbounded(monkeypatch):
    """The tests' own bound, see conftest.py."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a folder like `/` of a machine: hyper-threads of each core, the CPUs that the process may use, other files."""

    def make(cores: list[str], allowed: set[int], files: dict[str, str] = {}, name: str = "core_cpus_list") -> Path:
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: allowed, raising=False)
        listed = {f"sys/devices/system/cpu/cpu{cpu_}/topology/{name}": core for core in cores for cpu_ in cpu._cpu_list(core)}
        for path, text in (listed | files).items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text + "\n")
        return tmp_path

    return make


@pytest.mark.parametrize("name", ["core_cpus_list", "thread_siblings_list"])
@pytest.mark.parametrize(
    "cores, allowed, expected",
    [
        (["0", "1"], {0, 1}, 2),  # no hyper-threads
        (["0,4", "1,5", "2,6", "3,7"], set(range(8)), 4),
        (["0-1", "2-3"], set(range(4)), 2),
        (["0,4", "1,5", "2,6", "3,7"], {1, 5}, 1),  # both of one core
        (["0,4", "1,5", "2,6", "3,7"], {1, 6, 7}, 3),
        ([], {3, 5, 9}, 3),  # a container that hides the topology
        (["0", "1"], set(), 1),
    ],
)
def test_hyper_threads_of_a_core_count_once(machine, cores, allowed, expected, name):
    assert cpu.usable_cores(machine(cores, allowed, name=name)) == expected


@pytest.mark.parametrize("given, expected", [("1", 1), ("3,2", 3), ("16", 4), ("0", 4), ("", 4), ("many", 4)])
def test_the_environment_bounds_it(machine, monkeypatch, given, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert cpu.usable_cores(machine(["0,4", "1,5", "2,6", "3,7"], set(range(8)))) == expected


def test_of_two_kinds_of_cores_the_fast_ones_count(machine):
    cores = ["0-1", "2-3", "4", "5", "6", "7"]
    kinds = {"sys/devices/cpu_core/cpus": "0-3", "sys/devices/cpu_atom/cpus": "4-7"}
    assert cpu.usable_cores(machine(cores, set(range(8)), kinds)) == 2
    assert cpu.usable_cores(machine(cores, {4, 5, 6}, kinds)) == 3  # where the process may use only the others


GROUP = "sys/fs/cgroup/box"


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"proc/self/cgroup": "0::/box", f"{GROUP}/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/box", f"{GROUP}/cpu.max": "150000 100000"}, 2),  # rounded up
        ({"proc/self/cgroup": "0::/box", f"{GROUP}/cpu.max": "10000 100000"}, 1),
        ({"proc/self/cgroup": "0::/box", f"{GROUP}/cpu.max": "max 100000"}, 8),
        ({"proc/self/cgroup": "0::/box", f"{GROUP}/cpu.max": "1600000 100000"}, 8),  # more than there is
        # the limit of a group that this one is in, the lower one counts
        ({"proc/self/cgroup": "0::/box/in/it", f"{GROUP}/cpu.max": "300000 100000", f"{GROUP}/in/it/cpu.max": "max 100000"}, 3),
        ({"proc/self/cgroup": "0::/box/in", f"{GROUP}/cpu.max": "300000 100000", f"{GROUP}/in/cpu.max": "200000 100000"}, 2),
        # in a container, whose group is mounted as the top one
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        ({"proc/self/cgroup": "0::/../other", "sys/fs/cgroup/cpu.max": "400000 100000"}, 4),
        # version 1
        (
            {
                "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n0::/",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "250000",
                "sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            3,
        ),
        (
            {
                "proc/self/cgroup": "3:cpuacct,cpu:/docker/0123",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "25000",
            },
            2,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/box",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            8,
        ),
        ({"proc/self/cgroup": "0::/box", f"{GROUP}/cpu.max": "nonsense"}, 8),
        ({}, 8),
    ],
)
def test_a_quota_of_time_bounds_it(machine, files, expected):
    assert cpu.usable_cores(machine([str(i) for i in range(8)], set(range(8)), files)) == expected


@pytest.mark.parametrize(
    "known, expected", [({"hw.perflevel0.physicalcpu": 4, "hw.physicalcpu": 8}, 4), ({"hw.physicalcpu": 6}, 6)]
)
def test_macos_counts_fast_cores(monkeypatch, known, expected):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cpu, "_sysctl", lambda name: known[name].to_bytes(4, sys.byteorder) if name in known else b"")
    assert cpu.usable_cores() == expected


@LINUX
def test_a_process_that_is_bound_to_one_cpu_has_one_core():
    allowed = min(os.sched_getaffinity(0))
    script = f"import os; os.sched_setaffinity(0, [{allowed}])\nfrom lt_gguf.runtime.cpu import usable_cores; print(usable_cores())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "1\n"
    assert cpu.usable_cores() <= len(os.sched_getaffinity(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_small(tmp_path_factory.mktemp("threads") / "small.gguf")[0]


def test_models_run_on_these_cores(model, monkeypatch):
    from lt_gguf import Llama
    from lt_gguf.evaluation import context, scorer
    from lt_gguf.runtime import llama

    monkeypatch.setattr(llama, "usable_cores", lambda: 3)
    monkeypatch.setattr(context, "usable_cores", lambda: 3)

    def threads(**given: int | None) -> tuple[int, int]:
        llm = Llama(str(model), n_ctx=64, verbose=False, **given)
        assert context._llama_cpp.llama_n_threads(llm.ctx) == llm.n_threads
        llm.close()
        return llm.n_threads, llm.n_threads_batch

    assert threads() == threads(n_threads=None) == (3, 3)
    assert threads(n_threads=1) == (1, 3)
    assert threads(n_threads=2, n_threads_batch=1) == (2, 1)
    for n_threads, expected in ((None, 3), (2, 2)):
        with scorer.Scorer(model, "off", context.ScorerOptions(n_threads=n_threads)) as scorer_:
            assert context._llama_cpp.llama_n_threads(scorer_._context.handle) == expected
            assert context._llama_cpp.llama_n_threads_batch(scorer_._context.handle) == expected


@pytest.mark.parametrize("given, spins", [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")])
def test_threads_that_wait_sleep_soon(given, spins):
    script = "import os; from lt_gguf.runtime import library; library.load_llama_cpp(); print(os.environ.get('GOMP_SPINCOUNT'))"
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    # note: with this GCC's OpenMP shows its settings when it is loaded
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | given
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if "GOMP_SPINCOUNT" not in child.stderr:
        pytest.skip("the libraries are built without GCC's OpenMP")
    assert f"GOMP_SPINCOUNT = '{spins}'" in child.stderr
    assert child.stdout == f"{given.get('GOMP_SPINCOUNT')}\n"  # nothing is left of it


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, ("3", "1000")),
        ({"OMP_NUM_THREADS": "2"}, ("2", "1000")),
        ({"GOMP_SPINCOUNT": "7"}, ("3", "7")),
        ({"OMP_WAIT_POLICY": "passive"}, ("3", None)),
    ],
)
def test_our_processes_set_openmp_up(monkeypatch, given, expected):
    monkeypatch.setattr(cpu, "usable_cores", lambda: 3)
    # note: first set, so that what is done is undone
    for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, given.get(name, ""))
        if name not in given:
            monkeypatch.delenv(name)
    cpu.set_up_openmp()
    assert (os.environ["OMP_NUM_THREADS"], os.environ.get("GOMP_SPINCOUNT")) == expected


def test_cpus_have_names():
    assert cpu.cpu_name().strip() and "\n" not in cpu.cpu_name()
