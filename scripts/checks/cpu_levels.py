"""Runs the logits oracle, quantized models included, on the code that ggml has for each kind of processor.

    python scripts/checks/cpu_levels.py [--only native,avx2,...] [--list]

Prints a Markdown table and ends with an error if a test fails. What this processor can run runs on it; older ones, whose
instructions must be missing, and 64-bit ARM run under qemu, AMX where it is missing with its instructions emulated.
Builds in build/cpu-levels. On 2 cores with other work it took over an hour from nothing, most of it under qemu. Linux on x86-64; wants cmake,
ninja and g++, and for the others Debian's qemu-user and g++-aarch64-linux-gnu.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from dataclasses import dataclass, field

from cpu_builds import ROOT, WORK, BuildError, Machine, build, missing_tools

# What depends on the processor: quantized models, both prefill modes, KV types, and the operations of every family.
KERNELS = [
    "tests/oracle/test_quantized.py",
    "tests/oracle/test_kv_types.py",
    "tests/oracle/test_logits.py::test_hybrid_model",
    "-k",
    "not 129-1025",
]
# Under an emulator of the whole processor: half of the quantized cases, and one family.
FEW_KERNELS = [*KERNELS[:-1], "(stream-q8_0 or full-f32 or [llama-) and not 129-1025"]


@dataclass(frozen=True)
class Level:
    """A kind of processor. `library`: ggml's backend for it, of the builds for `machine`; `qemu`: the processor to emulate.

    `has` and `lacks` are names of features that ggml must say it was compiled with, and without.
    """

    key: str
    name: str
    machine: Machine
    library: str
    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    qemu: str | None = None

    @property
    def arguments(self) -> list[str]:
        return KERNELS if self.qemu is None else FEW_KERNELS


X86, ARM = Machine.X86_64, Machine.AARCH64
NATIVE = "native"
LEVELS = [
    Level("sse2", "x86-64 as it began, without AVX", X86, "x64", lacks=("SSSE3", "AVX")),
    Level("sse2-qemu", "the same, AVX hidden", X86, "x64", lacks=("SSSE3", "AVX"), qemu="qemu64"),
    Level("sse4.2-qemu", "SSE4.2, AVX hidden", X86, "sse42", ("SSSE3",), ("AVX",), qemu="Westmere"),
    Level("avx", "AVX", X86, "sandybridge", ("AVX",), ("AVX2", "F16C", "FMA")),
    Level("avx2", "AVX2", X86, "haswell", ("AVX2", "FMA", "F16C"), ("AVX512",)),
    Level("avx512", "AVX-512", X86, "skylakex", ("AVX512",), ("AVX512_VNNI",)),
    Level("avx512-vnni", "AVX-512 with VNNI, BF16", X86, "zen4", ("AVX512_VNNI", "AVX512_BF16"), ("AMX_INT8",)),
    Level("amx", "AMX", X86, "sapphirerapids", ("AMX_INT8", "AVX512_VNNI")),
    Level("neon-qemu", "64-bit ARM, NEON", ARM, "armv8.0_1", ("NEON",), ("DOTPROD", "SVE"), qemu="cortex-a72"),
    Level("dotprod-qemu", "64-bit ARM, dot product", ARM, "armv8.2_2", ("DOTPROD",), ("SVE", "MATMUL_INT8"), qemu="neoverse-n1"),
    Level("i8mm-qemu", "64-bit ARM, i8mm", ARM, "i8mm", ("DOTPROD", "MATMUL_INT8"), ("SVE",), qemu="max,sve=off"),
    Level("sve128-qemu", "64-bit ARM, i8mm, SVE of 128 bits", ARM, "armv8.6_1", ("SVE", "MATMUL_INT8"), qemu="max,sve128=on"),
    Level("sve256-qemu", "64-bit ARM, i8mm, SVE of 256 bits", ARM, "armv8.6_1", ("SVE", "MATMUL_INT8"), qemu="max,sve256=on"),
]


@dataclass
class Result:
    name: str
    compiled_for: str
    how: str
    passed: int = 0
    failed: int = 0
    measurements: list[dict] = field(default_factory=list)

    def row(self) -> str:
        exact = [row["difference"] for row in self.measurements if "full" not in row]
        ratios = [row["difference"] / row["full"] for row in self.measurements if "full" in row]
        noise = [row["noise"] for row in self.measurements if "noise" in row]
        numbers = [
            f"{max(exact):.1e}" if exact else "",
            f"{max(ratios):.2f}" if ratios else "",
            f"{max(noise):.3f}" if noise else "",
        ]
        passed = f"{self.passed} of {self.passed + self.failed}" if self.measurements or self.failed else ""
        return f"| {' | '.join([self.name, self.compiled_for, self.how, passed, *numbers])} |"


HEAD = (
    "| processor | compiled for | run | tests passed | f32 KV: largest difference | elsewhere: hybrid ÷ full model's "
    "| quantized: noise ÷ logits |\n| --- | --- | --- | --: | --: | --: | --: |"
)


def driver_of(level: Level) -> tuple[list[str], str]:
    """What starts the driver for a level, and how it runs, in words. Raises LookupError where this machine can't."""
    built = level.machine.path
    library = built / f"libggml-cpu-{level.library}.so"
    driver = [built / "driver", library]
    if level.qemu:
        return [*level.machine.qemu(level.qemu), *driver], f"qemu, {level.qemu}"
    if int(output([*driver, "score"])):
        return driver, "this processor"
    if level.key == "amx" and int(output([built / "driver", built / "libggml-cpu-zen4.so", "score"])):
        return ["env", f"LD_PRELOAD={built / 'amx_emulator.so'}", *driver, "unsupported"], "tile instructions emulated"
    raise LookupError("not run: this processor can't")


