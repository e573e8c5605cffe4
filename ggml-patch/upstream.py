"""Lays our patch over the pinned upstream source.

    python ggml-patch/upstream.py sync [TREE]        the patched tree that the build compiles (default build/llama.cpp)
    python ggml-patch/upstream.py worktree DIR       a git tree to edit: pristine source committed, our changes on top
    python ggml-patch/upstream.py regenerate DIR     hooks.patch and src/ from such a tree

The build (cmake/lt_gguf_build.py) imports this file. Only the standard library, pip and git are needed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from pinned_source import PATCH_DIR, BuildError, Pin, disk_errors, fetch_sdist, need_space, say

HOOKS = PATCH_DIR / "hooks.patch"
SOURCES = PATCH_DIR / "src"
DEFAULT_TREE = PATCH_DIR.parent / "build" / "llama.cpp"
PUBLIC_HEADER = "lt.h"  # beside llama.h in include/
CPU_SOURCES = "lt-cpu-"  # with such names they are of ggml's CPU backend; every other source of ours goes to src/
STATE = ".lt-gguf.json"  # in a synced tree: which upstream it is and what of it is ours
NOT_COMPILED = ("docs/", "media/", "models/", "benches/", ".github/", ".devops/")  # two thirds of the source's bytes

UNPACKED_BYTES = 70e6  # what sync() writes into a fresh tree


def sync(tree: Path, pin: Pin) -> None:
    """Make `tree` the pinned llama.cpp with our patch and sources.

    A file whose content is right is left alone, so a second build compiles only what changed. One that our patch
    touches and that was edited by hand is put right again.
    """
    sdist = fetch_sdist(pin)
    state = _read_state(tree)
    if state.get("sha256") != pin.sha256:
        say(f"unpacking llama.cpp {pin.commit} into {tree}")
        need_space(tree, UNPACKED_BYTES)
        with disk_errors(tree):
            unpack(sdist, pin, tree)
        state = {"sha256": pin.sha256, "hooks": "", "patched": {}, "sources": []}

    hooks, patched = _hooks(), state["patched"]
    sources = {_home(path.name): path.read_bytes() for path in _our_sources(SOURCES)}
    with disk_errors(tree):
        if state["hooks"] != _digest(hooks) or any(_file_digest(tree / name) != digest for name, digest in patched.items()):
            say("applying ggml-patch/hooks.patch")
            files = _patched(sdist, pin, hooks, also=set(patched))
            for name, content in files.items():
                _write_if_different(tree / name, content)
            patched = {name: _digest(files[name]) for name in _touched(hooks)}
        for name, content in sources.items():
            _write_if_different(tree / name, content)
        for name in set(state["sources"]) - set(sources):
            (tree / name).unlink(missing_ok=True)
        state = {"sha256": pin.sha256, "hooks": _digest(hooks), "patched": patched, "sources": sorted(sources)}
        _write_if_different(tree / STATE, json.dumps(state, indent=1).encode())


def worktree(directory: Path, pin: Pin) -> None:
    """A git tree to edit: the pristine source is its first commit, our patch and sources lie on top, uncommitted."""
    if directory.exists():
        raise BuildError(f"{directory} is there already: name a directory that isn't")
    unpack(fetch_sdist(pin), pin, directory, skip=())
    _git(directory, "init", "--quiet")
    _git(directory, "add", "--all", "--force")
    _git(
        directory,
        "-c",
        "user.name=upstream",
        "-c",
        "user.email=",
        "commit",
        "--quiet",
        "-m",
        f"llama.cpp {pin.commit}, pristine",
    )
    for path in _our_sources(SOURCES):
        shutil.copyfile(path, directory / _home(path.name))
    try:
        _apply(directory, _hooks(), "--reject")
    except BuildError:  # expected after a bump of the pin: what applied is applied
        rejected = sorted(str(path.relative_to(directory)) for path in directory.rglob("*.rej"))
        raise BuildError(f"{directory} is there, but these hunks must be worked in by hand: {', '.join(rejected)}") from None


def regenerate(directory: Path, pin: Pin) -> None:
    """Write hooks.patch and src/ from a tree that `worktree` made, or any git tree whose first commit is pristine."""
    first = _git(directory, "rev-list", "--max-parents=0", "HEAD").split()[-1]
    # One line of context: enough to notice that upstream moved a call site, little enough that most bumps apply.
    format_options = ["--no-color", "--no-ext-diff", "--no-renames", "--src-prefix=a/", "--dst-prefix=b/", "--abbrev=9"]
    patch = _git(directory, "diff", *format_options, "--unified=1", "--diff-filter=M", first, "--")
    if not patch:
        raise BuildError(f"{directory} has no changes against its first commit {first[:9]}")
    _patched(fetch_sdist(pin), pin, patch.encode(), set())  # it must apply to what the build unpacks
    homes = [directory / home for home in ("src", "include", "ggml/src/ggml-cpu")]
    ours = {path.name: path for home in homes for path in _our_sources(home)}
    for name, path in ours.items():
        _write_if_different(SOURCES / name, path.read_bytes())
    for path in _our_sources(SOURCES):
        if path.name not in ours:
            path.unlink()
    _write_if_different(HOOKS, patch.encode())
    say(f"wrote hooks.patch ({len(_touched(patch.encode()))} files) and {len(ours)} sources")


def _home(name: str) -> str:
    if name.startswith(CPU_SOURCES):
        return f"ggml/src/ggml-cpu/{name}"
    return f"include/{name}" if name == PUBLIC_HEADER else f"src/{name}"


def _our_sources(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("lt*") if path.suffix in (".h", ".cpp"))


def _hooks() -> bytes:
    try:
        return HOOKS.read_bytes()
    except FileNotFoundError:
        raise BuildError("ggml-patch/hooks.patch is missing: restore it from git (git checkout ggml-patch/hooks.patch)") from None


def _touched(patch: bytes) -> list[str]:
    return [name.decode() for name in re.findall(rb"^\+\+\+ b/(.+?)\s*$", patch, re.MULTILINE)]


def _patched(sdist: Path, pin: Pin, patch: bytes, also: set[str]) -> dict[str, bytes]:
    """Content of every file that `patch` touches, patched, and of `also`, pristine unless the patch touches them."""
    names = {*_touched(patch), *also}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        with tarfile.open(sdist) as archive:
            for member, name in _members(archive, pin):
                if name in names:
                    _extract(archive, member, root / name)
        _apply(root, patch)
        return {name: (root / name).read_bytes() for name in names if (root / name).exists()}


def _apply(tree: Path, patch: bytes, *options: str) -> None:
    # All or nothing. git must not see a repository around `tree`: it would take paths from its root and skip all.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tree.resolve().parent), "LC_ALL": "C"}
    try:
        command = ["git", "-c", "core.autocrlf=false", "apply", "--whitespace=nowarn", *options, "-"]
        done = subprocess.run(command, cwd=tree, input=patch, env=environment, capture_output=True)
    except FileNotFoundError:
        raise BuildError("git is not installed, and the build applies its patch with it: install git and run it again") from None
    if done.returncode:
        where = done.stderr.decode(errors="replace").strip().splitlines() or ["git apply failed"]
        raise BuildError(
            f"ggml-patch/hooks.patch does not apply to the pinned llama.cpp ({where[0].removeprefix('error: ')}): "
            "regenerate the patch, see ggml-patch/README.md"
        )


def unpack(sdist: Path, pin: Pin, tree: Path, skip: tuple[str, ...] = NOT_COMPILED) -> None:
    """Replace `tree` by llama.cpp's part of the archive; interrupted, it leaves the old one or none, never a half."""
    fresh = tree.with_name(tree.name + ".unpacking")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with tarfile.open(sdist) as archive:
            for member, name in _members(archive, pin):
                if not name.startswith(skip):
                    _extract(archive, member, fresh / name)
            # the binding's own licence lies outside of llama.cpp's folder, and goes with the built package
            licence = archive.getmember(f"{pin.sdist.removesuffix('.tar.gz')}/LICENSE.md")
            _extract(archive, licence, fresh / "licenses" / "LICENSE-llama-cpp-python")
        shutil.rmtree(tree, ignore_errors=True)
        os.replace(fresh, tree)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def _members(archive: tarfile.TarFile, pin: Pin) -> Iterator[tuple[tarfile.TarInfo, str]]:
    prefix = f"{pin.sdist.removesuffix('.tar.gz')}/{pin.llama_cpp}/"
    for member in archive:
        # .git there points to a repository that isn't, which confuses git and upstream's CMake files
        if member.isfile() and member.name.startswith(prefix) and member.name != f"{prefix}.git":
            yield member, member.name.removeprefix(prefix)


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.extractfile(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
    path.chmod(0o755 if member.mode & 0o100 else 0o644)
    os.utime(path, (member.mtime, member.mtime))


def _read_state(tree: Path) -> dict:
    try:
        return json.loads((tree / STATE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def _write_if_different(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_bytes(content)
    if path.exists():
        shutil.copymode(path, fresh)
    os.replace(fresh, path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_digest(path: Path) -> str:
    return _digest(path.read_bytes()) if path.exists() else ""


def _git(directory: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(directory), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"git {arguments[0]} failed in {directory}: {done.stderr.strip()}")
    return done.stdout


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sync").add_argument("tree", nargs="?", type=Path, default=DEFAULT_TREE)
    commands.add_parser("worktree").add_argument("tree", type=Path)
    commands.add_parser("regenerate").add_argument("tree", type=Path)
    options = parser.parse_args(arguments)
    try:
        {"sync": sync, "worktree": worktree, "regenerate": regenerate}[options.command](options.tree.resolve(), Pin.load())
    except BuildError as error:
        sys.exit(f"lt-gguf: error: {error}")


if __name__ == "__main__":
    main()
