"""A random Llama of a few thousand weights as a GGUF file, made without torch: for scripts that look at memory, not at answers."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np

N_VOCAB = 300
N_EMBD, N_FF, N_HEAD, N_HEAD_KV = 64, 96, 2, 1
HEAD_DIM = N_EMBD // N_HEAD


def write_tiny_model(path: Path, n_layer: int = 2) -> Path:
    """Writes the model to `path`, under another name until it is whole. Returns `path`."""
    random = np.random.default_rng(0)
    unfinished = path.with_name(f"{path.name}.unfinished")
    writer = gguf.GGUFWriter(unfinished, "llama")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(N_EMBD)
    writer.add_block_count(n_layer)
    writer.add_feed_forward_length(N_FF)
    writer.add_head_count(N_HEAD)
    writer.add_head_count_kv(N_HEAD_KV)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += [f"word{i}" for i in range(N_VOCAB - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * N_VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (N_VOCAB - 259))  # unknown, control, bytes, normal
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(n_out: int, n_in: int) -> np.ndarray:
        return random.normal(0, n_in**-0.5, (n_out, n_in)).astype(np.float32)

    tensors = {"token_embd": matrix(N_VOCAB, N_EMBD), "output_norm": np.ones(N_EMBD, np.float32)}
    tensors["output"] = matrix(N_VOCAB, N_EMBD)
    for layer in range(n_layer):
        tensors |= {
            f"blk.{layer}.attn_norm": np.ones(N_EMBD, np.float32),
            f"blk.{layer}.attn_q": matrix(N_EMBD, N_EMBD),
            f"blk.{layer}.attn_k": matrix(N_HEAD_KV * HEAD_DIM, N_EMBD),
            f"blk.{layer}.attn_v": matrix(N_HEAD_KV * HEAD_DIM, N_EMBD),
            f"blk.{layer}.attn_output": matrix(N_EMBD, N_EMBD),
            f"blk.{layer}.ffn_norm": np.ones(N_EMBD, np.float32),
            f"blk.{layer}.ffn_gate": matrix(N_FF, N_EMBD),
            f"blk.{layer}.ffn_up": matrix(N_FF, N_EMBD),
            f"blk.{layer}.ffn_down": matrix(N_EMBD, N_FF),
        }
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(unfinished, path)
    return path