def output(command: list, **options) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise BuildError(f"{shlex.join(map(str, command))}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def compiled_for(level: Level, driver: list) -> str:
    """The features that ggml names. Raises BuildError if they are not those of the level."""
    words = output(driver, input="features\n").split()[1:]
    found = [name for name, _, value in (word.partition("=") for word in words) if value != "0"]
    wrong = [name for name in level.has if name not in found] + [name for name in level.lacks if name in found]
    if wrong:
        raise BuildError(f"{driver[-1]} has {', '.join(found)}: not as it should be are {', '.join(wrong)}")
    return ", ".join(name for name in found if name not in ("LLAMAFILE", "OPENMP", "REPACK", "SVE_CNT")) or "SSE2"


def run_tests(result: Result, key: str, arguments: list[str], environment: dict[str, str]) -> None:
    results = WORK / "results"
    results.mkdir(parents=True, exist_ok=True)
    report, measurements = results / f"{key}.xml", results / f"{key}.jsonl"
    for file in (report, measurements):
        file.unlink(missing_ok=True)
    options = ["-q", "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}", "--measurements", measurements]
    command = [sys.executable, "-m", "pytest", *options, *arguments]
    pytest = subprocess.run(command, cwd=ROOT, env=os.environ | environment, stdout=sys.stderr)
    if pytest.returncode not in (0, 1):
        raise BuildError(f"{result.name}: pytest ended with {pytest.returncode}, its output is above")
    suite = xml.parse(report).getroot().find("testsuite")
    result.failed = int(suite.get("failures")) + int(suite.get("errors"))
    result.passed = int(suite.get("tests")) - int(suite.get("skipped")) - result.failed
    if measurements.exists():
        result.measurements = [json.loads(line) for line in measurements.read_text().splitlines()]


def check(level: Level) -> Result:
    try:
        driver, how = driver_of(level)
    except LookupError as error:
        return Result(level.name, "", str(error))
    result = Result(level.name, compiled_for(level, driver), how)
    say(f"{level.name} ({how}): {result.compiled_for}")
    run_tests(result, level.key, level.arguments, {"LT_TEST_DRIVER": shlex.join(map(str, driver))})
    return result


def check_native() -> Result:
    """The installed library, in the tests' own process, as `make test` runs all of the oracle."""
    result = Result("native", "this processor", "as installed, in Python's process")
    say(f"{NATIVE}: the installed library")
    run_tests(result, NATIVE, KERNELS, {})
    return result


def say(text: str) -> None:
    print(f"cpu_levels: {text}", file=sys.stderr, flush=True)


def chosen(only: str | None) -> list[str]:
    keys = [NATIVE, *(level.key for level in LEVELS)]
    if only is None:
        return keys
    wanted = only.split(",")
    if unknown := [key for key in wanted if key not in keys]:
        sys.exit(f"cpu_levels: error: there is no level {unknown[0]!r}: choose of {','.join(keys)}")
    return [key for key in keys if key in wanted]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="levels, separated by commas")
    parser.add_argument("--list", action="store_true", help="what levels there are")
    options = parser.parse_args()
    keys = chosen(options.only)
    levels = [level for level in LEVELS if level.key in keys]
    start = time.monotonic()
    if options.list:
        print("\n".join(keys))
        return
    try:
        if missing := missing_tools({level.machine for level in levels}, any(level.qemu for level in levels)):
            raise BuildError(missing)
        for machine in Machine:
            if libraries := {level.library for level in levels if level.machine == machine}:
                build(machine, libraries | ({"zen4"} if "sapphirerapids" in libraries else set()), say)
        results = [check_native()] if NATIVE in keys else []
        results += [check(level) for level in levels]
    except BuildError as error:
        sys.exit(f"cpu_levels: error: {error}")
    except KeyboardInterrupt:
        say("interrupted")
        sys.exit(130)
    print(HEAD, *(result.row() for result in results), sep="\n")
    used = os.times()
    cpu = used.children_user + used.children_system
    say(f"{(time.monotonic() - start) / 60:.1f} minutes, {cpu / 60:.1f} of a core's time")
    if failed := [result.name for result in results if result.failed]:
        sys.exit(f"cpu_levels: error: tests failed for: {', '.join(failed)}")


if __name__ == "__main__":
    main()
