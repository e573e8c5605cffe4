"""Where the patched libraries and tools are, and llama-cpp-python on top of them.

The build puts them into the installed package: `lib/` (shared libraries), `bin/` (llama.cpp's tools, and in a wheel for
other machines ggml's backends), `upstream/` (its converter's Python files) and, in such a wheel, `vendor/`
(llama-cpp-python's Python files). A checkout has only our own Python files; imported from there, the package takes the
rest from the installed distribution, so edits to Python need no new build.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

from lt_gguf.runtime import crash
from lt_gguf.runtime.binding import CPU_MODULES, BindingFinder, NoBackend, load_backends
from lt_gguf.runtime.cpu import short_spins

BINDING = "llama-cpp-python"
BINDING_VERSION = "0.3.36"  # ggml-patch/UPSTREAM.toml: its ctypes structures must be those of our libllama
LIBRARY = "libllama.dylib" if sys.platform == "darwin" else "libllama.so"
OVERRIDE = "LT_GGUF_LIB_PATH"  # for development: a directory that holds libraries, and maybe tools, of another build


class LibraryError(ImportError):
    """The patched libraries are missing, or llama-cpp-python isn't the one that fits them."""


def library_dir() -> Path:
    """Directory of the shared libraries. Raises LibraryError if there is none."""
    if override := os.environ.get(OVERRIDE):
        if not (Path(override) / LIBRARY).exists():
            raise LibraryError(f"{OVERRIDE}={override} holds no {LIBRARY}: name a directory that does, or unset it")
        return Path(override).resolve()
    return _package_part("lib")


def tool_path(name: str) -> Path:
    """Path of one of llama.cpp's tools, such as "llama-quantize". Raises LibraryError if it isn't there."""
    if os.environ.get(OVERRIDE) and (tool := library_dir() / name).exists():
        return tool
    directory = _package_part("bin")
    if (tool := directory / name).exists():
        return tool
    tools = ", ".join(sorted(path.name for path in directory.iterdir()))
    raise LibraryError(f"there is no tool {name!r} in {directory}; there are {tools}")


def upstream_dir() -> Path:
    """Directory of upstream's `conversion` package and of `gguf-py`. Raises LibraryError if it isn't there."""
    return _package_part("upstream")


def backend_dir() -> Path:
    """Directory of ggml's modules, in a package built for other machines. Raises LibraryError if there are no libraries."""
    directory = library_dir()
    tools = directory.parent / "bin"  # where ggml finds them for the tools; a development directory has all in one
    return tools if any(tools.glob(CPU_MODULES)) else directory


def use_our_libraries() -> None:
    """Make `import llama_cpp`, here or anywhere later in the process, load our libraries and their backends.

    Raises LibraryError if it was imported with others before, or if its version doesn't fit. Where libraries or binding
    are missing it does nothing: describing a file needs neither, and `load_llama_cpp` reports it when it does.
    """
    try:
        directory = library_dir()
    except LibraryError:
        if os.environ.get(OVERRIDE):
            raise
        return
    if (binding := sys.modules.get("llama_cpp")) is not None:
        _check_libraries(binding, directory)
    carried = _carried_binding()
    version = BINDING_VERSION if carried else _binding_version()
    if version not in (None, BINDING_VERSION):
        raise LibraryError(f"{BINDING} {version} is installed, but lt-gguf's libraries need {BINDING_VERSION}: {_how_to_install()}")
    if not any(isinstance(finder, BindingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, BindingFinder(carried, _load_backends))
    if binding is not None and hasattr(binding, "llama_cpp"):
        _load_backends(binding)
    os.environ["LLAMA_CPP_LIB_PATH"] = os.environ["MTMD_CPP_LIB"] = str(directory)


@cache
def load_llama_cpp() -> ModuleType:
    """The `llama_cpp` package, running on our libraries. Raises LibraryError: what is missing or doesn't fit."""
    directory = library_dir()
    if _carried_binding() is None and _binding_version() is None:
        raise LibraryError(f"{BINDING} isn't installed: {_how_to_install()}")
    use_our_libraries()
    with short_spins():
        binding = crash.load_library(lambda: import_module("llama_cpp"))
    _check_libraries(binding, directory)
    if not hasattr(binding.llama_cpp._lib, "lt_model_spec"):
        raise LibraryError(
            f"{directory / LIBRARY} is a llama.cpp without lt-gguf's patch: unset {OVERRIDE}, or install lt-gguf again"
        )
    crash.library_loaded(binding.llama_cpp._lib)
    _load_backends(binding)  # where another import hook found the binding before ours
    return binding


def _package_part(name: str) -> Path:
    beside = Path(__file__).resolve().parent.parent / name
    if beside.is_dir():
        return beside
    try:
        installed = Path(str(metadata.distribution("lt-gguf").locate_file(f"lt_gguf/{name}")))
    except metadata.PackageNotFoundError:
        installed = None
    if installed is None or not installed.is_dir():
        raise LibraryError(f"lt-gguf's {name}/ is missing: it is compiled by `pip install .` in the checkout (or `make build`)")
    return installed.resolve()


def _carried_binding() -> Path | None:
    """The directory with the binding's Python files, where the package carries them."""
    try:
        return _package_part("vendor")
    except LibraryError:
        return None


def _load_backends(binding: ModuleType) -> None:
    try:
        load_backends(Path(binding.llama_cpp._lib._name), backend_dir())
    except NoBackend as error:
        raise LibraryError(str(error)) from None


def _binding_version() -> str | None:
    try:
        return metadata.version(BINDING)
    except metadata.PackageNotFoundError:
        return None


def _check_libraries(binding: ModuleType, directory: Path) -> None:
    loaded = getattr(sys.modules.get("llama_cpp.llama_cpp"), "_lib", None)
    if loaded is None:  # imported in part: its own error is on its way
        return
    if Path(loaded._name).resolve().parent != directory:
        raise LibraryError(
            f"llama_cpp was imported with {loaded._name} before lt_gguf, which needs {directory / LIBRARY}: import lt_gguf first"
        )


def _how_to_install() -> str:
    return f"run CMAKE_ARGS=-DLLAMA_BUILD=OFF {Path(sys.executable).name} -m pip install {BINDING}=={BINDING_VERSION}"
