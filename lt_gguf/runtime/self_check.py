"""Whether this machine computes with the usual kinds of weights: a tiny random model of each is run.

    python -m lt_gguf.runtime.self_check

Each kind has code of its own for each family of CPUs, so one may crash where another works. The models run in a process of their
own, and a crash there is a line here; the tests begin with it. Checked are a prompt (matrix times matrix) and single tokens
(matrix times vector), with full attention and with a streaming layer, against the same weights in float32.
"""

from __future__ import annotations

import ctypes
import json
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lt_gguf.gguf.header import DEFAULT_ALIGNMENT, MAGIC, encode_pair
from lt_gguf.runtime import crash
from lt_gguf.runtime.cpu import cpu_flags, cpu_name
from lt_gguf.spec import Typed

# The types of weights, and llama.cpp's numbers of files that hold them alone (enum llama_ftype).
TYPES = {
    "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_1": 3, "q5_0": 8, "q4_K": 15, "q5_K": 17, "q6_K": 18, "iq4_nl": 25, "iq4_xs": 30,
}  # fmt: skip
ATTENTION = {"full attention": "off", "a streaming layer": "layers=1;sink=2;window=12;prefill=stream"}

# Kernels round what is multiplied with quantized weights to 8 bits. In standard deviations of the logits, largest of all;
# measured is at most 0.16, and a wrong kernel gives several.
TOLERANCE = 0.4

N_VOCAB, N_EMBD, N_FF, N_LAYER, N_HEAD, N_HEAD_KV = 320, 256, 512, 2, 4, 2
N_PROMPT, N_DECODED = 40, 4
SECONDS = 120  # that a child may take
_CHILD = (sys.executable, "-m", "lt_gguf.runtime.self_check", "--here")

Show = Callable[[str, float], None]


def check(types: Sequence[str] = tuple(TYPES), show: Show = lambda type_, difference: None) -> list[str]:
    """Runs the check in processes of their own.

    Args:
        types: keys of `TYPES`.
        show: is told each type that works, and how far its logits are from those of the same weights in float32, in standard
            deviations.

    Returns:
        a line for each type that doesn't work: the type, what was being done, where it crashed, and the CPU.
    """
    problems: list[str] = []
    left = list(types)
    while left:
        begun, status, errors = "", 0, ""
        try:
            child = subprocess.run([*_CHILD, *left], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS)
            output, status, errors = child.stdout, child.returncode, child.stderr
        except subprocess.TimeoutExpired as late:
            output, status = (late.stdout or b"").decode(), 1
            errors = f"it hasn't ended after {SECONDS} seconds"
        for message in map(json.loads, output.splitlines()):
            begun = message["type"]
            if "difference" in message:
                left.remove(begun)
                show(begun, message["difference"])
        if status == 0 and not left:
            break
        problems.append(f"{f'{begun} weights: ' if begun in left else ''}{_complaint(begun, status, errors)}")
        if begun not in left:  # it isn't a matter of the weights
            break
        left.remove(begun)
    return problems


