#!/usr/bin/env python3
"""Renews the locks in requirements/ from the ranges in pyproject.toml; `make lock` runs it.

    build.txt   what compiles and packs lt-gguf
    demo.txt    what `make demo` runs on
    test.txt    what `make test` runs on, all of the above among it
    develop.txt what `make lint` and `make docs` run on, beside that

Each names every package with its version and the hashes of its files, for all platforms and Pythons that lt-gguf supports: the
resolver is uv, which makes one such lock where pip-tools would have to run on each of them. torch isn't in them, nor what of CUDA it
brings along: which build of it fits depends on the machine, and the Makefile's TORCH says which release.
"""

from __future__ import annotations

import argparse
import email
import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ggml-patch"))

from pinned_source import BuildError, Pin, fetch_sdist

FOLDER = ROOT / "requirements"
# lock: extra of pyproject.toml, and dependency groups. The first is the largest, the others take what they share with it from it.
LOCKS = {
    "test": ("test", ["build"]),
    "demo": ("convert", ["build"]),
    "build": (None, ["build"]),
    "develop": (None, ["lint", "docs"]),
}

# What torch needs beside CUDA. With its own metadata uv would lock the CUDA libraries of the package index's build.
TORCH = """\
[[dependency-metadata]]
name = "torch"
requires-dist = [
    "filelock", "fsspec>=0.8.5", "jinja2", "networkx>=2.5.1", "setuptools>=77.0.3", "sympy>=1.13.3", "typing-extensions>=4.10.0",
]
"""
HEADER = "# Made by `make lock` from pyproject.toml, which has the ranges and the reasons. torch is missing on purpose: see scripts/setup/lock.py\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    FOLDER.mkdir(exist_ok=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    with tempfile.TemporaryDirectory(dir=FOLDER, prefix=".lock-") as scratch:
        locks: list[Path] = []
        for name in LOCKS:
            locks.append(compile_lock(Path(scratch) / f"{name}.txt", wanted(name, project), project, locks[:1]))
        for lock in locks:
            n_packages = lock.read_text().count("==")
            os.replace(lock, FOLDER / lock.name)
            print(f"requirements/{lock.name}: {n_packages} packages")


def wanted(name: str, project: dict) -> list[str]:
    """The requirements that a lock has to meet, as pyproject.toml has them."""
    extra, groups = LOCKS[name]
    requirements = [requirement for group in groups for requirement in project["dependency-groups"][group]]
    if "build" in groups:
        requirements += project["build-system"]["requires"]
    if extra is not None:
        requirements += [*project["project"]["dependencies"], *binding_requirements(), *of_extra(extra, project)]
    return requirements


def of_extra(extra: str, project: dict) -> list[str]:
    """The requirements of an extra, those of the extras that it names among them."""
    found = []
    for requirement in project["project"]["optional-dependencies"][extra]:
        if requirement.startswith("lt-gguf["):
            others = requirement.removeprefix("lt-gguf[").removesuffix("]").split(",")
            found += [each for other in others for each in of_extra(other, project)]
        else:
            found.append(requirement)
    return found


def binding_requirements() -> list[str]:
    """What llama-cpp-python asks for; itself it comes from the pinned source."""
    pin = Pin.load()
    with tarfile.open(fetch_sdist(pin)) as archive:
        member = archive.extractfile(f"{pin.sdist.removesuffix('.tar.gz')}/PKG-INFO")
        metadata = email.message_from_bytes(member.read())
    return [requirement for requirement in metadata.get_all("Requires-Dist") if "extra ==" not in requirement]


def compile_lock(lock: Path, requirements: list[str], project: dict, follows: list[Path]) -> Path:
    """Writes a lock; where it has packages of the locks that it follows, it has their versions."""
    settings = lock.with_name("uv.toml")
    settings.write_text(TORCH)
    command = [
        *(sys.executable, "-m", "uv", "--config-file", str(settings), "pip", "compile", "-", "--output-file", str(lock), "--quiet"),
        *("--universal", "--python-version", project["project"]["requires-python"].removeprefix(">=")),
        *("--generate-hashes", "--no-header", "--no-annotate", "--no-emit-package", "torch"),
        *(argument for other in follows for argument in ("--constraint", str(other))),
    ]
    if subprocess.run(command, input="\n".join(requirements), text=True).returncode:
        sys.exit(f"error: uv found no requirements/{lock.name}, its reason is above; nothing has changed")
    lock.write_text(HEADER + lock.read_text())
    return lock


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"error: {error}")
