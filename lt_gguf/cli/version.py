"""`lt-gguf --version`: what is installed, for a report of a fault."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated

import typer


def show(asked: bool) -> None:
    """Prints it and ends, if it is asked for."""
    if asked:
        print("\n".join(lines()))
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=show, is_eager=True, help="Show the versions of lt-gguf and llama.cpp, and the backends."),
]


def lines() -> list[str]:
    """The package's version, llama.cpp's commit, and a line a backend; or why there are no native libraries."""
    from lt_gguf.runtime.library import BINDING, LibraryError, load_llama_cpp

    try:
        own = metadata.version("lt-gguf")
    except metadata.PackageNotFoundError:
        own = "(not installed)"
    try:
        binding = load_llama_cpp()
    except LibraryError as error:
        return [f"lt-gguf {own}", f"no native library: {error}"]
    from lt_gguf.runtime import build_info
    from lt_gguf.runtime.log import captured_errors

    with captured_errors(forward=False):  # a backend may have something to say when it is loaded
        backends = build_info.backends()
    llama_cpp = f"llama.cpp {build_info.llama_cpp_commit() or '(unknown commit)'}, patched; {BINDING} {binding.__version__}"
    return [f"lt-gguf {own}", llama_cpp, *map(str, backends)]
