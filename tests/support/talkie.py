"""A model whose layers pass on more than the hidden states: each adds the embeddings of the tokens once more."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

_LEFT_OUT = ("attn_norm.weight", "ffn_norm.weight", "output_norm.weight")  # its norms have no weights


def write_talkie(path: Path, llama: Path) -> Path:
    """Writes a Llama's weights as those of a Talkie model."""
    reader = gguf.GGUFReader(llama)
    writer = gguf.GGUFWriter(path, "talkie")
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture", "llama.streaming")):
            sub_type = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(key.replace("llama.", "talkie."), field.contents(), field.types[0], sub_type)
    writer.add_logit_scale(1.0)
    n_layer, n_head = (reader.fields[f"llama.{key}"].contents() for key in ("block_count", "attention.head_count"))
    for tensor in reader.tensors:
        if not tensor.name.endswith(_LEFT_OUT):
            writer.add_tensor(tensor.name, tensor.data)
    for il in range(n_layer):
        writer.add_tensor(f"blk.{il}.attn_q_norm.weight", np.ones((n_head, 1), np.float32))
        writer.add_tensor(f"blk.{il}.layer_output_scale.weight", np.full(1, 0.5, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
