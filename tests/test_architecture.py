"""How the package is built: which room may import which, that there are no circles, and what must not need torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "checks"))

import rooms

# What runs a command under a name of its own, and nothing else.
ENTRIES = ("convert/hf_to_gguf_lt.py", "scripts/train_lt.py")
# What prints the commands' own help into the documentation.
HELP = ("scripts/docs/mkdocs_hooks.py",)
# The torch side: these alone may need it when they are imported.
TORCH = ("lt_gguf.hf.", "lt_gguf.checkpoint.checks", "lt_gguf.checkpoint.weights", "lt_gguf.training.")
NO_TORCH_IN_THEM = ("lt_gguf.training.settings",)
# Upstream's converter and lm-evaluation-harness bring it along.
OTHERS = ("lt_gguf.conversion.worker", "lt_gguf.evaluation.lm_eval_cli", "lt_gguf.evaluation.lm_eval_model")


def test_every_import_points_back_along_the_way_of_the_data():
    found = rooms.imports()
    between = rooms.arrows(found)
    print(f"{len({room for pair in between for room in pair})} rooms, {len(between)} arrows between them")
    assert not rooms.wrong(found), "\n".join(rooms.wrong(found))


def test_there_are_no_circles():
    for folder in (ROOT, *(path for path in (ROOT / "scripts").iterdir() if path.is_dir())):
        found = rooms.imports(folder) if folder == ROOT else imports_beside(folder)
        assert not rooms.circle(found), " -> ".join(rooms.circle(found))


def imports_beside(folder: Path) -> list[rooms.Import]:
    """What the scripts of a folder import of each other."""
    modules = {path.stem: path for path in folder.glob("*.py")}
    return [
        rooms.Import(importer, imported, path, line)
        for importer, path in modules.items()
        for imported, line in rooms.imported_by(ast.parse(path.read_text()), modules)
    ]


@pytest.mark.parametrize(
    "files, complaint",
    [
        (
            {"spec": "from lt_gguf.runtime import llama", "runtime/llama": ""},
            "lt_gguf/spec.py:1: lt_gguf.spec imports lt_gguf.runtime.llama, a room that is built on spec",
        ),
        (
            {"gguf/file": "def f():\n    import lt_gguf.cli.run", "cli/run": ""},
            "lt_gguf/gguf/file.py:2: lt_gguf.gguf.file imports lt_gguf.cli.run, a room that is built on gguf",
        ),
        (
            {"attic": "import lt_gguf.spec", "spec": ""},
            "lt_gguf/attic.py:1: lt_gguf.attic imports lt_gguf.spec: the room attic has no place in ORDER, scripts/checks/rooms.py",
        ),
    ],
)
def test_a_wrong_arrow_is_named(files, complaint, tmp_path):
    for name, text in files.items():
        path = tmp_path / "lt_gguf" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert rooms.wrong(rooms.imports(tmp_path)) == [complaint]


def test_a_circle_is_named(tmp_path):
    (tmp_path / "lt_gguf").mkdir()
    (tmp_path / "lt_gguf" / "a.py").write_text("from lt_gguf import b")
    (tmp_path / "lt_gguf" / "b.py").write_text("if TYPE_CHECKING:\n    from lt_gguf.a import A")
    assert set(rooms.circle(rooms.imports(tmp_path))) == {"lt_gguf.a", "lt_gguf.b"}


def test_only_entries_import_the_commands():
    commands = {"lt_gguf.cli": ROOT} | {f"lt_gguf.cli.{path.stem}": path for path in (ROOT / "lt_gguf" / "cli").glob("*.py")}
    for folder in ("scripts", "convert", "cmake", "ggml-patch"):
        for path in (ROOT / folder).rglob("*.py"):
            name, text = path.relative_to(ROOT).as_posix(), path.read_text()
            for imported, line in rooms.imported_by(ast.parse(text), commands):
                assert name in ENTRIES + HELP, f"{name}:{line}: imports {imported}"
    for name in ENTRIES:
        assert len((ROOT / name).read_text().splitlines()) < 15, f"{name} is more than an entry"


def test_nothing_but_the_torch_side_needs_torch():
    modules = [rooms.module_name(path.relative_to(ROOT)) for path in sorted((ROOT / "lt_gguf").rglob("*.py"))]
    without = [name for name in modules if (not name.startswith(TORCH) or name in NO_TORCH_IN_THEM) and name not in OTHERS]
    assert len(modules) - len(without) < len(modules) / 4
    code = (
        "import sys; sys.modules |= dict.fromkeys(('torch', 'transformers', 'safetensors', 'matplotlib', 'huggingface_hub'))\n"
        "from importlib import import_module\n"
        "for name in sys.argv[1:]:\n"
        "    try: import_module(name)\n"
        "    except ImportError as error: sys.exit(f'{name}: {error}')\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *without], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
