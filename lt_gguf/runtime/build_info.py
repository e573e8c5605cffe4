"""What the native libraries say of themselves: llama.cpp's commit, and the backends with their devices.

Importing this module loads them and raises `LibraryError` if they are missing or don't fit.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from lt_gguf.runtime.library import LIBRARY, library_dir, load_llama_cpp

_COMMON = LIBRARY.replace("libllama.", "libllama-common.")
_COMMIT = (
    "_Z12llama_commitv"  # llama_commit() of llama.cpp's common/build-info.h; it is C++, whose names look so on Linux and macOS
)
_FEATURES = b"ggml_backend_get_features"  # of ggml-backend.h
_GPU_DEVICES = (1, 2)  # enum ggml_backend_dev_type: GPUs with memory of their own, and those that share the computer's


class _Feature(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("value", ctypes.c_char_p)]


@dataclass(frozen=True)
class Backend:
    """A backend of ggml.

    Args:
        name: as in CPU, CUDA or Metal.
        devices: what its devices are called, as in an ordinary listing of hardware.
        features: what of the hardware it was compiled for, or chose when it was loaded, as in AVX512.
    """

    name: str
    devices: tuple[str, ...]
    features: tuple[str, ...]

    def __str__(self) -> str:
        features = f" [{' '.join(self.features)}]" if self.features else ""
        return f"{self.name}: {', '.join(self.devices) or 'no device'}{features}"


def llama_cpp_commit() -> str | None:
    """The commit of llama.cpp that the libraries were built from, `None` if they don't say."""
    try:
        common = ctypes.CDLL(str(library_dir() / _COMMON))
        function = getattr(common, _COMMIT)
    except (OSError, AttributeError):
        return None
    function.restype = ctypes.c_char_p
    commit = function().decode()
    return None if commit in ("", "unknown") else commit


def backends() -> list[Backend]:
    """All backends that are there, each with its devices, in the order in which ggml has them."""
    _llama_cpp = load_llama_cpp().llama_cpp
    _llama_cpp.llama_backend_init()  # which loads those that are libraries of their own
    ggml = _ggml()
    found = []
    for i in range(ggml.ggml_backend_reg_count()):
        registered = ggml.ggml_backend_reg_get(i)
        devices = (ggml.ggml_backend_reg_dev_get(registered, k) for k in range(ggml.ggml_backend_reg_dev_count(registered)))
        descriptions = tuple(ggml.ggml_backend_dev_description(device).decode().strip() for device in devices)
        found.append(Backend(ggml.ggml_backend_reg_name(registered).decode(), descriptions, _features(ggml, registered)))
    return found


def has_gpu() -> bool:
    """Whether layers can run on anything but the CPU. (`llama_supports_gpu_offload` says so of any build that knows RPC.)"""
    load_llama_cpp().llama_cpp.llama_backend_init()
    return any(_ggml().ggml_backend_dev_by_type(kind) for kind in _GPU_DEVICES)


def _ggml() -> ctypes.CDLL:
    """The library with ggml's registry of backends, which libllama has loaded already."""
    ggml = ctypes.CDLL(str(library_dir() / LIBRARY.replace("libllama.", "libggml.")))
    for name, result, *arguments in (
        ("ggml_backend_reg_count", ctypes.c_size_t),
        ("ggml_backend_reg_get", ctypes.c_void_p, ctypes.c_size_t),
        ("ggml_backend_reg_name", ctypes.c_char_p, ctypes.c_void_p),
        ("ggml_backend_reg_dev_count", ctypes.c_size_t, ctypes.c_void_p),
        ("ggml_backend_reg_dev_get", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
        ("ggml_backend_reg_get_proc_address", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p),
        ("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p),
        ("ggml_backend_dev_by_type", ctypes.c_void_p, ctypes.c_int),
    ):
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    return ggml


def _features(ggml: ctypes.CDLL, registered: int) -> tuple[str, ...]:
    """Those that are on; not every backend tells them."""
    address = ggml.ggml_backend_reg_get_proc_address(registered, _FEATURES)
    if not address:
        return ()
    features = ctypes.CFUNCTYPE(ctypes.POINTER(_Feature), ctypes.c_void_p)(address)(registered)
    names, i = [], 0
    while features and features[i].name:
        name, value = features[i].name.decode(), features[i].value.decode()
        if value != "0":
            names.append(name if value == "1" else f"{name}={value}")
        i += 1
    return tuple(names)
