"""`import lt_gguf` and llama-cpp-python: whose libraries are loaded, and what is said when they don't fit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lt_gguf.runtime.library import (
    BINDING_VERSION,
    LIBRARY,
    LibraryError,
    library_dir,
    load_llama_cpp,
    tool_path,
    upstream_dir,
)

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, cwd=ROOT)


def test_llama_cpp_runs_on_our_libraries() -> None:
    assert Path(load_llama_cpp().llama_cpp._lib._name).parent == library_dir()


def test_a_later_import_of_llama_cpp_runs_on_our_libraries() -> None:
    done = python("import lt_gguf, llama_cpp; print(llama_cpp.llama_cpp._lib._name)")
    assert done.stdout.strip() == str(library_dir() / LIBRARY), done.stderr


def test_importing_the_package_loads_neither_torch_nor_the_library() -> None:
    done = python("import sys, lt_gguf, lt_gguf.cli; print('torch' in sys.modules, 'llama_cpp' in sys.modules)")
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_llama_cpp_imported_first_with_other_libraries_is_an_error(tmp_path: Path) -> None:
    for path in library_dir().iterdir():  # the same libraries, in a place that isn't ours
        if path.is_file():
            shutil.copy(path, tmp_path)
    done = python("import llama_cpp, lt_gguf", LLAMA_CPP_LIB_PATH=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert "LibraryError" in last and str(tmp_path / LIBRARY) in last and "import lt_gguf first" in last


def test_another_version_of_the_binding_is_an_error() -> None:
    code = "from importlib import metadata; metadata.version = lambda name: '0.2.0'; import lt_gguf"
    last = python(code).stderr.strip().splitlines()[-1]
    assert "LibraryError" in last and "0.2.0" in last and f"llama-cpp-python=={BINDING_VERSION}" in last


def test_a_missing_binding_is_an_error_only_when_it_is_needed() -> None:
    code = """
from importlib import metadata
def missing(name): raise metadata.PackageNotFoundError(name)
metadata.version = missing
import lt_gguf
print("imported")
from lt_gguf.runtime.library import load_llama_cpp
load_llama_cpp()
"""
    done = python(code)
    assert done.stdout.strip() == "imported"
    assert "llama-cpp-python isn't installed: run" in done.stderr.strip().splitlines()[-1]


def test_a_development_directory_without_libraries_is_an_error(tmp_path: Path) -> None:
    done = python("import lt_gguf", LT_GGUF_LIB_PATH=str(tmp_path))
    last = done.stderr.strip().splitlines()[-1]
    assert "LibraryError" in last and str(tmp_path) in last


def test_tools_and_upstream_s_files_are_found() -> None:
    assert os.access(tool_path("llama-quantize"), os.X_OK)
    assert (upstream_dir() / "conversion" / "__init__.py").exists()
    with pytest.raises(LibraryError, match="no tool 'llama-nothing'"):
        tool_path("llama-nothing")


@pytest.mark.parametrize("tool", ["server", "cli", "bench", "batched-bench", "perplexity", "quantize", "imatrix"])
def test_every_tool_finds_its_libraries(tool: str) -> None:
    done = subprocess.run([tool_path(f"llama-{tool}"), "--help"], capture_output=True, text=True)
    assert "usage" in (done.stdout + done.stderr).lower()


def test_the_rpc_server_finds_its_libraries() -> None:
    done = subprocess.run([tool_path("rpc-server"), "--help"], capture_output=True, text=True)
    assert "usage" in (done.stdout + done.stderr).lower()


def test_the_notices_of_upstream_go_with_the_package() -> None:
    names = {path.name for path in (upstream_dir() / "licenses").iterdir()}
    assert {
        "LICENSE-llama.cpp",
        "LICENSE-llama-cpp-python",
        "LICENSE-gguf-py",
        "LICENSE-cpp-httplib",
        "LICENSE-jsonhpp",
    } <= names
