"""A LoRA adapter on a hybrid model: the logits of transformers with the adapter merged into the weights."""

from __future__ import annotations

import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.oracle import EXACT, RELATIVE, Subject, difference, random_tokens

RANK, ALPHA = 4, 8.0
# GGUF's names of a layer's matrices -> transformers'; all of them, so that streaming layers have adapters of each kind
MATRICES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def merged_and_adapter(model: Subject, path: Path) -> Subject:
    """Writes a random adapter for `model` to `path`; returns the model with its weights merged on transformers' side."""
    random = np.random.default_rng(0)
    merged = copy.deepcopy(model.hf)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for layer in range(model.n_layer):
        for name, module_name in MATRICES.items():
            weight = merged.get_submodule(f"model.layers.{layer}.{module_name}").weight
            n_out, n_in = weight.shape
            a = random.normal(0, n_in**-0.5, (RANK, n_in)).astype(np.float32)
            b = random.normal(0, 0.15, (n_out, RANK)).astype(np.float32)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b)
            with torch.no_grad():
                weight += torch.from_numpy(b @ a) * ALPHA / RANK
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Subject(model.family, merged, model.native)


@pytest.mark.parametrize("kv, flash", [("f32", False), ("f16", True)])
def test_adapter_on_a_hybrid_model(subject, measured, tmp_path, kv, flash):
    model = subject("qwen2")  # of the families that the converter doesn't permute, so that adapters needn't be either
    merged = merged_and_adapter(model, tmp_path / "adapter.gguf")
    adapter = model.native.lora(tmp_path / "adapter.gguf")
    tokens = random_tokens(330)
    errors = []
    for spec in (None, model.spec(4, 40)):
        with model.context(spec, n_ctx=512, n_ubatch=48, kv=kv, flash=flash) as context:
            without = context.decode(tokens)
            context.clear()
            context.set_lora(adapter)
            computed = np.concatenate([context.decode(tokens[:300]), context.decode_one_by_one(tokens[300:], 300)])
        assert difference(computed, without) > 0.5  # the adapter does something
        errors.append(difference(computed, merged.expected(tokens, spec)))
    full, hybrid = errors
    bound = RELATIVE * full if flash else EXACT
    measured("qwen2", f"LoRA adapter, {kv} KV", hybrid, bound, full=full, flash=flash)
