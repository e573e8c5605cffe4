"""Builds libllama from the pinned source as it is, without our patch: the reference for everything that doesn't stream.

    python scripts/setup/build_stock.py [DIRECTORY]    (default build/stock); prints where the libraries are

Same source, compiler and options as the package (CMAKE_ARGS included), so the two must agree bit for bit. Takes three
minutes on 2 cores the first time and nothing after that. Wants cmake and ninja, on the path or from pip.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ggml-patch"))

from upstream import BuildError, Pin, fetch_sdist, unpack

DEFAULT_DIRECTORY = ROOT / "build" / "stock"


def build_stock(directory: Path = DEFAULT_DIRECTORY) -> Path:
    """Builds what isn't built yet and returns the directory of the libraries. Raises BuildError: one line."""
    directory = directory.resolve()
    pin = Pin.load()
    source = directory / f"llama.cpp-{pin.commit}"
    if not source.exists():
        unpack(fetch_sdist(pin), pin, source)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for tool in ("cmake", "ninja"):
        if not shutil.which(tool, path=environment["PATH"]):
            raise BuildError(f"{tool} isn't on the path: pip install {tool}")
    options = ["-DCMAKE_BUILD_TYPE=Release", f"-DLT_SOURCE_TREE={source}", f"-DLT_UPSTREAM_COMMIT={pin.commit}"]
    if shutil.which("ccache"):
        options += ["-DCMAKE_C_COMPILER_LAUNCHER=ccache", "-DCMAKE_CXX_COMPILER_LAUNCHER=ccache"]
    options += shlex.split(os.environ.get("CMAKE_ARGS", ""))
    log = directory / "build.log"
    run(["cmake", "-G", "Ninja", "-S", ROOT, "-B", directory, *options], log, environment)
    run(["ninja", "-C", directory, "llama"], log, environment)
    return directory / "bin"


def run(command: list, log: Path, environment: dict[str, str]) -> None:
    with open(log, "w") as file:
        if subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode:
            raise BuildError(f"{command[0]} failed; the whole log is in {log}")


if __name__ == "__main__":
    try:
        print(build_stock(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_DIRECTORY))
    except BuildError as error:
        sys.exit(f"build_stock: error: {error}")
