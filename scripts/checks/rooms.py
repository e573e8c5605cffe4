"""The rooms of the package, in the order in which they build on one another, and the imports that say so.

    python scripts/checks/rooms.py [ROOT]    prints which room imports which, and what points the wrong way; exits with 1 then

A room is a folder of lt_gguf/, or a module that lies beside them. tests/test_architecture.py asserts what this prints.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "lt_gguf"

# The way of the data, from what everything is built on to what a person types. A room imports those above it.
ORDER = (
    "spec",  # what streams
    "statistics",  # how sure a number is
    "memory",  # what a cache takes
    "gguf",  # the file
    "models",  # where a file comes from
    "checkpoint",  # what a file is made from
    "hf",  # torch: streaming attention, lazy ratios
    "runtime",  # the native library
    "calibration",  # the texts that are measured on
    "selection",  # which layers
    "report",  # what is told of a choice
    "evaluation",  # what a hybrid loses
    "bench",  # how fast it is, and beside whom
    "analysis",  # a model is measured, and a strategy chooses
    "conversion",  # a checkpoint becomes a file
    "training",  # a checkpoint learns to stream
    "documents",  # a file that a person wants to ask about
    "chat",  # the conversation about it
    "llm_plugin",  # answers for llm, the command-line tool
    "server",  # the same in a browser, and for other programs
    "cli",
)


class Import(NamedTuple):
    """A line that imports a module: anywhere in the file, within functions and for type checkers too."""

    importer: str
    imported: str
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.importer} imports {self.imported}"


def imports(root: Path = ROOT) -> list[Import]:
    """All imports of one module of the package by another."""
    modules = {module_name(path.relative_to(root)): path for path in sorted((root / PACKAGE).rglob("*.py"))}
    return [
        Import(importer, imported, path.relative_to(root), line)
        for importer, path in modules.items()
        for imported, line in imported_by(ast.parse(path.read_text(encoding="utf-8")), modules)
        if imported != importer
    ]


def room(module: str) -> str:
    """The room of a module; that of `lt_gguf` itself, which only names what is public, is empty."""
    return module.split(".")[1] if "." in module else ""


def arrows(found: Sequence[Import]) -> dict[tuple[str, str], list[Import]]:
    """The imports between rooms, by importing and imported room. Those of the package's own `__init__` don't count."""
    between: dict[tuple[str, str], list[Import]] = {}
    for line in found:
        pair = room(line.importer), room(line.imported)
        if all(pair) and pair[0] != pair[1]:
            between.setdefault(pair, []).append(line)
    return between


def wrong(found: Sequence[Import]) -> list[str]:
    """A line for each import that points the wrong way, and for a room that has no place in the order."""
    lines = []
    for (importer, imported), here in arrows(found).items():
        if unknown := [name for name in (importer, imported) if name not in ORDER]:
            lines.append(f"{here[0]}: the room {unknown[0]} has no place in ORDER, scripts/checks/rooms.py")
        elif ORDER.index(imported) >= ORDER.index(importer):
            lines += [f"{line}, a room that is built on {importer}" for line in here]
    return lines


def circle(found: Sequence[Import]) -> list[str]:
    """The modules of a circle of imports, the first one again at the end; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for line in found:
        graph.setdefault(line.importer, set()).add(line.imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def module_name(path: Path) -> str:
    """The name of the module in a file, given by its path from the root."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_by(tree: ast.Module, modules: Mapping[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules, of these, that a file imports, each with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # note: `from lt_gguf.report import plots` imports a module, `from lt_gguf.spec import Typed` a name of one
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in within]
        else:
            continue
        for name in dict.fromkeys(names):
            if name in modules:
                yield name, node.lineno


def main() -> None:
    found = imports(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
    between = arrows(found)
    rooms = sorted({name for pair in between for name in pair}, key=lambda name: ORDER.index(name) if name in ORDER else -1)
    for name in rooms:
        below = [imported for imported in rooms if (name, imported) in between]
        print(f"{name:<12} {'imports ' + ', '.join(below) if below else 'imports none of them'}")
    print(f"{len(rooms)} rooms, {len(between)} arrows between them, {len(found)} imports")
    problems = wrong(found)
    if loop := circle(found):
        problems.append(f"a circle: {' -> '.join(loop)}")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
