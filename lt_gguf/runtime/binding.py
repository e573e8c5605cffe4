"""What happens when `llama_cpp` is imported, by us or by a script: where it is found, and which ggml backends it gets.

A package built for this machine links its backends: libllama brings them along. One for other machines holds a module
for each kind of CPU, and in a Python process nothing loads them by itself: ggml looks beside the running program, and
that is Python. So they are loaded when the binding is imported, before a script can ask it for a model.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

from lt_gguf.runtime.cpu import cpu_name

PACKAGE = "llama_cpp"
CPU_MODULES = "libggml-cpu*.so"  # .so on macOS, too: to CMake they are modules, not libraries
CPU_DEVICE = 0  # enum ggml_backend_dev_type


class NoBackend(RuntimeError):
    """No backend for this CPU could be loaded."""


class BindingFinder:
    """An import hook for `llama_cpp`: finds it in `carried`, where the package carries it, and then calls `imported`."""

    def __init__(self, carried: Path | None, imported: Callable[[ModuleType], None]) -> None:
        self.carried, self.imported = carried, imported

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != PACKAGE:
            return None
        spec = PathFinder.find_spec(name, [str(self.carried)] if self.carried else path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                self.imported(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one loader
        return spec


def load_backends(libllama: Path, directory: Path) -> None:
    """Load from `directory` the best of ggml's modules for this machine, unless `libllama` has its backends already.

    Raises NoBackend where none of them runs on this CPU, or none is there.
    """
    library = ctypes.CDLL(str(libllama))  # a handle of our own: the types that the binding declared stay as they are
    count, load, by_type = (
        library.ggml_backend_reg_count,
        library.ggml_backend_load_all_from_path,
        library.ggml_backend_dev_by_type,
    )
    count.restype, count.argtypes = ctypes.c_size_t, ()
    load.restype, load.argtypes = None, (ctypes.c_char_p,)
    by_type.restype, by_type.argtypes = ctypes.c_void_p, (ctypes.c_int,)
    if count() == 0:
        with _silence(library):  # ggml reports each module that it loads
            load(os.fsencode(directory))
    if by_type(CPU_DEVICE):
        return
    modules = list(directory.glob(CPU_MODULES))
    if not modules:
        raise NoBackend(f"{directory} holds none of ggml's modules for CPUs ({CPU_MODULES}): install lt-gguf again")
    raise NoBackend(
        f"none of the {len(modules)} modules {CPU_MODULES} in {directory} runs on this CPU ({cpu_name()}): "
        "install lt-gguf from its source on this machine (pip install . in a checkout)"
    )


class _silence:
    """Nothing that ggml logs in the with block is shown."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.get, self.set = library.ggml_log_get, library.ggml_log_set
        self.callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        self.before, self.before_data = ctypes.c_void_p(), ctypes.c_void_p()

    def __enter__(self) -> None:
        self.get(ctypes.byref(self.before), ctypes.byref(self.before_data))
        self.set(self.callback, None)

    def __exit__(self, *_: object) -> None:
        self.set(self.before, self.before_data)
