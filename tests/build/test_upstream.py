"""The patched tree: what is written, what is left alone, what each failure says. Upstream is a small tarball."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "src/CMakeLists.txt": "a.cpp\nb.cpp\n",
    "src/a.cpp": "int a;\nint x;\nint y;\n",
    "src/b.cpp": "int b;\n",
    "include/a.h": "",
    "docs/a.md": "",
    "LICENSE": "MIT\n",
}
PATCH = """\
--- a/src/a.cpp
+++ b/src/a.cpp
@@ -1,2 +1,3 @@
 int a;
+int hook;
 int x;
"""


class Project:
    """A copy of ggml-patch/ with a small upstream, its cache and a tree."""

    def __init__(self, path: Path) -> None:
        self.patch_dir, self.cache, self.tree = path / "ggml-patch", path / "cache", path / "build" / "llama.cpp"
        (self.patch_dir / "src").mkdir(parents=True)
        self.cache.mkdir()
        for name in ("upstream.py", "pinned_source.py"):
            shutil.copy(ROOT / "ggml-patch" / name, self.patch_dir)
        self.hooks = self.patch_dir / "hooks.patch"
        self.hooks.write_text(PATCH)
        for name in ("lt.h", "lt-a.cpp"):
            (self.patch_dir / "src" / name).write_text(f"// {name}\n")
        self.sdist = self.cache / "up-1.tar.gz"
        with tarfile.open(self.sdist, "w:gz") as archive:
            for name, text in {**{f"vendor/llama.cpp/{k}": v for k, v in FILES.items()}, "LICENSE.md": "MIT\n"}.items():
                member = tarfile.TarInfo(f"up-1/{name}")
                member.size, member.mtime = len(text), 1_000_000_000
                archive.addfile(member, io.BytesIO(text.encode()))
        self.pin(hashlib.sha256(self.sdist.read_bytes()).hexdigest())

    def pin(self, sha256: str) -> None:
        fields = {
            "package": "no-such-package-lt",
            "version": "1",
            "sdist": self.sdist.name,
            "sha256": sha256,
            "llama_cpp": "vendor/llama.cpp",
            "commit": "c0ffee",
        }
        (self.patch_dir / "UPSTREAM.toml").write_text("".join(f'{k} = "{v}"\n' for k, v in fields.items()))

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "LT_GGUF_CACHE": str(self.cache),
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": "",
            "GIT_CONFIG_GLOBAL": os.devnull,
        }
        return subprocess.run(
            [sys.executable, self.patch_dir / "upstream.py", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=environment,
        )

    def sync(self) -> None:
        done = self.run("sync", self.tree)
        assert done.returncode == 0, done.stderr

    def error(self, *arguments: object) -> str:
        done = self.run(*arguments)
        assert done.returncode == 1
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("lt-gguf: error: ")
        return lines[0]

    def written_by(self, action) -> set[str]:
        def stamps() -> dict[str, int]:
            return {
                str(p.relative_to(self.tree)): p.stat().st_mtime_ns
                for p in self.tree.rglob("*")
                if p.is_file() and p.name != ".lt-gguf.json"
            }

        before = stamps()
        action()
        after = stamps()
        return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_the_tree_is_upstream_with_patch_and_sources(project: Project) -> None:
    project.sync()
    assert (project.tree / "src/a.cpp").read_text() == "int a;\nint hook;\nint x;\nint y;\n"
    assert (project.tree / "src/b.cpp").read_text() == FILES["src/b.cpp"]
    assert (project.tree / "include/lt.h").read_text() == "// lt.h\n"
    assert (project.tree / "src/lt-a.cpp").exists()
    assert (project.tree / "licenses/LICENSE-llama-cpp-python").exists()
    assert not (project.tree / "docs").exists()


def test_a_second_run_writes_nothing(project: Project) -> None:
    project.sync()
    assert project.written_by(project.sync) == set()


def test_only_what_changed_is_written(project: Project) -> None:
    project.sync()

    project.hooks.write_text(PATCH.replace("hook", "other"))
    assert project.written_by(project.sync) == {"src/a.cpp"}

    (project.patch_dir / "src/lt-a.cpp").write_text("// new\n")
    assert project.written_by(project.sync) == {"src/lt-a.cpp"}

    (project.patch_dir / "src/lt-a.cpp").unlink()
    assert project.written_by(project.sync) == {"src/lt-a.cpp"}
    assert not (project.tree / "src/lt-a.cpp").exists()


def test_a_file_that_the_patch_no_longer_touches_is_pristine_again(project: Project) -> None:
    project.sync()
    project.hooks.write_text("--- a/src/b.cpp\n+++ b/src/b.cpp\n@@ -1 +1,2 @@\n int b;\n+int hook;\n")
    assert project.written_by(project.sync) == {"src/a.cpp", "src/b.cpp"}
    assert (project.tree / "src/a.cpp").read_text() == FILES["src/a.cpp"]


def test_a_patched_file_edited_by_hand_is_put_right(project: Project) -> None:
    project.sync()
    (project.tree / "src/a.cpp").write_text("garbage")
    assert project.written_by(project.sync) == {"src/a.cpp"}
    assert "int hook;" in (project.tree / "src/a.cpp").read_text()


def test_inside_another_repository_the_patch_still_applies(project: Project) -> None:
    subprocess.run(["git", "init", "--quiet", project.patch_dir.parent], check=True)
    project.sync()
    assert "int hook;" in (project.tree / "src/a.cpp").read_text()


def test_a_patch_that_does_not_apply_says_where_and_changes_nothing(project: Project) -> None:
    project.sync()
    project.hooks.write_text(PATCH.replace(" int x;", " int z;"))

    def fail() -> None:
        message = project.error("sync", project.tree)
        assert "src/a.cpp" in message and "regenerate the patch" in message

    assert project.written_by(fail) == set()


def test_a_missing_patch_is_an_error(project: Project) -> None:
    project.hooks.unlink()
    assert "hooks.patch is missing" in project.error("sync", project.tree)


def test_a_wrong_hash_deletes_the_cached_file_and_says_so(project: Project) -> None:
    project.pin("0" * 64)
    done = project.run("sync", project.tree)
    assert f"deleted {project.sdist}" in done.stdout
    assert not project.sdist.exists() and not project.tree.exists()


def test_no_network_says_what_to_do_and_leaves_nothing(project: Project) -> None:
    project.sdist.unlink()
    message = project.error("sync", project.tree)
    assert "check the network" in message and str(project.cache) in message
    assert list(project.cache.iterdir()) == []


def test_an_edited_worktree_becomes_patch_and_sources(project: Project, tmp_path: Path) -> None:
    worktree = tmp_path / "worktree"
    assert project.run("worktree", worktree).returncode == 0
    assert (worktree / "docs/a.md").exists()
    (worktree / "src/b.cpp").write_text("int b;\nint hook;\n")
    (worktree / "src/lt-b.h").write_text("// lt-b.h\n")
    (worktree / "src/lt-a.cpp").unlink()
    assert project.run("regenerate", worktree).returncode == 0

    assert sorted(p.name for p in (project.patch_dir / "src").iterdir()) == ["lt-b.h", "lt.h"]
    project.sync()
    for name in ("src/a.cpp", "src/b.cpp", "src/lt-b.h"):
        assert (project.tree / name).read_bytes() == (worktree / name).read_bytes()


def test_a_worktree_after_a_bump_names_what_was_rejected(project: Project, tmp_path: Path) -> None:
    project.hooks.write_text(PATCH.replace(" int x;", " int z;"))
    assert "src/a.cpp.rej" in project.error("worktree", tmp_path / "worktree")
    assert (tmp_path / "worktree/src/lt-a.cpp").exists()


def test_the_patch_touches_no_model_file() -> None:
    touched = re.findall(r"^\+\+\+ b/(.+)$", (ROOT / "ggml-patch" / "hooks.patch").read_text(), re.MULTILINE)
    assert touched and not [name for name in touched if name.startswith("src/models/")]
