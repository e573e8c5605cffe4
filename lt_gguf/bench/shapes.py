"""Models with random weights, of the shapes of known ones: how fast a model is depends on its shape, not on what it says."""

from __future__ import annotations

import functools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize

from lt_gguf.memory.sizes import format_bytes

WEIGHT_TYPES = {name: GGMLQuantizationType[name.upper()] for name in ("f16", "q8_0", "q4_0")}
DEFAULT_WEIGHT_TYPE = "q4_0"  # of those, what people run

_N_CTX = 1 << 20  # so that no depth is refused


class Shape(NamedTuple):
    """A Llama's; `is_tied`: the embeddings are the output matrix, too."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    head_size: int
    n_ff: int
    n_vocab: int
    is_tied: bool = False


SHAPES = {
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, True),
    "llama-3.2-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256),
    "qwen2.5-1.5b": Shape(28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 128, 18944, 152064),
    "qwen2.5-32b": Shape(64, 5120, 40, 8, 128, 27648, 152064),
    "16x8x64": Shape(16, 1024, 16, 8, 64, 2048, 4096),  # few weights, so that the cache is nearly all that is read
}


def shape_of(name: str, n_layer: int | None = None) -> Shape:
    """A known shape, with fewer layers if asked for: ratios of speeds stay what they are where the output matrix is small beside them.

    Raises:
        ValueError: there is no such shape, or it has fewer layers than that.
    """
    if name not in SHAPES:
        raise ValueError(f'--shape = "{name}": must be one of {", ".join(SHAPES)}')
    shape = SHAPES[name]
    if n_layer is None:
        return shape
    if not 1 <= n_layer <= shape.n_layer:
        raise ValueError(f"--shape-layers = {n_layer}: must be from 1 to {shape.n_layer}, the layers of {name}")
    return shape._replace(n_layer=n_layer)


def random_model(folder: Path, name: str, n_layer: int | None = None, weights: str = DEFAULT_WEIGHT_TYPE) -> Path:
    """The file of a shape in a folder of such files; it is written if it isn't there.

    Raises:
        ValueError: there is no such shape or type of weights.
        OSError: the folder can't be written, or the disk is too full.
    """
    shape = shape_of(name, n_layer)
    if weights not in WEIGHT_TYPES:
        raise ValueError(f'--weights = "{weights}": must be one of {", ".join(WEIGHT_TYPES)}')
    layers = "" if n_layer is None else f"-{n_layer}-layers"
    path = folder / f"random-{name}{layers}-{weights}.gguf"
    if not path.exists():
        write_random_model(path, shape, WEIGHT_TYPES[weights])
    return path


def write_random_model(path: Path, shape: Shape, type_: GGMLQuantizationType) -> None:
    """A Llama with random weights; appears under its name only when it is whole. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(0).standard_normal(1 << 22, np.float32)  # once and again: only their number matters

    @functools.cache
    def rows(n_in: int) -> np.ndarray:
        return quantize(values[: values.size // n_in * n_in].reshape(-1, n_in) / n_in**0.5, type_)

    def tensor(n_in: int, n_out: int | None) -> np.ndarray:
        return np.ones(n_in, np.float32) if n_out is None else np.resize(rows(n_in), (n_out, rows(n_in).shape[1]))

    tensors = list(_tensors(shape))
    n_bytes = [4 * n_in if n_out is None else n_out * rows(n_in)[0].nbytes for _, n_in, n_out in tensors]
    if sum(n_bytes) > (free := shutil.disk_usage(path.parent).free):
        needed = format_bytes(sum(n_bytes))
        raise OSError(f"{path.parent}: {needed} of random weights don't fit, {format_bytes(free)} are free")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        writer = GGUFWriter(Path(scratch) / path.name, "llama")
        _add_metadata(writer, shape)
        for (name, n_in, n_out), size in zip(tensors, n_bytes):
            kind = GGMLQuantizationType.F32 if n_out is None else type_
            example = tensor(n_in, 1) if n_out else tensor(n_in, None)
            stored = example.shape if n_out is None else (n_out, example.shape[1])
            writer.add_tensor_info(name, stored, example.dtype, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, n_in, n_out in tensors:  # note: one at a time, the whole model may be larger than memory
            writer.write_tensor_data(tensor(n_in, n_out))
        writer.close()
        (Path(scratch) / path.name).rename(path)


def _add_metadata(writer: GGUFWriter, shape: Shape) -> None:
    writer.add_name("random weights, for benchmarks only")
    writer.add_context_length(_N_CTX)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_key_length(shape.head_size)
    writer.add_value_length(shape.head_size)
    writer.add_rope_dimension_count(shape.head_size)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_tokenizer_model("no_vocab")


def _tensors(shape: Shape) -> Iterator[tuple[str, int, int | None]]:
    """Name, size of a row and number of rows of each; of a norm, which is a vector of ones, its size."""
    n_q, n_kv = shape.n_head * shape.head_size, shape.n_head_kv * shape.head_size
    yield "token_embd.weight", shape.n_embd, shape.n_vocab
    if not shape.is_tied:
        yield "output.weight", shape.n_embd, shape.n_vocab
    yield "output_norm.weight", shape.n_embd, None
    for layer in range(shape.n_layer):
        prefix = f"blk.{layer}."
        yield f"{prefix}attn_norm.weight", shape.n_embd, None
        yield f"{prefix}attn_q.weight", shape.n_embd, n_q
        yield f"{prefix}attn_k.weight", shape.n_embd, n_kv
        yield f"{prefix}attn_v.weight", shape.n_embd, n_kv
        yield f"{prefix}attn_output.weight", n_q, shape.n_embd
        yield f"{prefix}ffn_norm.weight", shape.n_embd, None
        yield f"{prefix}ffn_gate.weight", shape.n_embd, shape.n_ff
        yield f"{prefix}ffn_up.weight", shape.n_embd, shape.n_ff
        yield f"{prefix}ffn_down.weight", shape.n_ff, shape.n_embd
