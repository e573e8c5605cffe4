"""Runs a hybrid model split over two RPC devices, in a process of its own.

    python rpc_child.py MODEL.gguf SPEC TOKENS.npy OUT.npz ENDPOINT ENDPOINT

A device, once added, stays for good.
"""

import ctypes
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.native import FULL, STREAMING, Model, log


def add_devices(endpoints: list[str]) -> None:
    from llama_cpp.llama_cpp import _lib as llama

    directory = Path(llama._name).parent
    suffix = "dylib" if sys.platform == "darwin" else "so"
    rpc = ctypes.CDLL(str(directory / f"libggml-rpc.{suffix}"))
    ggml = ctypes.CDLL(str(directory / f"libggml.{suffix}"))
    rpc.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
    rpc.ggml_backend_rpc_add_server.argtypes = [ctypes.c_char_p]
    ggml.ggml_backend_register.argtypes = [ctypes.c_void_p]
    for endpoint in endpoints:
        ggml.ggml_backend_register(rpc.ggml_backend_rpc_add_server(endpoint.encode()))


def main(path: str, spec: str, tokens_path: str, out: str, *endpoints: str) -> None:
    add_devices(list(endpoints))
    tokens = np.load(tokens_path)
    with Model(path, n_gpu_layers=99) as model:
        model.set_streaming(spec)
        context = model.context(n_ctx=512, n_batch=512, n_ubatch=32)
        n = len(tokens)
        logits = context.decode(tokens[: n - 60])
        state = context.save_seq()
        logits = np.concatenate([logits, context.decode(tokens[n - 60 :], start=n - 60)])

        # what the server does: keep the first tokens, drop some, close the gap
        context.seq_rm(0, 8, 100)
        context.seq_add(0, 100, -1, -92)
        shifted = context.decode(tokens[:20], start=n - 92)

        restored = model.context(n_ctx=512, n_batch=512, n_ubatch=32)
        assert restored.restore_seq(state)
        again = restored.decode(tokens[n - 60 :], start=n - 60)
        buffers = [line for line in [*log.lines, *context.log] if "KV buffer size" in line]
        np.savez(out, logits=logits, shifted=shifted, again=again, buffers=buffers,
                 kv_bytes=[context.kv_bytes(FULL), context.kv_bytes(STREAMING)])  # fmt: skip
        context.close()
        restored.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
