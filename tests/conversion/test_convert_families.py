"""The converter against upstream's, for many architectures: every tensor byte for byte, every other key the same.

Sharded and single checkpoints, tied and untied embeddings, and the types of the weights take turns; `--full` crosses them.
"""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import zlib
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import transformers
from support.compare_gguf import assert_same_but_for_the_streaming_keys
from support.convert_worker import write_word_list
from support.families import COMMON, FAMILIES, SLIDING_FAMILIES, randomize

from lt_gguf.gguf.file import read_model
from lt_gguf.runtime.library import upstream_dir
from lt_gguf.spec import Provenance, StreamingSpec

WORKER = Path(__file__).parents[1] / "support" / "convert_both.py"
N_LAYER = 2
OUTTYPES = ("f16", "bf16", "q8_0", "f32", "auto")

# transformers' config class, what differs from COMMON, and what upstream asks for and transformers 5 no longer writes
MORE = {
    "falcon": ("FalconConfig", {"new_decoder_architecture": True, "num_kv_heads": 2}, {"num_hidden_layers": N_LAYER}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}, {}),
    "olmo2": ("Olmo2Config", {}, {}),
    "granite": ("GraniteConfig", {}, {}),
    "glm4": ("Glm4Config", {"head_dim": 32}, {}),
    "phi": ("PhiConfig", {}, {}),
    "gpt2": ("GPT2Config", {"n_embd": 128, "n_head": 4}, {"n_ctx": 8192}),
    "qwen3-moe": ("Qwen3MoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "head_dim": 32}, {}),
    "olmo": ("OlmoConfig", {}, {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.0625}, {}),
}
ALWAYS_TIED = ("gemma", "gemma2", "gemma3", "gemma4", "cohere", "cohere2", "gpt2")  # upstream writes no output matrix for these
NAMES = (*FAMILIES, *MORE, *SLIDING_FAMILIES)
TAKING_TURNS = [(name, i % 2 == 0, i % 4 < 2, OUTTYPES[i % len(OUTTYPES)]) for i, name in enumerate(NAMES)]
CROSSED = [case for case in product(NAMES, (False, True), (False, True), OUTTYPES) if case not in TAKING_TURNS]


def n_layer(name: str) -> int:
    return SLIDING_FAMILIES[name][1] if name in SLIDING_FAMILIES else N_LAYER


def save(name: str, folder: Path, tied: bool, sharded: bool, dtype: torch.dtype) -> dict:
    """Writes a checkpoint with random weights; returns what upstream has to be told beside its config."""
    tied = tied or name in ALWAYS_TIED
    if name in (*FAMILIES, *SLIDING_FAMILIES):
        family = FAMILIES[name] if name in FAMILIES else SLIDING_FAMILIES[name][0]
        config, hparams = family.build_config(n_layer(name)), family.hparams
        config.tie_word_embeddings = tied
    else:
        class_name, options, hparams = MORE[name]
        options = COMMON | {"num_hidden_layers": N_LAYER, "tie_word_embeddings": tied} | options
        config = getattr(transformers, class_name)(**options)
    torch.manual_seed(zlib.crc32(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0.8)
    model.to(dtype).save_pretrained(folder, max_shard_size="150KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == sharded
    if name in ("gemma3", "gemma4"):
        write_word_list(folder)
    return hparams


@cache
def worker() -> subprocess.Popen:
    command = [sys.executable, str(WORKER), str(upstream_dir())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    atexit.register(process.stdin.close)  # which ends it
    return process


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, tied, sharded, outtype", [*TAKING_TURNS, *(pytest.param(*case, marks=pytest.mark.full) for case in CROSSED)]
)
def test_equals_upstream(name, tied, sharded, outtype, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    hparams = save(name, checkpoint, tied, sharded, torch.bfloat16 if outtype in ("bf16", "auto") else torch.float32)
    n = n_layer(name)
    spec = StreamingSpec((n - 1,), n, sink=3, window=50)
    provenance = Provenance("manual", (0.25, *[float("nan")] * (n - 1)), '{"samples": 1}')
    files = [tmp_path / "ours.gguf", tmp_path / "upstream.gguf"]
    # llama.cpp's name of it, from a first file that doesn't stream
    ask(checkpoint, tmp_path, ["--outtype", "f16"], {}, hparams)
    arch = read_model(files[1]).architecture
    metadata = spec.to_metadata(arch) | provenance.to_metadata()
    ask(checkpoint, tmp_path, ["--outtype", outtype], {key: list(typed) for key, typed in metadata.items()}, hparams)
    assert_same_but_for_the_streaming_keys(*files, n_added=8)
    model = read_model(files[0])
    assert model.architecture == arch
    assert model.spec == spec
    assert (model.provenance.selection, model.provenance.calibration) == ("manual", '{"samples": 1}')
    assert model.provenance.lazy_ratio[0] == 0.25 and model.provenance.lazy_ratio[1] != model.provenance.lazy_ratio[1]
    has_output = b"\0output.weight" in files[0].read_bytes()[: 1 << 20]
    assert has_output != (tied or name in ALWAYS_TIED)


def ask(checkpoint: Path, folder: Path, arguments: list[str], metadata: dict, hparams: dict) -> None:
    request = {"checkpoint": str(checkpoint), "folder": str(folder), "arguments": arguments, "metadata": metadata}
    request["hparams"] = hparams
    process = worker()
    print(json.dumps(request), file=process.stdin, flush=True)
    answer = process.stdout.readline()
    assert answer == "\n", answer or "the converter ended without an answer"