def _complaint(begun: str, status: int, errors: str) -> str:
    """One line about a child that has failed. `begun`: the type that it began with last, empty if it didn't get so far."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    if status >= 0:
        return (lines or [f"ended with status {status}"])[-1].removeprefix("error: ")
    crashed = re.search(r"^crash: (.*)$", errors, re.MULTILINE)
    where = re.search(r"^  in (.*)$", errors, re.MULTILINE)
    if not crashed:
        return crash.describe_death("the process", "computing" if begun else "loading the native library", -status)
    return f"{crashed[1]}{f', in {where[1]}' if where else ''}, on {cpu_name()} ({' '.join(cpu_flags()) or 'no flags known'})"


# -- the child


def _run_here(types: Sequence[str]) -> None:
    """Checks the types, one after the other; lines of JSON on stdout say which one has begun and which one works."""
    from lt_gguf.runtime.library import load_llama_cpp

    crash.enable("self-check")
    load_llama_cpp()  # what fails here is no matter of the weights
    with tempfile.TemporaryDirectory(prefix="lt-gguf-") as name:
        folder = Path(name)
        exact = folder / "f32.gguf"
        write_random_model(exact)
        for type_ in types:
            print(json.dumps({"type": type_}), flush=True)
            difference = max(_differences(exact, folder, type_))
            print(json.dumps({"type": type_, "difference": difference}), flush=True)


def _differences(exact: Path, folder: Path, type_: str) -> Iterator[float]:
    """The largest difference between the logits with weights of a type and those with the same weights in float32, for each kind of
    attention, in standard deviations. Raises ValueError: it is too large."""
    quantized, same = folder / f"{type_}.gguf", folder / "same.gguf"
    quantize(exact, quantized, TYPES[type_])
    quantize(quantized, same, 0)
    for attention, streaming in ATTENTION.items():
        logits, expected = run_model(quantized, streaming), run_model(same, streaming)
        difference = float(np.abs(logits - expected).max() / expected.std())
        if not difference <= TOLERANCE:  # note: NaN isn't
            raise ValueError(
                f"the logits with {attention} are {difference:.2f} standard deviations from those of the same weights in float32, "
                f"must be at most {TOLERANCE}: {cpu_name()} computes something else"
            )
        yield difference


def run_model(file: Path, streaming: str) -> np.ndarray:
    """Reads a prompt and decodes a few tokens. Returns their logits, float32 (tokens, N_VOCAB)."""
    from lt_gguf.runtime.llama import Llama

    text = np.random.default_rng(1).integers(3, N_VOCAB, N_PROMPT + N_DECODED).tolist()
    settings: dict[str, Any] = {"n_ctx": 64, "n_batch": 64, "logits_all": True, "flash_attn": True, "verbose": False}
    llm = Llama(str(file), streaming=streaming, n_threads=1, n_threads_batch=1, **settings)
    try:
        llm.eval(text[:N_PROMPT])
        for token in text[N_PROMPT:]:
            llm.eval([token])
        return np.array(llm.scores[: len(text)])
    finally:
        llm.close()


def quantize(source: Path, destination: Path, number: int) -> None:
    """Writes a model with all its matrices in one type, given by its number in enum llama_ftype. Raises RuntimeError: it failed."""
    from lt_gguf.runtime.library import load_llama_cpp
    from lt_gguf.runtime.log import captured_errors

    llama_cpp = load_llama_cpp().llama_cpp
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = number, 1
    parameters.pure = parameters.allow_requantize = True
    with captured_errors(forward=False) as log, crash.step(f"quantizing to {destination.name}"):
        if llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(parameters)):
            raise RuntimeError(f"llama.cpp can't quantize {source.name} to {destination.name}: {log.reason}")


def write_random_model(file: Path) -> None:
    """Writes a Llama with random weights in float32; the same each time."""
    random = np.random.default_rng(0)
    head_dim = N_EMBD // N_HEAD

    def matrix(n_out: int, n_in: int) -> np.ndarray:
        return random.normal(0, n_in**-0.5, (n_out, n_in)).astype(np.float32)

    tensors = {"token_embd": matrix(N_VOCAB, N_EMBD), "output_norm": np.ones(N_EMBD, np.float32), "output": matrix(N_VOCAB, N_EMBD)}
    for layer in range(N_LAYER):
        tensors |= {
            f"blk.{layer}.attn_norm": np.ones(N_EMBD, np.float32),
            f"blk.{layer}.attn_q": matrix(N_EMBD, N_EMBD),
            f"blk.{layer}.attn_k": matrix(N_HEAD_KV * head_dim, N_EMBD),
            f"blk.{layer}.attn_v": matrix(N_HEAD_KV * head_dim, N_EMBD),
            f"blk.{layer}.attn_output": matrix(N_EMBD, N_EMBD),
            f"blk.{layer}.ffn_norm": np.ones(N_EMBD, np.float32),
            f"blk.{layer}.ffn_gate": matrix(N_FF, N_EMBD),
            f"blk.{layer}.ffn_up": matrix(N_FF, N_EMBD),
            f"blk.{layer}.ffn_down": matrix(N_EMBD, N_FF),
        }
    words = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    words += [f"word{i}" for i in range(N_VOCAB - len(words))]
    metadata = {
        "general.architecture": Typed("string", "llama"),
        "llama.context_length": Typed("uint32", 4096),
        "llama.embedding_length": Typed("uint32", N_EMBD),
        "llama.block_count": Typed("uint32", N_LAYER),
        "llama.feed_forward_length": Typed("uint32", N_FF),
        "llama.attention.head_count": Typed("uint32", N_HEAD),
        "llama.attention.head_count_kv": Typed("uint32", N_HEAD_KV),
        "llama.rope.dimension_count": Typed("uint32", head_dim),
        "llama.attention.layer_norm_rms_epsilon": Typed("float32", 1e-5),
        "tokenizer.ggml.model": Typed("string", "llama"),
        "tokenizer.ggml.tokens": Typed("array of string", words),
        "tokenizer.ggml.scores": Typed("array of float32", [0.0] * N_VOCAB),
        # unknown, control, bytes, normal
        "tokenizer.ggml.token_type": Typed("array of int32", [2, 3, 3] + [6] * 256 + [1] * (N_VOCAB - 259)),
    }
    _write_gguf(file, metadata, {f"{name}.weight": tensor for name, tensor in tensors.items()})


def _write_gguf(file: Path, metadata: dict[str, Typed], tensors: dict[str, np.ndarray]) -> None:
    """Tensors are float32 and a multiple of the alignment long."""
    infos, offset = b"", 0
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        infos += struct.pack("=Q", len(name)) + name.encode()
        infos += struct.pack(f"=I{len(shape)}QIQ", len(shape), *shape, 0, offset)  # 0: float32
        offset += tensor.nbytes
    header = MAGIC + struct.pack("=IQQ", 3, len(tensors), len(metadata))
    header += b"".join(encode_pair(key, typed) for key, typed in metadata.items()) + infos
    padding = -len(header) % DEFAULT_ALIGNMENT
    file.write_bytes(header + bytes(padding) + b"".join(tensor.tobytes() for tensor in tensors.values()))


def main(arguments: Sequence[str] = sys.argv[1:]) -> Any:
    if arguments[:1] == ["--here"]:
        try:
            return _run_here(arguments[1:])
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            return f"error: {' '.join(str(error).split())}"
    if unknown := set(arguments) - set(TYPES):
        return f"error: {', '.join(sorted(unknown))}: must be among {', '.join(TYPES)}"
    print(f"{cpu_name()}, logits beside those of the same weights in float32:")

    def show(type_: str, difference: float) -> None:
        print(f"  {type_:7} works, within {difference:.3f} standard deviations")

    problems = check(arguments or tuple(TYPES), show)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
