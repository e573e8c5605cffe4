"""Quantized models and their reference: transformers with the weights that the quantized file holds, dequantized.

The reference is in float32 throughout. The runtime isn't: it quantizes the activations of each matrix product, too, to 8 bits.
"""

from __future__ import annotations

import copy
import subprocess
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from support.families import Family
from support.oracle import Model, Subject

from lt_gguf.runtime.library import tool_path

# Rows of K-quants are multiples of 256 values; heads of 64, so that Q, K and V have several and are different in size.
FAMILY = Family("llama-256", "LlamaConfig", {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64})
N_LAYER = 2
TYPES = ("q8_0", "q4_0", "q4_1", "q4_K", "q5_K", "q6_K")


def quantize(source: Path, type_: str) -> Path:
    """`source` with every matrix in one type, beside it. Raises RuntimeError if llama-quantize fails."""
    out = source.with_name(f"{source.stem}-{type_}.gguf")
    name = f"{type_}_S" if type_ in ("q4_K", "q5_K") else type_  # the mixtures' names; --pure makes them of one type
    command = [tool_path("llama-quantize"), "--pure", "--output-tensor-type", type_, "--token-embedding-type", type_]
    done = subprocess.run([*command, source, out, name.upper(), "1"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"llama-quantize {type_}: {done.stderr.strip().splitlines()[-1]}")
    return out


def with_weights_of(model: torch.nn.Module, file: Path, type_: str) -> torch.nn.Module:
    """A copy of the transformers Llama `model` whose matrices are those of the GGUF file, all of which must be of `type_`."""
    config = model.config
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    copied = copy.deepcopy(model)
    for name, parameter in copied.named_parameters():
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        weights = dequantize(tensor.data, tensor.tensor_type)
        if parameter.dim() == 2:
            assert tensor.tensor_type.name.lower() == type_.lower(), f"{tensor.name} is {tensor.tensor_type.name}"
        if n_head := heads.get(name.split(".")[-2]):
            weights = _halves_together(weights, n_head)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(np.array(weights)))
    return copied


def without(model: torch.nn.Module, one_in: int) -> torch.nn.Module:
    """A copy of the transformers model in whose matrices one in so many values of each row is zero."""
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.dim() == 2:
                parameter[:, ::one_in] = 0
    return copied


def _halves_together(weights: np.ndarray, n_head: int) -> np.ndarray:
    """The rows in transformers' order: llama.cpp's converter writes a head's two halves, which RoPE turns together, in turns."""
    n_rows, n_columns = weights.shape
    return weights.reshape(n_head, n_rows // n_head // 2, 2, n_columns).swapaxes(1, 2).reshape(n_rows, n_columns)


def build(base: Subject, type_: str) -> Subject:
    """`base`, a Llama, in quantized weights."""
    file = quantize(base.native.path, type_)
    return Subject(f"{base.family}-{type_}", with_weights_of(base.hf, file, type_), Model(file))
