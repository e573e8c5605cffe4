"""What may be wrong with this installation or this computer, and what to do: each check gives findings, `lt-gguf doctor` shows them."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lt_gguf.memory.sizes import format_bytes
from lt_gguf.models.package import CACHE_VARIABLE, user_cache
from lt_gguf.runtime import cpu, self_check
from lt_gguf.runtime.available_memory import available_memory
from lt_gguf.runtime.library import OVERRIDE, LibraryError, library_dir, load_llama_cpp

_LITTLE_MEMORY = 2 << 30  # bytes
_LITTLE_DISK = 2 << 30
# As Linux and ggml write them, those that make the largest difference: what is computed with them is several times as fast.
_FAST = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "amx_int8": "AMX_INT8",
    "fma": "FMA",
    "f16c": "F16C",
    "i8mm": "MATMUL_INT8",
    "asimddp": "DOTPROD",
}
_VARIABLES = ("LT_STREAMING", "LT_PROMPT_LIMIT", OVERRIDE, CACHE_VARIABLE)
_N_PROMPT, _N_DECODED = 512, 48  # tokens


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: its name.
        said: what was found.
        problem: what is wrong and what to do about it; empty if nothing is.
    """

    what: str
    said: str
    problem: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "said": self.said, "problem": self.problem or None}


def findings() -> Iterator[Finding]:
    """All that is known without running a model."""
    yield Finding("lt-gguf", f"{metadata.version('lt-gguf')}, Python {platform.python_version()}, {platform.platform()}")
    yield from _library()
    yield from _processor()
    yield _memory()
    yield from _folders()
    for name in _VARIABLES:
        if value := os.environ.get(name):
            yield Finding("variable", f"{name}={value}")
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    yield Finding("compiler", compiler or "none; it is needed only to build lt-gguf from source")


def _library() -> Iterator[Finding]:
    try:
        binding = load_llama_cpp()
    except LibraryError as error:
        yield Finding("library", "none that fits", f"{error}")
        return
    from lt_gguf.runtime import build_info
    from lt_gguf.runtime.log import captured_errors

    commit = build_info.llama_cpp_commit()
    yield Finding(
        "library", f"{library_dir()}: llama.cpp {commit or '(unknown commit)'}, patched; llama-cpp-python {binding.__version__}"
    )
    with captured_errors(forward=False) as log:  # a backend may have something to say when it is loaded
        backends = build_info.backends()
    for backend in backends:
        if backend.devices or backend.name == "CPU":
            yield Finding("backend", str(backend))
    if log.reason:
        yield Finding("backend", "one isn't there", log.reason)
    features = {feature.split("=")[0] for backend in backends for feature in backend.features}
    missing = sorted(flag for flag, name in _FAST.items() if flag in cpu.cpu_flags() and name not in features)
    if missing:
        yield Finding(
            "speed",
            f"the library doesn't use {', '.join(missing)} of this processor",
            "it was built for plainer ones: a build from source, on this computer, is faster (pip install -v .)",
        )


def _processor() -> Iterator[Finding]:
    yield Finding("CPU", f"{cpu.cpu_name()} ({' '.join(cpu.cpu_flags()) or 'no flags known'})")
    n, logical = cpu.usable_cores(), os.cpu_count() or 1
    yield Finding("threads", f"{n}, a physical core each; the system counts {logical} CPUs")


def _memory() -> Finding:
    n_bytes = available_memory()
    if n_bytes is None:
        return Finding("memory", "how much is available isn't known, so a context is as large as the model was trained for")
    few = "models of a few billion parameters don't fit: end other programs, or take a smaller or a more quantized model"
    return Finding("memory", f"{format_bytes(n_bytes)} available", few if n_bytes < _LITTLE_MEMORY else "")


def _folders() -> Iterator[Finding]:
    folder = user_cache()
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    n_bytes = (
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) if folder.exists() else 0
    )
    free = shutil.disk_usage(parent).free
    said = f"{folder}: {format_bytes(n_bytes)}, {format_bytes(free)} free on its disk"
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        problem = f"it can't be written ({error.strerror}): name another folder in {CACHE_VARIABLE}"
    if not problem and free < _LITTLE_DISK:
        problem = "little room for models and for what they have read: lt-gguf cache clear, or another folder in " + CACHE_VARIABLE
    yield Finding("cache", said, problem)


def check_weights(show: Callable[[str], None] = lambda _: None) -> Iterator[Finding]:
    """Runs a tiny model of each usual kind of weights: some seconds. `show`: told the kinds that work, as they come."""
    right: list[str] = []

    def note(type_: str, _: float) -> None:
        right.append(type_)
        show(type_)

    problems = self_check.check(show=note)
    yield Finding("weights", f"{', '.join(right) or 'no kind'} computed as they should be")
    for line in problems:
        yield Finding("weights", "a kind that doesn't work here", line)


def run_model(file: Path) -> Iterator[Finding]:
    """Runs a model for some seconds, as its file says and with full attention. Raises ValueError: it can't be loaded."""
    from lt_gguf.runtime.llama import Llama

    for streaming, what in ((None, "as the file says"), ("off", "full attention")):
        llm = Llama(file, n_ctx=_N_PROMPT + _N_DECODED, streaming=streaming, verbose=False)
        is_hybrid = llm.streaming is not None
        tokens = [llm.token_bos() if llm.token_bos() >= 0 else 1, *range(100, 100 + _N_PROMPT - 1)]
        begun = time.perf_counter()
        llm.eval([token % llm.n_vocab() for token in tokens])
        read = time.perf_counter()
        for _ in range(_N_DECODED - 1):
            llm.eval([100 % llm.n_vocab()])
        ended = time.perf_counter()
        kv = format_bytes(llm.kv_bytes()["total"])
        llm.close()
        speeds = f"reads {_N_PROMPT / (read - begun):.0f} tokens/s, writes {(_N_DECODED - 1) / (ended - read):.0f} tokens/s"
        yield Finding("model", f"{file.name}, {what}: {speeds}, KV cache {kv}")
        if not is_hybrid:
            return
